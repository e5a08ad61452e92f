//! The data connections of one session, as one: they come into being one by one, what is to be
//! sent goes over whichever is ready, and what arrives is put back in order.
//!
//! ```text
//!              ┌─ link ── …frames 0, 2, 3… ──┐
//!   queue ─────┤                             ├──── order ─ arrived
//!              └─ link ── …frames 1, 4… ─────┘
//! ```
//!
//! One that cannot be made is done without, as long as there is another.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use kvm_clone_protocol::frame::{Frame, FrameKind};
use kvm_clone_protocol::message::{Beat, FailureCode, Message};
use kvm_clone_protocol::preamble::PREAMBLE_LEN;
use kvm_clone_protocol::sync::{Numbers, Order};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::channel::SILENCE;
use crate::failure::Failure;
use crate::link::Link;
use crate::pace::Pace;

/// Frames that may wait for being written. Credit allows 65,000 of the smallest changes ahead; what
/// has no credit is not to take more.
const MAX_QUEUED: usize = 64 * 1024;

/// A link has enough to write with so many frames, or parts of them: 2 MiB of blocks, more than a
/// pipe takes at once. What is beyond that waits for the link that is ready first.
const ENOUGH: usize = 64;

/// After a link has broken, the peer's last word may still come over another for so long: a peer that
/// is done closes them all at once.
const LAST_WORD: Duration = Duration::from_secs(5);

/// A data connection that comes into being, or has. It is given up when this is dropped.
#[derive(Debug)]
pub(crate) struct Linking(pub(crate) JoinHandle<Result<Link, Failure>>);

impl Drop for Linking {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Links {
    coming: Vec<Linking>,
    up: Vec<Link>,
    queue: VecDeque<Frame>,
    /// Where there are several.
    numbered: Option<(Numbers, Order)>,
    arrived: VecDeque<Frame>,
    pace: Pace,
    /// Which link is the next to be written to.
    turn: usize,
    nap: Option<Pin<Box<Sleep>>>,
    lost: Option<Lost>,
    is_mute: bool,
    /// Bytes of what belongs to the links and not to the session.
    own_wire: u64,
}

/// One that broke. The peer may have said its last word on another, or before.
#[derive(Debug)]
struct Lost {
    link: usize,
    why: String,
    since: Instant,
}

/// What happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// Something was written, or a link is there.
    Moved,
    /// The next frame; more of them may be [here](Links::arrived) already.
    Frame(Frame),
    /// A link broke: nothing can be written any more. What the peer has said before still comes.
    Lost,
    /// Nothing comes any more.
    Over,
}

impl Links {
    /// Those that are coming; all together write at most `rate` bytes a second, zero for no limit.
    pub(crate) fn new(coming: Vec<Linking>, rate: u64) -> Self {
        let numbered = (coming.len() > 1).then(Default::default);
        Self {
            coming,
            up: Vec::new(),
            queue: VecDeque::new(),
            numbered,
            arrived: VecDeque::new(),
            pace: Pace::new(rate),
            turn: 0,
            nap: None,
            lost: None,
            is_mute: false,
            own_wire: 0,
        }
    }

    /// Takes a frame for writing, whatever waits already; see [`is_full`](Self::is_full).
    pub(crate) fn push(&mut self, frame: Frame) {
        self.queue.push_back(frame);
    }

    /// Whether nothing more should be pushed before something was written.
    pub(crate) fn is_full(&self) -> bool {
        self.queue.len() >= MAX_QUEUED
    }

    /// Whether all that was taken has been written, or is not to be any more.
    pub(crate) fn is_empty(&self) -> bool {
        let written = || self.up.iter().all(|link| link.writer.is_empty());
        self.is_mute || self.queue.is_empty() && written()
    }

    /// What could not be written is nothing that the peer waits for.
    pub(crate) fn fall_silent(&mut self) {
        self.is_mute = true;
    }

    /// Bytes in both directions of which the session knows nothing.
    pub(crate) fn own_wire(&self) -> u64 {
        self.own_wire
    }

    /// Says on each link that has nothing else to say that this end is alive.
    pub(crate) fn beat(&mut self) -> Result<(), Failure> {
        let beat = Beat {}.frame()?;
        for link in self.up.iter_mut().filter(|link| link.writer.is_empty()) {
            link.writer.push(&beat);
        }
        Ok(())
    }

    /// From when on the peer is taken for dead. A link that comes into being has a time of its own.
    pub(crate) fn patience(&self) -> Instant {
        if let Some(lost) = &self.lost {
            return lost.since + LAST_WORD;
        }
        let heard = self.up.iter().map(|link| link.reader.heard()).min();
        heard.unwrap_or_else(Instant::now) + SILENCE
    }

    /// Why the session cannot go on, with what the command that made the link said.
    pub(crate) async fn failure(&mut self) -> Failure {
        let (link, why) = match self.lost.take() {
            Some(lost) => (lost.link, lost.why),
            None => {
                let heard = |at: &usize| self.up[*at].reader.heard();
                let silent = (0..self.up.len()).min_by_key(heard);
                (silent.unwrap_or_default(), "the peer is silent".to_owned())
            }
        };
        let words = match self.up.get_mut(link) {
            Some(link) => link.last_words().await,
            None => String::new(),
        };
        Failure::link(format!("{why}{words}"))
    }

