//! Disk images: made of pieces, compared, counted.
//!
//! Contents come from a seed, so that a test that fails can be run again with the same bytes.
//! Comparing and counting walk the data of both sides only (`SEEK_DATA`), so a sparse file of
//! 4 TiB takes milliseconds.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::LazyLock;

use crate::process::tool;

mod difference;

pub use difference::{
    Difference, allocated, assert_equal, assert_same_start, data_bytes, difference, evict, length,
    nonzero_bytes,
};

/// The block of the protocol: what `blocks_*` count.
pub const BLOCK: u64 = 64 << 10;
/// What a file system can leave out: the unit in which holes are counted.
pub const PAGE: u64 = 4 << 10;
pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// A stretch of an image.
#[derive(Debug, Clone, Copy)]
pub enum Piece {
    /// Bytes that do not compress, from this seed.
    Random(u64, u64),
    /// Zeros that are written, and take space.
    Zeros(u64),
    /// Zeros that are not written.
    Hole(u64),
    /// One byte.
    Byte(u8),
}

impl Piece {
    fn len(self) -> u64 {
        match self {
            Self::Random(_, len) | Self::Zeros(len) | Self::Hole(len) => len,
            Self::Byte(_) => 1,
        }
    }
}

/// Makes the file, or makes it anew, from pieces in order.
///
/// # Panics
/// When the file system refuses.
pub fn write(path: &Path, pieces: &[Piece]) {
    let file = create(path);
    file.set_len(pieces.iter().map(|piece| piece.len()).sum())
        .expect("an image gets its size");
    fill(&file, pieces);
    // Two hosts share this kernel's cache, but st_blocks is only right once data is allocated.
    file.sync_all().expect("an image is synced");
}

/// Writes pieces onto a file or device that exists; a hole leaves what is there.
///
/// # Panics
/// When the file system refuses.
pub fn overwrite(path: &Path, pieces: &[Piece]) {
    let file = open_write(path);
    fill(&file, pieces);
    file.sync_all().expect("an image is synced");
}

/// A digest of all that a file holds.
#[must_use]
pub fn digest(path: &Path) -> String {
    tool("md5sum", [path])[..32].to_owned()
}

fn fill(file: &File, pieces: &[Piece]) {
    let mut offset = 0;
    for piece in pieces {
        match *piece {
            Piece::Random(seed, len) => write_random(file, offset, len, seed),
            Piece::Zeros(len) => each_buffer(offset, len, |at, len| put(file, &vec![0; len], at)),
            Piece::Hole(_) => {}
            Piece::Byte(byte) => put(file, &[byte], offset),
        }
        offset += piece.len();
    }
}

fn create(path: &Path) -> File {
    File::create(path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()))
}

fn open_write(path: &Path) -> File {
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()))
}

fn open_read(path: &Path) -> File {
    File::open(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn put(file: &File, bytes: &[u8], offset: u64) {
    file.write_all_at(bytes, offset)
        .unwrap_or_else(|error| panic!("byte {offset}: {error}"));
}

fn size_of(len: u64) -> usize {
    usize::try_from(len).expect("a buffer fits the memory")
}

/// Calls with consecutive stretches of at most 1 MiB.
fn each_buffer(start: u64, len: u64, mut each: impl FnMut(u64, usize)) {
    let mut done = 0;
    while done < len {
        let step = MIB.min(len - done);
        each(start + done, size_of(step));
        done += step;
    }
}

/// A small generator (SplitMix64): quick, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(size_of(len) + 7);
        while bytes.len() < size_of(len) {
            bytes.extend_from_slice(&self.draw().to_le_bytes());
        }
        bytes.truncate(size_of(len));
        bytes
    }
}

