//! What lies beside a destination while a run on it is unfinished, and what is done to names.
//!
//! ```text
//!  .NAME.kc-new        the destination, where there was none
//!  .NAME.kc-clone      the new version, sharing blocks with the old one     (reflink)
//!  .NAME.kc-stage      changed blocks, each at its own place                (staged)
//!  .NAME.kc-applying   the destination itself, while they are applied       (staged)
//!  .NAME.kc-journal    what the run is doing: journal.rs; with .new, while it is being made
//!
//!  .NAME.kc-sent-PAIR  a source as it was sent to a destination: sent.rs; stays between runs
//! ```
//!
//! Of a block device, whose directory is no place for files, stage and journal lie in the agent's
//! own directory on the host, under a name made of what identifies the device.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kvm_clone_protocol::PARTIAL_SUFFIX;
use kvm_clone_protocol::message::FailureCode;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::libc;
use serde::{Deserialize, Serialize};

use super::call::{Op, call};
use super::confinement::{self, reach};
use super::state;
use crate::failure::Failure;

/// The part of the agent's own directory that holds the things of devices.
const DEVICES: &str = "devices";

/// The longest file name of the usual file systems.
const NAME_MAX: usize = 255;

/// A destination's name, and those beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Names {
    /// Where the destination is, behind all symbolic links.
    #[serde(with = "path_bytes")]
    pub(super) path: PathBuf,
    /// Where its own things lie.
    #[serde(with = "path_bytes")]
    directory: PathBuf,
    /// What their names are made of.
    stem: OsString,
}

impl Names {
    /// Of what exists.
    ///
    /// # Errors
    /// [`Failure`] when the path cannot be followed, or there is no place for a device's things.
    pub(super) fn of(path: &Path, metadata: &Metadata) -> Result<Self, Failure> {
        let path = confinement::follow(path)
            .and_then(|found| found.canonical())
            .map_err(|error| Failure::io("following", path, &error))?;
        if metadata.file_type().is_block_device() {
            let directory = state::path(DEVICES)?;
            return Ok(Self::of_device(
                &path,
                directory,
                device_key(metadata.rdev()),
            ));
        }
        Self::of_file(&path).ok_or_else(|| {
            let message = format!("{} names no file", path.display());
            Failure::new(FailureCode::Refused, message)
        })
    }

    /// Of a file, whose things lie beside it. `None` for a path that names no file.
    pub(super) fn of_file(path: &Path) -> Option<Self> {
        Some(Self {
            directory: path.parent()?.to_owned(),
            stem: path.file_name()?.to_owned(),
            path: path.to_owned(),
        })
    }

    /// Of a device, whose things lie in `directory`, named by `key`.
    pub(super) fn of_device(path: &Path, directory: PathBuf, key: OsString) -> Self {
        Self {
            path: path.to_owned(),
            directory,
            stem: key,
        }
    }

    /// Where the destination's own things lie.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directory for a device's things; a file's is there.
    ///
    /// # Errors
    /// [`Failure`] as [`state::directory`].
    pub(super) fn make_room(&self) -> Result<(), Failure> {
        if self.path.parent() != Some(&self.directory) {
            state::directory(DEVICES)?;
        }
        Ok(())
    }

    /// Makes the names durable: the destination's own, and those of what lies beside it.
    pub(super) fn sync(&self) -> io::Result<()> {
        sync_directory(&self.directory)
    }

    pub(super) fn new_file(&self) -> PathBuf {
        self.beside(PARTIAL_SUFFIX)
    }

    pub(super) fn clone_file(&self) -> PathBuf {
        self.beside(".kc-clone")
    }

    pub(super) fn stage(&self) -> PathBuf {
        self.beside(".kc-stage")
    }

    pub(super) fn applying(&self) -> PathBuf {
        self.beside(".kc-applying")
    }

    pub(super) fn journal(&self) -> PathBuf {
        self.beside(".kc-journal")
    }

    /// A journal that is being made.
    pub(super) fn new_journal(&self) -> PathBuf {
        self.beside(".kc-journal.new")
    }

    /// A copy of what a source was when it was sent, for a source and a destination.
    pub(super) fn sent(&self, pair: &str) -> PathBuf {
        self.beside(&format!(".kc-sent-{pair}"))
    }

