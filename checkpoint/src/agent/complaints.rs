//! Lines in the log about what containers do wrong: a few of each container in a minute, so that none fills the disk.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Lines about one container in [`TIME`].
const LINES: u32 = 10;
const TIME: Duration = Duration::from_secs(60);

/// Who was complained about, and how often.
#[derive(Debug, Default)]
pub struct Complaints(HashMap<String, (Instant, u32)>);

impl Complaints {
    /// The line to be written, if one is.
    pub fn line(&mut self, container: &str, what: impl FnOnce() -> String) -> Option<String> {
        let now = Instant::now();
        self.0.retain(|_, (since, _)| now.duration_since(*since) < TIME);
        let (_, lines) = self.0.entry(container.to_owned()).or_insert((now, 0));
        *lines = lines.saturating_add(1);
        match *lines {
            n if n < LINES => Some(what()),
            LINES => Some(format!("{} (more of container {container} is not written down for a while)", what())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_container_cannot_fill_the_log_and_does_not_silence_another() {
        let mut complaints = Complaints::default();
        let written = (0..1000).filter(|_| complaints.line("loud", || "x".into()).is_some()).count();
        assert_eq!(written, LINES as usize);
        assert_eq!(complaints.line("other", || "y".into()), Some("y".into()));
    }
}
