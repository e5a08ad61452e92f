//! Files that share their blocks with others: copies that cost nothing, what two files have in common
//! without a look at their contents, and which blocks a file shares with none.

use std::io;
use std::ops::{Range, RangeInclusive};
use std::os::fd::AsRawFd;
use std::path::Path;

use kvm_clone_protocol::message::FailureCode;
use kvm_clone_protocol::units::{BLOCK_SIZE, BlockRun};
use nix::libc;

use super::attributes;
use super::file::DiskFile;
use super::image::Image;
use crate::failure::Failure;

/// `FS_IOC_FIEMAP` of linux/fs.h.
const FIEMAP: libc::c_ulong = 0xc020_660b;

/// `FIEMAP_FLAG_SYNC` of linux/fiemap.h: what waits in memory gets its place first.
const FLAG_SYNC: u32 = 1;

/// `FIEMAP_EXTENT_*` of linux/fiemap.h.
const LAST: u32 = 0x1;
const UNWRITTEN: u32 = 0x800;
const MERGED: u32 = 0x1000;
const SHARED: u32 = 0x2000;

/// Extents that are asked for at once: as many as fit beside other things on a thread's stack.
const EXTENTS: usize = 128;

/// A file without a name, in `directory`, that shares all blocks with `image`. Where there can be
/// none, the failure says what does without: `instead`.
pub(super) fn copy(image: &Image, directory: &Path, instead: &str) -> Result<DiskFile, Failure> {
    /// What file systems say that share no blocks, or not these.
    const CANNOT: [i32; 6] = [
        libc::EISDIR,
        libc::EOPNOTSUPP,
        libc::EINVAL,
        libc::ENOTTY,
        libc::EXDEV,
        libc::ENOSYS,
    ];
    let copied = DiskFile::create_nameless(directory).and_then(|file| {
        attributes::copy_nocow(&image.file, &file)?;
        file.clone_from(&image.file)?;
        Ok(file)
    });
    let can = |error: &io::Error| {
        let code = error.raw_os_error();
        code.is_none_or(|code| !CANNOT.contains(&code))
    };
    copied.map_err(|error| match can(&error) {
        true => image.failed("making a reflink copy of", &error),
        false => {
            let message = format!(
                "the file system of {} makes no reflink copies ({instead})",
                image.path.display()
            );
            Failure::new(FailureCode::MissingRequirement, message)
        }
    })
}

/// Which blocks of a run, up to byte `size`, are the same in both files because they are at the
/// same place of the storage. `one` must be a file that nobody writes to.
///
/// Only places count that the file system says are shared, for nobody writes to such a place; and
/// only extents that are plainly there: what is compressed or encrypted, written only in memory, not
/// written at all, or kept beside a file's other metadata may have one address and two contents.
///
/// # Errors
/// That of the file system; then nothing is known.
pub(super) fn in_common(
    one: &DiskFile,
    other: &DiskFile,
    run: BlockRun,
    size: u64,
) -> io::Result<Vec<bool>> {
    let end = run.end().saturating_mul(BLOCK_SIZE).min(size);
    let range = (run.first * BLOCK_SIZE).min(end)..end;
    // What moves within the storage meanwhile, as when it is balanced, could leave its place to the
    // other file's block.
    let before = extents(one, range.clone())?;
    let found = extents(other, range.clone())?;
    if extents(one, range.clone())? != before {
        return Err(io::ErrorKind::Interrupted.into());
    }
    Ok(same_places(&before, &found, run))
}

/// Which blocks of a run, up to byte `size`, have a place of their own on the storage, so that a file
/// system that writes in place needs no more of it for them. Unless it is plain that a block has, it
/// has not.
pub(super) fn own_places(file: &DiskFile, run: BlockRun, size: u64) -> Vec<bool> {
    let end = run.end().saturating_mul(BLOCK_SIZE).min(size);
    let range = (run.first * BLOCK_SIZE).min(end)..end;
    // A file system that tells nothing has nothing that is plain.
    own(&extents(file, range).unwrap_or_default(), run)
}

fn own(extents: &[Extent], run: BlockRun) -> Vec<bool> {
    let mut own = known(extents, run);
    for extent in extents.iter().filter(|extent| extent.place != Place::Own) {
        own[blocks_of(extent.start, extent.end, run)].fill(false);
    }
    own
}

/// Which blocks of a run begin within these extents.
fn known(extents: &[Extent], run: BlockRun) -> Vec<bool> {
    let end = extents.last().map_or(0, |last| last.end);
    (run.first..run.end())
        .map(|block| block * BLOCK_SIZE < end)
        .collect()
}

/// Where in a run the blocks are of which the bytes from `start` to `end` are a part.
fn blocks_of(start: u64, end: u64, run: BlockRun) -> RangeInclusive<usize> {
    let block = |at: u64| usize::try_from(at / BLOCK_SIZE - run.first).expect("at most a window");
    block(start)..=block(end - 1)
}

/// A part of a file, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    start: u64,
    end: u64,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Reads as zeros.
    Hole,
    /// From this byte of the storage on, shared with other files.
    Shared(u64),
    /// Somewhere, and shared with nobody.
    Own,
    /// Anything else.
    Other,
}

impl Extent {
    /// Whether both are at one place where byte `at` of the file is concerned.
    fn is_where(&self, other: &Self, at: u64) -> bool {
        match (self.place, other.place) {
            (Place::Hole, Place::Hole) => true,
            (Place::Shared(one), Place::Shared(two)) => {
                one + (at - self.start) == two + (at - other.start)
            }
            _ => false,
        }
    }
}

