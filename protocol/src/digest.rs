//! Digests of blocks, and the root that covers a whole disk.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128_with_seed};

use crate::units::{BlockRun, Geometry};

/// Bytes of a [`Digest`] on the wire.
pub const DIGEST_LEN: usize = 16;

/// The function that digests are made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HashKind {
    /// XXH3-128 under a 64-bit seed: guards against chance, not against an adversary.
    Xxh3,
    /// BLAKE3 keyed with 256 bits, cut to 128: also against somebody who chooses the bytes of a
    /// disk without knowing the key.
    Blake3,
}

/// The random seed of a session: the key of BLAKE3; its first eight bytes, little-endian, seed XXH3.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed(pub [u8; 32]);

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(..)")
    }
}

/// The digest of a block, or the root of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Digest(pub [u8; DIGEST_LEN]);

/// What a block holds, as far as comparing goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros only, whether they occupy space or not.
    Zero,
    /// Something else, by its digest.
    Digest(Digest),
}

/// Makes digests under one hash and seed.
#[derive(Debug, Clone, Copy)]
pub struct Digester {
    kind: HashKind,
    seed: Seed,
}

impl Digester {
    /// Digests of `kind` under `seed`.
    pub fn new(kind: HashKind, seed: Seed) -> Self {
        Self { kind, seed }
    }

    /// The digest of a block's bytes (a short last block is digested as short as it is).
    pub fn digest(&self, block: &[u8]) -> Digest {
        match self.kind {
            HashKind::Xxh3 => Digest(xxh3_128_with_seed(block, self.xxh3_seed()).to_le_bytes()),
            HashKind::Blake3 => truncate(&blake3::keyed_hash(&self.seed.0, block)),
        }
    }

    /// Zero, or the digest.
    pub fn content(&self, block: &[u8]) -> Content {
        if is_zero(block) {
            Content::Zero
        } else {
            Content::Digest(self.digest(block))
        }
    }

    fn xxh3_seed(&self) -> u64 {
        let mut seed = [0; 8];
        seed.copy_from_slice(&self.seed.0[..8]);
        u64::from_le_bytes(seed)
    }
}

fn truncate(hash: &blake3::Hash) -> Digest {
    let mut digest = [0; DIGEST_LEN];
    digest.copy_from_slice(&hash.as_bytes()[..DIGEST_LEN]);
    Digest(digest)
}

/// Whether all bytes are zero. Ends at the first page that is not, so it costs nothing on data.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|page| {
        // A fold without early exit vectorises; a page is small enough to be looked at whole.
        page.iter().fold(0, |all, byte| all | byte) == 0
    })
}

/// Digests the contents of a range in order of its blocks: every block that is not zero, and zero
/// blocks as maximal runs. What it says does not depend on how the blocks were grouped.
#[derive(Debug)]
pub struct RangeHasher {
    state: RangeState,
    next: u64,
    zeros_from: u64,
}

enum RangeState {
    Xxh3(Box<Xxh3>),
    Blake3(Box<blake3::Hasher>),
}

impl std::fmt::Debug for RangeState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Xxh3(_) => "Xxh3",
            Self::Blake3(_) => "Blake3",
        })
    }
}

impl RangeState {
    fn new(digester: &Digester) -> Self {
        match digester.kind {
            HashKind::Xxh3 => Self::Xxh3(Box::new(Xxh3::with_seed(digester.xxh3_seed()))),
            HashKind::Blake3 => Self::Blake3(Box::new(blake3::Hasher::new_keyed(&digester.seed.0))),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Xxh3(state) => state.update(bytes),
            Self::Blake3(state) => {
                state.update(bytes);
            }
        }
    }

    fn finish(&self) -> Digest {
        match self {
            Self::Xxh3(state) => Digest(state.digest128().to_le_bytes()),
            Self::Blake3(state) => truncate(&state.finalize()),
        }
    }
}

impl RangeHasher {
    /// Starts at block `first`.
    pub fn new(digester: &Digester, first: u64) -> Self {
        Self {
            state: RangeState::new(digester),
            next: first,
            zeros_from: first,
        }
    }

    /// The block that comes next.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The next `count` blocks are zero.
    pub fn zeros(&mut self, count: u64) {
        self.next += count;
    }

    /// The next block has this digest.
    pub fn block(&mut self, digest: &Digest) {
        self.flush_zeros();
        let mut record = [1; 1 + 8 + DIGEST_LEN];
        record[1..9].copy_from_slice(&self.next.to_le_bytes());
        record[9..].copy_from_slice(&digest.0);
        self.state.update(&record);
        self.next += 1;
        self.zeros_from = self.next;
    }

    /// The next block, whatever it holds.
    pub fn content(&mut self, content: &Content) {
        match content {
            Content::Zero => self.zeros(1),
            Content::Digest(digest) => self.block(digest),
        }
    }

    /// The root of the range.
    pub fn finish(mut self) -> Digest {
        self.flush_zeros();
        self.state.finish()
    }

    fn flush_zeros(&mut self) {
        let run = BlockRun {
            first: self.zeros_from,
            count: self.next - self.zeros_from,
        };
        if run.count > 0 {
            let mut record = [0; 1 + 8 + 8];
            record[1..9].copy_from_slice(&run.first.to_le_bytes());
            record[9..].copy_from_slice(&run.count.to_le_bytes());
            self.state.update(&record);
            self.zeros_from = self.next;
        }
    }
}

/// The root of a disk: the hash of its size and of the roots of its ranges, in order.
pub fn disk_root(digester: &Digester, disk: Geometry, ranges: &[Digest]) -> Digest {
    let mut state = RangeState::new(digester);
    state.update(&disk.size().to_le_bytes());
    for range in ranges {
        state.update(&range.0);
    }
    state.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digesters() -> [Digester; 2] {
        [HashKind::Xxh3, HashKind::Blake3].map(|kind| Digester::new(kind, Seed([7; 32])))
    }

    #[test]
    fn a_block_that_is_zero_but_for_its_last_byte_is_not_zero() {
        let mut block = vec![0; 65_536];
        assert!(is_zero(&block));
        block[65_535] = 1;
        assert!(!is_zero(&block));
        assert!(is_zero(&[]));
    }

    #[test]
    fn the_root_does_not_depend_on_how_zeros_are_grouped() {
        for digester in digesters() {
            let digest = digester.digest(b"data");
            let mut one = RangeHasher::new(&digester, 0);
            one.zeros(5);
            one.block(&digest);
            let mut other = RangeHasher::new(&digester, 0);
            for _ in 0..5 {
                other.content(&Content::Zero);
            }
            other.content(&Content::Digest(digest));
            assert_eq!(one.finish(), other.finish());
        }
    }

    #[test]
    fn the_root_tells_position_and_size_apart() {
        for digester in digesters() {
            let digest = digester.digest(b"data");
            let mut early = RangeHasher::new(&digester, 0);
            early.block(&digest);
            early.zeros(1);
            let mut late = RangeHasher::new(&digester, 0);
            late.zeros(1);
            late.block(&digest);
            assert_ne!(early.finish(), late.finish());

            let root = [digest];
            let [small, large] = [1, 2].map(|size| Geometry::new(size).unwrap());
            assert_ne!(
                disk_root(&digester, small, &root),
                disk_root(&digester, large, &root)
            );
        }
    }

    #[test]
    fn digests_depend_on_the_seed() {
        for kind in [HashKind::Xxh3, HashKind::Blake3] {
            let [one, other] = [1, 2].map(|byte| Digester::new(kind, Seed([byte; 32])));
            assert_ne!(one.digest(b"x"), other.digest(b"x"));
        }
    }
}
