//! Being a good guest in the host's page cache: what a scan brought in, it drops again; what was
//! there before stays.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;

use super::image::Image;

/// The page size that residency is counted in; larger pages only make the answer coarser.
const PAGE: usize = 4096;

/// `cachestat`, since Linux 6.5; it has the same number on every architecture.
const CACHESTAT: libc::c_long = 451;

/// What of a byte range was in the page cache before it was read.
#[derive(Debug)]
pub(super) enum Cached {
    /// All of it, or the kernel does not tell.
    All,
    None,
    /// A byte for each page, its lowest bit set for those that were.
    Some(Vec<u8>),
}

impl Image {
    /// Switches off the kernel's own read-ahead, which would reach into the next window and make
    /// it look as if it had been in the cache before: windows are read ahead one by one instead.
    pub(super) fn read_in_windows(&self) {
        self.advise(0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    }

    /// Looks what of a range, offset and length, is in the cache.
    pub(super) fn cached(&self, (offset, len): (u64, u64)) -> Cached {
        let file = self.file.as_file();
        // Most often all of it is, or nothing: the cheap question first.
        match cached_pages(file, offset, len) {
            Some(0) => return Cached::None,
            Some(pages) if pages == len.div_ceil(PAGE as u64) => return Cached::All,
            _ => {}
        }
        match residency(file, offset, len) {
            Err(_) => Cached::All,
            Ok(pages) if pages.iter().all(|page| page & 1 == 1) => Cached::All,
            Ok(pages) if pages.iter().all(|page| page & 1 == 0) => Cached::None,
            Ok(pages) => Cached::Some(pages),
        }
    }

    /// Has what is missing of a range read, so that it is there when it is asked for.
    pub(super) fn warm_up(&self, (offset, len): (u64, u64), cached: &Cached) {
        if !matches!(cached, Cached::All) {
            self.advise(offset, len, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
        }
    }

    /// Drops the pages of a range that were not in the cache before.
    pub(super) fn cool_down(&self, (offset, len): (u64, u64), cached: &Cached) {
        let drop = |at: u64, len: u64| {
            self.advise(offset + at, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        };
        match cached {
            Cached::All => {}
            // Past the cache nothing comes, but where the file system cannot do that after all.
            Cached::None => drop(0, len),
            Cached::Some(pages) => {
                let mut at = 0;
                for run in pages.chunk_by(|one, next| one & 1 == next & 1) {
                    let len = (run.len() * PAGE) as u64;
                    if run[0] & 1 == 0 {
                        drop(at, len);
                    }
                    at += len;
                }
            }
        }
    }

    /// Drops everything that is clean.
    pub(super) fn drop_cache(&self) {
        self.advise(0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }

    /// Advice that is not taken changes nothing but speed, so errors are of no interest.
    fn advise(&self, offset: u64, len: u64, advice: PosixFadviseAdvice) {
        if let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) {
            let _ = posix_fadvise(self.file.as_fd(), offset, len, advice);
        }
    }
}

/// `struct cachestat_range` and `struct cachestat` of linux/mman.h.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Found {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How many pages of the range are in the page cache; `None` before Linux 6.5, or where the kernel
/// does not tell. It brings nothing into the cache, as a read that must not wait would.
fn cached_pages(file: &std::fs::File, offset: u64, len: u64) -> Option<u64> {
    let range = Range { offset, len };
    let mut found = Found::default();
    // SAFETY: both structures are as the kernel has them, and live for as long as the call.
    let result = unsafe {
        let (range, found) = (&raw const range, &raw mut found);
        libc::syscall(CACHESTAT, file.as_raw_fd(), range, found, 0)
    };
    (result == 0).then_some(found.cached)
}

/// One byte for each page of the range, its lowest bit set when the page is in the cache.
fn residency(file: &std::fs::File, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let (at, bytes) = (
        i64::try_from(offset).map_err(invalid)?,
        usize::try_from(len).map_err(invalid)?,
    );
    let mut pages = vec![0; bytes.div_ceil(PAGE)];
    // SAFETY: a new private mapping that nothing reads: it is only asked about and unmapped
    // again, so a file that shrinks meanwhile cannot fault. `pages` has a byte for each page.
    unsafe {
        let map = libc::mmap(
            ptr::null_mut(),
            bytes,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            at,
        );
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let result = libc::mincore(map, bytes, pages.as_mut_ptr());
        let error = io::Error::last_os_error();
        libc::munmap(map, bytes);
        if result == -1 { Err(error) } else { Ok(pages) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use kvm_clone_protocol::digest::{Digester, HashKind, Seed};
    use kvm_clone_protocol::message::{Access, Compression, IoChoice};
    use kvm_clone_protocol::sync::{DiskOp, Expected};
    use kvm_clone_protocol::units::{BlockRun, Geometry};

    use super::*;
    use crate::compress::Compressor;
    use crate::disk::{Disk, Scratch, SessionContext, Target, open_path};

    const SIZE: u64 = 4 << 20;

    /// Scans a file of which the first half is in the cache, as one end of a session does; returns
    /// what is there afterwards.
    fn cached_after_a_scan(
        directory: &std::path::Path,
        op: impl Fn(BlockRun) -> DiskOp,
        io: IoChoice,
    ) -> Option<Vec<bool>> {
        let path = directory.join("disk");
        let mut file = File::create_new(&path).unwrap();
        file.write_all(&[7; 4 << 20]).unwrap();
        file.sync_all().unwrap();
        let Target::Readable(image) = open_path(&path, Access::Source).unwrap() else {
            panic!("the file was just made");
        };
        image.drop_cache();
        if residency(&file, 0, SIZE)
            .unwrap()
            .iter()
            .any(|page| page & 1 == 1)
        {
            return None;
        }
        let compressor = Compressor::new(Compression::Off);
        let context = SessionContext {
            geometry: Geometry::new(SIZE).unwrap(),
            digester: Digester::new(HashKind::Xxh3, Seed([0; 32])),
            compressor: &compressor,
            kept: None,
            io,
        };
        let start = &mut [0; 1 << 20];
        assert_eq!(image.file.read_full_at(start, 0).unwrap(), 1 << 20);
        let disk = Disk::of(image);
        let before = residency(&file, 0, SIZE).unwrap();
        assert_eq!(before.iter().filter(|page| **page & 1 == 1).count(), 256);
        assert_eq!(cached_pages(&file, 0, SIZE).unwrap_or(256), 256);
        for first in [0, 32] {
            let run = BlockRun { first, count: 32 };
            disk.run(op(run), &context, &mut Scratch::new()).unwrap();
        }
        let after = residency(&file, 0, SIZE).unwrap();
        Some(after.iter().map(|page| page & 1 == 1).collect())
    }

    #[test]
    fn a_scan_of_a_destination_leaves_the_page_cache_as_it_was() {
        is_left_as_it_was(|run| DiskOp::Digest { run });
    }

    #[test]
    fn a_scan_of_a_source_leaves_the_page_cache_as_it_was() {
        is_left_as_it_was(|run| DiskOp::Compare {
            run,
            expected: Expected::Zeros,
            ship: true,
        });
    }

    fn is_left_as_it_was(op: impl Fn(BlockRun) -> DiskOp) {
        for io in [IoChoice::Auto, IoChoice::Buffered, IoChoice::Direct] {
            is_left_as_it_was_by(&op, io);
        }
    }

    fn is_left_as_it_was_by(op: impl Fn(BlockRun) -> DiskOp, io: IoChoice) {
        // Beside the executable is a disk; the directory for temporary files may be memory.
        let here = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let Some(cached) = cached_after_a_scan(directory.path(), op, io) else {
            eprintln!(
                "SKIPPED: {} keeps everything in its cache",
                directory.path().display()
            );
            return;
        };
        assert!(
            cached[..256].iter().all(|page| *page),
            "{io:?}: what was there stays"
        );
        assert!(
            cached[256..].iter().all(|page| !page),
            "{io:?}: what the scan brought goes"
        );
    }
}
