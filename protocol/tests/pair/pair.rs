//! Two machines, two disks and the pipes between them, driven one small step at a time.

use std::collections::VecDeque;
use std::fmt;

use bytes::{Buf, BytesMut};
use kvm_clone_protocol::frame::{self, Frame, FrameKind};
use kvm_clone_protocol::message::{SessionParams, Stream};
use kvm_clone_protocol::sync::{
    CHANGE_COST, DATA_AHEAD, DIGEST_AHEAD, DiskDone, DiskOp, MAX_READS, MAX_WRITES, Machine,
    Outcome, Receiver, Sender, Ticket, WINDOW,
};
use kvm_clone_protocol::units::BlockRun;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::disk::FakeDisk;

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Sender,
    Receiver,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Sender => Self::Receiver,
            Self::Receiver => Self::Sender,
        }
    }
}

/// What happened in a step, for the trace of a failure.
#[derive(Debug, Clone, Copy)]
#[expect(dead_code, reason = "the fields are printed")]
enum Step {
    Session(SessionParams),
    Deliver { to: Side, bytes: usize },
    Finish { side: Side, ticket: Ticket },
    Stall { to: Side, steps: u32 },
    Fail { side: Side, ticket: Ticket },
    Cut,
}

/// The last steps, printed when a test fails.
#[derive(Default)]
pub(crate) struct Trace {
    /// `None`: nothing is printed.
    title: Option<String>,
    steps: VecDeque<Step>,
    taken: u64,
}

impl Trace {
    pub(crate) fn new(title: impl fmt::Display) -> Self {
        let mut trace = Self::default();
        trace.title = Some(title.to_string());
        trace
    }

    fn push(&mut self, step: Step) {
        self.taken += 1;
        if self.steps.len() == 100 {
            self.steps.pop_front();
        }
        self.steps.push_back(step);
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if let Some(title) = &self.title
            && std::thread::panicking()
        {
            eprintln!("{title}, step {}, the last steps:", self.taken);
            for step in &self.steps {
                eprintln!("  {step:?}");
            }
        }
    }
}

/// How a session is to be disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection is cut, and what is in flight is lost.
    Cut,
    /// A disk operation fails.
    FailOp,
}

/// What a session is played with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Schedule {
    pub(crate) seed: u64,
    /// How likely each is in comparison: to deliver to the sender and to the receiver, to finish
    /// an operation of the sender and of the receiver.
    pub(crate) weights: [u32; 4],
    /// Bytes that a pipe holds before its writer has to wait.
    pub(crate) pipe: usize,
    /// What the sender is held to, ahead of credit.
    pub(crate) ahead: u64,
    /// Of a thousand steps, so many begin a stall of one direction.
    pub(crate) stalls: u32,
    /// A fault after so many steps.
    pub(crate) fault: Option<(u32, Fault)>,
    /// More steps than this are a session that does not end.
    pub(crate) max_steps: u32,
}

impl Schedule {
    /// Nothing goes wrong, and nothing is slow.
    pub(crate) fn calm(seed: u64) -> Self {
        Self {
            seed,
            weights: [1; 4],
            pipe: 256 * 1024,
            ahead: DATA_AHEAD,
            stalls: 0,
            fault: None,
            max_steps: 1_000_000,
        }
    }
}

/// One end: machine, disk, and what is under way.
struct Half {
    machine: Box<dyn Machine>,
    ops: Vec<(Ticket, DiskOp)>,
    /// On its way to this end.
    pipe: BytesMut,
    /// Arrived, and not yet a frame.
    input: BytesMut,
    stalled: u32,
}

impl Half {
    fn new(machine: impl Machine + 'static) -> Self {
        Self {
            machine: Box::new(machine),
            ops: Vec::new(),
            pipe: BytesMut::new(),
            input: BytesMut::new(),
            stalled: 0,
        }
    }
}

