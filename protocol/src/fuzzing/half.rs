//! One machine, driven as `sync` says, and watched from outside: what it asks of its disk, what it
//! sends, and what it makes of what it hears must keep to the limits of a session, whatever the
//! peer does.

use std::collections::VecDeque;

use super::disk::{Disk, answer};
use crate::digest::{DIGEST_LEN, Digest};
use crate::frame::Frame;
use crate::message::{Encoding, Role, SessionParams, Stream};
use crate::sync::{
    CHANGE_COST, DATA_AHEAD, DIGEST_AHEAD, DiskOp, Expected, MAX_READS, MAX_WRITES, Machine,
    Receiver, Sender, SyncError, Ticket, WINDOW, WRITE_BATCH, WriteBlock,
};
use crate::units::{BlockRun, Geometry};

/// A machine, what it has under way, and what an onlooker knows of its session.
#[derive(Debug)]
pub(super) struct Half {
    role: Role,
    params: SessionParams,
    geometry: Geometry,
    pub(super) machine: Box<dyn Machine>,
    pub(super) ops: Vec<(Ticket, DiskOp)>,
    /// What was read or digested and is not settled.
    reads: Ahead,
    /// All blocks below have been told to the sender, or have been changed or declared settled.
    pub(super) told: u64,
    pub(super) passed: u64,
    /// In the currency of credit: changes that travelled, that were applied, and that the sender
    /// knows to be applied.
    pub(super) spent: u64,
    applied: u64,
    credited: u64,
    /// What the sender gave as its root, after which it says nothing of blocks.
    ended: Option<Digest>,
    /// The last frame that the machine sent.
    pub(super) last: Option<Frame>,
}

