//! Containers with more than one process.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::stage::{CHECKER, Stage, client_moves, plainly, tail};
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(300);

/// Claims about processes.
pub const CLAIMS: &[Scenario] = &[
    Scenario {
        name: "both RDMA processes of a container go on after a move",
        long: false,
        limit: LIMIT,
        run: |c| client_moves(c, &["dst", "src"], &["--processes", "2", "--qps", "2"], plainly),
    },
    Scenario {
        name: "a forked child that sleeps beside its parent's RDMA does not disturb a move",
        long: false,
        limit: LIMIT,
        run: |c| client_moves(c, &["dst", "src"], &["--sleeping-child", "--qps", "2"], plainly),
    },
    Scenario {
        name: "a process started by exec is carried along, or the move is refused and names it",
        long: false,
        limit: LIMIT,
        run: exec,
    },
];

fn exec(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let (server, client) = ("ck-servers", "ck-client");
    stage.run(server, 150, &["peer"], &[CHECKER, "server", "--processes", "2", "--progress", "1"])?;
    let load = [CHECKER, "client", "--connect", "10.20.0.150", "--duration", "0", "--progress", "1", "--qps", "2"];
    // The container ends with its first process, and whatever was started by exec ends with it: that one has time to say
    // goodbye to its server, and what it said is told last.
    let first = format!("{}; status=$?; sleep 10; tail -n 3 /dev/shm/said; exit $status", load.join(" "));
    stage.run(client, 151, &["src", "dst"], &["sh", "-c", &first])?;
    stage.flow(client, 200)?;
    // One process of the server serves the main process, the other the one started by exec.
    let second = format!("exec {} --port 18516 >/dev/shm/said 2>&1", load.join(" "));
    stage.node_of(client)?.check(&["migrrdma", "exec", "--detach", client, "sh", "-c", &second])?;
    stage.wait_log(server, "second connection", |t| t.matches("\"running\"").count() == 2)?;
    stage.flow(server, 200)?;

    let out = stage.try_migrate(client, "dst", &[])?;
    if out.success() {
        stage.moved(client, "dst")?;
        stage.ctx.note("carried along");
    } else {
        let pids = stage.node_of(client)?.sh("pgrep -x rdma-checker")?;
        let text = out.text() + &out.errors();
        let named = pids.split_whitespace().any(|p| text.contains(p));
        ensure!(named, "refused without naming the process started by exec:\n{text}");
        stage.ctx.note("refused, naming it");
    }
    stage.flow(client, 200)?;
    stage.flow(server, 200)?;
    // The servers ask their clients to end, also the one that is not the container's first process.
    stage.terminate(server)?;
    let first = stage.verdict(server);
    let second = stage.verdict(client);
    first.with_context(|| format!("the container said: {}", tail(&stage.log(client).unwrap_or_default())))?;
    second?;
    stage.finish()
}
