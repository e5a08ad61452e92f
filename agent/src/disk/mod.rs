//! Disks: regular files, block devices and NBD exports, as sources and as destinations.
//!
//! ```text
//!  Disk ─┬─ Blocks     an Image: a file or device: read, write, map, cache
//!        │             or what is Exported by an NBD server
//!        └─ Overlay    blocks that wait beside it: stage + journal         (staged)
//!  Destination         how changes get in, when they count, and what is left of them
//!  Run, recover        what this host remembers of unfinished runs, and how they are ended
//! ```

mod attributes;
mod blocks;
mod cache;
mod call;
mod claims;
mod commit;
mod confinement;
mod delta;
mod destination;
mod direct;
mod exported;
#[cfg(any(test, feature = "fault-injection"))]
mod faults;
mod file;
mod holders;
mod image;
mod journal;
mod kept;
mod kernel;
mod locks;
mod map;
mod names;
mod overlay;
mod read;
mod recover;
mod reflink;
mod reread;
mod root;
mod run;
mod sent;
mod slots;
mod stamp;
mod state;
mod storage;
#[cfg(test)]
mod stories;
mod throttle;
mod write;

use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use kvm_clone_protocol::digest::{Content, DIGEST_LEN, Digester};
use kvm_clone_protocol::message::{
    Access, DiskKind, Encoding, FailureCode, IoChoice, Location, Opened,
};
use kvm_clone_protocol::sync::{DiskDone, DiskOp, MapRun, RunKind, WriteBlock, push_content};
use kvm_clone_protocol::units::{BLOCK_SIZE, BlockRun, Geometry};
use nix::libc;

use crate::compress::Compressor;
use crate::failure::Failure;
use blocks::Blocks;
pub(crate) use confinement::{Direction, Forbidden, confine, permit};
pub(crate) use destination::Destination;
pub(crate) use exported::Exported;
use file::DiskFile;
pub(crate) use image::{Image, Version};
use journal::Entry;
pub(crate) use kept::{Described, Kept};
use kept::{Piece, pieces};
use overlay::Overlay;
use read::Missing;
pub(crate) use read::Scratch;
pub(crate) use recover::{forward, recover, settle};
pub(crate) use run::Run;
pub(crate) use sent::Sent;
pub(crate) use stamp::Stamp;
pub(crate) use throttle::limit_reads;

/// What a session runs on.
#[derive(Debug)]
pub(crate) struct Disk {
    blocks: Arc<dyn Blocks>,
    /// What it was copied from just now, and still equals where nothing was written: this is in the
    /// page cache, if anything is.
    original: Option<Arc<Image>>,
    overlay: Option<Overlay>,
    /// Something was changed, or waits to be.
    is_changed: AtomicBool,
}

/// What every operation of a session needs to know.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionContext<'a> {
    pub(crate) geometry: Geometry,
    pub(crate) digester: Digester,
    pub(crate) compressor: &'a Compressor,
    /// What was known of the disk before, and is noted of it now.
    pub(crate) kept: Option<&'a Kept>,
    /// How the disk is read.
    pub(crate) io: IoChoice,
}

impl SessionContext<'_> {
    /// A block is not read, because its digest was kept.
    fn trust(&self, index: u64) {
        if let Some(kept) = self.kept {
            kept.trust(self.geometry.block_len(index) as u64);
        }
    }

    /// Notes what blocks hold, from `first` on.
    fn note(&self, first: u64, contents: &[Content]) {
        if let Some(kept) = self.kept {
            kept.put(first, contents);
        }
    }
}

impl Disk {
    /// A disk that is read, or changed where it is.
    pub(crate) fn of(image: Arc<Image>) -> Self {
        Self::new(image)
    }

    /// The same of what a server exports.
    pub(crate) fn exported(exported: Arc<Exported>) -> Self {
        Self::new(exported)
    }

    fn new(blocks: Arc<dyn Blocks>) -> Self {
        Self {
            blocks,
            original: None,
            overlay: None,
            is_changed: AtomicBool::new(false),
        }
    }

    /// A copy of `original` that shares its blocks, and has not been changed yet.
    fn copy_of(original: Arc<Image>, image: Arc<Image>) -> Self {
        Self {
            original: Some(original),
            ..Self::of(image)
        }
    }

    /// A disk whose changes wait beside it.
    fn with_overlay(image: Arc<Image>, overlay: Overlay) -> Self {
        Self {
            overlay: Some(overlay),
            ..Self::of(image)
        }
    }

