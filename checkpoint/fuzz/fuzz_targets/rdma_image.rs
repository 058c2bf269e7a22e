//! `rdma.img`: any bytes are an image or an error, and what was read is written back the same. Half of the inputs are
//! given a valid header and checksum, or no mutation would ever get past them.
#![no_main]

use checkpoint::image;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    if let Ok(sealed) = image::seal(data) {
        check(&sealed);
    }
});

fn check(bytes: &[u8]) {
    if let Ok(read) = image::decode(bytes) {
        let again = image::encode(&read).expect("what was read can be written");
        assert!(image::decode(&again).is_ok_and(|twice| twice == read), "it changed on its way");
    }
}
