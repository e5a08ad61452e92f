//! What happens on a recorded disk: a file is to become another one.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use crate::image::{self, BLOCK, KIB, MIB, Piece};

/// Mode and owner of the old file, which the new one keeps.
const MODE: u32 = 0o640;
const OWNER: u32 = 4711;

/// The old version of a file, and the new one.
#[derive(Debug)]
pub(super) struct Story {
    old: Option<Vec<u8>>,
    new: Vec<u8>,
}

/// What is found under the name of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    /// The old version; where there was none, nothing.
    Old,
    /// The new version.
    New,
    /// Nothing, where something was.
    Absent,
    /// Anything else, and why.
    Torn(String),
}

impl Story {
    /// Makes the source of a story, and the old version unless there is to be none.
    ///
    /// The seed decides on the bytes, and on whether the new version is longer, shorter, or as
    /// long: data becomes other data, or a hole; a hole or zeros become data; the rest stays.
    ///
    /// # Panics
    /// When the files cannot be written.
    #[must_use]
    pub(super) fn lay_out(seed: u64, source: &Path, old: Option<&Path>) -> Self {
        use Piece::{Hole, Random, Zeros};
        let first = seed.wrapping_mul(100);
        let random = |piece, len| Random(first.wrapping_add(piece), len);
        let last = 768 * KIB + 77;
        let end = match seed % 3 {
            0 => [random(3, last), Hole(0)],
            1 => [random(3, last), random(7, 300 * KIB + 5)],
            _ => [random(3, 400 * KIB), Hole(0)],
        };
        image::write(
            source,
            &[
                random(1, MIB),
                random(4, 512 * KIB),
                Hole(256 * KIB),
                random(5, 768 * KIB),
                random(6, 256 * KIB),
                end[0],
                end[1],
            ],
        );
        if let Some(old) = old {
            image::write(
                old,
                &[
                    random(1, MIB),
                    Hole(512 * KIB),
                    random(2, MIB),
                    Zeros(256 * KIB),
                    random(3, last),
                ],
            );
            fs::set_permissions(old, Permissions::from_mode(MODE)).expect("a file of ours");
            chown(old, Some(OWNER), Some(OWNER)).expect("root may give files away");
        }
        let read = |path| fs::read(path).expect("a file that was just written");
        Self {
            old: old.map(read),
            new: read(source),
        }
    }

    /// What is under the name.
    #[must_use]
    pub(super) fn seen(&self, path: &Path) -> Seen {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound && self.old.is_none() => {
                return Seen::Old;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return Seen::Absent,
            Err(error) => return Seen::Torn(format!("it cannot be read: {error}")),
        };
        if self.old.is_some() {
            let found = fs::metadata(path).expect("a file that was just read");
            let (mode, owner) = (found.mode() & 0o7777, [found.uid(), found.gid()]);
            if (mode, owner) != (MODE, [OWNER; 2]) {
                return Seen::Torn(format!("it has mode {mode:o} and owner {owner:?}"));
            }
        }
        if bytes == self.new {
            Seen::New
        } else if self.old.as_ref() == Some(&bytes) {
            Seen::Old
        } else {
            Seen::Torn(self.mixture(&bytes))
        }
    }

    fn mixture(&self, bytes: &[u8]) -> String {
        let place = |version: &[u8]| {
            let pairs = bytes.iter().zip(version);
            let equal = pairs
                .take_while(|(byte, expected)| byte == expected)
                .count();
            format!(
                "byte {equal} of {} (block {})",
                version.len(),
                equal as u64 / BLOCK
            )
        };
        let old = self
            .old
            .as_ref()
            .map_or_else(|| "nothing".to_owned(), |old| place(old));
        let (len, new) = (bytes.len(), place(&self.new));
        format!("it has {len} bytes; is no longer new from {new}, no longer old from {old}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart_and_from_mixtures() {
        let directory = tempfile::tempdir().unwrap();
        let [source, disk] = ["source", "disk"].map(|name| directory.path().join(name));
        if !nix::unistd::geteuid().is_root() {
            return crate::skip::skip("giving files away needs root");
        }
        for seed in 0..3 {
            let story = Story::lay_out(seed, &source, Some(&disk));
            assert_eq!(story.seen(&disk), Seen::Old);
            let new = fs::read(&source).unwrap();
            fs::write(&disk, &new).unwrap();
            assert_eq!(story.seen(&disk), Seen::New);
            fs::write(&disk, &new[..new.len() - 1]).unwrap();
            assert!(matches!(story.seen(&disk), Seen::Torn(_)));
            let mut mixed = new.clone();
            mixed[1 << 20] ^= 1;
            fs::write(&disk, &mixed).unwrap();
            let Seen::Torn(why) = story.seen(&disk) else {
                panic!("a mixture")
            };
            assert!(why.contains("new from byte 1048576 "), "{why}");
            fs::write(&disk, &new).unwrap();
            fs::set_permissions(&disk, Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(story.seen(&disk), Seen::Torn(_)));
            fs::remove_file(&disk).unwrap();
            assert_eq!(story.seen(&disk), Seen::Absent);
        }
    }

    #[test]
    fn nothing_is_the_old_version_of_a_new_file() {
        let directory = tempfile::tempdir().unwrap();
        let [source, disk] = ["source", "disk"].map(|name| directory.path().join(name));
        let story = Story::lay_out(1, &source, None);
        assert_eq!(story.seen(&disk), Seen::Old);
        fs::copy(&source, &disk).unwrap();
        assert_eq!(story.seen(&disk), Seen::New);
        fs::write(&disk, "").unwrap();
        assert!(matches!(story.seen(&disk), Seen::Torn(_)));
    }
}
