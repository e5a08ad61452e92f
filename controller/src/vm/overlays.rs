//! Overlays that wait to be put into the images that they stand on, and whether they count.
//!
//! ```text
//!  overlays are durable ─ the lineage names them ─ the agents commit the raw disks beside them ─
//!                                                  each image takes what its overlay holds
//! ```
//!
//! Raw disks are what decides: from the instant on at which the agents let those count, the overlays
//! count as well, and without such disks from the instant on at which they are named. Whoever comes
//! after a run that broke off finds out whether that instant had come ([`Overlays::end`]).

use std::collections::BTreeMap;

use kvm_clone_protocol::message::Fate;
use serde::{Deserialize, Serialize};

use super::lineage::Left;
use super::naming;
use crate::error::{Error, ErrorCode, Result};
use crate::host::FileKind;
use crate::libvirt::Hypervisor;
use crate::output;
use crate::transfer::recover::Left as LeftDisk;

/// Overlays of one run, all of them durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Overlays {
    /// The images below them, as those were when the overlays were whole.
    images: BTreeMap<String, Left>,
    /// The disks beside them that the agents commit, by what their paths lead to, as they were
    /// before that. Block devices do not tell when they were written.
    beside: BTreeMap<String, Option<Left>>,
}

/// How far an image has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is what it was, and has its overlay.
    Waiting,
    /// It has lost its name until it holds what its overlay does.
    Applying,
    /// It is not what it was, and has no overlay any more.
    Done,
    /// It is not what it was, and has its overlay: somebody has used it, or only the overlay is
    /// still to be removed.
    Changed,
    /// It is what it was, and has no overlay any more.
    Dropped,
}

impl Overlays {
    /// Makes the overlays on these images durable, sees that there is room to apply them, and notes
    /// what the images are, and the disks `beside` them.
    ///
    /// # Errors
    /// When the host cannot be asked; no space.
    pub(super) async fn note(
        on: &Hypervisor,
        images: &[String],
        beside: &[String],
    ) -> Result<Self> {
        let host = on.host();
        let mut overlays = Self {
            images: BTreeMap::new(),
            beside: BTreeMap::new(),
        };
        let mut rooms: BTreeMap<String, Room<'_>> = BTreeMap::new();
        for image in images {
            let overlay = of(image);
            host.tool_output(&["sync", "--", &overlay], b"").await?;
            let [facts, waiting] = [
                host.file_facts(image).await?,
                host.file_facts(&overlay).await?,
            ];
            let (Some(facts), Some(waiting)) = (facts, waiting) else {
                let message = format!("{image} on {host}, or what waits for it, is gone");
                return Err(Error::new(ErrorCode::NotFound, message));
            };
            let (directory, _) = naming::split(image);
            let space = host.space(directory).await?;
            let room = rooms.entry(space.id).or_default();
            room.needed_bytes += waiting.allocated_bytes;
            room.free_bytes = space.free_bytes;
            room.images.push(image);
            overlays.images.insert(image.clone(), Left::of(&facts));
        }
        for room in rooms.values() {
            room.check(on)?;
        }
        for disk in beside {
            let facts = host.file_facts(disk).await?;
            let file = facts.filter(|facts| facts.kind == FileKind::File);
            let path = host.real_path(disk).await?;
            overlays.beside.insert(path, file.as_ref().map(Left::of));
        }
        Ok(overlays)
    }

    /// The files of the overlays.
    pub(super) fn files(&self) -> Vec<String> {
        self.images.keys().map(|image| of(image)).collect()
    }

    /// Puts them all into their images, which have no name meanwhile, so that no VM starts on half of
    /// them; then removes them.
    ///
    /// # Errors
    /// Refused, when somebody has used an image since; else when one cannot be, and it can be done
    /// again.
    pub(super) async fn apply(&self, on: &Hypervisor) -> Result<()> {
        let standing = self.standing(on).await?;
        if let Some((image, _)) = standing.iter().find(|(_, at)| **at != Standing::Waiting) {
            let message = format!(
                "{image} on {} was written, or replaced, while a sync onto it went on",
                on.host()
            );
            return Err(Error::new(ErrorCode::Refused, message));
        }
        self.forward(on, &standing).await.map(drop)
    }

    /// Ends what a run has left that broke off, once the agent has seen to the `disks` of that: the
    /// overlays go into their images if they count, and are removed if they do not, or if somebody
    /// has used the images since. Gives back the images that were changed.
    ///
    /// # Errors
    /// When a disk beside them keeps that from being told; when one cannot be applied or removed.
    /// It can be done again.
    pub(super) async fn end(&self, on: &Hypervisor, disks: &[LeftDisk]) -> Result<Vec<String>> {
        let standing = self.standing(on).await?;
        let mut all = standing.values();
        let is_begun = all.any(|at| matches!(at, Standing::Applying | Standing::Done));
        let is_whole = standing.values().all(|at| *at == Standing::Waiting);
        if is_begun || is_whole && self.count(on, disks).await? {
            return self.forward(on, &standing).await;
        }
        on.host().remove(&self.files()).await?;
        Ok(Vec::new())
    }