/// Writes bytes that do not compress and that differ from block to block. A longer piece of the
/// same seed starts with the shorter one.
///
/// Drawing every byte is slow in a build for debugging, so blocks are cut from one table of random
/// bytes at random places, and the start of each is drawn afresh.
fn write_random(file: &File, start: u64, len: u64, seed: u64) {
    static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| Random::new(0).bytes(2 * BLOCK));
    let mut random = Random::new(seed);
    each_buffer(start, len, |at, len| {
        let mut buffer = Vec::with_capacity(len);
        while buffer.len() < len {
            let step = (len - buffer.len()).min(size_of(BLOCK));
            let place = size_of(random.below(BLOCK));
            let fresh = random.draw().to_le_bytes();
            buffer.extend_from_slice(&fresh[..step.min(8)]);
            buffer.extend_from_slice(&TABLE[place..place + step.saturating_sub(8)]);
        }
        put(file, &buffer, at);
    });
}

/// Overwrites one in `one_in` of the blocks, spread evenly, with other bytes. Gives the bytes of
/// the blocks that it changed.
///
/// # Panics
/// When the file system refuses.
pub fn change_blocks(path: &Path, one_in: u64, seed: u64) -> u64 {
    let file = open_write(path);
    let blocks = length(path) / BLOCK;
    let mut random = Random::new(seed);
    let mut changed = 0;
    for first in (0..blocks).step_by(size_of(one_in)) {
        let block = first + random.below(one_in.min(blocks - first));
        put(
            &file,
            &random.draw().to_le_bytes(),
            block * BLOCK + random.below(BLOCK - 8),
        );
        changed += BLOCK;
    }
    file.sync_all().expect("an image is synced");
    changed
}

#[cfg(test)]
mod tests {
    use super::difference::is_zero;
    use super::*;

    fn file(directory: &tempfile::TempDir, name: &str, pieces: &[Piece]) -> std::path::PathBuf {
        let path = directory.path().join(name);
        write(&path, pieces);
        path
    }

    #[test]
    fn an_image_is_what_its_pieces_say() {
        let directory = tempfile::tempdir().unwrap();
        let pieces = [
            Piece::Hole(BLOCK),
            Piece::Random(1, BLOCK),
            Piece::Zeros(5),
            Piece::Byte(7),
        ];
        let path = file(&directory, "a", &pieces);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, 2 * BLOCK + 6);
        assert!(is_zero(&bytes[..size_of(BLOCK)]));
        assert_eq!(bytes[size_of(2 * BLOCK)..], [0, 0, 0, 0, 0, 7]);
        assert_eq!(nonzero_bytes(&path), BLOCK + PAGE);
        assert!(data_bytes(&path) < 2 * BLOCK);
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_another_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let one = file(&directory, "one", &[Piece::Random(1, 3 * BLOCK + 5)]);
        let same = file(&directory, "same", &[Piece::Random(1, 3 * BLOCK + 5)]);
        let other = file(&directory, "other", &[Piece::Random(2, 3 * BLOCK + 5)]);
        assert_equal(&one, &same);
        let shorter = file(&directory, "shorter", &[Piece::Random(1, 5000)]);
        assert_same_start(&shorter, &one);
        assert_eq!(difference(&one, &other).changed, 4);
    }

    #[test]
    fn a_difference_counts_blocks_and_finds_the_first_byte() {
        let directory = tempfile::tempdir().unwrap();
        let source = file(
            &directory,
            "s",
            &[Piece::Random(3, 2 * BLOCK), Piece::Hole(BLOCK)],
        );
        let to = file(
            &directory,
            "d",
            &[Piece::Random(3, BLOCK), Piece::Hole(BLOCK), Piece::Byte(1)],
        );
        let found = difference(&source, &to);
        let expected = Difference {
            changed: 1,
            zeroed: 1,
            total: 3,
            bytes: 2 * BLOCK,
            first: Some(BLOCK),
        };
        assert_eq!(found, expected);
        assert_eq!(difference(&source, Path::new("/no/such/file")).changed, 2);
    }

    #[test]
    fn one_block_in_a_hundred_is_changed() {
        let directory = tempfile::tempdir().unwrap();
        let source = file(&directory, "s", &[Piece::Random(3, 200 * BLOCK)]);
        let before = file(&directory, "d", &[Piece::Random(3, 200 * BLOCK)]);
        assert_eq!(change_blocks(&source, 100, 9), 2 * BLOCK);
        assert_eq!(difference(&source, &before).changed, 2);
    }
}
