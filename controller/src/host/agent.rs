//! A control connection with an agent at its other end: preamble, hello, and then messages.

use std::time::Duration;

use bytes::Bytes;
use kvm_clone_protocol::frame::{self, FrameKind};
use kvm_clone_protocol::message::{Alive, Control, Hello, Message, Welcome};
use kvm_clone_protocol::preamble::{self, Preamble, PreambleError, SUPPORTED, Versions};
use serde::Serialize;
use tokio::io::AsyncWriteExt as _;
use tokio::process::ChildStdin;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::deploy::Expected;
use super::session::{Session, SessionOutput};
use super::{AgentPath, Host, heard};
use crate::agent_binary;
use crate::error::{Error, ErrorCode, Result};

/// How long an agent that was started may take to say hello: it starts in milliseconds.
const HELLO_TIMEOUT: Duration = Duration::from_secs(30);

/// How often the agent hears from us where there is nothing else to say.
const BEAT: Duration = Duration::from_secs(5);

/// An agent that has given no sign of life for this long is taken for dead: four of its own beats, and
/// well below the 30 seconds within which a run must end.
const SILENCE: Duration = Duration::from_secs(20);

/// Within a frame, so many bytes are a sign of life. Fewer may be those of an agent that has nothing
/// to say, swallowed by a frame whose length is wrong.
const SIGN_OF_LIFE: usize = 1024;

/// How long a connection that was closed may take to end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A control connection to an agent, which ends with it.
#[derive(Debug)]
pub struct AgentConnection {
    sender: AgentSender,
    receiver: AgentReceiver,
    about: About,
}

/// Which agent it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AgentBuild {
    /// Of the workspace, such as `0.1.0`.
    pub release: String,
    /// What it is built for, as `uname -m` names it.
    pub architecture: String,
    /// The first 16 digits of its BLAKE3, as in the name of its file.
    pub digest: String,
}

/// What is known about the agent.
#[derive(Debug)]
struct About {
    host: Host,
    path: AgentPath,
    welcome: Welcome,
    version: u16,
    versions: Versions,
    copied: bool,
    warnings: Vec<String>,
}

/// The writing half: a task that also says something when there is nothing to say, whatever this
/// program waits for meanwhile. It ends, and with it the connection, when this is dropped.
#[derive(Debug)]
pub struct AgentSender {
    host: Host,
    frames: mpsc::UnboundedSender<Bytes>,
}

/// The reading half; it owns the process.
#[derive(Debug)]
pub struct AgentReceiver {
    host: Host,
    output: SessionOutput,
    /// When the last sign of life came: a frame, or a good part of one.
    heard: Instant,
    /// Bytes in the buffer then.
    had: usize,
}

/// Why no agent came of a session: whose fault it is.
pub(super) enum StartFailure {
    /// The host, or the way to it.
    Host(Error),
    /// The file that was started: another copy may help.
    Agent(Error),
}

impl StartFailure {
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Host(error) | Self::Agent(error) => error,
        }
    }
}

