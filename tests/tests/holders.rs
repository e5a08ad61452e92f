//! Disks that something else has in use: QEMU, another sync, a mount, a process, a loop device.
//! Each is refused with its holder's name where that can be seen, and nothing is changed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use Piece::{Hole, Random};
use kvm_clone_tests::controller::Running;
use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::process::{tool, wait_for};
use kvm_clone_tests::skip::{find_tool, skip};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

const SIZE: u64 = 4 * MIB;

/// Long enough for a program to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A laboratory on a machine that has QEMU's tools.
fn lab_with_qemu() -> Option<Lab> {
    if find_tool("qemu-io").is_none() {
        skip("qemu-io is not installed");
        return None;
    }
    Lab::start()
}

/// A program that has a disk open until the end of the test.
struct Holder(Child);

impl Holder {
    /// QEMU, as it opens a disk for a VM, or to read it.
    fn qemu(options: &[&str], disk: &Path) -> Self {
        let mut command = Command::new(find_tool("qemu-io").unwrap());
        command.args(options).args(["-c", "sleep 600000"]).arg(disk);
        let holder = Self(command.stdout(Stdio::null()).spawn().unwrap());
        holder.wait_until("QEMU's lock", |link, info| {
            fs::read_link(link).is_ok_and(|target| target == disk)
                && fs::read_to_string(info).is_ok_and(|text| text.contains("lock:"))
        });
        holder
    }

    /// A shell that has it open, as the redirection says.
    fn shell(redirection: &str, disk: &Path) -> Self {
        let script = format!("exec 5{redirection}\"$0\"; exec sleep 600");
        let mut command = Command::new("sh");
        let holder = Self(command.args(["-c", &script]).arg(disk).spawn().unwrap());
        holder.wait_until("the open file", |link, _| {
            fs::read_link(link).is_ok_and(|target| target == disk)
        });
        wait_for("the end of the shell", PATIENCE, || {
            let comm = fs::read_to_string(format!("/proc/{}/comm", holder.0.id()));
            (comm.unwrap() == "sleep\n").then_some(())
        });
        holder
    }

    fn wait_until(&self, what: &str, is_there: impl Fn(&Path, &Path) -> bool) {
        let process = PathBuf::from(format!("/proc/{}", self.0.id()));
        wait_for(what, PATIENCE, || {
            let entries = fs::read_dir(process.join("fd")).unwrap();
            let mut links = entries.map(|entry| entry.unwrap().path());
            links
                .any(|link| {
                    is_there(
                        &link,
                        &process.join("fdinfo").join(link.file_name().unwrap()),
                    )
                })
                .then_some(())
        });
    }

