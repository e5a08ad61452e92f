//! Sizes as people type them.

use std::fmt;
use std::ops::Mul;
use std::str::FromStr;

/// A number of bytes: `65536`, `64K`, `4G`, `4GiB`. Suffixes are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl Size {
    pub(crate) const MIB: Self = Self(1 << 20);
}

impl Mul<u64> for Size {
    type Output = Self;

    fn mul(self, by: u64) -> Self {
        Self(self.0 * by)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        let shift = match suffix {
            "" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(format!("unknown suffix {suffix:?}: use K, M, G or T")),
        };
        let number: u64 = number.parse().map_err(|_| "expected a number".to_owned())?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| "too large".to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) = match self.0 {
            bytes if bytes >= 1 << 40 && bytes.trailing_zeros() >= 40 => ("TiB", 40),
            bytes if bytes >= 1 << 30 && bytes.trailing_zeros() >= 30 => ("GiB", 30),
            bytes if bytes >= 1 << 20 && bytes.trailing_zeros() >= 20 => ("MiB", 20),
            bytes if bytes >= 1 << 10 && bytes.trailing_zeros() >= 10 => ("KiB", 10),
            _ => ("bytes", 0),
        };
        write!(f, "{} {unit}", self.0 >> shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes, shown) in [
            ("4G", 4 << 30, "4 GiB"),
            ("16T", 16 << 40, "16 TiB"),
            ("64KiB", 65_536, "64 KiB"),
            ("100", 100, "100 bytes"),
        ] {
            let size: Size = text.parse().unwrap();
            assert_eq!((size.0, size.to_string().as_str()), (bytes, shown));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "G", "4X", "-1", "99999999T"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
