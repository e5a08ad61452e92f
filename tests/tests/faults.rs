//! Real faults: file systems that fill up or break, agents that are stopped, a connection that is
//! cut. Faults of single calls are tried in `agent/tests/faults`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvm_clone_tests::controller::Running;
use kvm_clone_tests::host::Host;
use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{self, Lab, LabSpec};
use kvm_clone_tests::mount::{FileSystem, Kind};
use kvm_clone_tests::namespace::apart;
use kvm_clone_tests::process::{tool, wait_for};
use kvm_clone_tests::skip::{obstacle, skip};
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;

/// A run has to end within this time, whatever becomes of its hosts.
const END: Duration = Duration::from_secs(30);

/// Bytes of the disks that are tried.
const SIZE: u64 = 24 * MIB;

/// What is at the destination of a run onto a file system that fills up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Data,
    /// A disk that is all hole, so that space is needed in its own place too.
    Hole,
}

fn free_bytes(at: &Path) -> u64 {
    tool("sync", ["-f".as_ref(), at.as_os_str()]);
    let found = statvfs(at).unwrap();
    found.blocks_available() * found.fragment_size()
}

/// Leaves so many bytes free. Gives the file that takes the others.
fn fill(file_system: &FileSystem, free: u64) -> PathBuf {
    let filler = file_system.join("filler");
    let taken = free_bytes(file_system.path()) - free;
    let len = taken.to_string();
    tool(
        "fallocate",
        ["-l".as_ref(), len.as_ref(), filler.as_os_str()],
    );
    filler
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// A destination file system on which so much is free fills up during the run.
fn a_full_file_system_is_left_as_it_was(kind: Kind, options: &[&str], before: Before, free: u64) {
    // xfs does not go below some 300 MiB; the backing file is sparse.
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.mount(kind, 400 * MIB).start();
    let mount = &lab.mounts()[0];
    let directory = mount.join("disks");
    fs::create_dir(&directory).unwrap();
    let (source, old, copy) = (lab.path("source"), lab.path("old"), directory.join("disk"));
    image::write(&source, &[Piece::Random(1, SIZE)]);
    let piece = match before {
        Before::Hole => Piece::Hole(SIZE),
        _ => Piece::Random(9, SIZE),
    };
    image::write(&old, &[piece]);
    if before != Before::Nothing {
        image::write(&copy, &[piece]);
    }
    let names = names_in(&directory);
    let filler = fill(mount, free);
    let left = free_bytes(mount.path());

    let run = lab.disk("sync", Journey::Relay, &source, &copy, options);
    run.expect_failure(8, &["no_space"], copy.to_str().unwrap());
    lab.wait_until_quiet();
    assert_eq!(names_in(&directory), names, "{run}");
    if before != Before::Nothing {
        image::assert_equal(&old, &copy);
    }
    let missing = left.saturating_sub(free_bytes(mount.path()));
    assert!(missing < MIB, "{missing} bytes are occupied: {run}");

    fs::remove_file(filler).unwrap();
    lab.sync(Journey::Relay, &source, &copy, options);
    assert_eq!(names_in(&directory), ["disk"]);
}

#[test]
fn a_full_file_system_has_the_old_version_of_what_was_staged() {
    let options = ["--apply", "staged"];
    a_full_file_system_is_left_as_it_was(Kind::Ext4, &options, Before::Data, SIZE / 2);
}

#[test]
fn a_file_system_without_space_for_what_is_staged_has_the_old_version() {
    let options = ["--apply", "staged"];
    // There is room for the changes, and not for them and what they will occupy.
    a_full_file_system_is_left_as_it_was(Kind::Ext4, &options, Before::Hole, SIZE + SIZE / 2);
}

#[test]
fn a_full_file_system_has_the_old_version_of_what_was_reflinked() {
    let options = ["--apply", "reflink"];
    a_full_file_system_is_left_as_it_was(Kind::Xfs, &options, Before::Data, SIZE / 2);
}

#[test]
fn a_full_file_system_has_nothing_of_what_did_not_exist() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        a_full_file_system_is_left_as_it_was(kind, &[], Before::Nothing, SIZE / 2);
    }
}

/// Starts a run that would take half a minute, and waits until a part has arrived.
fn started(lab: &Lab, by: Journey, source: &Path, copy: &Path, options: &[&str]) -> Running {
    let options = [&["--bandwidth-limit", "1M"], options].concat();
    let mut running = lab.start_disk("sync", by, source, copy, &options);
    wait_for("the first part", Duration::from_secs(60), || {
        assert!(running.is_alive(), "it ended too early");
        let directory = copy.parent().unwrap();
        let beside = names_in(directory)
            .into_iter()
            .map(|name| directory.join(name));
        let shared = |path: &PathBuf| image::difference(source, path);
        let arrived = beside.filter(|path| path != copy).map(|path| shared(&path));
        let most = arrived
            .map(|found| found.total - found.changed - found.zeroed)
            .max();
        (most? >= 24).then_some(())
    });
    running
}

