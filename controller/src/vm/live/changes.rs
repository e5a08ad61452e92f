//! What a guest has written since the last sync: libvirt keeps note of it from a checkpoint on, in
//! bitmaps inside of qcow2 images. A checkpoint begins with the snapshot of each run, and is what the
//! next run builds upon once the destination has committed: so the destination remembers its name.
//!
//! A bitmap is believed only as long as the QEMU lives that has written it: no other process could
//! change the disk meanwhile, nor the bitmap. What `qemu-img`, a backup that was put back or a crash
//! made of the two while the VM was off, nobody can tell. Where anything is in doubt, all is read.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::super::survey::Survey;
use crate::error::Result;
use crate::libvirt::Hypervisor;

/// What a run has left at a destination, by a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::vm) struct Version {
    /// Also that of the checkpoint at the source, if it has one.
    name: String,
    /// The process of QEMU that had the disks.
    process: Option<String>,
}

/// What a run builds upon, and what it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::vm) struct Versions {
    /// Tells the checkpoints for this destination from those for others.
    pub(in crate::vm) pair: String,
    pub(in crate::vm) was: Option<Version>,
    pub(in crate::vm) becomes: Version,
}

impl Versions {
    /// Those of a run onto a destination that is called `pair`, if there was a run before, and is
    /// that version.
    ///
    /// # Errors
    /// When the source's host cannot be asked.
    pub(in crate::vm) async fn after(
        pair: Option<String>,
        was: Option<Version>,
        source: &Survey,
    ) -> Result<Self> {
        let random = || Uuid::new_v4().simple().to_string()[..12].to_owned();
        let pair = pair.unwrap_or_else(random);
        let becomes = Version {
            name: format!("{PREFIX}-{pair}-{}", random()),
            process: process(source).await?,
        };
        Ok(Self { pair, was, becomes })
    }
}

/// Ahead of the names of our checkpoints.
const PREFIX: &str = "kc";

impl Version {
    pub(in crate::vm) fn name(&self) -> &str {
        &self.name
    }
}

/// The process of QEMU that has a VM's disks; `None` where there is none, or none that can be told.
async fn process(source: &Survey) -> Result<Option<String>> {
    match source.domain.state.is_off() {
        true => Ok(None),
        false => source.on.host().process_of(source.name()).await,
    }
}

/// Which disks libvirt can keep note of: those with qcow2 images.
pub(super) fn can_be_tracked(source: &Survey) -> Vec<bool> {
    let disks = source.disks.iter();
    disks.map(|disk| disk.images[0].format == "qcow2").collect()
}

/// Which disks a checkpoint has note of, by their targets; or why it is not believed.
///
/// # Errors
/// When the host cannot be asked.
pub(super) async fn tracked_since(
    source: &Survey,
    versions: &Versions,
    was: &Version,
) -> Result<Result<Vec<String>, &'static str>> {
    let (on, uuid) = (&source.on, source.domain.definition.uuid().to_string());
    if was.process.is_none() || was.process != versions.becomes.process {
        return Ok(Err("the VM was started anew"));
    }
    if !names(on, &uuid).await?.contains(&was.name) {
        return Ok(Err("its checkpoint is gone"));
    }
    let text = on.virsh(&["checkpoint-dumpxml", &uuid, &was.name]).await?;
    let Ok(document) = roxmltree::Document::parse(&text) else {
        return Ok(Err("its checkpoint cannot be read"));
    };
    let root = document.root_element();
    let disks = root.children().filter(|node| node.has_tag_name("disks"));
    let disks = disks.flat_map(|node| node.children());
    let tracked = disks.filter(|disk| disk.attribute("checkpoint") == Some("bitmap"));
    Ok(Ok(tracked
        .filter_map(|disk| disk.attribute("name").map(str::to_owned))
        .collect()))
}

/// Deletes the checkpoints for a destination, but for what it becomes. Those of others are left
/// alone.
///
/// # Errors
/// When one cannot be deleted.
pub(in crate::vm) async fn prune(source: &Survey, versions: &Versions) -> Result<()> {
    let (on, uuid) = (&source.on, source.domain.definition.uuid().to_string());
    let ours = format!("{PREFIX}-{}-", versions.pair);
    for name in names(on, &uuid).await? {
        if name.starts_with(&ours) && name != versions.becomes.name {
            delete(source, &name).await?;
        }
    }
    Ok(())
}

/// Deletes a checkpoint.
///
/// # Errors
/// When it cannot be deleted.
pub(super) async fn delete(source: &Survey, name: &str) -> Result<()> {
    let uuid = source.domain.definition.uuid().to_string();
    delete_of(&source.on, &uuid, name).await
}

/// The same for a VM that was not looked at.
///
/// # Errors
/// When it cannot be deleted.
pub(super) async fn delete_of(on: &Hypervisor, uuid: &str, name: &str) -> Result<()> {
    let delete = ["checkpoint-delete", uuid, name];
    if on.virsh(&delete).await.is_err() && names(on, uuid).await?.iter().any(|each| each == name) {
        // Its bitmap is gone; what libvirt knows of it can go as well.
        let words = [&delete[..], &["--metadata"]].concat();
        on.virsh(&words).await?;
    }
    Ok(())
}

async fn names(on: &Hypervisor, uuid: &str) -> Result<Vec<String>> {
    let listed = on.virsh(&["checkpoint-list", "--name", uuid]).await?;
    let names = listed
        .lines()
        .map(str::trim)
        .filter(|name| !name.is_empty());
    Ok(names.map(str::to_owned).collect())
}
