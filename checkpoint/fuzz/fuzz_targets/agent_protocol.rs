//! What another agent sends, as caller and as the one that answers: a stream of frames. Half of the inputs are put into
//! a valid frame, so that the message inside is what is mutated.
#![no_main]

use checkpoint::net::frame::AGENT;
use checkpoint::net::msg::{Back, Call};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let framed = AGENT.frame(data).unwrap_or_default();
    for stream in [data, &framed] {
        each::<Call>(stream);
        each::<Back>(stream);
    }
});

fn each<T: serde::Serialize + serde::de::DeserializeOwned>(mut stream: &[u8]) {
    while let Ok(message) = AGENT.read::<T>(&mut stream) {
        drop(AGENT.encode(&message).expect("what was read can be written"));
    }
}