    /// Whether the disks beside them have come to be the new version.
    async fn count(&self, on: &Hypervisor, disks: &[LeftDisk]) -> Result<bool> {
        let ours = || {
            disks
                .iter()
                .filter(|disk| self.beside.contains_key(&disk.path))
        };
        let found = |fates: &[Fate]| ours().find(|disk| fates.contains(&disk.fate));
        if found(&[Fate::Finished, Fate::Unfinished]).is_some() {
            return Ok(true);
        }
        if let Some(disk) = found(&[Fate::Running, Fate::Stuck]) {
            let message = format!(
                "what waits for other disks counts if {} does, which cannot be told",
                disk.path
            );
            return Err(Error::new(ErrorCode::Refused, message).caused_by(disk.note.clone()));
        }
        if found(&[Fate::Waiting, Fate::RolledBack, Fate::Torn]).is_some() {
            return Ok(false);
        }
        // The agent knows of no run: that was wholly done, or had changed nothing.
        let mut devices = self.beside.is_empty();
        for (path, left) in &self.beside {
            match left {
                None => devices = true,
                Some(left) => {
                    let facts = on.host().file_facts(path).await?;
                    if facts.as_ref().map(Left::of).as_ref() != Some(left) {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(devices)
    }

    async fn standing(&self, on: &Hypervisor) -> Result<BTreeMap<&String, Standing>> {
        let host = on.host();
        let mut standing = BTreeMap::new();
        for (image, left) in &self.images {
            let has_overlay = host.file_facts(&of(image)).await?.is_some();
            let facts = host.file_facts(image).await?;
            let is_same = facts.as_ref().map(Left::of).as_ref() == Some(left);
            let at = if has_overlay && host.file_facts(&applying(image)).await?.is_some() {
                Standing::Applying
            } else {
                match (has_overlay, is_same) {
                    (true, true) => Standing::Waiting,
                    (true, false) => Standing::Changed,
                    (false, true) => Standing::Dropped,
                    (false, false) => Standing::Done,
                }
            };
            standing.insert(image, at);
        }
        Ok(standing)
    }

    /// All images lose their names before the first is changed.
    async fn forward(
        &self,
        on: &Hypervisor,
        standing: &BTreeMap<&String, Standing>,
    ) -> Result<Vec<String>> {
        let host = on.host();
        let mut changed = Vec::new();
        for (image, at) in standing {
            match at {
                Standing::Waiting => {
                    let words = ["mv", "-T", "--", image, &applying(image)];
                    host.tool_output(&words, b"").await?;
                }
                Standing::Applying => {}
                Standing::Done | Standing::Changed | Standing::Dropped => continue,
            }
            changed.push((*image).clone());
        }
        for image in &changed {
            put(on, image).await?;
        }
        host.remove(&self.files()).await?;
        Ok(changed)
    }
}

/// Puts what an overlay holds into the image that has lost its name for that.
async fn put(on: &Hypervisor, image: &str) -> Result<()> {
    let host = on.host();
    let (overlay, applying) = (of(image), applying(image));
    let [top, below] = [&overlay, &applying].map(|path| path.replace(',', ",,"));
    let options = format!(
        "driver=qcow2,file.driver=file,file.filename={top},backing.driver=qcow2,\
         backing.file.driver=file,backing.file.filename={below}"
    );
    // Not emptied after it (-d), so that what breaks off can be done again.
    let words = ["qemu-img", "commit", "-q", "-d", "--image-opts", &options];
    host.tool_output(&words, b"").await?;
    host.tool_output(&["sync", "--", &applying], b"").await?;
    host.tool_output(&["mv", "-T", "--", &applying, image], b"")
        .await?;
    let (directory, _) = naming::split(image);
    host.tool_output(&["sync", "--", directory], b"").await?;
    host.remove(&[overlay]).await
}

/// What overlays on one file system need of it.
#[derive(Debug, Default)]
struct Room<'a> {
    needed_bytes: u64,
    free_bytes: u64,
    images: Vec<&'a str>,
}

impl Room<'_> {
    fn check(&self, on: &Hypervisor) -> Result<()> {
        let Some(first) = self
            .images
            .first()
            .filter(|_| self.free_bytes < self.needed_bytes)
        else {
            return Ok(());
        };
        let (directory, _) = naming::split(first);
        let [free, needed] = [self.free_bytes, self.needed_bytes].map(output::iec);
        let (host, images) = (on.host(), self.images.join(", "));
        let message = format!(
            "{directory} on {host} has {free} free, and up to {needed} more go into {images}"
        );
        Err(Error::new(ErrorCode::NoSpace, message).hint("make room there"))
    }
}

/// The overlay on an image.
fn of(image: &str) -> String {
    let (directory, name) = naming::split(image);
    naming::join(directory, &naming::overlay(name))
}

/// The image while it takes what its overlay holds.
fn applying(image: &str) -> String {
    let (directory, name) = naming::split(image);
    naming::join(directory, &naming::applying(name))
}
