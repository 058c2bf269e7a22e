//! Where a migration holds CRIU. Every method must be answered deliberately:
//! there are no defaults that let a forgotten gate say yes.

use anyhow::Result;

/// Decisions inside a dump or restore. Each call may block for as long as its
/// own deadlines allow; CRIU waits.
pub trait Gate {
    /// The dump is complete and on disk, the tasks are frozen. `Err` makes
    /// them run again here; after `Ok` they are killed (unless they are left
    /// running).
    fn post_dump(&mut self) -> Result<()>;

    /// The namespaces of the restored init `pid` exist, its mounts do not yet.
    fn setup_namespaces(&mut self, pid: i32) -> Result<()>;

    /// Every task is restored and none has run. The last gate: `Err` kills
    /// them, after `Ok` they run.
    fn post_restore(&mut self, pid: i32) -> Result<()>;
}

/// Holds nothing: plain `checkpoint` and `restore`.
#[derive(Debug, Default)]
pub struct OpenGate;

impl Gate for OpenGate {
    fn post_dump(&mut self) -> Result<()> {
        Ok(())
    }

    fn setup_namespaces(&mut self, _pid: i32) -> Result<()> {
        Ok(())
    }

    fn post_restore(&mut self, _pid: i32) -> Result<()> {
        Ok(())
    }
}