impl AgentConnection {
    /// Speaks with the agent that a session has started.
    pub(super) async fn establish(
        session: Session,
        path: AgentPath,
        expected: Expected,
        copied: bool,
    ) -> Result<Self, StartFailure> {
        match tokio::time::timeout(
            HELLO_TIMEOUT,
            Self::shake_hands(session, path.clone(), expected, copied),
        )
        .await
        {
            Ok(result) => result,
            Err(_) => Err(StartFailure::Agent(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the agent {} says nothing for {} s",
                    path.display(),
                    HELLO_TIMEOUT.as_secs()
                ),
            ))),
        }
    }

    async fn shake_hands(
        mut session: Session,
        path: AgentPath,
        expected: Expected,
        copied: bool,
    ) -> Result<Self, StartFailure> {
        let preamble = Preamble::of_this_build(SUPPORTED).encode();
        // A failure to write shows in what is read.
        let _ = session.stdin.write_all(&preamble).await;
        let theirs = read_preamble(&mut session).await?;
        let host = session.host.clone();
        let version = SUPPORTED.negotiate(theirs.versions).map_err(|error| {
            StartFailure::Agent(
                Error::new(
                    ErrorCode::Protocol,
                    format!("the agent on {host} does not speak with this program"),
                )
                .caused_by(error)
                .hint("use the same release of kvm-clone-ctl and of the agent"),
            )
        })?;
        let warnings = noise_warning(&session);
        let mut sender = AgentSender::new(host.clone(), session.stdin);
        let mut receiver = AgentReceiver {
            host: host.clone(),
            output: session.output,
            heard: Instant::now(),
            had: 0,
        };
        let hello = Hello {
            release: env!("CARGO_PKG_VERSION").to_owned(),
            version,
        };
        sender.send(&hello).await.map_err(StartFailure::Agent)?;
        let welcome = receiver.welcome().await.map_err(StartFailure::Agent)?;
        if expected == Expected::Ours && agent_binary::with_digest(welcome.agent_digest).is_none() {
            return Err(StartFailure::Agent(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the agent {} on {host} is not the one that this program carries",
                    path.display()
                ),
            )));
        }
        let about = About {
            host,
            path,
            welcome,
            version,
            versions: theirs.versions,
            copied,
            warnings,
        };
        Ok(Self {
            sender,
            receiver,
            about,
        })
    }

    /// Sends a message.
    ///
    /// # Errors
    /// As [`AgentConnection::check_knows`]; interrupted, when the connection is gone.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<()> {
        self.check_knows(M::KIND)?;
        self.sender.send(message).await
    }

    /// Makes sure that this kind of message is of the connection's protocol version.
    ///
    /// # Errors
    /// Missing requirement, when the agent is too old for it.
    pub fn check_knows(&self, kind: FrameKind) -> Result<()> {
        let About {
            host,
            path,
            welcome,
            version,
            ..
        } = &self.about;
        if kind.since() <= *version {
            return Ok(());
        }
        let message = format!(
            "the agent {} on {host} is of release {} and speaks protocol version {version}; this takes version {}",
            path.display(),
            welcome.release,
            kind.since()
        );
        let hint = "run `kvm-clone-ctl agent install` for that host, or leave out --agent-path";
        Err(Error::new(ErrorCode::MissingRequirement, message).hint(hint))
    }

    /// Waits for a message; as [`AgentReceiver::next`].
    ///
    /// # Errors
    /// As [`AgentReceiver::next`].
    pub async fn next(&mut self) -> Result<Control> {
        self.receiver.next().await
    }

    /// Both halves at once, for a loop that sends while it waits.
    pub fn halves(&mut self) -> (&mut AgentSender, &mut AgentReceiver) {
        (&mut self.sender, &mut self.receiver)
    }

    /// What the agent said about itself.
    pub fn welcome(&self) -> &Welcome {
        &self.about.welcome
    }

    /// Which agent it is.
    pub fn build(&self) -> AgentBuild {
        let Welcome {
            release,
            arch,
            agent_digest,
            ..
        } = &self.about.welcome;
        AgentBuild {
            release: release.clone(),
            architecture: arch.clone(),
            digest: agent_binary::short_digest(*agent_digest),
        }
    }

    /// The protocol version of this connection.
    pub fn version(&self) -> u16 {
        self.about.version
    }

    /// All versions that the agent speaks.
    pub fn versions(&self) -> Versions {
        self.about.versions
    }

    /// The agent's file on the host.
    pub fn agent_path(&self) -> &AgentPath {
        &self.about.path
    }

    /// Whether the agent had to be sent; otherwise it was found.
    pub fn was_copied(&self) -> bool {
        self.about.copied
    }

    /// The host at the other end.
    pub fn host(&self) -> &Host {
        &self.about.host
    }

    /// What the user ought to know about the host.
    pub fn warnings(&self) -> &[String] {
        &self.about.warnings
    }

    /// Closes the connection, which ends the agent, and waits a while for it.
    pub async fn close(self) {
        let Self {
            sender,
            mut receiver,
            about,
        } = self;
        drop(sender);
        let patience = if receiver.is_silent() {
            Duration::ZERO
        } else {
            CLOSE_TIMEOUT
        };
        let child = &mut receiver.output.child;
        if tokio::time::timeout(patience, child.wait()).await.is_err() {
            tracing::debug!(host = %about.host, "the control connection does not end; killing it");
            let _ = child.kill().await;
        }
    }
}

impl AgentSender {
    /// Sends a message.
    ///
    /// # Errors
    /// Interrupted, when the connection is gone; protocol, for a message that fits no frame.
    pub async fn send<M: Message>(&mut self, message: &M) -> Result<()> {
        let frame = message.frame()?.encode();
        tracing::trace!(host = %self.host, kind = ?M::KIND, "sent");
        self.frames.send(frame).map_err(|_| lost(&self.host))
    }

    fn new(host: Host, stdin: ChildStdin) -> Self {
        let (frames, queue) = mpsc::unbounded_channel();
        tokio::spawn(write(stdin, queue));
        Self { host, frames }
    }
}

