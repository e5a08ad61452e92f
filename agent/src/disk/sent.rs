//! A reflink copy of a source as it was sent, kept on its host so that the next run reads only what
//! was written since. It has no part in what the copy of the disk becomes: what it does not prove is
//! read.
//!
//! ```text
//!  run      .NAME.kc-sent-PAIR   shares all blocks with NAME as it was sent; its digests are kept.rs
//!  guest    writes to NAME       the file system puts that somewhere else: shared blocks stay
//!  run      FIEMAP of both       what is at the same place is what it was (reflink.rs)
//! ```
//!
//! What is overwritten in NAME stays on the storage for the copy's sake. So one is made only where
//! the file system would have room if all disks that have one were overwritten from end to end, and
//! it is taken away by the first run that finds otherwise, or that is not asked for one.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_clone_protocol::message::FailureCode;
use kvm_clone_protocol::units::BlockRun;

use super::confinement::{only_reads, reach};
use super::file::DiskFile;
use super::image::Image;
use super::names::remove;
use super::reflink;
use super::stamp::Stamp;
use crate::failure::Failure;

/// `st_blocks` of stat counts these.
const SECTOR: u64 = 512;

/// What a run leaves for the next one.
#[derive(Debug)]
pub(crate) enum Sent {
    /// Nothing.
    None,
    /// What an earlier one has left: the source has not changed since.
    Old(Stamp),
    /// A copy that was made before anything was read. It has no name yet, so that it is gone with
    /// this process if nothing comes of the run.
    New { file: DiskFile, path: PathBuf },
}

/// Fails unless the file system of `image` keeps `min_free` bytes, whatever is written to the disks
/// of which there are copies: `others`, and this one.
///
/// # Errors
/// [`Failure`] of code no space.
pub(super) fn check_room(
    image: &Image,
    others: impl Iterator<Item = PathBuf>,
    min_free: u64,
) -> Result<(), Failure> {
    let own = image.metadata()?;
    let allocated = |path: PathBuf| {
        let found = reach(&path).ok()?.symlink_metadata().ok()?;
        (found.dev() == own.dev()).then(|| found.blocks() * SECTOR)
    };
    let kept = others.filter_map(allocated).sum::<u64>() + own.blocks() * SECTOR;
    let free = image
        .file
        .free_space()
        .map_err(|error| image.failed("looking for space beside", &error))?;
    if free >= kept.saturating_add(min_free) {
        return Ok(());
    }
    let message = format!(
        "{free} bytes are free beside it; {min_free} are to be left, and {kept} more could go if all \
         that copies are kept of were overwritten"
    );
    Err(Failure::new(FailureCode::NoSpace, message))
}

/// The file at `path`, if it is still what it was when its stamp was taken.
pub(super) fn open_unchanged(path: &Path, stamp: &Stamp) -> Option<DiskFile> {
    let file = DiskFile::open(path).ok()?;
    (Stamp::of(file.as_file()).as_ref() == Some(stamp)).then_some(file)
}

impl Sent {
    /// A copy of the source as it is.
    ///
    /// # Errors
    /// [`Failure`]: then there is none, and the next run reads all of the source.
    pub(super) fn make(image: &Image, path: PathBuf) -> Result<Self, Failure> {
        if only_reads() {
            let message = "this agent only reads (--read-only)";
            return Err(Failure::new(FailureCode::Refused, message));
        }
        let directory = path.parent().unwrap_or_else(|| Path::new("/"));
        let file = reflink::copy(image, directory, "the next run reads the whole disk")?;
        Ok(Self::New { file, path })
    }

    /// The source was what it is now for the whole run: the copy gets its name. Gives back what it
    /// is from then on; `None` where there is none.
    pub(crate) fn keep(&self) -> Option<Stamp> {
        match self {
            Self::None => None,
            Self::Old(stamp) => Some(*stamp),
            Self::New { file, path } => {
                let named = remove(path).and_then(|_| file.link(path));
                named.ok().and_then(|()| Stamp::of_own(file.as_file()))
            }
        }
    }
}

/// What tells which blocks of a source are what they were when it was sent.
#[derive(Debug)]
pub(super) struct Proof {
    source: Arc<Image>,
    copy: DiskFile,
    /// Bytes of the copy.
    size: u64,
}

impl Proof {
    /// By the copy at `path`, if it is still what it was when its stamp was taken.
    pub(super) fn new(source: &Arc<Image>, path: &Path, stamp: &Stamp) -> Option<Self> {
        Some(Self {
            source: Arc::clone(source),
            copy: open_unchanged(path, stamp)?,
            size: stamp.size(),
        })
    }

    /// Bytes of the copy.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Which blocks of a run are what they were.
    pub(super) fn proven(&self, run: BlockRun) -> Vec<bool> {
        let proven = reflink::in_common(&self.copy, &self.source.file, run, self.size);
        proven.unwrap_or_default()
    }
}