/// What went over the wire and to the disks, as an onlooker sees it.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) steps: u32,
    pub(crate) wire: u64,
    pub(crate) data_frames: u64,
    /// Payload of `Data`.
    pub(crate) payload: u64,
    /// Credit that was spent on the wire, that was given back by the receiver's disk, and that
    /// the sender knows to have back.
    spent: u64,
    applied: u64,
    credited: u64,
    /// Runs that the sender read, and the receiver digested, that are not settled.
    compared: Ahead,
    digested: Ahead,
    /// The most credit that was spent and not given back, and the most blocks that were digested
    /// ahead.
    pub(crate) peak_spent: u64,
    pub(crate) peak_digested: u64,
}

/// A session in progress.
pub(crate) struct Pair<'a> {
    sender: Half,
    receiver: Half,
    source: &'a mut FakeDisk,
    destination: &'a mut FakeDisk,
    schedule: Schedule,
    rng: SmallRng,
    trace: &'a mut Trace,
    tally: Tally,
}

/// A session that ended well.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) sender: Outcome,
    pub(crate) receiver: Outcome,
    pub(crate) tally: Tally,
}

impl<'a> Pair<'a> {
    pub(crate) fn new(
        params: SessionParams,
        source: &'a mut FakeDisk,
        destination: &'a mut FakeDisk,
        schedule: Schedule,
        trace: &'a mut Trace,
    ) -> Self {
        let geometry = source.geometry();
        assert_eq!(
            (geometry.size(), destination.geometry()),
            (params.size, geometry)
        );
        trace.push(Step::Session(params));
        Self {
            sender: Half::new(Sender::new(params, geometry).ahead(schedule.ahead)),
            receiver: Half::new(Receiver::new(params, geometry)),
            source,
            destination,
            schedule,
            rng: SmallRng::seed_from_u64(schedule.seed),
            trace,
            tally: Tally::default(),
        }
    }

    /// Plays the session to its end: `None` when a fault ended it.
    pub(crate) fn run(mut self) -> Option<Finished> {
        self.pump(Side::Sender);
        self.pump(Side::Receiver);
        loop {
            self.check_memory();
            let outcomes = (
                self.sender.machine.outcome(),
                self.receiver.machine.outcome(),
            );
            if let (Some(sender), Some(receiver)) = outcomes {
                self.check_nothing_is_left();
                return Some(Finished {
                    sender,
                    receiver,
                    tally: self.tally,
                });
            }
            self.tally.steps += 1;
            assert!(
                self.tally.steps <= self.schedule.max_steps,
                "the session does not end"
            );
            if let Some((at, fault)) = self.schedule.fault
                && self.tally.steps > at
                && self.strike(fault)
            {
                return None;
            }
            self.step();
        }
    }

    fn half(&mut self, side: Side) -> &mut Half {
        match side {
            Side::Sender => &mut self.sender,
            Side::Receiver => &mut self.receiver,
        }
    }

    fn step(&mut self) {
        if self.rng.random_ratio(self.schedule.stalls, 1000) {
            let to = self.any_side();
            let steps = self.rng.random_range(1..300);
            self.half(to).stalled = steps;
            self.trace.push(Step::Stall { to, steps });
        }
        for side in [Side::Sender, Side::Receiver] {
            let half = self.half(side);
            half.stalled = half.stalled.saturating_sub(1);
        }
        match self.choose() {
            Some((side, true)) => self.deliver(side),
            Some((side, false)) => self.finish(side),
            None => {
                let stalled = self.sender.stalled + self.receiver.stalled;
                assert!(stalled > 0, "both ends wait, and nothing is under way");
            }
        }
    }

    /// What may happen next: to which side, and whether it is a delivery.
    fn choose(&mut self) -> Option<(Side, bool)> {
        let deliverable = |half: &Half| half.stalled == 0 && !half.pipe.is_empty();
        let choices = [
            (Side::Sender, true, deliverable(&self.sender)),
            (Side::Receiver, true, deliverable(&self.receiver)),
            (Side::Sender, false, !self.sender.ops.is_empty()),
            (Side::Receiver, false, !self.receiver.ops.is_empty()),
        ];
        let weighted = choices
            .into_iter()
            .zip(self.schedule.weights)
            .filter(|((_, _, possible), _)| *possible);
        let total: u32 = weighted.clone().map(|(_, weight)| weight).sum();
        if total == 0 {
            return None;
        }
        let mut at = self.rng.random_range(0..total);
        for ((side, delivery, _), weight) in weighted {
            if at < weight {
                return Some((side, delivery));
            }
            at -= weight;
        }
        None
    }

