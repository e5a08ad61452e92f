//! Who else has a disk in use, where no lock tells it: mounts, devices on top of it, and the
//! processes that have a device open.
//!
//! Devices are opened exclusively, so the kernel itself refuses what is mounted or part of another
//! device; this says what that is. A process that has a device open is in nobody's way by the
//! kernel's rules: it is found by the number of the device among the open files of all processes,
//! as far as we may see them. What the kernel itself has open without a claim (an iSCSI target on
//! a file) is not found.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use kvm_clone_protocol::message::{Access, FailureCode};

use super::claims::{self, Family};
use super::kernel::{Kernel, Node, Number};
use crate::failure::Failure;

/// How long a disk that is in use is looked at again: udev looks into a device that was written
/// to, and an agent whose controller was killed takes a moment to end.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often.
const PAUSE: Duration = Duration::from_millis(50);

/// Who has a disk in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Holder {
    /// Another agent, or this run's own other one.
    Agent {
        pid: u32,
    },
    Process {
        pid: u32,
        program: String,
    },
}

/// Tries again for a moment while the disk is in use.
///
/// # Errors
/// [`Failure`] of the last attempt.
pub(super) fn patiently<T>(mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(failure) if failure.code == FailureCode::Busy && Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// Refuses a device that a process has open, and a disk that a loop device lies on: a destination
/// in any case, a source when it may be written to.
///
/// # Errors
/// [`Failure`] that names who has it in use.
pub(super) fn check(file: &File, path: &Path, access: Access) -> Result<(), Failure> {
    let writes = match access {
        Access::Source => false,
        Access::Destination => true,
        Access::Compare | Access::LiveSource => return Ok(()),
    };
    let metadata = file
        .metadata()
        .map_err(|error| Failure::io("examining", path, &error))?;
    let (kernel, node) = (Kernel::running(), Node::of(&metadata));
    if let Some(device) = claims::loop_device_on(&kernel, node, writes) {
        let what = format!("the loop device {} lies on it", device.display());
        return Err(in_use(path, &what));
    }
    let Some(device) = node.stands_for else {
        return Ok(());
    };
    match open_in(&of_device(&kernel, device, writes)) {
        Some(what) => Err(in_use(path, &what)),
        None => Ok(()),
    }
}

/// The failure for a device that the kernel does not open exclusively: says who has it.
pub(super) fn busy(path: &Path) -> Failure {
    let kernel = Kernel::running();
    let device = Node::at(path).ok().and_then(|node| node.stands_for);
    let what = device.and_then(|device| {
        claims::on_device(&kernel, device).or_else(|| open_in(&of_device(&kernel, device, true)))
    });
    // Another mount namespace, or a driver that leaves no trace.
    let hidden = "something that is not seen from here holds it, such as a container's mount";
    in_use(path, what.as_deref().unwrap_or(hidden))
}

/// The process that holds a lock on this byte of an open file, if it can be seen.
pub(super) fn of_lock(file: &File, byte: i64) -> Option<Holder> {
    let kernel = Kernel::running();
    let node = Node::of(&file.metadata().ok()?);
    let open = kernel.open_files(|other| *other == node);
    open.iter()
        .filter(|file| file.locks.iter().any(|range| range.contains(&byte)))
        .find_map(|file| Holder::of(&kernel, file.pid))
}

fn in_use(path: &Path, what: &str) -> Failure {
    let message = format!("{} is in use: {what}", path.display());
    Failure::new(FailureCode::Busy, message)
}

/// The processes that have the device open in a way that is not to be: at all if we write to it,
/// for writing if we read.
fn of_device(kernel: &Kernel, device: Number, we_write: bool) -> Vec<Holder> {
    let family = Family::of(kernel, device);
    let open = kernel.open_files(|node| {
        node.stands_for
            .is_some_and(|number| family.holds(number) || family.whole == Some(number))
    });
    let disturbs = |number: Option<Number>, writes: bool| {
        // Whoever reads the disk that a partition is on need not read the partition.
        writes || (we_write && number != family.whole)
    };
    let mut holders: Vec<_> = open
        .iter()
        .filter(|file| disturbs(file.node.stands_for, file.writes))
        .filter_map(|file| Holder::of(kernel, file.pid))
        .collect();
    // A process may have it open several times.
    holders.dedup();
    holders
}

/// All of them, since some may only look into it and be gone before the message is read.
fn open_in(holders: &[Holder]) -> Option<String> {
    let names: Vec<_> = holders.iter().map(Holder::to_string).collect();
    (!names.is_empty()).then(|| format!("it is open in {}", names.join(", ")))
}

impl Holder {
    /// `None` when the process has ended meanwhile.
    fn of(kernel: &Kernel, pid: u32) -> Option<Self> {
        let program = kernel.program(&pid.to_string())?;
        // Not told by the file: two that were sent at the same time are two files.
        Some(if kernel.program("self").as_ref() == Some(&program) {
            Self::Agent { pid }
        } else {
            Self::Process { pid, program }
        })
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent { pid } => write!(f, "another sync or this one's other end (PID {pid})"),
            Self::Process { pid, program } => write!(f, "{program} (PID {pid})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};

    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc;
    use nix::sys::stat::{Mode, SFlag, mknod};
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn patience_ends_with_success_with_another_failure_or_with_the_last_refusal() {
        let busy = || Err::<(), _>(Failure::new(FailureCode::Busy, "busy"));
        let mut attempts = 0;
        let freed = patiently(|| {
            attempts += 1;
            if attempts < 3 { busy() } else { Ok(()) }
        });
        assert_eq!((freed, attempts), (Ok(()), 3));
        let broken = patiently(|| Err::<(), _>(Failure::new(FailureCode::Io, "broken")));
        assert_eq!(broken.unwrap_err().code, FailureCode::Io);
        assert_eq!(patiently(busy), busy());
    }

    /// A loop device on a file of its own; none without root, or where the machine has none.
    struct LoopDevice {
        path: PathBuf,
        backing: PathBuf,
        _directory: TempDir,
    }

    impl LoopDevice {
        fn new() -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            let backing = directory.path().join("backing");
            File::create_new(&backing)
                .unwrap()
                .set_len(1 << 20)
                .unwrap();
            let made = Command::new("losetup")
                .args(["--find", "--show"])
                .arg(&backing)
                .output();
            match made {
                Ok(made) if made.status.success() => Some(Self {
                    path: String::from_utf8(made.stdout).unwrap().trim_end().into(),
                    backing,
                    _directory: directory,
                }),
                made => {
                    eprintln!("SKIPPED: no loop device can be made here: {made:?}");
                    None
                }
            }
        }
    }

    impl Drop for LoopDevice {
        fn drop(&mut self) {
            let _ = Command::new("losetup")
                .arg("--detach")
                .arg(&self.path)
                .status();
        }
    }

    /// A process that has a file open until it is dropped.
    struct Other(Child);

    impl Other {
        fn with_open(redirection: &str, path: &Path) -> Self {
            let script = format!("exec 5{redirection}\"$0\" && echo open && read end");
            let mut child = Command::new("sh")
                .args(["-c", &script])
                .arg(path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            let output = child.stdout.as_mut().unwrap();
            BufReader::new(output).read_line(&mut line).unwrap();
            assert_eq!(line, "open\n");
            Self(child)
        }

        fn name(&self) -> String {
            format!("sh (PID {})", self.0.id())
        }
    }

    impl Drop for Other {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn assert_named(other: &Other, failure: &Failure) {
        assert_eq!(failure.code, FailureCode::Busy);
        assert!(failure.message.contains(&other.name()), "{failure}");
    }

    #[test]
    fn a_device_that_a_process_has_open_is_found_by_its_number() {
        let Some(device) = LoopDevice::new() else {
            return;
        };
        // Another name of the same device, as libvirt has them in its guests' own /dev.
        let node = device.backing.with_file_name("node");
        let number = device.path.metadata().unwrap().rdev();
        mknod(&node, SFlag::S_IFBLK, Mode::S_IRUSR, number).unwrap();
        let Ok(file) = File::open(&node) else {
            eprintln!("SKIPPED: {} lies where devices do not work", node.display());
            return;
        };
        // Patiently, since a process that another test is about to start has all that we have.
        let allowed = |access| patiently(|| check(&file, &node, access));
        let refused = |access| check(&file, &node, access).unwrap_err();
        assert_eq!(allowed(Access::Destination), Ok(()), "ours does not count");

        let reader = Other::with_open("<", &device.path);
        assert_named(&reader, &refused(Access::Destination));
        assert_eq!(allowed(Access::Source), Ok(()));
        drop(reader);

        let writer = Other::with_open("<>", &device.path);
        for access in [Access::Source, Access::Destination] {
            assert_named(&writer, &refused(access));
        }
        for access in [Access::LiveSource, Access::Compare] {
            assert_eq!(check(&file, &node, access), Ok(()));
        }
        drop(writer);
        assert_eq!(allowed(Access::Destination), Ok(()));
    }

    #[test]
    fn a_device_that_is_held_exclusively_is_busy_by_name() {
        let Some(device) = LoopDevice::new() else {
            return;
        };
        let reader = Other::with_open("<", &device.path);
        assert_named(&reader, &busy(&device.path));
    }

    #[test]
    fn a_file_under_a_loop_device_is_refused() {
        let Some(device) = LoopDevice::new() else {
            return;
        };
        let file = File::open(&device.backing).unwrap();
        for access in [Access::Source, Access::Destination] {
            let failure = check(&file, &device.backing, access).unwrap_err();
            let name = device.path.to_str().unwrap();
            assert!(failure.message.contains(name), "{failure}");
        }
    }

    #[test]
    fn who_holds_a_lock_is_found_and_who_has_but_the_file_open_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let _reader = Other::with_open("<", file.path());
        assert_eq!(of_lock(file.as_file(), 100), None);
        let lock = libc::flock {
            l_type: i16::try_from(libc::F_RDLCK).unwrap(),
            l_whence: 0,
            l_start: 100,
            l_len: 1,
            l_pid: 0,
        };
        let theirs = File::open(file.path()).unwrap();
        fcntl(&theirs, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        // The description, and its lock with it, is the child's alone from here on.
        let child = Command::new("sleep").arg("60").stdin(theirs).spawn();
        let child = Other(child.unwrap());
        let expected = Holder::Process {
            pid: child.0.id(),
            program: "sleep".to_owned(),
        };
        assert_eq!(of_lock(file.as_file(), 100), Some(expected));
        assert_eq!(of_lock(file.as_file(), 101), None);
    }
}
