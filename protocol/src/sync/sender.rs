//! The source's half of a session.

use std::collections::VecDeque;

use bytes::Bytes;

use super::peer_blocks::{PeerBlocks, Piece};
use super::runs::{MapRun, RunKind, Runs};
use super::{
    CHANGE_COST, Compared, DATA_AHEAD, DIGEST_AHEAD, DiskDone, DiskOp, Expected, MAX_READS,
    MIN_DATA_AHEAD, Machine, Misbehaviour, Outcome, SyncError, Ticket, WINDOW, content_at,
    digest_count, small,
};
use crate::digest::{Content, DIGEST_LEN, Digest, Digester, RangeHasher, disk_root};
use crate::frame::{Frame, FrameKind};
use crate::message::{
    Agreed, Beat, Counters, Credit, Data, Digests, End, Holes, SessionParams, Settled, Stream,
    Zeros,
};
use crate::units::{BLOCK_SIZE, BlockRun, Geometry};

/// Walks the source in order, compares each window with what the receiver told of its own, and
/// ships what differs.
#[derive(Debug)]
pub struct Sender {
    params: SessionParams,
    geometry: Geometry,
    /// Bytes that may be under way without credit.
    ahead: u64,
    digester: Digester,
    /// The source's holes and data; its front is the next block to be planned.
    runs: Runs,
    /// What the receiver has, from the next block to be planned on.
    theirs: PeerBlocks,
    /// The first block that the receiver has not told of.
    heard: u64,
    /// Planned and not settled, in order of blocks.
    steps: VecDeque<Step>,
    /// Steps that hold a window in memory, or will.
    windows: usize,
    tickets: Ticket,
    mapping: Option<Ticket>,
    /// Blocks that are to become zero, not yet sent, so that neighbours travel as one run.
    zeros: Option<BlockRun>,
    hasher: Option<RangeHasher>,
    /// All blocks below are settled.
    position: u64,
    /// The receiver knows that all blocks below are settled.
    announced: u64,
    /// What was sent, and what the receiver has consumed, in the currency of credit.
    sent: u64,
    consumed: u64,
    counters: Counters,
    first_difference: Option<u64>,
    root: Option<Digest>,
    agreed: bool,
}

/// A run of blocks between planning and being settled.
#[derive(Debug)]
enum Step {
    /// Zeros on both sides.
    Equal { count: u64 },
    /// A hole here, data there.
    Zeroed { count: u64 },
    /// Being read.
    Reading { ticket: Ticket, run: BlockRun },
    /// Read; what is left of it.
    Read { blocks: VecDeque<Compared> },
}

impl Sender {
    /// A session as agreed. `geometry` is that of `params.size`.
    pub fn new(params: SessionParams, geometry: Geometry) -> Self {
        let digester = Digester::new(params.hash, params.seed);
        Self {
            params,
            geometry,
            ahead: DATA_AHEAD,
            digester,
            runs: Runs::new(geometry.block_count()),
            theirs: PeerBlocks::default(),
            heard: 0,
            steps: VecDeque::new(),
            windows: 0,
            tickets: Ticket(0),
            mapping: None,
            zeros: None,
            hasher: Some(RangeHasher::new(&digester, 0)),
            position: 0,
            announced: 0,
            sent: 0,
            consumed: 0,
            counters: Counters::default(),
            first_difference: None,
            root: None,
            agreed: false,
        }
    }

    /// Sends no more than so many bytes ahead of credit, between [`MIN_DATA_AHEAD`] and
    /// [`DATA_AHEAD`]: one of several sessions at once, which a receiver has to remember together.
    #[must_use]
    pub fn ahead(self, bytes: u64) -> Self {
        Self {
            ahead: bytes.clamp(MIN_DATA_AHEAD, DATA_AHEAD),
            ..self
        }
    }
}

