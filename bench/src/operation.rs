//! The operations, each with a name, ready to be repeated.

use std::fmt;
use std::hint::black_box;
use std::str::FromStr;

use bytes::{Bytes, BytesMut};
use kvm_clone_protocol::digest::{Digester, HashKind, Seed};
use kvm_clone_protocol::frame::{self, Frame};
use kvm_clone_protocol::message::{Data, Encoding, Message, Stream};
use kvm_clone_protocol::units::BLOCK_LEN;

use crate::session::{self, Shape};

/// Blocks of a session: 256 MiB, so that what a session costs as such is lost among them.
const SESSION_BLOCKS: u64 = 4096;

/// Something that a run does for each block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A block is digested with XXH3-128.
    DigestXxh3,
    /// A block is digested with BLAKE3.
    DigestBlake3,
    /// A frame with a block gets its head and meta.
    EncodeData,
    /// A frame with a block is cut from the stream, and its meta read. The block is a short one:
    /// nothing looks at its bytes, and copying them would be all that is seen.
    DecodeData,
    /// Both ends of a session in which no block differs, without the digesting.
    SessionEqual,
    /// The same in which every block differs.
    SessionChanged,
    /// The same in which every other block is a hole: what keeping extents costs.
    SessionHoles,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::DigestXxh3,
        Self::DigestBlake3,
        Self::EncodeData,
        Self::DecodeData,
        Self::SessionEqual,
        Self::SessionChanged,
        Self::SessionHoles,
    ];

    /// How it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::DigestXxh3 => "digest-xxh3",
            Self::DigestBlake3 => "digest-blake3",
            Self::EncodeData => "encode-data",
            Self::DecodeData => "decode-data",
            Self::SessionEqual => "session-equal",
            Self::SessionChanged => "session-changed",
            Self::SessionHoles => "session-holes",
        }
    }

    /// How many blocks of a disk it goes through.
    pub fn blocks(self) -> u64 {
        match self {
            Self::DigestXxh3 | Self::DigestBlake3 | Self::EncodeData | Self::DecodeData => 1,
            Self::SessionEqual | Self::SessionChanged | Self::SessionHoles => SESSION_BLOCKS,
        }
    }

    /// Gets everything ready; what comes back does it once.
    pub fn prepare(self) -> Box<dyn FnMut()> {
        match self {
            Self::DigestXxh3 => digest(HashKind::Xxh3),
            Self::DigestBlake3 => digest(HashKind::Blake3),
            Self::EncodeData => encode(),
            Self::DecodeData => decode(),
            Self::SessionEqual => session(Shape::Equal),
            Self::SessionChanged => session(Shape::Changed),
            Self::SessionHoles => session(Shape::Holes),
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Operation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|known| known.name() == text);
        found.ok_or_else(|| "no such operation".to_owned())
    }
}

/// A block that is neither zeros nor compressible at a glance.
fn block() -> Vec<u8> {
    (0..BLOCK_LEN)
        .map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[2])
        .collect()
}

fn digest(kind: HashKind) -> Box<dyn FnMut()> {
    let (digester, block) = (Digester::new(kind, Seed([7; 32])), block());
    Box::new(move || {
        black_box(digester.digest(black_box(&block)));
    })
}

fn data_frame(payload: Bytes) -> Frame {
    let message = Data {
        index: black_box(1 << 20),
        encoding: Encoding::Raw,
    };
    let frame = message.frame().expect("a few numbers fit MAX_META");
    Frame { payload, ..frame }
}

fn encode() -> Box<dyn FnMut()> {
    let (payload, mut out) = (Bytes::from(block()), BytesMut::new());
    Box::new(move || {
        out.clear();
        data_frame(payload.clone()).encode_head(&mut out);
        black_box(&out);
    })
}

fn decode() -> Box<dyn FnMut()> {
    let bytes = data_frame(Bytes::from_static(b"a short block")).encode();
    let mut input = BytesMut::new();
    Box::new(move || {
        input.extend_from_slice(black_box(&bytes));
        let frame = frame::decode(&mut input).expect("a frame as it was written");
        let frame = frame.expect("it is whole");
        black_box(Stream::read(&frame).expect("of a kind for a stream"));
    })
}

fn session(shape: Shape) -> Box<dyn FnMut()> {
    Box::new(move || {
        black_box(session::play(black_box(SESSION_BLOCKS), shape));
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_a_name_of_its_own_and_can_be_repeated() {
        for operation in Operation::ALL {
            assert_eq!(operation.name().parse(), Ok(operation));
            let mut once = operation.prepare();
            once();
            once();
        }
        assert!("".parse::<Operation>().is_err());
    }
}
