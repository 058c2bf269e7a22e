//! What a process in a container writes to its agent, and an agent to a process: a stream of frames.
#![no_main]

use checkpoint::net::frame::SHIM;
use libfuzzer_sys::fuzz_target;
use rdma_virt::msg::{Answer, Ask, FromShim, Hello, ToShim};

fuzz_target!(|data: &[u8]| {
    let framed = SHIM.frame(data).unwrap_or_default();
    for stream in [data, &framed] {
        each::<Hello>(stream);
        each::<FromShim>(stream);
        each::<Ask>(stream);
        each::<ToShim>(stream);
        each::<Answer>(stream);
    }
});

fn each<T: serde::Serialize + serde::de::DeserializeOwned>(mut stream: &[u8]) {
    while let Ok(message) = SHIM.read::<T>(&mut stream) {
        drop(SHIM.encode(&message).expect("what was read can be written"));
    }
}