/// Which blocks of a run are at the same places in both files; each is given as all extents of one
/// range, which begins with the run.
fn same_places(one: &[Extent], other: &[Extent], run: BlockRun) -> Vec<bool> {
    let mut same = known(one, run);
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut at = run.first * BLOCK_SIZE;
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        let till = a.end.min(b.end);
        if !a.is_where(b, at) {
            same[blocks_of(at, till, run)].fill(false);
        }
        at = till;
        one.next_if(|extent| extent.end == at);
        other.next_if(|extent| extent.end == at);
    }
    same
}

/// `struct fiemap` and `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Found; EXTENTS],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Found {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

/// All of a range, in extents and the holes between them.
fn extents(file: &DiskFile, range: Range<u64>) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut at = range.start;
    let mut push = |start: u64, end: u64, place: Place| {
        if start < end {
            extents.push(Extent { start, end, place });
        }
    };
    while at < range.end {
        let request = ask(file, at, range.end - at)?;
        let mapped = request.mapped as usize;
        let found = request.extents.get(..mapped).unwrap_or_default();
        for found in found {
            let end = found.logical.saturating_add(found.length).min(range.end);
            if end <= at {
                continue;
            }
            // It begins before the range where it goes through its border.
            let start = found.logical.max(at).min(end);
            push(at, start, Place::Hole);
            let place = match found.flags & !(LAST | MERGED) {
                SHARED => Place::Shared(found.physical.wrapping_add(start - found.logical)),
                0 | UNWRITTEN => Place::Own,
                _ => Place::Other,
            };
            push(start, end, place);
            at = end;
        }
        if found.len() < EXTENTS {
            push(at, range.end, Place::Hole);
            at = range.end;
        } else if found.iter().all(|found| found.length == 0) {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(extents)
}

fn ask(file: &DiskFile, start: u64, length: u64) -> io::Result<Request> {
    // SAFETY: all-zero is a value of this plain structure.
    let mut request: Request = unsafe { std::mem::zeroed() };
    request.start = start;
    request.length = length;
    request.flags = FLAG_SYNC;
    request.count = u32::try_from(EXTENTS).expect("a small number");
    // SAFETY: the descriptor is open, and `request` has room for as many extents as it says.
    match unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, &raw mut request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(request),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Extents by their ends, in pages, from block 5 on.
    fn file(extents: &[(u64, Place)]) -> Vec<Extent> {
        let mut start = 5 * BLOCK_SIZE;
        let extent = |(pages, place): &(u64, Place)| {
            let end = start + pages * 4096;
            let extent = Extent {
                start,
                end,
                place: *place,
            };
            start = end;
            extent
        };
        extents.iter().map(extent).collect()
    }

    fn same(one: &[(u64, Place)], other: &[(u64, Place)]) -> Vec<bool> {
        same_places(&file(one), &file(other), BlockRun { first: 5, count: 3 })
    }

    #[test]
    fn blocks_are_the_same_where_all_of_them_is_at_one_place_that_is_shared() {
        use Place::{Hole, Own, Shared};
        let all = [(48, Shared(1 << 20))];
        assert_eq!(same(&all, &all), [true; 3]);
        // The same place, in other pieces; the last block is short.
        let pieces = [(3, Shared(1 << 20)), (44, Shared((1 << 20) + 3 * 4096))];
        assert_eq!(same(&[(47, Shared(1 << 20))], &pieces), [true; 3]);
        assert_eq!(same(&[(48, Hole)], &[(20, Hole), (28, Hole)]), [true; 3]);
        // One page of the second block lies elsewhere; then all from there on is shifted.
        let moved = [
            (17, Shared(1 << 20)),
            (1, Shared(9 << 20)),
            (30, Shared((1 << 20) + 18 * 4096)),
        ];
        assert_eq!(same(&all, &moved), [true, false, true]);
        let shifted = [(16, Shared(1 << 20)), (32, Shared((1 << 20) + 15 * 4096))];
        assert_eq!(same(&all, &shifted), [true, false, false]);
        // Borders of blocks: their last page, and the first of the next.
        let last = [
            (15, Shared(1 << 20)),
            (1, Own),
            (32, Shared((1 << 20) + 16 * 4096)),
        ];
        assert_eq!(same(&all, &last), [false, true, true]);
        let first = [
            (16, Shared(1 << 20)),
            (1, Own),
            (31, Shared((1 << 20) + 17 * 4096)),
        ];
        assert_eq!(same(&all, &first), [true, false, true]);
        // What is anywhere in its own way is never the same, not even as itself.
        assert_eq!(same(&[(48, Own)], &[(48, Own)]), [false; 3]);
        assert_eq!(same(&[(48, Hole)], &all), [false; 3]);
        // Beyond the end of the file nothing is known.
        assert_eq!(same(&[(16, Hole)], &[(16, Hole)]), [true, false, false]);
        assert_eq!(same(&[], &[]), [false; 3]);
    }

    #[test]
    fn a_block_has_its_own_place_where_all_of_it_has() {
        use Place::{Hole, Other, Own, Shared};
        let has = |extents: &[(u64, Place)]| {
            let run = BlockRun { first: 5, count: 3 };
            own(&file(extents), run)
        };
        assert_eq!(has(&[(20, Own), (28, Own)]), [true; 3]);
        assert_eq!(has(&[(16, Own), (1, Hole), (31, Own)]), [true, false, true]);
        let shared = [(31, Own), (1, Shared(1 << 20)), (16, Own)];
        assert_eq!(has(&shared), [true, false, true]);
        assert_eq!(has(&[(32, Own), (16, Other)]), [true, true, false]);
        // The last block is short; beyond it nothing is known.
        assert_eq!(has(&[(17, Own)]), [true, true, false]);
        assert_eq!(has(&[]), [false; 3]);
    }
}
