//! The kernel calls on an open disk, all of them: the one place in which a disk can fail.
//!
//! Everything is positioned, so a file may be used by several threads at once.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, fallocate};
use nix::libc;
use nix::unistd::linkat;

use super::confinement::{directory, reach};

/// `FICLONE` of linux/fs.h: the file shares all blocks of another.
const FICLONE: libc::c_ulong = 0x4004_9409;

/// An open file or block device.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    /// An fsync has failed: what was written may be nowhere.
    is_doubtful: AtomicBool,
}

impl DiskFile {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            is_doubtful: AtomicBool::new(false),
        }
    }

    /// Makes a file that only its owner can use; something of that name is an error.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(reach(path)?.path())
            .map(Self::new)
    }

    /// Makes a file without a name in a directory; it is gone with its descriptor unless it is
    /// [named](Self::link).
    pub(super) fn create_nameless(at: &Path) -> io::Result<Self> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .mode(0o600)
            .open(directory(at)?.path())
            .map(Self::new)
    }

    /// Gives such a file its name, unless something has it.
    pub(super) fn link(&self, path: &Path) -> io::Result<()> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        let path = reach(path)?;
        Ok(linkat(
            AT_FDCWD,
            own.as_str(),
            AT_FDCWD,
            path.path(),
            follow,
        )?)
    }

    /// Opens a file that is there, and never what a symbolic link leads to.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(reach(path)?.path())
            .map(Self::new)
    }

    /// The file as the standard library has it, for what cannot fail half-way.
    pub(super) fn as_file(&self) -> &File {
        &self.file
    }

    pub(super) fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// Reads some bytes, at least one unless the end is reached.
    pub(super) fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.file.read_at(bytes, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Reads until `bytes` is full or the end is reached; returns how many were there.
    pub(super) fn read_full_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.read_at(&mut bytes[filled..], offset + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        Ok(filled)
    }

    /// Writes all bytes.
    pub(super) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut written = 0;
        while written < bytes.len() {
            match self
                .file
                .write_at(&bytes[written..], offset + written as u64)
            {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes contents and length durable. That cannot be tried again: the kernel then takes what
    /// it could not write for written, and says that all is well.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file
            .sync_all()
            .inspect_err(|_| self.is_doubtful.store(true, Ordering::Release))
    }

    /// Whether what was written may be nowhere, since an fsync has failed.
    pub(super) fn is_doubtful(&self) -> bool {
        self.is_doubtful.load(Ordering::Acquire)
    }

    pub(super) fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    /// `fallocate`; nothing to do for no bytes.
    pub(super) fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> nix::Result<()> {
        let overflow = |_| Errno::EFBIG;
        let (offset, len) = (
            i64::try_from(offset).map_err(overflow)?,
            i64::try_from(len).map_err(overflow)?,
        );
        if len == 0 {
            return Ok(());
        }
        loop {
            match fallocate(self.file.as_fd(), flags, offset, len) {
                Err(Errno::EINTR) => {}
                result => return result,
            }
        }
    }

    /// Makes this file hold what `other` holds, by sharing its blocks.
    pub(super) fn clone_from(&self, other: &Self) -> io::Result<()> {
        // SAFETY: both descriptors are open for as long as they are borrowed; the request reads
        // no memory of ours.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), FICLONE, other.file.as_raw_fd()) };
        if result == -1 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

impl AsFd for DiskFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for DiskFile {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.file.as_raw_fd()
    }
}
