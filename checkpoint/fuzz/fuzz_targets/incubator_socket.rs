//! What agent and incubator say to each other, and the packets of the CRIU plugin, which speaks from inside a task that
//! is being restored from an image.
#![no_main]

use checkpoint::incubator::proto::{self, Command, Reply};
use checkpoint::incubator::wire::{Answer, Want};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut stream = data;
    while let Ok(Some(_)) = proto::receive::<Command>(&mut stream) {}
    let mut stream = data;
    while let Ok(Some(_)) = proto::receive::<Reply>(&mut stream) {}
    if let Ok(want) = Want::decode(data) {
        assert_eq!(Want::decode(&want.encode()), Ok(want));
    }
    if let Ok(answer) = Answer::decode(data) {
        assert!(Answer::decode(&answer.encode()).is_ok());
    }
});
