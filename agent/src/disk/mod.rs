//! Disks: regular files and block devices, as sources and as destinations.
//!
//! A [`Disk`] is shared by the worker threads; every operation names its offset, so the file's
//! own position is used by `map` alone.

mod cache;
mod claims;
mod holders;
mod kernel;
mod locks;
mod map;
mod read;
mod stage;
mod storage;
mod write;

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kvm_clone_protocol::digest::Digester;
use kvm_clone_protocol::message::{Access, DiskKind, FailureCode, Identity, Opened};
use kvm_clone_protocol::sync::{DiskDone, DiskOp};
use kvm_clone_protocol::units::Geometry;
use nix::libc;

use crate::compress::Compressor;
use crate::failure::Failure;
pub(crate) use read::Scratch;
pub(crate) use stage::Stage;

/// An open disk.
#[derive(Debug)]
pub(crate) struct Disk {
    file: File,
    /// As the user named it: what messages say.
    path: PathBuf,
    is_device: bool,
    /// Blocks that were never written read as zeros and occupy nothing: a file that this session
    /// made.
    is_fresh: bool,
}

/// What every operation of a session needs to know.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionContext<'a> {
    pub(crate) geometry: Geometry,
    pub(crate) digester: Digester,
    pub(crate) compressor: &'a Compressor,
}

impl Disk {
    /// Does what a session asks.
    ///
    /// # Errors
    /// [`Failure`], which names the disk and the byte.
    pub(crate) fn run(
        &self,
        op: DiskOp,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
    ) -> Result<DiskDone, Failure> {
        match op {
            DiskOp::Map { from } => {
                let map = self.map(from, context.geometry)?;
                Ok(DiskDone::Mapped {
                    runs: map.runs,
                    data_bytes: map.data_bytes,
                })
            }
            DiskOp::Compare {
                run,
                expected,
                ship,
            } => self
                .compare(run, &expected, ship, context, scratch)
                .map(DiskDone::Compared),
            DiskOp::Digest { run } => self.digest(run, context, scratch).map(DiskDone::Digested),
            DiskOp::Write { blocks } => {
                self.write(&blocks, context, scratch).map(DiskDone::Written)
            }
            DiskOp::Zero { run } => self.zero(run, context.geometry).map(|()| DiskDone::Zeroed),
            DiskOp::Trim { run } => {
                self.trim(run, context.geometry);
                Ok(DiskDone::Zeroed)
            }
        }
    }

    /// Size in bytes.
    pub(crate) fn size(&self) -> Result<u64, Failure> {
        if self.is_device {
            // The length that stat gives for a device node is zero; its end is where it says.
            io::Seek::seek(&mut &self.file, io::SeekFrom::End(0))
                .map_err(|error| self.failed("measuring", &error))
        } else {
            self.metadata().map(|metadata| metadata.len())
        }
    }

    /// Fails unless the disk is as large, and was last written, as when it was opened.
    pub(crate) fn check_unchanged(&self, opened: &Version) -> Result<(), Failure> {
        let now = self.version()?;
        if now.size != opened.size {
            let (path, was, is) = (self.path.display(), opened.size, now.size);
            let message = format!("{path} changed its size from {was} to {is} bytes meanwhile");
            return Err(Failure::new(FailureCode::Io, message));
        }
        let counts = now.written.zip(opened.written);
        if now.modified != opened.modified || counts.is_some_and(|(now, then)| now != then) {
            let message = format!("{} was written to while it was read", self.path.display());
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
            written: storage::write_count(&self.file, &metadata),
        })
    }

    fn metadata(&self) -> Result<Metadata, Failure> {
        self.file
            .metadata()
            .map_err(|error| self.failed("examining", &error))
    }

    fn identity(&self) -> Result<Identity, Failure> {
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

    fn failed(&self, doing: &str, error: &io::Error) -> Failure {
        Failure::io(doing, &self.path, error)
    }

    fn failed_at(&self, doing: &str, offset: u64, error: &io::Error) -> Failure {
        Failure::io_at(doing, &self.path, offset, error)
    }
}

/// Size and last modification of a disk, or what has been written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    size: u64,
    modified: Option<(i64, i64)>,
    /// Of a device that counts.
    written: Option<u64>,
}

/// A disk as the controller asked for it: open, or a destination that does not exist yet.
#[derive(Debug)]
pub(crate) enum Target {
    Open(Disk),
    Missing(Stage),
}

/// Opens what is at `path`.
///
/// # Errors
/// [`Failure`]: it does not exist, is no disk, is held by somebody else, or cannot be opened.
pub(crate) fn open(path: &Path, access: Access) -> Result<Target, Failure> {
    if !path.is_absolute() {
        let message = format!("{} is not an absolute path", path.display());
        return Err(Failure::new(FailureCode::Refused, message));
    }
    match (std::fs::metadata(path), access) {
        (Ok(metadata), _) => open_existing(path, &metadata, access).map(Target::Open),
        (Err(error), Access::Destination) if error.kind() == io::ErrorKind::NotFound => {
            Stage::beside(path).map(Target::Missing)
        }
        (Err(error), _) => Err(Failure::io("opening", path, &error)),
    }
}

fn open_existing(path: &Path, metadata: &Metadata, access: Access) -> Result<Disk, Failure> {
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = if kind.is_dir() {
            "a directory"
        } else {
            "no regular file and no block device"
        };
        let message = format!("{} is {what}, not a disk", path.display());
        return Err(Failure::new(FailureCode::Refused, message));
    }
    let is_device = kind.is_block_device();
    let disk = Disk {
        file: holders::patiently(|| claim(path, access, is_device))?,
        path: path.to_owned(),
        is_device,
        is_fresh: false,
    };
    disk.read_in_windows();
    Ok(disk)
}

/// Opens a disk that nobody else has in use, and holds it against others for as long as it is
/// open. A disk that is only looked at, or read although it is in use, is in nobody's way.
fn claim(path: &Path, access: Access, is_device: bool) -> Result<File, Failure> {
    // O_EXCL on a device fails while it is mounted or held by another exclusive opener.
    let exclusive = match access {
        Access::Source | Access::Destination if is_device => libc::O_EXCL,
        _ => 0,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(access == Access::Destination)
        .custom_flags(exclusive)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => holders::busy(path),
            _ => Failure::io("opening", path, &error),
        })?;
    locks::take(&file, path, access)?;
    holders::check(&file, path, access)?;
    if locks::still_named(&file, path)? {
        return Ok(file);
    }
    let message = format!("{} has just been replaced", path.display());
    Err(Failure::new(FailureCode::Busy, message))
}

impl Target {
    /// The answer to the controller.
    ///
    /// # Errors
    /// [`Failure`] when the disk cannot be examined.
    pub(crate) fn describe(&self, disk: u32) -> Result<Opened, Failure> {
        match self {
            Self::Open(open) => Ok(Opened {
                disk,
                kind: if open.is_device {
                    DiskKind::Device
                } else {
                    DiskKind::File
                },
                size: open.size()?,
                identity: Some(open.identity()?),
                resumed: false,
            }),
            Self::Missing(stage) => {
                let left = stage.left_over()?;
                Ok(Opened {
                    disk,
                    kind: DiskKind::Missing,
                    size: left.unwrap_or(0),
                    identity: None,
                    resumed: left.is_some(),
                })
            }
        }
    }
}
