//! A directory that a controller is allowed, and what leads out of it; or a single file or device.
//!
//! Paths are walked by openat2 beneath a descriptor of the directory. The last part of a path is
//! kept apart, since it is what is opened, made, renamed or removed; where it is a link of the
//! user's, it is followed here, by the same walk.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use kvm_clone_protocol::message::FailureCode;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::libc;
use nix::unistd::geteuid;

use super::names::Names;
use crate::failure::Failure;

/// Links that are followed for one path: the kernel's own limit (MAXSYMLINKS).
const MAX_LINKS: usize = 40;

/// How often a path is tried again. openat2 gives up on ".." when anything on the system is
/// renamed meanwhile, which is over in microseconds.
const ATTEMPTS: usize = 64;

/// A directory with all that is in it, or a file or device.
#[derive(Debug)]
pub(super) struct Root {
    /// As the command line names it.
    pub(super) given: PathBuf,
    /// Where that is, behind all links.
    real: PathBuf,
    /// The directory; of a file or device, the one in which it lies.
    directory: OwnedFd,
    is_directory: bool,
}

/// A name in a directory that is held open.
#[derive(Debug)]
pub(super) struct Within {
    directory: OwnedFd,
    name: OsString,
    /// Both, as system calls get them.
    pub(super) path: PathBuf,
    /// The command line names it, and not only a directory above.
    pub(super) is_named: bool,
}

impl Root {
    pub(super) fn open(given: &Path) -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::io("--allow: opening", given, &error);
        let refused = |what: &str| {
            let message = format!("--allow {}: {what}", given.display());
            Failure::new(FailureCode::Refused, message)
        };
        if !given.is_absolute() {
            return Err(refused("not an absolute path"));
        }
        let link = given.symlink_metadata().ok();
        let own = |found: &Metadata| [0, geteuid().as_raw()].contains(&found.uid());
        if link.is_some_and(|found| found.is_symlink() && !own(&found)) {
            return Err(refused("a symbolic link of another user"));
        }
        let (real, directory) = match handle(given) {
            Ok(found) => (name_of(&found).map_err(failed)?, Some(found)),
            // A destination that is yet to be made.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (parent, name) = split(given).map_err(failed)?;
                let parent = name_of(&handle(parent).map_err(failed)?).map_err(failed)?;
                (parent.join(name), None)
            }
            Err(error) => return Err(failed(error)),
        };
        let is_directory = |found: &File| found.metadata().is_ok_and(|found| found.is_dir());
        let (directory, is_directory) = match directory.filter(is_directory) {
            Some(directory) => (directory, true),
            None => {
                let (parent, _) = split(&real).map_err(failed)?;
                (handle(parent).map_err(failed)?, false)
            }
        };
        let root = Self {
            given: given.to_owned(),
            real,
            directory: directory.into(),
            is_directory,
        };
        root.beneath(Path::new("")).map_err(|error| {
            refused(&format!(
                "this kernel cannot keep to a directory (openat2, Linux 5.6): {error}"
            ))
        })?;
        Ok(root)
    }

    /// Whether a controller may name this path.
    pub(super) fn covers(&self, path: &Path) -> bool {
        if self.is_directory {
            self.rest(path).is_some()
        } else {
            self.is(path)
        }
    }

    fn is(&self, path: &Path) -> bool {
        path == self.given || path == self.real
    }

    /// What a path is from this directory on. It may hold "..".
    fn rest<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        let rest = path.strip_prefix(&self.given);
        rest.or_else(|_| path.strip_prefix(&self.real))
            .ok()
            .filter(|_| self.is_directory)
    }

    pub(super) fn reach(&self, path: &Path) -> io::Result<Option<Within>> {
        let (parent, name) = split(path)?;
        if !self.is_directory {
            return self.named(path);
        }
        let directory = self.directory(parent)?;
        Ok(directory.map(|directory| Within::new(directory, name.to_owned(), false)))
    }

    pub(super) fn follow(&self, path: &Path) -> io::Result<Option<Within>> {
        match self.rest(path) {
            Some(rest) => self.walk(rest).map(Some),
            None => self.named(path),
        }
    }

    /// The directory at `path`, if it is this one, or beneath it, or that of this file.
    pub(super) fn directory(&self, path: &Path) -> io::Result<Option<OwnedFd>> {
        let rest = if self.is_directory {
            self.rest(path)
        } else {
            self.is_beside(path).then_some(Path::new(""))
        };
        rest.map(|rest| self.beneath(rest)).transpose()
    }

    fn is_beside(&self, directory: &Path) -> bool {
        [&self.given, &self.real]
            .iter()
            .any(|path| path.parent() == Some(directory))
    }

    /// This file or device, or what lies beside it while it is changed.
    fn named(&self, path: &Path) -> io::Result<Option<Within>> {
        let (parent, name) = split(path)?;
        let (_, own) = split(&self.real)?;
        let names = Names::of_file(&self.real);
        let is_ours = || names.is_some_and(|names| names.owns(name));
        let name = if self.is(path) {
            own
        } else if !self.is_directory && self.is_beside(parent) && is_ours() {
            name
        } else {
            return Ok(None);
        };
        let directory = self.directory.try_clone()?;
        Ok(Some(Within::new(directory, name.to_owned(), true)))
    }

    /// Follows the links at the end of a path; those before it are followed by the kernel.
    fn walk(&self, rest: &Path) -> io::Result<Within> {
        if rest.as_os_str().is_empty() {
            return self.beneath(rest).map(Within::directory);
        }
        let mut rest = rest.to_owned();
        for _ in 0..MAX_LINKS {
            let (parent, name) = split(&rest)?;
            let directory = self.beneath(parent)?;
            match readlinkat(&directory, name) {
                Ok(link) if Path::new(&link).is_absolute() => return Err(Errno::EXDEV.into()),
                Ok(link) => rest = parent.join(link),
                Err(Errno::EINVAL | Errno::ENOENT) => {
                    return Ok(Within::new(directory, name.to_owned(), false));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::ELOOP.into())
    }

    /// The directory at a path from this one on, which does not lead out of it.
    fn beneath(&self, rest: &Path) -> io::Result<OwnedFd> {
        let rest = match rest.as_os_str().is_empty() {
            true => Path::new("."),
            false => rest,
        };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let mut found = Err(Errno::EAGAIN);
        for _ in 0..ATTEMPTS {
            found = openat2(&self.directory, rest, how);
            if found.as_ref().err() != Some(&Errno::EAGAIN) {
                break;
            }
        }
        Ok(found?)
    }
}

impl Within {
    pub(super) fn new(directory: OwnedFd, name: OsString, is_named: bool) -> Self {
        let mut path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        path.push(&name);
        Self {
            directory,
            name,
            path,
            is_named,
        }
    }

    /// The directory itself.
    pub(super) fn directory(directory: OwnedFd) -> Self {
        Self::new(directory, ".".into(), false)
    }

    /// Where it is, behind all links.
    pub(super) fn canonical(&self) -> io::Result<PathBuf> {
        let directory = name_of(&self.directory)?;
        Ok(if self.name == "." {
            directory
        } else {
            directory.join(&self.name)
        })
    }
}

/// Whether a walk ended because it would have led out.
pub(super) fn leads_out(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EXDEV | libc::ELOOP))
}

