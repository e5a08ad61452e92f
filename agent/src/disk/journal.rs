//! The journal of a destination that exists, from the first change until the run is finished:
//! whose it is, how far the run has come, and, under `staged`, which blocks wait in the stage.
//!
//! ```text
//!  0          16 KiB      32 KiB                        + 32 for each block of the disk
//!  | header   | header   | block 0 | block 1 | …        sparse: a hole is "not staged"
//!
//!  block:  kind u8, 7 × 0 | XXH3-128 of the contents | checksum of all of it and the index, 8 bytes
//! ```
//!
//! An entry that is damaged counts as none: the block is then compared, and shipped, again. A
//! header that is damaged, or of another version, makes all of it useless, which costs shipping
//! and no more. The price of a fixed place for each block is a page of journal for a block that
//! changes alone; what it buys is that neither a resumed run nor applying needs a list in memory.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_clone_protocol::digest::DIGEST_LEN;
use kvm_clone_protocol::units::BlockRun;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde::{Deserialize, Serialize};

use super::file::DiskFile;
use super::names::{Names, remove, rename_over};
use super::slots::{Format, Slots, Unreadable, checksum};
use crate::failure::Failure;

const FORMAT: Format = Format {
    magic: *b"kc-jrnl\n",
    version: 2,
    // A path, twice over, with room.
    slot_len: 16 * 1024,
};

const ENTRY_LEN: usize = 32;

/// Entries that are read or written with one system call: a page's worth and a few.
const BATCH: usize = 1024;

/// How the changes get into the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Way {
    Inplace,
    Staged,
    Reflink,
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum State {
    /// Changes arrive.
    Open,
    /// All are there and durable.
    Prepared,
    /// They are being put where they belong, under the destination's own name, which cannot be
    /// taken away.
    Applying,
    /// They are in the destination, durably: only names are left to be put right.
    Applied,
}

/// A file or device as it was when a run began on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Base {
    pub(super) inode: u64,
    pub(super) size: u64,
    /// Seconds and nanoseconds; zero for a device, whose times say nothing.
    pub(super) modified: (i64, i64),
}

impl Base {
    pub(super) fn of(file: &DiskFile, is_device: bool, size: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(if is_device {
            Self {
                inode: 0,
                size,
                modified: (0, 0),
            }
        } else {
            Self {
                inode: metadata.ino(),
                size,
                modified: (metadata.mtime(), metadata.mtime_nsec()),
            }
        })
    }
}

/// What stands in the header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) way: Way,
    pub(super) state: State,
    /// The old version.
    pub(super) base: Base,
    /// Bytes of the new version, known once space is reserved for it, or it is prepared.
    pub(super) size: u64,
    /// In the old version there may be space for blocks that are holes.
    pub(super) reserved: bool,
    /// What is written must be read again past the page cache.
    pub(super) reread: bool,
    /// Staged entries, and a checksum over all of them, known once they are complete.
    pub(super) sum: Sum,
    /// The old version is itself a mixture, left by a run in place.
    pub(super) torn: bool,
    /// Where the stage is.
    #[serde(with = "super::names::path_bytes")]
    pub(super) stage: PathBuf,
}

/// All entries in one figure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sum {
    pub(super) entries: u64,
    pub(super) checksum: [u8; DIGEST_LEN],
}

/// What waits for one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing.
    None,
    /// It becomes zero.
    Zero,
    /// Its contents lie in the stage, and have this checksum.
    Data([u8; DIGEST_LEN]),
}

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: DiskFile,
    /// Changes only between sessions; entries need no lock.
    head: Mutex<(Slots, Header)>,
}

impl Journal {
    /// A new one, in place of what has its name: there is a whole one at every instant, so that
    /// what an earlier one said of a torn destination is never lost.
    pub(super) fn create(names: &Names, header: Header) -> io::Result<Self> {
        let (path, temporary) = (names.journal(), names.new_journal());
        remove(&temporary)?;
        let file = DiskFile::create(&temporary)?;
        let slots = Slots::create(&file, FORMAT, &header)?;
        rename_over(&temporary, &path)?;
        names.sync()?;
        Ok(Self {
            path,
            file,
            head: Mutex::new((slots, header)),
        })
    }

