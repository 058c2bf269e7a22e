//! A client for QEMU's monitor socket: one command at a time, with deadlines.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// An open monitor session.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects, waiting up to `wait` for QEMU to open the socket.
    pub fn connect(path: &Path, wait: Duration) -> Result<Qmp> {
        let deadline = Instant::now() + wait;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(s) => break s,
                Err(e) if Instant::now() >= deadline => {
                    return Err(e).with_context(|| format!("connect to QEMU's monitor {}", path.display()));
                }
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut qmp = Qmp { writer: stream.try_clone()?, reader: BufReader::new(stream) };
        qmp.line().context("QEMU's monitor greeting")?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("read QEMU's monitor")? == 0 {
            bail!("QEMU closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("QEMU's monitor said {line:?}"))
    }

    /// Runs a command and returns its `return` value.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let msg = json!({"execute": name, "arguments": arguments});
        writeln!(self.writer, "{msg}").context("write to QEMU's monitor")?;
        loop {
            let reply = self.line()?;
            if let Some(value) = reply.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = reply.get("error") {
                bail!("QEMU refused {name}: {error}");
            }
            // Anything else is an event; nobody here needs one.
        }
    }

    /// Lets a restored machine run: it comes back stopped, as it was saved.
    pub fn wait_running(&mut self, wait: Duration) -> Result<()> {
        let deadline = Instant::now() + wait;
        loop {
            let status = self.command("query-status", json!({}))?;
            match status["status"].as_str() {
                Some("running") => return Ok(()),
                Some("paused") => {
                    self.command("cont", json!({}))?;
                }
                Some("inmigrate" | "prelaunch" | "finish-migrate") => {}
                other => bail!("QEMU is in state {other:?} instead of running"),
            }
            if Instant::now() >= deadline {
                bail!("QEMU did not reach the state running within {wait:?}: {status}");
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops the machine and writes its memory and devices to `file`.
    pub fn save_state(&mut self, file: &Path, wait: Duration) -> Result<()> {
        self.command("stop", json!({}))?;
        self.command("migrate-set-parameters", json!({"max-bandwidth": 8_u64 << 30}))?;
        self.command("migrate", json!({"uri": format!("exec:cat > '{}'", file.display())}))?;
        let deadline = Instant::now() + wait;
        loop {
            let status = self.command("query-migrate", json!({}))?;
            match status["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU could not save its state: {status}"),
                _ if Instant::now() >= deadline => {
                    bail!("QEMU did not save its state within {wait:?}: {status}")
                }
                _ => thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}