impl Machine for Sender {
    fn handle_frame(&mut self, frame: &Frame) -> Result<(), SyncError> {
        self.counters.bytes_wire += frame.wire_len() as u64;
        let message = Stream::read(frame)?;
        if self.agreed && message != Stream::Beat(Beat {}) {
            return Err(Misbehaviour::AfterEnd(frame.kind).into());
        }
        match message {
            Stream::Beat(Beat {}) => Ok(()),
            Stream::Digests(Digests { first }) => self.on_digests(first, frame),
            Stream::Holes(Holes { run }) => {
                self.on_told(frame.kind, run)?;
                self.theirs.push_holes(run.count);
                Ok(())
            }
            Stream::Credit(Credit { consumed }) => self.on_credit(consumed),
            Stream::Agreed(Agreed { root }) => self.on_agreed(root),
            Stream::Place(_) => Err(Misbehaviour::Numbered.into()),
            Stream::Data(_) | Stream::Zeros(_) | Stream::Settled(_) | Stream::End(_) => {
                Err(Misbehaviour::WrongSide(frame.kind).into())
            }
        }
    }

    fn handle_disk(&mut self, ticket: Ticket, done: DiskDone) -> Result<(), SyncError> {
        match done {
            DiskDone::Mapped { runs, data_bytes } if self.mapping == Some(ticket) => {
                self.mapping = None;
                self.counters.bytes_data += data_bytes;
                self.runs.extend(&runs);
            }
            DiskDone::Compared(blocks) => {
                let step = self
                    .steps
                    .iter_mut()
                    .find(|step| matches!(step, Step::Reading { ticket: t, .. } if *t == ticket));
                if let Some(step) = step {
                    if let Step::Reading { run, .. } = step {
                        self.counters.bytes_read += self.geometry.byte_range(*run).1;
                        debug_assert_eq!(run.count, blocks.len() as u64);
                    }
                    *step = Step::Read {
                        blocks: blocks.into(),
                    };
                }
            }
            done => debug_assert!(false, "{done:?} answers nothing that a sender asked"),
        }
        Ok(())
    }

    fn poll_disk(&mut self) -> Option<(Ticket, DiskOp)> {
        if let Some(from) = self.runs.wanted() {
            let ticket = self.tickets.take();
            self.mapping = Some(ticket);
            return Some((ticket, DiskOp::Map { from }));
        }
        while self.windows < MAX_READS && self.steps.len() < 2 * MAP_STEPS {
            let own = self.runs.front()?;
            let theirs = self.take_theirs(own)?;
            match own.kind {
                RunKind::Hole => self.plan_hole(&theirs),
                RunKind::Data => return Some(self.plan_read(theirs)),
            }
        }
        None
    }

    fn poll_transmit(&mut self) -> Option<Frame> {
        let frame = self.next_frame()?;
        self.counters.bytes_wire += frame.wire_len() as u64;
        Some(frame)
    }

    fn outcome(&self) -> Option<Outcome> {
        let root = self.root.filter(|_| self.agreed)?;
        Some(Outcome {
            counters: self.counters,
            first_difference: self.first_difference,
            root,
        })
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn is_wire_bound(&self) -> bool {
        self.outstanding() >= self.ahead / 2
    }
}

impl Sender {
    /// What waits for credit.
    fn outstanding(&self) -> u64 {
        self.sent - self.consumed
    }

    fn on_digests(&mut self, first: u64, frame: &Frame) -> Result<(), SyncError> {
        let len = frame.payload.len();
        if len == 0 || !len.is_multiple_of(DIGEST_LEN) {
            return Err(Misbehaviour::BadPayload {
                kind: frame.kind,
                len,
            }
            .into());
        }
        self.on_told(
            frame.kind,
            BlockRun {
                first,
                count: digest_count(&frame.payload),
            },
        )?;
        // Copied: a slice would keep the whole buffer alive that it was read into.
        self.theirs
            .push_digests(Bytes::copy_from_slice(&frame.payload));
        if self.theirs.digests() > DIGEST_AHEAD {
            return Err(Misbehaviour::OverCredit(frame.kind).into());
        }
        Ok(())
    }

    /// The receiver told of `run`, which must be what comes next.
    fn on_told(&mut self, kind: FrameKind, run: BlockRun) -> Result<(), SyncError> {
        if !self.params.compare {
            return Err(Misbehaviour::NotInThisSession(kind).into());
        }
        if run.first != self.heard {
            let (expected, got) = (self.heard, run.first);
            return Err(Misbehaviour::OutOfOrder {
                kind,
                expected,
                got,
            }
            .into());
        }
        if !self.geometry.contains(run) {
            let (end, limit) = (run.end(), self.geometry.block_count());
            return Err(Misbehaviour::OutOfRange { kind, end, limit }.into());
        }
        self.heard = run.end();
        Ok(())
    }