    /// The journal at `path`; `None` where there is none.
    pub(super) fn open(path: &Path) -> Result<Option<Self>, Unreadable> {
        let file = match DiskFile::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let (slots, header) = Slots::open(&file, FORMAT)?;
        Ok(Some(Self {
            path: path.to_owned(),
            file,
            head: Mutex::new((slots, header)),
        }))
    }

    /// What the header says.
    pub(super) fn header(&self) -> Header {
        self.head().1.clone()
    }

    /// Whether the changes that it speaks of wait where those for this destination do. Whoever may
    /// write beside a destination may write this file too, and name any other.
    pub(super) fn stages_for(&self, names: &Names) -> bool {
        let stage = self.header().stage;
        stage.as_os_str().is_empty() || names.may_stage_at(&stage)
    }

    /// Changes the header, durably.
    pub(super) fn update(&self, change: impl FnOnce(&mut Header)) -> io::Result<()> {
        let (slots, header) = &mut *self.head();
        let mut changed = header.clone();
        change(&mut changed);
        slots.write(&self.file, &changed)?;
        *header = changed;
        Ok(())
    }

    fn head(&self) -> MutexGuard<'_, (Slots, Header)> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`DiskFile::is_doubtful`].
    pub(super) fn is_doubtful(&self) -> bool {
        self.file.is_doubtful()
    }

    /// Makes the entries durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    /// What waits for each block of a run.
    pub(super) fn entries(&self, run: BlockRun) -> io::Result<Vec<Entry>> {
        let len = usize::try_from(run.count).expect("a window or a batch") * ENTRY_LEN;
        let mut bytes = vec![0; len];
        // Past the end there are none, and the rest stays zero.
        self.file.read_full_at(&mut bytes, place(run.first))?;
        let entries = bytes.chunks_exact(ENTRY_LEN);
        Ok((run.first..)
            .zip(entries)
            .map(|(index, bytes)| Entry::decode(index, bytes))
            .collect())
    }

    /// Notes what waits for consecutive blocks.
    pub(super) fn note(&self, first: u64, entries: &[Entry]) -> io::Result<()> {
        let bytes: Vec<u8> = (first..)
            .zip(entries)
            .flat_map(|(index, entry)| entry.encode(index))
            .collect();
        self.file.write_all_at(&bytes, place(first))
    }

    /// Notes that the blocks of a run become zero.
    pub(super) fn note_zeros(&self, run: BlockRun) -> io::Result<()> {
        let zeros = [Entry::Zero; BATCH];
        let mut at = run.first;
        while at < run.end() {
            let count = BATCH.min(usize::try_from(run.end() - at).unwrap_or(BATCH));
            self.note(at, &zeros[..count])?;
            at += count as u64;
        }
        Ok(())
    }

    /// Calls `each` for every block for which something waits, in their order.
    ///
    /// # Errors
    /// That of `each`, or of reading the journal.
    pub(super) fn for_each(
        &self,
        mut each: impl FnMut(u64, Entry) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::io("reading", &self.path, &error);
        let mut at = 0;
        while let Some(run) = self.noted(at).map_err(failed)? {
            let mut first = run.first;
            while first < run.end() {
                let count = (run.end() - first).min(BATCH as u64);
                let entries = self.entries(BlockRun { first, count }).map_err(failed)?;
                for (index, entry) in (first..).zip(entries) {
                    if entry != Entry::None {
                        each(index, entry)?;
                    }
                }
                first += count;
            }
            at = run.end();
        }
        Ok(())
    }

