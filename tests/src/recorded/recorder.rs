//! Records what a file system tells its disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};

use super::fuse::{Device, Export};
use super::log::Log;
use crate::image;
use crate::mount::{FileSystem, Kind};
use crate::process::{tool, wait_for};

/// How long a loop device may take to be given up after its file system. It takes 10 ms; a loaded
/// machine is given time.
const PATIENCE: Duration = Duration::from_secs(60);

/// Big enough for each kind at the least, and sparse: xfs wants 300 MiB.
const SIZE: u64 = 320 * image::MIB;

/// Makes an image that holds a fresh file system.
///
/// # Panics
/// When there is no such file system on a disk.
pub(super) fn format(kind: Kind, image: &Path) {
    let file = File::create(image).expect("the laboratory's directory is writable");
    file.set_len(SIZE).expect("a sparse file takes no room");
    // Nothing that is written is smaller than 4 KiB. Nothing is left for the first mount to do later.
    let (mkfs, args): (_, &[_]) = match kind {
        Kind::Ext4 => {
            let now = "lazy_itable_init=0,lazy_journal_init=0";
            ("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", now])
        }
        Kind::Xfs => ("mkfs.xfs", &["-q", "-f", "-s", "size=4096"]),
        Kind::Btrfs => ("mkfs.btrfs", &["-q", "-f"]),
        Kind::Tmpfs => panic!("tmpfs has no disk"),
    };
    let args = args.iter().map(AsRef::as_ref);
    tool(mkfs, args.chain([image.as_os_str()]));
}

/// How the file system is mounted while it is recorded: as hard on a careless program as it gets.
///
/// ext4 writes a file's data before a rename over another one is on the disk, which no standard
/// promises and no other file system does. Space that is given up is discarded at once.
fn options(kind: Kind) -> &'static str {
    match kind {
        Kind::Ext4 => "discard,noauto_da_alloc",
        Kind::Xfs | Kind::Btrfs | Kind::Tmpfs => "discard",
    }
}

/// A file system on a disk that is recorded. Fields are dropped in order.
#[derive(Debug)]
pub(super) struct Recorder {
    file_system: FileSystem,
    export: Export<Disk>,
    log: Arc<Mutex<Log>>,
}

impl Recorder {
    /// Mounts an image on a directory, and records from here on.
    ///
    /// # Panics
    /// When the image holds no file system.
    pub(super) fn start(kind: Kind, image: &Path, directory: &Path) -> Self {
        let log = Arc::new(Mutex::new(Log::new()));
        let mut options_of_file = OpenOptions::new();
        let file = options_of_file.read(true).write(true).open(image);
        let disk = Disk {
            file: file.expect("an image was made"),
            len: image::length(image),
            log: Arc::clone(&log),
        };
        let path = image.with_extension("disk");
        let export = Export::start(disk, &path);
        let file_system = FileSystem::of_image(&path, options(kind), directory);
        Self {
            file_system,
            export,
            log,
        }
    }

    /// How many entries were recorded so far.
    pub(super) fn entries(&self) -> usize {
        lock(&self.log).entries().len()
    }

    /// Unmounts, and gives what was recorded.
    ///
    /// # Panics
    /// When the disk stays in use.
    pub(super) fn stop(self) -> Log {
        let Self {
            file_system,
            mut export,
            log,
        } = self;
        drop(file_system);
        drop(wait_for("the end of the recorded disk", PATIENCE, || {
            export.stop()
        }));
        std::mem::replace(&mut lock(&log), Log::new())
    }
}

/// An image, each change of which goes to the log.
#[derive(Debug)]
struct Disk {
    file: File,
    len: u64,
    log: Arc<Mutex<Log>>,
}

impl Device for Disk {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let rest = self.len.saturating_sub(offset);
        let len = usize::try_from(rest).map_or(len, |rest| rest.min(len));
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)?;
        lock(&self.log).write(offset, data);
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, offset.cast_signed(), len.cast_signed())?;
        lock(&self.log).discard(offset, len);
        Ok(())
    }

    /// The image itself need not last.
    fn sync(&mut self) -> io::Result<()> {
        lock(&self.log).flush();
        Ok(())
    }
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().expect("nobody panics while writing to the log")
}
