//! `wait`: the exit status of a supervised container, printed and returned.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::cli::Wait;
use crate::record::Record;
use crate::report::outln;

pub fn run(args: &Wait) -> Result<i32> {
    let record = Record::of(&args.id)?;
    let end = match args.timeout.map(Duration::try_from_secs_f64) {
        Some(Err(_)) => bail!("--timeout must be a positive number of seconds"),
        Some(Ok(timeout)) => Some(Instant::now() + timeout),
        None => None,
    };
    loop {
        if let Some(exit) = record.exit()? {
            if let Some(host) = exit.moved_to {
                bail!("container {} moved to {host}; wait for it there", args.id);
            }
            outln!("{}", exit.status);
            return Ok(exit.status);
        }
        if end.is_some_and(|end| Instant::now() >= end) {
            bail!("container {} still runs after the time to wait", args.id);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
