//! Both ends of a session and nothing else: disks that answer at once, by a rule, without holding
//! or digesting anything, and frames that are handed over as they are.

use bytes::Bytes;
use kvm_clone_protocol::digest::{Content, DIGEST_LEN, Digest, HashKind, Seed};
use kvm_clone_protocol::message::{Encoding, SessionParams};
use kvm_clone_protocol::sync::{
    Compared, DiskDone, DiskOp, Expected, MAP_RUNS, Machine, MapRun, Outcome, Receiver, RunKind,
    Sender, push_content,
};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};

/// What every changed block travels as.
static PAYLOAD: [u8; BLOCK_LEN] = [1; BLOCK_LEN];

/// Versions of a block.
const NEW: u8 = 1;
const OLD: u8 = 2;

/// How the two disks stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// The same data throughout.
    Equal,
    /// No block is the same.
    Changed,
    /// The same, and every other block is a hole.
    Holes,
}

/// Plays a session over so many blocks to its end; what it came to at both ends.
pub(crate) fn play(blocks: u64, shape: Shape) -> [Outcome; 2] {
    let geometry = Geometry::new(blocks * BLOCK_SIZE).expect("far below MAX_DISK_SIZE");
    let params = SessionParams {
        size: geometry.size(),
        hash: HashKind::Xxh3,
        seed: Seed([7; 32]),
        compare: true,
        ship: true,
    };
    let disk = Disk { blocks, shape };
    let mut sender = (Sender::new(params, geometry), disk);
    let mut receiver = (Receiver::new(params, geometry), disk);
    loop {
        step(&mut sender, &mut receiver.0);
        step(&mut receiver, &mut sender.0);
        if let (Some(sent), Some(received)) = (sender.0.outcome(), receiver.0.outcome()) {
            return [sent, received];
        }
    }
}

/// Everything happens at one end that can.
fn step<M: Machine>((machine, disk): &mut (M, Disk), peer: &mut impl Machine) {
    while let Some((ticket, op)) = machine.poll_disk() {
        let handled = machine.handle_disk(ticket, disk.answer(&op));
        handled.expect("the roots agree, since the disks hold still");
    }
    while let Some(frame) = machine.poll_transmit() {
        let handled = peer.handle_frame(&frame);
        handled.expect("neither end breaks the protocol");
    }
}

/// Either disk: the source is only compared, and only the destination is digested or written.
#[derive(Debug, Clone, Copy)]
struct Disk {
    blocks: u64,
    shape: Shape,
}

impl Disk {
    fn answer(&self, op: &DiskOp) -> DiskDone {
        match op {
            DiskOp::Map { from } => self.map(*from),
            DiskOp::Compare { run, expected, .. } => compare(*run, expected),
            DiskOp::Digest { run } => self.digest(*run),
            DiskOp::Write { blocks } => {
                let written = blocks.iter().map(|block| content(block.index, NEW));
                DiskDone::Written(written.collect())
            }
            DiskOp::Zero { .. } | DiskOp::Trim { .. } => DiskDone::Zeroed,
        }
    }

    fn map(&self, from: u64) -> DiskDone {
        let runs: Vec<_> = match self.shape {
            Shape::Equal | Shape::Changed => vec![MapRun {
                kind: RunKind::Data,
                count: self.blocks - from,
            }],
            Shape::Holes => (from..self.blocks).take(MAP_RUNS).map(single).collect(),
        };
        let data = runs.iter().filter(|run| run.kind == RunKind::Data);
        let data_bytes = data.map(|run| run.count * BLOCK_SIZE).sum();
        DiskDone::Mapped { runs, data_bytes }
    }

    fn digest(&self, run: BlockRun) -> DiskDone {
        let version = match self.shape {
            Shape::Equal | Shape::Holes => NEW,
            Shape::Changed => OLD,
        };
        let mut digests = Vec::new();
        for index in run.first..run.end() {
            push_content(&mut digests, &content(index, version));
        }
        DiskDone::Digested(digests.into())
    }
}

/// A run of one block: data where the index is even.
fn single(index: u64) -> MapRun {
    let kind = if index.is_multiple_of(2) {
        RunKind::Data
    } else {
        RunKind::Hole
    };
    MapRun { kind, count: 1 }
}

/// A digest that stands for what a block of this version holds.
fn content(index: u64, version: u8) -> Content {
    let mut digest = [version; DIGEST_LEN];
    digest[..8].copy_from_slice(&(index + 1).to_le_bytes());
    Content::Digest(Digest(digest))
}

fn compare(run: BlockRun, expected: &Expected) -> DiskDone {
    let blocks = (0..).zip(run.first..run.end());
    let compared = blocks.map(|(at, index)| match content(index, NEW) {
        own if own == expected.at(at) => Compared::Equal(own),
        Content::Digest(digest) => Compared::Changed {
            digest,
            encoding: Encoding::Raw,
            payload: Bytes::from_static(&PAYLOAD),
        },
        Content::Zero => Compared::Zeroed,
    });
    DiskDone::Compared(compared.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_agree_and_ship_what_differs() {
        for (shape, changed) in [(Shape::Equal, 0), (Shape::Changed, 2500), (Shape::Holes, 0)] {
            let [sent, received] = play(2500, shape);
            assert_eq!(sent.root, received.root);
            assert_eq!(sent.counters.blocks_changed, changed, "{shape:?}");
            assert_eq!(received.counters.blocks_settled, 2500);
        }
    }
}
