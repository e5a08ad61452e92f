//! Disks in memory, block by block: what a block holds is one byte repeated, so that gigabytes
//! cost nothing, and lengths are still true.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use bytes::Bytes;
use kvm_clone_protocol::digest::{
    Content, Digest, Digester, HashKind, RangeHasher, Seed, disk_root,
};
use kvm_clone_protocol::message::{Encoding, SessionParams};
use kvm_clone_protocol::sync::{
    Compared, DiskDone, DiskOp, MAP_RUNS, MapRun, RunKind, WRITE_BATCH, WriteBlock, push_content,
};
use kvm_clone_protocol::units::{BLOCK_LEN, BlockRun, Geometry};
use rand::RngExt;
use rand::rngs::SmallRng;

/// The seed of all digests here, so that they can be kept from one session to the next.
const SEED: Seed = Seed([0x5e; 32]);

/// What an occupied block holds: `byte` repeated `len` times, and zeros after that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Fill {
    byte: u8,
    len: usize,
}

impl Fill {
    /// Zeros that occupy space.
    pub(crate) const ZERO: Self = Self { byte: 0, len: 0 };

    /// A block full of `byte`.
    pub(crate) fn of(byte: u8) -> Self {
        Self::part(byte, BLOCK_LEN)
    }

    /// A block that starts with `len` times `byte`.
    pub(crate) fn part(byte: u8, len: usize) -> Self {
        if byte == 0 || len == 0 {
            Self::ZERO
        } else {
            Self { byte, len }
        }
    }

    fn cut(self, len: usize) -> Self {
        Self::part(self.byte, self.len.min(len))
    }

    fn bytes(self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[..self.len].fill(self.byte);
        bytes
    }
}

/// Makes digests and blocks once each: in a debug build they are what takes the time.
#[derive(Debug)]
pub(crate) struct Library {
    pub(crate) hash: HashKind,
    digester: Digester,
    digests: RefCell<HashMap<(Fill, usize), Digest>>,
    blocks: RefCell<HashMap<(Fill, usize), Bytes>>,
}

impl Library {
    pub(crate) fn new(hash: HashKind) -> Rc<Self> {
        Rc::new(Self {
            hash,
            digester: Digester::new(hash, SEED),
            digests: RefCell::default(),
            blocks: RefCell::default(),
        })
    }

    pub(crate) fn params(&self, size: u64, compare: bool, ship: bool) -> SessionParams {
        SessionParams {
            size,
            hash: self.hash,
            seed: SEED,
            compare,
            ship,
        }
    }

    fn content(&self, fill: Fill, len: usize) -> Content {
        if fill == Fill::ZERO {
            return Content::Zero;
        }
        let mut digests = self.digests.borrow_mut();
        let digest = digests
            .entry((fill, len))
            .or_insert_with(|| self.digester.digest(&fill.bytes(len)));
        Content::Digest(*digest)
    }

    fn raw(&self, fill: Fill, len: usize) -> Bytes {
        let mut blocks = self.blocks.borrow_mut();
        blocks
            .entry((fill, len))
            .or_insert_with(|| fill.bytes(len).into())
            .clone()
    }
}

/// How a source turns blocks into payloads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packing {
    /// Of a hundred blocks, so many travel as they are.
    pub(crate) raw_percent: u32,
    /// The others take up to so many bytes more than they need.
    pub(crate) padding: usize,
}

/// What the packed form of a block takes: the byte, and how often.
const PACKED_LEN: usize = 4;

/// A disk: what is not in the map is a hole.
#[derive(Debug, Clone)]
pub(crate) struct FakeDisk {
    geometry: Geometry,
    blocks: BTreeMap<u64, Fill>,
    library: Rc<Library>,
    pub(crate) packing: Packing,
    /// Blocks that a write, a zero or a trim went over.
    pub(crate) touched: u64,
}

