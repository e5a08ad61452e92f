//! Sessions with a point of their own, each under a few seeds.

use kvm_clone_protocol::digest::HashKind;
use kvm_clone_protocol::sync::{CHANGE_COST, DATA_AHEAD, DIGEST_AHEAD, MIN_DATA_AHEAD, WINDOW};
use kvm_clone_protocol::units::{BLOCK_SIZE, BlockRun};

use crate::check;
use crate::disk::{FakeDisk, Fill, Library, Packing};
use crate::pair::{Finished, Schedule, Trace};

/// A disk of `blocks` full blocks and `tail` bytes, with `fill` of each index.
fn disk(blocks: u64, tail: u64, fill: impl Fn(u64) -> Option<Fill>) -> FakeDisk {
    let library = Library::new(HashKind::Xxh3);
    let mut disk = FakeDisk::new(&library, blocks * BLOCK_SIZE + tail);
    for index in 0..disk.geometry().block_count() {
        if let Some(fill) = fill(index) {
            disk.put(index, fill);
        }
    }
    disk
}

/// Plays a session that compares, under several seeds, and returns the last.
fn sync(name: &str, source: &FakeDisk, destination: &FakeDisk, ship: bool) -> Finished {
    play(name, source, destination, true, ship)
}

fn play(
    name: &str,
    source: &FakeDisk,
    destination: &FakeDisk,
    compare: bool,
    ship: bool,
) -> Finished {
    let library = Library::new(HashKind::Xxh3);
    let size = source.geometry().size();
    let mut last = None;
    for seed in 0..5 {
        let mut trace = Trace::new(format_args!("{name}, seed {seed}"));
        let (mut source, mut destination) = (source.clone(), destination.clone());
        destination.resize(size);
        let params = library.params(size, compare, ship);
        let calm = Schedule::calm(seed);
        last = check::session(params, &mut source, &mut destination, calm, &mut trace);
        if ship {
            check::nothing_is_left_to_do(params, &mut source, &mut destination, calm, &mut trace);
        }
    }
    last.expect("a calm schedule ends well")
}

fn data(index: u64) -> Option<Fill> {
    Some(Fill::of(1 + (index % 5) as u8))
}

#[test]
fn a_first_copy_ships_the_data_and_nothing_is_told() {
    let source = disk(100, 77, |at| data(at).filter(|_| at % 10 < 3));
    let empty = disk(0, 0, |_| None);
    let done = play("first copy", &source, &empty, false, true);
    assert_eq!(done.receiver.counters.bytes_read, 0);
    assert_eq!(done.sender.counters.blocks_changed, 30 + 1);
    assert_eq!(done.sender.counters.blocks_zeroed, 0);
}

#[test]
fn the_destination_was_smaller() {
    let source = disk(40, 100, data);
    // Its last block was short, and is the beginning of what the source has there.
    let smaller = disk(20, 1000, data);
    let done = sync("smaller", &source, &smaller, true);
    assert_eq!(done.sender.counters.blocks_changed, 21);
    assert_eq!(done.sender.first_difference, Some(20));
}

#[test]
fn the_destination_was_larger() {
    let source = disk(20, 1000, data);
    let larger = disk(40, 100, data);
    let done = sync("larger", &source, &larger, true);
    assert_eq!(done.sender.first_difference, None);
}

#[test]
fn a_disk_of_no_bytes_is_a_session() {
    let empty = disk(0, 0, |_| None);
    for compare in [false, true] {
        for ship in [false, true] {
            let done = play("no bytes", &empty, &empty, compare, ship);
            assert_eq!(done.sender.counters.blocks_settled, 0);
        }
    }
}

#[test]
fn one_block_of_each_length_comes_over() {
    for tail in [1, 2, 4, 5, 4096, 65_535] {
        let source = disk(0, tail, data);
        for destination in [disk(0, 0, |_| None), disk(0, tail, |_| Some(Fill::of(9)))] {
            let done = sync("one block", &source, &destination, true);
            assert_eq!(done.sender.counters.bytes_changed, tail);
        }
    }
}

#[test]
fn a_hole_over_data_zeroes_it_in_one_frame() {
    let source = disk(300, 5, |at| (at == 299).then_some(Fill::of(1)));
    let destination = disk(300, 5, data);
    let done = sync("hole over data", &source, &destination, true);
    assert_eq!(done.sender.counters.blocks_zeroed, 300);
    assert_eq!(done.sender.counters.blocks_changed, 1);
}

#[test]
fn zeros_that_occupy_space_give_it_back_without_traffic() {
    let zeros = disk(200, 0, |_| Some(Fill::ZERO));
    let done = sync("zeros", &zeros, &zeros, true);
    assert_eq!(done.sender.counters.bytes_changed, 0);
    assert_eq!(done.tally.data_frames, 0);
}

#[test]
fn a_comparison_tells_the_first_difference_and_writes_nothing() {
    let source = disk(100, 3, data);
    let mut destination = source.clone();
    destination.put(60, Fill::of(99));
    destination.put(61, Fill::ZERO);
    destination.put(100, Fill::of(99));
    destination.punch(BlockRun {
        first: 70,
        count: 4,
    });
    let done = sync("diff", &source, &destination, false);
    assert_eq!(done.sender.first_difference, Some(60));
    assert_eq!(done.sender.counters.blocks_changed, 7);
    assert_eq!(done.sender.counters.bytes_changed, 6 * BLOCK_SIZE + 3);
    assert_eq!(done.tally.payload, 0);
    assert_ne!(done.sender.root, done.receiver.root);
}

