//! What a receiver has in consecutive blocks: told by its digests, or held by it until they are
//! settled. Both ends keep such a queue; its length is bounded by [`DIGEST_AHEAD`](super).

use std::collections::VecDeque;

use bytes::Bytes;

use super::digest_count;
use crate::digest::DIGEST_LEN;

/// Blocks of one sort at the front of a [`PeerBlocks`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// So many blocks are holes.
    Holes(u64),
    /// Digests of blocks, zero blocks among them.
    Digests(Bytes),
}

impl Piece {
    pub(super) fn count(&self) -> u64 {
        match self {
            Self::Holes(count) => *count,
            Self::Digests(digests) => digest_count(digests),
        }
    }
}

/// A queue of consecutive blocks.
#[derive(Debug, Default)]
pub(super) struct PeerBlocks {
    pieces: VecDeque<Piece>,
    /// Blocks that are there by digest: what the memory goes by.
    digests: u64,
}

impl PeerBlocks {
    /// Blocks in the queue that have a digest.
    pub(super) fn digests(&self) -> u64 {
        self.digests
    }

    pub(super) fn push_holes(&mut self, count: u64) {
        // Holes are merged, so that the queue is bounded by its digests alone.
        if let Some(Piece::Holes(last)) = self.pieces.back_mut() {
            *last += count;
        } else {
            self.pieces.push_back(Piece::Holes(count));
        }
    }

    pub(super) fn push_digests(&mut self, digests: Bytes) {
        self.digests += digest_count(&digests);
        self.pieces.push_back(Piece::Digests(digests));
    }

    /// Takes up to `most` blocks of one sort from the front.
    pub(super) fn take(&mut self, most: u64) -> Option<Piece> {
        let front = self.pieces.front_mut()?;
        let count = front.count().min(most);
        let rest = front.count() - count;
        let taken = match front {
            Piece::Holes(left) => {
                *left = rest;
                Piece::Holes(count)
            }
            Piece::Digests(left) => {
                self.digests -= count;
                let len = usize::try_from(count).expect("a part of what is in memory") * DIGEST_LEN;
                Piece::Digests(left.split_to(len))
            }
        };
        if rest == 0 {
            self.pieces.pop_front();
        }
        Some(taken)
    }
}
