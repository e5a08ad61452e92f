//! Writing blocks, and making holes.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;

use kvm_clone_protocol::digest::is_zero;
use kvm_clone_protocol::message::FailureCode;
use kvm_clone_protocol::sync::{RunKind, WriteBlock};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::libc;
use zstd::zstd_safe;

use super::image::Image;
use crate::failure::Failure;

/// The grain of holes inside a block: the block size of the usual file systems.
const GRAIN: usize = 4096;

/// Zeros to write where no hole can be had: made when they are needed, since a constant would be
/// another block of every agent that is sent to a host.
pub(super) static ZEROS: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; BLOCK_LEN]);

impl Image {
    /// Writes a block with its zero pages as holes.
    pub(super) fn write_block(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        if self.is_device {
            return self.write_all(offset, bytes);
        }
        let mut at = offset;
        let pages: Vec<(bool, usize)> = bytes
            .chunks(GRAIN)
            .map(|page| (is_zero(page), page.len()))
            .collect();
        let mut rest = bytes;
        for run in pages.chunk_by(|one, next| one.0 == next.0) {
            let len = run.iter().map(|(_, len)| len).sum();
            let (part, after) = rest.split_at(len);
            if run[0].0 {
                self.make_hole(at, len as u64)?;
            } else {
                self.write_all(at, part)?;
            }
            at += len as u64;
            rest = after;
        }
        Ok(())
    }

    /// Makes blocks read as zeros.
    pub(super) fn zero(&self, run: BlockRun, geometry: Geometry) -> Result<(), Failure> {
        let (offset, len) = geometry.byte_range(run);
        if self.is_device {
            self.zero_device(offset, len)
        } else {
            self.make_hole(offset, len)
        }
    }

    /// Gives back the space of blocks that read as zeros already. Not worth an error, and nothing
    /// that a device promises.
    pub(super) fn trim(&self, run: BlockRun, geometry: Geometry) {
        if !self.is_device {
            let (offset, len) = geometry.byte_range(run);
            let _ = self.file.allocate(punch(), offset, len);
        }
    }

    pub(super) fn make_hole(&self, offset: u64, len: u64) -> Result<(), Failure> {
        if self.is_fresh {
            return Ok(());
        }
        match self.file.allocate(punch(), offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::EOPNOTSUPP) => {
                // Past the end there is nothing to overwrite; the final length makes it zeros.
                let end = self.size()?.min(offset + len);
                self.write_zeros(offset, end.saturating_sub(offset))
            }
            Err(error) => Err(self.failed_at("punching a hole in", offset, &error.into())),
        }
    }

    /// `PUNCH_HOLE` on a device unmaps only where the kernel knows that zeros will be read;
    /// `ZERO_RANGE` writes zeros in the cheapest way that the device has.
    fn zero_device(&self, offset: u64, len: u64) -> Result<(), Failure> {
        // Devices take whole sectors; the short last block may end inside one.
        let whole = len / GRAIN as u64 * GRAIN as u64;
        for flags in [punch(), FallocateFlags::FALLOC_FL_ZERO_RANGE | keep_size()] {
            match self.file.allocate(flags, offset, whole) {
                Ok(()) => return self.write_zeros(offset + whole, len - whole),
                Err(Errno::EOPNOTSUPP | Errno::EINVAL) => {}
                Err(error) => return Err(self.failed_at("zeroing", offset, &error.into())),
            }
        }
        self.write_zeros(offset, len)
    }

    fn write_zeros(&self, mut offset: u64, mut len: u64) -> Result<(), Failure> {
        while len > 0 {
            let part = usize::try_from(len.min(BLOCK_SIZE)).expect("at most a block");
            self.write_all(offset, &ZEROS[..part])?;
            offset += part as u64;
            len -= part as u64;
        }
        Ok(())
    }

    fn write_all(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(|error| self.failed_at("writing", offset, &error))
    }

    /// Has the kernel start writing to the disk now, so that the fsync at the end finds little
    /// left to do.
    pub(super) fn start_writeback(&self, blocks: &[WriteBlock]) {
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else {
            return;
        };
        let (start, end) = (first.index * BLOCK_SIZE, (last.index + 1) * BLOCK_SIZE);
        if let (Ok(start), Ok(len)) = (i64::try_from(start), i64::try_from(end - start)) {
            // SAFETY: a system call on a descriptor that is open; no memory is involved. It is
            // advice, so its result is of no interest.
            unsafe {
                libc::sync_file_range(
                    self.file.as_raw_fd(),
                    start,
                    len,
                    libc::SYNC_FILE_RANGE_WRITE,
                );
            }
        }
    }

    /// Makes a file long enough before anything is written to it: a file that grows write by
    /// write is given space ahead by xfs, which stays in its holes.
    pub(super) fn grow(&self, geometry: Geometry) -> Result<(), Failure> {
        if self.is_device || self.size()? >= geometry.size() {
            return Ok(());
        }
        self.file
            .set_len(geometry.size())
            .map_err(|error| self.failed("extending", &error))
    }

    /// Gives a destination its final length, makes everything durable, and lets go of the page
    /// cache that a new file filled.
    pub(super) fn finish(&self, geometry: Geometry) -> Result<(), Failure> {
        if !self.is_device {
            if self.size()? != geometry.size() {
                self.file
                    .set_len(geometry.size())
                    .map_err(|error| self.failed("setting the length of", &error))?;
            }
            if !self.is_fresh {
                self.punch_preallocated(geometry)?;
            }
        }
        self.file
            .sync()
            .map_err(|error| self.failed("syncing", &error))?;
        if self.is_fresh {
            self.drop_cache();
        }
        Ok(())
    }

    /// Whether no byte of a run occupies space.
    pub(super) fn is_hole(&self, run: BlockRun, geometry: Geometry) -> Result<bool, Failure> {
        let map = self.map(run.first, geometry)?;
        Ok(map
            .runs
            .first()
            .is_some_and(|first| first.kind == RunKind::Hole && first.count >= run.count))
    }

    /// Punches the holes of a file that is preallocated: they read as zeros but occupy space,
    /// which neither a scan nor `SEEK_DATA` shows.
    pub(super) fn punch_preallocated(&self, geometry: Geometry) -> Result<(), Failure> {
        let mut holes = Vec::new();
        let (mut at, mut data_bytes) = (0, 0);
        while at < geometry.block_count() {
            let map = self.map(at, geometry)?;
            data_bytes += map.data_bytes;
            for run in map.runs {
                let blocks = BlockRun {
                    first: at,
                    count: run.count,
                };
                if run.kind == RunKind::Hole {
                    holes.push(blocks);
                }
                at = blocks.end();
            }
        }
        // st_blocks counts in units of 512 bytes; a hundredth is the file system's own maps.
        let allocated = self.metadata()?.blocks() * 512;
        if allocated > data_bytes + data_bytes / 100 + BLOCK_SIZE {
            for run in holes {
                self.trim(run, geometry);
            }
        }
        Ok(())
    }
}