    /// Whether something of this name, in their directory, is one of them.
    pub(super) fn owns(&self, name: &OsStr) -> bool {
        let all = [
            self.new_file(),
            self.clone_file(),
            self.stage(),
            self.applying(),
            self.journal(),
            self.new_journal(),
        ];
        all.iter().any(|path| path.file_name() == Some(name))
    }

    /// Whether changes may wait at this path: beside a file, or, of a device, under its key.
    pub(super) fn may_stage_at(&self, path: &Path) -> bool {
        let own = self.stage();
        let is_of_device = self.path.parent() != Some(&self.directory);
        path == own || (is_of_device && path.file_name() == own.file_name())
    }

    /// `.NAME.SUFFIX`, or a digest of the name where that would be too long.
    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = OsString::from(".");
        if self.stem.len() + ".".len() + suffix.len() <= NAME_MAX {
            name.push(&self.stem);
        } else {
            name.push(&blake3::hash(self.stem.as_bytes()).to_hex()[..32]);
        }
        name.push(OsStr::new(suffix));
        self.directory.join(name)
    }
}

/// What identifies a device over restarts of the host, when it may have another number: what the
/// device mapper, the disk itself or a loop device says of itself.
fn device_key(number: u64) -> OsString {
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let at = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let says = |name: &str| {
        let said = std::fs::read(at.join(name)).ok()?;
        let said = said.trim_ascii();
        (!said.is_empty()).then(|| said.to_vec())
    };
    let partition = says("partition").unwrap_or_default();
    let own = ["dm/uuid", "loop/backing_file", "wwid", "device/wwid"];
    let of_whole = ["../wwid", "../device/wwid"];
    let identity = own
        .iter()
        .chain(of_whole.iter().filter(|_| !partition.is_empty()))
        .find_map(|name| says(name))
        .unwrap_or_else(|| format!("{major}:{minor}").into_bytes());
    let digest = blake3::hash(&[&identity[..], b"#", &partition].concat());
    digest.to_hex()[..32].to_owned().into()
}

/// A path as the bytes that it is: it need not be UTF-8.
pub(super) mod path_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(in crate::disk) fn serialize<S: Serializer>(
        path: &Path,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(serializer)
    }

    pub(in crate::disk) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<PathBuf, D::Error> {
        Vec::deserialize(deserializer).map(|bytes| OsString::from_vec(bytes).into())
    }
}

/// Renames without replacing anything.
pub(super) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let (reached_from, reached_to) = (reach(from)?, reach(to)?);
    let (old, new) = (reached_from.path(), reached_to.path());
    let flags = RenameFlags::RENAME_NOREPLACE;
    let renamed = call(Op::Rename, &to, || {
        Ok(renameat2(AT_FDCWD, old, AT_FDCWD, new, flags)?)
    });
    match renamed.as_ref().map_err(io::Error::raw_os_error) {
        // A file system without RENAME_NOREPLACE: a hard link does not replace either.
        Err(Some(libc::EINVAL | libc::ENOSYS)) => {
            call(Op::Link, &to, || std::fs::hard_link(old, new))?;
            call(Op::Remove, &from, || std::fs::remove_file(old))
        }
        _ => renamed,
    }
}

/// Renames in place of what is there.
pub(super) fn rename_over(from: &Path, to: &Path) -> io::Result<()> {
    let (reached_from, reached_to) = (reach(from)?, reach(to)?);
    call(Op::Rename, &to, || {
        std::fs::rename(reached_from.path(), reached_to.path())
    })
}

/// Removes a file, which need not be there; tells whether it was.
pub(super) fn remove(path: &Path) -> io::Result<bool> {
    let reached = reach(path)?;
    match call(Op::Remove, &path, || std::fs::remove_file(reached.path())) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    let file = File::open(confinement::directory(directory)?.path())?;
    call(Op::SyncDirectory, &directory, || file.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_tell_destinations_apart() {
        let names = |name: &str| Names::of_file(&Path::new("/d").join(name)).unwrap();
        assert_eq!(
            names("web.qcow2").new_file(),
            Path::new("/d/.web.qcow2.kc-new")
        );
        let [one, other] = ["a", "b"].map(|end| names(&("x".repeat(254) + end)));
        for len in 200..NAME_MAX {
            let long = names(&"x".repeat(len));
            for path in [long.applying(), long.journal(), long.new_journal()] {
                assert!(path.file_name().unwrap().len() <= NAME_MAX);
            }
        }
        assert_ne!(one.applying(), other.applying());
        assert!(Names::of_file(Path::new("/")).is_none());
    }
}