    /// As a message says it.
    fn named(&self, program: &str) -> String {
        format!("{program} (PID {})", self.0.id())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A source, a destination that differs, and copies of both.
struct Disks {
    source: PathBuf,
    destination: PathBuf,
    before: PathBuf,
}

impl Disks {
    fn new(lab: &Lab) -> Self {
        let [source, destination, before] =
            ["source", "destination", "before"].map(|name| lab.path(name));
        image::write(&source, &[Random(1, 2 * MIB), Hole(SIZE - 2 * MIB)]);
        image::write(&destination, &[Random(2, SIZE)]);
        image::write(&before, &[Random(2, SIZE)]);
        Self {
            source,
            destination,
            before,
        }
    }

    /// Both as qcow2, which QEMU locks more of.
    fn qcow2(lab: &Lab) -> Self {
        let disks = Self::new(lab);
        for disk in [&disks.source, &disks.destination] {
            let size = SIZE.to_string();
            let words = ["create", "-q", "-f", "qcow2"].map(AsRef::as_ref);
            let last = [disk.as_os_str(), size.as_ref()];
            tool("qemu-img", words.into_iter().chain(last));
        }
        let words = ["-f", "qcow2", "-c", "write -P 7 1M 64k"].map(AsRef::as_ref);
        tool(
            "qemu-io",
            words.into_iter().chain([disks.source.as_os_str()]),
        );
        fs::copy(&disks.destination, &disks.before).unwrap();
        disks
    }

    /// Claims that no run takes the destination, and that it stays as it is.
    fn expect_destination_refused(&self, lab: &Lab, by: &[Journey], holder: &str) {
        for by in by {
            let run = lab.disk("sync", *by, &self.source, &self.destination, &[]);
            let message = run.expect_failure(5, &["busy"], self.destination.to_str().unwrap());
            assert!(message.contains(holder), "no {holder} in {run}");
            image::assert_equal(&self.before, &self.destination);
        }
    }

    /// Claims that no run takes the source, and that the destination stays as it is.
    fn expect_source_refused(&self, lab: &Lab, by: &[Journey], holder: &str) {
        for by in by {
            let run = lab.disk("sync", *by, &self.source, &self.destination, &[]);
            let message = run.expect_failure(5, &["busy"], self.source.to_str().unwrap());
            assert!(message.contains(holder), "no {holder} in {run}");
            image::assert_equal(&self.before, &self.destination);
        }
    }
}

/// The hosts have processes of their own, and do not see who it is.
const BY_HOSTS: [Journey; 2] = [Journey::Direct, Journey::Relay];
const HERE: [Journey; 1] = [Journey::Local];
const UNSEEN: &str = "a running VM or another sync";

#[test]
fn a_destination_that_qemu_has_is_refused_whether_it_writes_or_reads() {
    let Some(lab) = lab_with_qemu() else { return };
    let disks = Disks::new(&lab);
    for options in [&["-f", "raw"][..], &["-r", "-f", "raw"]] {
        let holder = Holder::qemu(options, &disks.destination);
        disks.expect_destination_refused(&lab, &HERE, &holder.named("qemu-io"));
        disks.expect_destination_refused(&lab, &BY_HOSTS, UNSEEN);
    }
    let disks = Disks::qcow2(&lab);
    for options in [&["-f", "qcow2"][..], &["-r", "-f", "qcow2"]] {
        let holder = Holder::qemu(options, &disks.destination);
        disks.expect_destination_refused(&lab, &HERE, &holder.named("qemu-io"));
    }
    lab.sync(Journey::Local, &disks.source, &disks.destination, &[]);
}

#[test]
fn a_source_that_qemu_writes_is_refused_and_one_that_it_reads_is_not() {
    let Some(lab) = lab_with_qemu() else { return };
    let raw = Disks::new(&lab);
    let holder = Holder::qemu(&["-f", "raw"], &raw.source);
    raw.expect_source_refused(&lab, &HERE, &holder.named("qemu-io"));
    raw.expect_source_refused(&lab, &BY_HOSTS, UNSEEN);
    drop(holder);
    let reader = Holder::qemu(&["-r", "-f", "raw"], &raw.source);
    lab.sync(Journey::Direct, &raw.source, &raw.destination, &[]);

    drop(reader);
    let qcow2 = Disks::qcow2(&lab);
    let holder = Holder::qemu(&["-f", "qcow2"], &qcow2.source);
    qcow2.expect_source_refused(&lab, &HERE, &holder.named("qemu-io"));
    drop(holder);
    let _reader = Holder::qemu(&["-r", "-f", "qcow2"], &qcow2.source);
    lab.sync(Journey::Direct, &qcow2.source, &qcow2.destination, &[]);
}

/// Whether somebody holds the byte that all users of an image hold.
fn is_held(disk: &Path) -> bool {
    let mut lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: 0,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    let Ok(file) = File::open(disk) else {
        return false;
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).unwrap();
    lock.l_type != i16::try_from(libc::F_UNLCK).unwrap()
}

/// A disk of this size takes a slow sync a minute, longer than any test looks at it.
const SLOW_SIZE: u64 = 60 * MIB;

/// A sync that goes on until it is interrupted.
struct Slow<'a> {
    running: Running,
    source: &'a Path,
    destination: &'a Path,
}

impl<'a> Slow<'a> {
    fn start(lab: &Lab, source: &'a Path, destination: &'a Path) -> Self {
        let slow = ["--bandwidth-limit", "1M"];
        let running = lab.start_disk("sync", Journey::Local, source, destination, &slow);
        let slow = Self {
            running,
            source,
            destination,
        };
        wait_for("both locks", PATIENCE, || slow.holds_both().then_some(()));
        slow
    }

