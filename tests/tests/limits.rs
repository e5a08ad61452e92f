//! Limits and interruptions: the rate, the time, Ctrl-C, and taking up again.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_clone_tests::controller::Running;
use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::process::{arguments, is_ssh, kill, processes_in, wait_for};
use nix::sys::signal::Signal;

/// The rate of the test: `20M`, in bytes a second.
const RATE: f64 = 20e6;

#[test]
fn a_bandwidth_limit_is_kept_to_a_twentieth() {
    let Some(spec) = LabSpec::new() else { return };
    // In memory, so that no disk is part of what is measured.
    let lab = spec.mount(Kind::Tmpfs, 600 * MIB).start();
    let disks = &lab.mounts()[0];
    let measure = |name: &str, len: u64| {
        let (source, copy) = (disks.join(format!("{name}-source")), disks.join(name));
        image::write(&source, &[Piece::Random(1, len)]);
        let options = ["--bandwidth-limit", "20M"];
        let outcome = lab.sync(Journey::Local, &source, &copy, &options);
        let seconds = outcome.json["duration_seconds"].as_f64().unwrap();
        (
            f64::from(u32::try_from(outcome.number("bytes_wire")).unwrap()),
            seconds,
        )
    };
    // The agent is put in place.
    measure("first", 1);
    // Opening, syncing and a first burst are in both runs; what is between them is the rate.
    let (short_bytes, short) = measure("short", 10_000_000);
    let (long_bytes, long) = measure("long", 230_000_000);
    assert!(long >= 10.0, "{long} s are too short to measure");
    let rate = (long_bytes - short_bytes) / (long - short);
    assert!(
        (rate / RATE - 1.0).abs() <= 0.05,
        "{rate} bytes a second instead of {RATE}"
    );
}

#[test]
fn a_limit_holds_on_every_journey() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    image::write(&source, &[Piece::Random(1, 16 * MIB)]);
    for by in [
        Journey::Direct,
        Journey::Relay,
        Journey::Push,
        Journey::Pull,
    ] {
        let copy = lab.path(format!("copy-{by:?}"));
        let outcome = lab.sync(by, &source, &copy, &["--bandwidth-limit", "8M"]);
        // 16.8 MB at 8 MB/s are 2.1 s, of which a burst of half a second may be free.
        assert!(
            outcome.run.elapsed > Duration::from_millis(1500),
            "{}",
            outcome.run
        );
    }
}

/// Starts a copy that would take a quarter of a minute, and waits until a part of it has arrived.
fn started(lab: &Lab, by: Journey, source: &Path, copy: &Path) -> Running {
    let slow = ["--bandwidth-limit", "4M"];
    let mut running = lab.start_disk("sync", by, source, copy, &slow);
    let arrived = || {
        let entries = fs::read_dir(copy.parent().unwrap()).unwrap();
        let beside = entries.map(|entry| entry.unwrap().path());
        // A journal holds no blocks, and changes its name when it has been made.
        let is_journal = |path: &Path| path.to_string_lossy().contains(".kc-journal");
        let most = beside
            .filter(|path| path != copy && !is_journal(path))
            .map(|path| blocks_of(source, &path))
            .max();
        assert!(running.is_alive(), "it ended before it was interrupted");
        (most? >= 64).then_some(())
    };
    wait_for(
        "the first part of the copy",
        Duration::from_secs(30),
        arrived,
    );
    running
}

/// How many blocks of the source a file holds already.
fn blocks_of(source: &Path, file: &Path) -> u64 {
    let differences = image::difference(source, file);
    differences.total - differences.changed - differences.zeroed
}

/// Claims what holds after an interruption, and that the next run takes it up.
fn is_taken_up_again(lab: &Lab, by: Journey, source: &Path, copy: &Path) {
    assert!(!copy.exists(), "a part of the copy has the final name");
    next_run_takes_it_up(lab, by, source, copy);
}

fn next_run_takes_it_up(lab: &Lab, by: Journey, source: &Path, copy: &Path) {
    lab.wait_until_quiet();
    let outcome = lab.sync(by, source, copy, &[]);
    assert_eq!(outcome.json["resumed"], true, "{}", outcome.run);
    let saved = image::length(source) - outcome.number("bytes_changed");
    assert!(
        saved >= 2 * MIB,
        "only {saved} bytes were not shipped again: {}",
        outcome.run
    );
    let left = fs::read_dir(copy.parent().unwrap()).unwrap().count();
    assert_eq!(left, 1, "temporary files were left beside the copy");
}

