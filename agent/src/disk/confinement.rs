//! What `serve --allow` leaves of a host: the disks that a controller may name, and whether it may
//! read or write them.
//!
//! ```text
//!  --allow /srv/images            a descriptor of that directory, for as long as this process lives
//!  open /srv/images/a/../web      openat2 beneath it: neither ".." nor a link leads out
//!                                 → descriptor N of the directory in which the disk lies
//!  /proc/self/fd/N/web            what system calls get: nothing before its last part can be
//!                                 exchanged, and that is never followed
//! ```
//!
//! To look at a path first and to use it then is a race that whoever may write in the directory
//! can win. So every place in `disk` that hands a path to the kernel has it turned here into one
//! that cannot lead elsewhere; without `--allow` that is the path itself. What confines is the
//! process's own, as its user is: a value that is passed along could be forgotten on the way. The
//! price is one openat2 for each use of a name.
//!
//! What a journal or a note says of paths is held to the same, since a controller may write files
//! of any name where it may write disks.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kvm_clone_protocol::message::{Access, FailureCode, Location};
use nix::libc;
use thiserror::Error;

use super::root::{Root, Within, leads_out};
use super::state;
use crate::failure::Failure;

static CONFINEMENT: OnceLock<Confinement> = OnceLock::new();

/// What may be done with disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Both,
    Read,
    Write,
}

/// What this process may do.
#[derive(Debug)]
struct Confinement {
    /// Anything, where none is given.
    roots: Vec<Root>,
    direction: Direction,
}

/// A path that may be used now.
#[derive(Debug)]
pub(super) enum Reached<'a> {
    /// As it is: nothing confines it.
    Plain(&'a Path),
    Within(Within),
}

/// What this process may not do; inside of an [`io::Error`], so that it gets through where a
/// system call would have failed.
#[derive(Debug, Clone, Error)]
#[error("{0}")]
pub(crate) struct Forbidden(String);

/// Confines this process from now on.
///
/// # Errors
/// [`Failure`] when a path is not absolute or cannot be opened, or the kernel has no means.
pub(crate) fn confine(allowed: &[PathBuf], direction: Direction) -> Result<(), Failure> {
    let roots = allowed.iter().map(|path| Root::open(path));
    let confinement = Confinement {
        roots: roots.collect::<Result<_, _>>()?,
        direction,
    };
    let twice = |_| Failure::new(FailureCode::Internal, "confined twice");
    CONFINEMENT.set(confinement).map_err(twice)
}

/// Refuses what a controller may not open.
///
/// # Errors
/// [`Failure`] of code refused.
pub(crate) fn permit(location: &Location, access: Access) -> Result<(), Failure> {
    let Some(confinement) = CONFINEMENT.get() else {
        return Ok(());
    };
    let (name, is_covered) = match location {
        Location::Path(path) => {
            let path = Path::new(OsStr::from_bytes(path));
            (path.display().to_string(), confinement.covers(path))
        }
        // What a server exports can lie anywhere.
        Location::Export(_) => ("an NBD export".to_owned(), confinement.roots.is_empty()),
    };
    let refused = |why: &str| Err(Failure::new(FailureCode::Refused, format!("{name} {why}")));
    match (confinement.direction, access) {
        (Direction::Read, Access::Destination) => {
            refused("is not written: this agent only reads (--read-only)")
        }
        (Direction::Write, Access::Source | Access::LiveSource | Access::Compare) => {
            refused("is not read: this agent only writes (--write-only)")
        }
        _ if is_covered => Ok(()),
        _ => refused(&format!("lies {}", confinement.outside())),
    }
}

/// Refuses a directory in which a controller may not have anything put.
///
/// # Errors
/// [`Failure`] of code refused.
pub(super) fn permit_directory(path: &Path) -> Result<(), Failure> {
    match CONFINEMENT.get() {
        Some(confinement) if !confinement.covers(path) => {
            let message = format!("{} lies {}", path.display(), confinement.outside());
            Err(Failure::new(FailureCode::Refused, message))
        }
        _ => Ok(()),
    }
}

/// Whether a controller may know of the disk at this path.
pub(super) fn covers(path: &Path) -> bool {
    CONFINEMENT
        .get()
        .is_none_or(|confinement| confinement.covers(path))
}

/// Whether nothing may be changed.
pub(super) fn only_reads() -> bool {
    CONFINEMENT
        .get()
        .is_some_and(|confinement| confinement.direction == Direction::Read)
}

/// A name, to be used as it is: a link of that name is not followed.
///
/// # Errors
/// [`Forbidden`], or that of looking.
pub(super) fn reach(path: &Path) -> io::Result<Reached<'_>> {
    with(path, |confinement, path| confinement.reach(path))
}

/// A disk: where a link of that name leads, if it stays inside.
///
/// # Errors
/// [`Forbidden`], or that of looking.
pub(super) fn follow(path: &Path) -> io::Result<Reached<'_>> {
    with(path, |confinement, path| confinement.follow(path))
}

