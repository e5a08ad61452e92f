//! What the kernel itself has on a disk: a mount, swap, a device on top of it.
//!
//! The kernel refuses to open such a device exclusively, and does not say why; this finds out. A
//! loop device claims nothing, neither a file nor a device that it lies on: it is looked for.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::kernel::{Kernel, Node, Number, entries, line};

/// A device with its partitions, and the disk that it is a partition of.
pub(super) struct Family {
    itself: Number,
    partitions: Vec<Number>,
    pub(super) whole: Option<Number>,
}

impl Family {
    pub(super) fn of(kernel: &Kernel, device: Number) -> Self {
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
    pub(super) fn holds(&self, number: Number) -> bool {
        self.itself == number || self.partitions.contains(&number)
    }
}

/// What keeps a device from being opened exclusively: where it is mounted, or what lies on it.
pub(super) fn on_device(kernel: &Kernel, device: Number) -> Option<String> {
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
        .filter_map(|line| line.split_ascii_whitespace().next());
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
    None
}

/// The loop device whose bytes are those of a file or of another device. One that only reads does
/// not disturb whoever reads.
pub(super) fn loop_device_on(kernel: &Kernel, node: Node, we_write: bool) -> Option<PathBuf> {
    let name = |device: &Path| device.file_name().map(|name| Path::new("/dev").join(name));
    let lies_on = |device: &Path| {
        let backing = line(&device.join("loop/backing_file"))?;
        let backing = PathBuf::from(OsString::from_vec(backing));
        let reads_only = line(&device.join("ro")).is_some_and(|text| text == b"1");
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A kernel that tells what a test has it tell.
    fn pretended() -> (TempDir, Kernel) {
        let directory = tempfile::tempdir().unwrap();
        let [proc, sys] = ["proc", "sys"].map(|name| directory.path().join(name));
        let kernel = Kernel { proc, sys };
        (directory, kernel)
    }

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn number(text: &str) -> Number {
        Number::parse(text.as_bytes()).unwrap()
    }

    /// A disk 8:0 with the partition 8:1.
    fn with_a_disk(kernel: &Kernel) {
        let disk = kernel.sys.join("devices/sda");
        write(&disk.join("dev"), "8:0\n");
        write(&disk.join("sda1/dev"), "8:1\n");
        write(&disk.join("sda1/partition"), "1\n");
        let numbers = kernel.sys.join("dev/block");
        fs::create_dir_all(&numbers).unwrap();
        symlink("../../devices/sda", numbers.join("8:0")).unwrap();
        symlink("../../devices/sda/sda1", numbers.join("8:1")).unwrap();
    }

    #[test]
    fn what_is_mounted_is_told_of_the_disk_and_of_its_partition() {
        let (_directory, kernel) = pretended();
        with_a_disk(&kernel);
        let list = kernel.proc.join("self/mountinfo");
        for mounted in ["8:0", "8:1"] {
            write(
                &list,
                &format!("36 35 {mounted} / /srv/a\\040b rw - ext4 /dev/x rw\n"),
            );
            for device in ["8:0", "8:1"] {
                assert_eq!(
                    on_device(&kernel, number(device)).as_deref(),
                    Some("it is mounted on /srv/a b")
                );
            }
        }
        write(&list, "36 35 8:16 / /srv rw - ext4 /dev/x rw\n");
        assert_eq!(on_device(&kernel, number("8:0")), None);
    }

    #[test]
    fn what_lies_on_a_device_is_told_by_its_name() {
        let (_directory, kernel) = pretended();
        with_a_disk(&kernel);
        let partition = kernel.described(number("8:1"));
        write(&partition.join("holders/dm-3/dm/name"), "vg0-root\n");
        for device in ["8:0", "8:1"] {
            assert_eq!(
                on_device(&kernel, number(device)).as_deref(),
                Some("the device vg0-root lies on it")
            );
        }
        let holders = partition.join("holders");
        fs::rename(holders.join("dm-3"), holders.join("md0")).unwrap();
        fs::remove_file(holders.join("md0/dm/name")).unwrap();
        assert_eq!(
            on_device(&kernel, number("8:1")).as_deref(),
            Some("the device md0 lies on it")
        );
    }

    #[test]
    fn a_file_under_a_loop_device_is_read_only_if_the_device_is_too() {
        let (directory, kernel) = pretended();
        let path = directory.path().join("a disk\nof two lines");
        fs::write(&path, "").unwrap();
        let node = Node::at(&path).unwrap();
        let device = kernel.sys.join("block/loop7");
        let backing = device.join("loop/backing_file");
        write(&backing, &format!("{}\n", path.display()));
        let seven = || Some(PathBuf::from("/dev/loop7"));
        for (read_only, for_a_source) in [("0\n", seven()), ("1\n", None)] {
            write(&device.join("ro"), read_only);
            assert_eq!(loop_device_on(&kernel, node, true), seven());
            assert_eq!(loop_device_on(&kernel, node, false), for_a_source);
        }
        write(&backing, "/no such file (deleted)\n");
        assert_eq!(loop_device_on(&kernel, node, true), None);
    }
}