    /// Waits for what happens next. May be dropped and called again.
    ///
    /// # Errors
    /// [`Failure`] when no link can be made, or what arrives is no frame, or not in its place.
    pub(crate) async fn next(&mut self) -> Result<Event, Failure> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// A frame that is here already.
    pub(crate) fn arrived(&mut self) -> Option<Frame> {
        self.arrived.pop_front()
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Event, Failure>> {
        let was_lost = self.lost.is_some();
        let mut moved = self.poll_coming(context)?;
        moved |= self.poll_write(context);
        moved |= self.poll_read(context)?;
        if let Some(frame) = self.arrived() {
            return Poll::Ready(Ok(Event::Frame(frame)));
        }
        match &self.lost {
            Some(_) if !was_lost => Poll::Ready(Ok(Event::Lost)),
            Some(_) if self.up.iter().all(|link| link.is_over) => Poll::Ready(Ok(Event::Over)),
            _ if moved => Poll::Ready(Ok(Event::Moved)),
            _ => Poll::Pending,
        }
    }

    /// Whether one has come, or will not.
    fn poll_coming(&mut self, context: &mut Context<'_>) -> Result<bool, Failure> {
        let mut at = 0;
        let before = self.coming.len();
        while at < self.coming.len() {
            let Poll::Ready(made) = Pin::new(&mut self.coming[at].0).poll(context) else {
                at += 1;
                continue;
            };
            self.coming.swap_remove(at);
            let stopped =
                |_| Failure::new(FailureCode::Cancelled, "the data connection was given up");
            match made.map_err(stopped).flatten() {
                Ok(mut link) => {
                    // It may have waited for its session, and the peer for its own.
                    link.reader.expect_life();
                    self.own_wire += 2 * PREAMBLE_LEN as u64;
                    self.up.push(link);
                    // Something may have come with the preamble.
                    self.take_in(self.up.len() - 1)?;
                }
                Err(failure) if self.up.is_empty() && self.coming.is_empty() => {
                    return Err(failure);
                }
                Err(_) => {}
            }
        }
        Ok(self.coming.len() < before)
    }

    /// Gives each link what it can use, the least busy first.
    fn feed(&mut self) {
        while let Some(link) = self.up.iter_mut().min_by_key(|link| link.writer.len())
            && link.writer.len() < ENOUGH
            && let Some(frame) = self.queue.pop_front()
        {
            if let Some((numbers, _)) = &mut self.numbered {
                let place = numbers.place();
                self.own_wire += place.wire_len() as u64;
                link.writer.push(&place);
            }
            link.writer.push(&frame);
        }
    }

    /// Whether something was written.
    fn poll_write(&mut self, context: &mut Context<'_>) -> bool {
        if self.lost.is_some() || self.is_early(context) {
            return false;
        }
        self.feed();
        let mut allowed = self.pace.open();
        let before = allowed;
        // By turns: under a limit the first of them could take all of it, time and again.
        self.turn = (self.turn + 1) % self.up.len().max(1);
        for at in 0..self.up.len() {
            if allowed == 0 {
                break;
            }
            let at = (self.turn + at) % self.up.len();
            match self.up[at].writer.poll_write(context, allowed) {
                Poll::Ready(Ok(written)) => allowed -= written,
                Poll::Ready(Err(error)) => {
                    let why = format!("writing to the peer: {error}");
                    self.lost.get_or_insert_with(|| Lost::now(at, why));
                }
                Poll::Pending => {}
            }
        }
        self.pace.took(before - allowed);
        allowed < before
    }

    /// Whether the limit on bytes a second says that it is too early to write.
    fn is_early(&mut self, context: &mut Context<'_>) -> bool {
        let ready = self.pace.ready();
        if ready <= Instant::now() {
            return false;
        }
        let nap = self.nap.get_or_insert_with(|| Box::pin(sleep_until(ready)));
        nap.as_mut().reset(ready);
        nap.as_mut().poll(context).is_pending()
    }

    /// Whether something was read.
    fn poll_read(&mut self, context: &mut Context<'_>) -> Result<bool, Failure> {
        let mut moved = false;
        for at in 0..self.up.len() {
            let link = &mut self.up[at];
            if link.is_over {
                continue;
            }
            let Poll::Ready(read) = link.reader.poll_fill(context) else {
                continue;
            };
            moved = true;
            if read? == 0 {
                link.reader.check_end()?;
                link.is_over = true;
                let why = "the data connection ended too early".to_owned();
                self.lost.get_or_insert_with(|| Lost::now(at, why));
                continue;
            }
            self.take_in(at)?;
        }
        Ok(moved)
    }

    /// Takes the frames that a link has read.
    fn take_in(&mut self, at: usize) -> Result<(), Failure> {
        while let Some(frame) = self.up[at].reader.buffered()? {
            self.arrive(at, frame)?;
        }
        Ok(())
    }

    fn arrive(&mut self, at: usize, frame: Frame) -> Result<(), Failure> {
        let Some((_, order)) = &mut self.numbered else {
            self.arrived.push_back(frame);
            return Ok(());
        };
        if matches!(frame.kind, FrameKind::Place | FrameKind::Beat) {
            self.own_wire += frame.wire_len() as u64;
        }
        order.take(u16::try_from(at).unwrap_or(u16::MAX), &frame)?;
        self.arrived
            .extend(std::iter::from_fn(|| order.next_frame()));
        Ok(())
    }
}

impl Lost {
    fn now(link: usize, why: String) -> Self {
        Self {
            link,
            why,
            since: Instant::now(),
        }
    }
}