pub(super) fn keep_size() -> FallocateFlags {
    FallocateFlags::FALLOC_FL_KEEP_SIZE
}

pub(super) fn punch() -> FallocateFlags {
    FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep_size()
}

/// Decompresses a block into `out`, which bounds what a hostile frame can make of it.
pub(super) fn decompress<'a>(
    index: u64,
    payload: &[u8],
    out: &'a mut [u8],
    decompressor: &mut Option<zstd::bulk::Decompressor<'static>>,
) -> Result<&'a [u8], Failure> {
    let bad = |what: &str| {
        Failure::new(
            FailureCode::Protocol,
            format!("block {index} does not decompress: {what}"),
        )
    };
    // Frames in a row would all be decompressed, and some hold nothing but what is to be skipped.
    match zstd_safe::find_frame_compressed_size(payload) {
        Ok(len) if len == payload.len() => {}
        Ok(_) => return Err(bad("something follows its frame")),
        Err(error) => return Err(bad(zstd_safe::get_error_name(error))),
    }
    let decompressor = match decompressor {
        Some(decompressor) => decompressor,
        none => none.insert(
            zstd::bulk::Decompressor::new().map_err(|error: io::Error| bad(&error.to_string()))?,
        ),
    };
    let len = decompressor
        .decompress_to_buffer(payload, out)
        .map_err(|error| bad(&error.to_string()))?;
    if len == out.len() {
        Ok(out)
    } else {
        Err(bad("it is too short"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_one_frame_of_its_length() {
        let compress = |len| zstd::bulk::compress(&vec![7; len], 1).unwrap();
        let (half, whole) = (compress(BLOCK_LEN / 2), compress(BLOCK_LEN));
        // By RFC 8878 a decoder skips this.
        let skipped = b"\x50\x2a\x4d\x18\x01\0\0\0x";
        let bad = [
            [&half[..], &half].concat(),
            [&whole[..], skipped].concat(),
            [&skipped[..], &whole].concat(),
            [&whole[..], b"x"].concat(),
            skipped.to_vec(),
            compress(BLOCK_LEN + 1),
            half,
        ];
        let (mut out, mut context) = ([0; BLOCK_LEN], None);
        for payload in bad {
            let failure = decompress(5, &payload, &mut out, &mut context).unwrap_err();
            assert_eq!(failure.code, FailureCode::Protocol);
            assert!(failure.message.starts_with("block 5 does not decompress"));
        }
        let good = decompress(5, &whole, &mut out, &mut context).unwrap();
        assert!(good.iter().all(|byte| *byte == 7));
    }
}
