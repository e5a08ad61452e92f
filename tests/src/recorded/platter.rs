//! What is on a disk, and what may be on it after a power cut.
//!
//! A sector is the unit that a disk writes wholly or not at all. Whatever of the writes since the
//! last flush survives, a sector holds what was flushed or one of the versions written since:
//! which one, and which other sectors are as old, a disk does not say.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use super::log::{Entry, Log};
use crate::image::{self, Random};

/// The least that the file systems of a campaign write, and what a disk writes at once.
const SECTOR: u64 = ZEROS.len() as u64;
const ZEROS: [u8; 4 << 10] = [0; 4 << 10];

/// The bytes of a sector; `None` where it reads as zeros.
type Contents = Option<Arc<[u8]>>;

/// A write that no flush has covered yet.
type Volatile = Vec<(u64, Contents)>;

/// A power cut: when, and what survives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// From which everything is drawn.
    pub(super) seed: u64,
    /// How many entries of the log had ended.
    pub(super) at: usize,
}

impl Cut {
    /// A cut somewhere in a log of so many entries.
    #[must_use]
    pub(super) fn draw(seed: u64, entries: usize) -> Self {
        let at = Random::new(seed).below(entries as u64 + 1);
        let at = usize::try_from(at).expect("it is no more than the entries");
        Self { seed, at }
    }
}

/// A disk with a volatile cache, at some place of its log.
#[derive(Debug, Clone)]
pub(super) struct Platter {
    size: u64,
    durable: BTreeMap<u64, Arc<[u8]>>,
    volatile: Vec<Volatile>,
    at: usize,
}

impl Platter {
    /// A disk that holds what an image holds.
    ///
    /// # Panics
    /// When the image cannot be read.
    #[must_use]
    pub(super) fn of_image(path: &Path) -> Self {
        let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let size = image::length(path);
        let mut bytes = ZEROS;
        let mut durable = BTreeMap::new();
        for sector in 0..size / SECTOR {
            let read = file.read_exact_at(&mut bytes, sector * SECTOR);
            read.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            if let Some(bytes) = contents(&bytes) {
                durable.insert(sector, bytes);
            }
        }
        Self {
            size,
            durable,
            volatile: Vec::new(),
            at: 0,
        }
    }

    /// Goes on in the log to the moment of a cut.
    ///
    /// # Panics
    /// When that is before an earlier one.
    pub(super) fn advance(&mut self, log: &Log, to: Cut) {
        for entry in &log.entries()[self.at..to.at] {
            match entry {
                Entry::Flush => self.flush(),
                Entry::Discard { offset, len } => {
                    self.volatile.push(sectors(*offset, *len, |_| None));
                }
                Entry::Write {
                    offset,
                    data,
                    is_forced,
                } => {
                    let data = log.data(data);
                    let write = sectors(*offset, data.len() as u64, |at| contents(&data[at..]));
                    if *is_forced {
                        self.force(&write);
                    } else {
                        self.volatile.push(write);
                    }
                }
            }
        }
        self.at = to.at;
    }

    fn flush(&mut self) {
        for (sector, contents) in std::mem::take(&mut self.volatile).into_iter().flatten() {
            put(&mut self.durable, sector, contents);
        }
    }

    /// What was written before to the same sectors is older, and cannot come after it.
    fn force(&mut self, write: &Volatile) {
        for earlier in &mut self.volatile {
            earlier.retain(|(sector, _)| write.iter().all(|(forced, _)| forced != sector));
        }
        for (sector, contents) in write {
            put(&mut self.durable, *sector, contents.clone());
        }
    }

    /// Claims that the whole log leads from here to what an image holds: nothing is missing in it.
    ///
    /// # Panics
    /// When it does not.
    pub(super) fn assert_leads_to(&self, log: &Log, image: &Path) {
        let mut end = self.clone();
        let at = log.entries().len();
        end.advance(log, Cut { seed: 0, at });
        end.flush();
        let found = Self::of_image(image).durable;
        let all = end.durable.keys().chain(found.keys());
        let differs = all
            .copied()
            .filter(|sector| end.durable.get(sector) != found.get(sector));
        let differ: Vec<_> = differs.collect();
        assert!(differ.is_empty(), "not as recorded: the sectors {differ:?}");
    }

    /// What the cut leaves of the writes that no flush has covered.
    ///
    /// How many survive is drawn once, from none to all, so that a single one that is missing, or
    /// that is there alone, is no rarity. They arrive in any order, and a quarter of them is torn.
    fn survivors(&self, cut: Cut) -> BTreeMap<u64, Contents> {
        const EIGHTHS: u64 = 8;
        let mut random = Random::new(cut.seed);
        // The first draw was the place of the cut.
        random.draw();
        let odds = random.below(EIGHTHS + 1);
        let mut order: Vec<_> = self.volatile.iter().collect();
        for i in (1..order.len()).rev() {
            let other = random.below(i as u64 + 1);
            order.swap(i, usize::try_from(other).expect("it is below an index"));
        }
        let mut survivors = BTreeMap::new();
        for write in order {
            if random.below(EIGHTHS) >= odds {
                continue;
            }
            let is_torn = random.below(4) == 0;
            for (sector, contents) in write {
                if !is_torn || random.below(2) == 0 {
                    survivors.insert(*sector, contents.clone());
                }
            }
        }
        survivors
    }