impl Half {
    pub(super) fn new(role: Role, params: SessionParams, geometry: Geometry) -> Self {
        let machine: Box<dyn Machine> = match role {
            Role::Sender => Box::new(Sender::new(params, geometry)),
            Role::Receiver => Box::new(Receiver::new(params, geometry)),
        };
        let mut half = Self {
            role,
            params,
            geometry,
            machine,
            ops: Vec::new(),
            reads: Ahead::default(),
            told: 0,
            passed: 0,
            spent: 0,
            applied: 0,
            credited: 0,
            ended: None,
            last: None,
        };
        half.poll_disk();
        half
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(super) fn hear(&mut self, frame: &Frame) -> Result<(), SyncError> {
        self.machine.handle_frame(frame)?;
        self.watch_frame(frame);
        self.poll_disk();
        Ok(())
    }

    pub(super) fn transmit(&mut self) -> Option<Frame> {
        let frame = self.machine.poll_transmit()?;
        self.watch_frame(&frame);
        self.last = Some(frame.clone());
        self.poll_disk();
        Some(frame)
    }

    /// Carries out the operation at place `at`.
    pub(super) fn finish(&mut self, at: usize, disk: &mut impl Disk) -> Result<(), SyncError> {
        let (ticket, op) = self.ops.remove(at);
        let done = answer(disk, &op);
        self.applied += cost_of(&op);
        self.machine.handle_disk(ticket, done)?;
        self.poll_disk();
        Ok(())
    }

    fn poll_disk(&mut self) {
        while let Some((ticket, op)) = self.machine.poll_disk() {
            self.watch_op(&op);
            self.ops.push((ticket, op));
        }
        let count = |sort: fn(&DiskOp) -> bool| self.ops.iter().filter(|(_, op)| sort(op)).count();
        assert!(count(is_map) <= 1, "{:?}", self.ops);
        assert!(count(is_read) <= MAX_READS, "{:?}", self.ops);
        assert!(count(is_change) <= MAX_WRITES, "{:?}", self.ops);
        self.watch_memory();
    }

    /// An operation lies within the session, is one of this side, and disturbs no other.
    fn watch_op(&mut self, op: &DiskOp) {
        let SessionParams { compare, ship, .. } = self.params;
        let fits = match op {
            DiskOp::Map { from } => *from < self.geometry.block_count(),
            DiskOp::Compare {
                run,
                expected,
                ship: shipped,
            } => {
                self.reads.push(*run);
                let known = match expected {
                    Expected::Zeros => true,
                    Expected::Digests(row) => row.len() as u64 == run.count * DIGEST_LEN as u64,
                };
                self.role == Role::Sender && known && *shipped == ship && run.count <= WINDOW
            }
            DiskOp::Digest { run } => {
                self.reads.push(*run);
                self.role == Role::Receiver && compare && run.count <= WINDOW
            }
            DiskOp::Write { blocks } => {
                let fits = blocks.iter().all(|block| self.payload_fits(block));
                self.role == Role::Receiver && ship && fits && blocks.len() <= WRITE_BATCH
            }
            DiskOp::Zero { .. } => self.role == Role::Receiver && ship,
            DiskOp::Trim { .. } => self.role == Role::Receiver && ship && compare,
        };
        assert!(fits, "{op:?} in {:?}", self.params);
        for run in blocks_of(op) {
            assert!(self.geometry.contains(run), "{op:?} is not on the disk");
            let mut others = self.ops.iter().flat_map(|(_, op)| blocks_of(op));
            assert!(
                others.all(|other| run.end() <= other.first || other.end() <= run.first),
                "{op:?} runs beside {:?}",
                self.ops
            );
        }
    }

    fn payload_fits(&self, block: &WriteBlock) -> bool {
        let len = self.geometry.block_len(block.index);
        match block.encoding {
            Encoding::Raw => block.payload.len() == len,
            Encoding::Zstd => (1..len).contains(&block.payload.len()),
        }
    }

    /// A frame that was sent, or heard and taken for good. Kinds that say nothing of blocks or of
    /// credit pass.
    fn watch_frame(&mut self, frame: &Frame) {
        match Stream::read(frame).expect("what was sent or accepted can be read") {
            Stream::Digests(digests) => {
                let len = frame.payload.len();
                assert!(len.is_multiple_of(DIGEST_LEN));
                let count = (len / DIGEST_LEN) as u64;
                self.tell(BlockRun {
                    first: digests.first,
                    count,
                });
            }
            Stream::Holes(holes) => self.tell(holes.run),
            Stream::Data(data) => {
                self.spent += CHANGE_COST + frame.payload.len() as u64;
                let (first, count) = (data.index, 1);
                self.change(BlockRun { first, count });
            }
            Stream::Zeros(zeros) => {
                self.spent += CHANGE_COST;
                self.change(zeros.run);
            }
            Stream::Settled(settled) => self.pass(settled.next),
            Stream::Credit(credit) => {
                assert!(credit.consumed >= self.credited);
                self.credited = credit.consumed;
            }
            Stream::End(end) => {
                assert_eq!(self.passed, self.geometry.block_count());
                assert_eq!(self.ended, None);
                self.ended = Some(end.root);
            }
            Stream::Agreed(agreed) => {
                let known = self.ended.expect("agreement comes after the end");
                assert!(agreed.root == known || !self.params.ship);
                assert!(self.applied == self.spent || self.role == Role::Sender);
            }
            _ => {}
        }
    }

    /// The receiver told of blocks: all of them, in order.
    fn tell(&mut self, run: BlockRun) {
        assert!(self.params.compare && self.geometry.contains(run));
        assert_eq!(run.first, self.told);
        self.told = run.end();
    }

    /// The sender ships blocks: each once, in order, and none that was not told.
    fn change(&mut self, run: BlockRun) {
        assert!(self.params.ship && run.count > 0 && run.first >= self.passed);
        self.pass(run.end());
    }

    fn pass(&mut self, next: u64) {
        let limit = if self.params.compare {
            self.told
        } else {
            self.geometry.block_count()
        };
        assert_eq!(self.ended, None);
        assert!((self.passed..=limit).contains(&next), "{next} of {limit}");
        self.passed = next;
    }

    fn watch_memory(&mut self) {
        // Credit may be given for zeros that are about to be sent, so it may be ahead.
        let waiting = match self.role {
            Role::Sender => self.spent.saturating_sub(self.credited),
            Role::Receiver => {
                assert!(self.credited <= self.applied && self.applied <= self.spent);
                self.spent - self.applied
            }
        };
        assert!(waiting <= DATA_AHEAD, "{waiting} without credit");
        let settled = self.machine.counters().blocks_settled;
        assert!(settled <= self.geometry.block_count());
        let most = match self.role {
            Role::Sender => MAX_READS as u64 * WINDOW,
            Role::Receiver => DIGEST_AHEAD,
        };
        let ahead = self.reads.unsettled(settled);
        assert!(ahead <= most, "{ahead} blocks read and not settled");
        assert!(!self.machine.is_wire_bound() || self.params.ship);
    }
}

fn is_map(op: &DiskOp) -> bool {
    matches!(op, DiskOp::Map { .. })
}

fn is_read(op: &DiskOp) -> bool {
    matches!(op, DiskOp::Compare { .. } | DiskOp::Digest { .. })
}

fn is_change(op: &DiskOp) -> bool {
    !is_map(op) && !is_read(op)
}

/// The credit that an operation gives back.
fn cost_of(op: &DiskOp) -> u64 {
    match op {
        DiskOp::Write { blocks } => {
            let costs = blocks.iter().map(|b| CHANGE_COST + b.payload.len() as u64);
            costs.sum()
        }
        DiskOp::Zero { .. } => CHANGE_COST,
        _ => 0,
    }
}

fn blocks_of(op: &DiskOp) -> impl Iterator<Item = BlockRun> {
    let (run, blocks) = match op {
        DiskOp::Map { .. } => (None, &[][..]),
        DiskOp::Compare { run, .. }
        | DiskOp::Digest { run }
        | DiskOp::Zero { run }
        | DiskOp::Trim { run } => (Some(*run), &[][..]),
        DiskOp::Write { blocks } => (None, &blocks[..]),
    };
    let one = |block: &WriteBlock| BlockRun {
        first: block.index,
        count: 1,
    };
    run.into_iter().chain(blocks.iter().map(one))
}

/// Runs in order of blocks, of which the first become settled.
#[derive(Debug, Default)]
struct Ahead {
    runs: VecDeque<BlockRun>,
    blocks: u64,
}

impl Ahead {
    fn push(&mut self, run: BlockRun) {
        self.runs.push_back(run);
        self.blocks += run.count;
    }

    /// How many blocks are not below `settled`.
    fn unsettled(&mut self, settled: u64) -> u64 {
        while let Some(front) = self.runs.front_mut() {
            let gone = settled.saturating_sub(front.first).min(front.count);
            self.blocks -= gone;
            front.first += gone;
            front.count -= gone;
            if front.count > 0 {
                break;
            }
            self.runs.pop_front();
        }
        self.blocks
    }
}
