//! Names of storage that two hosts would state alike, so that one disk under both is noticed
//! although the kernels are two.
//!
//! A name is given only where it is unique in the world: two disks that were taken for one would
//! keep a user from copying. What a hypervisor gives its guests (`QM00001`, `drive-0`) is not.

use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::kernel::{Kernel, Node, Number, line};

/// File systems whose source, as mounted, and inode numbers are the same on every host.
const BY_SOURCE: [&[u8]; 8] = [
    b"nfs",
    b"nfs4",
    b"ceph",
    b"lustre",
    b"cifs",
    b"smb3",
    b"fuse.glusterfs",
    b"fuse.ceph-fuse",
];

/// File systems on a device that several hosts share: the device's name tells them apart.
const BY_DEVICE: [&[u8]; 2] = [b"gfs2", b"ocfs2"];

/// The name of the storage that a disk is on, where it has one.
pub(super) fn name(metadata: &Metadata) -> Option<Vec<u8>> {
    let (kernel, node) = (Kernel::running(), Node::of(metadata));
    match node.stands_for {
        Some(device) => device_name(&kernel, device),
        None => file_name(&kernel, node),
    }
}

/// How many sectors have been written to a device, or discarded on it, since it is there. What
/// somebody has left dirty in its page cache is written first, so that two equal counts mean that
/// nobody has written in between. `None` for a file, and for a device that does not count.
///
/// Sectors, since a flush counts as a write, and a read-only device is flushed here as well. A
/// write through another device for the same storage (the whole disk of a partition, another
/// host) is not counted.
pub(super) fn write_count(file: &File, metadata: &Metadata) -> Option<u64> {
    let device = Node::of(metadata).stands_for?;
    file.sync_all().ok()?;
    counted(&Kernel::running(), device)
}

/// `FSTYPE:SOURCE#INODE`, for a file on a file system that several hosts mount.
fn file_name(kernel: &Kernel, node: Node) -> Option<Vec<u8>> {
    let mounts = kernel.mounts();
    let mount = mounts.iter().find(|mount| mount.device == node.device)?;
    let kind = mount.kind.as_bytes();
    let source = if BY_SOURCE.contains(&kind) {
        mount.source.as_bytes().to_vec()
    } else if BY_DEVICE.contains(&kind) {
        device_name(kernel, node.device)?
    } else {
        return None;
    };
    // One protocol, whatever its version.
    let kind = if kind == b"nfs4" { b"nfs" } else { kind };
    Some([kind, b":", &source, b"#", node.inode.to_string().as_bytes()].concat())
}

fn device_name(kernel: &Kernel, device: Number) -> Option<Vec<u8>> {
    let directory = kernel.described(device).canonicalize().ok()?;
    match line(&directory.join("partition")) {
        Some(partition) => {
            let disk = disk_name(directory.parent()?)?;
            Some([&disk, &b"#"[..], &partition].concat())
        }
        None => disk_name(&directory),
    }
}

/// What a disk, or a device of the device mapper, calls itself.
fn disk_name(directory: &Path) -> Option<Vec<u8>> {
    let attribute = |name: &str| {
        let value = line(&directory.join(name))?;
        Some(value.trim_ascii().to_vec()).filter(|value| !value.is_empty())
    };
    if let Some(uuid) = attribute("dm/uuid") {
        return mapped_name(&uuid);
    }
    ["wwid", "device/wwid"]
        .iter()
        .filter_map(|name| attribute(name))
        .find(|id| is_unique(id))
        .or_else(|| attribute("serial").filter(|serial| is_random(serial)))
}

/// The name that a device of the device mapper has by its UUID.
fn mapped_name(uuid: &[u8]) -> Option<Vec<u8>> {
    if let Some(part) = uuid.strip_prefix(b"part") {
        let digits = part.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (partition, disk) = part.split_at(digits);
        let disk = mapped_name(disk.strip_prefix(b"-")?)?;
        return Some([&disk, &b"#"[..], partition].concat());
    }
    if let Some(id) = uuid.strip_prefix(b"mpath-") {
        // multipath writes the kind of an identifier as one digit.
        let id = match id.split_first()? {
            (b'3', rest) => [b"naa.", rest].concat(),
            (b'2', rest) => [b"eui.", rest].concat(),
            _ => id.to_vec(),
        };
        return is_unique(&id).then_some(id);
    }
    uuid.starts_with(b"LVM-").then(|| uuid.to_vec())
}

