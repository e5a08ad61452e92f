//! What images hold: their size, their space, and where two of them differ.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Whence, lseek};

use super::{BLOCK, PAGE, open_read, size_of};

/// Size in bytes, of a file or a block device.
///
/// # Panics
/// When it cannot be read.
#[must_use]
pub fn length(path: &Path) -> u64 {
    let end = lseek(open_read(path), 0, Whence::SeekEnd);
    end.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .cast_unsigned()
}

/// Bytes of the disk that the file occupies.
///
/// # Panics
/// When there is no such file.
#[must_use]
pub fn allocated(path: &Path) -> u64 {
    let metadata = std::fs::metadata(path);
    metadata
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .blocks()
        * 512
}

/// The stretches of a file that are not holes; of a block device, all of it.
fn extents(file: &File, size: u64) -> Vec<(u64, u64)> {
    let seek =
        |offset: u64, whence| lseek(file, offset.cast_signed(), whence).map(i64::cast_unsigned);
    let mut found = Vec::new();
    let mut offset = 0;
    while offset < size {
        // ENXIO: no data from here on. Any other error: a device, which is all data.
        let start = match seek(offset, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::errno::Errno::ENXIO) => break,
            Err(_) => return vec![(0, size)],
        };
        let end = seek(start, Whence::SeekHole).map_or(size, |end| end.min(size));
        found.push((start, end));
        offset = end;
    }
    found
}

/// Takes a file out of the page cache.
///
/// # Panics
/// When that fails.
pub fn evict(path: &Path) {
    let file = open_read(path);
    file.sync_all().expect("the file can be written out");
    let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    posix_fadvise(file, 0, 0, advice).expect("it is a file");
}

/// Bytes of a file that are not holes.
#[must_use]
pub fn data_bytes(path: &Path) -> u64 {
    extents(&open_read(path), length(path))
        .iter()
        .map(|(start, end)| end - start)
        .sum()
}

/// Bytes of the 4 KiB pages that hold anything but zeros: the least that a sparse copy occupies.
#[must_use]
pub fn nonzero_bytes(path: &Path) -> u64 {
    let (file, size) = (open_read(path), length(path));
    let mut pages = 0;
    each_unit(&[extents(&file, size)], size, PAGE, |offset, len| {
        pages += u64::from(!is_zero(&read(&file, offset, len)));
    });
    pages * PAGE
}

/// What a run has to do to make `destination` hold what `source` holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Difference {
    /// Blocks of the source that differ and are not all zeros.
    pub changed: u64,
    /// Blocks that differ and are all zeros in the source.
    pub zeroed: u64,
    /// Blocks of the source in all.
    pub total: u64,
    /// Bytes of the blocks that differ.
    pub bytes: u64,
    /// The first byte that differs.
    pub first: Option<u64>,
}

/// Compares over the source's length; a destination that is missing or shorter reads as zeros.
#[must_use]
pub fn difference(source: &Path, destination: &Path) -> Difference {
    let size = length(source);
    let mut found = Difference {
        total: size.div_ceil(BLOCK),
        ..Difference::default()
    };
    let from = open_read(source);
    let to = destination.exists().then(|| open_read(destination));
    let to_size = to.as_ref().map_or(0, |_| length(destination));
    let to_extents = to.as_ref().map_or_else(Vec::new, |to| extents(to, to_size));
    each_unit(
        &[extents(&from, size), to_extents],
        size,
        BLOCK,
        |offset, len| {
            let wanted = read(&from, offset, len);
            let present = to
                .as_ref()
                .map_or_else(|| vec![0; len], |to| read(to, offset, len));
            if wanted == present {
                return;
            }
            let zero = is_zero(&wanted);
            found.changed += u64::from(!zero);
            found.zeroed += u64::from(zero);
            found.bytes += len as u64;
            found.first = found.first.or_else(|| {
                let place = wanted.iter().zip(&present).position(|(a, b)| a != b)?;
                Some(offset + place as u64)
            });
        },
    );
    found
}

/// Claims that two images have one size and the same bytes.
///
/// # Panics
/// When they differ; says where.
pub fn assert_equal(source: &Path, destination: &Path) {
    assert_eq!(
        length(source),
        length(destination),
        "size of {}",
        destination.display()
    );
    assert_same_start(source, destination);
}

/// Claims that a destination, which may be larger, begins with the bytes of the source.
///
/// # Panics
/// When they differ; says where.
pub fn assert_same_start(source: &Path, destination: &Path) {
    assert!(
        length(source) <= length(destination),
        "{} is too small",
        destination.display()
    );
    let found = difference(source, destination);
    assert_eq!(
        found.first,
        None,
        "first byte of {} that differs",
        destination.display()
    );
}

/// Calls with every unit of which some part lies in one of the lists of extents, in order.
fn each_unit(lists: &[Vec<(u64, u64)>], size: u64, unit: u64, mut each: impl FnMut(u64, usize)) {
    let mut extents: Vec<_> = lists.iter().flatten().collect();
    extents.sort_unstable();
    let mut next = 0;
    for (start, end) in extents {
        let mut offset = (start / unit * unit).max(next);
        while offset < *end && offset < size {
            each(offset, size_of(unit.min(size - offset)));
            offset += unit;
        }
        next = next.max(offset);
    }
}

fn read(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = vec![0; len];
    let mut filled = 0;
    while filled < len {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break, // Past its end a shorter image reads as zeros.
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => panic!("reading at byte {offset}: {error}"),
        }
    }
    buffer
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; 65536] = [0; 65536];
    bytes
        .chunks(ZEROS.len())
        .all(|chunk| chunk == &ZEROS[..chunk.len()])
}
