//! A source that runs. Its disks are read only if the user chose how: as they were at an instant at
//! which the VM was suspended, or torn.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::naming;
use super::obstacle::Obstacles;
use super::state::{self, Kind};
use super::survey::Survey;
use super::transfers::Move;
use crate::cli::options::BadValue;
use crate::error::{Error, ErrorCode, Result};
use crate::host::Guard;
use crate::libvirt::{DomainState, Hypervisor};
use crate::transfer::{LiveRead, Options};

/// What the user wants to be done about a VM that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LiveChoice {
    /// What is safe in this version: refuse.
    #[default]
    Auto,
    /// Refuse.
    Refuse,
    /// Suspend the VM while its disks are copied by sharing their blocks, or, where that cannot be
    /// done, while they are read.
    Pause,
    /// Read its disks as they are, and say so.
    Torn,
}

impl FromStr for LiveChoice {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "auto" => Ok(Self::Auto),
            "refuse" => Ok(Self::Refuse),
            "pause" => Ok(Self::Pause),
            "torn" => Ok(Self::Torn),
            _ => Err(BadValue::new("expected auto, refuse, pause or torn")),
        }
    }
}

/// What the source's host remembers of a VM that was suspended, until it runs again.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Paused {
    format: u32,
    pub(super) vm: String,
    /// What its disks are read from.
    pub(super) copies: Vec<String>,
}

impl LiveChoice {
    /// How the source's disks are read, as the state of the VM wants it.
    pub(super) fn read(self, state: DomainState) -> LiveRead {
        match self {
            _ if state.is_off() => LiveRead::No,
            Self::Pause => LiveRead::Paused,
            Self::Torn => LiveRead::Torn,
            Self::Auto | Self::Refuse => LiveRead::No,
        }
    }

    /// Adds the obstacle that a running source is.
    pub(super) fn check(self, source: &Survey, obstacles: &mut Obstacles) {
        let (state, vm) = (source.domain.state, source.name());
        match self {
            Self::Auto | Self::Refuse if !state.is_off() => obstacles.refused(
                format!("{vm} on {} is {state}", source.on.host()),
                "shut it down, or choose how its disks are read: --live pause suspends it meanwhile, \
                 --live torn reads them as they are",
            ),
            Self::Pause if state == DomainState::Stopping => obstacles.refused(
                format!("{vm} on {} is shutting down", source.on.host()),
                "wait until it is off",
            ),
            _ => {}
        }
    }
}

/// A VM whose disks are as they were at one instant for as long as this is held: copies of them,
/// or the VM is suspended. The host itself removes the copies and resumes the VM when the connection
/// to this program ends, however it ends.
#[derive(Debug)]
pub(super) struct Suspension {
    guard: Guard,
    /// Keeps others from taking it for one that was left behind.
    _lock: Guard,
    vm: String,
    /// What the disks are read from, by their own names; nothing where the VM is suspended.
    copies: Vec<(String, String)>,
}

impl Suspension {
    /// Has the images that the guest writes to hold still, if the VM runs and is to be suspended.
    /// Those below them are written to by nobody.
    ///
    /// # Errors
    /// When it cannot be suspended; it runs on then.
    pub(super) async fn begin(source: &Survey, choice: LiveChoice) -> Result<Option<Self>> {
        if choice != LiveChoice::Pause || source.domain.state != DomainState::Running {
            return Ok(None);
        }
        let (on, uuid) = (&source.on, source.domain.definition.uuid().to_string());
        let vm = source.name().to_owned();
        let images = source.disks.iter().filter_map(|disk| disk.images.first());
        let names = images.map(|image| image.path.clone());
        let mut copies: Vec<_> = names.map(|name| (copy_name(&name), name)).collect();
        let paused = Paused {
            format: 1,
            vm: vm.clone(),
            copies: copies.iter().map(|(copy, _)| copy.clone()).collect(),
        };
        let lock = state::lock(on, Kind::Paused, &uuid).await?;
        let lock = lock.ok_or_else(|| suspended(on, &vm))?;
        state::write(on, Kind::Paused, &uuid, &paused).await?;
        let note = Kind::Paused.path(&uuid);
        let pairs: Vec<_> = copies
            .iter()
            .map(|(to, from)| (from.clone(), to.clone()))
            .collect();
        let forget = ["rm", "-f", "--", &note];
        let guard = on.host().suspend(on.uri(), &uuid, &pairs, &forget).await;
        if guard.is_err() {
            state::forget(on, Kind::Paused, &uuid).await?;
        }
        let (guard, copied) = guard.map_err(|error| {
            let (vm, host) = (source.name(), on.host());
            error.context(format!("{vm} on {host} cannot be suspended"))
        })?;
        if !copied {
            copies.clear();
        }
        Ok(Some(Self {
            guard,
            _lock: lock,
            vm,
            copies,
        }))
    }

