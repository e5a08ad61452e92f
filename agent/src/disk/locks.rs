//! QEMU's image locks, and our own, which are the same ones.
//!
//! QEMU holds open-file-description locks on single bytes of an image (block/file-posix.c), all of
//! them shared: byte 100 + N says "I use permission N", byte 200 + N "I let nobody else have
//! permission N". It takes its own, then asks whether anybody holds what stands against them.
//!
//! ```text
//!             0 read   1 write   2 write what is there   3 resize
//!   uses        100       101             102               103
//!   denies      200       201             202               203
//!
//!   a VM, raw   100, 101, 201          qemu-nbd -r, raw     100, 203
//!   a VM, qcow2 100, 101, 103, 201, 203     and qcow2       100, 201, 203
//! ```
//!
//! A source of ours is such a reader. A destination of ours holds 100, 101, 201 and 203 alone:
//! whoever wants one of them, to read or to write, QEMU or another run of ours, is refused by the
//! kernel itself. A lock ends with its file description, so with its process. One that was taken
//! through another name of the same device is not seen; [`holders`](super::holders) looks for that.

use std::fs::File;
use std::io;
use std::path::Path;

use kvm_clone_protocol::message::{Access, FailureCode};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::holders;
use super::kernel::Node;
use crate::failure::Failure;

const READS: i64 = 100;
const WRITES: i64 = 101;
const REWRITES: i64 = 102;
const RESIZES: i64 = 103;
const DENIES_READING: i64 = 200;
const DENIES_WRITING: i64 = 201;
const DENIES_REWRITING: i64 = 202;
const DENIES_RESIZING: i64 = 203;

/// What is held while a disk is open, and what nobody else may hold then.
struct Claim {
    kind: i32,
    held: &'static [i64],
    free: &'static [i64],
}

const SOURCE: Claim = Claim {
    kind: libc::F_RDLCK,
    held: &[READS, DENIES_RESIZING],
    free: &[WRITES, RESIZES, DENIES_READING],
};

const DESTINATION: Claim = Claim {
    kind: libc::F_WRLCK,
    held: &[READS, WRITES, DENIES_WRITING, DENIES_RESIZING],
    free: &[REWRITES, RESIZES, DENIES_READING, DENIES_REWRITING],
};

/// Takes the locks that go with `access`, for as long as `file` is open. Where the file system has
/// no locks it does without, as QEMU does.
///
/// # Errors
/// [`Failure`] when somebody else holds the disk; nothing is held then.
pub(super) fn take(file: &File, path: &Path, access: Access) -> Result<(), Failure> {
    let claim = match access {
        Access::Source => &SOURCE,
        Access::Destination => &DESTINATION,
        Access::Compare | Access::LiveSource => return Ok(()),
    };
    let Err(error) = claim.take(file) else {
        return Ok(());
    };
    for byte in claim.held {
        // What was not taken is not held, and there is nothing to do about one that stays.
        let _ = set(file, libc::F_UNLCK, *byte);
    }
    match error {
        Errno::EAGAIN | Errno::EACCES => Err(busy(file, path)),
        Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL => Ok(()),
        error => Err(Failure::io("locking", path, &error.into())),
    }
}

/// Whether `path` still leads to the open `file`. Between opening and locking, a run that ends may
/// have given the name to another file.
///
/// # Errors
/// [`Failure`] when either cannot be examined.
pub(super) fn still_named(file: &File, path: &Path) -> Result<bool, Failure> {
    let failed = |error: io::Error| Failure::io("examining", path, &error);
    let open = Node::of(&file.metadata().map_err(failed)?);
    let named = match std::fs::metadata(path) {
        Ok(metadata) => Node::of(&metadata),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    Ok(match (open.stands_for, named.stands_for) {
        (Some(open), Some(named)) => open == named,
        _ => open == named,
    })
}

impl Claim {
    fn take(&self, file: &File) -> nix::Result<()> {
        for byte in self.held {
            set(file, self.kind, *byte)?;
        }
        for byte in self.free {
            let mut lock = lock_of(libc::F_WRLCK, *byte);
            fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
            if lock.l_type != short(libc::F_UNLCK) {
                return Err(Errno::EAGAIN);
            }
        }
        Ok(())
    }
}

fn set(file: &File, kind: i32, byte: i64) -> nix::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock_of(kind, byte))).map(drop)
}

fn lock_of(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn short(number: i32) -> i16 {
    i16::try_from(number).expect("kinds of locks and of seeking are small numbers")
}

fn busy(file: &File, path: &Path) -> Failure {
    let holder = holders::of_lock(file).map_or_else(
        || "a running VM or another sync".to_owned(),
        |holder| holder.to_string(),
    );
    let message = format!("{} is in use: {holder} holds its lock", path.display());
    Failure::new(FailureCode::Busy, message)
}
