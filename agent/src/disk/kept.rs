//! The digests of a disk, kept from one run to the next, so that what did not change need not be
//! read again: the source's on its host, the destination's on its own.
//!
//! ```text
//!  0          16 KiB     32 KiB                         + 528 for each 32 blocks
//!  | header   | header   | blocks 0–31 | blocks 32–63 | …       sparse
//!
//!  32 blocks:  which are known u32 | 32 digests of 16 bytes | checksum of all of it and the place, 12
//! ```
//!
//! The header holds the stamp of the version that they describe, or none: while a run changes them,
//! and after one that did not end well. What is not known, or damaged, is read from the disk, so
//! nothing here has to be there. A digest is a claim about the disk: what must hold for it to be
//! believed is in `stamp.rs`. Of a source that has another stamp now, those blocks are believed that
//! a copy proves to be what they were: `sent.rs`. What an NBD server exports has no stamp: the
//! controller names its versions, and a dirty bitmap tells what was changed since one.
//!
//! The seed of the digests belongs to a source and a destination: the destination's host
//! remembers it, and the controller gives it to both.

use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use kvm_clone_protocol::digest::{Content, DIGEST_LEN};
use kvm_clone_protocol::message::Keeps;
use kvm_clone_protocol::sync::{content_at, push_content};
use kvm_clone_protocol::units::{BLOCK_SIZE, BlockRun, Geometry};
use serde::{Deserialize, Serialize};

use super::confinement::{only_reads, reach};
use super::exported::Exported;
use super::file::DiskFile;
use super::image::Image;
use super::kernel::entries;
use super::names::{Names, remove};
use super::sent::{Proof, Sent, check_room, open_unchanged};
use super::slots::{Format, Slots, checksum};
use super::stamp::Stamp;
use super::state;
use super::write::punch;
use crate::failure::Failure;

const FORMAT: Format = Format {
    magic: *b"kc-kept\n",
    version: 3,
    slot_len: 16 * 1024,
};

/// Below the agent's own directory.
const DIRECTORY: &str = "digests";

const SUFFIX: &str = "digests";

/// Blocks of one record: a window of a scan, so that one is looked up with one or two reads.
const BLOCKS: u64 = 32;

const KNOWN_LEN: usize = 4;
const CHECK_LEN: usize = 12;
const RECORD_LEN: usize = KNOWN_LEN + 32 * DIGEST_LEN + CHECK_LEN;

/// The state directory is often on the file system of the system itself, which is left this much.
const MIN_FREE: u64 = 1 << 30;

/// How often that is looked at: each 2 MiB.
const LOOK_EVERY: u64 = 4096;

/// Pairs that one disk may be of: what goes beyond that is forgotten, the oldest first.
const MAX_PAIRS: usize = 4;

/// Digests that nobody has used for so long are forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_hours(90 * 24);

/// The digests of one disk under one seed. Only one process has them at a time.
#[derive(Debug)]
pub(crate) struct Kept {
    path: PathBuf,
    file: DiskFile,
    header: Mutex<(Slots, Header)>,
    /// Blocks from the first on of which they tell what the disk held when the session began.
    believed: u64,
    /// Why; of a proof only the blocks that it proves.
    belief: Option<Belief>,
    /// Something went wrong: they are of no use.
    is_broken: AtomicBool,
    writes: AtomicU64,
    bytes_trusted: AtomicU64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    /// The disk, so that two with names that hash alike are told apart.
    #[serde(with = "super::names::path_bytes")]
    disk: PathBuf,
    keeps: Keeps,
    /// It is read for that, not written.
    is_source: bool,
    /// What they describe.
    version: Option<Described>,
}

/// A version of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Described {
    /// Of a file, and of the copy that is kept of it.
    File { stamp: Stamp, sent: Option<Stamp> },
    /// Of an export: its name, and its bytes.
    Export { name: String, size: u64 },
}

/// Why digests tell what the disk holds.
#[derive(Debug)]
enum Belief {
    /// It is what they describe, of which there is this copy.
    Same { stamp: Stamp, sent: Option<Stamp> },
    /// Some of its blocks are.
    Proven(Proof),
    /// Those that an export does not tell to be changed.
    Unchanged {
        export: Arc<Exported>,
        size: u64,
        geometry: Geometry,
    },
}

