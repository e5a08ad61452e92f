//! What a guest has written since the last sync: libvirt keeps note of it from a checkpoint on, in
//! bitmaps inside of qcow2 images. A checkpoint begins with the snapshot of each run, and is what the
//! next run builds upon once the destination has committed: so the destination remembers its name.
//! Where anything is in doubt, all is read.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::super::survey::Survey;
use crate::error::Result;
use crate::libvirt::Hypervisor;

/// What a run has left at a destination, by a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::vm) struct Version {
    /// Tells the checkpoints for this destination from those for others.
    pair: String,
    /// Also that of the checkpoint at the source, if it has one.
    name: String,
}

/// What a run builds upon, and what it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::vm) struct Versions {
    pub(in crate::vm) was: Option<Version>,
    pub(in crate::vm) becomes: Version,
}

impl Versions {
    /// Those of a run that finds this at the destination.
    pub(in crate::vm) fn after(was: Option<Version>) -> Self {
        Self {
            becomes: Version::after(was.as_ref()),
            was,
        }
    }
}

/// Ahead of the names of our checkpoints.
const PREFIX: &str = "kc";

impl Version {
    pub(in crate::vm) fn name(&self) -> &str {
        &self.name
    }

    /// The version that comes after another one.
    fn after(was: Option<&Self>) -> Self {
        let random = || Uuid::new_v4().simple().to_string()[..12].to_owned();
        let pair = was.map_or_else(random, |was| was.pair.clone());
        let name = format!("{PREFIX}-{pair}-{}", random());
        Self { pair, name }
    }
}

/// Which disks libvirt can keep note of: those with qcow2 images.
pub(super) fn can_be_tracked(source: &Survey) -> Vec<bool> {
    let disks = source.disks.iter();
    disks.map(|disk| disk.images[0].format == "qcow2").collect()
}

/// Which disks a checkpoint has note of, by their targets; none, where there is no such checkpoint.
///
/// # Errors
/// When the host cannot be asked.
pub(super) async fn tracked_since(source: &Survey, was: &Version) -> Result<Vec<String>> {
    let (on, uuid) = (&source.on, source.domain.definition.uuid().to_string());
    if !names(on, &uuid).await?.contains(&was.name) {
        return Ok(Vec::new());
    }
    let text = on.virsh(&["checkpoint-dumpxml", &uuid, &was.name]).await?;
    let Ok(document) = roxmltree::Document::parse(&text) else {
        return Ok(Vec::new());
    };
    let root = document.root_element();
    let disks = root.children().filter(|node| node.has_tag_name("disks"));
    let disks = disks.flat_map(|node| node.children());
    let tracked = disks.filter(|disk| disk.attribute("checkpoint") == Some("bitmap"));
    Ok(tracked
        .filter_map(|disk| disk.attribute("name").map(str::to_owned))
        .collect())
}

/// Deletes the checkpoints for a destination, but for one. Those of others are left alone.
///
/// # Errors
/// When one cannot be deleted.
pub(in crate::vm) async fn prune(source: &Survey, version: &Version) -> Result<()> {
    let (on, uuid) = (&source.on, source.domain.definition.uuid().to_string());
    let ours = format!("{PREFIX}-{}-", version.pair);
    for name in names(on, &uuid).await? {
        if name.starts_with(&ours) && name != version.name {
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
