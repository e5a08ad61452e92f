//! Rates of links, as `tc` has them typed.

use std::fmt;
use std::str::FromStr;

/// Bits per second: `100mbit`, `1gbit`. Suffixes are powers of 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate(pub(crate) u64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unit = [("gbit", 1_000_000_000), ("mbit", 1_000_000)];
        let (number, unit) = unit
            .into_iter()
            .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))
            .ok_or_else(|| "expected a rate as in `100mbit` or `1gbit`".to_owned())?;
        match number.parse::<u64>().map(|number| number.checked_mul(unit)) {
            Ok(Some(rate @ 1..)) => Ok(Self(rate)),
            _ => Err("expected a whole number above zero".to_owned()),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 / 1_000_000 {
            mega if mega.is_multiple_of(1000) => write!(f, "{} Gbit/s", mega / 1000),
            mega => write!(f, "{mega} Mbit/s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_shown() {
        for (text, shown) in [
            ("100mbit", "100 Mbit/s"),
            ("1gbit", "1 Gbit/s"),
            ("2500mbit", "2500 Mbit/s"),
        ] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), shown);
        }
        for text in ["", "0mbit", "100", "1tbit", "-1gbit", "99999999999gbit"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }
}
