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
//! through another name of the same device is not seen; `holders` looks for that.

use std::fs::File;
use std::io;
use std::path::Path;

use kvm_clone_protocol::message::{Access, FailureCode};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::kernel::Node;
use super::{confinement, holders};
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
    let Err((byte, error)) = claim.take(file) else {
        return Ok(());
    };
    for byte in claim.held {
        // What was not taken is not held, and there is nothing to do about one that stays.
        let _ = set(file, libc::F_UNLCK, *byte);
    }
    match error {
        Errno::EAGAIN | Errno::EACCES => Err(busy(file, path, byte)),
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
    let named = match confinement::follow(path).and_then(|found| found.metadata()) {
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
    /// On failure, the byte that could not be had.
    fn take(&self, file: &File) -> Result<(), (i64, Errno)> {
        for byte in self.held {
            set(file, self.kind, *byte).map_err(|error| (*byte, error))?;
        }
        for byte in self.free {
            let mut lock = lock_of(libc::F_WRLCK, *byte);
            let asked = fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock));
            asked.map_err(|error| (*byte, error))?;
            if lock.l_type != short(libc::F_UNLCK) {
                return Err((*byte, Errno::EAGAIN));
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

fn busy(file: &File, path: &Path, byte: i64) -> Failure {
    let holder = holders::of_lock(file, byte).map_or_else(
        || "a running VM or another sync".to_owned(),
        |holder| holder.to_string(),
    );
    let message = format!("{} is in use: {holder} holds its lock", path.display());
    Failure::new(FailureCode::Busy, message)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use tempfile::TempDir;

    use super::*;

    const ALL: [i64; 8] = [100, 101, 102, 103, 200, 201, 202, 203];

    /// A file, to be opened several times.
    struct Image {
        path: PathBuf,
        _directory: TempDir,
    }

    impl Image {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk");
            File::create_new(&path).unwrap();
            Self {
                path,
                _directory: directory,
            }
        }

        fn open(&self) -> File {
            let mut options = File::options();
            options.read(true).write(true).open(&self.path).unwrap()
        }

        /// A run of ours.
        fn held(&self, access: Access) -> Result<File, Failure> {
            let file = match access {
                Access::Destination => self.open(),
                _ => File::open(&self.path).unwrap(),
            };
            take(&file, &self.path, access).map(|()| file)
        }

        fn refuses(&self, access: Access) -> bool {
            match self.held(access) {
                Ok(_) => false,
                Err(failure) => {
                    assert_eq!(failure.code, FailureCode::Busy);
                    assert!(failure.message.contains(self.path.to_str().unwrap()));
                    true
                }
            }
        }

        /// Whether QEMU could lock this byte now.
        fn can_share(&self, byte: i64) -> bool {
            set(&self.open(), libc::F_RDLCK, byte).is_ok()
        }
    }

    #[test]
    fn a_destination_is_had_by_one_run_and_a_source_by_many() {
        use Access::{Compare, Destination, LiveSource, Source};
        let image = Image::new();
        for (held, wanted, is_refused) in [
            (Destination, Destination, true),
            (Destination, Source, true),
            (Source, Destination, true),
            (Source, Source, false),
            (Destination, Compare, false),
            (Destination, LiveSource, false),
            (Compare, Destination, false),
            (LiveSource, Destination, false),
        ] {
            let first = image.held(held).unwrap();
            assert_eq!(image.refuses(wanted), is_refused, "{held:?}, {wanted:?}");
            drop(first);
            // A child of another test may have the file between its fork and its exec.
            let end = Instant::now() + Duration::from_secs(10);
            while image.refuses(wanted) {
                assert!(Instant::now() < end, "a lock ends with its file");
            }
        }
    }

    #[test]
    fn every_byte_that_qemu_may_hold_keeps_a_destination_and_writers_a_source() {
        let image = Image::new();
        for byte in ALL {
            let theirs = image.open();
            set(&theirs, libc::F_RDLCK, byte).unwrap();
            assert!(image.refuses(Access::Destination), "{byte}");
            let keeps_a_source = [101, 103, 200].contains(&byte);
            assert_eq!(image.refuses(Access::Source), keeps_a_source, "{byte}");
            assert!(!image.refuses(Access::LiveSource), "{byte}");
            assert!(!image.refuses(Access::Compare), "{byte}");
        }
    }

    #[test]
    fn what_is_held_is_what_keeps_qemu_out() {
        let image = Image::new();
        let destination = image.held(Access::Destination).unwrap();
        let shared: Vec<_> = ALL
            .into_iter()
            .filter(|byte| image.can_share(*byte))
            .collect();
        assert_eq!(shared, [102, 103, 200, 202]);
        drop(destination);
        let _source = image.held(Access::Source).unwrap();
        assert!(ALL.into_iter().all(|byte| image.can_share(byte)));
        let probe = |byte| set(&image.open(), libc::F_WRLCK, byte).is_ok();
        let unused: Vec<_> = ALL.into_iter().filter(|byte| probe(*byte)).collect();
        assert_eq!(unused, [101, 102, 103, 200, 201, 202]);
    }

    #[test]
    fn a_refusal_leaves_nothing_locked() {
        let image = Image::new();
        // The last that a destination looks at, when it has locked everything.
        let theirs = image.open();
        set(&theirs, libc::F_RDLCK, DENIES_REWRITING).unwrap();
        let file = image.open();
        take(&file, &image.path, Access::Destination).unwrap_err();
        assert!(ALL.into_iter().all(|byte| image.can_share(byte)));
        drop(theirs);
        take(&file, &image.path, Access::Destination).unwrap();
    }

    #[test]
    fn a_name_that_leads_elsewhere_by_now_is_noticed() {
        let image = Image::new();
        let link = image.path.with_file_name("link");
        std::os::unix::fs::symlink(&image.path, &link).unwrap();
        let file = image.open();
        let named = |path: &Path| still_named(&file, path);
        assert_eq!(named(&image.path), Ok(true));
        assert_eq!(named(&link), Ok(true));
        let new = image.path.with_file_name("new");
        std::fs::write(&new, "").unwrap();
        std::fs::rename(&new, &image.path).unwrap();
        assert_eq!(named(&image.path), Ok(false));
        assert_eq!(named(&link), Ok(false));
        std::fs::remove_file(&image.path).unwrap();
        assert_eq!(named(&image.path), Ok(false));
    }
}
