//! Frames as anybody may write them, right or wrong: bytes, so that nothing is checked here.

use kvm_clone_protocol::digest::Digest;
use kvm_clone_protocol::frame::FrameKind;
use kvm_clone_protocol::message::{
    Agreed, Beat, Credit, Data, Digests, Encoding, End, Holes, Message, Settled, Zeros,
};
use kvm_clone_protocol::units::BlockRun;

/// A frame with these fields in its head, and nothing behind it.
#[must_use]
pub fn head(len: u32, kind: u8, flags: u8, meta_len: u16) -> Vec<u8> {
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(meta_len.to_le_bytes());
    bytes
}

/// A frame whose head is right, with any meta and payload.
///
/// # Panics
/// When they are too long for the fields of the head.
#[must_use]
pub fn frame(kind: FrameKind, meta: &[u8], payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(meta.len() + payload.len()).expect("a frame's length is 32 bits");
    let meta_len = u16::try_from(meta.len()).expect("meta's length is 16 bits");
    let mut bytes = head(len, kind as u8, 0, meta_len);
    bytes.extend_from_slice(meta);
    bytes.extend_from_slice(payload);
    bytes
}

/// A message, as its own side would send it.
///
/// # Panics
/// When it does not fit a frame.
#[must_use]
pub fn message(message: &impl Message) -> Vec<u8> {
    with_payload(message, &[])
}

/// A message with bytes behind it.
///
/// # Panics
/// When it does not fit a frame.
#[must_use]
pub fn with_payload<M: Message>(message: &M, payload: &[u8]) -> Vec<u8> {
    let meta = message.frame().expect("the message fits a frame").meta;
    frame(M::KIND, &meta, payload)
}

/// A block as it is.
#[must_use]
pub fn raw(index: u64, payload: &[u8]) -> Vec<u8> {
    let encoding = Encoding::Raw;
    with_payload(&Data { index, encoding }, payload)
}

/// A block, compressed.
#[must_use]
pub fn zstd(index: u64, payload: &[u8]) -> Vec<u8> {
    let encoding = Encoding::Zstd;
    with_payload(&Data { index, encoding }, payload)
}

#[must_use]
pub fn zeros(first: u64, count: u64) -> Vec<u8> {
    let run = BlockRun { first, count };
    message(&Zeros { run })
}

#[must_use]
pub fn settled(next: u64) -> Vec<u8> {
    message(&Settled { next })
}

#[must_use]
pub fn end(root: [u8; 16]) -> Vec<u8> {
    message(&End { root: Digest(root) })
}

/// So many digests that no block has.
#[must_use]
pub fn digests(first: u64, count: usize) -> Vec<u8> {
    with_payload(&Digests { first }, &vec![0x77; count * 16])
}

#[must_use]
pub fn holes(first: u64, count: u64) -> Vec<u8> {
    let run = BlockRun { first, count };
    message(&Holes { run })
}

#[must_use]
pub fn credit(consumed: u64) -> Vec<u8> {
    message(&Credit { consumed })
}

#[must_use]
pub fn agreed(root: [u8; 16]) -> Vec<u8> {
    message(&Agreed { root: Digest(root) })
}

#[must_use]
pub fn beat() -> Vec<u8> {
    message(&Beat {})
}

/// A zstd frame as RFC 8878 has it, of one byte repeated: four bytes for each piece of at most
/// 128 KiB.
#[derive(Debug, Clone)]
pub struct Repeated {
    /// The byte.
    pub byte: u8,
    /// How often, in pieces.
    pub pieces: Vec<u32>,
    /// What the frame says of its size.
    pub claims: Option<u64>,
    /// The window that it asks for, as a power of two.
    pub window_log: u8,
    /// It says that a checksum follows, and has this.
    pub checksum: Option<[u8; 4]>,
    /// It asks for this dictionary.
    pub dictionary: Option<u8>,
}

impl Repeated {
    /// A frame that says nothing of its size.
    #[must_use]
    pub fn new(byte: u8, pieces: &[u32]) -> Self {
        Self {
            byte,
            pieces: pieces.to_vec(),
            claims: None,
            window_log: 17,
            checksum: None,
            dictionary: None,
        }
    }

    /// The bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = 0xfd2f_b528_u32.to_le_bytes().to_vec();
        bytes.push(
            (u8::from(self.claims.is_some()) * 0xc0)
                | (u8::from(self.checksum.is_some()) << 2)
                | u8::from(self.dictionary.is_some()),
        );
        bytes.push((self.window_log - 10) << 3);
        bytes.extend(self.dictionary);
        bytes.extend(self.claims.into_iter().flat_map(u64::to_le_bytes));
        for (at, len) in self.pieces.iter().enumerate() {
            let is_last = u32::from(at + 1 == self.pieces.len());
            // A block that repeats one byte is of type 1.
            let head = is_last | 1 << 1 | len << 3;
            bytes.extend_from_slice(&head.to_le_bytes()[..3]);
            bytes.push(self.byte);
        }
        bytes.extend(self.checksum.into_iter().flatten());
        bytes
    }
}
