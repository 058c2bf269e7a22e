//! What is known about a provider beyond the verbs interface. Everything else treats them alike.

pub mod elf;
pub mod rxe;

/// The provider whose code is at this address: `rxe` or `other`.
pub fn name_of(address: usize) -> &'static str {
    if elf::file_of(address).is_some_and(|file| file.contains(rxe::LIBRARY)) { "rxe" } else { "other" }
}

/// The kernel's driver of a device, by the name the agents read in the same place; `other` where there is none to read.
pub fn kernel_driver(device: &str) -> String {
    let link = std::fs::read_link(format!("/sys/class/infiniband/{device}/device/driver"));
    let name = link.ok().and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()));
    name.unwrap_or_else(|| "other".to_owned())
}
