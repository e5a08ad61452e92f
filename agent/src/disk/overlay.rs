//! Changes that wait beside a destination under `staged`: the stage holds the bytes of changed
//! blocks, each at its own place in a sparse file, and the journal says which of them count.
//!
//! A session reads and writes through it: a block that waits is read from the stage, so that a
//! run that takes an earlier one up sees what has arrived as if it were in place, and does not ask
//! for it again. The stage is written before its entry, and each entry has a checksum of the
//! contents, so whatever a crash leaves of them, a block is there whole or not at all.

use std::sync::Arc;

use kvm_clone_protocol::message::FailureCode;
use kvm_clone_protocol::sync::{MAP_RUNS, MapRun, RunKind};
use kvm_clone_protocol::units::{BLOCK_SIZE, BlockRun, Geometry};
use nix::fcntl::FallocateFlags;
use nix::sys::statfs::fstatfs;

use super::image::Image;
use super::journal::{Entry, Journal, Sum};
use super::map::Map;
use super::read::Missing;
use super::reflink::own_places;
use super::throttle::admit;
use super::write::{keep_size, punch};
use crate::failure::Failure;

/// File systems that write a block elsewhere than where it was, so that space for it cannot be
/// reserved in place: btrfs, ZFS and bcachefs, by the magic numbers of statfs.
const COPY_ON_WRITE: [i64; 3] = [0x9123_683e, 0x2fc1_2fc1, 0xca45_1a4e];

/// What waits for one destination.
#[derive(Debug)]
pub(crate) struct Overlay {
    stage: Image,
    pub(super) journal: Arc<Journal>,
    /// An earlier run noted entries, so they must be looked at.
    earlier: bool,
}

impl Overlay {
    pub(super) fn new(stage: Image, journal: Arc<Journal>, earlier: bool) -> Self {
        Self {
            stage,
            journal,
            earlier,
        }
    }

    pub(super) fn stage(&self) -> &Image {
        &self.stage
    }

    /// Puts a block among those that wait.
    pub(super) fn put(&self, index: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.stage.write_block(index * BLOCK_SIZE, bytes)?;
        self.journal
            .note(index, &[Entry::of(bytes)])
            .map_err(|error| self.failed("writing the journal of", &error))
    }

    /// Notes that blocks become zero.
    pub(super) fn zero(&self, run: BlockRun, geometry: Geometry) -> Result<(), Failure> {
        self.journal
            .note_zeros(run)
            .map_err(|error| self.failed("writing the journal of", &error))?;
        if self.earlier {
            // What an earlier run put there is of no use any more.
            self.stage.trim(run, geometry);
        }
        Ok(())
    }

    /// What an earlier run, or this one, has noted for a run of blocks; `None` when nothing can
    /// have been noted for blocks that are read.
    pub(super) fn waiting(&self, run: BlockRun) -> Result<Option<Vec<Entry>>, Failure> {
        if !self.earlier {
            return Ok(None);
        }
        self.entries(run).map(Some)
    }

    /// What is noted for a run of blocks.
    pub(super) fn entries(&self, run: BlockRun) -> Result<Vec<Entry>, Failure> {
        self.journal
            .entries(run)
            .map_err(|error| self.failed("reading the journal of", &error))
    }

    /// Puts what waits for a block into `block`. False when nothing does, or when it is not what
    /// was noted: then that is forgotten, and `block` holds anything.
    pub(super) fn replace(
        &self,
        index: u64,
        entry: Entry,
        block: &mut [u8],
    ) -> Result<bool, Failure> {
        match entry {
            Entry::None => return Ok(false),
            Entry::Zero => {
                block.fill(0);
                return Ok(true);
            }
            Entry::Data(_) => {}
        }
        admit(1);
        self.stage
            .read_block(block, index * BLOCK_SIZE, Missing::Zeros)?;
        if Entry::of(block) == entry {
            return Ok(true);
        }
        self.journal
            .note(index, &[Entry::None])
            .map_err(|error| self.failed("writing the journal of", &error))?;
        Ok(false)
    }