    /// Does what a session asks.
    ///
    /// # Errors
    /// [`Failure`], which names the disk and the byte.
    pub(crate) fn run(
        &self,
        op: DiskOp,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
    ) -> Result<DiskDone, Failure> {
        match op {
            DiskOp::Map { from } => {
                let map = self.blocks.map(from, context.geometry)?;
                let map = match &self.overlay {
                    Some(overlay) => overlay.add_to(map, from)?,
                    None => map,
                };
                Ok(DiskDone::Mapped {
                    runs: map.runs,
                    data_bytes: map.data_bytes,
                })
            }
            DiskOp::Compare {
                run,
                expected,
                ship,
            } => read::compare(&*self.blocks, run, &expected, ship, context, scratch)
                .map(DiskDone::Compared),
            DiskOp::Digest { run } => self.digest(run, context, scratch).map(DiskDone::Digested),
            DiskOp::Write { blocks } => {
                self.write(&blocks, context, scratch).map(DiskDone::Written)
            }
            DiskOp::Zero { run } => {
                self.zero(run, context.geometry)?;
                if let Some(kept) = context.kept {
                    kept.forget(run);
                }
                Ok(DiskDone::Zeroed)
            }
            DiskOp::Trim { run } => {
                // Space that is given back is a change too, or a copy would be let go with it.
                self.is_changed.store(true, Ordering::Release);
                match &self.overlay {
                    Some(overlay) => overlay.zero(run, context.geometry)?,
                    None => self.blocks.trim(run, context.geometry),
                }
                Ok(DiskDone::Zeroed)
            }
        }
    }

    /// Whether a session has changed anything.
    fn is_changed(&self) -> bool {
        self.is_changed.load(Ordering::Acquire)
    }

    fn digest(
        &self,
        run: BlockRun,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
    ) -> Result<Bytes, Failure> {
        let blocks = usize::try_from(run.count).expect("at most a window");
        let mut digests = Vec::with_capacity(blocks * DIGEST_LEN);
        // A session looks at a block before it writes there.
        let blocks: &dyn Blocks = match &self.original {
            Some(original) => &**original,
            None => &*self.blocks,
        };
        let waiting = match &self.overlay {
            Some(overlay) => overlay.waiting(run)?.map(|entries| (overlay, entries)),
            None => None,
        };
        for piece in pieces(context.kept, run, |_, _| true) {
            let unknown = match piece {
                Piece::Known(index, content) => {
                    context.trust(index);
                    push_content(&mut digests, &content);
                    continue;
                }
                Piece::Unknown(unknown) => unknown,
            };
            let mut contents = Vec::new();
            let mut digest = |index: u64, block: &mut [u8]| {
                if let Some((overlay, entries)) = &waiting {
                    let at = usize::try_from(index - run.first).expect("at most a window");
                    self.look_through(overlay, index, entries[at], block)?;
                }
                contents.push(context.digester.content(block));
                Ok(())
            };
            blocks.read_blocks(unknown, context, scratch, Missing::Zeros, &mut digest)?;
            context.note(unknown.first, &contents);
            for content in &contents {
                push_content(&mut digests, content);
            }
        }
        Ok(digests.into())
    }

    /// Puts what waits for a block over what was read of the image.
    fn look_through(
        &self,
        overlay: &Overlay,
        index: u64,
        entry: Entry,
        block: &mut [u8],
    ) -> Result<(), Failure> {
        if entry != Entry::None && !overlay.replace(index, entry, block)? {
            self.blocks
                .read_block(block, index * BLOCK_SIZE, Missing::Zeros)?;
        }
        Ok(())
    }

    /// Writes the blocks; returns what each now holds, from the very bytes that were written.
    fn write(
        &self,
        blocks: &[WriteBlock],
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
    ) -> Result<Vec<Content>, Failure> {
        self.is_changed.store(true, Ordering::Release);
        let mut contents = Vec::with_capacity(blocks.len());
        for block in blocks {
            let len = context.geometry.block_len(block.index);
            let bytes = match block.encoding {
                Encoding::Raw => &block.payload[..],
                Encoding::Zstd => {
                    let out = &mut scratch.block[..len];
                    write::decompress(block.index, &block.payload, out, &mut scratch.decompressor)?
                }
            };
            let content = context.digester.content(bytes);
            context.note(block.index, &[content]);
            contents.push(content);
            match &self.overlay {
                Some(overlay) => overlay.put(block.index, bytes)?,
                None => self.blocks.write_block(block.index * BLOCK_SIZE, bytes)?,
            }
        }
        match &self.overlay {
            Some(overlay) => overlay.stage().start_writeback(blocks),
            None => self.blocks.start_writeback(blocks),
        }
        Ok(contents)
    }

    fn zero(&self, run: BlockRun, geometry: Geometry) -> Result<(), Failure> {
        self.is_changed.store(true, Ordering::Release);
        match &self.overlay {
            Some(overlay) => self.zero_beside(overlay, run, geometry),
            None => self.blocks.zero(run, geometry),
        }
    }

