//! One bit flipped on the wire between two agents: each time an error, or a destination that is
//! what the source is.
//!
//! `KVM_CLONE_FLIPS=1000` flips at so many random places, `KVM_CLONE_FLIPS_SEED` at others.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvm_clone_protocol::frame::{FrameKind, HEAD_LEN};
use kvm_clone_tests::hostile::ground::size_of;
use kvm_clone_tests::hostile::wire::{At, Flip, Outcome, Passage, Recorded, Way, pass};
use kvm_clone_tests::image::{self, BLOCK, Piece, Random};
use tempfile::TempDir;

/// Flips at random places, unless more are asked for.
const FLIPS: usize = 60;

/// Sessions at once: most of a flipped length is waiting for silence.
const AT_ONCE: usize = 12;

/// A pair of disks of which a session has every kind of frame.
struct Disks {
    directory: TempDir,
}

impl Disks {
    fn new() -> Self {
        let directory = TempDir::with_prefix("kc-flips-").unwrap();
        let disks = Self { directory };
        let text = |first| vec![Piece::Byte(first); 200];
        // Changed and incompressible, more than a credit; changed and compressible; zeros onto
        // data; equal; holes on both sides; a short end.
        let common = [
            Piece::Random(1, 8 * BLOCK),
            Piece::Hole(8 * BLOCK),
            Piece::Random(2, 100),
        ];
        let source = [
            vec![Piece::Random(3, 20 * BLOCK)],
            text(b's'),
            vec![Piece::Zeros(4 * BLOCK - 200), Piece::Hole(4 * BLOCK)],
            common.to_vec(),
        ];
        let destination = [
            vec![Piece::Random(4, 20 * BLOCK)],
            text(b'd'),
            vec![Piece::Zeros(4 * BLOCK - 200), Piece::Random(5, 4 * BLOCK)],
            common.to_vec(),
        ];
        image::write(&disks.path("source"), &source.concat());
        image::write(&disks.path("destination"), &destination.concat());
        disks
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// A run onto a fresh destination.
    fn pass(&self, flip: Option<Flip>, beats: bool) -> Passage {
        let directory = TempDir::with_prefix("kc-flip-").unwrap();
        let destination = directory.path().join("disk");
        // With its holes, which a copy of the file may fill.
        let bytes = fs::read(self.path("destination")).unwrap();
        let file = File::create(&destination).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (block, at) in bytes
            .chunks(size_of(BLOCK))
            .zip((0..).step_by(size_of(BLOCK)))
        {
            if block.iter().any(|byte| *byte != 0) {
                file.write_all_at(block, at).unwrap();
            }
        }
        pass(&self.path("source"), &destination, flip, beats)
    }
}

/// What came of many flips.
#[derive(Debug, Default)]
struct Tally {
    errors: BTreeMap<String, usize>,
    right: usize,
    wrong: Vec<String>,
    not_flipped: usize,
}

impl Tally {
    fn count(&mut self, flip: &Flip, passage: &Passage) {
        let flipped = passage.to_receiver.flipped || passage.to_sender.flipped;
        self.not_flipped += usize::from(!flipped);
        match &passage.outcome {
            Outcome::Error(_) if !flipped => {
                self.wrong.push(format!(
                    "{flip:?} did not happen, and {:?}",
                    passage.outcome
                ));
            }
            Outcome::Error(code) => *self.errors.entry(format!("{code:?}")).or_default() += 1,
            Outcome::Right => self.right += 1,
            Outcome::Wrong(why) => self.wrong.push(format!("{flip:?}: {why}")),
        }
    }
}

/// Plays a session for each flip, some at once.
#[expect(clippy::print_stderr, reason = "the counts are what a long run is for")]
fn play(disks: &Disks, flips: &[Flip], beats: bool) -> Tally {
    let (next, tally) = (AtomicUsize::new(0), Mutex::new(Tally::default()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(flip) = flips.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let passage = disks.pass(Some(*flip), beats);
                    tally.lock().unwrap().count(flip, &passage);
                }
            });
        }
    });
    let tally = tally.into_inner().unwrap();
    let errors: usize = tally.errors.values().sum();
    eprintln!(
        "{} flips: {errors} errors, {} right, {} wrong: {tally:?}",
        flips.len(),
        tally.right,
        tally.wrong.len()
    );
    assert!(tally.wrong.is_empty(), "{:?}", tally.wrong);
    tally
}

/// Bytes of a frame that stand for all of it: each of the head, the ends of meta, and some of the
/// payload.
fn places(frame: &[u8]) -> Vec<usize> {
    let meta = usize::from(u16::from_le_bytes([frame[6], frame[7]]));
    let payload = HEAD_LEN + meta..frame.len();
    let mut places: Vec<usize> = (0..HEAD_LEN).collect();
    if meta > 0 {
        places.extend([HEAD_LEN, HEAD_LEN + meta - 1]);
    }
    if !payload.is_empty() {
        places.extend([
            payload.start,
            (payload.start + payload.end) / 2,
            payload.end - 1,
        ]);
    }
    places
}

