//! Images at the destination that hold what a guest sees in a format of their own, qcow2: written
//! through `qemu-nbd` there.
//!
//! ```text
//!  new image     .NAME.kc-partial   is written, and gets its name when it is whole
//!  older copy    .NAME.kc-overlay   stands on NAME and takes what differs; NAME is read
//!                .NAME.kc-applying  is NAME while it gets that (qemu-img commit), which can be done
//!                                   again
//! ```
//!
//! So the image is the old one or the new one: for the time of the last step it has no name, and the
//! lineage tells whoever comes after a run that broke off just then to do that step.

use std::collections::BTreeMap;

use kvm_clone_protocol::message::History;

use super::lineage::Left;
use super::live::{Exhibit, Versions};
use super::naming;
use super::result::DiskResult;
use super::survey::Survey;
use super::transfers::Move;
use crate::endpoint::{DiskLocation, NbdUri};
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Export, Guard, export_socket};
use crate::libvirt::Hypervisor;
use crate::output;

/// An image that gets what a guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Container {
    /// The disk.
    pub(super) target: String,
    /// Where the image is, or will be.
    pub(super) path: String,
    /// `qcow2`.
    pub(super) format: String,
    /// What the guest sees, in bytes.
    pub(super) size_bytes: u64,
    /// There is an older copy.
    pub(super) exists: bool,
}

impl Container {
    /// What is written.
    fn written(&self) -> String {
        let (directory, name) = naming::split(&self.path);
        let name = match self.exists {
            true => naming::overlay(name),
            false => naming::partial(name),
        };
        naming::join(directory, &name)
    }
}

/// The images of `target` that get what the guest of `source` sees of its disks. A plain one is
/// written as it is.
pub(super) fn of_target(source: &Survey, target: &Survey) -> Vec<Container> {
    let disks = target.disks.iter().filter(|disk| !disk.is_plain());
    disks
        .filter_map(|disk| {
            let ours = source
                .disks
                .iter()
                .find(|ours| ours.target == disk.target)?;
            let image = &disk.images[0];
            Some(Container {
                target: disk.target.clone(),
                path: image.path.clone(),
                format: image.format.clone(),
                size_bytes: ours.size_bytes(),
                exists: true,
            })
        })
        .collect()
}

/// Images that are being written, until their servers are ended.
#[derive(Debug)]
pub(super) struct Containers {
    on: Hypervisor,
    all: Vec<Container>,
    directory: String,
    servers: Guard,
    /// Keeps others from taking them for what was left behind.
    _lock: Guard,
}

/// Images whose servers have ended: whole, and not yet in their places.
#[derive(Debug)]
pub(super) struct Written {
    on: Hypervisor,
    all: Vec<Container>,
}

impl Containers {
    /// Makes what is written, and has it exported for the VM `uuid`. `None` where there is nothing
    /// of that kind.
    ///
    /// # Errors
    /// When an image cannot be made or exported; then nothing is left of it.
    pub(super) async fn open(
        on: &Hypervisor,
        vm: &str,
        uuid: &str,
        all: Vec<Container>,
    ) -> Result<Option<Self>> {
        if all.is_empty() {
            return Ok(None);
        }
        let written = Written {
            on: on.clone(),
            all,
        };
        let images = written.all.iter().map(|each| Export {
            name: each.target.clone(),
            path: each.written(),
            format: each.format.clone(),
            is_device: false,
            is_writable: true,
        });
        let exhibit = Exhibit {
            on,
            vm,
            uuid,
            images: images.collect(),
            overlays: written.overlays(),
        };
        let (servers, lock) = exhibit.open(written.make()).await?;
        Ok(Some(Self {
            on: on.clone(),
            directory: exhibit.directory(),
            servers,
            _lock: lock,
            all: written.all,
        }))
    }

    /// Has them written in place of the images, which were one version and become another.
    pub(super) fn redirect(&self, disks: &mut [Move], versions: &Versions) {
        for disk in disks.iter_mut().filter(|disk| disk.is_of_guest) {
            if let Some(container) = self.all.iter().find(|each| each.path == disk.destination) {
                let socket = export_socket(&self.directory, &container.target);
                let was = versions.was.as_ref().filter(|_| container.exists);
                let history = History {
                    image: container.path.clone().into_bytes(),
                    was: was.map(|was| was.name().to_owned()),
                    becomes: versions.becomes.name().to_owned(),
                    changed: None,
                };
                let uri = NbdUri::of_socket(&socket, &container.target);
                disk.write_to = Some(DiskLocation::Nbd(uri.with_history(Some(history))));
            }
        }
    }

    /// Ends the servers. What was written is whole, if it was `copied`; else, and when there is no
    /// room for it, nothing is left of it.
    ///
    /// # Errors
    /// That of the copy; when a server does not end well; no space.
    pub(super) async fn end(self, copied: Result<()>) -> Result<Written> {
        let Self {
            on, all, servers, ..
        } = self;
        let ended = servers.end().await;
        let ended = ended
            .map_err(|error| error.context("what was written through qemu-nbd may not be whole"));
        let written = Written { on, all };
        let whole = match copied.and(ended) {
            Ok(()) => written.prepare().await,
            Err(error) => Err(error),
        };
        match whole {
            Ok(()) => Ok(written),
            Err(error) => {
                written.discard().await?;
                Err(error)
            }
        }
    }
}