impl FakeDisk {
    pub(crate) fn new(library: &Rc<Library>, size: u64) -> Self {
        Self {
            geometry: Geometry::new(size).expect("a size of these tests"),
            blocks: BTreeMap::new(),
            library: Rc::clone(library),
            packing: Packing {
                raw_percent: 50,
                padding: 0,
            },
            touched: 0,
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// What a driver does before a session: the destination gets the size of the source.
    pub(crate) fn resize(&mut self, size: u64) {
        self.geometry = Geometry::new(size).expect("a size of these tests");
        self.blocks.split_off(&self.geometry.block_count());
        if let Some(mut last) = self.blocks.last_entry() {
            let len = self.geometry.block_len(*last.key());
            let cut = last.get().cut(len);
            last.insert(cut);
        }
    }

    pub(crate) fn put(&mut self, index: u64, fill: Fill) {
        let len = self.geometry.block_len(index);
        assert!(len > 0, "block {index} is past the end of the disk");
        self.blocks.insert(index, fill.cut(len));
    }

    pub(crate) fn punch(&mut self, run: BlockRun) {
        let blocks: Vec<_> = self.blocks.range(run.first..run.end()).collect();
        let blocks: Vec<u64> = blocks.into_iter().map(|(index, _)| *index).collect();
        for index in blocks {
            self.blocks.remove(&index);
        }
    }

    /// Blocks that occupy space.
    pub(crate) fn allocated(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Bytes that occupy space.
    pub(crate) fn allocated_bytes(&self) -> u64 {
        let lens = self.blocks.keys().map(|at| self.geometry.block_len(*at));
        lens.sum::<usize>() as u64
    }

    /// Blocks that do not read as zeros.
    pub(crate) fn nonzero(&self) -> u64 {
        self.blocks.values().filter(|f| **f != Fill::ZERO).count() as u64
    }

    fn fill(&self, index: u64) -> Fill {
        self.blocks.get(&index).copied().unwrap_or(Fill::ZERO)
    }

    fn content(&self, index: u64) -> Content {
        self.library
            .content(self.fill(index), self.geometry.block_len(index))
    }

    /// Blocks in which the two differ, in order.
    pub(crate) fn differences(&self, other: &Self) -> BTreeSet<u64> {
        let indices = self.blocks.keys().chain(other.blocks.keys()).copied();
        indices
            .filter(|at| self.fill(*at) != other.fill(*at))
            .collect()
    }

    /// Whether the block reads as zeros.
    pub(crate) fn is_zero(&self, index: u64) -> bool {
        self.fill(index) == Fill::ZERO
    }

    /// The root, computed from the blocks alone.
    pub(crate) fn root(&self) -> Digest {
        let mut hasher = RangeHasher::new(&self.library.digester, 0);
        for index in self.blocks.keys() {
            hasher.zeros(index - hasher.next());
            hasher.content(&self.content(*index));
        }
        hasher.zeros(self.geometry.block_count() - hasher.next());
        disk_root(&self.library.digester, self.geometry, &[hasher.finish()])
    }

    /// Carries an operation out.
    pub(crate) fn run(&mut self, op: &DiskOp, rng: &mut SmallRng) -> DiskDone {
        match op {
            DiskOp::Map { from } => self.map(*from, rng),
            DiskOp::Compare {
                run,
                expected,
                ship,
            } => DiskDone::Compared(
                self.indices(*run)
                    .enumerate()
                    .map(|(at, index)| self.compare(index, expected.at(at), *ship, rng))
                    .collect(),
            ),
            DiskOp::Digest { run } => {
                let mut digests = Vec::new();
                for index in self.indices(*run) {
                    push_content(&mut digests, &self.content(index));
                }
                DiskDone::Digested(digests.into())
            }
            DiskOp::Write { blocks } => {
                assert!((1..=WRITE_BATCH).contains(&blocks.len()));
                DiskDone::Written(blocks.iter().map(|block| self.write(block)).collect())
            }
            DiskOp::Zero { run } => {
                self.zero(*run);
                DiskDone::Zeroed
            }
            DiskOp::Trim { run } => {
                let mut blocks = self.blocks.range(run.first..run.end());
                assert!(
                    blocks.all(|(_, fill)| *fill == Fill::ZERO),
                    "a trim of data, {run:?}"
                );
                self.zero(*run);
                DiskDone::Zeroed
            }
        }
    }

    /// What is left of an operation that was cut off: any part of it.
    pub(crate) fn tear(&mut self, op: &DiskOp, rng: &mut SmallRng) {
        match op {
            DiskOp::Write { blocks } => {
                for block in blocks {
                    let whole = self.unpack(block);
                    match rng.random_range(0..3) {
                        0 => self.put(block.index, whole),
                        1 => self.put(block.index, whole.cut(rng.random_range(0..=whole.len))),
                        _ => {}
                    }
                }
            }
            DiskOp::Zero { run } | DiskOp::Trim { run } => self.punch(BlockRun {
                first: run.first,
                count: rng.random_range(0..=run.count),
            }),
            DiskOp::Map { .. } | DiskOp::Compare { .. } | DiskOp::Digest { .. } => {}
        }
    }

    fn indices(&self, run: BlockRun) -> std::ops::Range<u64> {
        assert!(self.geometry.contains(run), "{run:?} is not on the disk");
        run.first..run.end()
    }

    /// Runs of random number, some cut in two: nothing says that they are maximal.
    fn map(&self, from: u64, rng: &mut SmallRng) -> DiskDone {
        let end = self.geometry.block_count();
        assert!(from < end, "mapped from {from} of {end}");
        let most = rng.random_range(1..=MAP_RUNS);
        let mut runs = Vec::new();
        let mut data_bytes = 0;
        let mut at = from;
        while at < end && runs.len() < most {
            let next = self
                .blocks
                .range(at..)
                .next()
                .map_or(end, |(next, _)| *next);
            let (kind, mut count) = if next > at {
                (RunKind::Hole, next - at)
            } else {
                let held = self.blocks.range(at..).zip(at..);
                let count = held.take_while(|((index, _), at)| *index == at).count();
                (RunKind::Data, count as u64)
            };
            if rng.random_ratio(1, 8) {
                count = rng.random_range(1..=count);
            }
            if kind == RunKind::Data {
                let run = BlockRun { first: at, count };
                data_bytes += self.geometry.byte_range(run).1;
            }
            runs.push(MapRun { kind, count });
            at += count;
        }
        DiskDone::Mapped { runs, data_bytes }
    }

    fn compare(&self, index: u64, theirs: Content, ship: bool, rng: &mut SmallRng) -> Compared {
        match self.content(index) {
            own if own == theirs => Compared::Equal(own),
            Content::Zero => Compared::Zeroed,
            Content::Digest(digest) => {
                let (encoding, payload) = if ship {
                    self.pack(index, rng)
                } else {
                    (Encoding::Raw, Bytes::new())
                };
                Compared::Changed {
                    digest,
                    encoding,
                    payload,
                }
            }
        }
    }

    /// Stands in for zstd: the byte, how often, and padding.
    fn pack(&self, index: u64, rng: &mut SmallRng) -> (Encoding, Bytes) {
        let (fill, len) = (self.fill(index), self.geometry.block_len(index));
        if len <= PACKED_LEN || rng.random_ratio(self.packing.raw_percent, 100) {
            return (Encoding::Raw, self.library.raw(fill, len));
        }
        let padding = rng.random_range(0..=self.packing.padding);
        let count = u32::try_from(fill.len).expect("at most a block");
        let mut payload = vec![0; (PACKED_LEN + padding).min(len - 1)];
        payload[0] = fill.byte;
        payload[1..PACKED_LEN].copy_from_slice(&count.to_le_bytes()[..PACKED_LEN - 1]);
        (Encoding::Zstd, payload.into())
    }

    fn unpack(&self, block: &WriteBlock) -> Fill {
        let payload = &block.payload;
        let len = self.geometry.block_len(block.index);
        match block.encoding {
            Encoding::Zstd => {
                let count = [payload[1], payload[2], payload[3], 0];
                Fill::part(payload[0], u32::from_le_bytes(count) as usize)
            }
            Encoding::Raw => {
                assert_eq!(payload.len(), len);
                let count = payload.partition_point(|byte| *byte != 0);
                let fill = Fill::part(payload[0], count);
                assert!(
                    *payload == self.library.raw(fill, len),
                    "the payload of block {} is spoilt",
                    block.index
                );
                fill
            }
        }
    }

    fn write(&mut self, block: &WriteBlock) -> Content {
        self.touched += 1;
        self.put(block.index, self.unpack(block));
        self.content(block.index)
    }

    fn zero(&mut self, run: BlockRun) {
        assert!(self.geometry.contains(run), "{run:?} is not on the disk");
        self.touched += run.count;
        self.punch(run);
    }
}

impl PartialEq for FakeDisk {
    /// The same bytes, wherever the holes are.
    fn eq(&self, other: &Self) -> bool {
        self.geometry == other.geometry && self.differences(other).is_empty()
    }
}
