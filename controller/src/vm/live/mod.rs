//! A source that runs. Its disks are read only as the user chose: as they are at one instant, or
//! torn.

use std::str::FromStr;

use super::obstacle::Obstacles;
use super::pairs::Subject;
use super::survey::Survey;
use crate::cli::options::BadValue;
use crate::error::{ErrorCode, Result};
use crate::libvirt::DomainState;
use crate::transfer::LiveRead;

mod changes;
mod exhibit;
mod hold;
mod probe;
mod record;
mod snapshot;

pub(super) use changes::{Version, Versions, prune};
pub(super) use exhibit::{Exhibit, export_directory};
pub(super) use hold::{Hold, consistency};
pub use probe::{Probe, probe};
pub(super) use record::{HeldVm, let_go, mend};

/// What the user wants to be done about a VM that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LiveChoice {
    /// What is safe and lets it run: a snapshot.
    #[default]
    Auto,
    /// Refuse.
    Refuse,
    /// Suspend the VM while its disks are copied by sharing their blocks, or, where that cannot be
    /// done, while they are read.
    Pause,
    /// Have QEMU show its disks as they are at one instant, while the VM runs on.
    Snapshot,
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
            "snapshot" => Ok(Self::Snapshot),
            "torn" => Ok(Self::Torn),
            _ => Err(BadValue::new(
                "expected auto, refuse, pause, snapshot or torn",
            )),
        }
    }
}

/// Whether the guest's file systems are frozen at the instant of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quiesce {
    /// If the guest agent answers.
    #[default]
    Auto,
    /// Yes, or there is no snapshot.
    Require,
    /// No.
    Off,
}

impl Quiesce {
    /// As the user writes it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Require => "require",
            Self::Off => "off",
        }
    }
}

impl FromStr for Quiesce {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "auto" => Ok(Self::Auto),
            "require" => Ok(Self::Require),
            "off" => Ok(Self::Off),
            _ => Err(BadValue::new("expected auto, require or off")),
        }
    }
}

/// How the disks of a source are read, as its state and the user's choice want it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    /// It is off.
    Still,
    /// It is off; what its guest sees.
    Contents,
    /// It is suspended, or its disks are copied while it is.
    Paused,
    /// By a backup job of QEMU's.
    Snapshot(Quiesce),
    /// As they are.
    Torn,
}

impl Reading {
    /// How a VM is read that is only looked at.
    pub(super) fn to_look_at(survey: &Survey, subject: Subject) -> Self {
        match (subject, survey.domain.state.is_off()) {
            (Subject::Images, _) => Self::Still,
            (Subject::Contents, true) => Self::Contents,
            (Subject::Contents, false) => Self::Snapshot(Quiesce::Auto),
        }
    }

    /// How what the guest sees is read, and not the bytes of images: a VM that runs has those to
    /// itself, and only QEMU can show it.
    pub(super) fn of_contents(self, source: &Survey, obstacles: &mut Obstacles) -> Self {
        match self {
            Self::Still => Self::Contents,
            Self::Contents | Self::Snapshot(_) => self,
            Self::Paused | Self::Torn => {
                let (vm, host) = (source.name(), source.on.host());
                obstacles.refused(
                    format!(
                        "of {vm} on {host} what its guest sees is to be copied, and its images are \
                         not read for that while it runs"
                    ),
                    "--live snapshot has QEMU show it",
                );
                self
            }
        }
    }

    /// What the agent that reads a disk must expect.
    pub(super) fn live_read(self) -> LiveRead {
        match self {
            Self::Still | Self::Contents | Self::Snapshot(_) => LiveRead::No,
            Self::Paused => LiveRead::Paused,
            Self::Torn => LiveRead::Torn,
        }
    }
}

/// Lets a VM go once everything was done with it. That it had to be let go before, or that nobody held
/// it any more, explains what was not `done`.
///
/// # Errors
/// Why it was not done; when the VM could not be let go.
pub(super) async fn let_end(hold: Option<Hold>, done: Result<()>) -> Result<()> {
    let Some(hold) = hold else { return done };
    let ended = hold.end(done.is_ok()).await;
    let explained = |code| match code {
        ErrorCode::NoSpace => true,
        ErrorCode::Interrupted => done.as_ref().is_err_and(|error| {
            !matches!(
                error.code(),
                ErrorCode::Interrupted | ErrorCode::Cancelled | ErrorCode::Timeout
            )
        }),
        _ => false,
    };
    match ended {
        Err(error) if explained(error.code()) => Err(error),
        ended => done.and(ended),
    }
}

impl LiveChoice {
    /// How the source is read. What keeps it from being read that way goes to `obstacles`.
    pub(super) fn reading(
        self,
        quiesce: Quiesce,
        source: &Survey,
        obstacles: &mut Obstacles,
    ) -> Reading {
        let state = source.domain.state;
        if state.is_off() {
            return Reading::Still;
        }
        let is = format!("{} on {} is {state}", source.name(), source.on.host());
        match self {
            Self::Refuse => obstacles.refused(
                is,
                "shut it down, or choose how its disks are read: --live snapshot lets it run on, \
                 --live pause suspends it meanwhile",
            ),
            Self::Auto | Self::Pause | Self::Snapshot if state == DomainState::Stopping => {
                obstacles.refused(is, "wait until it is off");
            }
            _ => {}
        }
        match self {
            Self::Pause => Reading::Paused,
            Self::Torn => Reading::Torn,
            // Where nobody runs that could answer, nothing changes either.
            Self::Auto | Self::Snapshot if state != DomainState::Running => {
                Reading::Snapshot(Quiesce::Off)
            }
            Self::Auto | Self::Snapshot | Self::Refuse => Reading::Snapshot(quiesce),
        }
    }
}