    /// Adds to a map of the destination, from block `from` on, what earlier runs have noted.
    pub(super) fn add_to(&self, map: Map, from: u64) -> Result<Map, Failure> {
        if self.earlier {
            self.add_all_to(map, from)
        } else {
            Ok(map)
        }
    }

    /// Adds to a map of the destination, from block `from` on, all that is noted.
    pub(super) fn add_all_to(&self, map: Map, from: u64) -> Result<Map, Failure> {
        let mut all = Map {
            data_bytes: map.data_bytes,
            ..Map::default()
        };
        let mut at = from;
        for run in map.runs {
            let end = at + run.count;
            while at < end {
                if all.runs.len() + 2 > MAP_RUNS {
                    return Ok(all);
                }
                let MapRun { kind, count } = self.next_run(at, end, run.kind)?;
                all.push(kind, count);
                at += count;
            }
        }
        Ok(all)
    }

    /// The longest run from `at` on, up to `end`, that is of one kind; without anything noted that
    /// would be `kind`.
    fn next_run(&self, at: u64, end: u64, kind: RunKind) -> Result<MapRun, Failure> {
        let whole = MapRun {
            kind,
            count: end - at,
        };
        if kind == RunKind::Data {
            return Ok(whole);
        }
        let noted = self
            .journal
            .noted(at)
            .map_err(|error| self.failed("reading the journal of", &error))?;
        Ok(match noted {
            Some(noted) if noted.first <= at => MapRun {
                kind: RunKind::Data,
                count: noted.end().min(end) - at,
            },
            Some(noted) => MapRun {
                kind,
                count: noted.first.min(end) - at,
            },
            None => whole,
        })
    }

    /// Makes everything that waits durable, and gives the figure of it.
    pub(super) fn sync(&self) -> Result<Sum, Failure> {
        self.stage
            .file
            .sync()
            .map_err(|error| self.failed("syncing what waits for", &error))?;
        self.journal
            .sync()
            .map_err(|error| self.failed("syncing the journal of", &error))?;
        self.journal.sum()
    }

    /// Reserves in `base` the space that applying will need: for blocks that are holes there, and
    /// for those that are shared with another file. The others are not touched: where there are
    /// only such, whoever is killed meanwhile leaves the old version with its time.
    pub(super) fn reserve(&self, base: &Image, geometry: Geometry) -> Result<(), Failure> {
        if base.is_device {
            return Ok(());
        }
        check_reservable(base)?;
        let opened = base.metadata()?;
        let mut places = OwnPlaces::of(base, geometry);
        let mut is_touched = false;
        let done = self.journal.for_each(|index, entry| {
            if !matches!(entry, Entry::Data(_)) || places.has(index) {
                return Ok(());
            }
            let run = BlockRun {
                first: index,
                count: 1,
            };
            let (offset, len) = geometry.byte_range(run);
            let unshare = FallocateFlags::FALLOC_FL_UNSHARE_RANGE | keep_size();
            is_touched = true;
            // Plain allocation where the file system shares no blocks.
            let reserved = match base.file.allocate(unshare, offset, len) {
                Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::EINVAL) => {
                    base.file.allocate(keep_size(), offset, len)
                }
                result => result,
            };
            match reserved {
                Ok(()) => Ok(()),
                // Without a way to promise space only what occupies some already is safe.
                Err(nix::errno::Errno::EOPNOTSUPP) if !base.is_hole(run, geometry)? => Ok(()),
                Err(error) => Err(base.failed_at("reserving space in", offset, &error.into())),
            }
        });
        // The old version is as it was, and keeps the time at which it was written.
        if is_touched {
            restore_times(base, &opened)?;
        }
        done
    }

    /// Puts all that waits into `base`, and makes that durable. Doing it again changes nothing.
    pub(super) fn apply(&self, base: &Image, geometry: Geometry) -> Result<(), Failure> {
        let journal = &self.journal;
        if journal.sum()? != journal.header().sum {
            let message = format!(
                "the journal of {} is damaged: what waits cannot be applied",
                base.path.display()
            );
            return Err(Failure::new(FailureCode::Io, message));
        }
        base.grow(geometry)?;
        let mut block = vec![0; usize::try_from(BLOCK_SIZE).expect("a block")];
        let mut zeros: Option<BlockRun> = None;
        journal.for_each(|index, entry| {
            match (&mut zeros, entry) {
                (Some(run), Entry::Zero) if run.end() == index => {
                    run.count += 1;
                    return Ok(());
                }
                (zeros, _) => {
                    if let Some(run) = zeros.take() {
                        base.zero(run, geometry)?;
                    }
                }
            }
            if entry == Entry::Zero {
                zeros = Some(BlockRun {
                    first: index,
                    count: 1,
                });
                return Ok(());
            }
            let block = &mut block[..geometry.block_len(index)];
            self.stage
                .read_block(block, index * BLOCK_SIZE, Missing::Zeros)?;
            if Entry::of(block) != entry {
                let message = format!(
                    "block {index} of the changes that wait for {} is damaged",
                    base.path.display()
                );
                return Err(Failure::new(FailureCode::Io, message));
            }
            base.write_block(index * BLOCK_SIZE, block)
        })?;
        if let Some(run) = zeros {
            base.zero(run, geometry)?;
        }
        base.finish(geometry)
    }

    fn failed(&self, doing: &str, error: &std::io::Error) -> Failure {
        self.stage.failed(doing, error)
    }
}

