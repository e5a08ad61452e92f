//! A disk that an NBD server on this host exports: of a running VM, or the contents of an image.
//!
//! Nothing lies beside it, and there is nothing to hold it by: whoever has it exported sees to it
//! that nobody else writes to it. So it is changed where it is.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use kvm_clone_protocol::message::{
    Access, Apply, ApplyChoice, DiskKind, FailureCode, History, IoChoice, Keeps, NbdExport,
    NbdServer, Opened,
};
use kvm_clone_protocol::sync::{MAP_RUNS, RunKind, WriteBlock};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};

use super::SessionContext;
use super::blocks::{Blocks, Each};
use super::kept::{Described, Kept};
use super::map::Map;
use super::read::{Missing, Scratch};
use super::throttle::admit;
use super::write::ZEROS;
use crate::failure::Failure;
use crate::nbd::{Address, Export, NbdError};

/// Zeros at most in one request, in bytes: a server that writes them has an end in sight.
const ZEROS_LEN: u64 = 64 << 20;

/// An open export.
#[derive(Debug)]
pub(crate) struct Exported {
    export: Export,
    /// What messages call it.
    name: String,
    /// By what the run before is built upon.
    history: Option<History>,
}

/// The contexts that are asked for.
const BITMAPS: &str = "qemu:dirty-bitmap:";

/// The longest name of one in bytes: that of a text in NBD.
const MAX_NAME: usize = 4096;

impl Exported {
    /// Opens an export.
    ///
    /// # Errors
    /// [`Failure`]: there is none, or it cannot be used for this.
    pub(super) fn open(export: &NbdExport, access: Access) -> Result<Self, Failure> {
        let address = match &export.server {
            NbdServer::Unix(path) => Address::Unix(Path::new(OsStr::from_bytes(path)).to_owned()),
            NbdServer::Loopback(port) => Address::Loopback(*port),
        };
        let name = format!("the NBD export {:?} at {address}", export.name);
        let history = export.history.clone();
        let changed = history.as_ref().and_then(|history| history.changed.clone());
        let is_known = |context: &String| context.starts_with(BITMAPS) && context.len() <= MAX_NAME;
        if changed.as_ref().is_some_and(|context| !is_known(context)) {
            let message = format!("{name}: a dirty bitmap has another name");
            return Err(Failure::new(FailureCode::Protocol, message));
        }
        let export = Export::open(address, export.name.clone(), changed)
            .map_err(|error| failed(&name, "opening", &error))?;
        if access == Access::Destination && export.is_read_only() {
            let message = format!("{name} can only be read");
            return Err(Failure::new(FailureCode::Refused, message));
        }
        Ok(Self {
            export,
            name,
            history,
        })
    }

    /// The answer to the controller.
    pub(crate) fn describe(&self, disk: u32) -> Opened {
        Opened {
            disk,
            kind: DiskKind::Export,
            size: self.export.size(),
            identity: None,
            resumed: false,
            storage: Vec::new(),
            keeps: self
                .history
                .as_ref()
                .and_then(|history| Kept::seed(image(history))),
        }
    }

    /// Digests of it that are kept from run to run, and the version of which they will be. They are
    /// `believed` as far as the export tells that what they describe was not changed.
    pub(crate) fn keep(
        self: &Arc<Self>,
        keeps: Keeps,
        geometry: Geometry,
        is_source: bool,
        believed: bool,
    ) -> Option<Kept> {
        let history = self.history.as_ref()?;
        let was = history.was.as_deref().filter(|_| believed);
        Kept::of_export(self, image(history), keeps, geometry, is_source, was)
    }

    /// What it is once the run has ended.
    pub(crate) fn version(&self) -> Option<Described> {
        Some(Described::Export {
            name: self.history.as_ref()?.becomes.clone(),
            size: self.export.size(),
        })
    }

    /// Which blocks of a run were not changed since the version that it was.
    pub(super) fn unchanged(&self, run: BlockRun, geometry: Geometry) -> Option<Vec<bool>> {
        if self.history.as_ref()?.changed.is_none() {
            return Some(vec![true; usize::try_from(run.count).ok()?]);
        }
        let mut unchanged = vec![true; usize::try_from(run.count).ok()?];
        let (mut at, len) = geometry.byte_range(run);
        let end = at + len;
        while at < end {
            for extent in self.export.changes(at, end - at).ok()?? {
                let next = (at + u64::from(extent.len)).min(end);
                if extent.is_dirty() && next > at {
                    let blocks = at / BLOCK_SIZE..next.div_ceil(BLOCK_SIZE);
                    let place = |block: u64| usize::try_from(block - run.first).ok();
                    unchanged[place(blocks.start)?..place(blocks.end)?].fill(false);
                }
                at = next;
            }
        }
        Some(unchanged)
    }

    /// Refuses what it has no room for.
    ///
    /// # Errors
    /// [`Failure`]: it is smaller than a session.
    pub(crate) fn check(&self, geometry: Geometry) -> Result<(), Failure> {
        let (name, size, needed) = (&self.name, self.export.size(), geometry.size());
        if size >= needed {
            return Ok(());
        }
        let message = format!("{name} has {size} bytes, and {needed} are needed");
        Err(Failure::new(FailureCode::NoSpace, message))
    }

