//! Holes and data of a disk, by `SEEK_DATA` and `SEEK_HOLE`.

use std::io;
use std::os::fd::AsFd;

use kvm_clone_protocol::sync::{MAP_RUNS, MapRun, RunKind};
use kvm_clone_protocol::units::{BLOCK_SIZE, Geometry};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::image::Image;
use crate::failure::Failure;

/// A part of a disk's map.
#[derive(Debug, Default)]
pub(super) struct Map {
    pub(super) runs: Vec<MapRun>,
    /// Bytes of data in them, not rounded to blocks.
    pub(super) data_bytes: u64,
}

impl Image {
    /// The runs from block `from` on. What lies past the end of the file is a hole. A file system
    /// or device that cannot tell its holes is data throughout: zeros are then found by looking.
    pub(super) fn map(&self, from: u64, geometry: Geometry) -> Result<Map, Failure> {
        let total = geometry.block_count();
        let mut map = Map::default();
        // Extents are byte ranges; blocks that they share belong to the first.
        let (mut at, mut covered) = (from * BLOCK_SIZE, from);
        while covered < total {
            let Some((start, end)) = self.next_data(at, geometry)? else {
                map.push(RunKind::Hole, total - covered);
                break;
            };
            let first = (start / BLOCK_SIZE).max(covered);
            if first > covered && map.runs.len() + 2 > MAP_RUNS {
                break;
            }
            let last = end.div_ceil(BLOCK_SIZE).max(covered);
            map.push(RunKind::Hole, first - covered);
            map.push(RunKind::Data, last - first);
            map.data_bytes += end - start;
            (at, covered) = (end, last);
        }
        Ok(map)
    }

    /// The first extent of data at or after byte `at`, if there is one.
    fn next_data(&self, at: u64, geometry: Geometry) -> Result<Option<(u64, u64)>, Failure> {
        let size = geometry.size();
        if self.is_device {
            return Ok((at < size).then_some((at, size)));
        }
        let start = match self.seek(at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => at,
            Err(error) => return Err(self.seek_failed(at, error)),
        };
        if start >= size {
            return Ok(None);
        }
        let end = match self.seek(start, Whence::SeekHole) {
            Ok(end) => end.clamp(start + 1, size),
            // It cannot tell holes, or was cut in between, which reading will notice.
            Err(Errno::ENXIO | Errno::EINVAL | Errno::EOPNOTSUPP) => size,
            Err(error) => return Err(self.seek_failed(start, error)),
        };
        Ok(Some((start, end)))
    }

    fn seek(&self, offset: u64, whence: Whence) -> nix::Result<u64> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        lseek(self.file.as_fd(), offset, whence)
            .and_then(|offset| u64::try_from(offset).map_err(|_| Errno::EOVERFLOW))
    }

    fn seek_failed(&self, offset: u64, error: Errno) -> Failure {
        self.failed_at("looking for data in", offset, &io::Error::from(error))
    }
}

impl Map {
    /// Appends a run, joined with the one before where they are alike.
    pub(super) fn push(&mut self, kind: RunKind, count: u64) {
        match self.runs.last_mut() {
            _ if count == 0 => {}
            Some(last) if last.kind == kind => last.count += count,
            _ => self.runs.push(MapRun { kind, count }),
        }
    }
}
