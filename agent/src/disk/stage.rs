//! A destination that does not exist yet: written under a temporary name beside its own, which
//! it takes when everything is there.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kvm_clone_protocol::PARTIAL_SUFFIX;
use kvm_clone_protocol::message::{Access, FailureCode};
use kvm_clone_protocol::units::Geometry;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::libc;
use nix::unistd::geteuid;

use super::{Disk, locks};
use crate::failure::Failure;

/// The longest file name of the usual file systems.
const NAME_MAX: usize = 255;

/// The final name, the temporary one, and the directory that holds both.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    path: PathBuf,
    temporary: PathBuf,
    directory: PathBuf,
}

impl Stage {
    /// A stage for a path at which nothing is.
    pub(super) fn beside(path: &Path) -> Result<Self, Failure> {
        let refused = |what: &str| {
            let message = format!("{} {what}", path.display());
            Err(Failure::new(FailureCode::Refused, message))
        };
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return refused("names no file");
        };
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return refused("names a directory");
        }
        if path.symlink_metadata().is_ok() {
            return refused("is a symbolic link to nothing");
        }
        if path.starts_with("/dev") && !path.starts_with("/dev/shm") {
            let message = format!(
                "there is no device {}, and none can be made",
                path.display()
            );
            return Err(Failure::new(FailureCode::NotFound, message));
        }
        match directory.metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return refused("lies in what is no directory"),
            Err(error) => return Err(Failure::io("opening the directory", directory, &error)),
        }
        let temporary = directory.join(temporary_name(name));
        Ok(Self {
            path: path.to_owned(),
            temporary,
            directory: directory.to_owned(),
        })
    }

    /// Size of what an interrupted run left, if it did.
    pub(super) fn left_over(&self) -> Result<Option<u64>, Failure> {
        match self.temporary.symlink_metadata() {
            Ok(metadata)
                if metadata.is_file()
                    && metadata.nlink() == 1
                    && metadata.uid() == geteuid().as_raw() =>
            {
                Ok(Some(metadata.len()))
            }
            Ok(_) => {
                let path = self.temporary.display();
                let message = format!("{path} is in the way, and not what an earlier run left");
                Err(Failure::new(FailureCode::Refused, message))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::io("examining", &self.temporary, &error)),
        }
    }

    /// Takes up what an interrupted run left, or begins anew.
    pub(crate) fn open(&self) -> Result<Disk, Failure> {
        let is_fresh = self.left_over()?.is_none();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(is_fresh)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&self.temporary)
            .map_err(|error| self.create_failed(&error))?;
        let disk = Disk {
            file,
            path: self.path.clone(),
            is_device: false,
            is_fresh,
        };
        locks::take(&disk.file, &disk.path, Access::Destination)?;
        disk.read_in_windows();
        Ok(disk)
    }

    /// Gives the file its name, unless something has taken it meanwhile.
    pub(crate) fn commit(&self) -> Result<(), Failure> {
        let renamed = renameat2(
            AT_FDCWD,
            &self.temporary,
            AT_FDCWD,
            &self.path,
            RenameFlags::RENAME_NOREPLACE,
        );
        match renamed {
            Ok(()) => {}
            // A file system without RENAME_NOREPLACE: a hard link does not replace either.
            Err(Errno::EINVAL | Errno::ENOSYS) => std::fs::hard_link(&self.temporary, &self.path)
                .and_then(|()| std::fs::remove_file(&self.temporary))
                .map_err(|error| self.name_failed(&error))?,
            Err(error) => return Err(self.name_failed(&error.into())),
        }
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| Failure::io("syncing the directory", &self.directory, &error))
    }

    /// After a failure: keeps what the next run can take up, unless it is nothing, or the space
    /// that it occupies is what is missing.
    pub(crate) fn abandon(&self, code: FailureCode) {
        let is_empty = self
            .temporary
            .symlink_metadata()
            .is_ok_and(|file| file.blocks() == 0);
        if is_empty || code == FailureCode::NoSpace {
            // What cannot be removed is found, and taken up, by the next run.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }

    fn create_failed(&self, error: &io::Error) -> Failure {
        if error.kind() == io::ErrorKind::AlreadyExists {
            let message = format!("another sync of {} has just begun", self.path.display());
            return Failure::new(FailureCode::Busy, message);
        }
        let failure = Failure::io("creating", &self.path, error);
        let temporary = self.temporary.display();
        Failure {
            message: format!("{} (as {temporary})", failure.message),
            ..failure
        }
    }

    fn name_failed(&self, error: &io::Error) -> Failure {
        if error.kind() == io::ErrorKind::AlreadyExists {
            let message = format!(
                "{} came into being meanwhile; it was left alone",
                self.path.display()
            );
            return Failure::new(FailureCode::Refused, message);
        }
        Failure::io("naming", &self.path, error)
    }
}

impl Disk {
    /// Makes a file long enough before anything is written to it: a file that grows write by
    /// write is given space ahead by xfs, which stays in its holes.
    pub(crate) fn grow(&self, geometry: Geometry) -> Result<(), Failure> {
        if self.is_device || self.size()? >= geometry.size() {
            return Ok(());
        }
        self.file
            .set_len(geometry.size())
            .map_err(|error| self.failed("extending", &error))
    }

    /// Gives a destination its final length, makes everything durable, and lets go of the page
    /// cache that a new file filled.
    pub(crate) fn prepare(&self, geometry: Geometry) -> Result<(), Failure> {
        if !self.is_device {
            if self.size()? != geometry.size() {
                self.file
                    .set_len(geometry.size())
                    .map_err(|error| self.failed("setting the length of", &error))?;
            }
            if !self.is_fresh {
                self.punch_preallocated(geometry)?;
            }
        }
        self.file
            .sync_all()
            .map_err(|error| self.failed("syncing", &error))?;
        if self.is_fresh {
            self.drop_cache();
        }
        Ok(())
    }
}

/// `.NAME.kc-new`, or a digest of the name where that would be too long.
fn temporary_name(name: &OsStr) -> OsString {
    let mut temporary = OsString::from(".");
    if name.len() + ".".len() + PARTIAL_SUFFIX.len() <= NAME_MAX {
        temporary.push(name);
    } else {
        temporary.push(&blake3::hash(name.as_bytes()).to_hex()[..32]);
    }
    temporary.push(PARTIAL_SUFFIX);
    temporary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_temporary_name_fits_and_tells_names_apart() {
        assert_eq!(temporary_name(OsStr::new("web.qcow2")), ".web.qcow2.kc-new");
        let [one, other] =
            ["a", "b"].map(|end| temporary_name(OsStr::new(&("x".repeat(254) + end))));
        assert!(one.len() <= NAME_MAX);
        assert_ne!(one, other);
    }

    #[test]
    fn a_name_that_was_taken_meanwhile_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let stage = Stage::beside(&path).unwrap();
        let disk = stage.open().unwrap();
        std::fs::write(&path, "theirs").unwrap();
        let failure = stage.commit().unwrap_err();
        assert_eq!(failure.code, FailureCode::Refused);
        assert_eq!(std::fs::read(&path).unwrap(), b"theirs");
        drop(disk);
        stage.abandon(failure.code);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_stands_in_the_way_is_not_taken_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::os::unix::fs::symlink("/etc/passwd", directory.path().join(".disk.kc-new")).unwrap();
        let stage = Stage::beside(&path).unwrap();
        assert_eq!(stage.open().unwrap_err().code, FailureCode::Refused);
    }
}
