//! Frames: the unit on the wire.
//!
//! ```text
//!  0         4      5       6            8              8+meta_len    8+len
//!  | len     | kind | flags | meta_len   | meta         | payload     |
//!  | u32 LE  | u8   | 0     | u16 LE     | postcard     | raw bytes   |
//! ```
//!
//! `len` counts meta and payload. Block data and digests are payload and never pass through
//! serde. Every length is compared with a limit of this module before a byte is reserved for it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;

use crate::preamble::SUPPORTED;

/// Bytes ahead of meta and payload.
pub const HEAD_LEN: usize = 8;

/// The most bytes of meta: what its length field can say. A request to dial carries host keys.
pub const MAX_META: usize = 64 * 1024 - 1;

/// The most bytes of payload: one block that compression made no smaller, with room for the
/// encoder's own framing, or the digests of 4096 blocks.
pub const MAX_PAYLOAD: usize = 64 * 1024 + 1024;

/// What a frame is. Kinds below 0x40 travel on control connections only, the others on data
/// connections only; a relay ends at anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(
    missing_docs,
    reason = "each kind is the message of the same name in `message`"
)]
pub enum FrameKind {
    Hello = 0x01,
    Welcome = 0x02,
    Open = 0x03,
    Opened = 0x04,
    Listen = 0x05,
    Listening = 0x06,
    Dial = 0x07,
    Dialed = 0x08,
    Start = 0x09,
    Started = 0x0a,
    Progress = 0x0b,
    Ended = 0x0c,
    Prepare = 0x0d,
    Prepared = 0x0e,
    Commit = 0x0f,
    Committed = 0x10,
    Abort = 0x11,
    Failed = 0x12,
    Alive = 0x13,
    Warning = 0x14,
    Recover = 0x15,
    Leftover = 0x16,
    Recovered = 0x17,
    Preserve = 0x18,
    Preserved = 0x19,
    Summarize = 0x1a,
    Summary = 0x1b,

    Digests = 0x40,
    Holes = 0x41,
    Data = 0x42,
    Zeros = 0x43,
    Settled = 0x44,
    Credit = 0x45,
    End = 0x46,
    Agreed = 0x47,
    Beat = 0x48,
    Place = 0x49,
}

impl FrameKind {
    /// Every kind, in the order of their numbers.
    pub const ALL: [Self; 37] = [
        Self::Hello,
        Self::Welcome,
        Self::Open,
        Self::Opened,
        Self::Listen,
        Self::Listening,
        Self::Dial,
        Self::Dialed,
        Self::Start,
        Self::Started,
        Self::Progress,
        Self::Ended,
        Self::Prepare,
        Self::Prepared,
        Self::Commit,
        Self::Committed,
        Self::Abort,
        Self::Failed,
        Self::Alive,
        Self::Warning,
        Self::Recover,
        Self::Leftover,
        Self::Recovered,
        Self::Preserve,
        Self::Preserved,
        Self::Summarize,
        Self::Summary,
        Self::Digests,
        Self::Holes,
        Self::Data,
        Self::Zeros,
        Self::Settled,
        Self::Credit,
        Self::End,
        Self::Agreed,
        Self::Beat,
        Self::Place,
    ];

    fn from_wire(byte: u8) -> Result<Self, FrameError> {
        Self::ALL
            .into_iter()
            .find(|kind| *kind as u8 == byte && kind.since() <= SUPPORTED.max)
            .ok_or(FrameError::UnknownKind { kind: byte })
    }

    /// The oldest protocol version that has it. None is sent on a connection of an older one.
    pub fn since(self) -> u16 {
        match self {
            Self::Preserve | Self::Preserved | Self::Summarize | Self::Summary => 3,
            _ => SUPPORTED.min,
        }
    }

    /// Whether frames of this kind belong on a data connection.
    pub fn is_data(self) -> bool {
        self as u8 >= 0x40
    }

    /// Only these carry raw bytes behind their meta.
    pub fn has_payload(self) -> bool {
        matches!(self, Self::Digests | Self::Data)
    }
}

/// One frame, its meta not yet decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// The message's fields, in postcard.
    pub meta: Bytes,
    /// Raw bytes, for the kinds that have them.
    pub payload: Bytes,
}

/// Bytes that are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "the fields are what the message says")]
pub enum FrameError {
    #[error("a frame of unknown kind {kind:#04x}")]
    UnknownKind { kind: u8 },
    #[error("a {kind:?} frame with unknown flags {flags:#04x}")]
    UnknownFlags { kind: FrameKind, flags: u8 },
    #[error("a {kind:?} frame of {len} bytes with {meta_len} bytes of meta: over the limit")]
    TooLong {
        kind: FrameKind,
        len: usize,
        meta_len: usize,
    },
    #[error("a {kind:?} frame whose meta of {meta_len} bytes is longer than its {len} bytes")]
    MetaOverrun {
        kind: FrameKind,
        len: usize,
        meta_len: usize,
    },
    #[error("a {kind:?} frame with a payload of {len} bytes, which this kind has not")]
    UnexpectedPayload { kind: FrameKind, len: usize },
}

