//! One end of a connection: bytes go out as they are, frames come in with a deadline.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use bytes::BytesMut;
use kvm_clone_protocol::frame::{self, Frame};
use kvm_clone_protocol::preamble::{self, Preamble};

use super::DEADLINE;

/// What comes, read by a thread as fast as it comes.
#[derive(Debug)]
pub struct Incoming {
    events: Receiver<Event>,
    deaf: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Event {
    Preamble(Preamble),
    Frame(Frame),
    /// What came breaks the protocol: that the program under trial does not do.
    Broken(String),
}

impl Incoming {
    /// Reads a preamble and then frames from `input`, to its end.
    #[must_use]
    pub fn start(input: impl Read + Send + 'static) -> Self {
        let (to, events) = mpsc::channel();
        let deaf = Arc::new(AtomicBool::new(false));
        let still = Arc::clone(&deaf);
        std::thread::spawn(move || read(input, &to, &still));
        Self { events, deaf }
    }

    /// Reads nothing more; the other end may still write for as long as this is kept.
    pub fn deafen(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    /// The preamble.
    ///
    /// # Panics
    /// When none comes.
    #[must_use]
    pub fn preamble(&self) -> Preamble {
        match self.event(DEADLINE) {
            Some(Event::Preamble(preamble)) => preamble,
            other => panic!("expected a preamble, got {other:?}"),
        }
    }

    /// The next frame; `None` at the end of the stream.
    ///
    /// # Panics
    /// When nothing comes in time, or what comes is no frame.
    #[must_use]
    pub fn next(&self) -> Option<Frame> {
        self.next_within(DEADLINE)
            .unwrap_or_else(|| panic!("nothing came for {DEADLINE:?}"))
    }

    /// The next frame, `Some(None)` at the end of the stream; `None` when nothing came in time.
    ///
    /// # Panics
    /// When what comes is no frame.
    #[must_use]
    pub fn next_within(&self, limit: Duration) -> Option<Option<Frame>> {
        match self.events.recv_timeout(limit) {
            Ok(Event::Frame(frame)) => Some(Some(frame)),
            Ok(Event::Broken(why)) => panic!("what came is no frame: {why}"),
            Ok(Event::Preamble(preamble)) => panic!("expected a frame, got {preamble:?}"),
            Err(RecvTimeoutError::Disconnected) => Some(None),
            Err(RecvTimeoutError::Timeout) => None,
        }
    }

    fn event(&self, limit: Duration) -> Option<Event> {
        match self.events.recv_timeout(limit) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("nothing came for {limit:?}"),
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.deaf.store(false, Ordering::Relaxed);
    }
}

fn read(mut input: impl Read, to: &Sender<Event>, deaf: &AtomicBool) {
    let mut buffer = BytesMut::new();
    let mut chunk = vec![0; 64 << 10];
    let mut greeted = false;
    loop {
        while deaf.load(Ordering::Relaxed) {
            // The pipe stays open, and full, until the process that would write to it ends.
            std::thread::sleep(Duration::from_secs(1));
        }
        // A program that was killed resets what it had not read.
        let read = input.read(&mut chunk).unwrap_or(0);
        buffer.extend_from_slice(&chunk[..read]);
        while let Some(event) = take(&mut buffer, &mut greeted) {
            let broken = matches!(event, Event::Broken(_));
            if to.send(event).is_err() || broken {
                return;
            }
        }
        if read == 0 {
            return;
        }
    }
}

fn take(buffer: &mut BytesMut, greeted: &mut bool) -> Option<Event> {
    if *greeted {
        return match frame::decode(buffer) {
            Ok(frame) => frame.map(Event::Frame),
            Err(error) => Some(Event::Broken(error.to_string())),
        };
    }
    match preamble::find(buffer) {
        Ok(found) => found.map(|(preamble, _noise)| {
            *greeted = true;
            Event::Preamble(preamble)
        }),
        Err(error) => Some(Event::Broken(error.to_string())),
    }
}

/// Writes all of it; false when nobody reads any more, which is what a hostile peer has to expect.
pub fn write(output: &mut impl Write, bytes: &[u8]) -> bool {
    output
        .write_all(bytes)
        .and_then(|()| output.flush())
        .is_ok()
}
