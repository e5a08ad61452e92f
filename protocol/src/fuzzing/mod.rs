//! What fuzzing claims: bodies that take any bytes, and panic when a claim is false.
//!
//! ```text
//!   fuzz/fuzz_targets/NAME.rs ─┐
//!                              ├─► fuzzing::NAME(bytes) ─► the crate, as a driver calls it
//!   tests/fuzz.rs ─────────────┘
//! ```
//!
//! They lie in the crate so that both see the same, and so that a change of the crate which they do
//! not follow does not compile. Nothing here is for users of the crate. No body names a kind of
//! frame where it can go by [`FrameKind::ALL`], so that a new kind is fuzzed without a change.

mod disk;
mod half;
mod pair;
mod peer;
mod tape;

use bytes::{Bytes, BytesMut};

use crate::digest::{HashKind, Seed};
use crate::frame::{self, Frame, FrameError, FrameKind, HEAD_LEN, MAX_META, MAX_PAYLOAD};
use crate::message::{Control, MessageError, Role, SessionParams, Stream};
use crate::preamble::{self, MAGIC, MAX_NOISE, PREAMBLE_LEN, Preamble, PreambleError, Versions};
use crate::sync::Order;
use crate::units::{BLOCK_SIZE, Geometry, MAX_DISK_SIZE};
use tape::Tape;

/// A stream of bytes is cut into frames: the first byte says how many of the following are lengths
/// of the pieces in which the rest arrives.
///
/// Claims: however it arrives, the same frames and the same error come out; the frames are written
/// as the bytes that were consumed; the buffer does not grow beyond two of the largest frames. Put
/// in order as if three connections had brought them, no frame comes out that did not come in.
pub fn frame(data: &[u8]) {
    let mut tape = Tape::new(data);
    let count = tape.below(64);
    let cuts = tape.take(count);
    let stream = tape.rest();

    let whole = cut_into_frames(stream, &[]);
    assert!(cut_into_frames(stream, cuts) == whole, "pieces of {cuts:?}");
    let (frames, error, consumed) = whole;
    let again: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
    assert!(again == stream[..consumed], "other bytes than came");
    put_in_order(&frames);
    if let Some(error) = error {
        assert!(error.to_string().len() < 200);
    }
}

fn put_in_order(frames: &[Frame]) {
    let mut order = Order::default();
    let mut came_in: Vec<&Frame> = Vec::new();
    for (frame, from) in frames.iter().zip((0..3).cycle()) {
        if order.take(from, frame).is_err() {
            return;
        }
        came_in.push(frame);
        while let Some(out) = order.next_frame() {
            let at = came_in.iter().position(|frame| **frame == out);
            came_in.swap_remove(at.expect("a frame that came in"));
        }
    }
}

fn cut_into_frames(stream: &[u8], cuts: &[u8]) -> (Vec<Frame>, Option<FrameError>, usize) {
    let most = 2 * (HEAD_LEN + MAX_META + MAX_PAYLOAD + stream.len());
    let mut input = BytesMut::new();
    let mut frames = Vec::new();
    for piece in pieces(stream, cuts) {
        input.extend_from_slice(piece);
        loop {
            let decoded = frame::decode(&mut input);
            assert!(input.capacity() <= most, "{} reserved", input.capacity());
            match decoded {
                Ok(Some(frame)) => {
                    assert!(frame.payload.is_empty() || frame.kind.has_payload());
                    frames.push(frame);
                }
                Ok(None) => break,
                Err(error) => {
                    let consumed = frames.iter().map(Frame::wire_len).sum();
                    return (frames, Some(error), consumed);
                }
            }
        }
    }
    let consumed = frames.iter().map(Frame::wire_len).sum();
    assert_eq!(stream.len() - consumed, input.len(), "bytes were lost");
    (frames, None, consumed)
}

/// `stream` in pieces of the lengths `cuts`, and what is left as one.
fn pieces<'a>(mut stream: &'a [u8], cuts: &[u8]) -> impl Iterator<Item = &'a [u8]> {
    let lens: Vec<_> = cuts.iter().map(|cut| usize::from(*cut)).collect();
    lens.into_iter().chain([usize::MAX]).map(move |len| {
        let (piece, rest) = stream.split_at(len.min(stream.len()));
        stream = rest;
        piece
    })
}

/// A connection opens, perhaps behind what a login shell prints. The first byte says how much of
/// that there is beforehand, so that a small input comes to the limit, the second how many of the
/// following are lengths of pieces.
///
/// Claims: however it arrives, the same comes out; it is the noise, the preamble and the rest, and
/// they are written as what came; noise is bounded, and so is what an error shows of it; two ends
/// negotiate the same version, which both understand.
pub fn preamble(data: &[u8]) {
    let mut tape = Tape::new(data);
    let noise = match tape.byte() {
        few @ 0..=239 => usize::from(few),
        many => MAX_NOISE - 8 + usize::from(many - 240),
    };
    let count = tape.below(8);
    let cuts = tape.take(count);
    let mut stream = vec![b'.'; noise];
    stream.extend_from_slice(tape.rest());

    let whole = find(&stream, 0, &[]);
    let split = find(&stream, noise, cuts);
    assert!(split == whole, "pieces of {cuts:?}");
    match whole {
        Ok(Some((found, noise, rest))) => {
            assert!(noise.len() <= MAX_NOISE);
            let again = [&noise[..], &found.encode(), &rest].concat();
            assert!(again == stream, "other bytes than came");
            negotiate(found.versions, tape);
        }
        Ok(None) => assert!(stream.len() < MAX_NOISE + MAGIC.len() + PREAMBLE_LEN),
        Err(error) => {
            assert!(error.to_string().len() < 500, "{error}");
            let misses = matches!(error, PreambleError::NotFound { .. });
            assert!(!misses || stream.len() > MAX_NOISE);
        }
    }
}

