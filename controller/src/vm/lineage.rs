//! Lineage: what a destination remembers of the disks that it received, so that a sync with
//! swapped arguments, or onto a VM that has gone its own way, never overwrites anything.

use std::collections::BTreeMap;

use kvm_clone_protocol::message::{Fate, Recovery};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::live::{self, Version};
use super::obstacle::Obstacles;
use super::overlays::Overlays;
use super::pairs::Subject;
use super::reference::Reference;
use super::state::{self, Kind};
use super::survey::Survey;
use crate::error::{ErrorCode, Result};
use crate::host::FileFacts;
use crate::libvirt::{Domain, Hypervisor, Image};
use crate::transfer::recover::{Left as LeftDisk, recover};

/// The version of the file's format. A reader refuses fields that it does not know, so that a
/// file of a newer one is never half understood.
const FORMAT: u32 = 1;

/// Where the disks of a VM came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Lineage {
    format: u32,
    source_host: String,
    source_vm: String,
    source_uuid: Uuid,
    /// When the last run ended, or the unfinished one began: seconds since 1970.
    at: u64,
    /// A run began to change the disks, and has not ended: they may be anything. One that only
    /// gathers what it will change is not remembered.
    unfinished: bool,
    /// Once what is left of the unfinished run is seen to, all disks are their old version, or all
    /// their new one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    whole: bool,
    /// What the files of the disks were when the last run had ended.
    files: BTreeMap<String, Left>,
    /// What a guest sees was copied, and not the bytes of images: so it is from then on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    contents: bool,
    /// Names the VM to those who keep note of what its source's guest writes: whatever becomes of a
    /// run.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pair: String,
    /// What the last run of a VM that ran has left: by its name the source's host knows what the
    /// guest has written since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<Version>,
    /// What the unfinished run has beside images, if all of it is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    overlays: Option<Overlays>,
    /// What images must hold again after the unfinished run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    references: Vec<Reference>,
}

/// A file as it was left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Left {
    size_bytes: u64,
    modified: String,
    inode: u64,
}

impl Left {
    pub(super) fn of(facts: &FileFacts) -> Self {
        Self {
            size_bytes: facts.size_bytes,
            modified: facts.modified.clone(),
            inode: facts.inode,
        }
    }
}

impl Lineage {
    /// A run from `source` is about to change disks, and these references among them; `whole` if it
    /// leaves no mixture wherever it breaks off.
    pub(super) fn begun(
        source: &Survey,
        pair: &str,
        subject: Subject,
        whole: bool,
        references: Vec<Reference>,
    ) -> Self {
        Self {
            format: FORMAT,
            source_host: source.on.host().to_string(),
            source_vm: source.name().to_owned(),
            source_uuid: source.domain.definition.uuid(),
            at: now(),
            unfinished: true,
            whole,
            files: BTreeMap::new(),
            contents: subject == Subject::Contents,
            pair: pair.to_owned(),
            version: None,
            overlays: None,
            references,
        }
    }

    /// Remembers it for the VM `uuid` on the destination.
    pub(super) async fn write(&self, on: &Hypervisor, uuid: Uuid) -> Result<()> {
        state::write(on, Kind::Lineage, &uuid.to_string(), self).await
    }

