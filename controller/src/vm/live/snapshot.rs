//! A snapshot of a VM that runs: a backup job of libvirt's, by which QEMU exports the disks as they
//! were at one instant, and keeps in scratch files what the guest overwrites of that.

use kvm_clone_protocol::message::History;

use super::Quiesce;
use super::changes::{self, Versions};
use super::hold::{Shows, beside};
use super::record::{HeldVm, Means, forget_unless_begun, remember};
use crate::error::{ErrorCode, Result};
use crate::host::{Backup, Guard, Held, Place};
use crate::libvirt::{BackupDisk, backup_job, changes_context, checkpoint};
use crate::vm::state::Kind;
use crate::vm::survey::{Survey, SurveyedDisk};

/// Where QEMU may make a socket, and files for what is overwritten of a block device.
pub(super) const QEMU_DIRECTORY: &str = "/var/lib/libvirt/qemu";

/// What a backup job leaves free on the file systems of its scratch files, where the images of other
/// guests may lie, in bytes: what a guest on fast storage writes between two looks.
pub(super) const MIN_FREE: u64 = 512 << 20;

/// A snapshot that is to be.
struct Snapshot<'a> {
    source: &'a Survey,
    uuid: String,
    quiesce: Quiesce,
    socket: String,
    scratch: Vec<String>,
    /// The checkpoint that is to begin with it.
    becomes: Option<&'a str>,
}

/// What libvirt is asked for: the checkpoint since which each disk's changes are told of, and whether
/// they are noted from now on.
struct Wanted<'a> {
    since: Vec<Option<&'a str>>,
    is_tracked: Vec<bool>,
}

/// Begins a snapshot, which is built upon what the last run has left as far as libvirt knows what was
/// written since. What it does not know goes to `warnings`.
///
/// # Errors
/// When libvirt does not begin the job; the VM runs on then.
pub(super) async fn begin(
    source: &Survey,
    quiesce: Quiesce,
    versions: Option<&Versions>,
    warnings: &mut Vec<String>,
) -> Result<(Guard, Guard, Shows)> {
    let (on, uuid) = (&source.on, source.domain.definition.uuid().to_string());
    let disks = source.disks.iter();
    let becomes = versions.map(|versions| versions.becomes.name());
    let snapshot = Snapshot {
        socket: format!("{QEMU_DIRECTORY}/kc-{uuid}.sock"),
        scratch: disks.map(|disk| scratch(disk, &uuid)).collect(),
        source,
        uuid,
        quiesce,
        becomes,
    };
    let means = Means::Backup {
        socket: snapshot.socket.clone(),
        scratch: snapshot.scratch.clone(),
        checkpoint: becomes.map(str::to_owned),
    };
    let uuid = &snapshot.uuid;
    let lock = remember(on, uuid, &HeldVm::new(source.name(), means)).await?;
    match snapshot.begin(versions, warnings).await {
        Ok((guard, shows)) => Ok((guard, lock, shows)),
        Err(error) => {
            forget_unless_begun(on, uuid, &error).await?;
            let hint = match error.code() {
                ErrorCode::NoSpace => "make room beside its disks, or shut it down",
                ErrorCode::MissingRequirement => {
                    "start qemu-guest-agent in the guest; --quiesce auto takes the copy as after a power cut"
                }
                _ => "--live pause suspends it meanwhile; or shut it down",
            };
            let (vm, host) = (source.name(), on.host());
            Err(error
                .context(format!("{vm} on {host} cannot be copied while it runs"))
                .hint(hint))
        }
    }
}

