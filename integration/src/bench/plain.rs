//! Moving a container by hand: `runc checkpoint`, a copy over the network, `runc restore`.
//!
//! One program on each node, the connection between them open before the container is touched, so that nothing but the
//! three steps is between its last instruction here and its first one there. Images go file by file from the page
//! cache into the socket; nothing is compressed, hashed or flushed.
//!
//! The container's link on the destination comes up after the restore, by hand as well: were it up before, the
//! destination would answer the peer's TCP segments with a reset before the socket is there.

use crate::lab::bundle::{BUNDLES, Bundle};
use crate::lab::node::Node;
use crate::lab::wire::Exec;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

const PORT: u16 = 18700;
/// Beside the agent's own state: the same file system, the same disk.
const STATE: &str = "/var/lib/migrrdma-bench";
const LIMIT: Duration = Duration::from_secs(180);

/// Takes images, restores, brings the link up. Arguments: name, bundle, directory, port, shell line for the link.
const RECEIVER: &str = r#"
import os, socket, struct, subprocess, sys, time
name, bundle, state, port, link = sys.argv[1:6]
images = os.path.join(state, "images")
os.makedirs(images)
listener = socket.create_server(("0.0.0.0", int(port)))
print("ready", flush=True)
conn, _ = listener.accept()
data = conn.makefile("rb", 1 << 20)
while True:
    name_len, size = struct.unpack("<IQ", data.read(12))
    if name_len == 0:
        break
    path = os.path.join(images, data.read(name_len).decode())
    with open(path, "wb", buffering=0) as out:
        while size:
            chunk = data.read1(min(size, 1 << 20))
            if not chunk:
                sys.exit("the connection broke within " + path)
            out.write(chunk)
            size -= len(chunk)
begin = time.monotonic()
null = open("/dev/null", "r+b")
done = subprocess.run(["runc", "restore", "--detach", "--tcp-established", "--bundle", bundle, "--image-path", images,
                       "--work-path", state, name], stdin=null, stdout=null, stderr=null)
restored = time.monotonic() - begin
if done.returncode == 0:
    subprocess.run(["sh", "-c", link], stdin=null, stdout=null, stderr=null)
conn.sendall(struct.pack("<id", done.returncode, restored))
sys.exit(done.returncode)
"#;

/// Checkpoints and sends. Arguments: name, directory, address, port.
const SENDER: &str = r#"
import json, os, socket, struct, subprocess, sys, time
name, state, address, port = sys.argv[1:5]
images = os.path.join(state, "images")
os.makedirs(images)
conn = socket.create_connection((address, int(port)))
null = open("/dev/null", "r+b")
wall, begin = time.time(), time.monotonic()
done = subprocess.run(["runc", "checkpoint", "--tcp-established", "--image-path", images, "--work-path", state, name],
                      stdin=null, stdout=null, stderr=subprocess.PIPE)
if done.returncode != 0:
    sys.exit("runc checkpoint: " + done.stderr.decode())
dumped = time.monotonic()
total = 0
for entry in sorted(os.listdir(images)):
    path = os.path.join(images, entry)
    if not os.path.isfile(path):
        continue
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        total += size
        conn.sendall(struct.pack("<IQ", len(entry.encode()), size) + entry.encode())
        conn.sendfile(file)
conn.sendall(struct.pack("<IQ", 0, 0))
sent = time.monotonic()
code, restore = struct.unpack("<id", conn.recv(12, socket.MSG_WAITALL))
end = time.monotonic()
print(json.dumps({"began": wall, "ended": wall + end - begin, "image_bytes": total, "steps": {
    "checkpoint": dumped - begin, "copy": sent - dumped, "restore": restore}}))
sys.exit(code)
"#;

/// A container of plain runc with its bundles on two nodes.
#[derive(Debug)]
pub struct Plain<'a> {
    /// Its name, and that of its bundles.
    pub name: &'a str,
    /// Its address with prefix length.
    pub ip: &'a str,
    /// Where it is.
    pub from: &'a Node,
    /// Where it shall go.
    pub to: &'a Node,
}