impl Belief {
    fn of_file(header: &Header, now: Stamp, source: Option<&Arc<Image>>) -> Option<Self> {
        let Described::File { stamp, sent } = header.version.clone()? else {
            return None;
        };
        if stamp == now {
            return Some(Self::Same { stamp, sent });
        }
        if !now.is_of_same_file(&stamp) {
            return None;
        }
        Proof::new(source?, &header.copy()?, &sent?).map(Self::Proven)
    }

    fn of_export(
        header: &Header,
        was: &str,
        export: &Arc<Exported>,
        geometry: Geometry,
    ) -> Option<Self> {
        match header.version.as_ref()? {
            Described::Export { name, size } if name == was => Some(Self::Unchanged {
                export: Arc::clone(export),
                size: *size,
                geometry,
            }),
            _ => None,
        }
    }

    /// Bytes of the disk as they describe it.
    fn size(&self) -> u64 {
        match self {
            Self::Same { stamp, .. } => stamp.size(),
            Self::Proven(proof) => proof.size(),
            Self::Unchanged { size, .. } => *size,
        }
    }

    /// Which blocks of a run are what they describe; none, where that cannot be told.
    fn proven(&self, run: BlockRun) -> Option<Vec<bool>> {
        match self {
            Self::Same { .. } => None,
            Self::Proven(proof) => Some(proof.proven(run)),
            Self::Unchanged {
                export, geometry, ..
            } => Some(export.unchanged(run, *geometry).unwrap_or_default()),
        }
    }
}

impl Header {
    /// Where a copy of a source lies, if there is one.
    fn copy(&self) -> Option<PathBuf> {
        if !self.is_source {
            return None;
        }
        Some(Names::of_file(&self.disk)?.sent(&pair(&self.keeps)))
    }
}

impl Kept {
    /// The seed of the pair that `disk` was the destination of last.
    pub(crate) fn seed(disk: &Path) -> Option<Keeps> {
        let directory = state::existing(DIRECTORY).ok()??;
        let newest = of_disk(&directory, disk).pop()?;
        let (_, header) = header(&newest.1)?;
        (header.disk == disk).then_some(header.keeps)
    }

    /// Those of `disk` under a seed for a session of this geometry, made where there are none. They
    /// are believed if they describe what the disk is `now`, or, of a `source`, as far as a copy of
    /// what they describe proves them. `None` where there is no place for them, or another process
    /// has them: a run does without.
    pub(crate) fn open(
        disk: &Path,
        keeps: Keeps,
        geometry: Geometry,
        now: Option<Stamp>,
        source: Option<&Arc<Image>>,
    ) -> Option<Self> {
        Self::open_if(disk, keeps, geometry, source.is_some(), |found| {
            Belief::of_file(found, now?, source)
        })
    }

    /// Those of what an export shows of the image `disk`, as [`open`](Self::open). They are believed
    /// if they describe what it `was`, but for what the export tells to be changed since.
    pub(super) fn of_export(
        export: &Arc<Exported>,
        disk: &Path,
        keeps: Keeps,
        geometry: Geometry,
        is_source: bool,
        was: Option<&str>,
    ) -> Option<Self> {
        Self::open_if(disk, keeps, geometry, is_source, |found| {
            Belief::of_export(found, was?, export, geometry)
        })
    }

    fn open_if(
        disk: &Path,
        keeps: Keeps,
        geometry: Geometry,
        is_source: bool,
        belief: impl FnOnce(&Header) -> Option<Belief>,
    ) -> Option<Self> {
        let directory = state::directory(DIRECTORY).ok()?;
        let path = directory.join(name(disk, &keeps));
        let header = Header {
            disk: disk.to_owned(),
            keeps,
            is_source,
            version: None,
        };
        let (file, slots, found) = match open_found(&path, &header) {
            Some(found) => found,
            None => {
                make_room(&directory, disk);
                make(&path, &header).ok()?
            }
        };
        let belief = belief(&found);
        let (believed, is_resized) = belief.as_ref().map_or((0, false), |belief| {
            let size = belief.size();
            (alike(size, geometry), size != geometry.size())
        });
        let kept = Self {
            path,
            file,
            believed,
            belief,
            header: Mutex::new((slots, found)),
            is_broken: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            bytes_trusted: AtomicU64::new(0),
        };
        if kept.believed == 0 {
            kept.clear().ok()?;
        } else if is_resized {
            kept.forget_from(kept.believed);
        }
        Some(kept)
    }