    fn holds_both(&self) -> bool {
        is_held(self.source) && is_held(self.destination)
    }

    fn interrupt(mut self) {
        assert!(self.running.is_alive() && self.holds_both());
        self.running.interrupt();
        assert!(self.running.wait().is_interrupted());
        wait_for("the end of the agents", PATIENCE, || {
            (!is_held(self.source) && !is_held(self.destination)).then_some(())
        });
    }
}

/// Whether QEMU opens a disk, and what it says if not.
fn qemu_opens(options: &[&str], disk: &Path) -> Result<(), String> {
    let mut command = Command::new(find_tool("qemu-io").unwrap());
    let ended = command
        .args(options)
        .args(["-c", "quit"])
        .arg(disk)
        .output();
    let ended = ended.unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    if ended.status.success() {
        return Ok(());
    }
    assert!(said.contains("lock"), "{said}");
    Err(said)
}

#[test]
fn while_a_sync_runs_nobody_has_its_destination_and_nobody_writes_its_source() {
    let Some(lab) = lab_with_qemu() else { return };
    let disks = Disks::qcow2(&lab);
    // Random to the end, and other than the source's: the limit makes it take a while.
    let (noise, source) = (lab.path("noise"), lab.path("noise.qcow2"));
    image::write(&noise, &[Random(5, SLOW_SIZE)]);
    let words = ["convert", "-f", "raw", "-O", "qcow2"].map(AsRef::as_ref);
    let last = [noise.as_os_str(), source.as_os_str()];
    tool("qemu-img", words.into_iter().chain(last));
    let (destination, other) = (&disks.destination, lab.path("other"));
    let running = Slow::start(&lab, &source, destination);

    // QEMU, which is told by the kernel.
    for options in [
        &["-f", "qcow2"][..],
        &["-r", "-f", "qcow2"],
        &["-r", "-f", "raw"],
    ] {
        qemu_opens(options, destination).unwrap_err();
    }
    qemu_opens(&["-f", "qcow2"], &source).unwrap_err();
    qemu_opens(&["-r", "-f", "qcow2"], &source).unwrap();

    // Another sync, in each combination.
    let sync = |by, from: &Path, to: &Path| lab.disk("sync", by, from, to, &[]);
    for (by, holder) in [(Journey::Local, "another sync"), (Journey::Relay, UNSEEN)] {
        for (from, to, refused) in [
            (disks.source.as_path(), destination.as_path(), destination),
            (destination, &other, destination),
            (&disks.source, &source, &source),
        ] {
            let run = sync(by, from, to);
            let message = run.expect_failure(5, &["busy"], refused.to_str().unwrap());
            assert!(message.contains(holder), "no {holder} in {run}");
            assert!(!other.exists());
        }
    }
    sync(Journey::Relay, &source, &other).expect_code(0);
    image::assert_equal(&source, &other);
    running.interrupt();
    lab.disk("sync", Journey::Relay, &source, destination, &[])
        .expect_code(0);
    image::assert_equal(&source, destination);
}

/// A device as the destination of a file, and what is on it.
fn with_a_device(lab: &Lab) -> (Disks, kvm_clone_tests::mount::LoopDevice) {
    let disks = Disks::new(lab);
    let device = lab.device("backing", SIZE);
    image::overwrite(device.path(), &[Random(2, SIZE)]);
    let disks = Disks {
        destination: device.path().to_owned(),
        ..disks
    };
    (disks, device)
}

/// The same with the device as the source.
fn from_a_device(lab: &Lab) -> (Disks, kvm_clone_tests::mount::LoopDevice) {
    let disks = Disks::new(lab);
    let device = lab.device("origin", SIZE);
    image::overwrite(device.path(), &[Random(1, SIZE)]);
    let disks = Disks {
        source: device.path().to_owned(),
        ..disks
    };
    (disks, device)
}

#[test]
fn a_device_that_a_process_has_open_is_refused_unless_both_only_read() {
    let Some(lab) = Lab::start() else { return };
    let (to, _destination) = with_a_device(&lab);
    for redirection in ["<", "<>"] {
        let holder = Holder::shell(redirection, &to.destination);
        let here = [Journey::Local, Journey::Pull];
        to.expect_destination_refused(&lab, &here, &holder.named("sleep"));
    }
    let (from, _source) = from_a_device(&lab);
    let holder = Holder::shell("<>", &from.source);
    let here = [Journey::Local, Journey::Push];
    from.expect_source_refused(&lab, &here, &holder.named("sleep"));
    let torn = ["--live", "torn"];
    lab.disk(
        "sync",
        Journey::Local,
        &from.source,
        &lab.path("torn"),
        &torn,
    )
    .expect_code(0);
    drop(holder);
    let _reader = Holder::shell("<", &from.source);
    lab.sync(Journey::Push, &from.source, &from.destination, &[]);
}

#[test]
fn a_device_that_qemu_has_is_refused_by_its_lock_on_every_host() {
    let Some(lab) = lab_with_qemu() else { return };
    let (to, _destination) = with_a_device(&lab);
    for options in [&["-f", "raw"][..], &["-r", "-f", "raw"]] {
        let holder = Holder::qemu(options, &to.destination);
        to.expect_destination_refused(&lab, &HERE, &holder.named("qemu-io"));
        to.expect_destination_refused(&lab, &[Journey::Relay], UNSEEN);
    }
    let (from, _source) = from_a_device(&lab);
    let holder = Holder::qemu(&["-f", "raw"], &from.source);
    from.expect_source_refused(&lab, &HERE, &holder.named("qemu-io"));
    from.expect_source_refused(&lab, &[Journey::Relay], UNSEEN);
    drop(holder);
    let _reader = Holder::qemu(&["-r", "-f", "raw"], &from.source);
    lab.sync(Journey::Relay, &from.source, &from.destination, &[]);
}

#[test]
fn while_a_sync_runs_nobody_has_its_devices() {
    let Some(lab) = lab_with_qemu() else { return };
    let [source, destination] = ["from", "to"].map(|name| lab.device(name, SLOW_SIZE));
    image::overwrite(source.path(), &[Random(1, SLOW_SIZE)]);
    let (from, to) = (source.path(), destination.path());
    let (file, other) = (lab.path("file"), lab.path("other"));
    image::write(&file, &[Random(3, MIB)]);
    let running = Slow::start(&lab, from, to);
    for options in [&["-f", "raw"][..], &["-r", "-f", "raw"]] {
        qemu_opens(options, to).unwrap_err();
    }
    for (one, two, refused) in [(&*file, to, to), (to, &*other, to), (&file, from, from)] {
        let run = lab.disk("sync", Journey::Local, one, two, &[]);
        let message = run.expect_failure(5, &["busy"], refused.to_str().unwrap());
        assert!(message.contains("another sync"), "{run}");
    }
    assert!(!other.exists());
    running.interrupt();
    lab.sync(Journey::Local, from, to, &[]);
}

#[test]
fn a_mounted_device_is_refused_and_the_message_says_where() {
    let Some(lab) = Lab::start() else { return };
    let disks = Disks::new(&lab);
    for kind in ["ext4", "btrfs"] {
        let device = lab.device(kind, 128 * MIB);
        tool(
            &format!("mkfs.{kind}"),
            ["-q".as_ref(), device.path().as_os_str()],
        );
        let directory = lab.path(format!("mounted {kind}"));
        fs::create_dir(&directory).unwrap();
        tool("mount", [device.path(), &directory]);
        let _mounted = Mounted(&directory);
        let there = format!("is mounted on {}", directory.display());
        let as_destination = lab.disk("sync", Journey::Local, &disks.source, device.path(), &[]);
        let as_source = lab.disk(
            "sync",
            Journey::Local,
            device.path(),
            &disks.destination,
            &[],
        );
        for run in [as_destination, as_source] {
            let message = run.expect_failure(5, &["busy"], device.path().to_str().unwrap());
            assert!(message.contains(&there), "{run}");
        }
        // The host has mounts of its own, and does not see this one.
        let unseen = lab.disk("sync", Journey::Relay, &disks.source, device.path(), &[]);
        let message = unseen.expect_failure(5, &["busy"], device.path().to_str().unwrap());
        assert!(message.contains("not seen from here"), "{unseen}");
        image::assert_equal(&disks.before, &disks.destination);
    }
}

/// What is mounted until the end of the test.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        kvm_clone_tests::mount::tear_down("umount", &[self.0]);
    }
}

