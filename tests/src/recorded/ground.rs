//! Where a round takes place: a controller and disks in memory, mounted by the running thread.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::controller::Controller;
use crate::image::GIB;
use crate::lab;
use crate::mount::{FileSystem, Kind};

/// Where the product keeps what it has to remember. For a round it lies on the recorded disk.
const STATE: &str = "/var/lib/kvm-clone";

/// The name of the file that is replaced, and how names begin that we give to what lies beside it.
const DISK: &str = "disk";
const BESIDE: &str = ".disk.kc-";

/// A directory in memory. Fields are dropped in order.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) controller: Controller,
    memory: FileSystem,
    _directory: TempDir,
}

/// The image, mounted.
#[derive(Debug)]
pub(super) struct Mounted(FileSystem);

impl Ground {
    /// For a thread that is apart.
    pub(super) fn new() -> Self {
        let directory = TempDir::with_prefix_in("crash-", lab::base());
        let directory = directory.expect("root may make directories");
        // It only takes what is written: some 200 MiB on xfs.
        let memory = FileSystem::mount(Kind::Tmpfs, 4 * GIB, &directory.path().join("memory"));
        let config = memory.join("ssh_config");
        fs::write(&config, "").expect("memory is writable");
        fs::create_dir_all(STATE).expect("root may make directories");
        Self {
            controller: Controller::new(memory.join("home"), config),
            memory,
            _directory: directory,
        }
    }

    /// The image that is recorded, or that a cut has left.
    pub(super) fn image(&self) -> PathBuf {
        self.memory.join("image")
    }

    /// What the disk is to become.
    pub(super) fn source(&self) -> PathBuf {
        self.memory.join("source")
    }

    /// Where the image is mounted.
    pub(super) fn mount_point(&self) -> PathBuf {
        self.memory.join("mounted")
    }

    /// The file that is replaced.
    pub(super) fn disk(&self) -> PathBuf {
        self.mount_point().join(DISK)
    }

    /// Mounts the image.
    pub(super) fn mount(&self) -> Mounted {
        let (image, at) = (self.image(), self.mount_point());
        Mounted(FileSystem::of_image(&image, "rw", &at))
    }

    /// Has the product keep what it remembers on the mounted image.
    pub(super) fn bind_state(&self) -> FileSystem {
        FileSystem::bind(&self.mount_point().join("state"), Path::new(STATE))
    }
}

impl Mounted {
    /// Makes what the product's memory is bound to later.
    pub(super) fn make_state(&self) {
        fs::create_dir(self.0.join("state")).expect("a fresh file system is empty");
    }

    /// What lies beside the disk and belongs to it.
    pub(super) fn beside(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("a directory is there");
        let names = entries.map(|entry| entry.expect("it can be listed").file_name());
        let mut names: Vec<_> = names
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.retain(|name| name.starts_with(BESIDE));
        names.sort();
        names
    }
}
