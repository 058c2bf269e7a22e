//! `registered-memory.img`: any bytes are taken or refused, and whatever they say stays in the directory it was meant
//! for and within the size the image may have.
#![no_main]

use std::fs;

use checkpoint::memory_image;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let outer = tempfile::tempdir().expect("a directory");
    let (images, target) = (outer.path().join("images"), outer.path().join("memory"));
    for dir in [&images, &target] {
        fs::create_dir(dir).expect("a directory in it");
    }
    // The other half of the inputs has right lengths and checksums; 0xfe ends a part.
    let mut sealed = memory_image::MAGIC.to_vec();
    for body in data.split(|byte| *byte == 0xfe) {
        memory_image::part(&mut sealed, body).expect("a part in memory");
    }
    for bytes in [data.to_vec(), sealed] {
        fs::write(images.join(memory_image::NAME), bytes).expect("an image");
        let _ = memory_image::load(&images, &target);
        let outside = fs::read_dir(outer.path()).expect("a list").count();
        assert_eq!(outside, 2, "it wrote beside its directory");
    }
});