impl Plain<'_> {
    fn bundle(&self) -> String {
        format!("{BUNDLES}/{}", self.name)
    }

    fn state(&self) -> String {
        format!("{STATE}/{}", self.name)
    }

    fn parts(&self) -> Bundle {
        Bundle { name: self.name.to_owned(), ip: Some(self.ip.to_owned()), ..Bundle::default() }
    }

    /// Makes the bundles of a container that runs `command`, with the file `program` in it at `inside`.
    pub fn prepare(&self, program: &Path, inside: &str, command: &[String]) -> Result<()> {
        let copies = vec![(program.to_owned(), inside.to_owned())];
        let bundle = Bundle { copies, command: command.to_vec(), ..self.parts() };
        bundle.make(self.from)?;
        // The lab's hook leaves the link of such a container alone.
        let annotations = vec![("org.migrrdma.incoming".to_owned(), "by hand".to_owned())];
        Bundle { annotations, ..bundle }.make(self.to).map(drop)
    }

    /// Starts it.
    pub fn start(&self) -> Result<()> {
        let line = format!("runc run --detach --bundle {} {} </dev/null >/dev/null 2>&1", self.bundle(), self.name);
        self.from.sh(&line).map(drop).with_context(|| format!("start {} with runc", self.name))
    }

    /// Moves it. What the two programs say of it: `began`, `ended`, `image_bytes`, `steps`.
    pub fn migrate(&self) -> Result<Value> {
        let (bundle, state, port) = (self.bundle(), self.state(), PORT.to_string());
        let (veth, address) = (self.parts().veth(), self.ip.split('/').next().unwrap_or(self.ip));
        let link =
            format!("ip link set {veth} up; ip netns exec {} arping -q -U -c 1 -w 1 -I eth0 {address}", self.name);
        let receiver = self.to.spawn(&["python3", "-c", RECEIVER, self.name, &bundle, &state, &port, &link])?;
        receiver.wait_for("ready", Duration::from_secs(30))?;
        let address = self.to.spec.rdma_ip();
        let argv = ["python3", "-c", SENDER, self.name, &state, &address, &port].map(str::to_owned).to_vec();
        let limit = Some(LIMIT.as_millis() as u64);
        let out = self.from.run(Exec { argv, timeout_ms: limit, ..Exec::default() })?;
        if !out.success() {
            let end = "for f in *.log; do echo \"# $f\"; grep -a Error $f | tail -5; tail -3 $f; done 2>&1";
            let logs: Vec<String> = [self.from, self.to]
                .iter()
                .filter_map(|n| Some(format!("{}: {}", n.name(), n.sh(&format!("cd {state}; {end}")).ok()?)))
                .collect();
            anyhow::bail!("moving {} by hand: {}{}\n{}", self.name, out.text(), out.errors(), logs.join("\n"));
        }
        let end = receiver.wait(Duration::from_secs(30))?;
        ensure!(end.success(), "the receiver of {} failed: {}", self.name, end.errors());
        serde_json::from_str(&out.text()).with_context(|| format!("what the sender says: {:?}", out.text()))
    }

    /// Ends it on the destination, gracefully.
    pub fn terminate(&self) -> Result<()> {
        self.to.check(&["runc", "kill", self.name, "TERM"])?;
        self.to
            .sh(&format!(
                "for i in $(seq 100); do runc state {0} | grep -q '\"stopped\"' && exit 0; sleep 0.2; done; \
                 echo '{0} does not end' >&2; exit 1",
                self.name
            ))
            .map(drop)
    }

    /// Removes everything of it but the bundles.
    pub fn remove(&self) {
        remove(self.from, self.name);
        remove(self.to, self.name);
    }
}

/// Removes a container of plain runc and its images from a node; its not being there is no error.
pub fn remove(node: &Node, name: &str) {
    let _ = node.exec(&[
        "sh",
        "-c",
        &format!("runc delete --force {name}; rm -rf {STATE}/{name}; [ ! -e {STATE} ] || rmdir {STATE}"),
    ]);
}
