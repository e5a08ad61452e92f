//! A pause: nothing is replicated to a place, from whichever controller, until somebody ends it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{naming, state};
use crate::error::Result;
use crate::libvirt::Hypervisor;

/// The version of the format of `.paused.json`.
const FORMAT: u32 = 1;

/// What is remembered of a pause, beside the replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pause {
    format: u32,
    /// Since when.
    pub since: Timestamp,
}

/// The pause of a place; `None` when there is none.
///
/// # Errors
/// When the host cannot be reached.
pub async fn paused(on: &Hypervisor, place: &str) -> Result<Option<Pause>> {
    state::read_from(on, &note(place)).await
}

/// Pauses a place, or leaves it as it is if it is paused. What runs there goes on to its end.
///
/// # Errors
/// When the host cannot be reached, or that cannot be written.
pub async fn pause(on: &Hypervisor, place: &str) -> Result<Pause> {
    if let Some(known) = paused(on, place).await? {
        return Ok(known);
    }
    let pause = Pause {
        format: FORMAT,
        since: Timestamp::now(),
    };
    on.host().make_directory(place, "0711").await?;
    state::write_to(on, &note(place), &pause).await?;
    Ok(pause)
}

/// Ends a pause. Gives back what there was.
///
/// # Errors
/// When the host cannot be reached, or that cannot be removed.
pub async fn resume(on: &Hypervisor, place: &str) -> Result<Option<Pause>> {
    let known = paused(on, place).await?;
    if known.is_some() {
        on.host().remove(&[note(place)]).await?;
    }
    Ok(known)
}

/// Hidden, as what is no replica: see [`names`](super::replica::names).
fn note(place: &str) -> String {
    naming::join(place, ".paused.json")
}