    /// What the blocks of a run hold, as far as that is known.
    pub(crate) fn contents(&self, run: BlockRun) -> Vec<Option<Content>> {
        let mut contents = Vec::new();
        for (number, places) in records(run) {
            let record = match number * BLOCKS < self.believed && !self.is_broken() {
                true => self.read(number).ok().flatten().unwrap_or_default(),
                false => Record::default(),
            };
            contents.extend(places.map(|place| record.content(place)));
        }
        for (index, content) in (run.first..).zip(&mut contents) {
            if index >= self.believed {
                *content = None;
            }
        }
        if contents.iter().any(Option::is_some)
            && let Some(proven) = self.belief.as_ref().and_then(|belief| belief.proven(run))
        {
            let mut proven = proven.into_iter();
            contents.iter_mut().for_each(|content| {
                *content = content.filter(|_| proven.next() == Some(true));
            });
        }
        contents
    }

    /// So many bytes were not read, because of that.
    pub(crate) fn trust(&self, bytes: u64) {
        self.bytes_trusted.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of the disk that were not read.
    pub(crate) fn bytes_trusted(&self) -> u64 {
        self.bytes_trusted.load(Ordering::Relaxed)
    }

    /// Notes what blocks hold, from `first` on.
    pub(crate) fn put(&self, first: u64, contents: &[Content]) {
        let run = BlockRun {
            first,
            count: contents.len() as u64,
        };
        let mut contents = contents.iter();
        self.change(|| {
            for (number, places) in records(run) {
                let mut record = self.read(number)?.unwrap_or_default();
                for (place, content) in places.zip(&mut contents) {
                    record.put(place, content);
                }
                self.file.write_all_at(&record.encode(number), at(number))?;
            }
            Ok(())
        });
    }

    /// Blocks have become zero: what a disk says of holes is enough.
    pub(crate) fn forget(&self, run: BlockRun) {
        let whole = run.first.div_ceil(BLOCKS)..run.end() / BLOCKS;
        self.change(|| {
            if whole.start < whole.end {
                let len = (whole.end - whole.start) * RECORD_LEN as u64;
                self.file.allocate(punch(), at(whole.start), len)?;
            }
            let partly = records(run).filter(|(number, _)| !whole.contains(number));
            for (number, places) in partly {
                if let Some(mut record) = self.read(number)? {
                    places.for_each(|place| record.forget(place));
                    self.file.write_all_at(&record.encode(number), at(number))?;
                }
            }
            Ok(())
        });
    }

    /// What follows may never be told of again, if it is a hole in the new size.
    fn forget_from(&self, block: u64) {
        self.change(|| {
            let (number, end) = (block / BLOCKS, at(block.div_ceil(BLOCKS)));
            if let Some(mut record) = self.read(number)? {
                let place = usize::try_from(block % BLOCKS).expect("less than 32");
                (place..32).for_each(|place| record.forget(place));
                self.file.write_all_at(&record.encode(number), at(number))?;
            }
            match self.file.metadata()?.len() {
                len if len > end => self.file.set_len(end),
                _ => Ok(()),
            }
        });
    }

    /// What this run is to leave for the next one beside digests: a copy of the source, where the
    /// user wants one and the file system keeps so many bytes free.
    ///
    /// # Errors
    /// [`Failure`]: then there is none.
    pub(crate) fn leave(&self, image: &Image, min_free: Option<u64>) -> Result<Sent, Failure> {
        let left = self.copy_of(image, min_free);
        // What proves this run's blocks is open, and needs no name.
        if matches!(left, Ok(Sent::None) | Err(_)) {
            remove_copy(&self.header().1);
        }
        left
    }

    fn copy_of(&self, image: &Image, min_free: Option<u64>) -> Result<Sent, Failure> {
        let (Some(min_free), Some(path)) = (min_free, self.header().1.copy()) else {
            return Ok(Sent::None);
        };
        let others = self.path.parent().into_iter().flat_map(copies);
        check_room(image, others.filter(|other| *other != path), min_free)?;
        match &self.belief {
            Some(Belief::Same {
                sent: Some(stamp), ..
            }) if open_unchanged(&path, stamp).is_some() => Ok(Sent::Old(*stamp)),
            _ => Sent::make(image, path),
        }
    }

    /// From now on they describe this version of the disk; none, and they are of no use. What the
    /// storage did not take would be forgotten with the page cache, so it is asked.
    pub(crate) fn record(&self, version: Option<Described>) {
        let mut header = self.header();
        if version.is_some() && header.1.version == version {
            return;
        }
        let recorded = match version {
            Some(_) if !self.is_broken() => self
                .file
                .sync()
                .and_then(|()| self.describe(&mut header, version)),
            _ => Err(io::ErrorKind::Other.into()),
        };
        if recorded.is_err() {
            remove_copy(&header.1);
            let _ = remove(&self.path);
        }
    }

    /// A change: before the first one they cease to describe anything.
    fn change(&self, change: impl FnOnce() -> io::Result<()>) {
        if self.is_broken() {
            return;
        }
        let mut header = self.header();
        let changed = || {
            self.describe(&mut header, None)?;
            if self
                .writes
                .fetch_add(1, Ordering::Relaxed)
                .is_multiple_of(LOOK_EVERY)
            {
                self.check_room()?;
            }
            change()
        };
        if changed().is_err() {
            self.is_broken.store(true, Ordering::Release);
        }
    }

    fn check_room(&self) -> io::Result<()> {
        match self.file.free_space()? {
            free if free >= MIN_FREE => Ok(()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }

    /// Nothing is known.
    fn clear(&self) -> io::Result<()> {
        self.describe(&mut self.header(), None)?;
        self.file.set_len(Slots::len(FORMAT))
    }

    /// Notes what they describe, unless that is what stands there. A stamp is of one boot, so that
    /// nothing here has to outlive a power cut.
    fn describe(&self, header: &mut (Slots, Header), version: Option<Described>) -> io::Result<()> {
        if header.1.version == version {
            return Ok(());
        }
        header.1.version = version;
        header.0.write_for_this_boot(&self.file, &header.1)
    }

    fn header(&self) -> std::sync::MutexGuard<'_, (Slots, Header)> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Acquire)
    }

    /// A record, unless there is none or it is damaged.
    fn read(&self, number: u64) -> io::Result<Option<Record>> {
        let mut bytes = [0; RECORD_LEN];
        self.file.read_full_at(&mut bytes, at(number))?;
        Ok(Record::decode(number, &bytes))
    }
}

/// A part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    /// A block that holds this.
    Known(u64, Content),
    /// Blocks that must be read.
    Unknown(BlockRun),
}

/// A run in pieces: blocks of which it is known what they hold and `is_enough`, and all others.
pub(super) fn pieces(
    kept: Option<&Kept>,
    run: BlockRun,
    is_enough: impl Fn(u64, Content) -> bool,
) -> Vec<Piece> {
    let Some(kept) = kept else {
        return vec![Piece::Unknown(run)];
    };
    let mut pieces: Vec<Piece> = Vec::new();
    for (index, content) in (run.first..).zip(kept.contents(run)) {
        match (
            content.filter(|content| is_enough(index, *content)),
            pieces.last_mut(),
        ) {
            (Some(content), _) => pieces.push(Piece::Known(index, content)),
            (None, Some(Piece::Unknown(run))) => run.count += 1,
            (None, _) => pieces.push(Piece::Unknown(BlockRun {
                first: index,
                count: 1,
            })),
        }
    }
    pieces
}

/// How many blocks are the same bytes in a disk of `size` bytes and in a session: all of them, or
/// those that are whole in both, since a short block is digested as short as it is.
fn alike(size: u64, session: Geometry) -> u64 {
    match size == session.size() {
        true => session.block_count(),
        false => size.min(session.size()) / BLOCK_SIZE,
    }
}

/// What is known of 32 blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    known: u32,
    digests: Vec<u8>,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            known: 0,
            digests: vec![0; 32 * DIGEST_LEN],
        }
    }
}

