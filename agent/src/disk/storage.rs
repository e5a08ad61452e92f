//! Names of storage that two hosts would state alike, so that one disk under both is noticed
//! although the kernels are two.
//!
//! A name is given only where it is unique in the world: two disks that were taken for one would
//! keep a user from copying. What a hypervisor gives its guests (`QM00001`, `drive-0`) is not.

use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::kernel::{Kernel, Number, line};

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
    let kernel = Kernel::running();
    if metadata.file_type().is_block_device() {
        return device_name(&kernel, Number::of(metadata.rdev()));
    }
    file_name(&kernel, Number::of(metadata.dev()), metadata.ino())
}

/// How many sectors have been written to a device, or discarded on it, since it is there. What is
/// dirty in the page cache is written first, so two equal numbers mean that nobody wrote between.
/// `None` when the device does not count.
pub(super) fn write_count(file: &File) -> Option<u64> {
    let device = Number::of(file.metadata().ok()?.rdev());
    file.sync_all().ok()?;
    counted(&Kernel::running(), device)
}

/// `FSTYPE:SOURCE#INODE`, for a file on a file system that several hosts mount.
fn file_name(kernel: &Kernel, device: Number, inode: u64) -> Option<Vec<u8>> {
    let mounts = kernel.mounts();
    let mount = mounts.iter().find(|mount| mount.device == device)?;
    let kind = mount.kind.as_bytes();
    let source = if BY_SOURCE.contains(&kind) {
        mount.source.as_bytes().to_vec()
    } else if BY_DEVICE.contains(&kind) {
        device_name(kernel, device)?
    } else {
        return None;
    };
    // One protocol, whatever its version.
    let kind = if kind == b"nfs4" { b"nfs" } else { kind };
    Some([kind, b":", &source, b"#", inode.to_string().as_bytes()].concat())
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
    Some(fields.get(WRITTEN)? + fields.get(DISCARDED).unwrap_or(&0))
}
