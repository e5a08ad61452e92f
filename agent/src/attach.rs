//! `kvm-clone-agent attach NAME`: joins the serving agent of the same user on this host, hands it
//! standard input and output as a data connection, and waits until that has ended.
//!
//! Whoever may run this and nothing else can bring data, to an agent that waits for it and whose
//! controller has given the token away, and do nothing else.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};

use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg};
use nix::unistd::geteuid;

use crate::link::{release, socket_name};

/// # Errors
/// The token is malformed, or no agent listens under this name.
pub(crate) fn attach(name: &str) -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let token = read_token()?;
    // From here on the descriptors are the serving agent's alone: when it closes them, the other
    // end sees the end of the stream.
    let input = release(io::stdin(), &null, 0)?;
    let output = release(io::stdout(), &null, 1)?;
    let mut socket = hand_over(name, token, &input, &output)?;
    drop((input, output));
    // Nothing is ever sent: this returns when the serving agent has closed its end, or died.
    socket.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn hand_over(
    name: &str,
    token: [u8; 16],
    input: &OwnedFd,
    output: &OwnedFd,
) -> io::Result<UnixStream> {
    let address = SocketAddr::from_abstract_name(socket_name(name))?;
    let socket = UnixStream::connect_addr(&address)?;
    // When the agent has just died, anybody may have taken its name.
    if getsockopt(&socket, PeerCredentials)?.uid() != geteuid().as_raw() {
        let message = "what listens there is another user's";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    let fds = [input.as_raw_fd(), output.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&token)],
        &control,
        MsgFlags::empty(),
        None,
    )?;
    if sent == token.len() {
        Ok(socket)
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// 32 hexadecimal digits and a newline, read without taking a byte of what follows.
fn read_token() -> io::Result<[u8; 16]> {
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "the token is malformed");
    let mut line = [0; 33];
    let stdin = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?;
    File::from(stdin).read_exact(&mut line)?;
    let digits = line.strip_suffix(b"\n").ok_or_else(malformed)?;
    let mut token = [0; 16];
    for (byte, pair) in token.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| malformed())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| malformed())?;
    }
    Ok(token)
}
