//! The archive of a copied bundle: whatever is in it, nothing is written outside of its directory.
#![no_main]

use std::fs;

use checkpoint::tree::unpack::Target;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let outer = tempfile::tempdir().expect("a directory");
    let inside = outer.path().join("bundle");
    fs::create_dir(&inside).expect("a directory in it");
    let target = Target::open(&inside).expect("its directory");
    let _ = target.unpack(data, 1 << 20);
    assert_eq!(fs::read_dir(outer.path()).expect("a list").count(), 1, "it wrote beside its directory");
});