/// A disk of which four seconds ship a quarter, and an own directory for its copy.
fn lab_with_large_disk() -> Option<(Lab, std::path::PathBuf, std::path::PathBuf)> {
    let lab = Lab::start()?;
    let (source, directory) = (lab.path("source"), lab.path("copies"));
    image::write(&source, &[Piece::Random(1, 64 * MIB)]);
    fs::create_dir(&directory).unwrap();
    let copy = directory.join("copy");
    Some((lab, source, copy))
}

fn ctrl_c_stops_it_and_the_next_run_takes_it_up(by: Journey) {
    let Some((lab, source, copy)) = lab_with_large_disk() else {
        return;
    };
    let running = started(&lab, by, &source, &copy);
    running.interrupt();
    let run = running.wait();
    assert!(run.is_interrupted(), "{run}");
    let result = run.json();
    assert_eq!(result["success"], false, "{run}");
    assert_eq!(result["error"]["code"], "cancelled", "{run}");
    is_taken_up_again(&lab, by, &source, &copy);
}

#[test]
fn ctrl_c_stops_a_direct_run_and_the_next_takes_it_up() {
    ctrl_c_stops_it_and_the_next_run_takes_it_up(Journey::Direct);
}

#[test]
fn ctrl_c_stops_a_relayed_run_and_the_next_takes_it_up() {
    ctrl_c_stops_it_and_the_next_run_takes_it_up(Journey::Relay);
}

#[test]
fn a_controller_that_is_killed_leaves_no_agents_and_the_next_run_takes_it_up() {
    let Some((lab, source, copy)) = lab_with_large_disk() else {
        return;
    };
    let running = started(&lab, Journey::Direct, &source, &copy);
    running.signal(Signal::SIGKILL);
    let _ = running.wait();
    is_taken_up_again(&lab, Journey::Direct, &source, &copy);
}

#[test]
fn a_run_that_is_out_of_time_says_so_and_the_next_takes_it_up() {
    let Some((lab, source, copy)) = lab_with_large_disk() else {
        return;
    };
    // At this rate it needs 16 s, and on a loaded machine the first byte may take some of them.
    let options = ["--bandwidth-limit", "4M", "--timeout", "10s"];
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &options);
    run.expect_failure(6, &["timeout"], "");
    assert!(run.elapsed < Duration::from_secs(15), "{run}");
    is_taken_up_again(&lab, Journey::Relay, &source, &copy);
}

#[test]
fn agents_that_are_killed_end_the_run_with_an_error() {
    let Some((lab, source, copy)) = lab_with_large_disk() else {
        return;
    };
    let running = started(&lab, Journey::Relay, &source, &copy);
    for agent in lab.b.agents() {
        kill(&agent);
    }
    let run = running.wait();
    run.expect_failure(6, &["interrupted"], "hvB");
    is_taken_up_again(&lab, Journey::Relay, &source, &copy);
}

#[test]
fn a_connection_between_the_hosts_that_breaks_ends_the_run_at_once() {
    let Some((lab, source, copy)) = lab_with_large_disk() else {
        return;
    };
    let running = started(&lab, Journey::Direct, &source, &copy);
    let mut between = processes_in(&lab.a.mount_namespace());
    between.retain(|process| is_ssh(&arguments(process)));
    assert_eq!(between.len(), 1);
    kill(&between[0]);
    let since = Instant::now();
    let run = running.wait();
    // Each side says that it has lost the other: nobody waits for another reason.
    assert!(since.elapsed() < Duration::from_secs(2), "{run}");
    run.expect_failure(6, &["interrupted"], "connection");
    is_taken_up_again(&lab, Journey::Direct, &source, &copy);
}

#[test]
fn an_interrupted_run_leaves_an_existing_disk_as_it_was_and_the_next_takes_it_up() {
    let Some(spec) = LabSpec::new() else { return };
    let lab = [Kind::Ext4, Kind::Xfs]
        .into_iter()
        .fold(spec, |spec, kind| spec.mount(kind, 600 * MIB))
        .start();
    let (source, old) = (lab.path("source"), lab.path("old"));
    image::write(&source, &[Piece::Random(1, 64 * MIB)]);
    image::write(&old, &[Piece::Random(9, 64 * MIB)]);
    for (mount, by) in lab.mounts().iter().zip([Journey::Direct, Journey::Relay]) {
        let directory = mount.join("copies");
        fs::create_dir(&directory).unwrap();
        let copy = directory.join("copy");
        image::write(&copy, &[Piece::Random(9, 64 * MIB)]);
        let running = started(&lab, by, &source, &copy);
        running.interrupt();
        assert!(running.wait().is_interrupted());
        image::assert_equal(&old, &copy);
        next_run_takes_it_up(&lab, by, &source, &copy);
    }
}