#[test]
fn a_file_under_a_loop_device_is_refused_unless_both_only_read() {
    let Some(lab) = Lab::start() else { return };
    let (to, destination) = with_a_device(&lab);
    let name = destination.path().to_str().unwrap();
    let to = Disks {
        destination: destination.backing().to_owned(),
        ..to
    };
    to.expect_destination_refused(&lab, &[Journey::Local, Journey::Relay], name);
    let (from, source) = from_a_device(&lab);
    let name = source.path().to_str().unwrap();
    let from = Disks {
        source: source.backing().to_owned(),
        ..from
    };
    from.expect_source_refused(&lab, &[Journey::Local, Journey::Relay], name);

    let set = |option: &str| tool("blockdev", [option.as_ref(), source.path().as_os_str()]);
    set("--setro");
    lab.sync(Journey::Relay, &from.source, &from.destination, &[]);
    let run = lab.disk("sync", Journey::Local, &to.source, &from.source, &[]);
    run.expect_failure(5, &["busy"], name);
    set("--setrw");
}

#[test]
fn a_device_that_is_written_to_while_it_is_read_is_no_success() {
    let Some(lab) = Lab::start() else { return };
    let device = lab.device("origin", 8 * MIB);
    image::overwrite(device.path(), &[Random(1, 8 * MIB)]);
    let copy = lab.path("copy");
    let slow = ["--bandwidth-limit", "4M"];
    let running = lab.start_disk("sync", Journey::Direct, device.path(), &copy, &slow);
    // Something of it has arrived, so that what it was before has been noted.
    wait_for("what lies beside the copy", PATIENCE, || {
        let names = fs::read_dir(lab.path(""))
            .unwrap()
            .map(|entry| entry.unwrap());
        let mut arrived =
            names.filter(|entry| entry.file_name().to_str().unwrap().starts_with(".copy"));
        arrived
            .any(|entry| image::data_bytes(&entry.path()) > 0)
            .then_some(())
    });
    // It is still dirty in the page cache when the run ends: nobody syncs it, and closing does
    // not either while somebody else has the device open.
    let writer = File::options().write(true).open(device.path());
    writer.unwrap().write_all_at(b"new", 0).unwrap();
    let message = running
        .wait()
        .expect_failure(1, &["io"], device.path().to_str().unwrap());
    assert!(message.contains("written to"), "{message}");
    assert!(!copy.exists());
    lab.sync(Journey::Direct, device.path(), &copy, &[]);
}
