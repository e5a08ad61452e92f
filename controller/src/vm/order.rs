//! The order in which VMs are started after a failover. It is kept beside their replicas as well: a
//! failover needs it when the policy is gone.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{naming, state};
use crate::error::Result;
use crate::libvirt::Hypervisor;

/// The version of the format of `.order.json`.
const FORMAT: u32 = 1;

/// Which VMs come before others.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    format: u32,
    /// Names or patterns of VMs; what matches none of them comes last.
    places: Vec<String>,
    /// How long those of one place have before the next are started, in milliseconds.
    delay_ms: u64,
}

impl Order {
    /// These places, so long after each other.
    pub fn new(places: Vec<String>, delay: Duration) -> Self {
        Self {
            format: FORMAT,
            places,
            delay_ms: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// The place of a VM: the first that it matches.
    pub fn place(&self, vm: &str) -> usize {
        let mut places = self.places.iter();
        let place = places.position(|pattern| glob_match::glob_match(pattern, vm));
        place.unwrap_or(self.places.len())
    }

    /// How long those of one place have before the next are started.
    pub fn delay(&self) -> Duration {
        Duration::from_millis(self.delay_ms)
    }

    /// The one that is kept at a place of replicas; none at all where there is none.
    ///
    /// # Errors
    /// When the host cannot be reached.
    pub async fn kept(on: &Hypervisor, place: &str) -> Result<Self> {
        let kept = state::read_from(on, &note(place)).await?;
        Ok(kept.unwrap_or_default())
    }

    /// Keeps it there, unless it is kept there already.
    ///
    /// # Errors
    /// When the host cannot be reached, or it cannot be written.
    pub async fn keep(&self, on: &Hypervisor, place: &str) -> Result<()> {
        let kept: Option<Self> = state::read_from(on, &note(place)).await?;
        match kept.as_ref() == Some(self) {
            true => Ok(()),
            false => state::write_to(on, &note(place), self).await,
        }
    }
}

/// Hidden, as what is no replica: see [`names`](super::replica::names).
fn note(place: &str) -> String {
    naming::join(place, ".order.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pattern_that_matches_is_the_place() {
        let places = ["db", "web-?"].map(str::to_owned).to_vec();
        let order = Order::new(places, Duration::from_secs(1));
        let places = ["mail", "web-1", "db"].map(|vm| order.place(vm));
        assert_eq!(places, [2, 1, 0]);
    }
}
