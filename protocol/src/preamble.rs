//! The sixteen bytes that open every connection, in both directions, before any frame.
//!
//! ```text
//!  0                               8        10       12              16
//!  | 89 4b 56 43 0d 0a 1a 0a       | min    | max    | build          |
//!  |  .  K  V  C \r \n ^Z \n       | u16 LE | u16 LE | u32 LE         |
//! ```
//!
//! This layout never changes. The magic has a byte above 127 and both line ends, as PNG's has, so
//! that a channel which is not clean for binary data is noticed here and nowhere later. A login
//! shell may print something before the agent starts: [`find`] looks past it, up to
//! [`MAX_NOISE`] bytes.

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;

/// The first eight bytes.
pub const MAGIC: [u8; 8] = *b"\x89KVC\r\n\x1a\n";

/// Bytes in a preamble.
pub const PREAMBLE_LEN: usize = 16;

/// How much a login shell may print before the agent speaks.
pub const MAX_NOISE: usize = 64 * 1024;

/// A range of protocol versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The oldest that is understood.
    pub min: u16,
    /// The newest that is understood.
    pub max: u16,
}

/// What this build speaks.
pub const SUPPORTED: Versions = Versions {
    min: 2,
    max: if cfg!(feature = "version-2") { 2 } else { 3 },
};

impl std::fmt::Display for Versions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

impl Versions {
    /// Exactly one version: what data connections announce once the controller has chosen.
    pub fn only(version: u16) -> Self {
        Self {
            min: version,
            max: version,
        }
    }

    /// The newest version that both know.
    ///
    /// # Errors
    /// [`PreambleError::NoCommonVersion`] when there is none.
    pub fn negotiate(self, theirs: Self) -> Result<u16, PreambleError> {
        let newest = self.max.min(theirs.max);
        if newest >= self.min.max(theirs.min) {
            Ok(newest)
        } else {
            Err(PreambleError::NoCommonVersion { ours: self, theirs })
        }
    }
}

/// The opening of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// The protocol versions that the speaker understands.
    pub versions: Versions,
    /// A number for humans who read a trace: the release as `major << 16 | minor << 8 | patch`.
    pub build: u32,
}

/// Why a connection could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PreambleError {
    /// No preamble came within [`MAX_NOISE`] bytes.
    #[error("expected the agent's preamble, got {}", describe(.start))]
    NotFound {
        /// The first bytes that came instead.
        start: Bytes,
    },
    /// The range of versions is empty.
    #[error("the peer announced the impossible version range {min} to {max}")]
    BadRange {
        /// Announced as the oldest.
        min: u16,
        /// Announced as the newest.
        max: u16,
    },
    /// The two ends share no version.
    #[error("no common protocol version: this end speaks {ours}, the other {theirs}")]
    NoCommonVersion {
        /// What this end speaks.
        ours: Versions,
        /// What the other end speaks.
        theirs: Versions,
    },
}

impl Preamble {
    /// The sixteen bytes.
    pub fn encode(self) -> [u8; PREAMBLE_LEN] {
        let mut bytes = [0; PREAMBLE_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.versions.min.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.versions.max.to_le_bytes());
        bytes[12..].copy_from_slice(&self.build.to_le_bytes());
        bytes
    }

    /// This build's preamble for `versions`.
    pub fn of_this_build(versions: Versions) -> Self {
        let part = |text: &str| text.parse::<u32>().unwrap_or(0) & 0xff;
        Self {
            versions,
            build: part(env!("CARGO_PKG_VERSION_MAJOR")) << 16
                | part(env!("CARGO_PKG_VERSION_MINOR")) << 8
                | part(env!("CARGO_PKG_VERSION_PATCH")),
        }
    }
}