    /// Remembers it with overlays that are whole: from then on nobody removes them who does not
    /// know whether they count.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) async fn write_with(
        &mut self,
        overlays: Overlays,
        on: &Hypervisor,
        uuid: Uuid,
    ) -> Result<()> {
        self.overlays = Some(overlays);
        self.write(on, uuid).await
    }

    /// The overlays that it names, or may name.
    pub(super) fn overlays(&self) -> Option<&Overlays> {
        self.overlays.as_ref()
    }

    /// Sees to overlays that an unfinished run has left, and gives back the images that have got
    /// what those held. `disks` are what the agents have left.
    ///
    /// # Errors
    /// As [`Overlays::end`].
    pub(super) async fn end_overlays(
        &mut self,
        on: &Hypervisor,
        uuid: &str,
        disks: &[LeftDisk],
    ) -> Result<Vec<String>> {
        let Some(overlays) = &self.overlays else {
            return Ok(Vec::new());
        };
        // Those who write to them may still be there.
        on.host().end_export(&live::export_directory(uuid)).await?;
        let changed = overlays.end(on, disks).await?;
        // The next run makes others of the same names.
        self.overlays = None;
        state::write(on, Kind::Lineage, uuid, self).await?;
        Ok(changed)
    }

    /// Gives the images what the run has taken from them: each that needed it.
    ///
    /// # Errors
    /// When an image cannot be read or written.
    pub(super) async fn restore_references(&self, on: &Hypervisor) -> Result<Vec<&str>> {
        let mut restored = Vec::new();
        for reference in &self.references {
            if reference.is_lost(on).await? {
                reference.write(on).await?;
                restored.push(reference.path.as_str());
            }
        }
        Ok(restored)
    }

    /// The run has ended well, and left the files of `paths` as they are now: they are that version.
    pub(super) async fn end(
        mut self,
        on: &Hypervisor,
        uuid: Uuid,
        paths: &[String],
        version: Option<Version>,
    ) -> Result<()> {
        self.version = version;
        self.restore_references(on).await?;
        self.references.clear();
        self.overlays = None;
        for path in paths {
            if let Some(facts) = on.host().file_facts(path).await? {
                self.files.insert(path.clone(), Left::of(&facts));
            }
        }
        self.unfinished = false;
        self.whole = false;
        self.at = now();
        self.write(on, uuid).await
    }

    /// Ends a run that broke off, if that has left no mixture: from then on it shows when somebody
    /// else writes to the disks. Whether it has ended comes back.
    ///
    /// # Errors
    /// When the host cannot be asked, or the lineage not written.
    pub(super) async fn end_broken_off(self, on: &Hypervisor, domain: Domain) -> Result<bool> {
        if !self.whole {
            return Ok(false);
        }
        let uuid = domain.definition.uuid();
        let mut obstacles = Obstacles::default();
        let target = Survey::of_domain(on, domain, &[], &mut obstacles).await?;
        if !obstacles.into_found().is_empty() {
            return Ok(false);
        }
        let images = target.disks.iter().flat_map(|disk| &disk.images);
        let paths: Vec<String> = images.map(|image| image.path.clone()).collect();
        self.end(on, uuid, &paths, None).await.map(|()| true)
    }

    /// The images of `target` that are not what the last run has left.
    fn written_since<'a>(&'a self, target: &'a Survey) -> impl Iterator<Item = &'a Image> {
        let images = target.disks.iter().flat_map(|disk| &disk.images);
        images.filter(|image| {
            let was = self.files.get(&image.path);
            !image.is_device() && was != Some(&Left::of(&image.facts))
        })
    }

    /// What keeps the disks of `target` from being overwritten with those of `source`.
    fn check(&self, source: &Survey, target: &Survey, obstacles: &mut Obstacles) {
        let hint = "give --overwrite if its disks may be lost";
        let (vm, host) = (target.name(), target.on.host());
        if self.source_uuid != source.domain.definition.uuid() {
            let message = format!(
                "{vm} on {host} was made from {} of {}, and not from {} of {}",
                self.source_vm,
                self.source_host,
                source.name(),
                source.on.host()
            );
            obstacles.refused(message, hint);
            return;
        }
        // Whatever an unfinished run left, old, new or torn, this run mends it.
        if self.unfinished {
            return;
        }
        for image in self.written_since(target) {
            let (theirs, ours) = (when(&image.facts.modified), self.at);
            let message = format!(
                "{} of {vm} on {host} was written since the last sync: it is of {theirs}, the sync of {}",
                image.path,
                when(&ours.to_string())
            );
            obstacles.refused(message, hint);
        }
    }
}

/// What is remembered of the VM `uuid`, if a run has begun to change its disks and not ended.
///
/// # Errors
/// When the host cannot be asked.
pub(super) async fn unfinished(on: &Hypervisor, uuid: &str) -> Result<Option<Lineage>> {
    let remembered: Option<Lineage> = state::read(on, Kind::Lineage, uuid).await?;
    Ok(remembered.filter(|lineage| lineage.unfinished))
}

/// Adds an obstacle for a VM that is to be read, and of whose disks some may be the new version and
/// others the old one.
///
/// # Errors
/// When the host cannot be asked.
pub(super) async fn check_source(source: &Survey, obstacles: &mut Obstacles) -> Result<()> {
    let (on, uuid) = (&source.on, source.domain.definition.uuid().to_string());
    let lineage = unfinished(on, &uuid).await?;
    if lineage.is_some_and(|lineage| lineage.overlays.is_some()) {
        let (vm, host) = (source.name(), on.host());
        obstacles.refused(
            format!("a sync onto {vm} on {host} broke off, or goes on: its disks may be a mixture"),
            format!("\"kvm-clone-ctl recover {host}\" ends one that broke off"),
        );
    }
    Ok(())
}

