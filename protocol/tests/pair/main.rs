//! Both halves of a session against each other, with disks and pipes that a seed disturbs: bytes
//! arrive in any pieces, operations end in any order, directions stall, disks fail and
//! connections break. However that goes, a handful of sessions make the two disks equal.
//!
//! `PAIR_SEEDS` says how many seeds are tried.

#![cfg(test)]

mod check;
mod disk;
mod images;
mod pair;
mod stories;

use std::rc::Rc;

use kvm_clone_protocol::digest::HashKind;
use kvm_clone_protocol::sync::{DATA_AHEAD, MIN_DATA_AHEAD};
use kvm_clone_protocol::units::BLOCK_SIZE;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::disk::{FakeDisk, Fill, Library, Packing};
use crate::pair::{Fault, Schedule, Trace};

/// Seeds unless `PAIR_SEEDS` says otherwise.
const SEEDS: u64 = 1000;

#[test]
fn any_schedule_converges() {
    let seeds = std::env::var("PAIR_SEEDS").map_or(SEEDS, |seeds| {
        seeds.parse().expect("PAIR_SEEDS is a number")
    });
    let libraries = [HashKind::Xxh3, HashKind::Blake3].map(Library::new);
    for seed in 0..seeds {
        let mut rng = SmallRng::seed_from_u64(seed);
        // BLAKE3 differs in nothing that these tests look at but its cost.
        let library = &libraries[usize::from(rng.random_ratio(1, 10))];
        converge(seed, library, &mut rng);
    }
}

/// A first copy or a later one, faults in some sessions, then one without, and one more.
fn converge(seed: u64, library: &Rc<Library>, rng: &mut SmallRng) {
    let mut trace = Trace::new(format_args!("seed {seed}"));
    let mut source = any_source(library, rng);
    let size = source.geometry().size();
    let mut destination = any_destination(&source, library, rng);
    destination.resize(size);
    let mut compare = destination.allocated() > 0 || rng.random();

    let faults = rng.random_range(0..4);
    for left in (0..=faults).rev() {
        let params = library.params(size, compare, true);
        let schedule = any_schedule(&source, rng, left > 0);
        let ended = check::session(params, &mut source, &mut destination, schedule, &mut trace);
        if ended.is_some() {
            break;
        }
        assert!(left > 0, "a session without a fault did not end");
        // What is there now is known to nobody.
        compare = true;
    }
    let schedule = any_schedule(&source, rng, false);
    check::nothing_is_left_to_do(
        library.params(size, true, true),
        &mut source,
        &mut destination,
        schedule,
        &mut trace,
    );
}

fn any_schedule(source: &FakeDisk, rng: &mut SmallRng, faulty: bool) -> Schedule {
    let blocks = u32::try_from(source.geometry().block_count()).expect("small enough to play");
    let weights = std::array::from_fn(|_| [1, 8, 64][rng.random_range(0..3)]);
    // Some faults come at once, the others anywhere in a usual session.
    let latest = [10, blocks + 10, 2 * (blocks + 10)][rng.random_range(0..3)];
    let at = rng.random_range(0..latest);
    let fault = [Fault::Cut, Fault::FailOp][rng.random_range(0..2)];
    Schedule {
        seed: rng.random(),
        weights,
        pipe: [1024, 64 * 1024, usize::MAX][rng.random_range(0..3)],
        ahead: [MIN_DATA_AHEAD, DATA_AHEAD][rng.random_range(0..2)],
        stalls: [0, 5, 50][rng.random_range(0..3)],
        fault: faulty.then_some((at, fault)),
        max_steps: 5000 + 100 * blocks,
    }
}

fn any_source(library: &Rc<Library>, rng: &mut SmallRng) -> FakeDisk {
    let blocks = match rng.random_range(0..200) {
        // More than the receiver may tell ahead of what is settled.
        0 => rng.random_range(17_000..20_000),
        1..20 => rng.random_range(0..4),
        20..180 => rng.random_range(0..100),
        _ => rng.random_range(100..300),
    };
    let tail = [0, 1, 5, 4096, BLOCK_SIZE - 1][rng.random_range(0..5)];
    let mut disk = FakeDisk::new(library, blocks * BLOCK_SIZE + tail);
    disk.packing = Packing {
        raw_percent: [0, 10, 100][rng.random_range(0..3)],
        padding: [0, 100, 60_000][rng.random_range(0..3)],
    };
    paint(&mut disk, rng);
    disk
}

/// Runs of holes, zeros and data, long or short.
fn paint(disk: &mut FakeDisk, rng: &mut SmallRng) {
    let end = disk.geometry().block_count();
    let longest = [1, 5, 200][rng.random_range(0..3)];
    let mut at = 0;
    while at < end {
        let count = rng.random_range(1..=longest);
        let next = end.min(at + count);
        let sort = rng.random_range(0..8);
        for index in at..next {
            match sort {
                0..3 => {}
                3 => disk.put(index, Fill::ZERO),
                _ => disk.put(index, any_fill(rng)),
            }
        }
        at = next;
    }
}

/// Few kinds of blocks, so that equal ones meet by chance, and few lengths, since a digest in a
/// debug build takes a while.
fn any_fill(rng: &mut SmallRng) -> Fill {
    let byte = rng.random_range(1..8);
    if rng.random_ratio(1, 8) {
        Fill::part(byte, [1, 4096][rng.random_range(0..2)])
    } else {
        Fill::of(byte)
    }
}

/// Nothing, something unrelated, or an older version of the source, of another size.
fn any_destination(source: &FakeDisk, library: &Rc<Library>, rng: &mut SmallRng) -> FakeDisk {
    let size = source.geometry().size();
    let other_size = rng.random_range(0..=2 * size.min(300 * BLOCK_SIZE));
    match rng.random_range(0..4) {
        0 => FakeDisk::new(library, 0),
        1 => {
            let mut other = FakeDisk::new(library, other_size);
            paint(&mut other, rng);
            other
        }
        kind => {
            let mut older = source.clone();
            let blocks = older.geometry().block_count();
            let most = [1, 10, 100][rng.random_range(0..3)];
            for _ in 0..rng.random_range(0..=most).min(blocks) {
                let index = rng.random_range(0..blocks);
                match rng.random_range(0..3) {
                    0 => older.put(index, Fill::ZERO),
                    _ => older.put(index, any_fill(rng)),
                }
            }
            if kind == 2 {
                older.resize(other_size);
            }
            older
        }
    }
}
