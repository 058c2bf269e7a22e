//! Distilling one line a person can act on from CRIU's log.
//!
//! CRIU's answer on the socket usually carries no more than an errno; the
//! reason stands in the log file, and the *first* error there is the cause of
//! those that follow. Deliberately no catalogue of known problems.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// No more of a log is read than this: enough for the errors, whatever its size.
const LOG_TAIL: u64 = 4 << 20;
/// A distilled cause is cut to this many characters.
const CAUSE_CHARS: usize = 400;

/// Errors CRIU logs on its way to a fallback; they are never the cause.
const NOISE: &[&str] = &["Unable to get /proc/sys/kernel/ns_last_pid", "Could not lookup", "iptables has nft backend"];

/// The first error of the log at `path` (and the second, if it says more),
/// without time stamps, or `None` when there is no log or no error in it.
pub fn root_cause(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL).read_to_end(&mut bytes).ok()?;
    distil(&String::from_utf8_lossy(&bytes))
}

fn distil(log: &str) -> Option<String> {
    let mut errors = log.lines().filter_map(error_text).filter(|text| !NOISE.iter().any(|noise| text.contains(noise)));
    let first = errors.next()?;
    // The summary lines at the end of a log repeat, they do not explain.
    let second = errors
        .find(|text| *text != first)
        .filter(|text| !text.starts_with("Dumping FAILED") && !text.starts_with("Restoring FAILED"));
    let mut cause = soften_errno_texts(first);
    if let Some(second) = second {
        cause.push_str("; then: ");
        cause.push_str(&soften_errno_texts(second));
    }
    if cause.chars().count() > CAUSE_CHARS {
        cause = cause.chars().take(CAUSE_CHARS).collect();
        cause.push('…');
    }
    Some(cause)
}

/// `(00.012345)   1234: Error (criu/files.c:12): text` → `text`.
fn error_text(line: &str) -> Option<&str> {
    let at = line.find("Error (")?;
    let rest = &line[at + "Error (".len()..];
    let text = rest.split_once("): ").map_or(rest, |(_, text)| text).trim();
    (!text.is_empty()).then_some(text)
}

/// Rewrites system error texts that container engines take as statements about
/// the container's command ("no such file or directory" becomes "command not
/// found" there) into errno names.
pub fn soften_errno_texts(text: &str) -> String {
    const TEXTS: &[(&str, &str)] = &[
        ("No such file or directory", "ENOENT"),
        ("no such file or directory", "ENOENT"),
        ("Permission denied", "EACCES"),
        ("permission denied", "EACCES"),
        ("Operation not permitted", "EPERM"),
        ("operation not permitted", "EPERM"),
    ];
    TEXTS.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_error_is_the_cause_and_summaries_are_not() {
        let log = "\
(00.000001) Version: 4.1.1\n\
(00.100000) Error (criu/sk-tcp.c:123): tcp: Connected TCP socket, consider using --tcp-established option.\n\
(00.100100) Error (criu/cr-dump.c:2093): Dumping FAILED.\n";
        assert_eq!(distil(log).as_deref(), Some("tcp: Connected TCP socket, consider using --tcp-established option."));
    }

    #[test]
    fn pid_prefixes_are_cut_and_errno_texts_softened() {
        let log = "(00.2)     61: Error (criu/files-reg.c:1): Can't open file x: No such file or directory\n\
                   (00.3)      1: Error (criu/files.c:2): Unable to open fd=5 id=0x9\n";
        assert_eq!(distil(log).as_deref(), Some("Can't open file x: ENOENT; then: Unable to open fd=5 id=0x9"));
    }

    #[test]
    fn a_log_without_errors_has_no_cause() {
        assert_eq!(distil("(00.1) Warn (x): careful\n"), None);
    }
}