impl Frame {
    /// Bytes that this frame takes on the wire.
    pub fn wire_len(&self) -> usize {
        HEAD_LEN + self.meta.len() + self.payload.len()
    }

    /// Appends head and meta to `out`; the payload follows them on the wire, and is left to the
    /// caller so that bulk bytes need not be copied.
    pub fn encode_head(&self, out: &mut BytesMut) {
        let len = self.meta.len() + self.payload.len();
        out.reserve(HEAD_LEN + self.meta.len());
        out.put_u32_le(u32::try_from(len).expect("bounded by MAX_META and MAX_PAYLOAD"));
        out.put_u8(self.kind as u8);
        out.put_u8(0);
        out.put_u16_le(u16::try_from(self.meta.len()).expect("bounded by MAX_META"));
        out.put_slice(&self.meta);
    }

    /// The whole frame.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.wire_len());
        self.encode_head(&mut out);
        out.put_slice(&self.payload);
        out.freeze()
    }
}

/// Takes one frame from the front of `input`; `None` means that more bytes are needed.
///
/// # Errors
/// [`FrameError`] for anything that no sender of this protocol makes. The connection is of no
/// use after that.
pub fn decode(input: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let Some(head) = input.first_chunk::<HEAD_LEN>() else {
        return Ok(None);
    };
    let mut head = &head[..];
    let len = usize::try_from(head.get_u32_le()).unwrap_or(usize::MAX);
    let kind = FrameKind::from_wire(head.get_u8())?;
    let flags = head.get_u8();
    let meta_len = usize::from(head.get_u16_le());
    if flags != 0 {
        return Err(FrameError::UnknownFlags { kind, flags });
    }
    let Some(payload_len) = len.checked_sub(meta_len) else {
        return Err(FrameError::MetaOverrun {
            kind,
            len,
            meta_len,
        });
    };
    if payload_len > MAX_PAYLOAD {
        return Err(FrameError::TooLong {
            kind,
            len,
            meta_len,
        });
    }
    if payload_len > 0 && !kind.has_payload() {
        return Err(FrameError::UnexpectedPayload {
            kind,
            len: payload_len,
        });
    }
    if input.len() < HEAD_LEN + len {
        input.reserve(HEAD_LEN + len - input.len());
        return Ok(None);
    }
    input.advance(HEAD_LEN);
    let meta = input.split_to(meta_len).freeze();
    let payload = input.split_to(payload_len).freeze();
    Ok(Some(Frame {
        kind,
        meta,
        payload,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(len: u32, kind: u8, flags: u8, meta_len: u16) -> BytesMut {
        let mut bytes = BytesMut::new();
        bytes.put_u32_le(len);
        bytes.put_u8(kind);
        bytes.put_u8(flags);
        bytes.put_u16_le(meta_len);
        bytes
    }

    #[test]
    fn every_kind_is_listed_once_and_comes_back() {
        for (at, kind) in FrameKind::ALL.into_iter().enumerate() {
            assert_eq!(FrameKind::from_wire(kind as u8), Ok(kind));
            assert!(!FrameKind::ALL[..at].contains(&kind));
        }
        assert!(
            FrameKind::from_wire(0).is_err(),
            "a zeroed buffer means nothing"
        );
    }

    #[test]
    fn lengths_are_refused_before_anything_is_reserved() {
        let refused = [
            (head(u32::MAX, 0x42, 0, 0), "over the limit"),
            (head(4, 0x42, 0, 5), "longer than"),
            (head(5, 0x44, 0, 4), "has not"),
            (head(0, 0x7f, 0, 0), "unknown kind"),
            (head(0, 0x42, 1, 0), "unknown flags"),
        ];
        for (mut bytes, expected) in refused {
            let error = decode(&mut bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(bytes.capacity() < 1024);
        }
    }

    #[test]
    fn a_frame_comes_back_and_leaves_what_follows() {
        let frame = Frame {
            kind: FrameKind::Data,
            meta: Bytes::from_static(b"me"),
            payload: Bytes::from_static(b"payload"),
        };
        let mut bytes = BytesMut::from(&frame.encode()[..]);
        bytes.put_slice(b"rest");
        assert_eq!(decode(&mut bytes), Ok(Some(frame)));
        assert_eq!(&bytes[..], b"rest");
    }
}
