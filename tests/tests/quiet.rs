//! Sparing the guests of a host: how fast disks are read there, and who comes first.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::process::{arguments, processes_in, tool, wait_for};

/// The limit of the tests: `40M`, in bytes a second.
const RATE: f64 = 40e6;

/// What a measured run reads.
enum Reads {
    Source,
    Destination,
    /// The source, and then the destination once more.
    SourceAndResult,
}

/// Seconds that a run on a disk of this length takes.
fn seconds(lab: &Lab, reads: &Reads, len: u64) -> f64 {
    let disks = &lab.mounts()[0];
    let (data, other) = (disks.join("data"), disks.join("other"));
    image::write(&data, &[Piece::Random(1, len)]);
    let _ = fs::remove_file(&other);
    let by = Journey::Local;
    let limit = ["--read-limit", "40M"];
    let json = match reads {
        Reads::Source => lab.sync(by, &data, &other, &limit).json,
        Reads::SourceAndResult => {
            let options = [&limit[..], &["--verify", "reread"]].concat();
            lab.sync(by, &data, &other, &options).json
        }
        Reads::Destination => {
            image::write(&other, &[Piece::Hole(len)]);
            let json = lab.disk("diff", by, &other, &data, &limit).expect_json();
            assert_eq!(json["bytes_read_source"], 0);
            assert_eq!(json["bytes_read_destination"], len);
            json
        }
    };
    json["duration_seconds"].as_f64().unwrap()
}

fn a_read_limit_is_kept_to_a_twentieth(reads: &Reads, times: f64) {
    let Some(spec) = LabSpec::new() else { return };
    // In memory, so that no disk is part of what is measured.
    let lab = spec.mount(Kind::Tmpfs, 600 * MIB).start();
    // The agent is put in place.
    seconds(&lab, reads, 1);
    // Opening, syncing and a first burst are in both runs; what is between them is the rate.
    let measure = || {
        let short = seconds(&lab, reads, 20_000_000);
        let long = seconds(&lab, reads, 220_000_000);
        assert!(times * 220e6 / long <= 1.02 * RATE, "only {long} s");
        times * 200e6 / (long - short)
    };
    // A machine that is busy holds up now one, now the other.
    let is_kept = |_| (measure() / RATE - 1.0).abs() <= 0.05;
    assert!((0..3).any(is_kept), "not within a twentieth of {RATE}");
}

#[test]
fn a_source_is_read_at_the_limit() {
    a_read_limit_is_kept_to_a_twentieth(&Reads::Source, 1.0);
}

#[test]
fn a_destination_is_read_at_the_limit() {
    a_read_limit_is_kept_to_a_twentieth(&Reads::Destination, 1.0);
}

#[test]
fn the_result_is_read_again_at_the_limit() {
    a_read_limit_is_kept_to_a_twentieth(&Reads::SourceAndResult, 2.0);
}

/// Starts a sync from hvA to hvB with these options, and waits until it has begun to write.
fn begun(lab: &Lab, len: u64, options: &[&str]) -> kvm_clone_tests::controller::Running {
    let (source, directory) = (lab.path("source"), lab.path("copies"));
    image::write(&source, &[Piece::Random(1, len)]);
    fs::create_dir(&directory).unwrap();
    let by = Journey::Direct;
    let running = lab.start_disk("sync", by, &source, &directory.join("copy"), options);
    wait_for("the copy's beginning", Duration::from_secs(30), || {
        fs::read_dir(&directory).unwrap().next()
    })
    .unwrap();
    running
}

#[test]
fn who_waits_for_a_limit_can_be_stopped() {
    let Some(lab) = Lab::start() else { return };
    // A block a minute.
    let running = begun(&lab, MIB, &["--read-limit", "1K"]);
    let since = Instant::now();
    running.interrupt();
    let run = running.wait();
    assert!(run.is_interrupted(), "{run}");
    lab.wait_until_quiet();
    assert!(since.elapsed() < Duration::from_secs(5), "{run}");
}

/// The threads of a process that come before others, each with its nice value and its class of I/O.
fn impolite(process: &Path) -> Vec<String> {
    let threads = fs::read_dir(process.join("task")).unwrap();
    let threads = threads.map(|thread| thread.unwrap().path());
    threads
        .filter_map(|thread| impolite_thread(&thread))
        .collect()
}

/// `None` for one that has ended, too.
fn impolite_thread(thread: &Path) -> Option<String> {
    let stat = fs::read_to_string(thread.join("stat")).ok()?;
    let after_name = stat.rsplit(") ").next()?;
    let nice = after_name.split(' ').nth(16)?;
    let number = thread.file_name()?.to_str()?;
    let class = tool("ionice", ["-p", number]);
    (nice != "19" || class != "idle").then(|| format!("{number}: nice {nice}, {class}"))
}

#[test]
fn a_nice_agent_is_behind_others_with_all_its_threads() {
    let Some(lab) = Lab::start() else { return };
    let options = ["--nice", "--read-limit", "4M", "--verify", "reread"];
    let running = begun(&lab, 16 * MIB, &options);
    // One that brings the data connection lies between, and is no more than a pipe. What an agent
    // starts has the agent's words until it has become another program.
    let serves = |agent: &PathBuf| arguments(agent).get(1).is_some_and(|word| word == b"serve");
    let serving = wait_for("an agent on each host", Duration::from_secs(2), || {
        let mut agents: Vec<PathBuf> = [lab.a.agents(), lab.b.agents()].concat();
        agents.retain(serves);
        (agents.len() == 2).then_some(agents)
    });
    for agent in serving {
        assert!(fs::read_dir(agent.join("task")).unwrap().count() > 2);
        wait_for("threads that step back", Duration::from_secs(2), || {
            impolite(&agent).is_empty().then_some(())
        });
        let group = fs::read_to_string(agent.join("autogroup"));
        assert!(group.is_ok_and(|group| group.trim_end().ends_with("nice 19")));
    }
    running.wait().expect_code(0);
}

#[test]
fn rsync_is_nice_on_both_hosts() {
    let Some(lab) = Lab::start() else { return };
    let options = ["--method", "rsync", "--nice", "--bandwidth-limit", "4M"];
    let running = begun(&lab, 16 * MIB, &options);
    for host in [&lab.a, &lab.b] {
        let mut rsyncs = processes_in(&host.mount_namespace());
        rsyncs.retain(|process| {
            arguments(process)
                .first()
                .is_some_and(|word| word == b"rsync")
        });
        assert!(!rsyncs.is_empty(), "none on {}", host.name());
        for rsync in rsyncs {
            assert_eq!(impolite(&rsync), Vec::<String>::new());
        }
    }
    running.wait().expect_code(0);
}

#[test]
fn what_cannot_be_spared_is_refused_as_wrong_usage() {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, MIB)]);
    for limit in ["0", "fast", "-1"] {
        let options = format!("--read-limit={limit}");
        lab.disk("sync", Journey::Local, &source, &copy, &[&options])
            .expect_code(2);
    }
    for options in [
        ["--method=rsync", "--read-limit=1M"],
        ["--method=libvirt", "--read-limit=1M"],
        ["--method=libvirt", "--nice"],
    ] {
        let run = lab.disk("sync", Journey::Local, &source, &copy, &options);
        run.expect_code(2);
        assert!(run.stderr.contains("--method blocksync"), "{run}");
    }
    assert!(!copy.exists());
}
