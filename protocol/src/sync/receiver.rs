//! The destination's half of a session.

use std::collections::VecDeque;

use bytes::Bytes;

use super::peer_blocks::{PeerBlocks, Piece};
use super::runs::{RunKind, Runs};
use super::{
    CHANGE_COST, DATA_AHEAD, DIGEST_AHEAD, DiskDone, DiskOp, MAX_READS, MAX_WRITES, Machine,
    Misbehaviour, Outcome, SyncError, Ticket, WINDOW, WRITE_BATCH, WriteBlock, content_at,
    digest_count, own, payload_fits, small,
};
use crate::digest::{Content, DIGEST_LEN, Digest, Digester, RangeHasher, disk_root};
use crate::frame::{Frame, FrameKind};
use crate::message::{
    Agreed, Beat, Counters, Credit, Data, Digests, End, Holes, SessionParams, Settled, Stream,
    Zeros,
};
use crate::units::{BlockRun, Geometry};

/// Credit is told once this much has been consumed: 1 MiB, a small part of the window, so that the
/// sender does not run dry while a credit is on its way.
const CREDIT_STEP: u64 = DATA_AHEAD / 16;

/// Changes that wait for the disk while more of it is still digested: as many as the digests that
/// may be ahead, so that trims, which come out of digests and cost no credit, are bounded too.
const MAX_APPLIES: usize = 16 * 1024;

/// Tells the sender what the destination holds, as far ahead as its window allows, and applies
/// what comes back.
#[derive(Debug)]
pub struct Receiver {
    params: SessionParams,
    geometry: Geometry,
    digester: Digester,
    tickets: Ticket,
    mapping: Option<Ticket>,
    /// The destination's holes and data; its front is the next block to be digested.
    runs: Runs,
    /// Planned and not yet told to the sender, in order of blocks.
    scans: VecDeque<Scan>,
    reads: usize,
    /// Blocks whose digests are being made, or are kept: until they are settled and have gone
    /// into the root.
    ahead: u64,
    /// The first block that the sender has not been told of.
    told: u64,
    /// What was told and is not settled.
    unsettled: PeerBlocks,
    /// All blocks below are settled.
    next: u64,
    applies: VecDeque<Apply>,
    writing: Vec<Writing>,
    /// Contents of settled blocks that wait for the digests of blocks before them.
    rooting: VecDeque<Rooting>,
    /// The slot of the front of `rooting`.
    first_slot: u64,
    hasher: Option<RangeHasher>,
    /// What came, what has been applied of it, and what the sender knows of that, in the currency
    /// of credit.
    received: u64,
    consumed: u64,
    credited: u64,
    counters: Counters,
    their_root: Option<Digest>,
    root: Option<Digest>,
    agreement_sent: bool,
}

/// A run of blocks between planning and being told.
#[derive(Debug)]
enum Scan {
    Holes(u64),
    Reading { ticket: Ticket, run: BlockRun },
    Read(Bytes),
}

/// A change that waits for its operation.
#[derive(Debug)]
enum Apply {
    Block(WriteBlock),
    Zero(BlockRun),
    Trim(BlockRun),
}

/// A change that is being applied.
#[derive(Debug)]
struct Writing {
    ticket: Ticket,
    /// The blocks' places in the order of the root.
    slots: Vec<u64>,
    /// The credit that it gives back.
    cost: u64,
}

/// The contents of settled blocks, in order.
#[derive(Debug)]
enum Rooting {
    Zeros(u64),
    Digests(Bytes),
    Written(Option<Content>),
}

impl Receiver {
    /// A session as agreed. `geometry` is that of `params.size`.
    pub fn new(params: SessionParams, geometry: Geometry) -> Self {
        let digester = Digester::new(params.hash, params.seed);
        // Without a comparison there is nothing to map, read or tell.
        let scanned = if params.compare {
            geometry.block_count()
        } else {
            0
        };
        Self {
            params,
            geometry,
            digester,
            tickets: Ticket(0),
            mapping: None,
            runs: Runs::new(scanned),
            scans: VecDeque::new(),
            reads: 0,
            ahead: 0,
            told: 0,
            unsettled: PeerBlocks::default(),
            next: 0,
            applies: VecDeque::new(),
            writing: Vec::new(),
            rooting: VecDeque::new(),
            first_slot: 0,
            hasher: Some(RangeHasher::new(&digester, 0)),
            received: 0,
            consumed: 0,
            credited: 0,
            counters: Counters::default(),
            their_root: None,
            root: None,
            agreement_sent: false,
        }
    }
}