/// The first frame of each kind that goes one way.
fn firsts(recorded: &Recorded) -> BTreeMap<u8, (FrameKind, Vec<u8>)> {
    let mut firsts = BTreeMap::new();
    for (kind, bytes) in &recorded.units {
        if let Some(kind) = kind {
            firsts
                .entry(*kind as u8)
                .or_insert_with(|| (*kind, bytes.clone()));
        }
    }
    firsts
}

fn ways(clean: &Passage) -> [(Way, &Recorded); 2] {
    [
        (Way::ToReceiver, &clean.to_receiver),
        (Way::ToSender, &clean.to_sender),
    ]
}

/// Flips in the first frame of each kind.
fn in_every_kind(clean: &Passage, random: &mut Random, only: Option<FrameKind>) -> Vec<Flip> {
    let mut flips = Vec::new();
    for (way, recorded) in ways(clean) {
        for (kind, bytes) in firsts(recorded).into_values() {
            if only.is_some_and(|only| only != kind) {
                continue;
            }
            for place in places(&bytes) {
                let bit = u8::try_from(random.below(8)).unwrap();
                let at = At::Frame(kind, place);
                flips.push(Flip { way, at, bit });
            }
        }
    }
    flips
}

#[test]
fn a_bit_flipped_in_any_kind_of_frame_is_an_error_or_does_no_harm() {
    let disks = Disks::new();
    let clean = disks.pass(None, false);
    assert!(
        matches!(clean.outcome, Outcome::Right),
        "{:?}",
        clean.outcome
    );
    let seen: Vec<FrameKind> = ways(&clean)
        .into_iter()
        .flat_map(|(_, recorded)| firsts(recorded).into_values())
        .map(|(kind, _)| kind)
        .collect();
    let all = FrameKind::ALL.into_iter().filter(|kind| kind.is_data());
    let missing: Vec<_> = all.filter(|kind| !seen.contains(kind)).collect();
    assert_eq!(
        missing,
        [FrameKind::Beat, FrameKind::Place],
        "all but beats, and what several links need, are in a session"
    );
    let flips = in_every_kind(&clean, &mut Random::new(seed()), None);
    let tally = play(&disks, &flips, false);
    assert_eq!(tally.not_flipped, 0);
}

#[test]
fn a_bit_flipped_in_a_beat_is_an_error_or_does_no_harm() {
    let disks = Disks::new();
    let clean = disks.pass(None, true);
    assert!(
        matches!(clean.outcome, Outcome::Right),
        "{:?}",
        clean.outcome
    );
    let flips = in_every_kind(&clean, &mut Random::new(seed()), Some(FrameKind::Beat));
    assert_eq!(flips.len(), 2 * HEAD_LEN, "both ends beat");
    play(&disks, &flips, true);
}

#[test]
fn a_bit_flipped_anywhere_is_an_error_or_does_no_harm() {
    let disks = Disks::new();
    let clean = disks.pass(None, false);
    let mut random = Random::new(seed());
    let count = std::env::var("KVM_CLONE_FLIPS").map_or(FLIPS, |count| count.parse().unwrap());
    let flips: Vec<Flip> = (0..count)
        .map(|n| anywhere(&clean, &mut random, n % 2 == 0))
        .collect();
    play(&disks, &flips, false);
}

/// Any byte of the stream is as likely as any other; or any frame is, since most bytes are of
/// blocks that do not compress.
fn anywhere(clean: &Passage, random: &mut Random, by_frame: bool) -> Flip {
    let [(_, to_receiver), (_, to_sender)] = ways(clean);
    let bit = u8::try_from(random.below(8)).unwrap();
    let total = to_receiver.len() + to_sender.len();
    let mut at = usize::try_from(random.below(total as u64)).unwrap();
    if by_frame {
        let units = || to_receiver.units.iter().chain(&to_sender.units);
        let which = usize::try_from(random.below(units().count() as u64)).unwrap();
        let before: usize = units().take(which).map(|(_, bytes)| bytes.len()).sum();
        let len = units().nth(which).unwrap().1.len();
        at = before + usize::try_from(random.below(len as u64)).unwrap();
    }
    match at.checked_sub(to_receiver.len()) {
        None => Flip {
            way: Way::ToReceiver,
            at: At::Byte(at),
            bit,
        },
        Some(at) => Flip {
            way: Way::ToSender,
            at: At::Byte(at),
            bit,
        },
    }
}

fn seed() -> u64 {
    std::env::var("KVM_CLONE_FLIPS_SEED").map_or(1, |seed| seed.parse().unwrap())
}