    fn on_credit(&mut self, consumed: u64) -> Result<(), SyncError> {
        if consumed < self.consumed || consumed > self.sent {
            return Err(Misbehaviour::FalseCredit {
                consumed,
                sent: self.sent,
            }
            .into());
        }
        self.consumed = consumed;
        Ok(())
    }

    fn on_agreed(&mut self, root: Digest) -> Result<(), SyncError> {
        match self.root {
            None => Err(Misbehaviour::EarlyEnd {
                at: self.position,
                count: self.geometry.block_count(),
            }
            .into()),
            // Without shipping, the roots are equal exactly when nothing differed.
            Some(own) if (own == root) != (self.params.ship || self.first_difference.is_none()) => {
                Err(Misbehaviour::WrongRoot.into())
            }
            Some(_) => {
                self.agreed = true;
                Ok(())
            }
        }
    }

    /// What the receiver has for the next blocks, as many as fit one step beside `own`.
    fn take_theirs(&mut self, own: MapRun) -> Option<Piece> {
        let most = match own.kind {
            RunKind::Hole => own.count,
            RunKind::Data => own.count.min(WINDOW),
        };
        if self.params.compare {
            self.theirs.take(most)
        } else {
            Some(Piece::Holes(most))
        }
    }

    fn plan_hole(&mut self, theirs: &Piece) {
        self.runs.take(theirs.count());
        match theirs {
            Piece::Holes(count) => self.steps.push_back(Step::Equal { count: *count }),
            Piece::Digests(digests) => {
                for at in 0..digests.len() / DIGEST_LEN {
                    self.push_block_step(content_at(digests, at) == Content::Zero);
                }
            }
        }
    }

    /// One more block under a hole: merged with the step before where that is alike.
    fn push_block_step(&mut self, equal: bool) {
        match (self.steps.back_mut(), equal) {
            (Some(Step::Equal { count }), true) | (Some(Step::Zeroed { count }), false) => {
                *count += 1;
            }
            (_, true) => self.steps.push_back(Step::Equal { count: 1 }),
            (_, false) => self.steps.push_back(Step::Zeroed { count: 1 }),
        }
    }

    fn plan_read(&mut self, theirs: Piece) -> (Ticket, DiskOp) {
        let run = self.runs.take(theirs.count());
        let expected = match theirs {
            Piece::Holes(_) => Expected::Zeros,
            Piece::Digests(digests) => Expected::Digests(digests),
        };
        let ticket = self.tickets.take();
        self.windows += 1;
        self.steps.push_back(Step::Reading { ticket, run });
        (
            ticket,
            DiskOp::Compare {
                run,
                expected,
                ship: self.params.ship,
            },
        )
    }

    fn next_frame(&mut self) -> Option<Frame> {
        loop {
            // Zeros wait for their neighbours only while the next step is at hand.
            let Some(next) = self.next_settled() else {
                return self
                    .flush_zeros()
                    .or_else(|| self.announce())
                    .or_else(|| self.end());
            };
            match next {
                Next::Equal(content, count) => {
                    let hasher = self.hasher.as_mut()?;
                    match content {
                        Content::Zero => hasher.zeros(count),
                        Content::Digest(digest) => hasher.block(&digest),
                    }
                    self.settle(count);
                }
                Next::Zeroed(count) => {
                    self.hasher.as_mut()?.zeros(count);
                    if let Some(frame) = self.zero(count) {
                        return Some(frame);
                    }
                }
                Next::Changed(digest, data, payload) => {
                    self.hasher.as_mut()?.block(&digest);
                    if let Some(frame) = self.changed(&data, payload) {
                        return Some(frame);
                    }
                }
                Next::Flush => return self.flush_zeros(),
            }
        }
    }

