//! The images: made from a rule, so that every run of the bench has the same ones.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::case::Case;
use crate::size::Size;

/// Bytes in a block: what blocksync compares.
pub(crate) const BLOCK: u64 = 64 * 1024;

/// [`BLOCK`] as a length of memory.
pub(crate) const BLOCK_LEN: usize = 64 * 1024;

/// Blocks in a run of data or of holes: 4 MiB, so that the tiny images of `--smoke` have some of
/// both.
const EXTENT_BLOCKS: u64 = 64;

/// The shape of the source.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    blocks: u64,
    data_share: f64,
}

impl Layout {
    /// An image of `size` bytes, of which `data_share` is data.
    pub(crate) fn new(size: Size, data_share: f64) -> Result<Self> {
        ensure!(
            size.0 >= BLOCK,
            "the image must hold at least one block of 64 KiB"
        );
        Ok(Self {
            blocks: size.0 / BLOCK,
            data_share,
        })
    }

    pub(crate) fn size(self) -> u64 {
        self.blocks * BLOCK
    }

    pub(crate) fn data_bytes(self) -> u64 {
        self.data_blocks().count() as u64 * BLOCK
    }

    /// Bytes of the blocks that a case has to ship.
    pub(crate) fn bytes_to_ship(self, case: Case) -> u64 {
        match case {
            Case::First => self.data_bytes(),
            Case::Changed(percent) => self.data_bytes() / BLOCK * u64::from(percent) / 100 * BLOCK,
        }
    }

    /// Writes the source.
    pub(crate) fn write_source(self, path: &Path) -> Result<()> {
        let blocks = self.data_blocks().map(|index| (index, Version::New));
        self.write(path, blocks)
    }

    /// Writes the older copy of the source that a destination holds before a run.
    pub(crate) fn write_old(self, path: &Path, case: Case) -> Result<()> {
        self.write(path, self.older(case))
    }

    /// Makes those blocks of the source that a case changes what they are in a version.
    pub(crate) fn change(self, path: &Path, case: Case, to: Version) -> Result<()> {
        let older = self.older(case);
        let changed = older.filter(|(_, version)| *version == Version::Old);
        let change = || {
            let file = File::options().write(true).open(path)?;
            write_blocks(&file, changed.map(|(index, _)| (index, to)))
        };
        change().with_context(|| format!("changing {}", path.display()))
    }

    /// All blocks of data, each in the version that the older copy has.
    fn older(self, case: Case) -> impl Iterator<Item = (u64, Version)> {
        let mut left = self.data_blocks().count() as u64;
        let mut wanted = self.bytes_to_ship(case) / BLOCK;
        let mut random = Random(0x5eed);
        self.data_blocks().map(move |index| {
            // Selection sampling: exactly `wanted` of the blocks, each as likely as any other.
            let take = random.next() % left < wanted;
            left -= 1;
            wanted -= u64::from(take);
            let version = if take { Version::Old } else { Version::New };
            (index, version)
        })
    }

    fn write(self, path: &Path, blocks: impl Iterator<Item = (u64, Version)>) -> Result<()> {
        let write = || {
            let file = File::create(path)?;
            file.set_len(self.size())?;
            write_blocks(&file, blocks)
        };
        write().with_context(|| format!("writing {}", path.display()))
    }

    /// The indices of the blocks that are data, spread in runs over the whole image.
    fn data_blocks(self) -> impl Iterator<Item = u64> {
        // Data where the share, summed up extent by extent, reaches the next whole number.
        let is_data = move |extent: &u64| {
            let extent = *extent as f64;
            ((extent + 1.0) * self.data_share).floor() > (extent * self.data_share).floor()
        };
        let extents = (0..self.blocks.div_ceil(EXTENT_BLOCKS)).filter(is_data);
        let blocks =
            extents.flat_map(|extent| extent * EXTENT_BLOCKS..(extent + 1) * EXTENT_BLOCKS);
        blocks.take_while(move |&block| block < self.blocks)
    }
}

/// Writes blocks, each as it is in a version, and syncs the file.
fn write_blocks(file: &File, blocks: impl Iterator<Item = (u64, Version)>) -> Result<()> {
    let mut block = vec![0; BLOCK_LEN];
    for (index, version) in blocks {
        fill(&mut block, index, version);
        file.write_all_at(&block, index * BLOCK)?;
    }
    Ok(file.sync_all()?)
}

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Old,
    New,
}

/// Bytes that no compressor makes smaller, another row of them for every block and version.
fn fill(block: &mut [u8], index: u64, version: Version) {
    let mut random = Random(index << 1 | version as u64);
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
}

/// Writes `len` bytes of the same kind as the data of an image, all in one piece.
pub(crate) fn write_payload(path: &Path, len: u64) -> Result<()> {
    let packed = Layout {
        blocks: len / BLOCK,
        data_share: 1.0,
    };
    packed.write_source(path)
}

/// SplitMix64: fast, and good enough that nothing compresses.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Reads the data of a file, leaving out holes, in pieces of at most 64 KiB: larger buffers leave
/// the processor's cache and are three times slower.
pub(crate) fn for_each_data(path: &Path, mut piece: impl FnMut(&[u8])) -> Result<()> {
    let mut read = || -> Result<()> {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; BLOCK_LEN];
        let mut at = 0;
        while let Some((start, end)) = next_data(&file, at)? {
            file.seek(SeekFrom::Start(start))?;
            let mut data = (&file).take(end - start);
            while let n @ 1.. = data.read(&mut buffer)? {
                piece(&buffer[..n]);
            }
            at = end;
        }
        Ok(())
    };
    read().with_context(|| format!("reading {}", path.display()))
}

