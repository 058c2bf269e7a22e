//! The client's end of the agent's admin socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use checkpoint::agent::admin::{Event, Request};

/// One conversation with the agent.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects and asks.
    pub fn ask(socket: &Path, request: &Request) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                anyhow!("no agent runs on this host ({}: {e}); start `migrrdma agent`", socket.display())
            }
            ErrorKind::PermissionDenied => anyhow!("only root may talk to the agent at {}", socket.display()),
            _ => anyhow!("cannot talk to the agent at {}: {e}", socket.display()),
        })?;
        let mut client = Client { stream: BufReader::new(stream) };
        client.send(request)?;
        Ok(client)
    }

    /// One more request on the same connection.
    pub fn send(&mut self, request: &Request) -> Result<()> {
        send(self.stream.get_mut(), request)
    }

    /// A handle for another thread to send on.
    pub fn sender(&self) -> Result<UnixStream> {
        Ok(self.stream.get_ref().try_clone()?)
    }

    /// The next event; `None` when the agent has ended the conversation. Blocks: the agent has the deadlines, and its
    /// end closes the socket.
    pub fn next(&mut self) -> Result<Option<Event>> {
        let mut line = String::new();
        self.stream.read_line(&mut line).context("the connection to the agent broke")?;
        if line.is_empty() {
            return Ok(None);
        }
        serde_json::from_str(&line).map(Some).with_context(|| format!("the agent said {:?}", line.trim_end()))
    }
}

/// Sends one request.
pub fn send(stream: &mut UnixStream, request: &Request) -> Result<()> {
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).context("cannot ask the agent")
}
