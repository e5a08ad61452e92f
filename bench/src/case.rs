//! What the destination holds before a run.

use std::fmt;
use std::str::FromStr;

/// The state of the destination that a tool starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    /// There is none yet.
    First,
    /// It equals the source but for this percentage of the source's data blocks.
    Changed(u8),
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.trim_end_matches('%').parse()) {
            ("first", _) => Ok(Self::First),
            (_, Ok(percent @ 0..=100)) => Ok(Self::Changed(percent)),
            _ => Err("expected `first` or a percentage".to_owned()),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First => f.write_str("first copy"),
            Self::Changed(percent) => write!(f, "{percent}% changed"),
        }
    }
}
