//! The session: one pass over one disk, as two state machines without I/O.
//!
//! ```text
//!        sender (has the source)                     receiver (has the destination)
//!   Map ─ own holes and data                    Map ─ own holes and data
//!                                               Digest ─ a window of blocks
//!                         ◄── Digests, Holes ──
//!   Compare ─ read, digest, compare
//!                         ── Data, Zeros, Settled ──►
//!                                               Write, Zero
//!                         ◄── Credit ──
//!                         ── End(root) ──►      (all applied, same root)
//!                         ◄── Agreed(root) ──
//! ```
//!
//! How to drive a machine ([`Sender`] or [`Receiver`]):
//! 1. Give it what happened: `handle_frame` for each frame of the data connection,
//!    `handle_disk` for each finished disk operation, in any order.
//! 2. Call `poll_disk` until it returns `None`, and start what it returns; operations may run
//!    side by side.
//! 3. Call `poll_transmit` until it returns `None`, and write what it returns, in that order. What
//!    has been written is something that happened, too: it may have made room for operations.
//! 4. When `outcome` returns something, the session is over.
//!
//! A machine never waits and never holds more than the constants of this module allow, whatever
//! the size of the disk and whatever the other end does. An error is final: the driver closes the
//! connection. The price of this form is that every wait is a queue with a name; what it buys is
//! that a thousand sessions with faults in them run in a second of test.

mod order;
mod peer_blocks;
mod receiver;
mod runs;
mod sender;

use bytes::Bytes;
use thiserror::Error;

use crate::digest::{Content, DIGEST_LEN, Digest};
use crate::frame::{Frame, FrameKind};
use crate::message::{Counters, Encoding, Message, MessageError};
use crate::units::{BLOCK_LEN, BlockRun};

pub use order::{MAX_STREAMS, Numbers, Order};
pub use receiver::Receiver;
pub use runs::{MapRun, RunKind};
pub use sender::Sender;

/// Blocks that one disk operation reads: 2 MiB, about 300 µs of reading and hashing from memory,
/// which makes the cost of handing work over invisible.
pub const WINDOW: u64 = 32;

/// Windows that a machine has in hand at once: read ahead, or read and waiting for credit.
pub const MAX_READS: usize = 6;

/// Write operations that a receiver has in hand at once.
pub const MAX_WRITES: usize = 8;

/// Blocks that one write operation takes at most: 1 MiB.
pub const WRITE_BATCH: usize = 16;

/// Digests that may be sent ahead of what is settled: 1 GiB of disk, 256 KiB of digests. At the
/// speed of a scan from memory this bridges a round trip of 100 ms.
pub const DIGEST_AHEAD: u64 = 16 * 1024;

/// Payload bytes of [`Data`](crate::message::Data) that may be sent ahead of credit: a round trip
/// of 100 ms at 1 Gbit/s, with a third to spare.
pub const DATA_AHEAD: u64 = 16 * 1024 * 1024;

/// The least of that which a [`Sender`] may be held to: what ssh lets be under way in a channel, and
/// enough that it never waits for credit which the receiver keeps back.
pub const MIN_DATA_AHEAD: u64 = 2 * 1024 * 1024;

/// What each [`Data`](crate::message::Data) and [`Zeros`](crate::message::Zeros) costs of the
/// same credit besides its payload: about what a receiver keeps of it until it is applied.
/// Without it, zeros and blocks that compress to almost nothing would pile up in front of a slow
/// disk.
pub const CHANGE_COST: u64 = 256;

/// Runs that one [`DiskOp::Map`] returns at most.
pub const MAP_RUNS: usize = 1024;

/// Either half of a session, for a driver that does not care which.
pub trait Machine: std::fmt::Debug + Send {
    /// A frame came from the other end.
    ///
    /// # Errors
    /// [`SyncError`]; the session is over.
    fn handle_frame(&mut self, frame: &Frame) -> Result<(), SyncError>;
    /// An operation is done.
    ///
    /// # Errors
    /// [`SyncError`]; the session is over.
    fn handle_disk(&mut self, ticket: Ticket, done: DiskDone) -> Result<(), SyncError>;
    /// The next operation to start, if any.
    fn poll_disk(&mut self) -> Option<(Ticket, DiskOp)>;
    /// The next frame to write, if any.
    fn poll_transmit(&mut self) -> Option<Frame>;
    /// The end, when it has come.
    fn outcome(&self) -> Option<Outcome>;
    /// What has been done so far.
    fn counters(&self) -> Counters;
    /// Whether the wire, or the other end, is the slower part: half of the data window or more
    /// waits for credit.
    fn is_wire_bound(&self) -> bool;
}