    /// Begins to change it, and says in which way and what the user ought to know.
    ///
    /// # Errors
    /// [`Failure`]: changes would have to wait.
    pub(crate) fn begin(&self, choice: ApplyChoice) -> Result<(Apply, String), Failure> {
        let name = &self.name;
        match choice {
            ApplyChoice::Auto | ApplyChoice::Inplace => {
                let warning = format!("{name} cannot be marked as torn while it is written");
                Ok((Apply::Inplace, warning))
            }
            ApplyChoice::Staged | ApplyChoice::Reflink => {
                let message = format!(
                    "changes cannot wait beside {name} (--apply inplace writes where they belong)"
                );
                Err(Failure::new(FailureCode::MissingRequirement, message))
            }
        }
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// [`Failure`] when the server cannot, or what it wrote is to be read again.
    pub(crate) fn prepare(&self, reread: bool) -> Result<(), Failure> {
        if reread {
            let message = format!(
                "{} cannot be read past the caches of its server (--verify streamed)",
                self.name
            );
            return Err(Failure::new(FailureCode::MissingRequirement, message));
        }
        let flushed = self.export.flush();
        flushed.map_err(|error| self.failed("syncing", &error))
    }

    fn failed(&self, doing: &str, error: &NbdError) -> Failure {
        failed(&self.name, doing, error)
    }
}

impl fmt::Display for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// The image that holds what an export shows.
fn image(history: &History) -> &Path {
    Path::new(OsStr::from_bytes(&history.image))
}

fn failed(name: &str, doing: &str, error: &NbdError) -> Failure {
    let (code, offset) = match error {
        NbdError::Io(error) if nobody_listens(error) => (FailureCode::NotFound, None),
        NbdError::Unknown(_) => (FailureCode::NotFound, None),
        NbdError::Unfit(_) => (FailureCode::MissingRequirement, None),
        NbdError::Request { offset, error } => match error.kind() {
            io::ErrorKind::StorageFull => (FailureCode::NoSpace, Some(*offset)),
            _ => (FailureCode::Io, Some(*offset)),
        },
        NbdError::Io(_) | NbdError::Misbehaved(_) => (FailureCode::Io, None),
    };
    Failure {
        code,
        offset,
        message: format!("{doing} {name}: {error}"),
    }
}

fn nobody_listens(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
    kinds.contains(&error.kind())
}

impl Blocks for Exported {
    fn map(&self, from: u64, geometry: Geometry) -> Result<Map, Failure> {
        let total = geometry.block_count();
        let mut map = Map::default();
        // Extents are byte ranges; blocks that they share are data if either is.
        let mut at = from * BLOCK_SIZE;
        let mut covered = from;
        while covered < total && map.runs.len() + 2 <= MAP_RUNS {
            let left = geometry.size() - at;
            let extents = self.export.allocation(at, left);
            let extents = extents.map_err(|error| self.failed("looking for data in", &error))?;
            let Some(extents) = extents else {
                map.push(RunKind::Data, total - covered);
                map.data_bytes += left;
                break;
            };
            for extent in extents {
                let end = (at + u64::from(extent.len)).min(geometry.size());
                if extent.is_zero() {
                    // Up to the block that goes on behind it, unless that is the last.
                    let last = match end == geometry.size() {
                        true => total,
                        false => end / BLOCK_SIZE,
                    };
                    map.push(RunKind::Hole, last.saturating_sub(covered));
                    covered = covered.max(last);
                } else {
                    let first = (at / BLOCK_SIZE).max(covered);
                    let last = end.div_ceil(BLOCK_SIZE).max(covered);
                    map.push(RunKind::Hole, first - covered);
                    map.push(RunKind::Data, last - first);
                    map.data_bytes += end - at;
                    covered = last;
                }
                at = end;
                if at == geometry.size() || map.runs.len() + 2 > MAP_RUNS {
                    break;
                }
            }
        }
        Ok(map)
    }

    fn read_blocks(
        &self,
        run: BlockRun,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
        _missing: Missing,
        each: Each<'_>,
    ) -> Result<(), Failure> {
        if context.io == IoChoice::Direct {
            let message = format!(
                "{} is not read by this agent alone: there is no --io",
                self.name
            );
            return Err(Failure::new(FailureCode::MissingRequirement, message));
        }
        let mut first = run.first;
        while first < run.end() {
            let count = admit(run.end() - first);
            let part = BlockRun { first, count };
            let (offset, len) = context.geometry.byte_range(part);
            let window = scratch.window().bytes();
            let window = &mut window[..usize::try_from(len).expect("at most a window")];
            let read = self.export.read(window, offset);
            read.map_err(|error| self.failed("reading", &error))?;
            for (index, block) in (first..).zip(window.chunks_mut(BLOCK_LEN)) {
                each(index, block)?;
            }
            first = part.end();
        }
        Ok(())
    }

    fn read_block(&self, block: &mut [u8], offset: u64, _missing: Missing) -> Result<(), Failure> {
        let read = self.export.read(block, offset);
        read.map_err(|error| self.failed("reading", &error))
    }

    fn write_block(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        let written = self.export.write(bytes, offset);
        written.map_err(|error| self.failed("writing", &error))
    }

    fn zero(&self, run: BlockRun, geometry: Geometry) -> Result<(), Failure> {
        let (mut offset, mut left) = geometry.byte_range(run);
        while left > 0 {
            let len = match self.export.has_write_zeroes() {
                true => left.min(ZEROS_LEN),
                false => left.min(BLOCK_SIZE),
            };
            let part = u32::try_from(len).expect("at most ZEROS_LEN");
            let zeroed = match self.export.has_write_zeroes() {
                true => self.export.write_zeroes(offset, part),
                false => self.export.write(&ZEROS[..part as usize], offset),
            };
            zeroed.map_err(|error| self.failed("zeroing", &error))?;
            offset += len;
            left -= len;
        }
        Ok(())
    }

    /// What reads as zeros already may well occupy no space, as far as a server tells.
    fn trim(&self, _run: BlockRun, _geometry: Geometry) {}

    /// When it writes is the server's own affair.
    fn start_writeback(&self, _blocks: &[WriteBlock]) {}
}
