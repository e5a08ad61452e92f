//! Data connections: made by listening for an `attach` on this host, or by running a command
//! that reaches one on the other.
//!
//! The listening process and `attach` meet at a socket in the abstract name space: nothing of it
//! can be left behind in a file system. Who may connect is decided by the user that the kernel
//! names and by a token that the controller carries from one agent to the other. `attach` hands
//! its standard input and output over and steps aside, so bulk data takes no detour through it.

use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use kvm_clone_protocol::message::{Dial, FailureCode, Token};
use kvm_clone_protocol::preamble::{Preamble, Versions};
use nix::cmsg_space;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};

use crate::channel::{FrameReader, FrameWriter};
use crate::failure::Failure;

/// A data connection has this long to come into being.
const SETUP_TIME: Duration = Duration::from_secs(30);

/// How much of a command's standard error is kept for a message.
const LAST_WORDS: usize = 2048;

/// A data connection.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) reader: FrameReader,
    pub(crate) writer: FrameWriter,
    /// Nothing more can be read.
    pub(crate) is_over: bool,
    peer: Peer,
}

/// What must live as long as the link.
#[derive(Debug)]
enum Peer {
    /// `attach` waits for the end of this connection.
    Attached { _lease: UnixStream },
    /// The command that reaches the other host, and the host keys that it reads.
    Dialed { child: Child, _known_hosts: File },
}

/// A socket that waits for its `attach`.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    name: String,
    token: Token,
}