    /// Makes a file hold what the disk holds after the cut.
    ///
    /// # Panics
    /// When the platter is not at the moment of the cut, or the file cannot be written.
    pub(super) fn materialise(&self, cut: Cut, path: &Path) {
        assert_eq!(self.at, cut.at, "the platter was brought to this moment");
        let survivors = self.survivors(cut);
        // Another file: a loop device for the one before may still hold what it has read.
        let _ = std::fs::remove_file(path);
        let file = File::create_new(path).expect("the laboratory's directory is writable");
        file.set_len(self.size)
            .expect("a sparse file takes no room");
        let kept = self.durable.iter();
        let kept = kept.filter(|(sector, _)| !survivors.contains_key(sector));
        let survived = survivors.iter();
        let survived = survived.filter_map(|(sector, bytes)| Some((sector, bytes.as_ref()?)));
        for (sector, bytes) in kept.chain(survived) {
            let written = file.write_all_at(bytes, sector * SECTOR);
            written.expect("the laboratory has room for an image");
        }
    }
}

/// The sectors that begin in a range, with what each gets from the place in the range.
///
/// # Panics
/// When the range does not consist of whole sectors.
fn sectors(offset: u64, len: u64, contents: impl Fn(usize) -> Contents) -> Volatile {
    assert_eq!((offset % SECTOR, len % SECTOR), (0, 0), "{offset} + {len}");
    let place = |sector| usize::try_from(sector * SECTOR - offset).expect("a place in a buffer");
    let range = offset / SECTOR..(offset + len) / SECTOR;
    range
        .map(|sector| (sector, contents(place(sector))))
        .collect()
}

/// The first sector of some bytes.
fn contents(bytes: &[u8]) -> Contents {
    let bytes = &bytes[..ZEROS.len()];
    (bytes != ZEROS).then(|| bytes.into())
}

fn put(sectors: &mut BTreeMap<u64, Arc<[u8]>>, sector: u64, contents: Contents) {
    match contents {
        Some(bytes) => sectors.insert(sector, bytes),
        None => sectors.remove(&sector),
    };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn sector(byte: u8) -> Vec<u8> {
        vec![byte; ZEROS.len()]
    }

    /// All that a disk of four sectors, first `9 0 0 0`, may hold after a cut at the log's end:
    /// the first byte of each sector.
    fn possible(tell: impl FnOnce(&mut Log)) -> BTreeSet<[u8; 4]> {
        let directory = tempfile::tempdir().unwrap();
        let (before, after) = (
            directory.path().join("before"),
            directory.path().join("after"),
        );
        std::fs::write(
            &before,
            [sector(9), sector(0), sector(0), sector(0)].concat(),
        )
        .unwrap();
        let mut log = Log::new();
        tell(&mut log);
        let mut platter = Platter::of_image(&before);
        let at = log.entries().len();
        platter.advance(&log, Cut { seed: 0, at });
        let hold = |seed| {
            platter.materialise(Cut { seed, at }, &after);
            let bytes = std::fs::read(&after).unwrap();
            [0, 1, 2, 3].map(|sector| bytes[sector * ZEROS.len()])
        };
        (0..400).map(hold).collect()
    }

    #[test]
    fn what_was_flushed_is_there_and_the_rest_may_be() {
        let held = possible(|log| {
            log.write(0, &sector(1));
            log.flush();
            log.write(4096, &sector(2));
            log.write(8192, &sector(3));
        });
        let expected = [[1, 0, 0, 0], [1, 2, 0, 0], [1, 0, 3, 0], [1, 2, 3, 0]];
        assert_eq!(held, expected.into());
    }

    #[test]
    fn a_sector_holds_any_version_since_the_flush() {
        let held = possible(|log| {
            log.write(0, &sector(1));
            log.write(0, &sector(2));
        });
        assert_eq!(held, [[9, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]].into());
    }

    #[test]
    fn a_long_write_is_torn_at_sectors() {
        let held = possible(|log| log.write(0, &[sector(1), sector(2), sector(3)].concat()));
        assert_eq!(held.len(), 8, "{held:?}");
    }

    #[test]
    fn a_forced_write_is_there_and_brings_no_other_along() {
        let held = possible(|log| {
            log.write(0, &[sector(1), sector(2)].concat());
            log.force(0, &sector(3));
        });
        assert_eq!(held, [[3, 0, 0, 0], [3, 2, 0, 0]].into());
    }

    #[test]
    fn a_discard_may_be_lost_as_well() {
        let held = possible(|log| log.discard(0, SECTOR));
        assert_eq!(held, [[9, 0, 0, 0], [0, 0, 0, 0]].into());
    }

    #[test]
    fn a_cut_is_drawn_anywhere_and_the_same_for_a_seed() {
        let places: BTreeSet<_> = (0..200).map(|seed| Cut::draw(seed, 3).at).collect();
        assert_eq!(places, [0, 1, 2, 3].into());
        assert_eq!(Cut::draw(7, 1000), Cut::draw(7, 1000));
    }
}