impl Record {
    fn content(&self, place: usize) -> Option<Content> {
        (self.known >> place & 1 == 1).then(|| content_at(&self.digests, place))
    }

    fn put(&mut self, place: usize, content: &Content) {
        let mut digest = Vec::with_capacity(DIGEST_LEN);
        push_content(&mut digest, content);
        self.digests[place * DIGEST_LEN..][..DIGEST_LEN].copy_from_slice(&digest);
        self.known |= 1 << place;
    }

    fn forget(&mut self, place: usize) {
        self.known &= !(1 << place);
    }

    fn encode(&self, number: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(RECORD_LEN);
        bytes.extend_from_slice(&self.known.to_le_bytes());
        bytes.extend_from_slice(&self.digests);
        let check = check(number, &bytes);
        bytes.extend_from_slice(&check);
        bytes
    }

    /// `None` for one that was never written, or is not what was.
    fn decode(number: u64, bytes: &[u8; RECORD_LEN]) -> Option<Self> {
        let (said, sum) = bytes.split_at(RECORD_LEN - CHECK_LEN);
        let (known, digests) = said.split_at(KNOWN_LEN);
        (check(number, said) == sum).then(|| Self {
            known: u32::from_le_bytes(known.try_into().expect("four bytes")),
            digests: digests.to_vec(),
        })
    }
}

