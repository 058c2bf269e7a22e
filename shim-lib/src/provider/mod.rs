//! What is known about a provider beyond the verbs interface. Everything else treats them alike.

pub mod elf;
pub mod rxe;

/// The provider whose code is at this address: `rxe` or `other`.
pub fn name_of(address: usize) -> &'static str {
    if elf::file_of(address).is_some_and(|file| file.contains(rxe::LIBRARY)) { "rxe" } else { "other" }
}
