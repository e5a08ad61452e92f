//! A small value in a file that is replaced as a whole or not at all: two slots, written in turn,
//! each with a version, a sequence number and a checksum. The newest slot that is whole counts, so
//! a write that a crash tears leaves the value before it.
//!
//! ```text
//!  0        8          10        18      22          22+len       38+len
//!  | magic  | version  | number  | len   | postcard  | checksum   |
//!  |        | u16 LE   | u64 LE  | u32LE |           | 16 bytes   |
//! ```

use std::io;

use kvm_clone_protocol::digest::{DIGEST_LEN, Digester, HashKind, Seed};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::file::DiskFile;

const HEAD_LEN: usize = 22;

/// What tells one sort of file from another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Format {
    /// The first bytes of each slot.
    pub(super) magic: [u8; 8],
    /// Of what is inside. Another one is not read.
    pub(super) version: u16,
    /// Bytes from one slot to the other.
    pub(super) slot_len: usize,
}

/// Both slots of an open file.
#[derive(Debug)]
pub(super) struct Slots {
    format: Format,
    /// Of the newest value.
    number: u64,
}

/// Why a file holds no value that can be used.
#[derive(Debug, Error)]
pub(super) enum Unreadable {
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("it is damaged, or not ours")]
    Damaged,
    #[error("it has format {found}, and this agent reads {known}")]
    OtherVersion { found: u16, known: u16 },
}

impl Slots {
    /// Bytes that both slots take from the beginning of the file.
    pub(super) fn len(format: Format) -> u64 {
        2 * format.slot_len as u64
    }

    /// The first value of a new file.
    pub(super) fn create(
        file: &DiskFile,
        format: Format,
        value: &impl Serialize,
    ) -> io::Result<Self> {
        let mut slots = Self { format, number: 0 };
        slots.write(file, value)?;
        Ok(slots)
    }

    /// The newest value of a file.
    pub(super) fn open<T: DeserializeOwned>(
        file: &DiskFile,
        format: Format,
    ) -> Result<(Self, T), Unreadable> {
        let mut best: Option<(u64, T)> = None;
        let mut why = Unreadable::Damaged;
        for at in 0..2 {
            match read_slot(file, format, at * format.slot_len as u64) {
                Ok((number, value)) if best.as_ref().is_none_or(|best| best.0 < number) => {
                    best = Some((number, value));
                }
                Ok(_) => {}
                Err(error @ (Unreadable::OtherVersion { .. } | Unreadable::Io(_))) => why = error,
                Err(Unreadable::Damaged) => {}
            }
        }
        let (number, value) = best.ok_or(why)?;
        Ok((Self { format, number }, value))
    }

    /// Replaces the value, durably.
    pub(super) fn write(&mut self, file: &DiskFile, value: &impl Serialize) -> io::Result<()> {
        let number = self.put(file, value)?;
        file.sync()?;
        self.number = number;
        Ok(())
    }

    /// Replaces the value, of which nobody asks any more once the machine has been off.
    pub(super) fn write_for_this_boot(
        &mut self,
        file: &DiskFile,
        value: &impl Serialize,
    ) -> io::Result<()> {
        self.number = self.put(file, value)?;
        Ok(())
    }

    /// Writes the value over the older one; gives its number.
    fn put(&self, file: &DiskFile, value: &impl Serialize) -> io::Result<u64> {
        let number = self.number + 1;
        let bytes = encode(self.format, number, value)?;
        let at = (number % 2) * self.format.slot_len as u64;
        file.write_all_at(&bytes, at)?;
        Ok(number)
    }
}

