//! What a container keeps in memory file systems: `/dev`, `/dev/shm`, and what it mounted by itself.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::stage::Stage;
use crate::scenario::{Context, Scenario};

/// Claims about memory file systems.
pub const CLAIMS: &[Scenario] = &[Scenario {
    name: "what lies in a container's tmpfs comes along, there and back: files, links, holes, modes, deleted files, mounts",
    long: false,
    limit: Duration::from_secs(300),
    run: comes_along,
}];

const KEEPER: &str = "keeper";

/// One of everything, then a file that is written anew all the time.
const KEEPING: &str = "set -e; umask 022; cd /dev/shm
mkdir deep; echo kept >deep/file; ln deep/file twin; ln -s deep/file link; mkfifo pipe; chmod 1733 deep; chown 12:34 deep
truncate -s 40000000 holes; echo end >>holes; head -c 300000 /dev/urandom >noise; chmod 640 noise
exec 3>gone; rm gone; echo deleted >&3
i=0; while :; do i=$((i+1)); echo $i >count; sleep 0.1; done";

/// All of it in text, but for what changes: RDMA devices are called otherwise on another host, and masked files are covered
/// by that host's `/dev/null`.
const INVENTORY: &str = "cd /dev/shm; find . ! -name count ! -path . -printf '%P %y %m %U %G %n %s %l\\n' | sort
sha256sum noise holes deep/file; cat /proc/1/fd/3; [ $(stat -c %b holes) -lt 1000 ] && [ twin -ef deep/file ] && echo linked
cd /dev; find . -xdev ! -path . ! -path './infiniband*' -printf '%P %y %m %U %G %l\\n' | sort; stat -c '%n %t %T' null zero random
cut -d' ' -f4- /proc/1/mountinfo | sed 's/ \\(shared\\|master\\):[0-9]*//' | grep '^/ .* tmpfs ' | sort";

fn inventory(stage: &Stage) -> Result<String> {
    let node = stage.node_of(KEEPER)?;
    let out = node.exec(&["migrrdma", "exec", KEEPER, "sh", "-c", INVENTORY])?;
    ensure!(out.success(), "what there is on {}: {}{}", node.name(), out.text(), out.errors());
    Ok(out.text())
}

fn count(stage: &Stage) -> Result<u64> {
    let text = stage.node_of(KEEPER)?.check(&["migrrdma", "exec", KEEPER, "cat", "/dev/shm/count"])?;
    text.trim().parse().with_context(|| format!("the count is {text:?}"))
}

fn comes_along(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    stage.run(KEEPER, 150, &["src", "dst"], &["sh", "-c", KEEPING])?;
    std::thread::sleep(Duration::from_secs(3));
    let before = inventory(&stage)?;
    for word in ["deep d 1733 12 34", "holes f", "deleted", "linked", "null 1 3", "/dev/shm"] {
        ensure!(before.contains(word), "{word:?} is not there to begin with:\n{before}");
    }
    for to in ["dst", "src"] {
        let counted = count(&stage)?;
        stage.migrate(KEEPER, to)?;
        let after = inventory(&stage)?;
        let lost: Vec<&str> = before.lines().filter(|l| !after.lines().any(|a| a == *l)).collect();
        let new: Vec<&str> = after.lines().filter(|l| !before.lines().any(|b| b == *l)).collect();
        ensure!(lost.is_empty() && new.is_empty(), "on {to} {lost:?} are missing and {new:?} are new");
        std::thread::sleep(Duration::from_secs(1));
        ensure!(count(&stage)? > counted, "it does not write any more on {to}");
    }
    stage.node_of(KEEPER)?.check(&["migrrdma", "kill", KEEPER, "KILL"])?;
    stage.finish()
}
