//! `checkpoint`: flags to [`dump::DumpOptions`].

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use checkpoint::criu::rpc::{Criu_cg_mode, Criu_network_lock_method};

use crate::by_agent;
use crate::cli::{CgroupsMode, Checkpoint, CriuFlags, Global, NetworkLock};
use crate::criu_plan::Common;
use crate::dump::{self, DumpOptions};
use crate::gate::OpenGate;
use crate::store::ContainerHandle;

pub fn run(args: Checkpoint, global: &Global) -> Result<i32> {
    let handle = ContainerHandle::load(super::root(global), &args.id)?;
    let images = args.criu.image_path.clone().unwrap_or_else(|| "checkpoint".into());
    let options = DumpOptions {
        parent_path: args.criu.parent_path.clone(),
        tracked: false,
        pre_dump: args.pre_dump,
        leave_running: args.leave_running,
        carried: false,
        remove: true,
        tcp_skip_in_flight: args.tcp_skip_in_flight,
        link_remap: args.link_remap,
        status_fd: args.status_fd,
        page_server: args.page_server.as_deref().map(page_server).transpose()?,
        common: common(&args.criu, images, global)?,
    };
    if handle.sidecar.shim.is_some() {
        let root = super::root(global);
        if by_agent::checkpoint(root, &args.id, &options)? {
            return Ok(0);
        }
        // The agent may have had it in its hands.
        let handle = ContainerHandle::load(root, &args.id)?;
        dump::dump(handle, &options, &mut OpenGate)?;
        return Ok(0);
    }
    dump::dump(handle, &options, &mut OpenGate)?;
    Ok(0)
}

/// The flags both verbs have.
pub fn common(flags: &CriuFlags, images: PathBuf, global: &Global) -> Result<Common> {
    if let Some(other) = flags.empty_ns.iter().find(|ns| *ns != "network") {
        bail!("--empty-ns {other}: only network is supported");
    }
    let mut common = Common::new(images);
    common.work_path = flags.work_path.clone();
    common.tcp_established = flags.tcp_established;
    common.ext_unix_sk = flags.ext_unix_sk;
    common.shell_job = flags.shell_job;
    common.file_locks = flags.file_locks;
    common.lazy_pages = flags.lazy_pages;
    common.auto_dedup = flags.auto_dedup;
    common.empty_network = !flags.empty_ns.is_empty();
    common.manage_cgroups_mode = flags.manage_cgroups_mode.map(|mode| match mode {
        CgroupsMode::Soft => Criu_cg_mode::SOFT,
        CgroupsMode::Full => Criu_cg_mode::FULL,
        CgroupsMode::Strict => Criu_cg_mode::STRICT,
        CgroupsMode::Ignore => Criu_cg_mode::IGNORE,
    });
    common.network_lock = flags.network_lock.map(|lock| match lock {
        NetworkLock::Iptables => Criu_network_lock_method::IPTABLES,
        NetworkLock::Nftables => Criu_network_lock_method::NFTABLES,
        NetworkLock::Skip => Criu_network_lock_method::SKIP,
    });
    common.criu = global.criu.clone();
    Ok(common)
}

fn page_server(text: &str) -> Result<(String, i32)> {
    let parse = || {
        let (address, port) = text.rsplit_once(':')?;
        let port: u16 = port.parse().ok()?;
        let address = address.trim_start_matches('[').trim_end_matches(']');
        (!address.is_empty()).then(|| (address.to_owned(), i32::from(port)))
    };
    parse().with_context(|| format!("--page-server {text}: write ADDRESS:PORT"))
}

#[cfg(test)]
mod tests {
    use super::page_server;

    #[test]
    fn page_servers_have_address_and_port() {
        assert_eq!(page_server("10.0.0.1:27").unwrap(), ("10.0.0.1".into(), 27));
        assert_eq!(page_server("[::1]:27").unwrap(), ("::1".into(), 27));
        for bad in ["", "host", ":1", "host:99999"] {
            assert!(page_server(bad).is_err(), "{bad}");
        }
    }
}
