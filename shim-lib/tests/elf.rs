//! What the library is to the dynamic linker: a guest that asks for nothing.

mod library;

use std::process::Command;

use anyhow::{Context, Result, ensure};
use library::library;

fn run(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(out.status.success(), "{command:?}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

#[test]
fn it_needs_no_library_but_the_c_library() -> Result<()> {
    let text = run(Command::new("readelf").arg("-dW").arg(library()?))?;
    let needed: Vec<_> = text
        .lines()
        .filter(|l| l.contains("(NEEDED)"))
        .filter_map(|l| l.split_once('[')?.1.split_once(']'))
        .map(|(name, _)| name.to_owned())
        .collect();
    ensure!(!needed.is_empty(), "readelf names no needed library:\n{text}");
    let allowed = ["libc.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"];
    for name in needed {
        ensure!(allowed.contains(&name.as_str()), "it would drag {name} into every process of a container");
    }
    Ok(())
}

#[test]
fn a_process_without_rdma_gets_no_thread_and_no_other_library() -> Result<()> {
    let text = run(Command::new("/bin/cat")
        .args(["/proc/self/maps", "/proc/self/status"])
        .env_clear()
        .env("LD_PRELOAD", library()?))?;
    ensure!(text.contains("libmigrrdma.so"), "it was not loaded");
    ensure!(!text.contains("libibverbs") && !text.contains("libgcc_s"), "more was loaded:\n{text}");
    ensure!(text.contains("Threads:\t1\n"), "a thread was started");
    Ok(())
}

#[test]
fn an_empty_environment_and_a_shell_work() -> Result<()> {
    let preload = format!("LD_PRELOAD={}", library()?.display());
    let text = run(Command::new("env").args(["-i", &preload, "/bin/sh", "-c", "echo alive; exec /bin/true"]))?;
    ensure!(text == "alive\n");
    Ok(())
}

/// Exports of libibverbs that neither take nor return an object we stand in for. Devices are the library's own.
const WITHOUT_OBJECTS: &[&str] = &[
    "ibv_copy_ah_attr_from_kern",
    "ibv_copy_path_rec_from_kern",
    "ibv_copy_path_rec_to_kern",
    "ibv_copy_qp_attr_from_kern",
    "ibv_dofork_range",
    "ibv_dontfork_range",
    "ibv_event_type_str",
    "ibv_fork_init",
    "ibv_free_device_list",
    "ibv_get_device_guid",
    "ibv_get_device_index",
    "ibv_get_device_list",
    "ibv_get_device_name",
    "ibv_get_sysfs_path",
    "ibv_is_fork_initialized",
    "ibv_node_type_str",
    "ibv_port_state_str",
    "ibv_rate_to_mbps",
    "ibv_rate_to_mult",
    "ibv_read_sysfs_file",
    "ibv_register_driver",
    "ibv_wc_status_str",
    "mbps_to_ibv_rate",
    "mult_to_ibv_rate",
];

/// Exports of rdma-core 56 that the library installed here may be too old for.
const NEWER: &[&str] = &["ibv_query_qp_data_in_order"];

fn symbols(file: &str, only: &str) -> Result<Vec<String>> {
    let text = run(Command::new("nm").args(["-D", "--defined-only", file]))?;
    let mut found: Vec<_> = text
        .lines()
        .filter_map(|l| l.split_whitespace().nth(2))
        .filter(|s| s.contains(only) && !s.starts_with("IBVERBS_"))
        .map(|s| s.split('@').next().unwrap_or(s).to_owned())
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

#[test]
fn every_public_export_of_libibverbs_is_ours_or_takes_no_object() -> Result<()> {
    let list = run(Command::new("/sbin/ldconfig").arg("-p"))?;
    let real = list
        .lines()
        .find(|l| l.contains("libibverbs.so.1 "))
        .and_then(|l| l.split_once("=> "))
        .context("libibverbs1 is not installed")?
        .1
        .trim();
    let ours = symbols(library()?.to_str().context("path")?, "")?;
    // Symbols of the private version are called by providers only, with the library's own objects.
    let theirs: Vec<_> = symbols(real, "@@IBVERBS_1.")?;
    ensure!(theirs.len() > 60, "{real} shows only {} public symbols", theirs.len());
    for name in &theirs {
        let plain = WITHOUT_OBJECTS.contains(&name.as_str());
        ensure!(ours.contains(name) != plain, "{name}: {}", if plain { "listed as plain" } else { "has no entry" });
    }
    for name in ours.iter().filter(|n| n.starts_with("ibv_") || n.starts_with("_ibv_")) {
        let known = theirs.contains(name) || NEWER.contains(&name.as_str()) || name == "ibv_query_gid_type";
        ensure!(known, "{name} is exported, but is no verb");
    }
    Ok(())
}
