//! Destinations that exist: bigger, smaller, data where the source has holes and the reverse, on
//! every file system.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::MetadataExt as _;

use Piece::{Hole, Random, Zeros};
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::outcome::assert_sparse;
use kvm_clone_tests::process::tool;

/// What is there before, for a source of 8 MiB and 5 bytes.
fn olds() -> Vec<(&'static str, Vec<Piece>)> {
    vec![
        ("bigger", vec![Random(1, 20 * MIB)]),
        ("smaller", vec![Random(1, 2 * MIB + 77)]),
        ("empty", vec![]),
        ("one-byte-longer", vec![Random(1, 8 * MIB + 6)]),
        ("one-byte-shorter", vec![Random(1, 8 * MIB + 4)]),
        ("all-hole", vec![Hole(8 * MIB + 5)]),
        ("all-other-data", vec![Random(2, 8 * MIB + 5)]),
        ("equal", source()),
    ]
}

/// Data, zeros and holes; the end is in the middle of a block.
fn source() -> Vec<Piece> {
    vec![
        Random(3, 3 * MIB),
        Hole(2 * MIB),
        Zeros(MIB),
        Random(4, MIB),
        Hole(MIB),
        Random(5, 5),
    ]
}

fn every_existing_destination_becomes_the_source(kind: Kind, by: Journey) {
    // xfs and btrfs do not go below some 300 MiB; the backing file is sparse.
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.mount(kind, 400 * MIB).start();
    let disks = &lab.mounts()[0];
    let from = disks.join("source");
    image::write(&from, &source());
    for (name, pieces) in olds() {
        let to = disks.join(name);
        image::write(&to, &pieces);
        let inode = || std::fs::metadata(&to).unwrap().ino();
        let before = inode();

        let outcome = lab.sync(by, &from, &to, &[]);
        // A reflink copy takes the place of what was there; the equal one gives back its zeros.
        let replaced = outcome.json["apply"] == "reflink";
        assert_eq!(inode() != before, replaced, "{}", outcome.run);
        assert_sparse(&from, &to);

        let after = inode();
        let again = lab.sync(by, &from, &to, &[]);
        again.assert_only_digests(&from);
        assert_eq!(inode(), after, "nothing has changed: {}", again.run);
    }
    let fresh = disks.join("fresh");
    lab.sync(by, &from, &fresh, &[]);
    assert_sparse(&from, &fresh);
    lab.sync(by, &from, &fresh, &[]).assert_only_digests(&from);
}

#[test]
fn every_existing_destination_on_ext4_becomes_the_source() {
    every_existing_destination_becomes_the_source(Kind::Ext4, Journey::Relay);
}

#[test]
fn every_existing_destination_on_xfs_becomes_the_source() {
    every_existing_destination_becomes_the_source(Kind::Xfs, Journey::Direct);
}

#[test]
fn every_existing_destination_on_btrfs_becomes_the_source() {
    every_existing_destination_becomes_the_source(Kind::Btrfs, Journey::Push);
}

#[test]
fn every_existing_destination_on_tmpfs_becomes_the_source() {
    every_existing_destination_becomes_the_source(Kind::Tmpfs, Journey::Pull);
}

#[test]
fn holes_over_data_and_data_over_holes_are_both_carried() {
    let Some(lab) = Lab::start() else { return };
    let stripes = |odd: u64| -> Vec<Piece> {
        let data = |i| Random(10 * odd + i, 3 * BLOCK + 100);
        let piece = |i| {
            if i % 2 == odd {
                data(i)
            } else {
                Hole(3 * BLOCK + 100)
            }
        };
        (0..32).map(piece).collect()
    };
    for by in [Journey::Direct, Journey::Relay, Journey::Local] {
        let (from, to) = (lab.path("from"), lab.path("to"));
        image::write(&from, &stripes(0));
        image::write(&to, &stripes(1));
        let outcome = lab.sync(by, &from, &to, &[]);
        assert!(outcome.number("blocks_zeroed") > 0, "{}", outcome.run);
        assert_sparse(&from, &to);
    }
}

#[test]
fn unchanged_blocks_are_not_written() {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.mount(Kind::Xfs, 400 * MIB).start();
    let (from, to) = (lab.mounts()[0].join("from"), lab.mounts()[0].join("to"));
    image::write(&from, &[Random(1, 64 * MIB)]);
    // The copy shares its storage; a block that is written anew would take space of its own.
    let args = [from.as_os_str(), to.as_os_str()];
    tool("cp", ["--reflink=always".as_ref()].into_iter().chain(args));
    image::change_blocks(&from, 100, 3);
    let before = free_bytes(lab.mounts()[0].path());
    let outcome = lab.sync(Journey::Relay, &from, &to, &[]);
    let taken = before.saturating_sub(free_bytes(lab.mounts()[0].path()));
    // A hundredth is changed. Metadata and preallocation of xfs get 4 MiB, a rewrite takes 64.
    let bound = outcome.number("bytes_changed") + 4 * MIB;
    assert!(taken <= bound, "{taken} bytes taken, more than {bound}");
}

/// Free bytes of a file system.
fn free_bytes(path: &std::path::Path) -> u64 {
    tool("sync", ["-f".as_ref(), path.as_os_str()]);
    let args = ["--output=avail", "-B1"]
        .map(AsRef::as_ref)
        .into_iter()
        .chain([path.as_os_str()]);
    let table = tool("df", args);
    table.lines().nth(1).unwrap().trim().parse().unwrap()
}
