//! What a file is, so exactly that the same stamp means the same contents.
//!
//! A file system stamps each change of a file with the time (ctime), which nobody can set. Two
//! things can still deceive: the clock's grain, within which a second change leaves no trace, and
//! a direct write whose time was taken when it began and whose bytes arrive later. So a stamp
//! counts only when it is older than both, and nothing is kept of a file that a VM may write to.
//!
//! After a power cut the times can be older than the contents: a direct write reaches the disk
//! before the journal has its time, by seconds, or by a day with `lazytime`. So a stamp is of one
//! boot, and the first run after the next one reads everything.
//!
//! Only file systems are trusted whose times are known to be exact, and which the kernel or udev
//! tells from all others: ext4, XFS and btrfs.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nix::libc;
use nix::sys::statfs::fstatfs;
use nix::sys::statvfs::fstatvfs;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::kernel::{Kernel, Node, entries};

/// By the magic numbers of statfs: ext4 (and ext3, ext2), XFS, btrfs.
const TRUSTED: [i64; 3] = [0xef53, 0x5846_5342, BTRFS];

const BTRFS: i64 = 0x9123_683e;

/// Longer than any direct write is under way on a disk that is well.
const AGE: Duration = Duration::from_secs(2);

/// `FS_IOC_GETFSUUID` of linux/fs.h, since Linux 6.9: a length, and up to 16 bytes.
const GETFSUUID: libc::c_ulong = 0x8011_1500;

/// `FS_IOC_GETVERSION` of linux/fs.h: tells a file from an earlier one of the same inode.
const GETVERSION: libc::c_ulong = 0x8008_7601;

/// A version of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    boot: u128,
    /// The file system, by its UUID: a device number is soon another one's.
    file_system: [u8; 16],
    inode: u64,
    generation: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of an open file; `None` where there is none that could be trusted.
    pub(super) fn of(file: &File) -> Option<Self> {
        let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let kind = fstatfs(file).ok()?.filesystem_type();
        if !TRUSTED.contains(&kind.0) {
            return None;
        }
        Some(Self {
            boot: boot()?,
            file_system: match kind.0 {
                BTRFS => identifier(file)?,
                _ => uuid(file).or_else(|| uuid_by_udev(Node::of(&metadata)))?,
            },
            inode: metadata.ino(),
            generation: generation(file)?,
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    /// The stamp of a file that nobody has changed for a while. What a memory map has changed gets
    /// its time when it is synced.
    pub(super) fn of_quiet(file: &File) -> Option<Self> {
        file.sync_all().ok()?;
        Self::of(file).filter(|stamp| stamp.age().is_some_and(|age| age >= AGE))
    }

    /// The stamp of a file that we have just changed, and hold against others: waits until the
    /// clock is past it, so that another change would show.
    pub(super) fn of_own(file: &File) -> Option<Self> {
        file.sync_all().ok()?;
        let stamp = Self::of(file)?;
        for _ in 0..20 {
            if stamp.age().is_some_and(|age| age > Duration::ZERO) {
                return Self::of(file).filter(|again| *again == stamp);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }

    /// Whether both are of one file, whatever was done to it in between.
    pub(super) fn is_of_same_file(&self, other: &Self) -> bool {
        let file = |stamp: &Self| {
            let Self {
                boot,
                file_system,
                inode,
                generation,
                ..
            } = *stamp;
            (boot, file_system, inode, generation)
        };
        file(self) == file(other)
    }

    /// Bytes of the file.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// How long ago, by the clock that file systems use, it was changed; `None` for the future.
    fn age(&self) -> Option<Duration> {
        let now = clock_gettime(ClockId::CLOCK_REALTIME_COARSE).ok()?;
        let time = |seconds: i64, nanoseconds: i64| {
            let nanoseconds = u32::try_from(nanoseconds).ok()?;
            Some(Duration::new(u64::try_from(seconds).ok()?, nanoseconds))
        };
        let changed = time(self.changed.0, self.changed.1)?;
        time(now.tv_sec(), now.tv_nsec())?.checked_sub(changed)
    }
}

fn boot() -> Option<u128> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    parse_uuid(id.trim())
}

fn parse_uuid(text: &str) -> Option<u128> {
    u128::from_str_radix(&text.replace('-', ""), 16).ok()
}

fn uuid(file: &File) -> Option<[u8; 16]> {
    let mut found = [0_u8; 17];
    // SAFETY: the descriptor is open, and `found` has room for the length and the bytes that the
    // request writes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), GETFSUUID, found.as_mut_ptr()) };
    let (len, uuid) = found.split_first()?;
    (result == 0 && *len == 16).then(|| uuid.try_into().expect("sixteen bytes"))
}

/// What statfs calls the file system: on btrfs made of its UUID and the subvolume, in which alone
/// an inode is unique.
fn identifier(file: &File) -> Option<[u8; 16]> {
    let found = fstatvfs(file).ok()?.filesystem_id();
    Some(u128::from(found).to_be_bytes())
}

/// Older kernels do not tell: the name under which udev lists the device does.
fn uuid_by_udev(node: Node) -> Option<[u8; 16]> {
    let mounts = Kernel::running().mounts();
    let mount = mounts.iter().find(|mount| mount.device == node.device)?;
    let device = Node::at(Path::new(&mount.source)).ok()?.stands_for?;
    let listed = entries(Path::new("/dev/disk/by-uuid"))
        .find(|path| Node::at(path).is_ok_and(|node| node.stands_for == Some(device)))?;
    let digits = listed.file_name()?.to_str()?;
    parse_uuid(digits).map(u128::to_be_bytes)
}

fn generation(file: &File) -> Option<u64> {
    let mut found: libc::c_long = 0;
    // SAFETY: the descriptor is open. The request is declared with a long; file systems write an
    // int, which is zero-extended by what `found` was.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), GETVERSION, &raw mut found) };
    (result == 0).then(|| found.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::*;

    #[test]
    fn a_file_has_a_stamp_once_it_was_left_alone_and_another_one_after_each_change() {
        // Beside the executable is a disk; the directory for temporary files may be memory.
        let here = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let path = directory.path().join("disk");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.write_all_at(b"one", 0).unwrap();
        let Some(own) = Stamp::of_own(&file) else {
            eprintln!("SKIPPED: no stamps on {}", directory.path().display());
            return;
        };
        assert_eq!(Stamp::of_quiet(&file), None, "it is new");
        let mut seen = vec![own];
        for change in 0..50 {
            file.write_all_at(&[change], 0).unwrap();
            let stamp = Stamp::of_own(&file).unwrap();
            assert!(!seen.contains(&stamp), "change {change}");
            seen.push(stamp);
        }
        std::thread::sleep(AGE + Duration::from_millis(50));
        assert_eq!(Stamp::of_quiet(&file), seen.pop());
        // Another mode is a change too.
        file.set_permissions(Permissions::from_mode(0o640)).unwrap();
        assert_eq!(Stamp::of_quiet(&file), None);
    }
}
