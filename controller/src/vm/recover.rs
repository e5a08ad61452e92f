//! `recover`, as far as VMs go: what runs that broke off have left on a hypervisor besides disks,
//! by the records that this program keeps there. A record whose run still goes on is locked, and
//! left alone. A host without records is not asked for libvirt.
//!
//! ```text
//!  held      the VM is resumed or its backup job ended, and what was made for that is removed
//!  clones    what was made for a VM that never came to be is removed
//!  lineage   images that stand on another get their own reference to it again; that a sync has
//!            not ended stays remembered for the next one where it may have left a mixture
//! ```

use kvm_clone_protocol::message::{Fate, Recovery};

use super::checks::is_at;
use super::lineage;
use super::live::{self, HeldVm};
use super::record::CloneRecord;
use super::state::{self, Kind};
use crate::error::{Error, Result};
use crate::libvirt::Hypervisor;
use crate::libvirt::definition::Definition;
use crate::transfer::recover::Left as LeftDisk;

/// What a record was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// A VM that is there.
    Vm,
    /// A VM that was to be.
    Clone,
}

/// What was found, and what became of it.
#[derive(Debug, Clone)]
pub struct Left {
    /// What it is about.
    pub subject: Subject,
    /// The VM's name.
    pub name: String,
    /// What became of it.
    pub fate: Fate,
    /// Why, where that is not plain.
    pub note: String,
}

/// Sees to everything of this kind on a hypervisor, once its `disks` are seen to.
///
/// # Errors
/// When the host cannot be reached; what cannot be ended is in the answer.
pub async fn recover(on: &Hypervisor, recovery: Recovery, disks: &[LeftDisk]) -> Result<Vec<Left>> {
    let mut all = Vec::new();
    for kind in [Kind::Held, Kind::Clones, Kind::Lineage] {
        if recovery != Recovery::List {
            state::sweep(on, kind).await?;
        }
        for name in state::names(on, kind).await? {
            let left = see_to(on, kind, &name, recovery, disks).await;
            all.extend(left.unwrap_or_else(|error| Some(stuck(kind, &name, &error))));
        }
    }
    Ok(all)
}

/// What became of one record; `None` when nothing is left of what it tells.
async fn see_to(
    on: &Hypervisor,
    kind: Kind,
    name: &str,
    recovery: Recovery,
    disks: &[LeftDisk],
) -> Result<Option<Left>> {
    let Some(lock) = state::lock(on, kind, name).await? else {
        return running(on, kind, name).await;
    };
    let left = match kind {
        Kind::Held => let_go(on, name, recovery).await,
        Kind::Clones => undo(on, name, recovery).await,
        Kind::Lineage => reconnect(on, name, recovery, disks).await,
    };
    lock.end().await?;
    left
}

/// A run goes on, and is left alone. A sync is told of by its disks.
async fn running(on: &Hypervisor, kind: Kind, name: &str) -> Result<Option<Left>> {
    let name = match kind {
        Kind::Lineage => return Ok(None),
        Kind::Clones => name.to_owned(),
        Kind::Held => match state::read::<HeldVm>(on, kind, name).await? {
            Some(held) => held.vm,
            None => return Ok(None),
        },
    };
    Ok(Some(left(kind, &name, Fate::Running, "")))
}

async fn let_go(on: &Hypervisor, uuid: &str, recovery: Recovery) -> Result<Option<Left>> {
    let Some(held) = state::read::<HeldVm>(on, Kind::Held, uuid).await? else {
        return Ok(None);
    };
    let of = |fate, note: &str| Some(left(Kind::Held, &held.vm, fate, note));
    let Some(domain) = on.find_domain(uuid).await? else {
        held.remove_files(on).await?;
        state::forget(on, Kind::Held, uuid).await?;
        return Ok(None);
    };
    let what = held.what();
    if recovery == Recovery::List {
        let note = format!("it was {what}, and is {}", domain.state);
        return Ok(of(Fate::Unfinished, &note));
    }
    let state = live::let_go(on, uuid, domain.state, &held).await?;
    Ok(of(
        Fate::Finished,
        &format!("it was {what}, and is {state} now"),
    ))
}

async fn undo(on: &Hypervisor, name: &str, recovery: Recovery) -> Result<Option<Left>> {
    let Some(record) = CloneRecord::read(on, name).await? else {
        return Ok(None);
    };
    let of = |fate, note: &str| Ok(Some(left(Kind::Clones, name, fate, note)));
    let definitions = on.definitions().await?;
    if definitions.iter().any(|vm| vm.uuid() == record.uuid) {
        return of(
            Fate::Waiting,
            "it is defined; the same clone command ends it",
        );
    }
    let leftovers = record.leftovers();
    let uses = |vm: &&Definition| {
        let mut disks = vm.disks().iter();
        disks.any(|disk| leftovers.iter().any(|path| is_at(disk, path)))
    };
    if let Some(vm) = definitions.iter().find(uses) {
        let note = format!("{} has what was copied as a disk", vm.name());
        return of(Fate::Stuck, &note);
    }
    if recovery != Recovery::RollBack {
        return of(Fate::Waiting, "");
    }
    record.roll_back(on).await?;
    of(Fate::RolledBack, "")
}

async fn reconnect(
    on: &Hypervisor,
    uuid: &str,
    recovery: Recovery,
    disks: &[LeftDisk],
) -> Result<Option<Left>> {
    let Some(mut lineage) = lineage::unfinished(on, uuid).await? else {
        return Ok(None);
    };
    let Some(domain) = on.find_domain(uuid).await? else {
        return Ok(None);
    };
    let name = domain.definition.name().to_owned();
    let waits = "a sync has begun to change its disks and not ended; the next one does";
    if recovery == Recovery::List {
        return Ok(Some(left(Kind::Lineage, &name, Fate::Waiting, waits)));
    }
    let mut done = String::new();
    for path in lineage.end_overlays(on, uuid, disks).await? {
        done += &format!("; {path} has got what waited for it");
    }
    for path in lineage.restore_references(on).await? {
        done += &format!("; {path} has its own reference again");
    }
    let is_mixed = |fate| matches!(fate, Fate::Torn | Fate::Stuck | Fate::Unfinished);
    let are_whole = !disks.iter().any(|disk| is_mixed(disk.fate));
    let has_ended = are_whole && lineage.end_broken_off(on, domain).await?;
    let (fate, note) = match has_ended {
        true => (Fate::Finished, "a sync that had begun to change its disks"),
        false => (Fate::Waiting, waits),
    };
    Ok(Some(left(
        Kind::Lineage,
        &name,
        fate,
        &format!("{note}{done}"),
    )))
}

fn left(kind: Kind, name: &str, fate: Fate, note: &str) -> Left {
    Left {
        subject: match kind {
            Kind::Clones => Subject::Clone,
            Kind::Held | Kind::Lineage => Subject::Vm,
        },
        name: name.to_owned(),
        fate,
        note: note.to_owned(),
    }
}

fn stuck(kind: Kind, name: &str, error: &Error) -> Left {
    left(kind, name, Fate::Stuck, &error.one_line())
}