/// Ends what such a run has left half done, so that the images of the VM can be looked at: what
/// was committed is finished, and what stands on another image finds that again. Gives back what
/// the user ought to know.
///
/// # Errors
/// When the host cannot be asked, or an image cannot be read or written.
pub(super) async fn settle(on: &Hypervisor, uuid: &str) -> Result<Vec<String>> {
    let Some(mut lineage) = unfinished(on, uuid).await? else {
        return Ok(Vec::new());
    };
    let left = match recover(on.host(), Recovery::Finish).await {
        // Who has never run an agent has left nothing of one.
        Err(error) if error.code() == ErrorCode::MissingRequirement => Vec::new(),
        left => left?,
    };
    let finished = left.iter().filter(|each| each.fate == Fate::Finished);
    let mut told: Vec<String> = finished
        .map(|each| {
            let path = &each.path;
            format!("an earlier run onto {path} was committed and had not finished: it has now")
        })
        .collect();
    let finished = lineage.end_overlays(on, uuid, &left).await?;
    told.extend(finished.iter().map(|path| {
        format!("an earlier run onto {path} was committed and had not finished: it has now")
    }));
    let restored = lineage.restore_references(on).await?;
    told.extend(restored.iter().map(|path| {
        format!("{path} held its source's reference since an earlier run: it has its own again")
    }));
    Ok(told)
}

/// What the disks of a destination hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Holds {
    /// What a guest sees, and not the bytes of their source's images.
    pub(super) contents: bool,
    /// What they are called where the source is.
    pub(super) pair: Option<String>,
    /// The version that they still are.
    pub(super) version: Option<Version>,
}

/// What the disks of `target` hold, as far as `source` is concerned.
///
/// # Errors
/// When the host cannot be asked.
pub(super) async fn holds(source: &Survey, target: &Survey) -> Result<Holds> {
    let uuid = target.domain.definition.uuid().to_string();
    let remembered: Option<Lineage> = state::read(&target.on, Kind::Lineage, &uuid).await?;
    let Some(lineage) = remembered else {
        return Ok(Holds::default());
    };
    let is_of_source = lineage.source_uuid == source.domain.definition.uuid();
    let is_intact =
        !lineage.unfinished && is_of_source && lineage.written_since(target).next().is_none();
    Ok(Holds {
        contents: lineage.contents,
        pair: Some(lineage.pair).filter(|pair| is_of_source && !pair.is_empty()),
        version: lineage.version.filter(|_| is_intact),
    })
}

/// Finds out whether the disks of `target` may be overwritten with those of `source`.
///
/// # Errors
/// When the host cannot be asked.
pub(super) async fn check(
    source: &Survey,
    target: &Survey,
    obstacles: &mut Obstacles,
) -> Result<()> {
    let uuid = target.domain.definition.uuid().to_string();
    let remembered: Option<Lineage> = state::read(&target.on, Kind::Lineage, &uuid).await?;
    match remembered {
        Some(lineage) => lineage.check(source, target, obstacles),
        None => obstacles.refused(
            format!(
                "{} on {} was not made by this program from {}; last written: {}; its source's disks: {}",
                target.name(),
                target.on.host(),
                source.name(),
                last_written(target),
                last_written(source)
            ),
            "are the arguments in the right order? give --overwrite if its disks may be lost",
        ),
    }
    Ok(())
}

/// When the disks of a VM were last written, for people.
fn last_written(survey: &Survey) -> String {
    let times = survey.disks.iter().flat_map(|disk| &disk.images);
    let last = times.map(|image| image.facts.modified.as_str()).max();
    last.map_or_else(|| "never".to_owned(), when)
}

/// Seconds since 1970 as a date.
fn when(seconds: &str) -> String {
    let whole = seconds.split('.').next().and_then(|text| text.parse().ok());
    let time = whole.map(std::time::Duration::from_secs);
    match time.and_then(|since| std::time::UNIX_EPOCH.checked_add(since)) {
        Some(time) => humantime::format_rfc3339_seconds(time).to_string(),
        None => "an unknown time".to_owned(),
    }
}

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_for_people() {
        assert_eq!(when("0.5"), "1970-01-01T00:00:00Z");
        assert_eq!(when("x"), "an unknown time");
    }
}
