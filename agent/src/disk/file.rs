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
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::libc;
use nix::sys::statvfs::fstatvfs;
use nix::unistd::linkat;

use super::call::{Op, call, call_with};
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
        let reached = reach(path)?;
        call(Op::Create, &path, || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(reached.path())
        })
        .map(Self::new)
    }

    /// Makes a file without a name in a directory; it is gone with its descriptor unless it is
    /// [named](Self::link).
    pub(super) fn create_nameless(at: &Path) -> io::Result<Self> {
        let directory = directory(at)?;
        call(Op::Create, &at, || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_TMPFILE)
                .mode(0o600)
                .open(directory.path())
        })
        .map(Self::new)
    }

    /// Gives such a file its name, unless something has it.
    pub(super) fn link(&self, path: &Path) -> io::Result<()> {
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        let reached = reach(path)?;
        call(Op::Link, &path, || {
            let (own, path) = (own.as_str(), reached.path());
            Ok(linkat(AT_FDCWD, own, AT_FDCWD, path, follow)?)
        })
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

    /// Bytes that the file system has for this user's files.
    pub(super) fn free_space(&self) -> io::Result<u64> {
        let found = fstatvfs(&self.file)?;
        Ok(found.blocks_available() * found.fragment_size())
    }

    /// Reads some bytes, at least one unless the end is reached.
    pub(super) fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        call_with(Op::Read, &self.file, bytes.len(), |len| {
            self.file.read_at(&mut bytes[..len], offset)
        })
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
            let rest = &bytes[written..];
            let at = offset + written as u64;
            let write = |len| self.file.write_at(&rest[..len], at);
            match call_with(Op::Write, &self.file, rest.len(), write)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => written += n,
            }
        }
        Ok(())
    }

    /// Makes contents and length durable. That cannot be tried again: the kernel then takes what
    /// it could not write for written, and says that all is well. So it is made to forget it, and
    /// what is read from now on is what the disk has.
    pub(super) fn sync(&self) -> io::Result<()> {
        call(Op::Sync, &self.file, || self.file.sync_all()).inspect_err(|_| {
            self.is_doubtful.store(true, Ordering::Release);
            let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            let _ = posix_fadvise(&self.file, 0, 0, advice);
        })
    }

    /// Whether what was written may be nowhere, since an fsync has failed.
    pub(super) fn is_doubtful(&self) -> bool {
        self.is_doubtful.load(Ordering::Acquire)
    }

    pub(super) fn set_len(&self, len: u64) -> io::Result<()> {
        call(Op::SetLen, &self.file, || self.file.set_len(len))
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
        call(Op::Allocate, &self.file, || {
            Ok(fallocate(self.file.as_fd(), flags, offset, len)?)
        })
        .map_err(|error| Errno::try_from(error).unwrap_or(Errno::EIO))
    }

    /// Makes this file hold what `other` holds, by sharing its blocks.
    pub(super) fn clone_from(&self, other: &Self) -> io::Result<()> {
        call(Op::Clone, &self.file, || {
            // SAFETY: both descriptors are open for as long as they are borrowed; the request
            // reads no memory of ours.
            match unsafe { libc::ioctl(self.file.as_raw_fd(), FICLONE, other.file.as_raw_fd()) } {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        })
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
