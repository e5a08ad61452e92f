//! Disks that answer what a machine asks of them. A block holds one byte, repeated or not: what a
//! machine knows of it is a digest that the driver makes, so none has to be computed.

use bytes::Bytes;

use crate::digest::{Content, DIGEST_LEN, Digest};
use crate::message::Encoding;
use crate::sync::{
    Compared, DiskDone, DiskOp, Expected, MAP_RUNS, MapRun, RunKind, WriteBlock, push_content,
};
use crate::units::{BLOCK_LEN, BlockRun, Geometry};

/// Payloads are cut from here: one that starts at position `n` starts with the byte `n`.
pub(super) static PAYLOADS: [u8; PAYLOADS_LEN] = payloads();

const PAYLOADS_LEN: usize = BLOCK_LEN + 1024;

const fn payloads() -> [u8; PAYLOADS_LEN] {
    let mut bytes = [0; PAYLOADS_LEN];
    let mut at = 0;
    while at < PAYLOADS_LEN {
        bytes[at] = at.to_le_bytes()[0];
        at += 1;
    }
    bytes
}

/// A disk, as far as the answers to a machine depend on it.
pub(super) trait Disk {
    fn geometry(&self) -> Geometry;
    /// The run that starts at `from`, which is on the disk. It may be cut short, and may reach
    /// beyond the end.
    fn run_at(&self, from: u64) -> MapRun;
    /// What the block holds; zero is a zero block.
    fn byte(&self, index: u64) -> u8;
    fn write(&mut self, index: u64, byte: u8);
    fn zero(&mut self, run: BlockRun);

    /// How the answers differ that a disk of the same contents may give.
    fn mood(&self) -> u8;
}

/// Carries an operation out, in the form that a driver owes to a machine.
pub(super) fn answer(disk: &mut impl Disk, op: &DiskOp) -> DiskDone {
    match op {
        DiskOp::Map { from } => map(disk, *from),
        DiskOp::Compare {
            run,
            expected,
            ship,
        } => compare(disk, *run, expected, *ship),
        DiskOp::Digest { run } => {
            let mut digests = Vec::new();
            for index in run.first..run.end() {
                push_content(&mut digests, &content(disk.byte(index)));
            }
            DiskDone::Digested(digests.into())
        }
        DiskOp::Write { blocks } => {
            DiskDone::Written(blocks.iter().map(|block| write(disk, block)).collect())
        }
        DiskOp::Zero { run } | DiskOp::Trim { run } => {
            disk.zero(*run);
            DiskDone::Zeroed
        }
    }
}

pub(super) fn content(byte: u8) -> Content {
    match byte {
        0 => Content::Zero,
        byte => Content::Digest(Digest([byte; DIGEST_LEN])),
    }
}

fn map(disk: &impl Disk, from: u64) -> DiskDone {
    let geometry = disk.geometry();
    let most = match disk.mood() >> 4 {
        0 => MAP_RUNS,
        few => few.into(),
    };
    let (mut runs, mut data_bytes, mut at) = (Vec::new(), 0, from);
    while at < geometry.block_count() && runs.len() < most {
        let MapRun { kind, count } = disk.run_at(at);
        let count = count.min(geometry.block_count() - at);
        if kind == RunKind::Data {
            data_bytes += geometry.byte_range(BlockRun { first: at, count }).1;
        }
        runs.push(MapRun { kind, count });
        at += count;
    }
    DiskDone::Mapped { runs, data_bytes }
}

fn compare(disk: &impl Disk, run: BlockRun, expected: &Expected, ship: bool) -> DiskDone {
    let compared = |(at, index)| match content(disk.byte(index)) {
        own if own == expected.at(at) => Compared::Equal(own),
        Content::Zero => Compared::Zeroed,
        Content::Digest(digest) => {
            let (encoding, payload) = pack(disk, index, ship);
            Compared::Changed {
                digest,
                encoding,
                payload,
            }
        }
    };
    let blocks = (0..).zip(run.first..run.end());
    DiskDone::Compared(blocks.map(compared).collect())
}

/// A payload that starts with the block's byte. One that stands for a compressed block is short, or
/// as long as it can be.
fn pack(disk: &impl Disk, index: u64, ship: bool) -> (Encoding, Bytes) {
    let len = disk.geometry().block_len(index);
    let (encoding, len) = match disk.mood() % 4 {
        _ if !ship => (Encoding::Raw, 0),
        _ if len == 1 => (Encoding::Raw, 1),
        0 => (Encoding::Raw, len),
        1 => (Encoding::Zstd, len - 1),
        _ => (Encoding::Zstd, 1),
    };
    let start = usize::from(disk.byte(index));
    let payload = Bytes::from_static(&PAYLOADS[start..start + len]);
    (encoding, payload)
}

fn write(disk: &mut impl Disk, block: &WriteBlock) -> Content {
    let byte = block.payload[0];
    disk.write(block.index, byte);
    content(disk.byte(block.index))
}
