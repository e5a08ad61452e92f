//! The agents' memory does not grow with the disk.

use std::time::Duration;

use kvm_clone_tests::image::{self, GIB, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::process::MemoryWatch;

/// What each agent may have resident.
const BOUND: u64 = 64 * MIB;

/// A sync during which both agents stay below the bound.
fn sync_within_bounds(lab: &Lab, by: Journey, pieces: &[Piece], limit: Duration) {
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, pieces);
    for run in ["first", "second"] {
        let watches =
            [&lab.a, &lab.b].map(|host| (host, MemoryWatch::start(host.mount_namespace())));
        let outcome = lab.sync(by, &source, &copy, &[]);
        assert!(outcome.run.elapsed < limit, "{}", outcome.run);
        for (host, watch) in watches {
            let name = host.name();
            let peak = watch
                .peak()
                .unwrap_or_else(|| panic!("no agent was seen on {name}"));
            assert!(
                peak < BOUND,
                "an agent on {name} took {peak} bytes in the {run} run"
            );
        }
    }
}

#[test]
fn a_sparse_disk_of_four_tebibytes_takes_seconds_and_little_memory() {
    let Some(lab) = Lab::start() else { return };
    let tebibyte = 1024 * GIB;
    let data = |seed| Piece::Random(seed, MIB + 5);
    let pieces = [
        data(1),
        Piece::Hole(2 * tebibyte),
        data(2),
        Piece::Hole(2 * tebibyte),
        data(3),
    ];
    sync_within_bounds(&lab, Journey::Direct, &pieces, Duration::from_secs(30));
}

#[test]
fn a_disk_of_many_extents_takes_little_memory() {
    let Some(lab) = Lab::start() else { return };
    let piece = |i| {
        if i % 2 == 0 {
            Piece::Random(i, 4096)
        } else {
            Piece::Hole(128 << 10)
        }
    };
    let pieces: Vec<_> = (0..20_000).map(piece).collect();
    sync_within_bounds(&lab, Journey::Relay, &pieces, Duration::from_secs(60));
}

#[test]
fn a_dense_disk_of_a_gibibyte_takes_little_memory() {
    let Some(lab) = Lab::start() else { return };
    let pieces = [Piece::Random(4, GIB)];
    sync_within_bounds(&lab, Journey::Relay, &pieces, Duration::from_secs(120));
}
