//! Two machines with each other, and two disks that remember.
//!
//! An input is parameters, what the disks hold, and the order in which things happen; when it has
//! run out, all that is left happens.
//!
//! Claims, besides what `half.rs` watches: neither end gives an error; the session ends; then the
//! destination reads as the source, or, where nothing was to be shipped, as before; and both ends
//! say so.

use std::collections::VecDeque;

use super::disk::Disk;
use super::half::Half;
use super::session;
use super::tape::Tape;
use crate::frame::Frame;
use crate::message::{Role, SessionParams};
use crate::sync::{MapRun, Outcome, RunKind};
use crate::units::{BlockRun, Geometry};

/// Blocks of the largest disks: more than there is credit for, and as many as a few dozen windows.
const MAX_BLOCKS: u64 = 600;

/// Decisions about the order that are taken from one input.
const MAX_ACTS: usize = 4000;

/// Plays the session of an input.
pub(super) fn converges(tape: &mut Tape<'_>) {
    let (params, geometry) = session(tape, MAX_BLOCKS);
    let (source, destination) = images(params, geometry, tape);
    let mut pair = [
        End::new(Role::Sender, params, source.clone()),
        End::new(Role::Receiver, params, destination.clone()),
    ];
    for _ in 0..MAX_ACTS {
        if tape.is_empty() {
            break;
        }
        let command = tape.byte();
        step(&mut pair, usize::from(command % 2), command / 2 % 4, tape);
    }
    while pair.iter().any(|end| end.half.machine.outcome().is_none()) {
        assert!(round(&mut pair, tape), "nothing is left to happen");
    }
    assert!(!round(&mut pair, tape), "something is left to happen");
    check(params, &source, &destination, &pair);
}

/// What the two disks hold: a row of bytes, over and over. Half of a byte is the source's block,
/// the other half the destination's.
fn images(params: SessionParams, geometry: Geometry, tape: &mut Tape<'_>) -> (Image, Image) {
    let len = tape.below(64) + 1;
    let row = match tape.take(len) {
        [] => &[0],
        row => row,
    };
    let fill = |nibble: u8| match nibble {
        0 => None,
        n => Some(n - 1),
    };
    let theirs = |byte: u8| match byte >> 4 {
        _ if !params.compare => None,
        15 => fill(byte % 16),
        nibble => fill(nibble),
    };
    let image = |fills: &dyn Fn(u8) -> Option<u8>| Image {
        geometry,
        blocks: (0..geometry.block_count())
            .zip(row.iter().cycle())
            .map(|(_, byte)| fills(*byte))
            .collect(),
        mood: 0,
    };
    (image(&|byte| fill(byte % 16)), image(&theirs))
}

/// One end: its machine, its disk, and what is on its way to it.
struct End {
    half: Half,
    disk: Image,
    pipe: VecDeque<Frame>,
}

impl End {
    fn new(role: Role, params: SessionParams, disk: Image) -> Self {
        Self {
            half: Half::new(role, params, disk.geometry),
            disk,
            pipe: VecDeque::new(),
        }
    }
}

/// One thing happens at an end, if it can.
fn step(pair: &mut [End; 2], at: usize, what: u8, tape: &mut Tape<'_>) -> bool {
    let end = &mut pair[at];
    match what {
        0 => {
            let Some(frame) = end.half.transmit() else {
                return false;
            };
            pair[1 - at].pipe.push_back(frame);
        }
        1 => {
            let Some(frame) = end.pipe.pop_front() else {
                return false;
            };
            let heard = end.half.hear(&frame);
            heard.expect("neither end breaks the protocol");
        }
        _ => {
            let count = end.half.ops.len();
            if count == 0 {
                return false;
            }
            end.disk.mood = tape.byte();
            let place = tape.below(count);
            let finished = end.half.finish(place, &mut end.disk);
            finished.expect("the disks hold still, so the roots agree");
        }
    }
    true
}

/// Everything happens that can; whether that was anything.
fn round(pair: &mut [End; 2], tape: &mut Tape<'_>) -> bool {
    let mut any = false;
    for at in [0, 1] {
        for what in [0, 1, 2] {
            while step(pair, at, what, tape) {
                any = true;
            }
        }
    }
    any
}

fn check(params: SessionParams, source: &Image, before: &Image, pair: &[End; 2]) {
    let outcome = |end: &End| end.half.machine.outcome().expect("the session is over");
    let [sender, receiver]: [Outcome; 2] = [outcome(&pair[0]), outcome(&pair[1])];
    let after = &pair[1].disk;
    let expected = if params.ship { source } else { before };
    let mut indices = 0..source.geometry.block_count();
    assert!(
        indices
            .clone()
            .all(|at| after.byte(at) == expected.byte(at)),
        "the destination is not what it should be"
    );
    let differ = |at: &u64| source.byte(*at) != before.byte(*at);
    let differences = indices.clone().filter(differ).count() as u64;
    assert_eq!(
        sender.counters.blocks_changed + sender.counters.blocks_zeroed,
        differences
    );
    assert_eq!(sender.first_difference, indices.find(differ));
    assert_eq!(
        sender.root == receiver.root,
        params.ship || differences == 0
    );
    assert_eq!(
        [sender, receiver].map(|end| end.counters.blocks_settled),
        [source.geometry.block_count(); 2]
    );
}

/// A disk, block by block: a hole, or what byte a block holds.
#[derive(Debug, Clone)]
struct Image {
    geometry: Geometry,
    blocks: Vec<Option<u8>>,
    mood: u8,
}

impl Image {
    fn at(&mut self, index: u64) -> &mut Option<u8> {
        &mut self.blocks[place(index)]
    }
}

fn place(index: u64) -> usize {
    usize::try_from(index).expect("MAX_BLOCKS is small")
}

impl Disk for Image {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn run_at(&self, from: u64) -> MapRun {
        let rest = &self.blocks[place(from)..];
        let is_hole = rest[0].is_none();
        let alike = rest.iter().take_while(|block| block.is_none() == is_hole);
        MapRun {
            kind: if is_hole {
                RunKind::Hole
            } else {
                RunKind::Data
            },
            count: alike.count() as u64,
        }
    }

    fn byte(&self, index: u64) -> u8 {
        self.blocks[place(index)].unwrap_or(0)
    }

    fn write(&mut self, index: u64, byte: u8) {
        *self.at(index) = Some(byte);
    }

    fn zero(&mut self, run: BlockRun) {
        for index in run.first..run.end() {
            *self.at(index) = None;
        }
    }

    fn mood(&self) -> u8 {
        self.mood
    }
}