/// Which blocks of a file have a place of their own, looked up for many at a time.
struct OwnPlaces<'a> {
    image: &'a Image,
    geometry: Geometry,
    run: BlockRun,
    has: Vec<bool>,
}

impl<'a> OwnPlaces<'a> {
    /// Blocks that are looked up at once.
    const LOOKED_UP: u64 = 256;

    fn of(image: &'a Image, geometry: Geometry) -> Self {
        Self {
            image,
            geometry,
            run: BlockRun { first: 0, count: 0 },
            has: Vec::new(),
        }
    }

    fn has(&mut self, index: u64) -> bool {
        if index < self.run.first || index >= self.run.end() {
            self.run = BlockRun {
                first: index,
                count: Self::LOOKED_UP,
            };
            self.has = own_places(&self.image.file, self.run, self.geometry.size());
        }
        let at = usize::try_from(index - self.run.first).ok();
        at.and_then(|at| self.has.get(at)).copied().unwrap_or(false)
    }
}

/// Gives back the space that [`Overlay::reserve`] took in `base` for what a journal notes, or noted
/// before a later run changed it to zeros.
pub(super) fn unreserve(
    journal: &Journal,
    base: &Image,
    geometry: Geometry,
) -> Result<(), Failure> {
    if base.is_device {
        return Ok(());
    }
    let opened = base.metadata()?;
    let mut is_touched = false;
    journal.for_each(|index, entry| {
        let run = BlockRun {
            first: index,
            count: 1,
        };
        if entry != Entry::None && base.is_hole(run, geometry)? {
            let (offset, len) = geometry.byte_range(run);
            is_touched = true;
            // What cannot be given back is space, and no harm.
            let _ = base.file.allocate(punch(), offset, len);
        }
        Ok(())
    })?;
    match is_touched {
        true => restore_times(base, &opened),
        false => Ok(()),
    }
}

/// Whether a file system has a way to promise space for blocks that are written in place.
pub(super) fn check_reservable(base: &Image) -> Result<(), Failure> {
    let Ok(found) = fstatfs(&base.file) else {
        return Ok(());
    };
    if !COPY_ON_WRITE.contains(&found.filesystem_type().0) {
        return Ok(());
    }
    let message = format!(
        "{} lies on a file system that cannot reserve space in place: changes cannot wait beside it \
         (--apply reflink does without)",
        base.path.display()
    );
    Err(Failure::new(FailureCode::MissingRequirement, message))
}

fn restore_times(base: &Image, was: &std::fs::Metadata) -> Result<(), Failure> {
    let modified = was
        .modified()
        .map_err(|error| base.failed("examining", &error))?;
    base.file
        .as_file()
        .set_modified(modified)
        .map_err(|error| base.failed("restoring the time of", &error))
}
