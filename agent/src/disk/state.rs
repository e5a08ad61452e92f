//! The agent's own directory on a host, where it keeps what must be known when it is gone: which
//! destinations are unfinished. Root's is `/var/lib/kvm-clone`; other users have one in their home.

use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use kvm_clone_protocol::message::FailureCode;
use nix::unistd::geteuid;

use crate::failure::Failure;

#[cfg(not(test))]
const OF_ROOT: &str = "/var/lib/kvm-clone";

/// A directory below the agent's own, made where it is missing.
///
/// # Errors
/// [`Failure`] when there is no place for it, or somebody else could have made what is there.
pub(super) fn directory(name: &str) -> Result<PathBuf, Failure> {
    let base = base()?;
    let directory = base.join(name);
    for part in [&base, &directory] {
        make(part).map_err(|error| Failure::io("making the directory", part, &error))?;
    }
    check(&base, false)?;
    check(&directory, true)?;
    Ok(directory)
}

/// Where that is, made or not.
///
/// # Errors
/// [`Failure`] when there is no place for it.
pub(super) fn path(name: &str) -> Result<PathBuf, Failure> {
    Ok(base()?.join(name))
}

/// The same, unless it does not exist.
///
/// # Errors
/// [`Failure`] when somebody else could have made what is there.
pub(super) fn existing(name: &str) -> Result<Option<PathBuf>, Failure> {
    let base = base()?;
    let directory = base.join(name);
    if directory.symlink_metadata().is_err() {
        return Ok(None);
    }
    check(&base, false)?;
    check(&directory, true)?;
    Ok(Some(directory))
}

/// Whether a path is one of ours, which no controller has a say in.
pub(super) fn holds(path: &Path) -> bool {
    let is_plain = path.components().all(|part| part != Component::ParentDir);
    is_plain && base().is_ok_and(|base| path.starts_with(base))
}

/// Each test is a host of its own.
#[cfg(test)]
fn base() -> Result<PathBuf, Failure> {
    let here = std::env::current_exe().expect("a test is a program");
    let (process, thread) = (std::process::id(), std::thread::current().id());
    Ok(here.with_file_name(format!("state-of-test-{process}-{thread:?}")))
}

#[cfg(not(test))]
fn base() -> Result<PathBuf, Failure> {
    if geteuid().is_root() {
        return Ok(OF_ROOT.into());
    }
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")));
    state.map(|state| state.join("kvm-clone")).ok_or_else(|| {
        let message = "this user has no home directory in which unfinished runs could be noted";
        Failure::new(FailureCode::MissingRequirement, message)
    })
}

fn make(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let sync = |directory: &Path| File::open(directory)?.sync_all();
    directory.parent().map_or(Ok(()), sync)
}

/// Ours alone: nobody else may have a say in what is read from here. The directory above may be
/// read by others.
fn check(directory: &Path, private: bool) -> Result<(), Failure> {
    let found = directory
        .symlink_metadata()
        .map_err(|error| Failure::io("examining", directory, &error))?;
    let forbidden = if private { 0o077 } else { 0o022 };
    let is_ours = |found: &Metadata| {
        found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & forbidden == 0
    };
    if is_ours(&found) {
        return Ok(());
    }
    let message = format!(
        "{} is not a directory that only this user can change",
        directory.display()
    );
    Err(Failure::new(FailureCode::Refused, message))
}
