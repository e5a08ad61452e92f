//! A relay in front of sshd that counts what crosses it: the bytes on the wire, for every tool
//! alike. Bytes move by `splice` and never enter this process, so it costs little.

use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};

/// What one splice moves at most, and what a pipe is asked to hold.
const PIPE_LEN: usize = 1 << 20;

/// A running relay; it lives as long as the process.
#[derive(Debug, Clone)]
pub(crate) struct Relay {
    port: u16,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    bytes: AtomicU64,
    pumps: AtomicUsize,
}

impl Relay {
    /// Listens on a free port of the loopback and passes connections on to `target`.
    pub(crate) fn start(target: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("opening the relay")?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A connection that cannot be passed on is closed; the tool will say so.
                let _ = connect(client, target, &shared);
            }
        });
        Ok(Self { port, state })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Bytes that have crossed so far, both directions.
    pub(crate) fn bytes(&self) -> u64 {
        self.state.bytes.load(Ordering::Relaxed)
    }

    /// Whether no connection is open.
    pub(crate) fn is_idle(&self) -> bool {
        self.state.pumps.load(Ordering::Acquire) == 0
    }
}

fn connect(client: TcpStream, target: u16, state: &Arc<State>) -> io::Result<()> {
    let server = TcpStream::connect((Ipv4Addr::LOCALHOST, target))?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let there = (client.try_clone()?, server.try_clone()?);
    for (from, to) in [there, (server, client)] {
        let state = Arc::clone(state);
        state.pumps.fetch_add(1, Ordering::AcqRel);
        thread::spawn(move || {
            // An error here is a connection that broke, which both ends see for themselves.
            let _ = pump(&from, &to, &state.bytes);
            let _ = to.shutdown(Shutdown::Write);
            let _ = from.shutdown(Shutdown::Read);
            state.pumps.fetch_sub(1, Ordering::AcqRel);
        });
    }
    Ok(())
}

/// Moves bytes until `from` ends.
fn pump(from: &TcpStream, to: &TcpStream, count: &AtomicU64) -> io::Result<()> {
    let (pipe_out, pipe_in) = io::pipe()?;
    let wanted = i32::try_from(PIPE_LEN).expect("a megabyte fits");
    // Without the privilege for a large pipe the usual 64 KiB do.
    let _ = fcntl(&pipe_in, FcntlArg::F_SETPIPE_SZ(wanted));
    while let got @ 1.. = splice_once(from, &pipe_in, PIPE_LEN)? {
        let mut left = got;
        while left > 0 {
            left -= splice_once(&pipe_out, to, left)?;
        }
        count.fetch_add(got as u64, Ordering::Relaxed);
    }
    Ok(())
}

fn splice_once(from: impl AsFd, to: impl AsFd, len: usize) -> io::Result<usize> {
    Ok(splice(
        from,
        None,
        to,
        None,
        len,
        SpliceFFlags::SPLICE_F_MOVE,
    )?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn bytes_pass_both_ways_and_are_counted() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let relay = Relay::start(server.local_addr().unwrap().port()).unwrap();
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, relay.port())).unwrap();
        let question = vec![7; 3 << 20];
        let echo = thread::spawn(move || {
            let (mut peer, _) = server.accept().unwrap();
            let mut bytes = Vec::new();
            peer.read_to_end(&mut bytes).unwrap();
            peer.write_all(&bytes[..1000]).unwrap();
            bytes.len()
        });
        client.write_all(&question).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert_eq!(echo.join().unwrap(), question.len());
        assert_eq!(answer, &question[..1000]);
        assert_eq!(relay.bytes(), question.len() as u64 + 1000);
    }
}