    fn any_side(&mut self) -> Side {
        if self.rng.random() {
            Side::Sender
        } else {
            Side::Receiver
        }
    }

    /// Some bytes arrive: a part of a frame, or many frames.
    fn deliver(&mut self, to: Side) {
        let most = self.half(to).pipe.len();
        let bytes = match self.rng.random_range(0..4) {
            0 => self.rng.random_range(1..=most.min(12)),
            1 => self.rng.random_range(1..=most),
            _ => most,
        };
        self.trace.push(Step::Deliver { to, bytes });
        let half = self.half(to);
        let arrived = half.pipe.split_to(bytes);
        half.input.extend_from_slice(&arrived);
        while let Some(frame) =
            frame::decode(&mut self.half(to).input).expect("frames come as they were sent")
        {
            self.watch_arrival(&frame);
            self.half(to)
                .machine
                .handle_frame(&frame)
                .expect("honest peers break no rule");
        }
        self.pump(to);
        // The writer's pipe has room again.
        self.pump(to.other());
    }

    fn finish(&mut self, side: Side) {
        let (ticket, op) = self.take_op(side);
        self.trace.push(Step::Finish { side, ticket });
        let disk = match side {
            Side::Sender => &mut *self.source,
            Side::Receiver => &mut *self.destination,
        };
        let done = disk.run(&op, &mut self.rng);
        self.watch_disk(&op, &done);
        self.half(side)
            .machine
            .handle_disk(ticket, done)
            .expect("the disks hold still, so the roots agree");
        self.pump(side);
    }

    fn take_op(&mut self, side: Side) -> (Ticket, DiskOp) {
        let count = self.half(side).ops.len();
        let at = self.rng.random_range(0..count);
        self.half(side).ops.swap_remove(at)
    }

    /// Ends the session by a fault, if it can happen now.
    fn strike(&mut self, fault: Fault) -> bool {
        if fault == Fault::FailOp {
            let side = self.any_side();
            if self.half(side).ops.is_empty() {
                return false;
            }
            let (ticket, _) = self.take_op(side);
            self.trace.push(Step::Fail { side, ticket });
        } else {
            self.trace.push(Step::Cut);
        }
        if self.receiver.machine.outcome().is_some() {
            assert!(
                self.destination == self.source,
                "a receiver is content only when all is applied"
            );
        }
        for (_, op) in &self.receiver.ops {
            self.destination.tear(op, &mut self.rng);
        }
        true
    }

    /// Calls a machine as the contract in `sync` says, each poll once after something happened.
    fn pump(&mut self, side: Side) {
        while let Some((ticket, op)) = self.half(side).machine.poll_disk() {
            self.watch_op(side, &op);
            self.half(side).ops.push((ticket, op));
        }
        while self.half(side.other()).pipe.len() < self.schedule.pipe
            && let Some(frame) = self.half(side).machine.poll_transmit()
        {
            let bytes = frame.encode();
            self.tally.wire += bytes.len() as u64;
            self.watch_departure(&frame);
            self.half(side.other()).pipe.extend_from_slice(&bytes);
        }
    }

    /// No two operations of a disk that are under way at once touch the same block, and nothing
    /// is written that may still have to be read.
    fn watch_op(&mut self, side: Side, op: &DiskOp) {
        match op {
            DiskOp::Compare { run, .. } => self.tally.compared.push(*run),
            DiskOp::Digest { run } => self.tally.digested.push(*run),
            _ => {}
        }
        for new in blocks_of(op) {
            for (_, other) in &self.half(side).ops {
                for old in blocks_of(other) {
                    assert!(
                        new.end() <= old.first || old.end() <= new.first,
                        "{op:?} runs beside {other:?}"
                    );
                }
            }
        }
    }