    /// The first run of blocks from `at` on for which something may be noted.
    pub(super) fn noted(&self, at: u64) -> io::Result<Option<BlockRun>> {
        let seek = |offset: u64, whence| -> nix::Result<u64> {
            let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
            let found = lseek(&self.file, offset, whence)?;
            u64::try_from(found).map_err(|_| Errno::EOVERFLOW)
        };
        let start = match seek(place(at), Whence::SeekData) {
            Ok(start) => start.max(place(at)),
            Err(Errno::ENXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = seek(start, Whence::SeekHole)?;
        let first = (start - place(0)) / ENTRY_LEN as u64;
        let last = (end - place(0)).div_ceil(ENTRY_LEN as u64);
        Ok(Some(BlockRun {
            first,
            count: last - first,
        }))
    }

    /// The figure of all entries as they are now.
    pub(super) fn sum(&self) -> Result<Sum, Failure> {
        let mut sum = Sum::default();
        self.for_each(|index, entry| {
            sum.entries += 1;
            // A chain, so that order and place count.
            let link = [&sum.checksum[..], &entry.encode(index)].concat();
            sum.checksum = checksum(&link);
            Ok(())
        })?;
        Ok(sum)
    }
}

/// Where the entry of a block is. Blocks are fewer than 2^46, so this does not overflow.
fn place(index: u64) -> u64 {
    Slots::len(FORMAT) + index * ENTRY_LEN as u64
}

impl Entry {
    /// What waits is these contents.
    pub(super) fn of(block: &[u8]) -> Self {
        Self::Data(checksum(block))
    }

    fn encode(self, index: u64) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        match self {
            Self::None => return bytes,
            Self::Zero => bytes[0] = 1,
            Self::Data(sum) => {
                bytes[0] = 2;
                bytes[8..24].copy_from_slice(&sum);
            }
        }
        let check = Self::check(index, &bytes);
        bytes[24..].copy_from_slice(&check);
        bytes
    }

    fn decode(index: u64, bytes: &[u8]) -> Self {
        if bytes[24..] != Self::check(index, bytes) {
            return Self::None;
        }
        match bytes[0] {
            1 => Self::Zero,
            2 => Self::Data(bytes[8..24].try_into().expect("sixteen bytes")),
            _ => Self::None,
        }
    }

    fn check(index: u64, bytes: &[u8]) -> [u8; 8] {
        let sum = checksum(&[&index.to_le_bytes()[..], &bytes[..24]].concat());
        sum[..8].try_into().expect("eight of sixteen bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            way: Way::Staged,
            state: State::Open,
            base: Base {
                inode: 7,
                size: 1 << 20,
                modified: (1, 2),
            },
            size: 0,
            reserved: false,
            reread: false,
            sum: Sum::default(),
            torn: false,
            stage: "/d/.disk.kc-stage".into(),
        }
    }

    #[test]
    fn what_was_noted_is_found_again_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let names = Names::of_file(&directory.path().join("disk")).unwrap();
        let path = names.journal();
        assert!(Journal::open(&path).unwrap().is_none());
        let journal = Journal::create(&names, header()).unwrap();
        let data = Entry::of(b"contents");
        journal.note(1 << 30, &[data]).unwrap();
        journal
            .note_zeros(BlockRun {
                first: 3000,
                count: 1500,
            })
            .unwrap();
        journal.note(3001, &[data, Entry::None]).unwrap();
        let sum = journal.sum().unwrap();
        drop(journal);
        let journal = Journal::open(&path).unwrap().unwrap();
        assert_eq!(journal.header(), header());
        let mut found = Vec::new();
        journal
            .for_each(|index, entry| {
                found.push((index, entry));
                Ok(())
            })
            .unwrap();
        assert_eq!(found.len(), 1500);
        assert_eq!(
            found[..3],
            [(3000, Entry::Zero), (3001, data), (3003, Entry::Zero)]
        );
        assert_eq!(found.last(), Some(&(1 << 30, data)));
        assert_eq!(journal.sum().unwrap(), sum);
        assert_eq!(sum.entries, 1500);
    }

    #[test]
    fn a_damaged_entry_is_none_and_shows_in_the_sum() {
        let directory = tempfile::tempdir().unwrap();
        let names = Names::of_file(&directory.path().join("disk")).unwrap();
        let journal = Journal::create(&names, header()).unwrap();
        journal.note(5, &[Entry::of(b"x"), Entry::Zero]).unwrap();
        let sum = journal.sum().unwrap();
        journal.file.write_all_at(b"!", place(5) + 9).unwrap();
        let run = BlockRun { first: 5, count: 2 };
        assert_eq!(journal.entries(run).unwrap(), [Entry::None, Entry::Zero]);
        assert_ne!(journal.sum().unwrap(), sum);
        // An entry that was copied to the place of another block is damaged as well.
        let mut bytes = [0; ENTRY_LEN];
        journal.file.read_full_at(&mut bytes, place(6)).unwrap();
        journal.file.write_all_at(&bytes, place(7)).unwrap();
        let run = BlockRun { first: 7, count: 1 };
        assert_eq!(journal.entries(run).unwrap(), [Entry::None]);
    }
}