/// A directory itself.
///
/// # Errors
/// [`Forbidden`], or that of looking.
pub(super) fn directory(path: &Path) -> io::Result<Reached<'_>> {
    with(path, |confinement, path| confinement.directory(path))
}

/// What the error of a system call on a [`follow`]ed path means: a link that has just been put
/// there is one that leads out.
pub(super) fn explain(error: io::Error) -> io::Error {
    match CONFINEMENT.get() {
        Some(confinement) if error.raw_os_error() == Some(libc::ELOOP) => confinement.outside(),
        _ => error,
    }
}

fn with<'a>(
    path: &'a Path,
    reach: impl FnOnce(&Confinement, &Path) -> io::Result<Within>,
) -> io::Result<Reached<'a>> {
    match CONFINEMENT.get() {
        Some(confinement) if !confinement.roots.is_empty() && !state::holds(path) => {
            reach(confinement, path).map(Reached::Within)
        }
        _ => Ok(Reached::Plain(path)),
    }
}

impl Confinement {
    fn outside(&self) -> io::Error {
        let roots: Vec<_> = self
            .roots
            .iter()
            .map(|root| root.given.display().to_string())
            .collect();
        forbidden(format!(
            "outside of what this agent is allowed ({})",
            roots.join(", ")
        ))
    }

    fn covers(&self, path: &Path) -> bool {
        self.roots.is_empty() || self.roots.iter().any(|root| root.covers(path))
    }

    fn reach(&self, path: &Path) -> io::Result<Within> {
        self.first(|root| root.reach(path))
    }

    fn follow(&self, path: &Path) -> io::Result<Within> {
        self.first(|root| root.follow(path))
    }

    fn directory(&self, path: &Path) -> io::Result<Within> {
        self.first(|root| Ok(root.directory(path)?.map(Within::directory)))
    }

    /// What the first root makes of a path that has to do with it; the failure of the last, if
    /// none makes anything.
    fn first(
        &self,
        mut reach: impl FnMut(&Root) -> io::Result<Option<Within>>,
    ) -> io::Result<Within> {
        let mut failure = self.outside();
        for root in &self.roots {
            match reach(root) {
                Ok(Some(within)) => return Ok(within),
                Ok(None) => {}
                Err(error) if leads_out(&error) => {}
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

impl Reached<'_> {
    /// What system calls get. Only for as long as this is kept.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Plain(path) => path,
            Self::Within(within) => &within.path,
        }
    }

    /// What is there.
    pub(super) fn metadata(&self) -> io::Result<Metadata> {
        match self {
            Self::Plain(path) => fs::metadata(path),
            Self::Within(within) => fs::symlink_metadata(&within.path),
        }
    }

    /// What has this very name.
    pub(super) fn symlink_metadata(&self) -> io::Result<Metadata> {
        fs::symlink_metadata(self.path())
    }

    /// Where it is, behind all links.
    pub(super) fn canonical(&self) -> io::Result<PathBuf> {
        match self {
            Self::Plain(path) => fs::canonicalize(path),
            Self::Within(within) => within.canonical(),
        }
    }

    /// Flags for opening it.
    pub(super) fn flags(&self) -> i32 {
        match self {
            Self::Plain(_) => 0,
            // What is no disk may have taken its place: a pipe, say, on which opening would wait.
            Self::Within(_) => libc::O_NOFOLLOW | libc::O_NONBLOCK,
        }
    }

    /// Refuses what was opened, if it is nothing that may be had by such a path.
    ///
    /// # Errors
    /// [`Forbidden`].
    pub(super) fn check(&self, opened: &Metadata) -> io::Result<()> {
        let Self::Within(within) = self else {
            return Ok(());
        };
        let kind = opened.file_type();
        if kind.is_file() || (kind.is_block_device() && within.is_named) {
            return Ok(());
        }
        Err(forbidden(if kind.is_block_device() {
            "a device, which --allow has to name itself".to_owned()
        } else {
            "no regular file and no block device".to_owned()
        }))
    }
}

fn forbidden(what: String) -> io::Error {
    io::Error::other(Forbidden(what))
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_device_is_refused_unless_it_is_named() {
        let reached = |is_named| {
            let directory = File::open("/dev").unwrap();
            Reached::Within(Within::new(directory.into(), "x".into(), is_named))
        };
        let refused = |opened: &Metadata, is_named| {
            let refused = reached(is_named).check(opened).unwrap_err();
            let failure = Failure::io("opening", Path::new("/dev/x"), &refused);
            assert_eq!(failure.code, FailureCode::Refused);
        };
        let file = tempfile::tempfile().unwrap().metadata().unwrap();
        assert!(reached(false).check(&file).is_ok());
        let pipe = File::open("/dev/null").unwrap().metadata().unwrap();
        refused(&pipe, false);
        refused(&pipe, true);
    }
}