/// Takes the preamble from the front of `input`, with whatever noise came before it.
/// `None` means that more bytes are needed.
///
/// # Errors
/// [`PreambleError::NotFound`] after [`MAX_NOISE`] bytes without a magic, and
/// [`PreambleError::BadRange`] for an empty range of versions.
pub fn find(input: &mut BytesMut) -> Result<Option<(Preamble, Bytes)>, PreambleError> {
    let Some(at) = input
        .windows(MAGIC.len())
        .position(|window| window == MAGIC)
    else {
        // Less may end in the front part of a magic that is just in time.
        return if input.len() >= MAX_NOISE + MAGIC.len() {
            Err(not_found(input))
        } else {
            Ok(None)
        };
    };
    if at > MAX_NOISE {
        return Err(not_found(input));
    }
    if input.len() < at + PREAMBLE_LEN {
        return Ok(None);
    }
    let noise = input.split_to(at).freeze();
    input.advance(MAGIC.len());
    let (min, max, build) = (input.get_u16_le(), input.get_u16_le(), input.get_u32_le());
    if min > max {
        return Err(PreambleError::BadRange { min, max });
    }
    Ok(Some((
        Preamble {
            versions: Versions { min, max },
            build,
        },
        noise,
    )))
}

/// The error for a connection that ended, or went on too long, without a preamble.
pub fn not_found(input: &[u8]) -> PreambleError {
    PreambleError::NotFound {
        start: Bytes::copy_from_slice(&input[..input.len().min(64)]),
    }
}

fn describe(bytes: &Bytes) -> String {
    if bytes.is_empty() {
        return "nothing".to_owned();
    }
    let start = bytes.escape_ascii();
    format!("\"{start}\" (the remote shell printed something, and no agent followed)")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: Preamble = Preamble {
        versions: Versions { min: 1, max: 3 },
        build: 0x0001_0203,
    };

    #[test]
    fn layout_is_pinned_for_ever() {
        assert_eq!(
            SAMPLE.encode(),
            [
                0x89, b'K', b'V', b'C', 0x0d, 0x0a, 0x1a, 0x0a, 1, 0, 3, 0, 3, 2, 1, 0
            ]
        );
    }

    #[test]
    fn found_behind_a_greeting_and_in_any_split() {
        let mut bytes = b"Welcome to hv1!\n".to_vec();
        bytes.extend_from_slice(&SAMPLE.encode());
        let mut input = BytesMut::new();
        for (n, byte) in bytes.iter().enumerate() {
            input.extend_from_slice(&[*byte]);
            let found = find(&mut input).unwrap();
            if n + 1 < bytes.len() {
                assert_eq!(found, None);
            } else {
                assert_eq!(
                    found,
                    Some((SAMPLE, Bytes::from_static(b"Welcome to hv1!\n")))
                );
            }
        }
    }

    #[test]
    fn noise_up_to_its_limit_is_passed_over_in_any_split() {
        for (noise, expected) in [(MAX_NOISE, true), (MAX_NOISE + 1, false)] {
            let mut bytes = vec![b'.'; noise];
            bytes.extend_from_slice(&SAMPLE.encode());
            for cut in noise..=bytes.len() {
                let mut input = BytesMut::from(&bytes[..cut]);
                let early = find(&mut input);
                input.extend_from_slice(&bytes[cut..]);
                let found = early.and_then(|found| match found {
                    Some(found) => Ok(Some(found)),
                    None => find(&mut input),
                });
                assert_eq!(matches!(found, Ok(Some(_))), expected, "{noise}, {cut}");
                assert_eq!(found.is_err(), !expected, "{noise}, {cut}");
            }
        }
    }

    #[test]
    fn endless_noise_is_an_error_that_shows_its_start() {
        let mut input = BytesMut::from(&b"bash: no such file\n".repeat(5000)[..]);
        let error = find(&mut input).unwrap_err().to_string();
        assert!(error.contains("bash: no such file"), "{error}");
    }

    #[test]
    fn negotiation_takes_the_newest_common_version() {
        let v = |min, max| Versions { min, max };
        assert_eq!(v(1, 3).negotiate(v(2, 5)), Ok(3));
        assert_eq!(v(1, 1).negotiate(v(1, 9)), Ok(1));
        let error = v(1, 2).negotiate(v(3, 4)).unwrap_err().to_string();
        assert_eq!(
            error,
            "no common protocol version: this end speaks 1 to 2, the other 3 to 4"
        );
    }

    #[test]
    fn an_empty_range_is_refused() {
        let bad = Preamble {
            versions: Versions { min: 4, max: 2 },
            build: 0,
        };
        let mut input = BytesMut::from(&bad.encode()[..]);
        assert_eq!(
            find(&mut input),
            Err(PreambleError::BadRange { min: 4, max: 2 })
        );
    }
}