impl Written {
    /// Makes the images that are written.
    async fn make(&self) -> Result<()> {
        for each in &self.all {
            let written = each.written();
            let size = each.size_bytes.to_string();
            if !each.exists && self.is_made(each, &written).await? {
                // An interrupted run is taken up.
                continue;
            }
            self.on
                .host()
                .remove(std::slice::from_ref(&written))
                .await?;
            let mut words = vec!["qemu-img", "create", "-q", "-f", each.format.as_str()];
            if each.exists {
                words.extend(["-F", &each.format, "-b", &each.path]);
            }
            words.extend([written.as_str(), &size]);
            // For its owner's eyes only, until libvirt gives it to QEMU.
            self.on.host().make_file(&written).await?;
            self.on.host().tool_output(&words, b"").await?;
        }
        Ok(())
    }

    async fn is_made(&self, each: &Container, written: &str) -> Result<bool> {
        if self.on.host().file_facts(written).await?.is_none() {
            return Ok(false);
        }
        let images = self.on.images(written, Some(&each.format), false).await;
        Ok(images.is_ok_and(|images| {
            images.len() == 1 && images[0].virtual_size_bytes == each.size_bytes
        }))
    }

    /// What the images are that stand below overlays, for [`commit`](Self::commit).
    ///
    /// # Errors
    /// When the host cannot be asked.
    pub(super) async fn images(&self) -> Result<BTreeMap<String, Left>> {
        let mut images = BTreeMap::new();
        for each in self.all.iter().filter(|each| each.exists) {
            if let Some(facts) = self.on.host().file_facts(&each.path).await? {
                images.insert(each.path.clone(), Left::of(&facts));
            }
        }
        Ok(images)
    }

    /// The overlays among them.
    fn overlays(&self) -> Vec<String> {
        let overlays = self.all.iter().filter(|each| each.exists);
        overlays.map(Container::written).collect()
    }

    /// Makes them durable, and sees that there is room for [`commit`](Self::commit).
    async fn prepare(&self) -> Result<()> {
        let host = self.on.host();
        for each in &self.all {
            let written = each.written();
            host.tool_output(&["sync", "--", &written], b"").await?;
            if !each.exists {
                continue;
            }
            let (directory, _) = naming::split(&each.path);
            let facts = host.file_facts(&written).await?;
            let needed = facts.map_or(0, |facts| facts.allocated_bytes);
            let free = host.space(directory).await?.free_bytes;
            if free < needed {
                let (free, needed) = (output::iec(free), output::iec(needed));
                return Err(Error::new(
                    ErrorCode::NoSpace,
                    format!(
                        "{directory} on {host} has {free} free, and up to {needed} more go into {}",
                        each.path
                    ),
                )
                .hint("make room there"));
            }
        }
        Ok(())
    }

    /// Puts them in their places.
    ///
    /// # Errors
    /// When one cannot be; it can be done again.
    pub(super) async fn commit(&self, images: &BTreeMap<String, Left>) -> Result<()> {
        commit(&self.on, images).await?;
        for each in self.all.iter().filter(|each| !each.exists) {
            let words = ["mv", "-f", "-T", "--", &each.written(), &each.path];
            self.on.host().tool_output(&words, b"").await?;
            let (directory, _) = naming::split(&each.path);
            self.on
                .host()
                .tool_output(&["sync", "--", directory], b"")
                .await?;
        }
        Ok(())
    }

    /// Removes them, but for what a new image has so far: the same command takes that up.
    ///
    /// # Errors
    /// When one cannot be removed.
    async fn discard(&self) -> Result<()> {
        self.on.host().remove(&self.overlays()).await
    }
}

/// Puts what overlays hold into the images that they stand on, which have no name meanwhile, so that no
/// VM starts on half of it; then removes them. `images` are what those were when the overlays were
/// whole: of one that somebody has used since the overlay is of no use, and is only removed. Gives back
/// the images that were changed.
///
/// # Errors
/// When one cannot be; it can be done again.
pub(super) async fn commit(
    on: &Hypervisor,
    images: &BTreeMap<String, Left>,
) -> Result<Vec<String>> {
    let host = on.host();
    let mut changed = Vec::new();
    for (image, left) in images {
        let [overlay, applying] = beside(image);
        if host.file_facts(&overlay).await?.is_none() {
            continue;
        }
        if host.file_facts(&applying).await?.is_none() {
            let facts = host.file_facts(image).await?;
            if facts.as_ref().map(Left::of).as_ref() != Some(left) {
                host.remove(&[overlay]).await?;
                continue;
            }
            host.tool_output(&["mv", "-T", "--", image, &applying], b"")
                .await?;
        }
        changed.push(image.clone());
    }
    for image in &changed {
        let [overlay, applying] = beside(image);
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
        host.remove(&[overlay]).await?;
    }
    Ok(changed)
}

/// The names of the overlay on an image, and of the image while it gets what that holds.
fn beside(image: &str) -> [String; 2] {
    let (directory, name) = naming::split(image);
    [naming::overlay(name), naming::applying(name)].map(|name| naming::join(directory, &name))
}

/// Says of disks that were written through a server what was done: their changes waited in an
/// overlay, or in a file without the disk's name.
pub(super) fn name_results(disks: &mut [DiskResult], moves: &[Move]) {
    for (disk, each) in disks.iter_mut().zip(moves) {
        if each.write_to.is_some() {
            disk.transfer.apply = "staged";
            disk.transfer
                .warnings
                .retain(|warning| !warning.contains("cannot be marked as torn"));
        }
    }
}
