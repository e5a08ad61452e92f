//! A machine beside a peer that says anything, and a disk that takes its time.
//!
//! An input is parameters and then commands: the peer says something, an operation ends, the wire
//! takes a frame, or one of these many times over. What the peer says is mostly close to what a
//! machine expects: numbers around where the session stands, as many as the kind of frame has
//! fields, or a digest.
//!
//! Claims: no panic, and what `half.rs` watches. A machine that gives an error is not used again;
//! that is what a driver does.

use bytes::Bytes;

use super::disk::{Disk, PAYLOADS};
use super::half::Half;
use super::tape::Tape;
use super::{kind_of, session};
use crate::digest::DIGEST_LEN;
use crate::frame::{Frame, FrameKind, MAX_PAYLOAD};
use crate::message::{MessageError, Role, Stream};
use crate::sync::{MapRun, RunKind, SyncError};
use crate::units::{BlockRun, Geometry};

/// Commands of one input, repetitions counted: enough for more digests than may be ahead, and for
/// more changes than there is credit for.
const MAX_ACTS: usize = 2000;

/// The most numbers that are tried as the fields of a kind.
const MAX_FIELDS: usize = 6;

/// Plays an input to a machine of that role.
pub(super) fn beside(role: Role, tape: &mut Tape<'_>) {
    let (params, geometry) = session(tape, u64::MAX);
    let mut half = Half::new(role, params, geometry);
    let mut acts = 0;
    while !tape.is_empty() && acts < MAX_ACTS {
        let command = tape.byte();
        let times = if command & 0x80 == 0 { 0 } else { tape.byte() };
        let words = *tape;
        for _ in 0..=times {
            // The same words again, which mean other numbers as the session goes on.
            *tape = words;
            acts += 1;
            if act(command, &mut half, tape).is_err() {
                return;
            }
        }
    }
}

fn act(command: u8, half: &mut Half, tape: &mut Tape<'_>) -> Result<(), SyncError> {
    match command % 4 {
        0 => match compose(half, tape) {
            Some(frame) => half.hear(&frame),
            None => Ok(()),
        },
        1 => {
            half.transmit();
            Ok(())
        }
        which => {
            let mut disk = Whim {
                geometry: half.geometry(),
                mood: tape.byte(),
            };
            // The oldest, or any.
            let place = if which == 2 { 0 } else { tape.byte() };
            match half.ops.len() {
                0 => Ok(()),
                count => half.finish(usize::from(place) % count, &mut disk),
            }
        }
    }
}

/// What the peer says; nothing, where there is no kind of that number.
fn compose(half: &Half, tape: &mut Tape<'_>) -> Option<Frame> {
    let choice = tape.byte();
    let kind = kind_of(0x40 + choice % 16)?;
    let meta = match choice >> 4 {
        14 => half.last.as_ref()?.meta.clone(),
        15 => {
            let len = tape.below(32);
            Bytes::copy_from_slice(tape.take(len))
        }
        _ => fields(kind, half, tape),
    };
    let payload = if kind.has_payload() {
        payload(half, tape)
    } else {
        Bytes::new()
    };
    Some(Frame {
        kind,
        meta,
        payload,
    })
}

/// What the kind has as its meta: a digest, or numbers one after another.
fn fields(kind: FrameKind, half: &Half, tape: &mut Tape<'_>) -> Bytes {
    let mut frame = Frame {
        kind,
        meta: Bytes::from_static(&PAYLOADS[..DIGEST_LEN]),
        payload: Bytes::new(),
    };
    if Stream::read(&frame).is_ok() {
        return frame.meta;
    }
    frame.meta = Bytes::new();
    for _ in 0..MAX_FIELDS {
        if Stream::read(&frame) != Err(MessageError::Malformed { kind }) {
            break;
        }
        let number = number(half, tape);
        let number = postcard::to_stdvec(&number).expect("numbers always serialise");
        frame.meta = [&frame.meta[..], &number].concat().into();
    }
    frame.meta
}

/// A number at which something changes, or one close to it.
fn number(half: &Half, tape: &mut Tape<'_>) -> u64 {
    let choice = tape.byte();
    let anchor = match choice % 8 {
        0 => 0,
        1 => half.passed,
        2 => half.told,
        3 => half.geometry().block_count(),
        4 => half.spent,
        5 => half.machine.counters().blocks_settled,
        6 => u64::from(tape.word()),
        _ => u64::MAX,
    };
    let distance = u64::from(choice >> 4);
    if choice & 8 == 0 {
        anchor.wrapping_add(distance)
    } else {
        anchor.wrapping_sub(distance)
    }
}

fn payload(half: &Half, tape: &mut Tape<'_>) -> Bytes {
    let (choice, block_len) = (tape.byte(), half.geometry().block_len(half.passed));
    let len = match choice % 8 {
        0 => block_len,
        1 => 1,
        2 => block_len.saturating_sub(1),
        3 => usize::from(tape.word()),
        4 => MAX_PAYLOAD,
        5 => MAX_PAYLOAD / DIGEST_LEN * DIGEST_LEN,
        _ => return digests(choice),
    };
    Bytes::from_static(&PAYLOADS[..len])
}

/// A row of digests, those of zero blocks among them.
fn digests(choice: u8) -> Bytes {
    let count = u64::from(choice >> 3) + 1;
    let row = (0..count).flat_map(|at| [mix(at, choice) % 3; DIGEST_LEN]);
    row.collect()
}

/// A disk that has a moment's contents, and forgets what is written: a machine cannot tell. In its
/// plain moods it is data throughout, so that a few bytes of input lead far.
struct Whim {
    geometry: Geometry,
    mood: u8,
}

impl Whim {
    fn is_plain(&self) -> bool {
        self.mood & 4 == 0
    }
}

impl Disk for Whim {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn run_at(&self, from: u64) -> MapRun {
        if self.is_plain() {
            return MapRun {
                kind: RunKind::Data,
                count: u64::MAX,
            };
        }
        let choice = mix(from, self.mood);
        let kind = [RunKind::Data, RunKind::Hole][usize::from(choice % 2)];
        let count = [1, 3, 300, u64::MAX][usize::from(choice / 2 % 4)];
        MapRun { kind, count }
    }

    fn byte(&self, index: u64) -> u8 {
        if self.is_plain() {
            1
        } else {
            mix(index, self.mood) % 3
        }
    }

    fn write(&mut self, _index: u64, _byte: u8) {}

    fn zero(&mut self, _run: BlockRun) {}

    fn mood(&self) -> u8 {
        self.mood
    }
}

/// A byte that looks like chance, and is the same each time.
fn mix(index: u64, salt: u8) -> u8 {
    let mixed = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ u64::from(salt) << 32);
    mixed.to_le_bytes()[7]
}