fn check(number: u64, said: &[u8]) -> [u8; CHECK_LEN] {
    let sum = checksum(&[said, &number.to_le_bytes()].concat());
    sum[..CHECK_LEN]
        .try_into()
        .expect("twelve of sixteen bytes")
}

/// The records that a run touches, and which places of each.
fn records(run: BlockRun) -> impl Iterator<Item = (u64, Range<usize>)> {
    let (first, end) = (run.first / BLOCKS, run.end().div_ceil(BLOCKS));
    let place = move |block: u64, number: u64| {
        usize::try_from(block.clamp(number * BLOCKS, (number + 1) * BLOCKS) - number * BLOCKS)
            .expect("at most 32")
    };
    (first..end).map(move |number| (number, place(run.first, number)..place(run.end(), number)))
}

fn at(number: u64) -> u64 {
    Slots::len(FORMAT) + number * RECORD_LEN as u64
}

/// `HASH OF THE DISK'S PATH-HASH OF THE SEED.digests`
fn name(disk: &Path, keeps: &Keeps) -> String {
    format!(
        "{}-{}.{SUFFIX}",
        hex(disk.as_os_str().as_bytes()),
        pair(keeps)
    )
}

/// What tells a source and a destination from others, in a name.
fn pair(keeps: &Keeps) -> String {
    hex(&[&[keeps.hash as u8], &keeps.seed.0[..]].concat())
}