#[test]
fn a_comparison_of_equal_disks_agrees_on_the_root() {
    let source = disk(100, 3, data);
    let done = sync("verify", &source, &source, false);
    assert_eq!(done.sender.first_difference, None);
    assert_eq!(done.sender.root, done.receiver.root);
}

#[test]
fn a_comparison_with_nothing_counts_all_data() {
    let source = disk(50, 0, |at| data(at).filter(|_| at > 9));
    let empty = disk(0, 0, |_| None);
    let done = play("diff with nothing", &source, &empty, false, false);
    assert_eq!(done.sender.first_difference, Some(10));
    assert_eq!(done.sender.counters.blocks_changed, 40);
}

/// 2^46 bytes with a few blocks in them: the cost follows what is there.
#[test]
fn huge_holes_cost_nothing() {
    let library = Library::new(HashKind::Xxh3);
    let size = 1 << 46;
    let mut source = FakeDisk::new(&library, size);
    let mut destination = FakeDisk::new(&library, size);
    for index in [0, 1 << 20, (1 << 29) + 7] {
        source.put(index, Fill::of(1));
        destination.put(index + 1000, Fill::of(2));
    }
    for destination in [FakeDisk::new(&library, size), destination] {
        let done = sync("huge", &source, &destination, true);
        assert!(done.tally.steps < 300, "{} steps", done.tally.steps);
        assert!(
            done.tally.wire < 4 * BLOCK_SIZE,
            "{} bytes",
            done.tally.wire
        );
        assert_eq!(done.sender.counters.blocks_settled, size / BLOCK_SIZE);
    }
}

/// More digests than may be told ahead, in pieces that do not merge.
#[test]
fn a_quick_destination_tells_no_more_than_the_window() {
    let blocks = 2 * DIGEST_AHEAD;
    let mut source = disk(blocks, 1, |at| data(at).filter(|_| at % 8 != 0));
    let mut destination = source.clone();
    for index in (1..blocks).step_by(1000) {
        destination.put(index, Fill::of(77));
    }
    let params = Library::new(HashKind::Xxh3).params(source.geometry().size(), true, true);
    let mut trace = Trace::new("quick destination");
    let schedule = Schedule {
        weights: [1, 100, 1, 100],
        pipe: usize::MAX,
        ..Schedule::calm(1)
    };
    let done = check::session(params, &mut source, &mut destination, schedule, &mut trace)
        .expect("a calm schedule ends well");
    assert_eq!(done.sender.counters.blocks_changed, blocks.div_ceil(1000));
    let peak = done.tally.peak_digested;
    assert!(peak > DIGEST_AHEAD - WINDOW, "only {peak} were told ahead");
}

/// All payloads as long as they can be: four times what the credit allows.
#[test]
fn a_slow_destination_holds_the_sender_back() {
    for ahead in [MIN_DATA_AHEAD, DATA_AHEAD] {
        a_slow_destination_holds_back(ahead);
    }
}

fn a_slow_destination_holds_back(ahead: u64) {
    let mut source = disk(1024, 0, data);
    source.packing = Packing {
        raw_percent: 100,
        padding: 0,
    };
    let library = Library::new(HashKind::Xxh3);
    let size = source.geometry().size();
    let mut trace = Trace::new("slow destination");
    let mut destination = FakeDisk::new(&library, size);
    let schedule = Schedule {
        weights: [1000, 1000, 1000, 1],
        pipe: usize::MAX,
        ahead,
        ..Schedule::calm(1)
    };
    let params = library.params(size, false, true);
    let done = check::session(params, &mut source, &mut destination, schedule, &mut trace)
        .expect("a calm schedule ends well");
    assert_eq!(done.tally.payload, size);
    let (peak, change) = (done.tally.peak_spent, BLOCK_SIZE + CHANGE_COST);
    assert!(peak > ahead - change, "only {peak} were under way");
}

/// Zeros travel without payload, and yet no more of them than a slow disk can remember.
#[test]
fn a_destination_that_is_slow_to_punch_holds_the_sender_back() {
    let blocks = 4 * DATA_AHEAD / CHANGE_COST;
    let library = Library::new(HashKind::Xxh3);
    let size = blocks * BLOCK_SIZE;
    let mut source = FakeDisk::new(&library, size);
    let mut destination = FakeDisk::new(&library, size);
    for index in (0..blocks).step_by(2) {
        destination.put(index, Fill::of(1));
    }
    let mut trace = Trace::new("slow to punch");
    let schedule = Schedule {
        weights: [1000, 1000, 1000, 400],
        pipe: usize::MAX,
        ..Schedule::calm(1)
    };
    let params = library.params(size, true, true);
    let done = check::session(params, &mut source, &mut destination, schedule, &mut trace)
        .expect("a calm schedule ends well");
    assert_eq!(done.sender.counters.blocks_zeroed, blocks / 2);
}