    /// Notes zeros for blocks that hold something, or for which something waits. The rest of a run
    /// is zero already, and may be any length: to note each of its blocks could fill the disk.
    fn zero_beside(
        &self,
        overlay: &Overlay,
        run: BlockRun,
        geometry: Geometry,
    ) -> Result<(), Failure> {
        // The map need not look beyond the run.
        let end = geometry.size().min(run.end().saturating_mul(BLOCK_SIZE));
        let within = Geometry::new(end).unwrap_or(geometry);
        let mut at = run.first;
        while at < run.end() {
            let map = overlay.add_all_to(self.blocks.map(at, within)?, at)?;
            for MapRun { kind, count } in map.runs {
                if kind == RunKind::Data {
                    overlay.zero(BlockRun { first: at, count }, geometry)?;
                }
                at += count;
            }
        }
        Ok(())
    }
}

/// A disk as the controller asked for it.
#[derive(Debug)]
pub(crate) enum Target {
    /// It is only read.
    Readable(Arc<Image>),
    /// It is to be made equal to a source; it need not exist.
    Destination(Destination),
    /// A server exports it.
    Exported(Arc<Exported>),
}

/// Opens what is at a location.
///
/// # Errors
/// [`Failure`]: it does not exist, is no disk, is held by somebody else, is being changed by an
/// unfinished run, or cannot be opened.
pub(crate) fn open(location: &Location, access: Access) -> Result<Target, Failure> {
    match location {
        Location::Path(path) => open_path(Path::new(OsStr::from_bytes(path)), access),
        Location::Export(export) => {
            let exported = Exported::open(export, access)?;
            Ok(Target::Exported(Arc::new(exported)))
        }
    }
}

fn open_path(path: &Path, access: Access) -> Result<Target, Failure> {
    if !path.is_absolute() {
        let message = format!("{} is not an absolute path", path.display());
        return Err(Failure::new(FailureCode::Refused, message));
    }
    if access == Access::Destination {
        return Destination::open(path).map(Target::Destination);
    }
    commit::check_whole(path, access)?;
    let metadata = metadata(path).map_err(|error| Failure::io("opening", path, &error))?;
    let image = open_image(path, &metadata, access)?;
    Ok(Target::Readable(Arc::new(image)))
}

/// What a path leads to.
fn metadata(path: &Path) -> io::Result<Metadata> {
    confinement::follow(path)?.metadata()
}

fn open_image(path: &Path, metadata: &Metadata, access: Access) -> Result<Image, Failure> {
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = if kind.is_dir() {
            "a directory"
        } else {
            "no regular file and no block device"
        };
        let message = format!("{} is {what}, not a disk", path.display());
        return Err(Failure::new(FailureCode::Refused, message));
    }
    let is_device = kind.is_block_device();
    let image = Image {
        file: DiskFile::new(holders::patiently(|| claim(path, access, is_device))?),
        path: path.to_owned(),
        is_device,
        is_fresh: false,
        direct: OnceLock::new(),
    };
    image.read_in_windows();
    Ok(image)
}

/// Opens a disk that nobody else has in use, and holds it against others for as long as it is
/// open. A disk that is only looked at, or read although it is in use, is in nobody's way.
fn claim(path: &Path, access: Access, is_device: bool) -> Result<File, Failure> {
    // O_EXCL on a device fails while it is mounted or held by another exclusive opener.
    let exclusive = match access {
        Access::Source | Access::Destination if is_device => libc::O_EXCL,
        _ => 0,
    };
    let failed = |error: io::Error| Failure::io("opening", path, &error);
    let reached = confinement::follow(path).map_err(failed)?;
    let file = OpenOptions::new()
        .read(true)
        .write(access == Access::Destination)
        .custom_flags(exclusive | reached.flags())
        .open(reached.path())
        .map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => holders::busy(path),
            _ => failed(confinement::explain(error)),
        })?;
    let opened = file.metadata().map_err(failed)?;
    reached.check(&opened).map_err(failed)?;
    locks::take(&file, path, access)?;
    holders::check(&file, path, access)?;
    if locks::still_named(&file, path)? {
        return Ok(file);
    }
    let message = format!("{} has just been replaced", path.display());
    Err(Failure::new(FailureCode::Busy, message))
}

/// The answer to the controller about what is there.
///
/// # Errors
/// [`Failure`] when it cannot be examined.
pub(crate) fn describe(image: &Image, disk: u32) -> Result<Opened, Failure> {
    Ok(Opened {
        disk,
        kind: if image.is_device {
            DiskKind::Device
        } else {
            DiskKind::File
        },
        size: image.size()?,
        identity: Some(image.identity()?),
        resumed: false,
        storage: storage::name(&image.metadata()?).unwrap_or_default(),
        keeps: None,
    })
}

/// A failure about a path, unless it only is not there.
fn found<T>(result: io::Result<T>, doing: &str, path: &Path) -> Result<Option<T>, Failure> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::io(doing, path, &error)),
    }
}