impl Machine for Receiver {
    fn handle_frame(&mut self, frame: &Frame) -> Result<(), SyncError> {
        self.counters.bytes_wire += frame.wire_len() as u64;
        let message = Stream::read(frame)?;
        if self.their_root.is_some() && message != Stream::Beat(Beat {}) {
            return Err(Misbehaviour::AfterEnd(frame.kind).into());
        }
        match message {
            Stream::Beat(Beat {}) => Ok(()),
            Stream::Data(data) => self.on_data(&data, frame),
            Stream::Zeros(Zeros { run }) => self.on_zeros(run),
            Stream::Settled(Settled { next }) => {
                self.check_reach(
                    frame.kind,
                    BlockRun {
                        first: self.next,
                        count: 0,
                    },
                    next,
                )?;
                self.settle_equal(next);
                Ok(())
            }
            Stream::End(End { root }) => self.on_end(root),
            Stream::Place(_) => Err(Misbehaviour::Numbered.into()),
            Stream::Digests(_) | Stream::Holes(_) | Stream::Credit(_) | Stream::Agreed(_) => {
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
            DiskDone::Digested(digests) => self.digested(ticket, digests),
            DiskDone::Written(contents) => self.written(ticket, contents),
            DiskDone::Zeroed => self.written(ticket, Vec::new()),
            done => debug_assert!(false, "{done:?} answers nothing that a receiver asked"),
        }
        self.finish()
    }

    fn poll_disk(&mut self) -> Option<(Ticket, DiskOp)> {
        // Writes first: they free memory.
        self.plan_write().or_else(|| self.plan_scan())
    }

    fn poll_transmit(&mut self) -> Option<Frame> {
        let frame = self
            .credit()
            .or_else(|| self.tell())
            .or_else(|| self.agree())?;
        self.counters.bytes_wire += frame.wire_len() as u64;
        Some(frame)
    }

    fn outcome(&self) -> Option<Outcome> {
        let root = self.root.filter(|_| self.agreement_sent)?;
        Some(Outcome {
            counters: self.counters,
            first_difference: None,
            root,
        })
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn is_wire_bound(&self) -> bool {
        false
    }
}

impl Receiver {
    fn on_data(&mut self, data: &Data, frame: &Frame) -> Result<(), SyncError> {
        let kind = frame.kind;
        let run = BlockRun {
            first: data.index,
            count: 1,
        };
        self.check_change(kind, run)?;
        let len = frame.payload.len();
        if !payload_fits(data.encoding, len, self.geometry.block_len(data.index)) {
            return Err(Misbehaviour::BadPayload { kind, len }.into());
        }
        self.charge(kind, len as u64)?;
        self.settle_equal(data.index);
        self.settle_changed(run);
        self.rooting.push_back(Rooting::Written(None));
        let slot = self.first_slot + self.rooting.len() as u64 - 1;
        self.applies.push_back(Apply::Block(WriteBlock {
            index: data.index,
            encoding: data.encoding,
            payload: own(&frame.payload),
            slot,
        }));
        self.counters.blocks_changed += 1;
        Ok(())
    }

    fn on_zeros(&mut self, run: BlockRun) -> Result<(), SyncError> {
        self.check_change(FrameKind::Zeros, run)?;
        self.charge(FrameKind::Zeros, 0)?;
        self.settle_equal(run.first);
        self.settle_changed(run);
        self.root_next(Rooting::Zeros(run.count));
        self.applies.push_back(Apply::Zero(run));
        self.counters.blocks_zeroed += run.count;
        Ok(())
    }

    fn charge(&mut self, kind: FrameKind, payload: u64) -> Result<(), SyncError> {
        self.received += CHANGE_COST + payload;
        if self.received - self.consumed > DATA_AHEAD {
            return Err(Misbehaviour::OverCredit(kind).into());
        }
        Ok(())
    }

    fn on_end(&mut self, root: Digest) -> Result<(), SyncError> {
        if self.next < self.geometry.block_count() {
            let (at, count) = (self.next, self.geometry.block_count());
            return Err(Misbehaviour::EarlyEnd { at, count }.into());
        }
        self.their_root = Some(root);
        self.finish()
    }

    fn check_change(&self, kind: FrameKind, run: BlockRun) -> Result<(), SyncError> {
        if !self.params.ship {
            return Err(Misbehaviour::NotInThisSession(kind).into());
        }
        if run.count == 0 {
            return Err(Misbehaviour::OutOfRange {
                kind,
                end: run.first,
                limit: run.first,
            }
            .into());
        }
        self.check_reach(kind, run, run.end())
    }

    /// `run` must not lie before what is settled, nor beyond the disk or what was told.
    fn check_reach(&self, kind: FrameKind, run: BlockRun, end: u64) -> Result<(), SyncError> {
        let limit = if self.params.compare {
            self.told
        } else {
            self.geometry.block_count()
        };
        if run.first < self.next || end < self.next {
            let (expected, got) = (self.next, run.first.min(end));
            return Err(Misbehaviour::OutOfOrder {
                kind,
                expected,
                got,
            }
            .into());
        }
        if end > limit {
            return Err(Misbehaviour::OutOfRange { kind, end, limit }.into());
        }
        Ok(())
    }

    /// All blocks up to `end` stay as they are.
    fn settle_equal(&mut self, end: u64) {
        while self.next < end {
            let piece = self.take_unsettled(end - self.next);
            let count = piece.count();
            match piece {
                Piece::Holes(count) => self.root_next(Rooting::Zeros(count)),
                Piece::Digests(digests) => {
                    self.trim_zeros(&digests);
                    self.root_next(Rooting::Digests(digests));
                }
            }
            self.next += count;
        }
        self.counters.blocks_settled = self.next;
    }

    /// The blocks of `run`, which come next, get new contents.
    fn settle_changed(&mut self, run: BlockRun) {
        let (_, bytes) = self.geometry.byte_range(run);
        self.counters.bytes_changed += bytes;
        while self.next < run.end() {
            let piece = self.take_unsettled(run.end() - self.next);
            if let Piece::Digests(_) = &piece {
                self.ahead -= piece.count();
            }
            self.next += piece.count();
        }
        self.counters.blocks_settled = self.next;
    }

    /// Blocks that were told, or that are known to be zero when nothing is told.
    fn take_unsettled(&mut self, most: u64) -> Piece {
        if !self.params.compare {
            return Piece::Holes(most);
        }
        self.unsettled
            .take(most)
            .expect("check_reach: all of these were told")
    }

    /// Zero blocks that were read, and so occupy space, give it back.
    fn trim_zeros(&mut self, digests: &[u8]) {
        if !self.params.ship {
            return;
        }
        for at in 0..digests.len() / DIGEST_LEN {
            if content_at(digests, at) != Content::Zero {
                continue;
            }
            let first = self.next + at as u64;
            match self.applies.back_mut() {
                Some(Apply::Trim(run)) if run.end() == first => run.count += 1,
                _ => self
                    .applies
                    .push_back(Apply::Trim(BlockRun { first, count: 1 })),
            }
        }
    }

    /// The next blocks in the order of the root: hashed at once if nothing before them waits.
    fn root_next(&mut self, item: Rooting) {
        match (self.rooting.back_mut(), item) {
            // Merged, so that the queue is bounded by its digests and blocks alone.
            (Some(Rooting::Zeros(last)), Rooting::Zeros(count)) => *last += count,
            (_, item) => self.rooting.push_back(item),
        }
        self.hash_ready();
    }

    fn hash_ready(&mut self) {
        let Some(hasher) = &mut self.hasher else {
            return;
        };
        loop {
            match self.rooting.front() {
                None | Some(Rooting::Written(None)) => return,
                Some(Rooting::Zeros(count)) => hasher.zeros(*count),
                Some(Rooting::Written(Some(content))) => hasher.content(content),
                Some(Rooting::Digests(digests)) => {
                    for at in 0..digests.len() / DIGEST_LEN {
                        hasher.content(&content_at(digests, at));
                    }
                    self.ahead -= digest_count(digests);
                }
            }
            self.rooting.pop_front();
            self.first_slot += 1;
        }
    }

    fn digested(&mut self, ticket: Ticket, digests: Bytes) {
        let scan = self
            .scans
            .iter_mut()
            .find(|scan| matches!(scan, Scan::Reading { ticket: t, .. } if *t == ticket));
        let Some(scan) = scan else { return };
        if let Scan::Reading { run, .. } = scan {
            self.counters.bytes_read += self.geometry.byte_range(*run).1;
        }
        *scan = Scan::Read(digests);
        self.reads -= 1;
    }

    fn written(&mut self, ticket: Ticket, contents: Vec<Content>) {
        let Some(at) = self.writing.iter().position(|w| w.ticket == ticket) else {
            return;
        };
        let done = self.writing.swap_remove(at);
        self.consumed += done.cost;
        for (slot, content) in done.slots.into_iter().zip(contents) {
            let at = usize::try_from(slot - self.first_slot).expect("a place in a queue");
            self.rooting[at] = Rooting::Written(Some(content));
        }
        self.hash_ready();
    }

    fn plan_write(&mut self) -> Option<(Ticket, DiskOp)> {
        if self.writing.len() >= MAX_WRITES {
            return None;
        }
        let (slots, cost, op) = match self.applies.pop_front()? {
            Apply::Zero(run) => (Vec::new(), CHANGE_COST, DiskOp::Zero { run }),
            Apply::Trim(run) => (Vec::new(), 0, DiskOp::Trim { run }),
            Apply::Block(block) => {
                let mut blocks = vec![block];
                while blocks.len() < WRITE_BATCH
                    && let Some(Apply::Block(_)) = self.applies.front()
                    && let Some(Apply::Block(block)) = self.applies.pop_front()
                {
                    blocks.push(block);
                }
                let costs = blocks.iter().map(|b| CHANGE_COST + b.payload.len() as u64);
                let (slots, cost) = (blocks.iter().map(|b| b.slot).collect(), costs.sum());
                (slots, cost, DiskOp::Write { blocks })
            }
        };
        let ticket = self.tickets.take();
        self.writing.push(Writing {
            ticket,
            slots,
            cost,
        });
        Some((ticket, op))
    }

    fn plan_scan(&mut self) -> Option<(Ticket, DiskOp)> {
        if let Some(from) = self.runs.wanted() {
            let ticket = self.tickets.take();
            self.mapping = Some(ticket);
            return Some((ticket, DiskOp::Map { from }));
        }
        loop {
            let own = self.runs.front()?;
            if own.kind == RunKind::Hole {
                self.runs.take(own.count);
                self.scans.push_back(Scan::Holes(own.count));
                continue;
            }
            let count = own.count.min(WINDOW);
            if self.reads >= MAX_READS
                || self.ahead + count > DIGEST_AHEAD
                || self.applies.len() >= MAX_APPLIES
            {
                return None;
            }
            let run = self.runs.take(count);
            let ticket = self.tickets.take();
            self.reads += 1;
            self.ahead += count;
            self.scans.push_back(Scan::Reading { ticket, run });
            return Some((ticket, DiskOp::Digest { run }));
        }
    }

    fn credit(&mut self) -> Option<Frame> {
        if self.consumed - self.credited < CREDIT_STEP {
            return None;
        }
        self.credited = self.consumed;
        Some(small(&Credit {
            consumed: self.consumed,
        }))
    }

    /// Tells the sender of the next blocks that are known.
    fn tell(&mut self) -> Option<Frame> {
        let scan = self
            .scans
            .pop_front_if(|scan| !matches!(scan, Scan::Reading { .. }))?;
        let first = self.told;
        match scan {
            Scan::Reading { .. } => None,
            Scan::Holes(count) => {
                self.unsettled.push_holes(count);
                self.told += count;
                Some(small(&Holes {
                    run: BlockRun { first, count },
                }))
            }
            Scan::Read(digests) => {
                self.told += (digests.len() / DIGEST_LEN) as u64;
                self.unsettled.push_digests(digests.clone());
                Some(Frame {
                    payload: digests,
                    ..small(&Digests { first })
                })
            }
        }
    }

    fn agree(&mut self) -> Option<Frame> {
        let root = self.root.filter(|_| !self.agreement_sent)?;
        self.agreement_sent = true;
        Some(small(&Agreed { root }))
    }

    /// Compares the roots once the end has been announced and everything is applied.
    fn finish(&mut self) -> Result<(), SyncError> {
        let Some(theirs) = self.their_root else {
            return Ok(());
        };
        if self.root.is_some() || !self.applies.is_empty() || !self.writing.is_empty() {
            return Ok(());
        }
        debug_assert!(self.rooting.is_empty(), "all is written, so all is hashed");
        let Some(hasher) = self.hasher.take() else {
            return Ok(());
        };
        let root = disk_root(&self.digester, self.geometry, &[hasher.finish()]);
        if self.params.ship && root != theirs {
            return Err(SyncError::RootMismatch);
        }
        self.root = Some(root);
        Ok(())
    }
}
