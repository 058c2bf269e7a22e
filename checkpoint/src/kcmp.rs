//! Whether two descriptors are the same open file: not equal files, but one opening that several processes share.
#![expect(unsafe_code, reason = "kcmp has no wrapper")]

/// Whether descriptor `a.1` of process `a.0` is the same open file as `b.1` of `b.0`. Pids are those of this process'
/// namespace. False also when the kernel does not say: a process is gone, or not ours to look into.
pub fn same_file(a: (i32, i32), b: (i32, i32)) -> bool {
    const KCMP_FILE: i32 = 0;
    // SAFETY: a comparison by numbers; it touches no memory of ours.
    let order = unsafe { nix::libc::syscall(nix::libc::SYS_kcmp, a.0, b.0, KCMP_FILE, i64::from(a.1), i64::from(b.1)) };
    order == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn the_kernel_tells_open_files_apart_even_of_one_path() {
        let (a, b) = (File::open("/dev/null").unwrap(), File::open("/dev/null").unwrap());
        let copy = a.try_clone().unwrap();
        let me = std::process::id() as i32;
        assert!(same_file((me, a.as_raw_fd()), (me, copy.as_raw_fd())));
        assert!(!same_file((me, a.as_raw_fd()), (me, b.as_raw_fd())));
        assert!(!same_file((me, a.as_raw_fd()), (me, 999_999)));
    }
}
