//! The shim under programs that know nothing of it, on a node of the lab: what they do and say must be the same with
//! and without it. Nothing is migrated here.
//!
//! `cargo xtask lab up`, then `cargo test -p shim-lib --test lab -- --ignored --test-threads 1`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};

const NODE: &str = "peer";
const GID_INDEX: &str = "1";
const FOLDER: &str = "/srv/shim-tests";
const SHIM: &str = "/srv/shim-tests/libmigrrdma.so";

/// How often a module of the pyverbs suite is tried.
const CHANCES: u32 = 4;

/// The folder of this build (`target/debug` or the like).
fn build() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    Ok(exe.ancestors().nth(2).context("the test is in target/PROFILE/deps")?.to_owned())
}

fn lab(arguments: &[&str]) -> Result<Output> {
    let xtask = build()?.join("xtask");
    ensure!(xtask.exists(), "{} is missing: run `cargo xtask lab up` first", xtask.display());
    Ok(Command::new(xtask).arg("lab").args(arguments).output()?)
}

/// Runs a shell script on the node; its output, both streams in order.
fn on_node(script: &str, seconds: u32) -> Result<String> {
    let out = lab(&["exec", "--timeout", &seconds.to_string(), NODE, "--", "sh", "-c", script])?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(out.status.success(), "{script}: {}\n{text}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    Ok(text)
}

fn push(local: &Path, remote: &str) -> Result<()> {
    let out = lab(&["push", NODE, local.to_str().context("path")?, remote])?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// An empty folder on the node with the shim in it.
fn prepare() -> Result<()> {
    on_node(&format!("rm -rf {FOLDER} && mkdir -p {FOLDER} && rdma link show | grep -q ACTIVE"), 30)?;
    let built = [build()?.join("libmigrrdma.so"), build()?.join("deps/libmigrrdma.so")];
    let newest = built.iter().filter_map(|p| Some((p.metadata().ok()?.modified().ok()?, p))).max();
    push(newest.context("libmigrrdma.so was not built")?.1, SHIM)
}

#[test]
#[ignore = "needs the lab: cargo xtask lab up"]
fn a_tour_of_the_verbs_prints_the_same_with_and_without_the_shim() -> Result<()> {
    prepare()?;
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("tour");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/tour.c");
    let out = Command::new("cc")
        .args(["-O1", "-Wall", "-Werror", "-o"])
        .arg(&program)
        .arg(source)
        .arg("-libverbs")
        .output()?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    push(&program, &format!("{FOLDER}/tour"))?;
    let plain = on_node(&format!("{FOLDER}/tour {GID_INDEX}"), 120)?;
    ensure!(plain.lines().count() > 50 && plain.ends_with("end: mr 0 pd 0 device 0\n"), "{plain}");
    let shim = on_node(&format!("LD_PRELOAD={SHIM} {FOLDER}/tour {GID_INDEX}"), 120)?;
    similar(&plain, &shim)?;
    // What a restored process meets: its credentials are not those the device was opened with.
    let changed = on_node(&format!("LD_PRELOAD={SHIM} {FOLDER}/tour {GID_INDEX} creds"), 120)?;
    similar(&plain, &changed)
}

fn similar(plain: &str, shim: &str) -> Result<()> {
    for (n, (a, b)) in plain.lines().zip(shim.lines()).enumerate() {
        ensure!(a == b, "line {}: `{a}` without the shim, `{b}` with it", n + 1);
    }
    ensure!(plain == shim, "one output is longer:\n{plain}\n{shim}");
    Ok(())
}

#[test]
#[ignore = "needs the lab: cargo xtask lab up"]
fn programs_of_the_distribution_run_to_their_end() -> Result<()> {
    prepare()?;
    let perftest = "-d rxe0 -u 18 -n 100 -F";
    for (server, client) in [
        ("ibv_rc_pingpong -g 1 -n 100 -e".to_owned(), String::new()),
        ("ibv_rc_pingpong -g 1 -n 100 -N".to_owned(), String::new()),
        ("ibv_srq_pingpong -g 1 -n 100 -q 4 -e".to_owned(), String::new()),
        ("ibv_uc_pingpong -g 1 -n 100".to_owned(), String::new()),
        ("ibv_ud_pingpong -g 1 -n 100".to_owned(), String::new()),
        (format!("ib_send_bw {perftest} -s 4096"), String::new()),
        (format!("ib_write_bw {perftest} -s 4096 -q 4"), String::new()),
        (format!("ib_read_bw {perftest} -s 4096"), String::new()),
        (format!("ib_atomic_bw {perftest}"), String::new()),
        (format!("ib_send_lat {perftest} -e"), String::new()),
        (format!("ib_send_bw {perftest} -s 4096 --use-srq"), String::new()),
        ("rping -s -C 10 -v -a 10.10.0.3".to_owned(), "rping -c -C 10 -v -a 10.10.0.3".to_owned()),
    ] {
        let client = if client.is_empty() { format!("{server} localhost") } else { client };
        let script = format!(
            "export LD_PRELOAD={SHIM}; timeout 90 {server} >{FOLDER}/server 2>&1 & s=$!; sleep 1.5; \
             timeout 90 {client} >{FOLDER}/client 2>&1; c=$?; wait $s; s=$?; unset LD_PRELOAD; \
             echo \"client $c server $s\"; tail -n 5 {FOLDER}/client; tail -n 5 {FOLDER}/server"
        );
        let text = on_node(&script, 120)?;
        ensure!(text.starts_with("client 0 server 0\n"), "{server}: {text}");
    }
    Ok(())
}

/// Verdicts by test name.
fn verdicts(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut test = None;
    for line in text.lines() {
        if line.starts_with("test_")
            && let Some((_, rest)) = line.split_once('(')
            && let Some((name, _)) = rest.split_once(')')
        {
            test = Some(name.to_owned());
        }
        // A verdict ends the line; what a test prints can push it to a line of its own.
        let end = line.rsplit_once("... ").map_or(line, |(_, end)| end);
        if let Some(name) = &test
            && (["ok", "FAIL", "ERROR"].contains(&end) || end.starts_with("skipped "))
        {
            found.insert(name.clone(), end.to_owned());
        }
    }
    found
}

#[test]
#[ignore = "needs the lab: cargo xtask lab up; takes minutes"]
fn the_pyverbs_suite_passes_and_skips_the_same_tests() -> Result<()> {
    prepare()?;
    // Those for other vendors' devices end in a segmentation fault on this one, without us too.
    on_node(
        &format!(
            "cp -r /usr/share/doc/rdma-core/tests {FOLDER}/ && cd {FOLDER}/tests && gunzip -f *.gz; \
             rm -f test_mlx5* test_efa* test_cuda* && ls test_qp.py test_rdmacm.py"
        ),
        60,
    )
    .context("the node has no test suite of rdma-core")?;
    let modules = on_node(&format!("cd {FOLDER}/tests && ls test_*.py"), 10)?;
    let run = |preload: &str| -> Result<BTreeMap<String, String>> {
        let mut all = BTreeMap::new();
        // A module at a time: should one crash, it is named.
        for module in modules.lines().filter_map(|m| m.strip_suffix(".py")) {
            let script = format!(
                "cd {FOLDER}; {preload} timeout 280 python3 tests/run_tests.py -v --dev rxe0 --port 1 --gid 1 \
                 -k 'tests.{module}.*' 2>&1; echo \"status $?\""
            );
            // On a loaded machine Soft-RoCE loses a completion now and then where a queue is resized (`test_resize_cq`,
            // half of the runs without the shim): such a module gets more chances, with and without alike.
            let mut text = String::new();
            for _ in 0..CHANCES {
                text = on_node(&script, 300)?;
                if text.trim_end().ends_with("status 0") {
                    break;
                }
            }
            if !text.trim_end().ends_with("status 0") {
                bail!("{module} ({preload}), {CHANCES} times:\n{text}");
            }
            all.extend(verdicts(&text));
        }
        Ok(all)
    };
    let plain = run("")?;
    let passed = plain.values().filter(|v| *v == "ok").count();
    ensure!(passed > 90, "only {passed} tests pass without the shim");
    let shim = run(&format!("LD_PRELOAD={SHIM}"))?;
    for (test, verdict) in &plain {
        let with = shim.get(test).map_or("did not run", String::as_str);
        ensure!(with == verdict, "{test}: `{verdict}` without the shim, `{with}` with it");
    }
    ensure!(plain.len() == shim.len(), "the shim made {} tests more", shim.len().abs_diff(plain.len()));
    Ok(())
}
