//! Claims about the lab itself: plain RDMA programs between its nodes, with
//! no part of this project involved. When one of these fails, no other result
//! of the same run means anything.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, Scenario};
use crate::lab::bundle::{self, Bundle};
use crate::lab::node::Node;

const LIMIT: Duration = Duration::from_secs(120);

/// QP timeout exponent for perftest: emulated nodes answer slowly, and rxe
/// mishandles the retries that its default would cause.
pub const QP_TIMEOUT: &str = "18";

/// The lab's own scenarios.
pub const FABRIC: &[Scenario] = &[
    Scenario {
        name: "ib_write_bw runs between bare nodes without a drop or a sequence error",
        long: false,
        limit: LIMIT,
        run: |ctx| perftest(ctx, "ib_write_bw", &["-q", "4", "-n", "300"]),
    },
    Scenario {
        name: "ib_send_bw runs between bare nodes without a drop or a sequence error",
        long: false,
        limit: LIMIT,
        run: |ctx| perftest(ctx, "ib_send_bw", &["-q", "2", "-n", "300"]),
    },
    Scenario {
        name: "ibv_rc_pingpong runs between unlike nodes and checks its data",
        long: false,
        limit: LIMIT,
        run: pingpong,
    },
    Scenario {
        name: "ib_write_bw runs between two unprivileged containers under runc",
        long: false,
        limit: LIMIT,
        run: containers,
    },
];

/// Waits until something listens on a TCP port: on the node itself or, with
/// `netns`, in a named network namespace of it. (Programs whose output is a
/// pipe say nothing until their buffer is full.)
pub fn wait_for_port(node: &Node, netns: Option<&str>, port: u16, wait: Duration) -> Result<()> {
    let inside = netns.map_or_else(String::new, |n| format!("-N {n} "));
    let script = format!(
        "for i in $(seq {}); do ss {inside}-Hltn | grep -q ':{port} ' && exit 0; sleep 0.2; done; exit 1",
        wait.as_millis() / 200
    );
    node.sh(&script)
        .map(|_| ())
        .with_context(|| format!("{}: nothing listens on port {port} {}", node.name(), netns.unwrap_or_default()))
}

fn perftest(ctx: &mut Context, program: &str, options: &[&str]) -> Result<()> {
    let command = |node: &Node| {
        let mut argv = vec![program, "-F", "-u", QP_TIMEOUT, "-d", node.spec.rdma_device];
        argv.extend(options);
        argv.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let server = ctx.peer.spawn(&command(&ctx.peer))?;
    wait_for_port(&ctx.peer, None, 18515, Duration::from_secs(20))?;
    let mut argv = command(&ctx.src);
    argv.push(ctx.peer.spec.rdma_ip());
    let client = ctx.src.exec(&argv)?;
    let server = server.wait(Duration::from_secs(20))?;
    for (side, out) in [("client", &client), ("server", &server)] {
        ensure!(out.success(), "{program} {side} ended with {}:\n{}{}", out.status(), out.text(), out.errors());
    }
    ctx.note(bandwidth(&client.text())?);
    Ok(())
}

/// The average bandwidth from perftest's table.
fn bandwidth(text: &str) -> Result<String> {
    let row = text.lines().skip_while(|l| !l.trim_start().starts_with("#bytes")).nth(1).unwrap_or_default();
    match row.split_whitespace().nth(3) {
        Some(n) if n.parse::<f64>().is_ok_and(|n| n > 0.0) => Ok(format!("{n} MiB/s")),
        _ => bail!("no result line in perftest's output:\n{text}"),
    }
}

fn pingpong(ctx: &mut Context) -> Result<()> {
    let command = |node: &Node| {
        let gid = node.spec.gid_index.to_string();
        let argv = ["ibv_rc_pingpong", "-d", node.spec.rdma_device, "-g", &gid, "-c", "-n", "500"];
        argv.map(str::to_owned).to_vec()
    };
    let server = ctx.dst.spawn(&command(&ctx.dst))?;
    wait_for_port(&ctx.dst, None, 18515, Duration::from_secs(20))?;
    let mut argv = command(&ctx.src);
    argv.push(ctx.dst.spec.rdma_ip());
    let client = ctx.src.exec(&argv)?;
    let server = server.wait(Duration::from_secs(20))?;
    for out in [&client, &server] {
        ensure!(out.success(), "{}{}", out.text(), out.errors());
        ensure!(!out.errors().contains("invalid data"), "pingpong found wrong data:\n{}", out.errors());
        ensure!(out.text().contains("500 iters"), "{}", out.text());
    }
    Ok(())
}

fn containers(ctx: &mut Context) -> Result<()> {
    let base = ["ib_write_bw", "-F", "-u", QP_TIMEOUT, "-n", "200"];
    let server_ip = "10.20.0.101";
    let make = |node: &Node, name: &str, ip: &str, more: &[&str]| {
        let mut command: Vec<String> = base.iter().map(ToString::to_string).collect();
        command.extend(["-d", node.spec.rdma_device].map(str::to_owned));
        command.extend(more.iter().map(ToString::to_string));
        Bundle { name: name.into(), ip: Some(format!("{ip}/24")), command, ..Bundle::default() }.make(node)
    };
    let server_dir = make(&ctx.dst, "fabric-server", server_ip, &[])?;
    let client_dir = make(&ctx.src, "fabric-client", "10.20.0.102", &[server_ip])?;
    let server = ctx.dst.spawn(&["runc", "run", "-b", &server_dir, "fabric-server"])?;
    wait_for_port(&ctx.dst, Some("fabric-server"), 18515, Duration::from_secs(40))?;
    let client = ctx.src.exec(&["runc", "run", "-b", &client_dir, "fabric-client"])?;
    let server = server.wait(Duration::from_secs(30))?;
    for out in [&client, &server] {
        ensure!(out.success(), "{}{}", out.text(), out.errors());
    }
    ctx.note(bandwidth(&client.text())?);
    bundle::remove(&ctx.src, "fabric-client")?;
    bundle::remove(&ctx.dst, "fabric-server")
}
