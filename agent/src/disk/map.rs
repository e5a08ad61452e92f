//! Holes and data of a disk, by `SEEK_DATA` and `SEEK_HOLE`.

use std::io;
use std::os::fd::AsFd;

use kvm_clone_protocol::sync::{MAP_RUNS, MapRun, RunKind};
use kvm_clone_protocol::units::{BLOCK_SIZE, Geometry};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::Disk;
use crate::failure::Failure;

impl Disk {
    /// The runs from block `from` on. What lies past the end of the file is a hole. A file system
    /// or device that cannot tell its holes is data throughout: zeros are then found by looking.
    pub(super) fn map(&self, from: u64, geometry: Geometry) -> Result<Vec<MapRun>, Failure> {
        let total = geometry.block_count();
        if self.is_device {
            return Ok(vec![MapRun {
                kind: RunKind::Data,
                count: total - from,
            }]);
        }
        let mut runs = Vec::new();
        let mut at = from;
        while at < total && runs.len() < MAP_RUNS - 1 {
            let (data, end) = self.next_data(at, total)?;
            push(&mut runs, RunKind::Hole, data - at);
            push(&mut runs, RunKind::Data, end - data);
            at = end;
        }
        Ok(runs)
    }

    /// The first block with data at or after block `at`, and the block after that data; both are
    /// `total` when there is none.
    fn next_data(&self, at: u64, total: u64) -> Result<(u64, u64), Failure> {
        let start = match self.seek(at * BLOCK_SIZE, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok((total, total)),
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok((at, total)),
            Err(error) => return Err(self.seek_failed(at, error)),
        };
        let data = (start / BLOCK_SIZE).max(at);
        if data >= total {
            return Ok((total, total));
        }
        let end = match self.seek(start, Whence::SeekHole) {
            Ok(end) => end.div_ceil(BLOCK_SIZE),
            // The file was cut in between: reading will say so.
            Err(Errno::ENXIO) => total,
            Err(error) => return Err(self.seek_failed(at, error)),
        };
        Ok((data, end.clamp(data + 1, total)))
    }

    fn seek(&self, offset: u64, whence: Whence) -> nix::Result<u64> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        lseek(self.file.as_fd(), offset, whence)
            .and_then(|offset| u64::try_from(offset).map_err(|_| Errno::EOVERFLOW))
    }

    fn seek_failed(&self, block: u64, error: Errno) -> Failure {
        self.failed_at(
            "looking for data in",
            block * BLOCK_SIZE,
            &io::Error::from(error),
        )
    }
}

/// Appends a run, joined with the one before where they are alike.
fn push(runs: &mut Vec<MapRun>, kind: RunKind, count: u64) {
    match runs.last_mut() {
        _ if count == 0 => {}
        Some(last) if last.kind == kind => last.count += count,
        _ => runs.push(MapRun { kind, count }),
    }
}
