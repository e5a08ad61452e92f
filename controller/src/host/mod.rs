//! Hosts: the only part of this program that starts processes. A host is reached through the
//! system's ssh, or is this machine; what runs there is the same shell text either way.
//!
//! ```text
//!  Host ─ start_agent ─ ssh (control connection, is itself the ControlMaster) ─ agent serve
//!    ├── run / attach ─ ssh (a further channel of it) ─ script / agent attach
//!    └── dial_command ─ what the other host runs to come here directly
//! ```

mod agent;
mod deploy;
mod dial;
mod errand;
mod export;
mod facts;
mod files;
mod guard;
mod heard;
mod hold;
mod install;
mod mount;
mod quote;
mod script;
mod session;
mod shared;
mod ssh;
mod tool;
mod way;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::sync::OnceCell;

pub use agent::{AgentBuild, AgentConnection, AgentReceiver, AgentSender};
pub use deploy::{Removed, Unwanted};
pub use dial::Reach;
pub use errand::Errand;
pub use export::{Export, export_socket};
pub use facts::Facts;
pub use files::{FileFacts, FileKind, Space, UNFINISHED};
pub use guard::Guard;
pub use hold::{Backup, FREEZE_STATUS, Held, Place};
pub use install::DEFAULT_INSTALL_PATH;
pub use mount::FileSystem;
pub use quote::quoted;
pub use ssh::{Resolved, SshOptions};
pub use way::Way;

use crate::endpoint::{HostSpec, SshTarget};
use crate::error::{Error, ErrorCode, Result};
use shared::SharedConnection;
use ssh::{ControlSocket, Sharing};

/// How much of a command's standard error is kept.
const MAX_STDERR: u64 = 8 * 1024;

/// The exit status with which ssh reports its own failures.
const SSH_FAILED: i32 = 255;

/// One host of this run. Clones are the same host.
#[derive(Debug, Clone)]
pub struct Host {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    spec: HostSpec,
    options: Arc<SshOptions>,
    resolved: OnceCell<Resolved>,
    /// Where control connections listen; the last one is used. All stay for as long as the host: two
    /// disks of one host have one each, which may yet have to come up.
    sockets: Mutex<Vec<Arc<ControlSocket>>>,
    /// The control connection that holds no agent, once it was asked for; `None` where there
    /// cannot be one.
    shared: OnceCell<Option<SharedConnection>>,
}

/// How a data connection to a host is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// As a further channel of the control connection.
    Channel,
    /// As a connection of its own.
    Alone,
}

/// An agent on a host, and how it is run there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentPath {
    /// The file under this absolute path.
    Direct(Vec<u8>),
    /// The file under this absolute path, through `sudo -n`.
    Sudo(Vec<u8>),
    /// Whichever the login runs, whatever it is asked for: authorized_keys forces it.
    Forced,
}

impl AgentPath {
    /// The path for people.
    pub fn display(&self) -> String {
        match self {
            Self::Direct(path) | Self::Sudo(path) => String::from_utf8_lossy(path).into_owned(),
            Self::Forced => "that authorized_keys names".to_owned(),
        }
    }

    /// The words of `attach NAME`. The path is absolute and the name is letters and digits, so
    /// none of them can be taken for an option. Of a forced agent's words only the last two count.
    fn attach_words<'a>(&'a self, name: &'a str) -> Result<Vec<&'a [u8]>> {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(Error::new(
                ErrorCode::Protocol,
                format!(
                    "the agent names a data connection \"{}\"",
                    name.escape_debug()
                ),
            ));
        }
        let mut words: Vec<&[u8]> = match self {
            Self::Direct(path) => vec![path],
            Self::Sudo(path) => vec![b"sudo", b"-n", path],
            Self::Forced => vec![b"kvm-clone-agent"],
        };
        words.extend([&b"attach"[..], name.as_bytes()]);
        Ok(words)
    }
}

/// What a command on a host left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote, up to the limit that was given.
    pub stdout: Vec<u8>,
    /// The start of what it complained about.
    pub stderr: String,
}