    /// Has the copies read in place of the disks, where there are some.
    pub(super) fn redirect(&self, disks: &mut [Move], options: &mut Options) {
        if self.copies.is_empty() {
            return;
        }
        for disk in disks {
            let copy = self.copies.iter().find(|(_, name)| *name == disk.source);
            disk.read_from = copy.map(|(copy, _)| copy.clone());
        }
        // Nobody writes to them.
        options.live = LiveRead::No;
    }

    /// Removes the copies, or resumes the VM.
    ///
    /// # Errors
    /// When that could not be done, so that the VM may not run again.
    pub(super) async fn end(self) -> Result<()> {
        self.guard.end().await.map_err(|error| {
            let (what, hint) = match self.copies.first() {
                None => (
                    "could not be resumed",
                    "resume it now: virsh resume".to_owned(),
                ),
                Some((copy, _)) => (
                    "has copies of its disks that could not be removed",
                    format!("remove them: {copy} and the like"),
                ),
            };
            Error::new(ErrorCode::Io, format!("{} {what}", self.vm))
                .caused_by(error.one_line())
                .hint(hint)
        })
    }
}

/// The name of the copy that is read in a disk's place.
fn copy_name(disk: &str) -> String {
    let (directory, name) = naming::split(disk);
    naming::join(directory, &format!(".{name}.kc-paused"))
}

/// The error for a VM that another run has suspended, and will resume.
fn suspended(on: &Hypervisor, vm: &str) -> Error {
    let message = format!("another run has suspended {vm} on {}", on.host());
    Error::new(ErrorCode::Busy, message).hint("wait until it has ended")
}

/// Looks for what a run that broke off left: a VM that it had suspended. Such a VM is resumed, and
/// the user is told.
///
/// # Errors
/// Busy, when that run has not broken off; when the host cannot be asked, or the VM does not run
/// again.
pub(super) async fn mend(
    on: &Hypervisor,
    survey: &mut Survey,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let uuid = survey.domain.definition.uuid().to_string();
    let Some(paused) = state::read::<Paused>(on, Kind::Paused, &uuid).await? else {
        return Ok(());
    };
    let Some(lock) = state::lock(on, Kind::Paused, &uuid).await? else {
        return Err(suspended(on, &paused.vm));
    };
    let vm = &paused.vm;
    survey.domain.state = resume(on, &uuid, survey.domain.state, &paused.copies).await?;
    warnings.push(format!(
        "an earlier run broke off while it had {vm} suspended; it is {} now",
        survey.domain.state
    ));
    lock.end().await
}

/// Resumes a VM that a run which broke off may have left suspended, and removes the copies that it
/// may have left. Gives back what the VM does now.
///
/// # Errors
/// When the host cannot be asked, or the VM does not run again.
pub(super) async fn resume(
    on: &Hypervisor,
    uuid: &str,
    state: DomainState,
    copies: &[String],
) -> Result<DomainState> {
    let state = if state == DomainState::Paused {
        on.virsh(&["resume", uuid]).await?;
        on.state(uuid).await?
    } else {
        state
    };
    on.host().remove(copies).await?;
    state::forget(on, Kind::Paused, uuid).await?;
    Ok(state)
}