/// A descriptor that stands for a path and reads nothing.
fn handle(path: &Path) -> io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
}

/// Where the kernel says that an open directory or file is.
fn name_of(file: &impl AsRawFd) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The directory and the name in it.
fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    let name = match path.components().next_back() {
        Some(Component::Normal(name)) => Some(name),
        _ => None,
    };
    path.parent().zip(name).ok_or_else(|| Errno::EXDEV.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    use tempfile::TempDir;

    use super::*;

    /// A directory `in` that is allowed, beside what is not.
    struct Ground {
        directory: TempDir,
        root: Root,
    }

    impl Ground {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = |name: &str| directory.path().join(name);
            fs::create_dir_all(path("in/sub")).unwrap();
            fs::write(path("out"), "secret").unwrap();
            fs::write(path("in/disk"), "disk").unwrap();
            let root = Root::open(&path("in")).unwrap();
            Self { directory, root }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn link(&self, target: &str, name: &str) {
            symlink(target, self.path(name)).unwrap();
        }

        /// What is read at a path that is followed; the error otherwise.
        fn read(&self, name: &str) -> Result<String, Option<i32>> {
            let within = self.root.follow(&self.path(name));
            let within = within.map_err(|error| error.raw_os_error())?;
            fs::read_to_string(within.ok_or(None)?.path).map_err(|error| error.raw_os_error())
        }
    }

    #[test]
    fn what_lies_beneath_is_reached_by_paths_and_by_links_that_stay_inside() {
        let ground = Ground::new();
        ground.link("disk", "in/link");
        ground.link("../link", "in/sub/again");
        ground.link("sub", "in/directory");
        for name in [
            "in/disk",
            "in/sub/../disk",
            "in/./disk",
            "in/link",
            "in/sub/again",
            "in/directory/again",
            "in/directory/../disk",
        ] {
            assert_eq!(ground.read(name).as_deref(), Ok("disk"), "{name}");
            let within = ground.root.follow(&ground.path(name)).unwrap().unwrap();
            assert_eq!(
                within.canonical().unwrap(),
                ground.path("in/disk"),
                "{name}"
            );
        }
    }

    #[test]
    fn neither_a_link_nor_the_directory_above_leads_out() {
        let ground = Ground::new();
        let out = ground.path("out");
        ground.link("../out", "in/relative");
        ground.link(out.to_str().unwrap(), "in/absolute");
        ground.link("relative", "in/over");
        ground.link("..", "in/up");
        ground.link("/proc/self/root", "in/magic");
        ground.link("round", "in/round");
        for name in [
            "in/../out",
            "in/sub/../../out",
            "in/..",
            "in/relative",
            "in/absolute",
            "in/over",
            "in/up/out",
            "in/magic/etc/passwd",
            "in/round",
        ] {
            let refused = ground.root.follow(&ground.path(name));
            assert!(leads_out(&refused.unwrap_err()), "{name}");
        }
        for name in ["out", "inside", "in2/disk"] {
            assert_eq!(
                ground.read(name),
                Err(None),
                "{name} is none of this root's"
            );
        }
    }

    #[test]
    fn a_name_is_used_as_it_is_and_a_link_that_takes_its_place_is_not_followed() {
        let ground = Ground::new();
        let within = ground.root.reach(&ground.path("in/disk")).unwrap().unwrap();
        fs::remove_file(ground.path("in/disk")).unwrap();
        ground.link("../out", "in/disk");
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&within.path);
        assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::ELOOP));
        assert!(within.path.is_symlink());
        // The directory itself may go elsewhere; what was reached stays what it was.
        let within = ground.root.reach(&ground.path("in/sub/new")).unwrap();
        fs::rename(ground.path("in/sub"), ground.path("in/moved")).unwrap();
        ground.link("..", "in/sub");
        fs::write(&within.unwrap().path, "new").unwrap();
        assert!(ground.path("in/moved/new").exists() && !ground.path("new").exists());
    }

    /// Looks at a disk again and again while two names are exchanged all the time, and gives how
    /// often it was there and how often it was refused.
    fn race(ground: &Ground, one: &str, other: &str, disk: &str) -> (u32, u32) {
        let (one, other) = (ground.path(one), ground.path(other));
        let (mut read, mut refused) = (0, 0);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let flags = RenameFlags::RENAME_EXCHANGE;
                while !stop.load(Ordering::Relaxed) {
                    renameat2(AT_FDCWD, &one, AT_FDCWD, &other, flags).unwrap();
                }
            });
            let enough = |read, refused| read > 1000 && refused > 1000;
            let deadline = Instant::now() + Duration::from_secs(20);
            while !enough(read, refused) && Instant::now() < deadline {
                let opened = ground.root.follow(&ground.path(disk)).and_then(|within| {
                    File::options()
                        .read(true)
                        .custom_flags(libc::O_NOFOLLOW)
                        .open(&within.unwrap().path)
                });
                match opened.and_then(io::read_to_string) {
                    Ok(contents) if contents == "disk" => read += 1,
                    Err(error) if leads_out(&error) => refused += 1,
                    other => {
                        stop.store(true, Ordering::Relaxed);
                        panic!("{other:?}");
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        (read, refused)
    }

    #[test]
    fn what_is_exchanged_between_looking_and_opening_is_no_way_out() {
        let ground = Ground::new();
        fs::create_dir(ground.path("outer")).unwrap();
        fs::write(ground.path("outer/disk"), "secret").unwrap();
        fs::write(ground.path("in/sub/disk"), "disk").unwrap();
        ground.link("../outer/disk", "in/link");
        ground.link("../outer", "in/other");
        for (one, other, disk) in [
            ("in/disk", "in/link", "in/disk"),
            ("in/sub", "in/other", "in/sub/disk"),
        ] {
            let (read, refused) = race(&ground, one, other, disk);
            assert!(read > 0 && refused > 0, "{read} read, {refused} refused");
        }
    }

    #[test]
    fn a_file_is_allowed_alone_with_what_lies_beside_it_while_it_is_changed() {
        let ground = Ground::new();
        let path = ground.path("in/disk");
        let root = Root::open(&path).unwrap();
        assert!(root.covers(&path));
        let reached = |name: &str| root.reach(&ground.path(name)).unwrap().is_some();
        assert!(reached("in/disk") && !reached("in/sub/../disk"));
        for name in [
            "new",
            "clone",
            "stage",
            "applying",
            "journal",
            "journal.new",
        ] {
            let name = format!("in/.disk.kc-{name}");
            assert!(reached(&name), "{name}");
            assert!(!root.covers(&ground.path(&name)), "{name}");
        }
        for name in ["in/other", "in/.other.kc-new", "in/.disk.kc-other", "in"] {
            assert!(!reached(name), "{name}");
            assert!(!root.covers(&ground.path(name)), "{name}");
        }
        assert!(root.directory(&ground.path("in")).unwrap().is_some());
        assert!(root.directory(&ground.path("in/sub")).unwrap().is_none());
    }

    #[test]
    fn a_root_is_known_by_its_own_name_and_by_that_behind_a_link() {
        let ground = Ground::new();
        ground.link("in", "link");
        let root = Root::open(&ground.path("link")).unwrap();
        for name in ["link/disk", "in/disk"] {
            assert!(root.follow(&ground.path(name)).unwrap().is_some(), "{name}");
        }
        let missing = Root::open(&ground.path("link/new")).unwrap();
        assert!(missing.covers(&ground.path("in/new")));
        assert!(
            missing
                .reach(&ground.path("in/.new.kc-new"))
                .unwrap()
                .is_some()
        );
        for path in ["relative", "/no/such/directory"] {
            assert!(Root::open(Path::new(path)).is_err(), "{path}");
        }
    }
}
