//! The control connection while it is being opened: a shell script on the host that is about to
//! become the agent. Ends in an agent that said its preamble, or in an error that shows what came
//! instead.

use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use kvm_clone_protocol::preamble::{self, MAX_NOISE};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout};
use tokio::task::JoinHandle;

use super::{AgentPath, Host, MAX_STDERR, SSH_FAILED, find, line_after, script, ssh};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};

/// How long a login may take. sshd itself gives up on one after 120 s unless told otherwise.
pub(super) const LOGIN_TIMEOUT: Duration = Duration::from_secs(150);

/// How long a child that closed its output may take to end, before it is no use to wait for its
/// exit status.
const REAP_TIMEOUT: Duration = Duration::from_secs(2);

/// What the script on the host says first.
#[derive(Debug)]
pub(super) enum Greeting {
    /// This agent is being started, or has come without having been asked for.
    At(AgentPath),
    /// There is none; the host is this machine, as `uname -m` names it.
    Need(String),
}

/// The process of a control connection and its pipes.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) host: Host,
    pub(super) stdin: ChildStdin,
    pub(super) output: SessionOutput,
    /// What the login shell printed by itself.
    pub(super) noise: Vec<u8>,
    /// The script has said what it starts.
    is_greeted: bool,
}

/// The reading half, with all that is needed to say why it ended.
#[derive(Debug)]
pub(super) struct SessionOutput {
    pub(super) child: Child,
    pub(super) stdout: ChildStdout,
    pub(super) buffer: BytesMut,
    stderr: StderrTail,
}

impl Session {
    /// Runs `script` on the host as its control connection.
    pub(super) async fn open(host: &Host, script: &str) -> Result<Self> {
        let mut command = host.control_command(script).await?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(ssh::cannot_run_ssh)?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(Error::new(
                ErrorCode::Internal,
                "a child process without pipes",
            ));
        };
        let stderr = StderrTail::follow(stderr, host.to_string());
        let output = SessionOutput {
            child,
            stdout,
            buffer: BytesMut::new(),
            stderr,
        };
        Ok(Self {
            host: host.clone(),
            stdin,
            output,
            noise: Vec::new(),
            is_greeted: false,
        })
    }

    /// What the script found.
    pub(super) async fn greeting(&mut self) -> Result<Greeting> {
        match tokio::time::timeout(LOGIN_TIMEOUT, self.read_greeting()).await {
            Ok(greeting) => greeting,
            Err(_) => Err(self.host.silent()),
        }
    }

    async fn read_greeting(&mut self) -> Result<Greeting> {
        loop {
            let input = &self.output.buffer;
            if let Some(reason) = line_after(input, script::REFUSED) {
                return Err(self.refused(&String::from_utf8_lossy(reason)));
            }
            for marker in [script::AT, script::NEED] {
                let Some(line) = line_after(input, marker).map(<[u8]>::to_vec) else {
                    continue;
                };
                let start = find(input, marker).unwrap_or_default();
                self.noise = input[..start].trim_ascii().to_vec();
                self.is_greeted = true;
                self.output
                    .buffer
                    .advance(start + marker.len() + line.len() + 1);
                return Ok(if marker == script::AT {
                    parse_at(&line)
                } else {
                    parse_need(&line)
                });
            }
            // No script of ours ran: the host starts an agent by itself.
            if find(input, &preamble::MAGIC).is_some() {
                return Ok(Greeting::At(AgentPath::Forced));
            }
            if input.len() > MAX_NOISE {
                return Err(self.no_agent().await);
            }
            if !self.output.fill().await? {
                return Err(self.no_agent().await);
            }
        }
    }

    /// Tells a waiting script which agent to start.
    pub(super) async fn start(&mut self, path: &[u8]) -> Result<()> {
        let line = [path, b"\n"].concat();
        // If the connection is gone, what is read next says so.
        let _ = self.stdin.write_all(&line).await;
        let _ = self.stdin.flush().await;
        Ok(())
    }

    /// The connection ended, or went on and on, without a word of ours.
    pub(super) async fn no_agent(&mut self) -> Error {
        let came = self.output.buffer.split();
        let (status, stderr) = self.output.ended().await;
        // What a signal ends on the host, ssh ends with the same as a host that it does not reach.
        let by_signal = self.is_greeted && stderr.trim().is_empty();
        if !by_signal
            && matches!(self.host.spec(), HostSpec::Ssh(_))
            && status.and_then(|s| s.code()) == Some(SSH_FAILED)
        {
            return self.host.classify(&stderr);
        }
        if stderr.contains("sudo:") {
            return Error::new(
                ErrorCode::MissingRequirement,
                format!("sudo on {} does not run the agent", self.host),
            )
            .caused_by(stderr.trim().to_owned())
            .hint(
                "--sudo needs a line in the host's sudoers such as: \
                     USER ALL=(root) NOPASSWD: /usr/local/lib/kvm-clone/kvm-clone-agent",
            );
        }
        let mut text = format!("no agent starts on {}", self.host);
        if let Some(status) = status {
            text = format!("{text} ({status})");
        }
        let error = Error::new(ErrorCode::MissingRequirement, text).hint(format!(
            "the login shell there must run commands and print nothing else: try \"ssh {} true\"",
            self.host
        ));
        let cause = Error::new(ErrorCode::Protocol, preamble::not_found(&came).to_string());
        match stderr.trim() {
            "" => error.caused_by(cause),
            said => error.caused_by(cause.caused_by(said.to_owned())),
        }
    }

    fn refused(&self, reason: &str) -> Error {
        let error = Error::new(
            ErrorCode::MissingRequirement,
            format!("the agent on {} is not run: {reason}", self.host),
        );
        if self.host.options().sudo {
            error.hint(format!(
                "--sudo runs only an agent that nobody but root can change; put one there with: \
                 kvm-clone-ctl agent install {}",
                self.host
            ))
        } else {
            error.hint("--agent-path names a file on the host that must be there and executable")
        }
    }
}