/// The file system of a destination breaks in the middle of a run. Once it is mounted again it
/// holds the old version, and takes the new one.
fn a_file_system_that_breaks_holds_the_old_version(
    kind: Kind,
    options: &[&str],
    break_it: fn(&Path),
) {
    if let Some(reason) = obstacle() {
        return skip(&reason);
    }
    // Its mounts are nobody else's, so that it can be taken down, and mounted again.
    apart(|| {
        let ground = tempfile::tempdir_in(lab::base()).unwrap();
        let path = |name: &str| ground.path().join(name);
        let (image, mounted) = (path("image"), path("mounted"));
        let file_system = FileSystem::on_image(kind, 400 * MIB, &image, &mounted);
        fs::create_dir(mounted.join("disks")).unwrap();
        let (source, old, copy) = (path("source"), path("old"), mounted.join("disks/disk"));
        image::write(&source, &[Piece::Random(1, SIZE)]);
        image::write(&old, &[Piece::Random(9, SIZE)]);
        image::write(&copy, &[Piece::Random(9, SIZE)]);
        tool("sync", ["-f".as_ref(), mounted.as_os_str()]);

        let lab = Lab::start().unwrap();
        let running = started(&lab, Journey::Relay, &source, &copy, options);
        break_it(&mounted);
        let since = Instant::now();
        let run = running.wait();
        run.expect_failure(1, &["io"], "disk");
        assert!(since.elapsed() < END, "{run}");
        lab.wait_until_quiet();
        drop(lab);

        drop(file_system);
        let _file_system = FileSystem::of_image(&image, "rw", &mounted);
        image::assert_equal(&old, &copy);
        let lab = Lab::start().unwrap();
        lab.sync(Journey::Relay, &source, &copy, options);
        assert_eq!(names_in(&mounted.join("disks")), ["disk"]);
    });
}

#[test]
fn a_file_system_that_becomes_read_only_holds_the_old_version() {
    // What the kernel does on an error; a plain remount is refused while something is written.
    a_file_system_that_breaks_holds_the_old_version(
        Kind::Ext4,
        &["--apply", "staged"],
        |mounted| {
            let args = ["-o".as_ref(), "remount,abort".as_ref(), mounted.as_os_str()];
            tool("mount", args);
        },
    );
}

#[test]
fn a_file_system_that_shuts_down_holds_the_old_version() {
    a_file_system_that_breaks_holds_the_old_version(
        Kind::Xfs,
        &["--apply", "reflink"],
        |mounted| {
            let args = [
                "-x".as_ref(),
                "-c".as_ref(),
                "shutdown".as_ref(),
                mounted.as_os_str(),
            ];
            tool("xfs_io", args);
        },
    );
}

/// A disk of which half a minute ships a part, and the place of a copy.
fn disks(lab: &Lab) -> (PathBuf, PathBuf) {
    let (source, directory) = (lab.path("source"), lab.path("copies"));
    image::write(&source, &[Piece::Random(1, SIZE)]);
    fs::create_dir(&directory).unwrap();
    (source, directory.join("copy"))
}

fn signal_all(host: &Host, signal: Signal) -> usize {
    let agents = host.agents();
    for agent in &agents {
        let id = agent
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        kill(Pid::from_raw(id), signal).unwrap();
    }
    agents.len()
}

fn is_taken_up_by_the_next_run(lab: &Lab, by: Journey, source: &Path, copy: &Path) {
    lab.wait_until_quiet();
    let outcome = lab.sync(by, source, copy, &[]);
    assert_eq!(outcome.json["resumed"], true, "{}", outcome.run);
    assert_eq!(names_in(copy.parent().unwrap()), ["copy"]);
}

fn an_agent_that_is_stopped_is_given_up(by: Journey, host: fn(&Lab) -> &Host) {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = disks(&lab);
    let running = started(&lab, by, &source, &copy, &[]);
    let host = host(&lab);
    let stopped = signal_all(host, Signal::SIGSTOP);
    assert!(stopped > 0);
    let since = Instant::now();
    let run = running.wait();
    run.expect_failure(6, &["interrupted"], host.name());
    assert!(since.elapsed() < END, "{run}");
    assert!(!copy.exists());
    signal_all(host, Signal::SIGCONT);
    is_taken_up_by_the_next_run(&lab, by, &source, &copy);
}

#[test]
fn a_destination_agent_that_is_stopped_is_given_up_and_ends_when_it_goes_on() {
    an_agent_that_is_stopped_is_given_up(Journey::Relay, |lab| &lab.b);
}

#[test]
fn a_source_agent_that_is_stopped_is_given_up_and_ends_when_it_goes_on() {
    an_agent_that_is_stopped_is_given_up(Journey::Direct, |lab| &lab.a);
}

/// Neither host nor controller is told that the connection of a host is gone.
fn a_host_that_is_cut_off_is_given_up(by: Journey, number: usize) {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.networked().start();
    let (source, copy) = disks(&lab);
    let running = started(&lab, by, &source, &copy, &[]);
    lab.network().cut(number);
    let since = Instant::now();
    let run = running.wait();
    run.expect_failure(6, &["interrupted"], "hv");
    assert!(since.elapsed() < END, "{run}");
    // Those on the host that nobody reaches end by themselves.
    for host in [&lab.a, &lab.b] {
        host.wait_without_agents();
    }
    assert!(since.elapsed() < END, "{:?}", since.elapsed());
    assert!(!copy.exists());
    lab.network().mend(number);
    is_taken_up_by_the_next_run(&lab, by, &source, &copy);
}

#[test]
fn a_destination_that_is_cut_off_is_given_up_and_its_agent_ends() {
    a_host_that_is_cut_off_is_given_up(Journey::Direct, 1);
}

#[test]
fn a_source_that_is_cut_off_is_given_up_and_its_agent_ends() {
    a_host_that_is_cut_off_is_given_up(Journey::Relay, 0);
}

#[test]
fn the_agent_for_hosts_knows_nothing_of_faults() {
    let Some(lab) = Lab::start() else { return };
    let agent = fs::read(lab.install_agent()).unwrap();
    let holds = |text: &str| {
        agent
            .windows(text.len())
            .any(|bytes| bytes == text.as_bytes())
    };
    assert!(holds("kvm-clone-agent"), "it is an agent");
    assert!(!holds("KVM_CLONE_FAULTS"));
}
