//! Making a command line that Go programs write readable for clap.
//!
//! Go's flag package takes `-long-name`, `--flag=true` and stops at the first
//! operand; engines rely on all three (containerd restores with
//! `-no-subreaper`). Tokens are only rewritten when they name an option that
//! exists at their place, so operands and a command's own arguments are left
//! alone.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Command};

/// Rewrites `argv` (program name included) for `command`.
pub fn normalise(command: &Command, argv: Vec<OsString>) -> Vec<OsString> {
    let mut out = Vec::with_capacity(argv.len());
    let mut tokens = argv.into_iter();
    out.extend(tokens.next());
    let mut level = command;
    let mut in_verb = false;
    while let Some(token) = tokens.next() {
        let Some(text) = token.to_str().map(str::to_owned) else {
            out.push(token);
            continue;
        };
        if text == "--" {
            out.push(token);
            break;
        }
        if text == "-" || !text.starts_with('-') {
            out.push(token);
            if !in_verb {
                let Some(verb) = level.find_subcommand(&text) else {
                    break;
                };
                level = verb;
                in_verb = true;
            } else if level.get_positionals().any(Arg::is_trailing_var_arg_set) {
                // What follows the id belongs to the command to run.
                break;
            }
            continue;
        }
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text.as_str(), None),
        };
        let Some(arg) = find(level, name) else {
            out.push(token);
            continue;
        };
        let long = match name.strip_prefix("--") {
            Some(_) => name.to_owned(),
            None if name.len() > 2 => format!("-{name}"),
            None => name.to_owned(),
        };
        let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
        match (takes_value, value) {
            (true, Some(value)) => out.push(format!("{long}={value}").into()),
            (true, None) => {
                out.push(long.into());
                out.extend(tokens.next());
            }
            (false, Some("false" | "0")) => {}
            (false, _) => out.push(long.into()),
        }
    }
    out.extend(tokens);
    out
}

fn find<'a>(level: &'a Command, name: &str) -> Option<&'a Arg> {
    let bare = name.trim_start_matches('-');
    level.get_arguments().find(|arg| {
        let short = bare.len() == 1 && name.len() == 2;
        match short {
            true => arg.get_short().is_some_and(|c| bare.starts_with(c)),
            false => arg.get_long() == Some(bare),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Verb};
    use clap::{CommandFactory, Parser};

    fn parse(line: &str) -> Verb {
        let argv = line.split_whitespace().map(OsString::from).collect();
        let argv = normalise(&Cli::command(), argv);
        Cli::try_parse_from(argv).unwrap().verb.unwrap()
    }

    #[test]
    fn single_dash_long_options_are_understood() {
        let Verb::Restore(args) =
            parse("migrrdma --root /r restore --image-path I --detach -no-subreaper --bundle B x")
        else {
            panic!()
        };
        assert!(args.no_subreaper && args.detach);
        assert_eq!(args.id, "x");
    }

    #[test]
    fn a_flag_may_come_twice() {
        let Verb::Checkpoint(args) = parse("migrrdma checkpoint --leave-running --tcp-established --leave-running x")
        else {
            panic!()
        };
        assert!(args.leave_running && args.criu.tcp_established);
    }

    #[test]
    fn go_booleans_are_understood() {
        let Verb::Kill(args) = parse("migrrdma kill --all=true x 9") else { panic!() };
        assert!(args.all);
        let Verb::Delete(args) = parse("migrrdma delete --force=false x") else { panic!() };
        assert!(!args.force);
    }

    #[test]
    fn a_commands_own_arguments_are_left_alone() {
        let Verb::Exec(args) = parse("migrrdma exec -env A=1 --tty x ls -env --detach=true -l") else { panic!() };
        assert_eq!(args.env, ["A=1"]);
        assert_eq!(args.command, ["ls", "-env", "--detach=true", "-l"]);
        assert!(!args.detach);
    }

    #[test]
    fn a_value_that_looks_like_an_option_is_a_value() {
        let Verb::Update(args) = parse("migrrdma update --memory -1 --pids-limit -1 x") else { panic!() };
        assert_eq!(args.memory, Some(-1));
    }

    #[test]
    fn what_conmon_and_podman_send_is_accepted() {
        parse(
            "migrrdma --systemd-cgroup --log-format=json --log /l --cgroup-manager disabled create --bundle /b --pid-file /p --no-new-keyring x",
        );
        parse(
            "migrrdma restore --bundle B --pid-file F --no-new-keyring --detach --image-path I --work-path W --preserve-fds 1 --tcp-close --file-locks x",
        );
        parse("migrrdma kill --all x 15");
    }
}
