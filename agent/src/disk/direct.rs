//! Reading past the page cache (`O_DIRECT`): what nobody has in memory comes from the storage in
//! large pieces, is not copied, and leaves nothing behind.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;

use super::file::DiskFile;
use super::image::Image;

/// What direct reads must be aligned to: the sector size of every disk that we know.
const ALIGN: usize = 4096;

/// Memory for direct reads.
#[derive(Debug)]
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// Room for `len` bytes, a multiple of 4096.
    pub(super) fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN);
        Self { memory, start, len }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl Image {
    /// Whether it can be read past the page cache.
    pub(super) fn has_direct(&self) -> bool {
        self.direct().is_some()
    }

    /// The same file once more, to be read past the page cache. Not every file system can.
    fn direct(&self) -> Option<&DiskFile> {
        let open = || {
            let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let mut options = OpenOptions::new();
            let file = options.read(true).custom_flags(libc::O_DIRECT).open(own);
            file.ok().map(DiskFile::new)
        };
        self.direct.get_or_init(open).as_ref()
    }

    /// Reads `len` bytes from `offset` on, which is aligned, past the page cache. What lies beyond
    /// the end of the file is left out: returns how much was there. `None` where this cannot be
    /// done, or failed: an ordinary read knows which byte it failed at.
    pub(super) fn read_direct(
        &self,
        offset: u64,
        len: usize,
        memory: &mut Aligned,
    ) -> Option<usize> {
        let file = self.direct()?;
        let bytes = memory.bytes().get_mut(..len.next_multiple_of(ALIGN))?;
        let mut filled = 0;
        while filled < len {
            match file.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(_) => return None,
            }
            // Nothing can be read behind a piece that is not aligned: it must be the last.
            if filled < len && !filled.is_multiple_of(ALIGN) {
                let end = self.size().ok()?;
                if offset + (filled as u64) < end {
                    return None;
                }
                break;
            }
        }
        Some(filled.min(len))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use kvm_clone_protocol::digest::{Content, DIGEST_LEN, Digester, HashKind, Seed};
    use kvm_clone_protocol::message::{Access, Compression, FailureCode, IoChoice};
    use kvm_clone_protocol::sync::{Compared, DiskDone, DiskOp, Expected, content_at};
    use kvm_clone_protocol::units::{BLOCK_LEN, BlockRun, Geometry};

    use super::*;
    use crate::compress::Compressor;
    use crate::disk::{Disk, Scratch, SessionContext, Target, open_path};
    use crate::failure::Failure;

    /// Three blocks and a short one.
    const LEN: usize = 3 * BLOCK_LEN + 4096 + 777;

    fn image(path: &Path) -> Arc<Image> {
        let Target::Readable(image) = open_path(path, Access::Source).unwrap() else {
            panic!("a source is only read");
        };
        // Nothing of it is in memory, so that it is read past the cache where that is chosen.
        image.file.sync().unwrap();
        image.drop_cache();
        image
    }

    fn digester() -> Digester {
        Digester::new(HashKind::Xxh3, Seed([9; 32]))
    }

    fn run(image: Arc<Image>, size: u64, io: IoChoice, op: DiskOp) -> Result<DiskDone, Failure> {
        let context = SessionContext {
            geometry: Geometry::new(size).unwrap(),
            digester: digester(),
            compressor: &Compressor::new(Compression::Off),
            kept: None,
            io,
        };
        Disk::of(image).run(op, &context, &mut Scratch::new())
    }

    #[test]
    fn all_ways_of_reading_see_the_same_bytes_to_the_last_one() {
        let here = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let path = directory.path().join("disk");
        let mut bytes: Vec<u8> = (0..LEN).map(|at| (at / 251).to_le_bytes()[0]).collect();
        std::fs::write(&path, &bytes).unwrap();
        // As the receiver of a larger disk sees it.
        let size = 5 * BLOCK_LEN;
        bytes.resize(size, 0);
        let contents: Vec<Content> = bytes
            .chunks(BLOCK_LEN)
            .map(|block| digester().content(block))
            .collect();
        for io in [IoChoice::Auto, IoChoice::Buffered, IoChoice::Direct] {
            let all = BlockRun { first: 0, count: 5 };
            let op = DiskOp::Digest { run: all };
            let Ok(DiskDone::Digested(digests)) = run(image(&path), size as u64, io, op) else {
                panic!("{io:?}: the file can be read");
            };
            let seen: Vec<Content> = (0..digests.len() / DIGEST_LEN)
                .map(|at| content_at(&digests, at))
                .collect();
            assert_eq!(seen, contents, "{io:?}");

            let compare = |count| DiskOp::Compare {
                run: BlockRun { first: 0, count },
                expected: Expected::Zeros,
                ship: true,
            };
            let done = run(image(&path), LEN as u64, io, compare(4)).unwrap();
            let DiskDone::Compared(blocks) = done else {
                panic!("{io:?}: {done:?}");
            };
            let shipped: Vec<u8> = blocks
                .iter()
                .flat_map(|block| match block {
                    Compared::Changed { payload, .. } => payload.to_vec(),
                    other => panic!("{io:?}: {other:?}"),
                })
                .collect();
            assert_eq!(shipped, bytes[..LEN], "{io:?}");

            // A source must have every byte; the first that is missing is named.
            let failure = run(image(&path), size as u64, io, compare(5)).unwrap_err();
            assert_eq!(failure.offset, Some(LEN as u64), "{io:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_past_the_cache_is_read_through_it_or_refused() {
        let here = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, [7; BLOCK_LEN]).unwrap();
        let digest = |io| {
            let image = image(&path);
            image.direct.set(None).unwrap();
            let run_of_one = BlockRun { first: 0, count: 1 };
            run(
                image,
                BLOCK_LEN as u64,
                io,
                DiskOp::Digest { run: run_of_one },
            )
        };
        assert!(digest(IoChoice::Auto).is_ok());
        assert!(digest(IoChoice::Buffered).is_ok());
        let failure = digest(IoChoice::Direct).unwrap_err();
        assert_eq!(failure.code, FailureCode::MissingRequirement);
    }
}
