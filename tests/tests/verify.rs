//! The commands that look and do not touch: `disk verify`, `disk diff`, `--dry-run`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;

/// What changes when a file is written to.
fn state(path: &Path) -> (u64, i64, i64, u64) {
    let metadata = fs::metadata(path).unwrap();
    (
        metadata.len(),
        metadata.mtime_nsec(),
        metadata.ctime_nsec(),
        metadata.blocks(),
    )
}

#[test]
fn equal_disks_verify_although_their_holes_are_elsewhere() {
    let Some(lab) = Lab::start() else { return };
    let (one, other) = (lab.path("one"), lab.path("other"));
    image::write(
        &one,
        &[
            Piece::Random(1, MIB),
            Piece::Hole(MIB),
            Piece::Zeros(MIB + 3),
        ],
    );
    image::write(
        &other,
        &[
            Piece::Random(1, MIB),
            Piece::Zeros(MIB),
            Piece::Hole(MIB + 3),
        ],
    );
    for by in Journey::ALL {
        let run = lab.disk("verify", by, &one, &other, &[]);
        assert_eq!(run.expect_json()["success"], true, "{run}");
    }
}

#[test]
fn disks_that_differ_are_a_mismatch_that_names_the_first_block_that_differs() {
    let Some(lab) = Lab::start() else { return };
    let (one, other) = (lab.path("one"), lab.path("other"));
    let data = |byte| {
        [
            Piece::Random(1, 3 * MIB),
            Piece::Byte(byte),
            Piece::Random(2, MIB),
        ]
    };
    image::write(&one, &data(1));
    image::write(&other, &data(2));
    let offset = image::difference(&one, &other).first.unwrap() / BLOCK * BLOCK;
    for by in Journey::ALL {
        let before = state(&other);
        let run = lab.disk("verify", by, &one, &other, &[]);
        let message = run.expect_failure(7, &["mismatch"], "");
        assert!(
            message.contains(&offset.to_string()),
            "{message:?} does not name {offset}"
        );
        assert_eq!(state(&other), before);
    }
}

#[test]
fn a_difference_of_one_bit_in_the_last_short_block_is_found() {
    let Some(lab) = Lab::start() else { return };
    let (one, other) = (lab.path("one"), lab.path("other"));
    image::write(&one, &[Piece::Random(1, 3 * BLOCK), Piece::Byte(4)]);
    image::write(&other, &[Piece::Random(1, 3 * BLOCK), Piece::Byte(5)]);
    let run = lab.disk("verify", Journey::Relay, &one, &other, &[]);
    run.expect_failure(7, &["mismatch"], "");
}

#[test]
fn disks_of_different_sizes_are_a_mismatch_even_when_the_rest_is_zeros() {
    let Some(lab) = Lab::start() else { return };
    let (one, other) = (lab.path("one"), lab.path("other"));
    image::write(&one, &[Piece::Random(1, MIB)]);
    image::write(&other, &[Piece::Random(1, MIB), Piece::Hole(BLOCK)]);
    for (from, to) in [(&one, &other), (&other, &one)] {
        let run = lab.disk("verify", Journey::Relay, from, to, &[]);
        run.expect_failure(7, &["mismatch"], "");
    }
}

#[test]
fn comparing_with_a_disk_that_does_not_exist_is_not_found() {
    let Some(lab) = Lab::start() else { return };
    let (one, missing) = (lab.path("one"), lab.path("missing"));
    image::write(&one, &[Piece::Random(1, MIB)]);
    for verb in ["verify", "diff"] {
        for (from, to) in [(&one, &missing), (&missing, &one)] {
            let run = lab.disk(verb, Journey::Relay, from, to, &[]);
            run.expect_failure(4, &["not_found"], missing.to_str().unwrap());
        }
    }
    assert!(!missing.exists());
}

#[test]
fn a_diff_counts_what_a_sync_would_ship_and_writes_nothing() {
    let Some(lab) = Lab::start() else { return };
    let (from, to) = (lab.path("from"), lab.path("to"));
    image::write(&from, &[Piece::Random(1, 4 * MIB), Piece::Hole(MIB)]);
    image::write(&to, &[Piece::Random(1, 3 * MIB), Piece::Random(2, 2 * MIB)]);
    let expected = image::difference(&from, &to);
    let before = state(&to);
    for by in Journey::ALL {
        let run = lab.disk("diff", by, &from, &to, &[]);
        let result = run.expect_json();
        let number = |field: &str| result[field].as_u64();
        assert_eq!(number("blocks_changed"), Some(expected.changed), "{run}");
        assert_eq!(number("blocks_zeroed"), Some(expected.zeroed), "{run}");
        assert_eq!(number("bytes_changed"), Some(expected.bytes), "{run}");
        assert_eq!(number("bytes_total"), Some(5 * MIB), "{run}");
        assert!(number("bytes_wire") < Some(MIB), "blocks travelled: {run}");
        assert_eq!(state(&to), before);
    }
}

#[test]
fn a_dry_run_of_a_sync_writes_nothing() {
    let Some(lab) = Lab::start() else { return };
    let (from, to, missing) = (lab.path("from"), lab.path("to"), lab.path("missing"));
    image::write(&from, &[Piece::Random(1, 4 * MIB)]);
    image::write(&to, &[Piece::Random(2, 2 * MIB)]);
    let before = state(&to);
    let entries = || fs::read_dir(lab.path("")).unwrap().count();
    let names = entries();
    for by in Journey::ALL {
        for destination in [&to, &missing] {
            let run = lab.disk("sync", by, &from, destination, &["--dry-run"]);
            let result = run.expect_json();
            assert_eq!(result["success"], true, "{run}");
            let expected = image::difference(&from, destination).changed;
            assert_eq!(result["blocks_changed"].as_u64(), Some(expected), "{run}");
        }
    }
    assert_eq!(state(&to), before);
    assert_eq!(entries(), names, "a dry run made a file");
}
