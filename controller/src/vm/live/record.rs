//! What a host remembers of a VM that is held, until it is let go: by the guard there, or by whoever
//! comes after one that broke off.

use serde::{Deserialize, Serialize};

use super::changes;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{FREEZE_STATUS, Guard, Held, Place};
use crate::libvirt::{DomainState, Hypervisor};
use crate::vm::lineage;
use crate::vm::state::{self, Kind};
use crate::vm::survey::Survey;

/// A VM that is held.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::vm) struct HeldVm {
    format: u32,
    pub(in crate::vm) vm: String,
    pub(super) by: Means,
}

/// What holds it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub(super) enum Means {
    /// It is suspended, until there are these copies.
    Suspended {
        /// Paths.
        copies: Vec<String>,
    },
    /// A backup job.
    Backup {
        /// Path of the socket of its export.
        socket: String,
        /// Paths of its scratch files.
        scratch: Vec<String>,
        /// The checkpoint that begins with it.
        checkpoint: Option<String>,
    },
    /// What its guest sees is exported: the VM is off.
    Export {
        /// Where the sockets are.
        directory: String,
        /// What is written meanwhile, and of no use if it is not finished.
        overlays: Vec<String>,
    },
}

impl HeldVm {
    pub(super) fn new(vm: &str, by: Means) -> Self {
        Self {
            format: 1,
            vm: vm.to_owned(),
            by,
        }
    }

    /// What was done with it, for people.
    pub(in crate::vm) fn what(&self) -> &'static str {
        match self.by {
            Means::Suspended { .. } => "suspended",
            Means::Backup { .. } => "held by a backup job",
            Means::Export { .. } => "exported",
        }
    }

    /// Removes the files of a VM that is no longer there.
    pub(in crate::vm) async fn remove_files(&self, on: &Hypervisor) -> Result<()> {
        match &self.by {
            Means::Suspended { copies } => on.host().remove(copies).await,
            Means::Backup {
                socket, scratch, ..
            } => {
                on.host().remove(std::slice::from_ref(socket)).await?;
                on.host().remove(scratch).await
            }
            Means::Export {
                directory,
                overlays,
            } => {
                on.host().end_export(directory).await?;
                on.host().remove(overlays).await
            }
        }
    }
}

/// Remembers on the host that a VM is to be held, so that it is let go also when its guard is gone.
///
/// # Errors
/// Busy, when another run holds it; when the host cannot be asked.
pub(super) async fn remember(on: &Hypervisor, uuid: &str, held: &HeldVm) -> Result<Guard> {
    let lock = state::lock(on, Kind::Held, uuid).await?;
    let lock = lock.ok_or_else(|| busy(on, held))?;
    state::write(on, Kind::Held, uuid, held).await?;
    Ok(lock)
}

/// The error for a VM that another run holds, and will let go.
fn busy(on: &Hypervisor, held: &HeldVm) -> Error {
    let (vm, what) = (&held.vm, held.what());
    let message = format!("{vm} on {} is {what} by another run", on.host());
    Error::new(ErrorCode::Busy, message).hint("wait until it has ended")
}

/// Forgets a VM that was to be held and is not: the host has said so. Where the connection broke,
/// nobody knows.
///
/// # Errors
/// When the host cannot be asked.
pub(super) async fn forget_unless_begun(on: &Hypervisor, uuid: &str, error: &Error) -> Result<()> {
    match error.code() {
        ErrorCode::HostUnreachable | ErrorCode::Interrupted => Ok(()),
        _ => state::forget(on, Kind::Held, uuid).await,
    }
}

/// Looks for what a run that broke off left: a VM that it had held. Such a VM is let go, and the
/// user is told.
///
/// # Errors
/// Busy, when that run has not broken off; when the host cannot be asked, or the VM does not run
/// again.
pub(in crate::vm) async fn mend(
    on: &Hypervisor,
    survey: &mut Survey,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let uuid = survey.domain.definition.uuid().to_string();
    let Some(held) = state::read::<HeldVm>(on, Kind::Held, &uuid).await? else {
        return Ok(());
    };
    let Some(lock) = state::lock(on, Kind::Held, &uuid).await? else {
        return Err(busy(on, &held));
    };
    let was = survey.domain.state;
    survey.domain.state = let_go(on, &uuid, was, &held).await?;
    warnings.push(format!(
        "an earlier run broke off while {} was {}; it is {} now",
        held.vm,
        held.what(),
        survey.domain.state
    ));
    lock.end().await
}

/// Lets a VM go that a run which broke off may have left held. Gives back what the VM does now.
///
/// # Errors
/// When the host cannot be asked, or the VM does not run again.
pub(in crate::vm) async fn let_go(
    on: &Hypervisor,
    uuid: &str,
    state: DomainState,
    held: &HeldVm,
) -> Result<DomainState> {
    match &held.by {
        Means::Suspended { copies } => {
            if state == DomainState::Paused {
                on.virsh(&["resume", uuid]).await?;
            }
            on.host().remove(copies).await?;
        }
        Means::Backup {
            socket,
            scratch,
            checkpoint,
        } => {
            thaw(on, uuid).await?;
            let vm = Held {
                uri: on.uri(),
                vm: uuid,
            };
            let place = Place {
                socket,
                scratch,
                min_free: 0,
            };
            on.host().end_backup(vm, &place).await?;
            // Whether the destination has what it stands for, nobody knows here.
            if let Some(name) = checkpoint {
                changes::delete_of(on, uuid, name).await?;
            }
        }
        Means::Export {
            directory,
            overlays,
        } => {
            on.host().end_export(directory).await?;
            // Those that the lineage names may count.
            let lineage = lineage::unfinished(on, uuid).await?;
            let named = lineage.and_then(|lineage| Some(lineage.overlays()?.files()));
            let named = named.unwrap_or_default();
            let unnamed = overlays.iter().filter(|overlay| !named.contains(overlay));
            let unnamed: Vec<String> = unnamed.cloned().collect();
            on.host().remove(&unnamed).await?;
        }
    }
    state::forget(on, Kind::Held, uuid).await?;
    on.state(uuid).await
}

/// Thaws the guest's file systems, if its agent says that they are frozen.
async fn thaw(on: &Hypervisor, uuid: &str) -> Result<()> {
    let words = ["qemu-agent-command", "--timeout", "5", uuid, FREEZE_STATUS];
    // No agent, no freeze.
    let answer = on.virsh(&words).await.unwrap_or_default();
    if answer.contains("frozen") {
        on.virsh(&["domfsthaw", uuid]).await?;
    }
    Ok(())
}
