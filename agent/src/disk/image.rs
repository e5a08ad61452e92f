//! One regular file or block device: what blocks are read from and written to.

use std::fs::Metadata;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use kvm_clone_protocol::message::{Access, FailureCode, Identity, Keeps};

use kvm_clone_protocol::units::Geometry;
use nix::libc;

use super::file::DiskFile;
use super::kept::Kept;
use super::stamp::Stamp;
use super::{confinement, locks, storage};
use crate::failure::Failure;

/// An open image, shared by the worker threads: every operation names its offset, so the file's
/// own position is used by `map` alone.
#[derive(Debug)]
pub(crate) struct Image {
    pub(super) file: DiskFile,
    /// As the user named it: what messages say.
    pub(super) path: PathBuf,
    pub(super) is_device: bool,
    /// Blocks that were never written read as zeros and occupy nothing: a file that this session
    /// made.
    pub(super) is_fresh: bool,
    /// The same, opened for reading past the page cache, once that was asked for.
    pub(super) direct: OnceLock<Option<DiskFile>>,
}

impl Image {
    /// As the user named it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    pub(crate) fn size(&self) -> Result<u64, Failure> {
        if self.is_device {
            // The length that stat gives for a device node is zero; its end is where it says.
            io::Seek::seek(&mut self.file.as_file(), io::SeekFrom::End(0))
                .map_err(|error| self.failed("measuring", &error))
        } else {
            self.metadata().map(|metadata| metadata.len())
        }
    }

    /// Fails unless the image is as large, and was last written, as when it was opened.
    pub(crate) fn check_unchanged(&self, opened: &Version) -> Result<(), Failure> {
        let now = self.version()?;
        if now.size != opened.size {
            let (path, was, is) = (self.path.display(), opened.size, now.size);
            let message = format!("{path} changed its size from {was} to {is} bytes meanwhile");
            return Err(Failure::new(FailureCode::Io, message));
        }
        let counts = now.written.zip(opened.written);
        if now.modified != opened.modified || counts.is_some_and(|(now, then)| now != then) {
            let message = format!("{} was written to meanwhile", self.path.display());
            return Err(Failure::new(FailureCode::Io, message));
        }
        Ok(())
    }

    /// What [`check_unchanged`](Self::check_unchanged) compares with.
    pub(crate) fn version(&self) -> Result<Version, Failure> {
        let metadata = self.metadata()?;
        // The times of a device node say nothing about its contents.
        let modified = (!self.is_device).then(|| (metadata.mtime(), metadata.mtime_nsec()));
        Ok(Version {
            size: self.size()?,
            modified,
            written: storage::write_count(self.file.as_file(), &metadata),
        })
    }

    pub(super) fn metadata(&self) -> Result<Metadata, Failure> {
        self.file
            .metadata()
            .map_err(|error| self.failed("examining", &error))
    }

    /// Holds a file of ours that is to be a destination.
    pub(super) fn lock(&self) -> Result<(), Failure> {
        locks::take(self.file.as_file(), &self.path, Access::Destination)
    }

    pub(super) fn identity(&self) -> Result<Identity, Failure> {
        let metadata = self.metadata()?;
        Ok(if self.is_device {
            Identity {
                device: 0,
                inode: metadata.rdev(),
            }
        } else {
            Identity {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        })
    }

    /// Whether a rename can put another file in its place, so that it is seen by whoever looks for
    /// it: no second hard link, and nothing mounted onto its name.
    pub(super) fn has_one_name(&self) -> Result<bool, Failure> {
        Ok(!self.is_device && self.metadata()?.nlink() == 1 && !self.is_mount_point()?)
    }

    /// Whether the file is mounted onto its name.
    pub(super) fn is_mount_point(&self) -> Result<bool, Failure> {
        // SAFETY: all-zero is a value of this plain structure.
        let mut found: libc::statx = unsafe { std::mem::zeroed() };
        let (fd, flags) = (self.file.as_raw_fd(), libc::AT_EMPTY_PATH);
        // SAFETY: the descriptor is open, the path ends with a zero byte, and `found` has room for
        // what the kernel writes.
        if unsafe { libc::statx(fd, c"".as_ptr(), flags, 0, &raw mut found) } == -1 {
            return Err(self.failed("examining", &io::Error::last_os_error()));
        }
        let root = u64::try_from(libc::STATX_ATTR_MOUNT_ROOT).unwrap_or_default();
        Ok(found.stx_attributes & root != 0)
    }

    /// Digests of a source that are kept from run to run, and what it is: where it has been left
    /// alone for a while.
    pub(crate) fn keep(
        self: &Arc<Self>,
        keeps: Keeps,
        geometry: Geometry,
        believed: bool,
    ) -> Option<(Kept, Stamp)> {
        let stamp = (!self.is_device).then(|| Stamp::of_quiet(self.file.as_file()))??;
        let path = confinement::follow(&self.path).ok()?.canonical().ok()?;
        let kept = Kept::open(
            &path,
            keeps,
            geometry,
            believed.then_some(stamp),
            Some(self),
        )?;
        Some((kept, stamp))
    }

    pub(crate) fn stamp(&self) -> Option<Stamp> {
        Stamp::of(self.file.as_file())
    }

    /// Of what we have changed ourselves.
    pub(super) fn own_stamp(&self) -> Option<Stamp> {
        Stamp::of_own(self.file.as_file())
    }

    pub(super) fn failed(&self, doing: &str, error: &io::Error) -> Failure {
        Failure::io(doing, &self.path, error)
    }

    pub(super) fn failed_at(&self, doing: &str, offset: u64, error: &io::Error) -> Failure {
        Failure::io_at(doing, &self.path, offset, error)
    }
}

/// Size and last modification of an image, or what has been written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    size: u64,
    modified: Option<(i64, i64)>,
    /// Of a device that counts.
    written: Option<u64>,
}

impl Version {
    /// Without the count of what has been written: a destination is held against others, and what
    /// the kernel still has to write of an earlier user's changes is none of them.
    pub(super) fn uncounted(self) -> Self {
        Self {
            written: None,
            ..self
        }
    }
}
