//! Route `relay`: this program moves the data frames between the two agents, and nothing else.
//!
//! A frame that is no data frame ends it: a compromised source cannot open or commit anything on
//! the destination through here.

use std::process::Stdio;

use bytes::{Bytes, BytesMut};
use kvm_clone_protocol::frame;
use kvm_clone_protocol::message::{Listening, MessageError};
use kvm_clone_protocol::preamble::{self, PREAMBLE_LEN, Preamble, PreambleError, Versions};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::task::JoinHandle;

use super::route::{LINK_TIME, token_line};
use crate::error::{Error, ErrorCode, Result};
use crate::host::{AgentConnection, Attach};

/// How much is read at once.
const READ_SIZE: usize = 256 * 1024;

/// Two data connections joined to one.
#[derive(Debug)]
pub(super) struct Relay {
    pumps: [JoinHandle<Result<()>>; 2],
    _children: [Child; 2],
}

impl Relay {
    /// Attaches to both agents, which are to announce these versions, and starts to move frames.
    ///
    /// # Errors
    /// When one of the data connections cannot be made.
    pub(super) async fn start(
        [source, destination]: [(&AgentConnection, &Listening); 2],
        versions: Versions,
        way: Attach,
    ) -> Result<Self> {
        let (mut one, mut other) = tokio::try_join!(
            End::attach(source.0, source.1, way),
            End::attach(destination.0, destination.1, way)
        )?;
        // Each waits for the other's preamble before it says anything else.
        let preambles =
            async { tokio::try_join!(one.preamble(versions), other.preamble(versions)) };
        let (ours, theirs) = match tokio::time::timeout(LINK_TIME, preambles).await {
            Ok(preambles) => preambles?,
            Err(_) => return Err(broken(&format!("{} or {}", one.name, other.name))),
        };
        one.write(&theirs.encode()).await?;
        other.write(&ours.encode()).await?;
        let (forth, back) = (
            [one.name.clone(), other.name.clone()],
            [other.name, one.name],
        );
        let pumps = [
            tokio::spawn(pump(forth, one.stdout, one.buffer, other.stdin)),
            tokio::spawn(pump(back, other.stdout, other.buffer, one.stdin)),
        ];
        Ok(Self {
            pumps,
            _children: [one.child, other.child],
        })
    }

    /// Why the relay broke, if it did: called when a session has lost its data connection.
    pub(super) async fn failure(&mut self) -> Option<Error> {
        for pump in &mut self.pumps {
            if pump.is_finished()
                && let Ok(Err(error)) = pump.await
            {
                return Some(error);
            }
        }
        None
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for pump in &self.pumps {
            pump.abort();
        }
    }
}

/// One agent's data connection.
struct End {
    name: String,
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    buffer: BytesMut,
}

impl End {
    async fn attach(agent: &AgentConnection, listening: &Listening, way: Attach) -> Result<Self> {
        let name = agent.host().to_string();
        let mut command = agent
            .host()
            .attach_command(agent.agent_path(), &listening.name, way)
            .await?;
        let failed = |error| Error::io(format!("opening a data connection to {name}"), error);
        let mut child = command.stderr(Stdio::null()).spawn().map_err(failed)?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::new(
                ErrorCode::Internal,
                "a data connection without pipes",
            ));
        };
        let mut end = Self {
            name,
            child,
            stdin,
            stdout,
            buffer: BytesMut::new(),
        };
        end.write(token_line(&listening.token).as_bytes()).await?;
        Ok(end)
    }

    async fn preamble(&mut self, versions: Versions) -> Result<Preamble> {
        loop {
            let refused = |error: PreambleError| {
                let message = format!("no data connection to {}", self.name);
                Error::new(ErrorCode::Protocol, message).caused_by(error)
            };
            if let Some((preamble, _noise)) = preamble::find(&mut self.buffer).map_err(refused)? {
                versions.negotiate(preamble.versions).map_err(refused)?;
                return Ok(preamble);
            }
            let read = self.stdout.read_buf(&mut self.buffer).await;
            if read.map_err(|error| broken(&self.name).caused_by(error))? == 0 {
                return Err(broken(&self.name));
            }
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        debug_assert!(
            bytes.len() <= PREAMBLE_LEN.max(33),
            "only openings are written here"
        );
        let written = async {
            self.stdin.write_all(bytes).await?;
            self.stdin.flush().await
        };
        written
            .await
            .map_err(|error| broken(&self.name).caused_by(error))
    }
}

/// Moves data frames in one direction, a frame at a time, so that a slow end slows the other.
async fn pump(
    [from, to]: [String; 2],
    mut stdout: ChildStdout,
    mut buffer: BytesMut,
    mut stdin: ChildStdin,
) -> Result<()> {
    loop {
        while let Some(frame) = frame::decode(&mut buffer)
            .map_err(|error| Error::from(error).context(format!("the agent on {from}")))?
        {
            if !frame.kind.is_data() {
                let error = Error::from(MessageError::Misplaced { kind: frame.kind });
                return Err(error.context(format!("the agent on {from}")));
            }
            let mut head = BytesMut::new();
            frame.encode_head(&mut head);
            write_pair(&mut stdin, head.freeze(), frame.payload)
                .await
                .map_err(|error| broken(&to).caused_by(error))?;
        }
        if buffer.capacity() - buffer.len() < READ_SIZE / 4 {
            buffer.reserve(READ_SIZE);
        }
        match stdout.read_buf(&mut buffer).await {
            // The other end sees the end of the stream when its input is dropped here.
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) => return Err(broken(&from).caused_by(error)),
        }
    }
}

async fn write_pair(stdin: &mut ChildStdin, head: Bytes, payload: Bytes) -> std::io::Result<()> {
    use bytes::Buf as _;

    stdin.write_all_buf(&mut head.chain(payload)).await?;
    stdin.flush().await
}

fn broken(name: &str) -> Error {
    Error::new(
        ErrorCode::Interrupted,
        format!("the data connection to {name} broke"),
    )
    .hint("the same command takes the run up again")
}