    /// What comes next in order, if it is known and may be sent.
    fn next_settled(&mut self) -> Option<Next> {
        let blocked =
            self.params.ship && self.outstanding() + CHANGE_COST + BLOCK_SIZE > self.ahead;
        let next = match self.steps.front_mut()? {
            Step::Reading { .. } => return None,
            Step::Equal { count } => Next::Equal(Content::Zero, *count),
            Step::Zeroed { .. } if blocked => return None,
            Step::Zeroed { count } => Next::Zeroed(*count),
            Step::Read { blocks } => match blocks.front()? {
                Compared::Changed { .. } if self.params.ship && self.zeros.is_some() => {
                    return Some(Next::Flush);
                }
                Compared::Changed { .. } | Compared::Zeroed if blocked => return None,
                _ => match blocks.pop_front()? {
                    Compared::Equal(content) => Next::Equal(content, 1),
                    Compared::Zeroed => Next::Zeroed(1),
                    Compared::Changed {
                        digest,
                        encoding,
                        payload,
                    } => Next::Changed(
                        digest,
                        Data {
                            index: self.position,
                            encoding,
                        },
                        payload,
                    ),
                },
            },
        };
        self.drop_empty_step();
        Some(next)
    }

    fn drop_empty_step(&mut self) {
        match self.steps.front() {
            Some(Step::Equal { .. } | Step::Zeroed { .. }) => {
                self.steps.pop_front();
            }
            Some(Step::Read { blocks }) if blocks.is_empty() => {
                self.steps.pop_front();
                self.windows -= 1;
            }
            _ => {}
        }
    }

    fn settle(&mut self, count: u64) {
        self.position += count;
        self.counters.blocks_settled = self.position;
    }

    /// Counts blocks from the position on as different.
    fn differ(&mut self, count: u64) {
        self.first_difference.get_or_insert(self.position);
        let run = BlockRun {
            first: self.position,
            count,
        };
        self.counters.bytes_changed += self.geometry.byte_range(run).1;
    }

    /// The next `count` blocks become zero: joined to the run before, or that run's frame.
    fn zero(&mut self, count: u64) -> Option<Frame> {
        self.differ(count);
        self.counters.blocks_zeroed += count;
        let first = self.position;
        self.settle(count);
        if !self.params.ship {
            return None;
        }
        match &mut self.zeros {
            Some(run) if run.end() == first => {
                run.count += count;
                None
            }
            zeros => {
                self.sent += CHANGE_COST;
                let before = zeros.replace(BlockRun { first, count });
                before.map(|run| self.zeros_frame(run))
            }
        }
    }

    fn flush_zeros(&mut self) -> Option<Frame> {
        let run = self.zeros.take()?;
        Some(self.zeros_frame(run))
    }

    fn zeros_frame(&mut self, run: BlockRun) -> Frame {
        self.announced = run.end();
        small(&Zeros { run })
    }

    fn changed(&mut self, data: &Data, payload: Bytes) -> Option<Frame> {
        self.differ(1);
        self.counters.blocks_changed += 1;
        self.settle(1);
        if !self.params.ship {
            return None;
        }
        self.announced = self.position;
        self.sent += CHANGE_COST + payload.len() as u64;
        Some(Frame {
            payload,
            ..small(data)
        })
    }

    fn announce(&mut self) -> Option<Frame> {
        let news = self.position > self.announced;
        self.announced = self.position;
        news.then(|| {
            small(&Settled {
                next: self.position,
            })
        })
    }

    fn end(&mut self) -> Option<Frame> {
        if self.position < self.geometry.block_count() || self.root.is_some() {
            return None;
        }
        debug_assert!(self.runs.all_taken() && self.steps.is_empty());
        let range = self.hasher.take()?.finish();
        let root = disk_root(&self.digester, self.geometry, &[range]);
        self.root = Some(root);
        Some(small(&End { root }))
    }
}

/// The most steps that holes may add: each is a few words, and they come as fast as a map does.
const MAP_STEPS: usize = 4096;

/// What [`Sender::next_settled`] took off the front.
enum Next {
    Equal(Content, u64),
    Zeroed(u64),
    Changed(Digest, Data, Bytes),
    /// Zeros that came before must be sent first.
    Flush,
}
