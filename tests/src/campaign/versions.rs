//! The two versions between which a destination goes, and which of them it is.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::image::{self, BLOCK, Piece};

/// Stripes of an image, of four blocks each: 24 MiB, and a tail that only one version has.
const STRIPES: u64 = 96;
const STRIPE: u64 = 4 * BLOCK;

/// As a run sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    Old,
    New,
}

/// What a destination was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Is(Version),
    Absent,
    /// Neither the one nor the other; the first byte that is not the old one's.
    Torn(u64),
}

/// An image that a destination is brought to.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) path: PathBuf,
    bytes: Vec<u8>,
}

impl Image {
    /// Makes one of the two, `0` or `1`.
    pub(super) fn make(path: PathBuf, which: u64) -> Self {
        image::write(&path, &pieces(which));
        let bytes = fs::read(&path).expect("an image was just written");
        Self { path, bytes }
    }
}

/// A third of the stripes differ: other data, data against a hole both ways, data against zeros
/// that take space. One version is longer, by blocks and a few bytes.
fn pieces(which: u64) -> Vec<Piece> {
    let own = |stripe| Piece::Random(1000 + 1000 * which + stripe, STRIPE);
    let either = |here: bool, stripe, other| if here { own(stripe) } else { other };
    let stripe = |stripe: u64| match stripe % 12 {
        5 => Piece::Hole(STRIPE),
        6 | 7 => own(stripe),
        8 => either(which == 0, stripe, Piece::Hole(STRIPE)),
        9 if stripe % 24 == 9 => either(which == 0, stripe, Piece::Zeros(STRIPE)),
        9 => either(which == 1, stripe, Piece::Hole(STRIPE)),
        _ => Piece::Random(stripe, STRIPE),
    };
    let tail = [Piece::Random(500, 2 * BLOCK), Piece::Byte(7)];
    let tail = tail.into_iter().filter(|_| which == 1);
    (0..STRIPES).map(stripe).chain(tail).collect()
}

/// What the destination at `path` is.
pub(super) fn look(path: &Path, old: &Image, new: &Image) -> Found {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Found::Absent,
        Err(error) => panic!("{}: {error}", path.display()),
    };
    for (image, version) in [(old, Version::Old), (new, Version::New)] {
        if image.bytes == bytes {
            return Found::Is(version);
        }
    }
    let same = bytes.iter().zip(&old.bytes).take_while(|(a, b)| a == b);
    Found::Torn(same.count() as u64)
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(Version::Old) => f.write_str("old"),
            Self::Is(Version::New) => f.write_str("new"),
            Self::Absent => f.write_str("absent"),
            Self::Torn(byte) => write!(f, "TORN (not the old one from byte {byte} on)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_third_differs_and_each_version_is_told_from_a_mixture() {
        let directory = tempfile::tempdir().unwrap();
        let make = |which: u64| Image::make(directory.path().join(which.to_string()), which);
        let (old, new) = (make(0), make(1));
        let found = image::difference(&new.path, &old.path);
        assert_eq!(found.changed + found.zeroed, STRIPES / 3 * 4 + 3);
        assert!(found.zeroed >= 4 * 8, "{found:?}");
        assert!(image::data_bytes(&new.path) < image::length(&new.path));

        let destination = directory.path().join("destination");
        assert_eq!(look(&destination, &old, &new), Found::Absent);
        fs::copy(&old.path, &destination).unwrap();
        assert_eq!(look(&destination, &old, &new), Found::Is(Version::Old));
        assert_eq!(look(&destination, &new, &old), Found::Is(Version::New));
        image::overwrite(&destination, &[Piece::Hole(BLOCK), Piece::Byte(0)]);
        let torn = look(&destination, &old, &new);
        assert!(matches!(torn, Found::Torn(byte) if byte >= BLOCK), "{torn}");
    }
}