/// A preamble that was found, what was before it, and what came after it.
type Found = Result<Option<(Preamble, Bytes, Bytes)>, PreambleError>;

fn find(stream: &[u8], at_once: usize, cuts: &[u8]) -> Found {
    let (first, later) = stream.split_at(at_once);
    let mut input = BytesMut::from(first);
    for piece in pieces(later, cuts) {
        let known = input.len();
        input.extend_from_slice(piece);
        if let Some((found, noise)) = preamble::find(&mut input)? {
            let rest = &stream[noise.len() + PREAMBLE_LEN..];
            assert!(rest.starts_with(&input), "bytes were lost");
            return Ok(Some((found, noise, Bytes::copy_from_slice(rest))));
        }
        assert_eq!(input.len(), known + piece.len(), "an incomplete one stays");
    }
    Ok(None)
}

fn negotiate(ours: Versions, mut tape: Tape<'_>) {
    let (one, other) = (tape.word(), tape.word());
    let theirs = Versions {
        min: one.min(other),
        max: one.max(other),
    };
    let knows = |range: Versions, version| (range.min..=range.max).contains(&version);
    match (ours.negotiate(theirs), theirs.negotiate(ours)) {
        (Ok(version), Ok(same)) => {
            assert_eq!(version, same);
            assert!(knows(ours, version) && knows(theirs, version));
            let newer = version.saturating_add(1);
            assert!(newer == version || !knows(ours, newer) || !knows(theirs, newer));
        }
        (Err(_), Err(_)) => assert!(ours.max < theirs.min || theirs.max < ours.min),
        (one, other) => panic!("{ours} and {theirs} do not agree: {one:?}, {other:?}"),
    }
}

/// The first byte is the kind of a frame, the rest its meta.
///
/// Claims: a frame is a message of one sort of connection at most; what can be read fits a frame
/// again, in no more bytes (postcard reads numbers that are longer than need be, and writes none),
/// and reads as the same, but not with a byte more.
pub fn message(data: &[u8]) {
    let Some((kind, meta)) = data.split_first() else {
        return;
    };
    let Some(kind) = kind_of(*kind) else { return };
    let frame = Frame {
        kind,
        meta: Bytes::copy_from_slice(&meta[..meta.len().min(MAX_META)]),
        payload: Bytes::new(),
    };
    let foreign = MessageError::Misplaced { kind };
    let again = if kind.is_data() {
        assert_eq!(Control::read(&frame), Err(foreign));
        comes_back(&frame, Stream::read, Stream::frame)
    } else {
        assert_eq!(Stream::read(&frame), Err(foreign));
        comes_back(&frame, Control::read, Control::frame)
    };
    if let Some(again) = again {
        let mut wire = BytesMut::from(&again.encode()[..]);
        assert_eq!(frame::decode(&mut wire), Ok(Some(again)));
    }
}

/// Reads a message, writes it, and reads it again.
fn comes_back<M: PartialEq + std::fmt::Debug>(
    frame: &Frame,
    read: fn(&Frame) -> Result<M, MessageError>,
    write: fn(&M) -> Result<Frame, MessageError>,
) -> Option<Frame> {
    let message = match read(frame) {
        Ok(message) => message,
        Err(error) => {
            let kind = frame.kind;
            assert_eq!(error, MessageError::Malformed { kind });
            return None;
        }
    };
    let again = write(&message).expect("it came out of a frame, so it fits one");
    assert_eq!(again.kind, frame.kind);
    assert!(again.meta.len() <= frame.meta.len());
    assert_eq!(read(&again), Ok(message));
    let longer = Frame {
        meta: [&again.meta[..], &[0]].concat().into(),
        ..again.clone()
    };
    let kind = frame.kind;
    assert_eq!(read(&longer), Err(MessageError::Malformed { kind }));
    Some(again)
}

/// The kind with a number of the wire.
fn kind_of(number: u8) -> Option<FrameKind> {
    FrameKind::ALL
        .into_iter()
        .find(|kind| *kind as u8 == number)
}

/// A session of any parameters: a sender or a receiver whose peer says anything, or both with each
/// other. The first byte says which; what a session is and what is claimed of it is said in
/// `peer.rs` and `pair.rs`.
pub fn operations(data: &[u8]) {
    let mut tape = Tape::new(data);
    match tape.below(3) {
        0 => peer::beside(Role::Sender, &mut tape),
        1 => peer::beside(Role::Receiver, &mut tape),
        _ => pair::converges(&mut tape),
    }
}

/// Parameters, of which the first byte says most, and the size of a disk, at most `blocks` long or
/// the largest there may be.
fn session(tape: &mut Tape<'_>, blocks: u64) -> (SessionParams, Geometry) {
    let choices = tape.byte();
    let chosen = |bit: u8| choices & bit != 0;
    let count = match choices >> 6 {
        0 | 1 => u64::from(tape.byte()),
        2 => u64::from(tape.word()),
        _ => MAX_DISK_SIZE / BLOCK_SIZE,
    };
    // The last block is short, or not.
    let missing = if chosen(8) { tape.word() } else { 0 };
    let size = (count.min(blocks) * BLOCK_SIZE).saturating_sub(missing.into());
    let params = SessionParams {
        size,
        hash: if chosen(1) {
            HashKind::Blake3
        } else {
            HashKind::Xxh3
        },
        seed: Seed([choices; 32]),
        compare: !chosen(2),
        ship: !chosen(4),
    };
    let geometry = Geometry::new(size).expect("no longer than the largest disk");
    (params, geometry)
}
