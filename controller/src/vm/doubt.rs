//! Doubt: a new point is so unlike the one before that somebody has to look before older ones go.
//! A guest whose disks were encrypted, or replaced, is replicated like any other; what it was must
//! not be pruned meanwhile.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::point::Point;
use super::result::{DiskResult, VmResult};
use super::{naming, state};
use crate::error::Result;
use crate::libvirt::Hypervisor;
use crate::output;

/// The version of the format of `doubt.json`.
const FORMAT: u32 = 1;

/// Fewer changed bytes of a disk say nothing: a small disk is soon another one.
const LEAST: u64 = 16 << 20;

/// What is remembered of a replica as long as nobody has looked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Doubt {
    format: u32,
    /// Since when.
    pub since: Timestamp,
    /// The point that is so unlike the one before.
    pub point: String,
    /// In what.
    pub why: String,
}

/// The doubt of a replica; `None` when there is none.
///
/// # Errors
/// When the host cannot be reached.
pub async fn doubt(on: &Hypervisor, directory: &str) -> Result<Option<Doubt>> {
    state::read_from(on, &note(directory)).await
}

/// Remembers one, unless there is one already. Gives back the one that holds.
///
/// # Errors
/// When the host cannot be reached, or it cannot be written.
pub async fn raise(
    on: &Hypervisor,
    directory: &str,
    point: &str,
    why: Option<String>,
) -> Result<Option<Doubt>> {
    let known = doubt(on, directory).await?;
    let (None, Some(why)) = (&known, why) else {
        return Ok(known);
    };
    let doubt = Doubt {
        format: FORMAT,
        since: Timestamp::now(),
        point: point.to_owned(),
        why,
    };
    state::write_to(on, &note(directory), &doubt).await?;
    Ok(Some(doubt))
}

/// Somebody has looked. Gives back what there was.
///
/// # Errors
/// When the host cannot be reached, or it cannot be removed.
pub async fn accept(on: &Hypervisor, directory: &str) -> Result<Option<Doubt>> {
    let known = doubt(on, directory).await?;
    if known.is_some() {
        on.host().remove(&[note(directory)]).await?;
    }
    Ok(known)
}

/// In what the newest of these points, which this run has made, is unlike the one before: by a disk
/// of which more than `share` of the data has changed, or that has shrunk or is gone.
pub fn unlike(run: &VmResult, points: &[Point], share: f64) -> Option<String> {
    let [.., before, now] = points else {
        return None;
    };
    let changed = run.disks.iter().find_map(|disk| changed(disk, share));
    changed.or_else(|| {
        before.manifest.disks.iter().find_map(|disk| {
            let mut same = now.manifest.disks.iter();
            let target = &disk.target;
            match same.find(|now| now.target == *target) {
                None => Some(format!("disk {target} is gone")),
                Some(now) if now.size_bytes < disk.size_bytes => {
                    let sizes = [disk.size_bytes, now.size_bytes].map(output::iec);
                    Some(format!(
                        "disk {target} has shrunk from {} to {}",
                        sizes[0], sizes[1]
                    ))
                }
                Some(_) => None,
            }
        })
    })
}

fn changed(disk: &DiskResult, share: f64) -> Option<String> {
    let (changed, data) = (disk.transfer.bytes_changed?, disk.transfer.bytes_data?);
    // What has become a hole changed as well.
    let of = data.max(changed);
    #[expect(clippy::cast_precision_loss, reason = "a share, and no count")]
    let is_much = changed >= LEAST && changed as f64 > share * of as f64;
    is_much.then(|| {
        let [changed, of] = [changed, of].map(output::iec);
        format!(
            "of disk {} {changed} of {of} have changed at once",
            disk.target
        )
    })
}

fn note(directory: &str) -> String {
    naming::join(directory, "doubt.json")
}
