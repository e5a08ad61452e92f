//! What must stay as it is: a directory with a disk in it, and a file beside.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use kvm_clone_protocol::digest::{Digester, RangeHasher, disk_root};
use kvm_clone_protocol::message::SessionParams;
use kvm_clone_protocol::units::Geometry;
use tempfile::TempDir;

use crate::image::BLOCK;

/// Blocks of a session; the last has [`TAIL`] bytes.
pub const BLOCKS: u64 = 10;
pub const TAIL: u64 = 100;

/// Bytes of a session.
pub const SIZE: u64 = (BLOCKS - 1) * BLOCK + TAIL;

/// A block that is a hole.
pub const HOLE: u64 = 3;

/// A disk and its neighbour.
#[derive(Debug)]
pub struct Ground {
    directory: TempDir,
    old: Old,
}

/// What the disk was.
#[derive(Debug)]
enum Old {
    Missing,
    Bytes(Vec<u8>),
    Length(u64),
}

impl Ground {
    /// A disk that is longer than a session by some blocks and bytes.
    #[must_use]
    pub fn longer() -> Self {
        Self::with(SIZE + 3 * BLOCK + 77, 0x20)
    }

    /// A disk that is as long as a session.
    #[must_use]
    pub fn equal() -> Self {
        Self::with(SIZE, 0x20)
    }

    /// A disk that is as long as a session, and of which every block is another.
    #[must_use]
    pub fn other() -> Self {
        Self::with(SIZE, 0xa0)
    }

    /// No disk yet.
    ///
    /// # Panics
    /// When no directory can be made.
    #[must_use]
    pub fn missing() -> Self {
        let directory = TempDir::with_prefix("kc-hostile-").expect("a directory can be made");
        let ground = Self {
            directory,
            old: Old::Missing,
        };
        fs::write(ground.neighbour(), neighbour()).expect("the directory is writable");
        ground
    }

    fn with(size: u64, first: u8) -> Self {
        let ground = Self::missing();
        let file = File::create(ground.disk()).expect("the directory is writable");
        file.set_len(size).expect("a disk gets its size");
        for index in (0..size.div_ceil(BLOCK)).filter(|index| *index != HOLE) {
            let len = BLOCK.min(size - index * BLOCK);
            let bytes = vec![first + u8::try_from(index).expect("few blocks"); size_of(len)];
            file.write_all_at(&bytes, index * BLOCK).expect("room");
        }
        let old = fs::read(ground.disk()).expect("just written");
        Self {
            old: Old::Bytes(old),
            ..ground
        }
    }

    /// A sparse disk of so many blocks, of which the first hold something. Only its length is
    /// looked at later.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn sparse(blocks: u64, filled: u64) -> Self {
        let ground = Self::missing();
        let file = File::create(ground.disk()).expect("the directory is writable");
        file.set_len(blocks * BLOCK).expect("a disk gets its size");
        for index in 0..filled {
            file.write_all_at(&(index + 1).to_le_bytes(), index * BLOCK)
                .expect("room");
        }
        Self {
            old: Old::Length(blocks * BLOCK),
            ..ground
        }
    }

    /// The disk's path.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.path("disk")
    }

    /// A path in the directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn neighbour(&self) -> PathBuf {
        self.path("disk2")
    }

    /// What the disk held.
    ///
    /// # Panics
    /// When there was none, or it is not known.
    #[must_use]
    pub fn old(&self) -> &[u8] {
        match &self.old {
            Old::Bytes(bytes) => bytes,
            other => panic!("{other:?}: the disk's bytes were not kept"),
        }
    }

    /// The root of what the disk held, as far as a session goes.
    #[must_use]
    pub fn root(&self, params: &SessionParams) -> [u8; 16] {
        root(&self.old()[..size_of(params.size)], params)
    }

    /// The same with another block.
    #[must_use]
    pub fn root_with(&self, params: &SessionParams, index: u64, block: &[u8]) -> [u8; 16] {
        let mut bytes = self.old()[..size_of(params.size)].to_vec();
        let start = size_of(index * BLOCK);
        bytes[start..start + block.len()].copy_from_slice(block);
        root(&bytes, params)
    }

    /// Bytes that the directory's files occupy.
    ///
    /// # Panics
    /// When they cannot be looked at.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        let entries = fs::read_dir(self.directory.path()).expect("an own directory");
        let blocks = entries.map(|entry| {
            let metadata = entry.and_then(|entry| entry.metadata());
            metadata.map_or(0, |metadata| metadata.blocks())
        });
        blocks.sum::<u64>() * 512
    }

    /// Claims that the disk under its name is what it was.
    ///
    /// # Panics
    /// When it is not.
    pub fn assert_untouched(&self) {
        match &self.old {
            Old::Missing => assert!(!self.disk().exists(), "the disk has its name"),
            Old::Bytes(old) => {
                assert!(
                    &contents(&self.disk()) == old,
                    "the disk is not what it was"
                );
            }
            Old::Length(len) => assert_eq!(crate::image::length(&self.disk()), *len),
        }
        self.assert_beside();
    }

    /// Claims that nothing beyond the first bytes of the disk was written, nor its length changed.
    ///
    /// # Panics
    /// When it was.
    pub fn assert_untouched_from(&self, start: u64) {
        let now = contents(&self.disk());
        let (now, old) = (&now[size_of(start)..], &self.old()[size_of(start)..]);
        assert!(now == old, "the disk was written beyond the session");
        self.assert_beside();
    }

    /// Claims that there is nothing in the directory but what was, and what an agent keeps for the
    /// next run.
    ///
    /// # Panics
    /// When there is.
    pub fn assert_beside(&self) {
        let found = fs::read(self.neighbour()).expect("the neighbour is there");
        assert!(found == neighbour(), "the neighbour was written");
        for entry in fs::read_dir(self.directory.path()).expect("an own directory") {
            let name = entry.expect("an own directory").file_name();
            let name = name.to_string_lossy();
            let known = ["disk", "disk2"].contains(&&*name) || name.starts_with(".disk.kc-");
            assert!(known, "{name} was made");
        }
    }
}

fn neighbour() -> Vec<u8> {
    vec![0x5e; 3 * size_of(BLOCK)]
}

/// The contents of a file as a copy should have them.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn contents(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn root(bytes: &[u8], params: &SessionParams) -> [u8; 16] {
    let digester = Digester::new(params.hash, params.seed);
    let mut hasher = RangeHasher::new(&digester, 0);
    for block in bytes.chunks(size_of(BLOCK)) {
        hasher.content(&digester.content(block));
    }
    let geometry = Geometry::new(params.size).expect("a size of a disk");
    disk_root(&digester, geometry, &[hasher.finish()]).0
}

/// A length of memory.
///
/// # Panics
/// When it is longer than any.
#[must_use]
pub fn size_of(len: u64) -> usize {
    usize::try_from(len).expect("a length of memory")
}
