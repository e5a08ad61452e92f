//! `--streams`: one disk over several data connections.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::process::{arguments, kill, wait_for};

const PATIENCE: Duration = Duration::from_secs(30);

/// The processes on hvB that brought a data connection there.
fn connections(lab: &Lab) -> Vec<PathBuf> {
    let is_attach = |process: &PathBuf| arguments(process).iter().any(|word| word == b"attach");
    lab.b.agents().into_iter().filter(is_attach).collect()
}

/// The space that what lies beside a copy takes: the file that is to become it.
fn allocated_beside(copy: &Path) -> u64 {
    let name = copy.file_name().unwrap().to_string_lossy();
    let beside = copy.with_file_name(format!(".{name}.kc-new"));
    beside.metadata().map_or(0, |found| found.blocks() * 512)
}

#[test]
fn several_connections_carry_a_first_copy_and_what_differs_later() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    let old = [
        Piece::Random(1, 20 * MIB),
        Piece::Hole(8 * MIB),
        Piece::Random(2, 4 * MIB + 4097),
    ];
    let new = [
        Piece::Random(3, 9 * MIB),
        Piece::Hole(19 * MIB),
        Piece::Random(2, 4 * MIB + 4097),
    ];
    for by in Journey::ALL {
        let copy = lab.path(format!("copy-{by:?}"));
        for pieces in [&old, &new] {
            image::write(&source, pieces);
            lab.sync(by, &source, &copy, &["--streams", "3", "--full-scan"]);
        }
    }
}

#[test]
fn each_stream_has_a_connection_and_a_run_that_loses_one_is_taken_up() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    image::write(&source, &[Piece::Random(1, 64 * MIB)]);
    for by in [Journey::Direct, Journey::Relay, Journey::Push] {
        let copy = lab.path(format!("copy-{by:?}"));
        let slow = ["--bandwidth-limit", "8M", "--streams", "3"];
        let running = lab.start_disk("sync", by, &source, &copy, &slow);
        let all = wait_for("three connections", PATIENCE, || {
            let found = connections(&lab);
            (found.len() == 3).then_some(found)
        });
        wait_for("a part of the copy", PATIENCE, || {
            (allocated_beside(&copy) >= 12 * MIB).then_some(())
        });
        kill(&all[2]);
        let run = running.wait();
        run.expect_failure(6, &["interrupted"], "");
        assert!(run.elapsed < Duration::from_secs(15), "{run}");
        lab.wait_until_quiet();
        let outcome = lab.sync(by, &source, &copy, &["--streams", "2"]);
        assert_eq!(outcome.json["resumed"], true, "{}", outcome.run);
        let shipped = outcome.number("bytes_changed");
        assert!(shipped < 64 * MIB - 8 * MIB, "{shipped} bytes were shipped");
    }
}

#[test]
fn there_are_between_one_and_sixteen() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    let copy = lab.path("copy");
    image::write(&source, &[Piece::Random(1, MIB)]);
    for bad in ["0", "17", "many", ""] {
        let run = lab.disk("sync", Journey::Local, &source, &copy, &["--streams", bad]);
        run.expect_code(2);
        assert!(run.stderr.contains("--streams"), "{run}");
        assert!(!copy.exists());
    }
    for good in ["1", "16", "auto"] {
        lab.sync(
            Journey::Push,
            &source,
            &copy,
            &["--streams", good, "--full-scan"],
        );
    }
}