    fn watch_departure(&mut self, frame: &Frame) {
        if matches!(frame.kind, FrameKind::Data | FrameKind::Zeros) {
            self.tally.spent += CHANGE_COST;
        }
        if frame.kind == FrameKind::Data {
            self.tally.data_frames += 1;
            self.tally.payload += frame.payload.len() as u64;
            self.tally.spent += frame.payload.len() as u64;
        }
    }

    fn watch_arrival(&mut self, frame: &Frame) {
        if let Ok(Stream::Credit(credit)) = Stream::read(frame) {
            self.tally.credited = credit.consumed;
        }
    }

    fn watch_disk(&mut self, op: &DiskOp, done: &DiskDone) {
        self.tally.applied += match (op, done) {
            (DiskOp::Write { blocks }, DiskDone::Written(contents)) => {
                assert_eq!(blocks.len(), contents.len());
                let costs = blocks.iter().map(|b| CHANGE_COST + b.payload.len() as u64);
                costs.sum()
            }
            (DiskOp::Zero { .. }, _) => CHANGE_COST,
            _ => 0,
        };
    }

    /// Neither side ever holds more than the constants of `sync` allow.
    fn check_memory(&mut self) {
        let tally = &mut self.tally;
        let spent = tally.spent - tally.applied;
        assert!(spent <= self.schedule.ahead, "{spent} spent");
        tally.peak_spent = tally.peak_spent.max(spent);
        assert!(tally.spent - tally.credited <= self.schedule.ahead);
        assert!(tally.credited <= tally.applied);

        let compared = tally.compared.unsettled(&*self.sender.machine);
        assert!(compared <= MAX_READS as u64 * WINDOW, "{compared} read");
        let digested = tally.digested.unsettled(&*self.receiver.machine);
        assert!(digested <= DIGEST_AHEAD, "{digested} digested");
        tally.peak_digested = tally.peak_digested.max(digested);

        let count = |half: &Half, sort: fn(&DiskOp) -> bool| {
            half.ops.iter().filter(|(_, op)| sort(op)).count()
        };
        for half in [&self.sender, &self.receiver] {
            assert!(count(half, |op| matches!(op, DiskOp::Map { .. })) <= 1);
            assert!(count(half, is_read) <= MAX_READS);
            assert!(count(half, is_change) <= MAX_WRITES);
        }
        assert_eq!(count(&self.sender, is_change), 0);
    }

    fn check_nothing_is_left(&mut self) {
        for side in [Side::Sender, Side::Receiver] {
            let half = self.half(side);
            assert!(half.ops.is_empty(), "{side:?}: {:?}", half.ops);
            assert!(half.pipe.is_empty() && half.input.remaining() == 0);
            assert_eq!(half.machine.poll_disk(), None);
            assert_eq!(half.machine.poll_transmit(), None);
        }
        assert_eq!(self.tally.spent, self.tally.applied);
    }
}

fn is_read(op: &DiskOp) -> bool {
    matches!(op, DiskOp::Compare { .. } | DiskOp::Digest { .. })
}

fn is_change(op: &DiskOp) -> bool {
    matches!(
        op,
        DiskOp::Write { .. } | DiskOp::Zero { .. } | DiskOp::Trim { .. }
    )
}

fn blocks_of(op: &DiskOp) -> Vec<BlockRun> {
    match op {
        DiskOp::Map { .. } => Vec::new(),
        DiskOp::Compare { run, .. }
        | DiskOp::Digest { run }
        | DiskOp::Zero { run }
        | DiskOp::Trim { run } => vec![*run],
        DiskOp::Write { blocks } => blocks
            .iter()
            .map(|block| BlockRun {
                first: block.index,
                count: 1,
            })
            .collect(),
    }
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

    /// How many blocks the machine has not settled.
    fn unsettled(&mut self, machine: &dyn Machine) -> u64 {
        let settled = machine.counters().blocks_settled;
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
