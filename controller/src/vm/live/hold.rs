//! The instant at which the disks of a source that runs are read.

use std::collections::BTreeMap;

use kvm_clone_protocol::message::History;

use super::changes::{self, Versions};
use super::exhibit::{Exhibit, export_directory};
use super::record::{HeldVm, Means, forget_unless_begun, remember};
use super::{Reading, snapshot};
use crate::endpoint::{DiskLocation, NbdUri};
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Export, Guard, Held, export_socket};
use crate::libvirt::DomainState;
use crate::transfer::{Consistency, LiveRead, Options};
use crate::vm::naming;
use crate::vm::result::{DiskResult, Scan};
use crate::vm::state::Kind;
use crate::vm::survey::Survey;
use crate::vm::transfers::Move;

/// The disks of a VM as they were at one instant, for as long as this is held. The host itself lets
/// the VM go when the connection to this program ends, however it ends.
#[derive(Debug)]
pub(in crate::vm) struct Hold {
    guard: Guard,
    /// Keeps others from taking it for one that was left behind.
    _lock: Guard,
    source: Survey,
    shows: Shows,
}

/// Where that instant is to be seen.
#[derive(Debug)]
pub(super) enum Shows {
    /// In the disks: the VM is suspended.
    Disks,
    /// In copies: their names, and those of the disks.
    Copies(Vec<(String, String)>),
    /// In what QEMU exports under the disks' targets.
    Export {
        socket: String,
        frozen: bool,
        /// The checkpoint that began with it.
        checkpoint: Option<String>,
        /// What it is built upon, of disks of which libvirt keeps note, by their targets.
        histories: BTreeMap<String, History>,
    },
    /// In what is exported of these disks of a VM that is off, and in the others themselves.
    Images {
        directory: String,
        targets: Vec<String>,
    },
}

/// What the copies are to the guest, if its VM is read so and held, or not.
pub(in crate::vm) fn consistency(reading: Reading, hold: Option<&Hold>) -> Option<Consistency> {
    match (reading, hold.map(|hold| &hold.shows)) {
        (Reading::Still | Reading::Contents, _) => None,
        (Reading::Torn, _) => Some(Consistency::Torn),
        (_, Some(Shows::Export { frozen: true, .. })) => Some(Consistency::Application),
        _ => Some(Consistency::Crash),
    }
}

impl Hold {
    /// Begins to hold a VM, if its disks are to be read that way. By `versions` a snapshot is built
    /// upon what the last run has left; what keeps it from that goes to `warnings`.
    ///
    /// # Errors
    /// When it cannot be held; it runs on then.
    pub(in crate::vm) async fn begin(
        source: &Survey,
        reading: Reading,
        versions: Option<&Versions>,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        let (guard, lock, shows) = match reading {
            Reading::Still | Reading::Torn => return Ok(None),
            Reading::Paused if source.domain.state != DomainState::Running => return Ok(None),
            Reading::Paused => Box::pin(suspend(source)).await?,
            Reading::Snapshot(quiesce) => {
                Box::pin(snapshot::begin(source, quiesce, versions, warnings)).await?
            }
            Reading::Contents => match Box::pin(export(source)).await? {
                None => return Ok(None),
                Some(exported) => exported,
            },
        };
        Ok(Some(Self {
            guard,
            _lock: lock,
            source: source.clone(),
            shows,
        }))
    }

    /// Has what shows the instant read in place of the disks.
    pub(in crate::vm) fn redirect(&self, disks: &mut [Move], options: &mut Options) {
        if matches!(self.shows, Shows::Disks) {
            return;
        }
        for disk in disks {
            disk.read_from = self.location(disk, &disk.source);
        }
        // Nobody writes to what is read.
        options.live = LiveRead::No;
    }

    /// The same for disks at a destination that are compared, and not written to.
    pub(in crate::vm) fn redirect_destination(&self, disks: &mut [Move]) {
        for disk in disks {
            disk.write_to = self.location(disk, &disk.destination);
        }
    }

    /// Where the instant of a disk is to be seen, whose image has this path.
    fn location(&self, disk: &Move, path: &str) -> Option<DiskLocation> {
        let export = |socket: &str| DiskLocation::Nbd(NbdUri::of_socket(socket, &disk.target));
        match &self.shows {
            Shows::Disks => None,
            Shows::Copies(copies) => copies
                .iter()
                .find(|(_, name)| name == path)
                .map(|(copy, _)| DiskLocation::Path(copy.into())),
            Shows::Export {
                socket, histories, ..
            } => {
                let history = histories.get(&disk.target).cloned();
                let uri = NbdUri::of_socket(socket, &disk.target).with_history(history);
                disk.is_of_guest.then_some(DiskLocation::Nbd(uri))
            }
            Shows::Images { directory, targets } => {
                let is_shown = disk.is_of_guest && targets.contains(&disk.target);
                is_shown.then(|| export(&export_socket(directory, &disk.target)))
            }
        }
    }