impl Host {
    /// A host, not yet spoken to.
    pub fn new(spec: HostSpec, options: Arc<SshOptions>) -> Self {
        let inner = Inner {
            spec,
            options,
            resolved: OnceCell::new(),
            sockets: Mutex::default(),
            shared: OnceCell::new(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The host as the user named it.
    pub fn spec(&self) -> &HostSpec {
        &self.inner.spec
    }

    /// Whether it is this machine, without ssh.
    pub fn is_local(&self) -> bool {
        self.inner.spec == HostSpec::Local
    }

    /// The options that it is reached with.
    pub fn options(&self) -> &SshOptions {
        &self.inner.options
    }

    /// What ssh makes of its name; asked once. `None` for this machine.
    ///
    /// # Errors
    /// When ssh is missing or refuses its configuration.
    pub async fn resolved(&self) -> Result<Option<&Resolved>> {
        let HostSpec::Ssh(target) = &self.inner.spec else {
            return Ok(None);
        };
        let resolve = || self.inner.options.resolve(target);
        self.inner.resolved.get_or_try_init(resolve).await.map(Some)
    }

    /// A command that runs `script` in a POSIX shell on the host: over the control connection
    /// where there is one, else over a connection of its own.
    ///
    /// # Errors
    /// As [`Host::resolved`].
    pub async fn command(&self, script: &str) -> Result<Command> {
        let socket = self.socket();
        let sharing = sharing(socket.as_deref());
        Ok(sharing.shielded(&self.script_argv(script, sharing).await?))
    }

    /// The command that becomes the control connection, and where it will listen. Where a shared
    /// connection is open, it is a channel of that.
    async fn control_command(&self, script: &str) -> Result<Command> {
        let shared = self.inner.shared.get().is_some_and(Option::is_some);
        if self.is_local() || shared {
            return self.command(script).await;
        }
        let socket = ControlSocket::new()?;
        let sharing = Sharing::Master(socket.path());
        let command = sharing.shielded(&self.script_argv(script, sharing).await?);
        self.sockets().push(Arc::new(socket));
        Ok(command)
    }

    fn socket(&self) -> Option<Arc<ControlSocket>> {
        self.sockets().last().cloned()
    }

    fn channel(&self, way: Attach) -> Option<Arc<ControlSocket>> {
        self.socket().filter(|_| way == Attach::Channel)
    }

    fn sockets(&self) -> MutexGuard<'_, Vec<Arc<ControlSocket>>> {
        let locked = self.inner.sockets.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }

    async fn script_argv(&self, script: &str, sharing: Sharing<'_>) -> Result<Vec<OsString>> {
        let HostSpec::Ssh(target) = &self.inner.spec else {
            return Ok(["sh", "-c", script].map(OsString::from).to_vec());
        };
        let mut argv = self.ssh_argv(target, sharing).await?;
        // The login shell may be any; it only has to find sh.
        let mut remote = OsString::from("exec ");
        remote.push(quote::command([&b"sh"[..], b"-c", script.as_bytes()])?);
        argv.push(remote);
        Ok(argv)
    }

    async fn ssh_argv(&self, target: &SshTarget, sharing: Sharing<'_>) -> Result<Vec<OsString>> {
        let resolved = self
            .resolved()
            .await?
            .expect("only this machine is not resolved");
        Ok(self.inner.options.argv(target, resolved, sharing))
    }

    /// Program and arguments of a data connection to the agent on this host, to be started on
    /// this machine: its standard input and output are those of `attach`.
    ///
    /// # Errors
    /// For a name that is not letters and digits, and as [`Host::resolved`].
    pub async fn attach_argv(
        &self,
        agent: &AgentPath,
        name: &str,
        way: Attach,
    ) -> Result<Vec<OsString>> {
        let words = agent.attach_words(name)?;
        let HostSpec::Ssh(target) = &self.inner.spec else {
            return Ok(words
                .into_iter()
                .map(|word| OsString::from_vec(word.to_vec()))
                .collect());
        };
        let socket = self.channel(way);
        let mut argv = self.ssh_argv(target, sharing(socket.as_deref())).await?;
        let mut remote = OsString::from("exec ");
        remote.push(quote::command(words)?);
        argv.push(remote);
        Ok(argv)
    }

    /// [`Host::attach_argv`] as a command with pipes for standard input, output and error.
    ///
    /// # Errors
    /// As [`Host::attach_argv`].
    pub async fn attach_command(
        &self,
        agent: &AgentPath,
        name: &str,
        way: Attach,
    ) -> Result<Command> {
        let argv = self.attach_argv(agent, name, way).await?;
        let socket = self.channel(way);
        let mut command = sharing(socket.as_deref()).shielded(&argv);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command)
    }

    /// Runs `script` with `input` as its standard input and waits for its end. Of its output at
    /// most `limit` bytes are kept.
    ///
    /// # Errors
    /// When the host cannot be reached; a script that fails is not an error here.
    pub async fn run(&self, script: &str, input: &[u8], limit: usize) -> Result<Output> {
        let mut command = self.command(script).await?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(ssh::cannot_run_ssh)?;
        let (mut stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let feed = async move {
            if let Some(stdin) = &mut stdin {
                // A script that ends before it has read everything says why in its output.
                let _ = stdin.write_all(input).await;
                let _ = stdin.shutdown().await;
            }
        };
        let ((), stdout, stderr) = tokio::join!(
            feed,
            drain(stdout, u64::try_from(limit).unwrap_or(u64::MAX)),
            drain(stderr, MAX_STDERR)
        );
        let status = child
            .wait()
            .await
            .map_err(|error| Error::io("waiting for a command", error))?;
        let output = Output {
            status,
            stdout,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        };
        match &self.inner.spec {
            HostSpec::Ssh(_) if status.code() == Some(SSH_FAILED) => {
                Err(self.classify(&output.stderr))
            }
            _ => Ok(output),
        }
    }

    /// Removes files, which need not exist.
    ///
    /// # Errors
    /// As [`Host::run`], and for a path that cannot be quoted.
    pub async fn remove_files(&self, paths: &[&Path]) -> Result<Output> {
        let words = [&b"rm"[..], b"-f", b"--"].into_iter();
        let paths = paths.iter().map(|path| path.as_os_str().as_bytes());
        let script = quote::command(words.chain(paths))?
            .into_string()
            .map_err(|script| Error::usage(format!("not UTF-8: {}", script.to_string_lossy())))?;
        self.run(&script, &[], 0).await
    }

    /// What it means that ssh, run by another host to come here, ended with `said`.
    pub fn explain(&self, said: &str) -> Error {
        self.classify(said)
    }

    /// What a failure of ssh itself means.
    fn classify(&self, stderr: &str) -> Error {
        match &self.inner.spec {
            HostSpec::Ssh(target) => ssh::classify(target, self.inner.resolved.get(), stderr),
            HostSpec::Local => Error::new(ErrorCode::Internal, "a command on this machine failed")
                .caused_by(stderr.trim().to_owned()),
        }
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.spec.fmt(f)
    }
}

/// Reads to the end and keeps the first `limit` bytes: a command that is not read blocks.
async fn drain(pipe: Option<impl tokio::io::AsyncRead + Unpin>, limit: u64) -> Vec<u8> {
    let mut kept = Vec::new();
    if let Some(mut pipe) = pipe {
        let _ = (&mut pipe).take(limit).read_to_end(&mut kept).await;
        let _ = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await;
    }
    kept
}

/// Where `marker` stands in `bytes`.
fn find(bytes: &[u8], marker: &[u8]) -> Option<usize> {
    bytes
        .windows(marker.len())
        .position(|window| window == marker)
}

/// What follows `marker` up to the end of its line; `None` until the line is complete.
fn line_after<'a>(bytes: &'a [u8], marker: &[u8]) -> Option<&'a [u8]> {
    let rest = &bytes[find(bytes, marker)? + marker.len()..];
    Some(&rest[..find(rest, b"\n")?])
}

/// What follows every `marker`, for people.
fn lines_after(bytes: &[u8], marker: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = bytes;
    while let Some(at) = find(rest, marker) {
        rest = &rest[at + marker.len()..];
        let end = find(rest, b"\n").unwrap_or(rest.len());
        lines.push(ssh::lossy(OsStr::from_bytes(&rest[..end])));
        rest = &rest[end..];
    }
    lines
}
/// Over the connection that listens there, if one does.
fn sharing(socket: Option<&ControlSocket>) -> Sharing<'_> {
    socket.map_or(Sharing::Alone, |socket| Sharing::Channel(socket.path()))
}