/// First byte and end of the next extent of data.
fn next_data(file: impl AsFd, at: u64) -> Result<Option<(u64, u64)>> {
    let start = match lseek(&file, i64::try_from(at)?, Whence::SeekData) {
        Err(Errno::ENXIO) => return Ok(None),
        other => other?,
    };
    let end = lseek(&file, start, Whence::SeekHole)?;
    Ok(Some((u64::try_from(start)?, u64::try_from(end)?)))
}

/// Whether two files hold the same bytes. What is a hole in both is not read: of 16 TiB nobody
/// waits for the zeros.
pub(crate) fn equal(one: &Path, other: &Path) -> Result<bool> {
    let files = [File::open(one)?, File::open(other)?];
    let lengths = [files[0].metadata()?.len(), files[1].metadata()?.len()];
    if lengths[0] != lengths[1] {
        return Ok(false);
    }
    let mut at = 0;
    while let Some((start, end)) = next_data_of_either(&files, at)? {
        if !equal_between(&files, start, end)? {
            return Ok(false);
        }
        at = end;
    }
    Ok(true)
}

fn next_data_of_either(files: &[File; 2], at: u64) -> Result<Option<(u64, u64)>> {
    let [one, other] = [next_data(&files[0], at)?, next_data(&files[1], at)?];
    Ok(one.into_iter().chain(other).min())
}

fn equal_between(files: &[File; 2], start: u64, end: u64) -> Result<bool> {
    let mut buffers = [vec![0; BLOCK_LEN], vec![0; BLOCK_LEN]];
    let mut at = start;
    while at < end {
        let n = usize::try_from((end - at).min(BLOCK)).unwrap_or(BLOCK_LEN);
        for (file, buffer) in files.iter().zip(&mut buffers) {
            file.read_exact_at(&mut buffer[..n], at)?;
        }
        if buffers[0][..n] != buffers[1][..n] {
            return Ok(false);
        }
        at += n as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::new(Size::MIB * 32, 0.5).unwrap()
    }

    #[test]
    fn the_old_image_differs_in_exactly_the_blocks_that_the_case_says() {
        let dir = tempfile::tempdir().unwrap();
        let [source, old] = ["source", "old"].map(|name| dir.path().join(name));
        layout().write_source(&source).unwrap();
        for percent in [0, 1, 50, 100] {
            let case = Case::Changed(percent);
            layout().write_old(&old, case).unwrap();
            let [new, old] = [&source, &old].map(|path| std::fs::read(path).unwrap());
            let blocks = new.chunks(BLOCK_LEN).zip(old.chunks(BLOCK_LEN));
            let changed = blocks.filter(|(new, old)| new != old).count() as u64;
            assert_eq!(changed * BLOCK, layout().bytes_to_ship(case), "{percent}");
        }
    }

    #[test]
    fn a_source_can_become_what_it_was_and_what_it_is_again() {
        let dir = tempfile::tempdir().unwrap();
        let [source, other] = ["source", "other"].map(|name| dir.path().join(name));
        let case = Case::Changed(10);
        layout().write_source(&source).unwrap();
        layout().change(&source, case, Version::Old).unwrap();
        layout().write_old(&other, case).unwrap();
        assert!(equal(&source, &other).unwrap());
        layout().change(&source, case, Version::New).unwrap();
        layout().write_source(&other).unwrap();
        assert!(equal(&source, &other).unwrap());
    }

    #[test]
    fn half_of_the_image_is_holes_and_they_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        layout().write_source(&source).unwrap();
        assert_eq!(layout().data_bytes(), 16 << 20);
        let mut read = 0;
        for_each_data(&source, |piece| read += piece.len() as u64).unwrap();
        assert_eq!(read, 16 << 20);
    }

    #[test]
    fn one_byte_makes_a_difference() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        let mut bytes = vec![0; BLOCK_LEN + 1];
        std::fs::write(&one, &bytes).unwrap();
        std::fs::write(&other, &bytes).unwrap();
        assert!(equal(&one, &other).unwrap());
        bytes[BLOCK_LEN] = 1;
        std::fs::write(&other, &bytes).unwrap();
        assert!(!equal(&one, &other).unwrap());
        std::fs::write(&other, &bytes[..BLOCK_LEN]).unwrap();
        assert!(!equal(&one, &other).unwrap());
    }
    #[test]
    fn a_hole_equals_zeros_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let [hole, other] = ["hole", "other"].map(|name| dir.path().join(name));
        File::create(&hole).unwrap().set_len(4 * BLOCK).unwrap();
        let mut bytes = vec![0; 4 * BLOCK_LEN];
        std::fs::write(&other, &bytes).unwrap();
        assert!(equal(&hole, &other).unwrap());
        bytes[3 * BLOCK_LEN] = 1;
        std::fs::write(&other, &bytes).unwrap();
        assert!(!equal(&hole, &other).unwrap());
        assert!(!equal(&other, &hole).unwrap());
    }
}
