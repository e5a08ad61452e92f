//! What a run is tried on: a file system with a source and a destination, of which every byte is
//! known, and a place for the notes of unfinished runs that no other test uses.

use std::fs;
use std::path::{Path, PathBuf};

use kvm_clone_protocol::units::BLOCK_LEN;
use kvm_clone_tests::image::{MIB, Random};
use kvm_clone_tests::lab;
use kvm_clone_tests::mount::{FileSystem, Kind};
use kvm_clone_tests::namespace::apart;
use kvm_clone_tests::skip::{obstacle, skip};
use tempfile::TempDir;

/// Where an agent that runs as root keeps notes.
const STATE: &str = "/var/lib/kvm-clone";

/// A file system, made for one test, and notes of its own. Only the thread that made them and what
/// it starts sees them.
///
/// It lies in memory: what is tried is what a process leaves, and an fsync that waits for a disk
/// would only cost time. Fields are dropped in order.
pub(crate) struct Ground {
    _notes: FileSystem,
    images: FileSystem,
    memory: FileSystem,
    _directory: TempDir,
}

/// A disk and what it is to become.
pub(crate) struct Disk {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
    old: Option<Vec<u8>>,
    new: Vec<u8>,
}

/// What is found at a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    Old,
    New,
    Absent,
    Torn,
}

/// How the versions of a disk differ in length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Length {
    Grows,
    Shrinks,
}

/// Runs a test on a thread that is fit for a ground; says that it is skipped where none can be.
pub(crate) fn on_ground(test: impl FnOnce() + Send) {
    match obstacle() {
        Some(reason) => skip(&reason),
        None => apart(test),
    }
}

impl Ground {
    /// On a thread that is apart.
    pub(crate) fn new(kind: Kind) -> Self {
        let directory = TempDir::with_prefix_in("faults-", lab::base()).unwrap();
        let memory = FileSystem::mount(Kind::Tmpfs, 320 * MIB, &directory.path().join("memory"));
        // xfs does not go below some 300 MiB; an image only takes what is written.
        let (image, mounted) = (memory.join("image"), memory.join("images"));
        let images = FileSystem::on_image(kind, 320 * MIB, &image, &mounted);
        let notes = memory.join("notes");
        for made in [&notes, Path::new(STATE), &images.join("to")] {
            fs::create_dir_all(made).unwrap();
        }
        Self {
            _notes: FileSystem::bind(&notes, Path::new(STATE)),
            images,
            memory,
            _directory: directory,
        }
    }

    /// A path for what is of no interest to an agent.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.memory.join(name)
    }

    /// A disk that exists in an older version.
    pub(crate) fn disk(&self, name: &str, length: Length) -> Disk {
        self.make(name, Some(old(name, length)))
    }

    /// A disk that does not exist.
    pub(crate) fn new_disk(&self, name: &str) -> Disk {
        self.make(name, None)
    }

    fn make(&self, name: &str, old: Option<Vec<u8>>) -> Disk {
        let disk = Disk {
            source: self.images.join(format!("{name}-source")),
            destination: self.images.join("to").join(name),
            old,
            new: new(name),
        };
        write_sparse(&disk.source, &disk.new);
        disk
    }

    /// Makes everything as it was before the first run.
    pub(crate) fn reset(&self, disks: &[Disk]) {
        for directory in [self.images.path().join("to"), STATE.into()] {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => fs::remove_dir_all(path).unwrap(),
                    false => fs::remove_file(path).unwrap(),
                }
            }
        }
        disks.iter().for_each(Disk::reset);
    }

    /// The names of what was left: beside the destinations, and of notes.
    pub(crate) fn left(&self, disks: &[Disk]) -> Vec<String> {
        let names = |directory: PathBuf| {
            let entries = fs::read_dir(directory).into_iter().flatten();
            entries.map(|entry| entry.unwrap().path())
        };
        names(self.images.join("to"))
            .chain(names(Path::new(STATE).join("runs")))
            .filter(|path| disks.iter().all(|disk| disk.destination != *path))
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect()
    }
}

impl Disk {
    /// Makes it the older version.
    pub(crate) fn reset(&self) {
        if let Some(old) = &self.old {
            write_sparse(&self.destination, old);
        }
    }

    /// What is there now, by every byte.
    pub(crate) fn seen(&self) -> Seen {
        match fs::read(&self.destination) {
            Ok(bytes) if bytes == self.new => Seen::New,
            Ok(bytes) if Some(&bytes) == self.old.as_ref() => Seen::Old,
            Ok(_) => Seen::Torn,
            Err(_) => Seen::Absent,
        }
    }

    /// What is there before the first run.
    pub(crate) fn before(&self) -> Seen {
        match self.old {
            Some(_) => Seen::Old,
            None => Seen::Absent,
        }
    }

    /// Bytes of the version that is to be.
    pub(crate) fn size(&self) -> u64 {
        self.new.len() as u64
    }
}

/// Blocks of a disk: enough for every kind of change more than once.
const BLOCKS: usize = 40;

/// What a block is in the old version, and in the new one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Hole,
    Data(u64),
    /// With zeros in the middle of it.
    Gapped(u64),
}

/// Block `index` in both versions: equal, changed, to zeros, from zeros, and in pages.
fn versions(index: usize) -> (Block, Block) {
    use Block::{Data, Gapped, Hole};
    let seed = index as u64;
    match index % 10 {
        1 => (Data(seed), Data(1000 + seed)),
        3 => (Data(seed), Hole),
        5 => (Hole, Data(seed)),
        7 => (Data(seed), Gapped(seed)),
        9 => (Hole, Hole),
        _ => (Data(seed), Data(seed)),
    }
}

fn old(name: &str, length: Length) -> Vec<u8> {
    let blocks = match length {
        Length::Grows => BLOCKS - 2,
        Length::Shrinks => BLOCKS + 3,
    };
    contents(name, (0..blocks).map(|index| versions(index).0), 77)
}

fn new(name: &str) -> Vec<u8> {
    contents(name, (0..BLOCKS).map(|index| versions(index).1), 5777)
}

/// The blocks, and the short one at the end.
fn contents(name: &str, blocks: impl Iterator<Item = Block>, rest: usize) -> Vec<u8> {
    let salt: u64 = name.bytes().map(u64::from).sum();
    let bytes = |block| {
        let (Block::Data(seed) | Block::Gapped(seed)) = block else {
            return vec![0; BLOCK_LEN];
        };
        let mut random = Random::new(salt << 32 | seed);
        let mut bytes: Vec<u8> = (0..BLOCK_LEN / 8)
            .flat_map(|_| random.draw().to_le_bytes())
            .collect();
        if matches!(block, Block::Gapped(_)) {
            bytes[8192..24576].fill(0);
        }
        bytes
    };
    let mut contents: Vec<u8> = blocks.flat_map(bytes).collect();
    contents.extend_from_slice(&bytes(Block::Data(rest as u64))[..rest]);
    contents
}

/// Pages of zeros are left out.
fn write_sparse(path: &Path, contents: &[u8]) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::create(path).unwrap();
    file.set_len(contents.len() as u64).unwrap();
    for (page, at) in contents.chunks(4096).zip((0..).step_by(4096)) {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, at).unwrap();
        }
    }
}