impl Snapshot<'_> {
    /// As much of what is wanted as libvirt gives.
    async fn begin(
        &self,
        versions: Option<&Versions>,
        warnings: &mut Vec<String>,
    ) -> Result<(Guard, Shows)> {
        let can = match versions {
            Some(_) => changes::can_be_tracked(self.source),
            None => vec![false; self.source.disks.len()],
        };
        let nothing = vec![None; can.len()];
        if let Some(versions) = versions
            && let Some(since) = self.since(versions, &can, warnings).await?
        {
            let wanted = Wanted {
                since,
                is_tracked: can.clone(),
            };
            match self.ask(&wanted).await {
                Err(error) if error.code() == ErrorCode::Refused => {
                    warnings.push(unknown(&error.one_line()));
                    changes::prune(self.source, versions).await?;
                }
                done => return done,
            }
        }
        if can.contains(&true) {
            let wanted = Wanted {
                since: nothing.clone(),
                is_tracked: can.clone(),
            };
            match self.ask(&wanted).await {
                Err(error) if error.code() == ErrorCode::Refused => {
                    let why = error.one_line();
                    warnings.push(format!(
                        "the next sync reads all as well, without a checkpoint: {why}"
                    ));
                }
                done => return done,
            }
        }
        let is_tracked = vec![false; can.len()];
        let since = nothing;
        self.ask(&Wanted { since, is_tracked }).await
    }

    /// The checkpoint since which the changes of each disk are known; `None` where none is.
    async fn since<'v>(
        &self,
        versions: &'v Versions,
        can: &[bool],
        warnings: &mut Vec<String>,
    ) -> Result<Option<Vec<Option<&'v str>>>> {
        let Some(was) = versions.was.as_ref().filter(|_| can.contains(&true)) else {
            return Ok(None);
        };
        let tracked = match changes::tracked_since(self.source, versions, was).await? {
            Ok(tracked) => tracked,
            Err(why) => {
                warnings.push(unknown(why));
                return Ok(None);
            }
        };
        let disks = self.source.disks.iter().zip(can).filter(|(_, can)| **can);
        for (disk, _) in disks.filter(|(disk, _)| !tracked.contains(&disk.target)) {
            let target = &disk.target;
            warnings.push(format!(
                "disk {target} is new since the last sync, and all of it is read"
            ));
        }
        let each = self.source.disks.iter().zip(can);
        let since = each.map(|(disk, can)| {
            let is_tracked = *can && tracked.contains(&disk.target);
            is_tracked.then_some(was.name())
        });
        Ok(Some(since.collect()))
    }

    /// Begins the job in one way.
    async fn ask(&self, wanted: &Wanted<'_>) -> Result<(Guard, Shows)> {
        let each = self.source.disks.iter().zip(&self.scratch);
        let each = each.zip(wanted.since.iter().zip(&wanted.is_tracked));
        let disks: Vec<BackupDisk<'_>> = each
            .map(|((disk, scratch), (since, is_tracked))| BackupDisk {
                target: &disk.target,
                scratch,
                since: *since,
                is_tracked: *is_tracked,
            })
            .collect();
        let sizes = self.source.disks.iter().map(SurveyedDisk::size_bytes);
        let sizes: Vec<u64> = sizes.collect();
        let name = self.becomes.filter(|_| wanted.is_tracked.contains(&true));
        let backup = Backup {
            job: &backup_job(&self.socket, &disks),
            checkpoint: &name.map_or_else(String::new, |name| checkpoint(name, &disks)),
            quiesce: self.quiesce.as_str(),
            sizes: &sizes,
            place: Place {
                socket: &self.socket,
                scratch: &self.scratch,
                min_free: MIN_FREE,
            },
        };
        let on = &self.source.on;
        let vm = Held {
            uri: on.uri(),
            vm: &self.uuid,
        };
        let note = Kind::Held.path(&self.uuid);
        let forget = ["rm", "-f", "--", &note];
        let (guard, frozen) = on.host().back_up(vm, &backup, &forget).await?;
        let tracked = disks
            .iter()
            .zip(&self.source.disks)
            .filter(|(disk, _)| disk.is_tracked);
        let histories = tracked.filter_map(|(disk, surveyed)| {
            let history = History {
                image: surveyed.images[0].path.clone().into_bytes(),
                was: disk.since.map(str::to_owned),
                becomes: name?.to_owned(),
                changed: disk.since.map(|_| changes_context(disk.target)),
            };
            Some((disk.target.to_owned(), history))
        });
        let shows = Shows::Export {
            socket: self.socket.clone(),
            frozen,
            checkpoint: name.map(str::to_owned),
            histories: histories.collect(),
        };
        Ok((guard, shows))
    }
}

fn unknown(why: &str) -> String {
    format!("what was written since the last sync is not known, and all is read: {why}")
}

/// Where what the guest overwrites of a disk goes meanwhile: beside its image.
fn scratch(disk: &SurveyedDisk, uuid: &str) -> String {
    let image = &disk.images[0];
    if image.is_device() {
        return format!("{QEMU_DIRECTORY}/kc-{uuid}-{}.scratch", disk.target);
    }
    beside(&image.path, "kc-scratch")
}