/// Names an operation that a machine asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

impl Ticket {
    fn take(&mut self) -> Self {
        let ticket = *self;
        self.0 += 1;
        ticket
    }
}

/// What a machine wants from its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskOp {
    /// Say which blocks from `from` on are holes: at least one run, at most [`MAP_RUNS`], ending
    /// at the end of the session at the latest. A block that is a hole only in part is data, and
    /// what lies past the end of a file is a hole. Answer: [`DiskDone::Mapped`].
    Map {
        /// The first block asked for.
        from: u64,
    },
    /// Read the blocks, and say how each stands to what the receiver has. The bytes that are
    /// shipped must be those whose digest was taken. Answer: [`DiskDone::Compared`].
    Compare {
        /// Which blocks; at most [`WINDOW`].
        run: BlockRun,
        /// What the receiver has.
        expected: Expected,
        /// Blocks that differ are to be shipped; otherwise an empty payload will do.
        ship: bool,
    },
    /// Read the blocks and digest each. Answer: [`DiskDone::Digested`].
    Digest {
        /// Which blocks; at most [`WINDOW`].
        run: BlockRun,
    },
    /// Decode the blocks, digest and write each. Answer: [`DiskDone::Written`].
    Write {
        /// At most [`WRITE_BATCH`].
        blocks: Vec<WriteBlock>,
    },
    /// Make the blocks read as zeros, with no space behind them where that can be had. Answer:
    /// [`DiskDone::Zeroed`].
    Zero {
        /// Which blocks.
        run: BlockRun,
    },
    /// The blocks read as zeros already but occupy space; a file may give it back. Answer:
    /// [`DiskDone::Zeroed`].
    Trim {
        /// Which blocks.
        run: BlockRun,
    },
}

/// What the receiver has in the blocks of a [`DiskOp::Compare`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// Zeros throughout.
    Zeros,
    /// The digests, [`DIGEST_LEN`] bytes each; see [`content_at`].
    Digests(Bytes),
}

impl Expected {
    /// What the receiver has in the block at position `at` of the run.
    pub fn at(&self, at: usize) -> Content {
        match self {
            Self::Zeros => Content::Zero,
            Self::Digests(digests) => content_at(digests, at),
        }
    }
}

/// A block on its way to the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteBlock {
    /// Index of the block.
    pub index: u64,
    /// How `payload` holds it.
    pub encoding: Encoding,
    /// The bytes from the wire: a decoder must bound its output by the length of the block.
    pub payload: Bytes,
    /// Finds the block's place in the order of the root again.
    slot: u64,
}

/// What a disk operation brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskDone {
    /// Consecutive runs from the block asked for.
    Mapped {
        /// Holes and data.
        runs: Vec<MapRun>,
        /// Bytes of them that are not holes, as exactly as the file system says.
        data_bytes: u64,
    },
    /// One entry for each block.
    Compared(Vec<Compared>),
    /// The digests of the blocks, made with [`push_content`].
    Digested(Bytes),
    /// The digests of the decoded blocks, in the order of the operation.
    Written(Vec<Content>),
    /// Done.
    Zeroed,
}

/// How a source block stands to the destination's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compared {
    /// The same contents.
    Equal(Content),
    /// The source reads as zeros, the destination does not.
    Zeroed,
    /// The source has other data.
    Changed {
        /// Of the source's block.
        digest: Digest,
        /// How `payload` holds the block.
        encoding: Encoding,
        /// The block for the wire.
        payload: Bytes,
    },
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What was done.
    pub counters: Counters,
    /// The first block that differed; known to the sender.
    pub first_difference: Option<u64>,
    /// The root of this end's contents after the session.
    pub root: Digest,
}