impl Listener {
    /// Listens under a random name.
    ///
    /// # Errors
    /// [`Failure`] when the system gives no randomness or no socket.
    pub(crate) fn bind() -> Result<Self, Failure> {
        let internal = |error: &dyn std::fmt::Display| {
            Failure::new(
                FailureCode::Internal,
                format!("listening for the data connection: {error}"),
            )
        };
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(|error| internal(&error))?;
        let (name, token) = random.split_at(16);
        let name = hex(name);
        let address =
            SocketAddr::from_abstract_name(socket_name(&name)).map_err(|e| internal(&e))?;
        let socket = std::os::unix::net::UnixListener::bind_addr(&address)
            .and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
            .and_then(UnixListener::from_std)
            .map_err(|error| internal(&error))?;
        let token = Token(token.try_into().expect("half of 32 bytes"));
        Ok(Self {
            socket,
            name,
            token,
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn token(&self) -> Token {
        self.token
    }

    /// Waits for the `attach` that knows the token, and opens the connection.
    ///
    /// # Errors
    /// [`Failure`] when none comes in time, or the other end does not speak the protocol.
    pub(crate) async fn accept(self, version: u16) -> Result<Link, Failure> {
        let late = || Failure::link("no data connection came in time");
        tokio::time::timeout(SETUP_TIME, self.accept_attach(version))
            .await
            .map_err(|_| late())?
    }

    async fn accept_attach(self, version: u16) -> Result<Link, Failure> {
        loop {
            let broken = |error: io::Error| Failure::link(format!("waiting for attach: {error}"));
            let (stream, _) = self.socket.accept().await.map_err(broken)?;
            // Whoever else connects is turned away, and changes nothing.
            if let Some((input, output)) = self.admit(&stream).await {
                let reader = FrameReader::new(input).map_err(broken)?;
                let writer = FrameWriter::new(output).map_err(broken)?;
                let mut link = Link {
                    reader,
                    writer,
                    is_over: false,
                    peer: Peer::Attached { _lease: stream },
                };
                link.exchange_preambles(version).await?;
                return Ok(link);
            }
        }
    }

    /// The descriptors of an `attach` of the same user that has the token.
    async fn admit(&self, stream: &UnixStream) -> Option<(OwnedFd, OwnedFd)> {
        let user = stream.peer_cred().ok()?.uid();
        if user != nix::unistd::geteuid().as_raw() {
            return None;
        }
        loop {
            stream.readable().await.ok()?;
            match stream.try_io(tokio::io::Interest::READABLE, || receive(stream)) {
                Ok((token, fds)) => {
                    let [input, output] = <[OwnedFd; 2]>::try_from(fds).ok()?;
                    return (token == self.token.0).then_some((input, output));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
        }
    }
}

/// One message: the token, and the descriptors that travel with it.
fn receive(stream: &UnixStream) -> io::Result<([u8; 16], Vec<OwnedFd>)> {
    let mut token = [0; 16];
    let mut space = cmsg_space!([std::os::fd::RawFd; 2]);
    let mut slices = [IoSliceMut::new(&mut token)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just installed these descriptors for this process, and
            // nothing else knows their numbers.
            fds.extend(
                received
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    if message.bytes != 16 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
    }
    Ok((token, fds))
}

/// Runs the command that reaches the other agent, and opens the connection.
///
/// # Errors
/// [`Failure`] with what the command said on its standard error.
pub(crate) async fn dial(request: &Dial, version: u16) -> Result<Link, Failure> {
    let late = || Failure::link("the other host did not answer in time");
    tokio::time::timeout(SETUP_TIME, dial_now(request, version))
        .await
        .map_err(|_| late())?
}

async fn dial_now(request: &Dial, version: u16) -> Result<Link, Failure> {
    let broken = |error: io::Error| Failure::link(format!("reaching the other host: {error}"));
    let known_hosts = known_hosts_file(&request.known_hosts).map_err(broken)?;
    let mut command = dial_command(request, &known_hosts)?;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(broken)?;
    let stdin = child
        .stdin
        .take()
        .expect("piped above")
        .into_owned_fd()
        .map_err(broken)?;
    let stdout = child
        .stdout
        .take()
        .expect("piped above")
        .into_owned_fd()
        .map_err(broken)?;
    let reader = FrameReader::new(stdout).map_err(broken)?;
    let mut writer = FrameWriter::new(stdin).map_err(broken)?;
    writer.push_bytes(Bytes::from(hex(&request.token.0) + "\n"));
    let mut link = Link {
        reader,
        writer,
        is_over: false,
        peer: Peer::Dialed {
            child,
            _known_hosts: known_hosts,
        },
    };
    match link.exchange_preambles(version).await {
        Ok(()) => Ok(link),
        Err(failure) => {
            let message = format!("{failure}{}", link.last_words().await);
            Err(Failure { message, ..failure })
        }
    }
}

fn dial_command(request: &Dial, known_hosts: &File) -> Result<Command, Failure> {
    // ssh closes inherited descriptors, but may open this process's by their names.
    let (pid, fd) = (std::process::id(), known_hosts.as_raw_fd());
    let known_hosts = format!("/proc/{pid}/fd/{fd}");
    let mut words = request
        .command
        .iter()
        .map(|word| substitute(word, known_hosts.as_bytes()));
    match words.next() {
        Some(program) => {
            let mut command = Command::new(program);
            command.args(words);
            Ok(command)
        }
        None if request
            .name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric()) =>
        {
            let mut command = Command::new("/proc/self/exe");
            command.args(["attach", &request.name]);
            Ok(command)
        }
        None => Err(Failure::new(
            FailureCode::Protocol,
            "a data connection with a bad name",
        )),
    }
}

/// Host keys in memory: nothing is left behind in a file system.
fn known_hosts_file(lines: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"known_hosts", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(lines)?;
    Ok(file)
}

/// Puts the path of the host keys where the controller left a gap for it.
fn substitute(word: &[u8], known_hosts: &[u8]) -> std::ffi::OsString {
    const GAP: &[u8] = b"{known_hosts}";
    let word = match word.windows(GAP.len()).position(|window| window == GAP) {
        Some(at) => [&word[..at], known_hosts, &word[at + GAP.len()..]].concat(),
        None => word.to_vec(),
    };
    std::ffi::OsString::from_vec(word)
}

impl Link {
    async fn exchange_preambles(&mut self, version: u16) -> Result<(), Failure> {
        let ours = Versions::only(version);
        let preamble = Preamble::of_this_build(ours).encode();
        self.writer.push_bytes(Bytes::copy_from_slice(&preamble));
        self.writer
            .flush()
            .await
            .map_err(|error| Failure::link(format!("writing: {error}")))?;
        self.reader.preamble(ours).await?;
        Ok(())
    }

    /// What the dialing command said, as the end of a message.
    pub(crate) async fn last_words(&mut self) -> String {
        let Peer::Dialed { child, .. } = &mut self.peer else {
            return String::new();
        };
        let Some(stderr) = &mut child.stderr else {
            return String::new();
        };
        let mut words = Vec::new();
        let mut limited = stderr.take(LAST_WORDS as u64);
        // A command that lives on says no more: half a second is enough for one that dies.
        let read = limited.read_to_end(&mut words);
        let _ = tokio::time::timeout(Duration::from_millis(500), read).await;
        let words = String::from_utf8_lossy(&words);
        if words.trim().is_empty() {
            String::new()
        } else {
            format!(": {}", words.trim())
        }
    }
}

/// The abstract name behind a [`Listener::name`].
pub(crate) fn socket_name(name: &str) -> String {
    format!("kvm-clone-{name}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Closes `fd` by putting `/dev/null` in its place.
pub(crate) fn release(fd: impl AsFd, null: &File, number: i32) -> io::Result<OwnedFd> {
    let kept = fd.as_fd().try_clone_to_owned()?;
    match number {
        0 => nix::unistd::dup2_stdin(null)?,
        _ => nix::unistd::dup2_stdout(null)?,
    }
    Ok(kept)
}
