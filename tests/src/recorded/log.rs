//! The log of a recorded disk, in the format of the kernel's dm-log-writes, so that the tools for
//! that one can look at a log that was kept.
//!
//! ```text
//!   sector 0    magic u64, version u64, entries u64, sector size u32      all little endian
//!   then        sector u64, count u64, flags u64, 0 u64                   one sector each,
//!               count sectors of data, unless it is a discard             and its data
//! ```

use std::ops::Range;
use std::path::Path;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// What sectors are counted in.
const UNIT: u64 = 512;

/// Where the first sector says how many entries there are.
const COUNT: Range<usize> = 16..24;

/// One thing that a disk was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// Bytes were written.
    Write {
        /// Where to, in bytes.
        offset: u64,
        /// Where they are, in the log.
        data: Range<usize>,
        /// Whether they were on the platter when the write ended.
        is_forced: bool,
    },
    /// Bytes were given up, and read as zeros.
    Discard {
        /// Where, in bytes.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// What had been written was brought to the platter.
    Flush,
}

/// All that a disk was told, in order.
#[derive(Debug)]
pub(super) struct Log {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Log {
    /// A log that says nothing.
    pub(super) fn new() -> Self {
        Self {
            bytes: head([MAGIC, VERSION, 0, UNIT]),
            entries: Vec::new(),
        }
    }

    /// What the disk was told.
    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The data of a write.
    pub(super) fn data(&self, of: &Range<usize>) -> &[u8] {
        &self.bytes[of.clone()]
    }

    /// Bytes are written.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        self.push(offset, data.len() as u64, 0, data);
    }

    /// Bytes are written past the cache.
    #[cfg(test)]
    pub(super) fn force(&mut self, offset: u64, data: &[u8]) {
        self.push(offset, data.len() as u64, FUA, data);
    }

    /// Bytes are given up.
    pub(super) fn discard(&mut self, offset: u64, len: u64) {
        self.push(offset, len, DISCARD, &[]);
    }

    /// What was written is brought to the platter.
    pub(super) fn flush(&mut self) {
        self.push(0, 0, FLUSH, &[]);
    }

    fn push(&mut self, offset: u64, len: u64, flags: u64, data: &[u8]) {
        assert_eq!((offset % UNIT, len % UNIT), (0, 0), "a disk has sectors");
        self.bytes
            .extend(head([offset / UNIT, len / UNIT, flags, 0]));
        let start = self.bytes.len();
        self.bytes.extend_from_slice(data);
        let data = start..self.bytes.len();
        self.entries.push(Entry::of(offset, len, flags, data));
        let count = self.entries.len() as u64;
        self.bytes[COUNT].copy_from_slice(&count.to_le_bytes());
    }

    /// Reads a log that was kept.
    pub(super) fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path);
        let bytes = bytes.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let [magic, version, count, unit] = words(&bytes);
        assert_eq!((magic, version), (MAGIC, VERSION), "a log of writes");
        assert_eq!(unit, UNIT, "a log of ours");
        let mut entries = Vec::new();
        let mut rest = place(UNIT);
        for _ in 0..count {
            let [sector, sectors, flags, _] = words(&bytes[rest..]);
            let start = rest + place(UNIT);
            let (offset, len) = (sector * UNIT, sectors * UNIT);
            rest = start + if flags & DISCARD == 0 { place(len) } else { 0 };
            entries.push(Entry::of(offset, len, flags, start..rest));
        }
        assert_eq!(rest, bytes.len(), "a log that is whole");
        Self { bytes, entries }
    }

    /// The log as a file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Entry {
    fn of(offset: u64, len: u64, flags: u64, data: Range<usize>) -> Self {
        match flags {
            FLUSH => Self::Flush,
            DISCARD => Self::Discard { offset, len },
            0 | FUA => Self::Write {
                offset,
                data,
                is_forced: flags == FUA,
            },
            _ => panic!("no entry of ours has the flags {flags}"),
        }
    }
}

/// A sector that begins with some numbers.
fn head(words: [u64; 4]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(place(UNIT), 0);
    bytes
}

fn words(bytes: &[u8]) -> [u64; 4] {
    [0, 8, 16, 24].map(|at| {
        let word = bytes[at..at + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(word)
    })
}

fn place(len: u64) -> usize {
    usize::try_from(len).expect("a log fits the memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_says_what_it_was_told_also_when_it_is_read_again() {
        let mut log = Log::new();
        log.write(4096, &[7; 1024]);
        log.flush();
        log.discard(8192, 512);
        log.force(512, &[9; 512]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), log.bytes()).unwrap();
        let again = Log::read(file.path());
        assert_eq!(again.entries(), log.entries());
        let [
            Entry::Write {
                offset: 4096,
                data,
                is_forced: false,
            },
            Entry::Flush,
            Entry::Discard {
                offset: 8192,
                len: 512,
            },
            Entry::Write {
                offset: 512,
                is_forced: true,
                ..
            },
        ] = again.entries()
        else {
            panic!("{:?}", again.entries());
        };
        assert_eq!(again.data(data), [7; 1024]);
    }
}
