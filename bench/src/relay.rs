//! A relay in front of sshd that counts what crosses it: the bytes on the wire, for every tool
//! alike. Bytes move by `splice` and never enter this process, so it costs little; only where the
//! relay plays a far link are they held here for a while.

use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};

use crate::delay;
use crate::measure::Meter;

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
    round_trip_ms: AtomicU64,
}

impl State {
    fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn round_trip(&self) -> Duration {
        Duration::from_millis(self.round_trip_ms.load(Ordering::Relaxed))
    }
}

impl Relay {
    /// Listens on a free port of `address` and passes connections on to `target` of the loopback.
    pub(crate) fn start(address: Ipv4Addr, target: u16) -> Result<Self> {
        let listener = TcpListener::bind((address, 0)).context("opening the relay")?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                thread::spawn(move || {
                    // A connection that cannot be passed on is closed; the tool will say so.
                    let _ = connect(client, target, &state);
                });
            }
        });
        Ok(Self { port, state })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// How long a question and its answer are under way, on connections from now on.
    pub(crate) fn set_round_trip_ms(&self, round_trip_ms: u64) {
        let state = &self.state.round_trip_ms;
        state.store(round_trip_ms, Ordering::Relaxed);
    }
}

/// It counts the payload of TCP, and knows of every connection.
impl Meter for Relay {
    fn bytes(&self) -> Result<u64> {
        Ok(self.state.bytes.load(Ordering::Relaxed))
    }

    fn is_idle(&self) -> bool {
        self.state.pumps.load(Ordering::Acquire) == 0
    }
}

fn connect(client: TcpStream, target: u16, state: &Arc<State>) -> io::Result<()> {
    let round_trip = state.round_trip();
    // What a far client waits for before it may speak.
    thread::sleep(round_trip);
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
            let _ = match round_trip {
                Duration::ZERO => pump(&from, &to, &state),
                _ => delay::pump(&from, &to, round_trip / 2, |bytes| state.count(bytes)),
            };
            let _ = to.shutdown(Shutdown::Write);
            let _ = from.shutdown(Shutdown::Read);
            state.pumps.fetch_sub(1, Ordering::AcqRel);
        });
    }
    Ok(())
}

/// Moves bytes until `from` ends.
fn pump(from: &TcpStream, to: &TcpStream, state: &State) -> io::Result<()> {
    let (pipe_out, pipe_in) = io::pipe()?;
    let wanted = i32::try_from(PIPE_LEN).expect("a megabyte fits");
    // Without the privilege for a large pipe the usual 64 KiB do.
    let _ = fcntl(&pipe_in, FcntlArg::F_SETPIPE_SZ(wanted));
    while let got @ 1.. = splice_once(from, &pipe_in, PIPE_LEN)? {
        let mut left = got;
        while left > 0 {
            left -= splice_once(&pipe_out, to, left)?;
        }
        state.count(got);
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
    use std::time::Instant;

    use super::*;

    /// A relay, and a server behind it that hears a client out and answers with the first 1000
    /// bytes; how long that took.
    fn ask(round_trip_ms: u64) -> Duration {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let relay = Relay::start(Ipv4Addr::LOCALHOST, port).unwrap();
        relay.set_round_trip_ms(round_trip_ms);
        let echo = thread::spawn(move || {
            let (mut peer, _) = server.accept().unwrap();
            let mut bytes = Vec::new();
            peer.read_to_end(&mut bytes).unwrap();
            peer.write_all(&bytes[..1000]).unwrap();
            bytes.len()
        });
        let start = Instant::now();
        let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, relay.port())).unwrap();
        let question: Vec<u8> = (0..3 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
        client.write_all(&question).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        let took = start.elapsed();
        assert_eq!(echo.join().unwrap(), question.len());
        assert_eq!(answer, &question[..1000]);
        assert_eq!(relay.bytes().unwrap(), question.len() as u64 + 1000);
        took
    }

    #[test]
    fn bytes_pass_both_ways_and_are_counted() {
        ask(0);
    }

    #[test]
    fn a_far_answer_takes_a_round_trip_to_connect_and_one_to_come() {
        assert!(ask(50) >= Duration::from_millis(100));
    }
}