    /// Says of each disk whether all of it was read, or only what libvirt told to be changed.
    pub(in crate::vm) fn name_results(
        &self,
        options: &Options,
        disks: &mut [DiskResult],
        warnings: &mut Vec<String>,
    ) {
        let Shows::Export { histories, .. } = &self.shows else {
            return;
        };
        for disk in disks {
            let target = &disk.target;
            let history = histories.get(target);
            let is_told = history.is_some_and(|history| history.changed.is_some());
            let transfer = &disk.transfer;
            let is_trusted = transfer.bytes_trusted_source.is_some_and(|bytes| bytes > 0)
                || transfer.bytes_read_source == Some(0);
            disk.scan = Some(match is_told && is_trusted {
                true => Scan::Changes,
                false => Scan::Full,
            });
            if is_told && !is_trusted && transfer.success && !options.full_scan {
                warnings.push(format!(
                    "disk {target}: what was kept of the last sync cannot be used, and all was read"
                ));
            }
        }
    }

    /// Lets the VM go. Unless the run went `well`, nothing is built upon its snapshot.
    ///
    /// # Errors
    /// No space, when the host has let it go before; interrupted, when the host does so by itself; io,
    /// when it could not be let go, so that it may not run.
    pub(in crate::vm) async fn end(self, well: bool) -> Result<()> {
        let Self {
            guard,
            source,
            shows,
            ..
        } = self;
        let vm = source.name();
        let (full, ended) = guard.end_backup().await;
        if let Shows::Export {
            checkpoint: Some(name),
            ..
        } = &shows
            && !well
        {
            changes::delete(&source, name).await?;
        }
        if full {
            let message =
                format!("{vm} wrote more than there is room for, and its snapshot was given up");
            return Err(Error::new(ErrorCode::NoSpace, message)
                .hint("the VM runs on; make room beside its disks, or sync when it writes less"));
        }
        let (what, hint) = match shows {
            Shows::Disks => (
                "could not be resumed",
                "resume it now: virsh resume".to_owned(),
            ),
            Shows::Copies(copies) => (
                "has copies of its disks that could not be removed",
                copies.first().map_or_else(String::new, |(copy, _)| {
                    format!("remove them: {copy} and the like")
                }),
            ),
            Shows::Export { .. } => (
                "has a backup job that did not end",
                "end it: virsh domjobabort".to_owned(),
            ),
            Shows::Images { directory, .. } => (
                "is exported by a qemu-nbd that did not end",
                format!("end it: its process is noted in {directory}"),
            ),
        };
        ended.map_err(|error| {
            if error.code() == ErrorCode::Interrupted {
                let host = source.on.host();
                let message = format!("the connection to {host} broke while {vm} was held there");
                return Error::new(ErrorCode::Interrupted, message).hint(format!(
                    "it is let go there; \"kvm-clone-ctl recover {host}\" tells whether it was"
                ));
            }
            Error::new(ErrorCode::Io, format!("{vm} {what}"))
                .caused_by(error.one_line())
                .hint(hint)
        })
    }
}

/// Has the images that the guest writes to hold still. Those below them are written to by nobody.
async fn suspend(source: &Survey) -> Result<(Guard, Guard, Shows)> {
    let (on, uuid) = (&source.on, source.domain.definition.uuid().to_string());
    let images = source.disks.iter().map(|disk| &disk.images[0].path);
    let copies: Vec<_> = images
        .map(|name| (beside(name, "kc-paused"), name.clone()))
        .collect();
    let means = Means::Suspended {
        copies: copies.iter().map(|(copy, _)| copy.clone()).collect(),
    };
    let lock = remember(on, &uuid, &HeldVm::new(source.name(), means)).await?;
    let note = Kind::Held.path(&uuid);
    let pairs: Vec<_> = copies
        .iter()
        .map(|(to, from)| (from.clone(), to.clone()))
        .collect();
    let vm = Held {
        uri: on.uri(),
        vm: &uuid,
    };
    let forget = ["rm", "-f", "--", &note];
    let begun = on.host().suspend(vm, &pairs, &forget).await;
    let (guard, copied) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            forget_unless_begun(on, &uuid, &error).await?;
            let (vm, host) = (source.name(), on.host());
            return Err(error.context(format!("{vm} on {host} cannot be suspended")));
        }
    };
    let shows = if copied {
        Shows::Copies(copies)
    } else {
        Shows::Disks
    };
    Ok((guard, lock, shows))
}

/// Has what the guest of a VM that is off sees exported, of the disks whose images hold it in a way of
/// their own.
async fn export(source: &Survey) -> Result<Option<(Guard, Guard, Shows)>> {
    let disks = source.disks.iter().filter(|disk| !disk.is_plain());
    let images: Vec<Export> = disks
        .map(|disk| Export {
            name: disk.target.clone(),
            path: disk.images[0].path.clone(),
            format: disk.images[0].format.clone(),
            is_device: disk.images[0].is_device(),
            is_writable: false,
        })
        .collect();
    if images.is_empty() {
        return Ok(None);
    }
    let targets = images.iter().map(|image| image.name.clone()).collect();
    let exhibit = Exhibit {
        on: &source.on,
        vm: source.name(),
        uuid: &source.domain.definition.uuid().to_string(),
        images,
        overlays: Vec::new(),
    };
    let (guard, lock) = exhibit.open(async { Ok(()) }).await?;
    let directory = export_directory(exhibit.uuid);
    Ok(Some((guard, lock, Shows::Images { directory, targets })))
}

/// A name of ours in the directory of an image.
pub(super) fn beside(path: &str, suffix: &str) -> String {
    let (directory, name) = naming::split(path);
    naming::join(directory, &format!(".{name}.{suffix}"))
}
