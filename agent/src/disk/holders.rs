//! Who else has a disk in use, where no lock tells it: mounts, swap, devices on top of it, loop
//! devices, and the processes that have a device open.
//!
//! Devices are opened exclusively, so the kernel itself refuses what is mounted or part of another
//! device; this says what that is. A process that has a device open is in nobody's way by the
//! kernel's rules: it is found by the number of the device among the open files of all processes,
//! as far as we may see them. What the kernel itself has open without a claim (an iSCSI target on
//! a file) is not found.

use std::fmt;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvm_clone_protocol::message::{Access, FailureCode};

use super::kernel::{Kernel, Node, Number, entries, line};
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
    check_with(&Kernel::running(), file, path, access)
}

fn check_with(kernel: &Kernel, file: &File, path: &Path, access: Access) -> Result<(), Failure> {
    let writes = match access {
        Access::Source => false,
        Access::Destination => true,
        Access::Compare | Access::LiveSource => return Ok(()),
    };
    let metadata = file
        .metadata()
        .map_err(|error| Failure::io("examining", path, &error))?;
    let node = Node::of(&metadata);
    if let Some(device) = loop_device_on(kernel, node, writes) {
        let what = format!("the loop device {} lies on it", device.display());
        return Err(in_use(path, &what));
    }
    let Some(device) = node.stands_for else {
        return Ok(());
    };
    match of_device(kernel, device, writes) {
        Some(holder) => Err(in_use(path, &format!("{holder} has it open"))),
        None => Ok(()),
    }
}

/// The failure for a device that the kernel does not open exclusively: says who has it.
pub(super) fn busy(path: &Path) -> Failure {
    let kernel = Kernel::running();
    let device = Node::at(path).ok().and_then(|node| node.stands_for);
    let claim = device.and_then(|device| claim(&kernel, device));
    // Another mount namespace, or a driver that leaves no trace.
    let hidden = "something that is not seen from here holds it, such as a container's mount";
    in_use(path, claim.as_deref().unwrap_or(hidden))
}

/// The process that holds locks on an open file, if it can be seen.
pub(super) fn of_lock(file: &File) -> Option<Holder> {
    let kernel = Kernel::running();
    let node = Node::of(&file.metadata().ok()?);
    let open = kernel.open_files(|other| *other == node);
    let holder = open.into_iter().find(|file| file.locks)?;
    Some(Holder::of(&kernel, holder.pid))
}

fn in_use(path: &Path, what: &str) -> Failure {
    let message = format!("{} is in use: {what}", path.display());
    Failure::new(FailureCode::Busy, message)
}

/// A process that has the device open in a way that is not to be: at all if we write to it, for
/// writing if we read.
fn of_device(kernel: &Kernel, device: Number, we_write: bool) -> Option<Holder> {
    let family = Family::of(kernel, device);
    let open = kernel.open_files(|node| {
        node.stands_for
            .is_some_and(|number| family.holds(number) || family.whole == Some(number))
    });
    let disturbs = |number: Option<Number>, writes: bool| {
        // Whoever reads the disk that a partition is on need not read the partition.
        writes || (we_write && number != family.whole)
    };
    let holder = open
        .into_iter()
        .find(|file| disturbs(file.node.stands_for, file.writes))?;
    Some(Holder::of(kernel, holder.pid))
}

/// A device with its partitions, and the disk that it is a partition of.
struct Family {
    itself: Number,
    partitions: Vec<Number>,
    whole: Option<Number>,
}

impl Family {
    fn of(kernel: &Kernel, device: Number) -> Self {
        let number = |directory: &Path| Number::parse(&line(&directory.join("dev"))?);
        let directory = kernel.described(device);
        let directory = directory.canonicalize().unwrap_or(directory);
        let is_partition = |directory: &Path| directory.join("partition").exists();
        let partitions = entries(&directory).filter(|entry| is_partition(entry));
        let whole = directory.parent().filter(|_| is_partition(&directory));
        Self {
            itself: device,
            partitions: partitions.filter_map(|entry| number(&entry)).collect(),
            whole: whole.and_then(number),
        }
    }

    /// Whether that is the device, or a part of it.
    fn holds(&self, number: Number) -> bool {
        self.itself == number || self.partitions.contains(&number)
    }
}

/// What has claimed a device: where it is mounted, or what lies on it.
fn claim(kernel: &Kernel, device: Number) -> Option<String> {
    let family = Family::of(kernel, device);
    // A whole disk cannot be had while a part of it is claimed, and the reverse.
    let touches = |number: Number| family.holds(number) || family.whole == Some(number);
    let is_of_it = |path: &Path| {
        let node = path.starts_with("/dev").then(|| Node::at(path).ok());
        node.flatten()
            .and_then(|node| node.stands_for)
            .is_some_and(touches)
    };
    // btrfs has a number of its own, and names its device.
    let mounts = kernel.mounts();
    let mount = mounts
        .iter()
        .find(|mount| touches(mount.device) || is_of_it(Path::new(&mount.source)));
    if let Some(mount) = mount {
        return Some(format!("it is mounted on {}", mount.directory.display()));
    }
    let swaps = std::fs::read_to_string(kernel.proc.join("swaps")).unwrap_or_default();
    let mut swaps = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split(' ').next());
    if swaps.any(|path| is_of_it(Path::new(path))) {
        return Some("it is swap space".to_owned());
    }
    let numbers = family.partitions.iter().chain([&family.itself]);
    let mut above = numbers.flat_map(|number| entries(&kernel.described(*number).join("holders")));
    if let Some(above) = above.next() {
        let name = above.file_name().unwrap_or_default().to_string_lossy();
        let mapped = line(&above.join("dm/name"));
        let mapped = mapped.map(|name| String::from_utf8_lossy(&name).into_owned());
        let name = mapped.unwrap_or_else(|| name.into_owned());
        return Some(format!("the device {name} lies on it"));
    }
    let holder = of_device(kernel, device, true)?;
    Some(format!("{holder} has it open"))
}

/// The loop device whose bytes are those of a file or of another device. One that only reads does
/// not disturb whoever reads.
fn loop_device_on(kernel: &Kernel, node: Node, we_write: bool) -> Option<PathBuf> {
    let name = |device: &Path| device.file_name().map(|name| Path::new("/dev").join(name));
    let lies_on = |device: &Path| {
        let backing = line(&device.join("loop/backing_file"))?;
        let backing = PathBuf::from(std::ffi::OsString::from_vec(backing));
        let reads_only = line(&device.join("ro"))? == b"1";
        let backing = Node::at(&backing).ok()?;
        let same = match (backing.stands_for, node.stands_for) {
            (Some(backing), Some(device)) => backing == device,
            _ => backing == node,
        };
        Some(same && (we_write || !reads_only))
    };
    let is_loop = |device: &Path| {
        let name = device.file_name().unwrap_or_default();
        name.as_bytes().starts_with(b"loop")
    };
    entries(&kernel.sys.join("block"))
        .filter(|device| is_loop(device))
        .find(|device| lies_on(device) == Some(true))
        .and_then(|device| name(&device))
}

impl Holder {
    fn of(kernel: &Kernel, pid: u32) -> Self {
        if kernel.runs_what_we_run(pid) {
            return Self::Agent { pid };
        }
        let program = kernel.program(pid);
        Self::Process {
            pid,
            program: program.unwrap_or_else(|| "a process".to_owned()),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent { pid } => {
                write!(
                    f,
                    "another sync, or this one as its other disk (PID {pid}),"
                )
            }
            Self::Process { pid, program } => write!(f, "{program} (PID {pid})"),
        }
    }
}