/// Whether an identifier is one that is given only once in the world.
fn is_unique(id: &[u8]) -> bool {
    let prefixes: [&[u8]; 3] = [b"naa.", b"eui.", b"uuid."];
    prefixes.iter().any(|prefix| id.starts_with(prefix))
}

/// Whether a serial number is a UUID, or the twenty bytes of one that virtio has room for.
fn is_random(serial: &[u8]) -> bool {
    serial.len() >= 20
        && serial
            .iter()
            .all(|byte| byte.is_ascii_hexdigit() || *byte == b'-')
}

/// Sectors written and discarded, by the device's `stat`; see the kernel's
/// Documentation/block/stat.rst.
fn counted(kernel: &Kernel, device: Number) -> Option<u64> {
    const WRITTEN: usize = 6;
    const DISCARDED: usize = 13;
    let directory = kernel.described(device).canonicalize().ok()?;
    let disk = if directory.join("partition").exists() {
        directory.parent()?
    } else {
        &directory
    };
    if line(&disk.join("queue/iostats"))? != b"1" {
        return None;
    }
    let stat = String::from_utf8(line(&directory.join("stat"))?).ok()?;
    let fields: Vec<u64> = stat
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    let discarded = fields.get(DISCARDED).unwrap_or(&0);
    Some(fields.get(WRITTEN)?.wrapping_add(*discarded))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A kernel that tells what a test has it tell, with one disk 8:0 that has a partition 8:3.
    struct Pretended {
        kernel: Kernel,
        directory: TempDir,
    }

    impl Pretended {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let [proc, sys] = ["proc", "sys"].map(|name| directory.path().join(name));
            let pretended = Self {
                kernel: Kernel { proc, sys },
                directory,
            };
            pretended.write("sys/devices/sda/sda3/partition", "3\n");
            fs::create_dir_all(pretended.kernel.sys.join("dev/block")).unwrap();
            for (number, disk) in [("8:0", "sda"), ("8:3", "sda/sda3")] {
                let target = Path::new("../../devices").join(disk);
                symlink(target, pretended.kernel.described(parse(number))).unwrap();
            }
            pretended
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        /// What the device is called when the kernel says this of the disk.
        fn name_with(&self, attribute: &str, text: &str, number: &str) -> Option<String> {
            let path = format!("sys/devices/sda/{attribute}");
            self.write(&path, text);
            let name = device_name(&self.kernel, parse(number));
            fs::remove_file(self.directory.path().join(path)).unwrap();
            name.map(|name| String::from_utf8(name).unwrap())
        }

        fn file_with(&self, mount: &str) -> Option<String> {
            self.write(
                "proc/self/mountinfo",
                &format!(
                    "30 1 0:40 / /else rw - nfs else:/a rw\n36 35 8:0 / /srv rw - {mount} rw\n"
                ),
            );
            let node = Node {
                device: parse("8:0"),
                inode: 77,
                stands_for: None,
            };
            file_name(&self.kernel, node).map(|name| String::from_utf8(name).unwrap())
        }
    }

    fn parse(number: &str) -> Number {
        Number::parse(number.as_bytes()).unwrap()
    }

    #[test]
    fn a_file_on_shared_storage_is_named_by_source_and_inode() {
        let kernel = Pretended::new();
        let name = |mount: &str| kernel.file_with(mount);
        for (mount, expected) in [
            ("nfs srv:/export", "nfs:srv:/export#77"),
            ("nfs4 srv:/export", "nfs:srv:/export#77"),
            (
                "ceph 10.0.0.1,10.0.0.2:/vm",
                "ceph:10.0.0.1,10.0.0.2:/vm#77",
            ),
            ("cifs //srv/vm\\040disks", "cifs://srv/vm disks#77"),
            ("fuse.glusterfs srv:/vol", "fuse.glusterfs:srv:/vol#77"),
            ("lustre mgs@tcp:/fs", "lustre:mgs@tcp:/fs#77"),
        ] {
            assert_eq!(name(mount).as_deref(), Some(expected));
        }
        for local in [
            "ext4 /dev/sda",
            "tmpfs tmpfs",
            "fuse.sshfs srv:/x",
            "virtiofs tag",
        ] {
            assert_eq!(name(local), None, "{local}");
        }
        // The device's name here is not its name on another host.
        assert_eq!(name("gfs2 /dev/sda"), None);
        kernel.write("sys/devices/sda/device/wwid", "naa.600a\n");
        assert_eq!(name("gfs2 /dev/sda").as_deref(), Some("gfs2:naa.600a#77"));
    }

    #[test]
    fn a_device_is_named_by_what_is_unique_in_the_world() {
        let kernel = Pretended::new();
        let name = |attribute, text| kernel.name_with(attribute, text, "8:0");
        for (attribute, text) in [
            ("device/wwid", "naa.6001405f3a\n"),
            ("wwid", "eui.0025388b01\n"),
            ("wwid", "uuid.7f1c-22\n"),
            ("serial", "0a1b2c3d-4e5f-6071-8\n"),
            ("serial", "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9\n"),
            ("dm/uuid", "LVM-abcDEF\n"),
        ] {
            assert_eq!(name(attribute, text).as_deref(), Some(text.trim_end()));
        }
        for (attribute, text) in [
            // Every guest of a hypervisor has the same ones.
            ("device/wwid", "t10.ATA     QEMU HARDDISK    QM00001\n"),
            ("wwid", "nvme.1b36-64656164-51454d55-00000001\n"),
            ("serial", "drive-0\n"),
            ("serial", "aaaa\n"),
            ("serial", "\n"),
            // A mapping is known by the host that made it.
            ("dm/uuid", "CRYPT-LUKS2-77-root\n"),
            ("dm/uuid", "\n"),
        ] {
            assert_eq!(name(attribute, text), None, "{attribute} {text}");
        }
        assert_eq!(device_name(&kernel.kernel, parse("8:99")), None);
    }

    #[test]
    fn a_partition_and_a_path_are_named_after_their_disk() {
        let kernel = Pretended::new();
        let partition = kernel.name_with("device/wwid", "naa.600a\n", "8:3");
        assert_eq!(partition.as_deref(), Some("naa.600a#3"));
        // multipath and kpartx have other words for the same.
        let mapped = |uuid| kernel.name_with("dm/uuid", uuid, "8:0");
        assert_eq!(mapped("mpath-3600a\n").as_deref(), Some("naa.600a"));
        assert_eq!(mapped("mpath-2600a\n").as_deref(), Some("eui.600a"));
        assert_eq!(mapped("part3-mpath-3600a\n"), partition);
        for broken in [
            "mpath-\n",
            "mpath-1QEMU\n",
            "part-mpath\n",
            "part3\n",
            "part3-x\n",
        ] {
            assert_eq!(mapped(broken), None, "{broken}");
        }
    }

    #[test]
    fn writes_are_counted_in_sectors_and_not_where_the_kernel_was_told_not_to() {
        let kernel = Pretended::new();
        let count = |number| counted(&kernel.kernel, parse(number));
        assert_eq!(count("8:0"), None);
        kernel.write(
            "sys/devices/sda/stat",
            "1 2 3 4 5 6 700 8 0 10 11 12 13 1400 15 16 17\n",
        );
        assert_eq!(count("8:0"), None);
        kernel.write("sys/devices/sda/queue/iostats", "1\n");
        assert_eq!(count("8:0"), Some(2100));
        // A kernel that does not count discards yet; a partition that counts by itself.
        kernel.write("sys/devices/sda/sda3/stat", "1 2 3 4 5 6 70 8 0 10 11\n");
        assert_eq!(count("8:3"), Some(70));
        kernel.write("sys/devices/sda/queue/iostats", "0\n");
        assert_eq!((count("8:0"), count("8:3")), (None, None));
        for broken in ["", "1 2 3 4 5 6", "1 2 3 4 5 6 x"] {
            kernel.write("sys/devices/sda/queue/iostats", "1\n");
            kernel.write("sys/devices/sda/stat", broken);
            assert_eq!(count("8:0"), None, "{broken}");
        }
    }
}