fn hex(bytes: &[u8]) -> String {
    let sum = checksum(bytes);
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The files about a disk, the one that was changed last at the end.
fn of_disk(directory: &Path, disk: &Path) -> Vec<(SystemTime, PathBuf)> {
    let prefix = hex(disk.as_os_str().as_bytes());
    let is_its = |path: &PathBuf| {
        let name = path.file_name().map(OsStrExt::as_bytes);
        name.is_some_and(|name| name.starts_with(prefix.as_bytes()))
    };
    let mut found: Vec<_> = entries(directory)
        .filter(is_its)
        .filter_map(|path| Some((modified(&path)?, path)))
        .collect();
    found.sort();
    found
}

fn modified(path: &Path) -> Option<SystemTime> {
    reach(path).ok()?.symlink_metadata().ok()?.modified().ok()
}

/// Digests that were kept earlier; `None` when there are none that can be used.
fn open_found(path: &Path, wanted: &Header) -> Option<(DiskFile, Slots, Header)> {
    let file = DiskFile::open(path).ok()?;
    file.as_file().try_lock().ok()?;
    let (slots, found) = Slots::open::<Header>(&file, FORMAT).ok()?;
    if found.disk != wanted.disk || found.keeps != wanted.keeps {
        return None;
    }
    // What was a source may be a destination now: digests are digests, but a copy is of no use.
    if !wanted.is_source {
        remove_copy(&found);
    }
    let is_source = wanted.is_source;
    Some((file, slots, Header { is_source, ..found }))
}

fn make(path: &Path, header: &Header) -> io::Result<(DiskFile, Slots, Header)> {
    // What cannot be used; not what another process has at this moment.
    if let Ok(file) = DiskFile::open(path) {
        file.as_file().try_lock().map_err(io::Error::from)?;
        remove(path)?;
    }
    let file = DiskFile::create(path)?;
    file.as_file().try_lock().map_err(io::Error::from)?;
    let slots = Slots::create(&file, FORMAT, header)?;
    Ok((file, slots, header.clone()))
}

/// Forgets what nobody has used for long, what was of disks that are gone, and pairs of a disk
/// beyond those that it may have.
fn make_room(directory: &Path, disk: &Path) {
    let of_disk = of_disk(directory, disk);
    let surplus = of_disk.len().saturating_sub(MAX_PAIRS - 1);
    for (_, path) in &of_disk[..surplus] {
        forget(path);
    }
    for path in entries(directory) {
        let age = modified(&path).and_then(|modified| modified.elapsed().ok());
        if age.is_some_and(|age| age > FORGOTTEN_AFTER) || is_of_none(&path) {
            forget(&path);
        }
    }
}

/// Removes digests, and the copy that they belong to.
fn forget(path: &Path) {
    if let Some((_, header)) = header(path) {
        remove_copy(&header);
    }
    let _ = remove(path);
}

fn remove_copy(of: &Header) {
    if let Some(copy) = of.copy().filter(|_| !only_reads()) {
        let _ = remove(&copy);
    }
}

/// Whether the disk is gone, and no run is at it: one that is being made has no name yet.
fn is_of_none(path: &Path) -> bool {
    let Some((file, header)) = header(path) else {
        return false;
    };
    let found = reach(&header.disk).and_then(|at| at.symlink_metadata());
    found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        && file.as_file().try_lock().is_ok()
}

fn header(path: &Path) -> Option<(DiskFile, Header)> {
    let file = DiskFile::open(path).ok()?;
    let (_, header) = Slots::open::<Header>(&file, FORMAT).ok()?;
    Some((file, header))
}

/// Where copies of sources lie, if they are there.
fn copies(directory: &Path) -> impl Iterator<Item = PathBuf> {
    entries(directory).filter_map(|path| {
        let (_, header) = header(&path)?;
        header.copy()
    })
}

#[cfg(test)]
mod tests {
    use kvm_clone_protocol::digest::{Digest, HashKind, Seed};

    use std::sync::OnceLock;

    use super::*;
    use crate::disk::Image;

    const KEEPS: Keeps = Keeps {
        hash: HashKind::Xxh3,
        seed: Seed([5; 32]),
    };

    fn geometry(blocks: u64) -> Geometry {
        Geometry::new(blocks * BLOCK_SIZE).unwrap()
    }

    /// A disk of so many blocks, on a file system that has stamps.
    fn disk(blocks: u64) -> Option<(tempfile::TempDir, PathBuf)> {
        let here = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let path = directory.path().join("disk");
        resize(&path, blocks);
        if stamp(&path).is_none() {
            eprintln!("SKIPPED: no stamps on {}", directory.path().display());
            return None;
        }
        Some((directory, path))
    }

    fn resize(path: &Path, blocks: u64) {
        let file = std::fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .unwrap();
        file.set_len(blocks * BLOCK_SIZE).unwrap();
    }

    fn stamp(path: &Path) -> Option<Stamp> {
        let file = DiskFile::open(path).unwrap();
        let image = Image {
            file,
            path: path.to_owned(),
            is_device: false,
            is_fresh: false,
            direct: OnceLock::new(),
        };
        image.own_stamp()
    }

    fn version(path: &Path) -> Option<Described> {
        stamp(path).map(|stamp| Described::File { stamp, sent: None })
    }

    fn content(n: u8) -> Content {
        match n {
            0 => Content::Zero,
            n => Content::Digest(Digest([n; DIGEST_LEN])),
        }
    }

    fn open(path: &Path, blocks: u64) -> Kept {
        Kept::open(path, KEEPS, geometry(blocks), stamp(path), None).unwrap()
    }

    fn all(kept: &Kept, count: u64) -> Vec<Option<Content>> {
        kept.contents(BlockRun { first: 0, count })
    }

    #[test]
    fn what_was_noted_is_found_by_the_next_run_and_a_seed_with_it() {
        let Some((_directory, path)) = disk(100) else {
            return;
        };
        assert_eq!(Kept::seed(&path), None);
        let kept = open(&path, 100);
        assert_eq!(all(&kept, 100), vec![None; 100]);
        kept.put(30, &[content(1), content(0), content(2)]);
        kept.put(99, &[content(3)]);
        kept.record(version(&path));
        drop(kept);
        assert_eq!(Kept::seed(&path), Some(KEEPS));
        let kept = open(&path, 100);
        let found = all(&kept, 100);
        let known = |n| Some(content(n));
        assert_eq!(found[29..34], [None, known(1), known(0), known(2), None]);
        assert_eq!(found[99], known(3));

        // Nobody else has them meanwhile.
        assert!(Kept::open(&path, KEEPS, geometry(100), stamp(&path), None).is_none());
        kept.forget(BlockRun {
            first: 31,
            count: 69,
        });
        assert_eq!(all(&kept, 100)[29..34], [None, known(1), None, None, None]);
        assert_eq!(all(&kept, 100)[99], None);
    }

    #[test]
    fn what_a_run_has_not_finished_is_not_believed() {
        let Some((_directory, path)) = disk(40) else {
            return;
        };
        let kept = open(&path, 40);
        kept.put(0, &[content(1)]);
        kept.record(version(&path));
        drop(kept);
        let kept = open(&path, 40);
        kept.put(1, &[content(2)]);
        drop(kept);
        assert_eq!(all(&open(&path, 40), 40), vec![None; 40]);
    }

    #[test]
    fn of_another_size_whole_blocks_are_believed_and_the_rest_is_forgotten_for_ever() {
        let Some((_directory, path)) = disk(100) else {
            return;
        };
        let kept = open(&path, 100);
        kept.put(0, &vec![content(9); 100]);
        kept.record(version(&path));
        drop(kept);
        let smaller = Geometry::new(50 * BLOCK_SIZE + 7).unwrap();
        let kept = Kept::open(&path, KEEPS, smaller, stamp(&path), None).unwrap();
        let believed: Vec<_> = all(&kept, 51).iter().map(Option::is_some).collect();
        assert_eq!(believed, [vec![true; 50], vec![false]].concat());
        resize(&path, 100);
        kept.record(version(&path));
        drop(kept);
        let found = all(&open(&path, 100), 100);
        assert!(found[..50].iter().all(Option::is_some));
        assert!(found[50..].iter().all(Option::is_none));
    }

    #[test]
    fn what_is_of_no_disk_is_forgotten_and_what_a_run_is_at_is_not() {
        let Some((directory, path)) = disk(4) else {
            return;
        };
        let (gone, coming) = (directory.path().join("gone"), directory.path().join("new"));
        drop(Kept::open(&gone, KEEPS, geometry(4), None, None).unwrap());
        let _coming = Kept::open(&coming, KEEPS, geometry(4), None, None).unwrap();
        drop(open(&path, 4));
        assert_eq!(Kept::seed(&gone), None);
        assert_eq!(Kept::seed(&coming), Some(KEEPS));
        assert_eq!(Kept::seed(&path), Some(KEEPS));
    }

    #[test]
    fn damage_is_noticed_in_every_byte_of_a_record() {
        let record = {
            let mut record = Record::default();
            record.put(3, &content(7));
            record
        };
        let whole = record.encode(5);
        assert_eq!(
            Record::decode(5, whole[..].try_into().unwrap()),
            Some(record)
        );
        assert_eq!(Record::decode(6, whole[..].try_into().unwrap()), None);
        for place in 0..RECORD_LEN {
            let mut damaged = whole.clone();
            damaged[place] ^= 0x10;
            assert_eq!(Record::decode(5, damaged[..].try_into().unwrap()), None);
        }
        assert_eq!(Record::decode(0, &[0; RECORD_LEN]), None);
    }
}
