//! QEMU's image locks, and our own, on regular files.
//!
//! QEMU holds open-file-description locks on single bytes of an image (block/file-posix.c): a
//! writer of the image holds bytes 100, 101 and 203, a reader 100 and 203. A holder of byte 201
//! tells others not to write. A lock ends with its file description, so with its process.

use std::io;
use std::os::fd::AsRawFd;

use kvm_clone_protocol::message::{Access, FailureCode};
use nix::libc;

use super::image::Image;
use crate::failure::Failure;

/// Held by everything that has the image open.
const ANY_USE: i64 = 100;
/// Held by whoever may write.
const WRITER: i64 = 101;
/// Held by whoever may resize.
const RESIZER: i64 = 103;
/// Held by whoever does not want others to write: QEMU when it writes itself, and we on a
/// destination, so that two runs never meet on one disk.
const NO_OTHER_WRITER: i64 = 201;

impl Image {
    /// Refuses a disk that somebody else holds, and holds a destination against others for as
    /// long as it is open.
    pub(super) fn take_locks(&self, access: Access) -> Result<(), Failure> {
        if self.is_device {
            return Ok(());
        }
        match access {
            Access::Source => self.check_free(&[WRITER, RESIZER]),
            Access::Compare | Access::LiveSource => Ok(()),
            Access::Destination => {
                self.check_free(&[ANY_USE, WRITER, RESIZER])?;
                self.lock(NO_OTHER_WRITER)
            }
        }
    }

    fn check_free(&self, bytes: &[i64]) -> Result<(), Failure> {
        for byte in bytes {
            let mut lock = lock_of(*byte);
            match fcntl_lock(self.file.as_file(), libc::F_OFD_GETLK, &mut lock) {
                Ok(()) if lock.l_type != type_of(libc::F_UNLCK) => return Err(self.busy()),
                // A file system without locks cannot say; QEMU itself would run without them.
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn lock(&self, byte: i64) -> Result<(), Failure> {
        match fcntl_lock(self.file.as_file(), libc::F_OFD_SETLK, &mut lock_of(byte)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(self.busy()),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn busy(&self) -> Failure {
        let path = self.path.display();
        let message = format!("{path} is in use: a running VM or another sync holds its lock");
        Failure::new(FailureCode::Busy, message)
    }
}

fn type_of(kind: i32) -> i16 {
    i16::try_from(kind).expect("lock types are small numbers")
}

fn lock_of(byte: i64) -> libc::flock {
    libc::flock {
        l_type: type_of(libc::F_WRLCK),
        l_whence: i16::try_from(libc::SEEK_SET).expect("zero"),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn fcntl_lock(file: &std::fs::File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and `lock` is a valid
    // flock that the kernel reads and may write.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