fn parse_at(line: &[u8]) -> Greeting {
    Greeting::At(match line.strip_prefix(b"sudo ") {
        Some(path) => AgentPath::Sudo(path.to_vec()),
        None => AgentPath::Direct(line.strip_prefix(b"direct ").unwrap_or(line).to_vec()),
    })
}

fn parse_need(line: &[u8]) -> Greeting {
    Greeting::Need(String::from_utf8_lossy(line).trim().to_owned())
}

impl SessionOutput {
    /// Reads more; false at the end. Safe to cancel: what was read is in the buffer.
    pub(super) async fn fill(&mut self) -> Result<bool> {
        let read = self.stdout.read_buf(&mut self.buffer).await;
        Ok(read.map_err(|error| Error::io("reading from a control connection", error))? > 0)
    }

    /// How the process ended, if it did, and the end of what it complained about.
    pub(super) async fn ended(&mut self) -> (Option<ExitStatus>, String) {
        let status = tokio::time::timeout(REAP_TIMEOUT, self.child.wait()).await;
        if status.is_ok() {
            self.stderr.finish().await;
        }
        (status.ok().and_then(Result::ok), self.stderr.text())
    }

    /// The end of what came on standard error so far.
    pub(super) fn stderr(&self) -> String {
        self.stderr.text()
    }
}

/// The last bytes of a child's standard error, read as they come.
#[derive(Debug)]
struct StderrTail {
    tail: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl StderrTail {
    fn follow(stderr: ChildStderr, host: String) -> Self {
        let tail = Arc::new(Mutex::new(Vec::new()));
        let reader = tokio::spawn(follow(stderr, host, Arc::clone(&tail)));
        Self {
            tail,
            reader: Some(reader),
        }
    }

    /// Waits for the rest, which a dead child's pipe still holds; a grandchild may keep it open.
    async fn finish(&mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = tokio::time::timeout(REAP_TIMEOUT, reader).await;
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.tail.lock().unwrap_or_else(PoisonError::into_inner))
            .into_owned()
    }
}

async fn follow(stderr: ChildStderr, host: String, tail: Arc<Mutex<Vec<u8>>>) {
    let limit = usize::try_from(MAX_STDERR).unwrap_or(usize::MAX);
    let mut stderr = BufReader::with_capacity(limit, stderr);
    loop {
        let read = match stderr.fill_buf().await {
            Ok(bytes) if !bytes.is_empty() => {
                tracing::debug!(host, stderr = %String::from_utf8_lossy(bytes).trim_end());
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.extend_from_slice(bytes);
                let surplus = tail.len().saturating_sub(limit);
                tail.drain(..surplus);
                bytes.len()
            }
            _ => return,
        };
        stderr.consume(read);
    }
}

#[cfg(test)]
mod tests {
    use super::super::agent::{AgentConnection, StartFailure};
    use super::super::deploy::Expected;
    use super::*;
    use crate::agent_binary;

    fn here() -> Host {
        Host::new(HostSpec::Local, Arc::default())
    }

    async fn path_of(script: &str) -> AgentPath {
        let mut session = Session::open(&here(), script).await.unwrap();
        match session.greeting().await.unwrap() {
            Greeting::At(path) => path,
            Greeting::Need(machine) => panic!("asked for an agent for {machine}"),
        }
    }

    #[tokio::test]
    async fn a_script_names_the_agent_that_it_becomes() {
        let preamble = r#"printf "\211KVC\r\n\032\n\001\000\001\000\000\000\000\000""#;
        let script = |how: &str| format!("echo; echo kvm-clone-at {how}; {preamble}");
        assert_eq!(
            path_of(&script("direct /a b")).await,
            AgentPath::Direct(b"/a b".to_vec())
        );
        assert_eq!(
            path_of(&script("sudo /a")).await,
            AgentPath::Sudo(b"/a".to_vec())
        );
        assert_eq!(path_of(preamble).await, AgentPath::Forced);
        // In two reads, behind a login shell's chatter.
        let split = format!(
            "echo Welcome; {}",
            preamble.replace("KVC", "K\"; sleep 0.1; printf \"VC")
        );
        assert_eq!(path_of(&split).await, AgentPath::Forced);
    }

    #[tokio::test]
    async fn an_agent_that_the_host_starts_by_itself_is_spoken_with() {
        let directory = tempfile::tempdir().unwrap();
        let agent = directory.path().join("agent");
        let agent = agent.to_str().unwrap();
        // Written by another process, so that no test that forks meanwhile keeps it open.
        let write = format!("cat >{agent} && chmod 0700 {agent}");
        let ours = agent_binary::for_machine("here", std::env::consts::ARCH).unwrap();
        let bytes = ours.bytes().unwrap();
        here().run(&write, bytes, 0).await.unwrap();

        let forced = format!("echo Welcome; exec {agent} serve");
        let mut session = Session::open(&here(), &forced).await.unwrap();
        let Greeting::At(path) = session.greeting().await.unwrap() else {
            panic!("an agent was asked for");
        };
        assert_eq!(path, AgentPath::Forced);
        let agent = AgentConnection::establish(session, path, Expected::Any, false)
            .await
            .map_err(StartFailure::into_error)
            .unwrap();
        assert!(agent_binary::with_digest(agent.welcome().agent_digest).is_some());
        assert!(agent.warnings()[0].contains("\"Welcome\""));
        agent.close().await;
    }
}
