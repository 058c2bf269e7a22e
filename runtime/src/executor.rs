//! The last step inside a container: from this program to the container's.
//!
//! Replaces libcontainer's own, which insists on a PATH even for absolute
//! commands and words a missing program differently from what engines look
//! for ("executable file not found in $PATH").

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};

use crate::keeper;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes the specification's process, with a [`keeper`] in front or not.
#[derive(Debug, Clone)]
pub struct ContainerExec {
    /// Leave a keeper between the caller and the process.
    pub keep: bool,
}

impl Executor for ContainerExec {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let args = arguments(spec).ok_or(ExecutorError::InvalidArg)?;
        let path = find(spec).map_err(ExecutorError::Other)?;
        let string = |text: &str| CString::new(text).map_err(|_| ExecutorError::InvalidArg);
        let program = string(&path.to_string_lossy())?;
        let argv = args.iter().map(|arg| string(arg)).collect::<Result<Vec<_>, _>>()?;
        if self.keep {
            // Only the child returns.
            keeper::split();
        }
        match nix::unistd::execv(&program, &argv) {
            Ok(never) => match never {},
            Err(err) => Err(ExecutorError::Other(format!("exec {:?}: {err}", args[0]))),
        }
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        find(spec).map(drop).map_err(ExecutorValidationError::ArgValidationError)
    }
}

fn arguments(spec: &Spec) -> Option<&Vec<String>> {
    let args = spec.process().as_ref()?.args().as_ref()?;
    (!args.is_empty()).then_some(args)
}

/// The program's path as the container sees it.
fn find(spec: &Spec) -> Result<PathBuf, String> {
    let args = arguments(spec).ok_or("process.args is empty")?;
    let name = &args[0];
    if name.contains('/') {
        return match usable(Path::new(name)) {
            Usable::Yes => Ok(name.into()),
            Usable::No => Err(format!("exec: {name:?}: permission denied")),
            Usable::Missing => Err(format!("exec: {name:?}: stat {name}: no such file or directory")),
        };
    }
    let env = spec.process().as_ref().and_then(|process| process.env().as_ref());
    let path = env.into_iter().flatten().find_map(|var| var.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for dir in path.split(':') {
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match usable(&candidate) {
            Usable::Yes => return Ok(candidate),
            Usable::No => denied = true,
            Usable::Missing => {}
        }
    }
    match denied {
        true => Err(format!("exec: {name:?}: permission denied")),
        false => Err(format!("exec: {name:?}: executable file not found in $PATH")),
    }
}

enum Usable {
    Yes,
    No,
    Missing,
}

fn usable(path: &Path) -> Usable {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => Usable::Yes,
        Ok(_) => Usable::No,
        Err(_) => Usable::Missing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::{ProcessBuilder, SpecBuilder};

    fn spec(args: &[&str], env: &[&str]) -> Spec {
        let own = |all: &[&str]| all.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let process = ProcessBuilder::default().args(own(args)).env(own(env)).build().unwrap();
        SpecBuilder::default().process(process).build().unwrap()
    }

    #[test]
    fn an_absolute_command_needs_no_path() {
        assert_eq!(find(&spec(&["/bin/sh"], &[])).unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn a_missing_program_is_told_in_engines_words() {
        let err = find(&spec(&["nosuchprogram"], &["PATH=/bin"])).unwrap_err();
        assert_eq!(err, "exec: \"nosuchprogram\": executable file not found in $PATH");
        let err = find(&spec(&["/no/such"], &[])).unwrap_err();
        assert!(err.contains("no such file or directory"));
        let err = find(&spec(&["/etc/passwd"], &[])).unwrap_err();
        assert!(err.contains("permission denied"));
    }
}
