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
//! lineage tells whoever comes after a run that broke off just then to do that step
//! ([`Overlays`]).

use kvm_clone_protocol::message::History;

use super::live::{Exhibit, Versions, export_directory};
use super::naming;
use super::overlays::Overlays;
use super::result::DiskResult;
use super::survey::Survey;
use super::transfers::Move;
use crate::endpoint::{DiskLocation, NbdUri};
use crate::error::Result;
use crate::host::{Export, Guard, export_socket};
use crate::libvirt::Hypervisor;

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

/// Images whose servers have ended, not yet in their places.
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
            directory: export_directory(uuid),
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

    /// Makes what the overlays hold durable, which the agents have had written, and notes them and
    /// the disks `beside` them.
    ///
    /// # Errors
    /// As [`Overlays::note`].
    pub(super) async fn note(&self, beside: &[String]) -> Result<Overlays> {
        let older = self.all.iter().filter(|each| each.exists);
        let images: Vec<String> = older.map(|each| each.path.clone()).collect();
        Overlays::note(&self.on, &images, beside).await
    }

    /// Ends the servers, and says whether they ended well.
    pub(super) async fn end(self) -> (Written, Result<()>) {
        let Self {
            on, all, servers, ..
        } = self;
        let ended = servers.end().await;
        let ended = ended
            .map_err(|error| error.context("what was written through qemu-nbd may not be whole"));
        (Written { on, all }, ended)
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

    /// The overlays among them.
    fn overlays(&self) -> Vec<String> {
        let overlays = self.all.iter().filter(|each| each.exists);
        overlays.map(Container::written).collect()
    }

    /// Gives new images their names, once they are durable.
    ///
    /// # Errors
    /// When one cannot be; it can be done again.
    pub(super) async fn name(&self) -> Result<()> {
        let host = self.on.host();
        for each in self.all.iter().filter(|each| !each.exists) {
            let written = each.written();
            host.tool_output(&["sync", "--", &written], b"").await?;
            let words = ["mv", "-f", "-T", "--", &written, &each.path];
            host.tool_output(&words, b"").await?;
            let (directory, _) = naming::split(&each.path);
            host.tool_output(&["sync", "--", directory], b"").await?;
        }
        Ok(())
    }

    /// Removes the overlays. What a new image has so far stays: the same command takes that up.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub(super) async fn discard(&self) -> Result<()> {
        self.on.host().remove(&self.overlays()).await
    }
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