/// Writes what is queued, and a sign of life where nothing is. A connection that broke shows in
/// what is read.
async fn write(mut stdin: ChildStdin, mut queue: mpsc::UnboundedReceiver<Bytes>) {
    loop {
        let frame = match tokio::time::timeout(BEAT, queue.recv()).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(_) => match (Alive {}).frame() {
                Ok(frame) => frame.encode(),
                Err(_) => return,
            },
        };
        let written = async {
            stdin.write_all(&frame).await?;
            stdin.flush().await
        };
        if written.await.is_err() {
            return;
        }
    }
}

impl AgentReceiver {
    /// Waits for a message. Safe to cancel: a frame is taken only when it is complete.
    ///
    /// # Errors
    /// Interrupted when the connection ends, with what ssh said about it; protocol for anything
    /// that is not a message of a control connection.
    pub async fn next(&mut self) -> Result<Control> {
        loop {
            if let Some(frame) = frame::decode(&mut self.output.buffer)? {
                self.is_alive();
                tracing::trace!(host = %self.host, kind = ?frame.kind, "received");
                match Control::read(&frame)? {
                    Control::Alive(Alive {}) => continue,
                    message => return heard::examine(message),
                }
            }
            let silent = tokio::time::sleep_until(self.heard + SILENCE);
            tokio::select! {
                // What has come counts, however long nobody looked.
                biased;
                more = self.output.fill() => {
                    if !more? {
                        return Err(self.ended().await);
                    }
                    if self.output.buffer.len() >= self.had + SIGN_OF_LIFE {
                        self.is_alive();
                    }
                }
                () = silent => {
                    let seconds = SILENCE.as_secs();
                    let text = format!("nothing was heard of it for {seconds} s");
                    return Err(lost(&self.host).caused_by(text));
                }
            }
        }
    }

    fn is_alive(&mut self) {
        self.heard = Instant::now();
        self.had = self.output.buffer.len();
    }

    /// Whether it is taken for dead.
    fn is_silent(&self) -> bool {
        self.heard.elapsed() >= SILENCE
    }

    async fn welcome(&mut self) -> Result<Welcome> {
        match self.next().await? {
            Control::Welcome(welcome) => Ok(welcome),
            Control::Failed(failed) => Err(failed.into()),
            other => Err(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the agent on {} answers hello with {:?}",
                    self.host,
                    other.kind()
                ),
            )),
        }
    }

    async fn ended(&mut self) -> Error {
        let (status, stderr) = self.output.ended().await;
        let error = lost(&self.host);
        let how = status.map(|status| status.to_string());
        match (stderr.trim(), how) {
            ("", None) => error,
            ("", Some(how)) => error.caused_by(how),
            (said, None) => error.caused_by(said.to_owned()),
            (said, Some(how)) => error.caused_by(format!("{said} ({how})")),
        }
    }

    /// The end of what came on the connection's standard error.
    pub fn stderr(&self) -> String {
        self.output.stderr()
    }
}

fn lost(host: &Host) -> Error {
    Error::new(
        ErrorCode::Interrupted,
        format!("the connection to {host} is lost"),
    )
    .hint("the same command takes the run up again")
}

async fn read_preamble(session: &mut Session) -> Result<Preamble, StartFailure> {
    loop {
        match preamble::find(&mut session.output.buffer) {
            Ok(Some((preamble, noise))) => {
                session.noise.extend_from_slice(noise.trim_ascii());
                return Ok(preamble);
            }
            Ok(None) => {}
            Err(
                error @ (PreambleError::NotFound { .. }
                | PreambleError::BadRange { .. }
                | PreambleError::NoCommonVersion { .. }),
            ) => {
                let text = format!("what starts as the agent on {} is none", session.host);
                return Err(StartFailure::Agent(
                    Error::new(ErrorCode::Protocol, text).caused_by(error),
                ));
            }
        }
        if !session.output.fill().await.map_err(StartFailure::Host)? {
            return Err(StartFailure::Agent(session.no_agent().await));
        }
    }
}

/// A shell that prints something by itself costs nothing here, but breaks other tools.
fn noise_warning(session: &Session) -> Vec<String> {
    if session.noise.is_empty() {
        return Vec::new();
    }
    let start = &session.noise[..session.noise.len().min(64)];
    vec![format!(
        "the login shell on {} prints something by itself (\"{}\"): scp and rsync fail on that",
        session.host,
        start.escape_ascii()
    )]
}
