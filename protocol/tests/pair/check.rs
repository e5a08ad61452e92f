//! One session, held against what the two images say must come of it.

use kvm_clone_protocol::message::{Counters, SessionParams};
use kvm_clone_protocol::sync::Outcome;
use kvm_clone_protocol::units::BlockRun;

use crate::disk::FakeDisk;
use crate::pair::{Finished, Pair, Schedule, Trace};

/// What the images say before a session.
struct Foreseen {
    before: FakeDisk,
    changed: u64,
    zeroed: u64,
    bytes_changed: u64,
    first_difference: Option<u64>,
}

impl Foreseen {
    fn new(source: &FakeDisk, destination: &FakeDisk) -> Self {
        let differences = source.differences(destination);
        let zeroed = differences.iter().filter(|at| source.is_zero(**at)).count() as u64;
        let lens = differences.iter().map(|at| {
            let run = BlockRun {
                first: *at,
                count: 1,
            };
            source.geometry().byte_range(run).1
        });
        Self {
            before: destination.clone(),
            changed: differences.len() as u64 - zeroed,
            zeroed,
            bytes_changed: lens.sum(),
            first_difference: differences.first().copied(),
        }
    }
}

/// Plays one session and checks everything that is known of its end; `None` when a fault of the
/// schedule ended it.
pub(crate) fn session(
    params: SessionParams,
    source: &mut FakeDisk,
    destination: &mut FakeDisk,
    schedule: Schedule,
    trace: &mut Trace,
) -> Option<Finished> {
    let foreseen = Foreseen::new(source, destination);
    destination.touched = 0;
    let finished = Pair::new(params, source, destination, schedule, trace).run()?;
    check_sender(params, &foreseen, source, &finished.sender);
    check_receiver(params, &foreseen, destination, &finished);
    if params.ship {
        assert!(source == destination, "the destination differs");
        assert_eq!(finished.receiver.root, finished.sender.root);
        assert_eq!(
            destination.allocated(),
            source.nonzero(),
            "holes are where the source reads zeros"
        );
    } else {
        assert!(*destination == foreseen.before, "a comparison wrote");
        assert_eq!(destination.touched, 0);
    }
    let wires = [&finished.sender, &finished.receiver].map(|end| end.counters.bytes_wire);
    assert_eq!(wires, [finished.tally.wire; 2]);
    let shipped = if params.ship { foreseen.changed } else { 0 };
    assert_eq!(finished.tally.data_frames, shipped);
    Some(finished)
}

fn check_sender(params: SessionParams, foreseen: &Foreseen, source: &FakeDisk, outcome: &Outcome) {
    assert_eq!(
        outcome.counters,
        Counters {
            bytes_data: source.allocated_bytes(),
            bytes_read: source.allocated_bytes(),
            bytes_trusted: 0,
            bytes_wire: outcome.counters.bytes_wire,
            blocks_settled: source.geometry().block_count(),
            blocks_changed: foreseen.changed,
            blocks_zeroed: foreseen.zeroed,
            bytes_changed: foreseen.bytes_changed,
        }
    );
    assert_eq!(outcome.first_difference, foreseen.first_difference);
    assert_eq!(outcome.root, source.root(), "{params:?}");
}

fn check_receiver(
    params: SessionParams,
    foreseen: &Foreseen,
    destination: &FakeDisk,
    finished: &Finished,
) {
    let (counters, theirs) = (finished.receiver.counters, finished.sender.counters);
    let data = if params.compare {
        foreseen.before.allocated_bytes()
    } else {
        0
    };
    assert_eq!(
        (counters.bytes_data, counters.bytes_read),
        (data, data),
        "each block is read once"
    );
    assert_eq!(counters.blocks_settled, theirs.blocks_settled);
    let changes = |c: Counters| (c.blocks_changed, c.blocks_zeroed, c.bytes_changed);
    let expected = if params.ship {
        changes(theirs)
    } else {
        (0, 0, 0)
    };
    assert_eq!(changes(counters), expected);
    assert_eq!(finished.receiver.root, destination.root());
}

/// A session after one that ended well finds nothing to do.
pub(crate) fn nothing_is_left_to_do(
    params: SessionParams,
    source: &mut FakeDisk,
    destination: &mut FakeDisk,
    schedule: Schedule,
    trace: &mut Trace,
) {
    let params = SessionParams {
        compare: true,
        ship: true,
        ..params
    };
    let again =
        session(params, source, destination, schedule, trace).expect("this schedule has no faults");
    assert_eq!(destination.touched, 0, "an equal destination was written");
    assert_eq!(again.tally.payload, 0);
}