/// Why a session cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SyncError {
    /// The frame is not what its kind promises, or has no business in a session.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// Well-formed, but against the rules of a session.
    #[error("the peer broke the protocol: {0}")]
    PeerMisbehaved(Misbehaviour),
    /// All was applied, and the root is not the sender's: what arrived is not what was sent, or
    /// a disk changed under the session.
    #[error("the destination's contents do not have the digest that the source has")]
    RootMismatch,
}

/// The rules that a peer can break.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "the fields are what the message says")]
pub enum Misbehaviour {
    #[error("a {0:?} frame, which does not come from that side")]
    WrongSide(FrameKind),
    #[error("a {0:?} frame in a session that does not ship or compare")]
    NotInThisSession(FrameKind),
    #[error("a {0:?} frame after the end")]
    AfterEnd(FrameKind),
    #[error("a {kind:?} frame for block {got}, where block {expected} was next")]
    OutOfOrder {
        kind: FrameKind,
        expected: u64,
        got: u64,
    },
    #[error("a {kind:?} frame that reaches block {end} of {limit}")]
    OutOfRange {
        kind: FrameKind,
        end: u64,
        limit: u64,
    },
    #[error("a {kind:?} frame with a payload of {len} bytes")]
    BadPayload { kind: FrameKind, len: usize },
    #[error("more {0:?} than it had credit for")]
    OverCredit(FrameKind),
    #[error("credit for {consumed} bytes, of {sent} sent")]
    FalseCredit { consumed: u64, sent: u64 },
    #[error("the end of the session at block {at} of {count}")]
    EarlyEnd { at: u64, count: u64 },
    #[error("agreement on another root than the one sent")]
    WrongRoot,
    #[error("a number for a frame, in a session on a single connection")]
    Numbered,
    #[error("a {0:?} frame where its number, or what one was given for, was next")]
    NoPlace(FrameKind),
    #[error("a second frame with the number {number}, of kind {kind:?}")]
    SamePlace { kind: FrameKind, number: u64 },
    #[error("a {0:?} frame that is too far ahead of what is missing")]
    TooEarly(FrameKind),
}

impl From<Misbehaviour> for SyncError {
    fn from(what: Misbehaviour) -> Self {
        Self::PeerMisbehaved(what)
    }
}

/// Appends the wire form of a block's content: its digest, or sixteen zero bytes for a zero
/// block. (A digest that happens to be all zeros, once in 2^128, would be caught by the root.)
pub fn push_content(digests: &mut Vec<u8>, content: &Content) {
    match content {
        Content::Zero => digests.extend_from_slice(&[0; DIGEST_LEN]),
        Content::Digest(digest) => digests.extend_from_slice(&digest.0),
    }
}

/// The content of the block at position `at` of a row of digests.
///
/// # Panics
/// When the row is shorter than that.
pub fn content_at(digests: &[u8], at: usize) -> Content {
    let mut digest = [0; DIGEST_LEN];
    digest.copy_from_slice(&digests[at * DIGEST_LEN..(at + 1) * DIGEST_LEN]);
    if digest == [0; DIGEST_LEN] {
        Content::Zero
    } else {
        Content::Digest(Digest(digest))
    }
}

/// How many blocks a row of digests covers.
fn digest_count(digests: &[u8]) -> u64 {
    (digests.len() / DIGEST_LEN) as u64
}

/// The longest payload that a block of `len` bytes may have: compression is used only where it
/// makes a block smaller.
fn payload_fits(encoding: Encoding, payload: usize, len: usize) -> bool {
    debug_assert!(len <= BLOCK_LEN);
    match encoding {
        Encoding::Raw => payload == len,
        Encoding::Zstd => payload > 0 && payload < len,
    }
}

/// A slice keeps the whole buffer alive that it was read into. A block fills a good part of that;
/// a few bytes are copied instead, so that memory is what credit counts.
fn own(bytes: &Bytes) -> Bytes {
    if bytes.len() < BLOCK_LEN / 2 {
        Bytes::copy_from_slice(bytes)
    } else {
        bytes.clone()
    }
}

/// The frame of a message that is a few numbers.
fn small(message: &impl Message) -> Frame {
    message.frame().expect("a few numbers fit MAX_META")
}
