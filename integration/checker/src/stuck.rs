//! Where the threads of this process are, for the report of one that does not go on: the system call each waits in, and
//! what looks like return addresses on its stack. Addresses of calls that ended long ago may be among them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

/// How much of a stack is looked at, bytes.
const DEPTH: usize = 16 << 10;
/// Addresses told of each thread.
const MOST: usize = 40;

/// Executable memory: where, from where in which file.
struct Code {
    from: u64,
    to: u64,
    offset: u64,
    name: String,
}

fn code() -> Vec<Code> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let one = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (range, rights, offset, path) = (fields.first()?, fields.get(1)?, fields.get(2)?, fields.get(5)?);
        let (from, to) = range.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let name = path.rsplit('/').next()?.to_owned();
        rights.contains('x').then_some(Code { from: hex(from)?, to: hex(to)?, offset: hex(offset)?, name })
    };
    maps.lines().filter_map(one).collect()
}

/// One line for each thread.
pub fn threads() -> Vec<String> {
    let (code, memory) = (code(), File::open("/proc/self/mem"));
    let place = |address: u64| {
        let code = code.iter().find(|c| (c.from..c.to).contains(&address))?;
        Some(format!("{}+{:#x}", code.name, address - code.from + code.offset))
    };
    let stack = |pointer: u64| -> Vec<String> {
        let Ok(memory) = &memory else { return Vec::new() };
        let mut bytes = vec![0; DEPTH];
        let read = memory.read_at(&mut bytes, pointer).unwrap_or(0);
        let words = bytes[..read].chunks_exact(8).filter_map(|w| w.try_into().ok().map(u64::from_ne_bytes));
        words.filter_map(place).take(MOST).collect()
    };
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let one = |task: fs::DirEntry| {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default().trim().to_owned();
        let call = read("syscall");
        let mut from_end = call.split(' ').rev();
        let pointer = from_end.nth(1).and_then(|sp| u64::from_str_radix(sp.trim_start_matches("0x"), 16).ok());
        let (comm, wait) = (read("comm"), read("wchan"));
        format!("{comm}: {call} ({wait}) {}", pointer.map(stack).unwrap_or_default().join(" "))
    };
    tasks.map(one).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_sleeping_thread_is_found_with_its_caller() {
        let name = "stuck-test";
        let sleeper = || std::thread::sleep(std::time::Duration::from_secs(30));
        std::thread::Builder::new().name(name.into()).spawn(sleeper).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(200));
        let found = super::threads();
        let line = found.iter().find(|line| line.starts_with(name)).expect("the thread");
        assert!(line.contains("libc.so") && line.contains("rdma_checker"), "{line}");
    }
}