fn encode(format: Format, number: u64, value: &impl Serialize) -> io::Result<Vec<u8>> {
    let invalid = |error: postcard::Error| io::Error::new(io::ErrorKind::InvalidData, error);
    let value = postcard::to_stdvec(value).map_err(invalid)?;
    let mut bytes = Vec::with_capacity(HEAD_LEN + value.len() + DIGEST_LEN);
    bytes.extend_from_slice(&format.magic);
    bytes.extend_from_slice(&format.version.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(&value);
    bytes.extend_from_slice(&checksum(&bytes));
    if bytes.len() > format.slot_len {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

fn read_slot<T: DeserializeOwned>(
    file: &DiskFile,
    format: Format,
    at: u64,
) -> Result<(u64, T), Unreadable> {
    let mut head = [0; HEAD_LEN];
    if file.read_full_at(&mut head, at)? < HEAD_LEN || head[..8] != format.magic {
        return Err(Unreadable::Damaged);
    }
    let found = u16::from_le_bytes([head[8], head[9]]);
    if found != format.version {
        let known = format.version;
        return Err(Unreadable::OtherVersion { found, known });
    }
    let number = u64::from_le_bytes(head[10..18].try_into().expect("eight bytes"));
    let len = u32::from_le_bytes(head[18..].try_into().expect("four bytes"));
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > format.slot_len - HEAD_LEN - DIGEST_LEN {
        return Err(Unreadable::Damaged);
    }
    let mut bytes = head.to_vec();
    bytes.resize(HEAD_LEN + len + DIGEST_LEN, 0);
    let rest = file.read_full_at(&mut bytes[HEAD_LEN..], at + HEAD_LEN as u64)?;
    let (sealed, sum) = bytes.split_at(HEAD_LEN + len);
    if rest < len + DIGEST_LEN || checksum(sealed) != sum {
        return Err(Unreadable::Damaged);
    }
    match postcard::take_from_bytes(&sealed[HEAD_LEN..]) {
        Ok((value, [])) => Ok((number, value)),
        _ => Err(Unreadable::Damaged),
    }
}

/// Guards against chance: a torn write, a bad sector. Whoever can write here needs no trick.
pub(super) fn checksum(bytes: &[u8]) -> [u8; DIGEST_LEN] {
    Digester::new(HashKind::Xxh3, Seed(*b"kvm-clone: what lies beside disk"))
        .digest(bytes)
        .0
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        magic: *b"kc-test\n",
        version: 1,
        slot_len: 128,
    };

    #[test]
    fn the_newest_value_counts_and_a_torn_one_leaves_the_one_before() {
        let file = DiskFile::new(tempfile::tempfile().unwrap());
        let mut slots = Slots::create(&file, FORMAT, &"one").unwrap();
        slots.write(&file, &"two").unwrap();
        slots.write(&file, &"three").unwrap();
        let value = || Slots::open::<String>(&file, FORMAT).map(|(_, value)| value);
        assert_eq!(value().unwrap(), "three");
        // "three" is the third, so it lies in the second slot.
        file.write_all_at(b"!", 128 + 24).unwrap();
        assert_eq!(value().unwrap(), "two");
        file.write_all_at(b"!", 24).unwrap();
        assert!(matches!(value(), Err(Unreadable::Damaged)));
    }

    #[test]
    fn another_version_and_another_file_are_told_apart() {
        let file = DiskFile::new(tempfile::tempfile().unwrap());
        Slots::create(&file, FORMAT, &7_u8).unwrap();
        let newer = Format {
            version: 2,
            ..FORMAT
        };
        assert!(matches!(
            Slots::open::<u8>(&file, newer),
            Err(Unreadable::OtherVersion { found: 1, known: 2 })
        ));
        let other = Format {
            magic: *b"kc-else\n",
            ..FORMAT
        };
        assert!(matches!(
            Slots::open::<u8>(&file, other),
            Err(Unreadable::Damaged)
        ));
    }

    #[test]
    fn a_value_that_fits_no_slot_is_refused_and_the_old_one_stays() {
        let file = DiskFile::new(tempfile::tempfile().unwrap());
        let mut slots = Slots::create(&file, FORMAT, &"one").unwrap();
        assert!(slots.write(&file, &"x".repeat(200)).is_err());
        assert_eq!(Slots::open::<String>(&file, FORMAT).unwrap().1, "one");
    }

    #[test]
    fn no_prefix_of_a_file_is_taken_for_a_value() {
        let whole = encode(FORMAT, 1, &"value").unwrap();
        for len in 0..whole.len() {
            let file = DiskFile::new(tempfile::tempfile().unwrap());
            file.write_all_at(&whole[..len], 0).unwrap();
            assert!(Slots::open::<String>(&file, FORMAT).is_err(), "{len}");
        }
    }
}
