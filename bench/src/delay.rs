//! A connection that takes its time: what goes in comes out after a while, as much as ever, in the
//! same order. In user space, because a kernel without netem cannot do it.
//!
//! ```text
//!   from ─ read ─ (due at, bytes) ─ … ─ (due at, bytes) ─ sleep until due ─ write ─ to
//! ```
//!
//! The window of TCP is not played: both ends have a peer at hand that takes bytes at once. What
//! a program allows to be under way by itself, as ssh does, is felt as it is on a far link.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

/// What one read takes at most.
const PIECE_LEN: usize = 128 * 1024;

/// Pieces that are held at once: 128 MiB at most, which is 50 ms of 20 Gbit/s. Pieces are small
/// where bytes come slowly, so it is 20,000 reads in a second that this allows at 50 ms, at least
/// 5 Gbit/s of ssh's packets of 32 KiB: more than ssh can cipher.
const PIECES: usize = 1024;

/// Moves bytes until `from` ends, each `delay` after it came, and counts them.
pub(crate) fn pump(
    mut from: &TcpStream,
    mut to: &TcpStream,
    delay: Duration,
    mut count: impl FnMut(usize) + Send,
) -> io::Result<()> {
    let (queue, held) = sync_channel::<(Instant, Vec<u8>)>(PIECES);
    thread::scope(|scope| {
        let writer = scope.spawn(move || {
            held.iter().try_for_each(|(due, piece)| {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                count(piece.len());
                to.write_all(&piece)
            })
        });
        let read = read_all(&mut from, |piece| {
            queue.send((Instant::now() + delay, piece)).is_ok()
        });
        drop(queue);
        let written = writer.join().expect("the writer does not panic");
        read.and(written)
    })
}

/// Takes all pieces and, at the end, an empty one: the end takes its time, too. Ends early when
/// nobody wants them any more.
fn read_all(from: &mut impl Read, mut take: impl FnMut(Vec<u8>) -> bool) -> io::Result<()> {
    let mut buffer = vec![0; PIECE_LEN];
    loop {
        let len = from.read(&mut buffer)?;
        if !take(buffer[..len].to_vec()) || len == 0 {
            return Ok(());
        }
    }
}
