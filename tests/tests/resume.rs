//! Taking up a first copy that was cut when most of it had arrived: that part is not shipped again.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use kvm_clone_tests::campaign::Victim;
use kvm_clone_tests::controller::Running;
use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::process::{kill, wait_for};

/// Enough for a tenth of it to take half a second at [`LIMIT`], in which a kill has to come.
const SIZE: u64 = 48 * MIB;
const LIMIT: &str = "8M";

/// The cut comes when this many hundredths have arrived, and then at most so many are shipped.
const ARRIVED: u64 = 90;
const SHIPPED_AGAIN: u64 = 15;

/// What is there before the first copy.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    OtherData,
}

fn what_had_arrived_is_not_shipped_again(kind: Kind, before: Before, options: &[&str]) {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.mount(kind, 400 * MIB).start();
    let source = lab.path("source");
    image::write(&source, &[Piece::Random(1, SIZE)]);
    let victims = [
        (Victim::Controller, Journey::Direct),
        (Victim::SourceAgent, Journey::Relay),
        (Victim::DestinationAgent, Journey::Direct),
    ];
    for (victim, by) in victims {
        let directory = lab.mounts()[0].join(victim.to_string());
        fs::create_dir(&directory).unwrap();
        let copy = directory.join("copy");
        if before == Before::OtherData {
            image::write(&copy, &[Piece::Random(2, SIZE)]);
        }
        cut(&lab, victim, by, &source, &copy, options);
        assert_eq!(copy.exists(), before == Before::OtherData);

        let outcome = lab.sync(by, &source, &copy, options);
        let run = &outcome.run;
        assert_eq!(outcome.json["resumed"], true, "{victim}: {run}");
        let shipped = outcome.number("bytes_wire");
        let bound = SIZE / 100 * SHIPPED_AGAIN;
        assert!(
            shipped <= bound,
            "{victim}: {shipped} bytes, not {bound}: {run}"
        );
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "{victim}");
        fs::remove_dir_all(&directory).unwrap();
    }
}

/// Starts a copy, and kills one of its processes when enough has arrived.
fn cut(lab: &Lab, victim: Victim, by: Journey, source: &Path, copy: &Path, options: &[&str]) {
    let options = [options, &["--bandwidth-limit", LIMIT]].concat();
    let mut running = lab.start_disk("sync", by, source, copy, &options);
    wait_for("most of the copy", Duration::from_secs(60), || {
        assert!(running.is_alive(), "it ended before it was cut");
        (arrived(source, copy) >= ARRIVED).then_some(())
    });
    kill_all(victim, lab, &running);
    let run = running.wait();
    assert_ne!(run.code(), Some(0), "{victim}: {run}");
    lab.wait_until_quiet();
}

fn kill_all(victim: Victim, lab: &Lab, running: &Running) {
    let found = victim.find(lab, running);
    assert!(!found.is_empty(), "no {victim}");
    for process in found {
        kill(&process);
    }
}

/// How many hundredths of the source are in what lies beside the copy.
fn arrived(source: &Path, copy: &Path) -> u64 {
    let entries = fs::read_dir(copy.parent().unwrap()).unwrap();
    let beside = entries.map(|entry| entry.unwrap().path());
    let hundredths = |path: &Path| {
        let found = image::difference(source, path);
        (found.total - found.changed - found.zeroed) * 100 / found.total
    };
    let most = beside
        .filter(|path| path != copy)
        .map(|path| hundredths(&path));
    most.max().unwrap_or(0)
}

#[test]
fn a_new_destination_is_taken_up_where_it_was_cut() {
    what_had_arrived_is_not_shipped_again(Kind::Ext4, Before::Nothing, &[]);
}

#[test]
fn what_is_staged_on_ext4_is_taken_up_where_it_was_cut() {
    let options = ["--apply", "staged"];
    what_had_arrived_is_not_shipped_again(Kind::Ext4, Before::OtherData, &options);
}

#[test]
fn what_is_reflinked_on_xfs_is_taken_up_where_it_was_cut() {
    let options = ["--apply", "reflink"];
    what_had_arrived_is_not_shipped_again(Kind::Xfs, Before::OtherData, &options);
}
