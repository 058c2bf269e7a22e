//! Links the unwinder statically: a library that is preloaded into every process of a container must not bring
//! `libgcc_s.so.1` along, which small images do not have. (`cargo zigbuild` uses its own static unwinder instead.)

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RUSTC_LINKER");
    if std::env::var("RUSTC_LINKER").is_ok_and(|linker| linker.contains("zig")) {
        return;
    }
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let found = Command::new(compiler).arg("-print-file-name=libgcc_eh.a").output();
    let path = found.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    // Without the archive the compiler echoes the bare name.
    if let Some(folder) = Path::new(&path).parent().filter(|p| p.is_absolute()) {
        println!("cargo:rustc-link-search=native={}", folder.display());
        println!("cargo:rustc-link-lib=static:+verbatim=libgcc_eh.a");
    }
}
