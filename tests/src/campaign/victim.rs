//! Whom a campaign kills.

use std::fmt;
use std::path::PathBuf;

use crate::controller::Running;
use crate::host::Host;
use crate::lab::Lab;
use crate::process::{arguments, is_ssh, processes_in, ssh_clients_of};

/// A process of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    Controller,
    SourceAgent,
    DestinationAgent,
    /// One of the connections of the controller: to a host, or a further channel of one.
    ControllerSsh,
    /// The connection from host to host.
    HostSsh,
}

impl Victim {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Controller,
        Self::SourceAgent,
        Self::DestinationAgent,
        Self::ControllerSsh,
        Self::HostSsh,
    ];

    /// Its number among them.
    pub(super) fn index(self) -> usize {
        let place = Self::ALL.iter().position(|victim| *victim == self);
        place.expect("all of them are listed")
    }

    /// The processes of a run between two hosts that it may be, as `/proc/PID` directories.
    #[must_use]
    pub fn find(self, lab: &Lab, running: &Running) -> Vec<PathBuf> {
        match self {
            Self::Controller => vec![running.process()],
            Self::SourceAgent => serving(&lab.a),
            Self::DestinationAgent => serving(&lab.b),
            Self::ControllerSsh => ssh_clients_of(lab.controller.ssh_config()),
            Self::HostSsh => {
                let mut found = processes_in(&lab.a.mount_namespace());
                found.retain(|process| is_ssh(&arguments(process)));
                found
            }
        }
    }
}

/// The agents that own disks; others only hand a connection to them.
fn serving(host: &Host) -> Vec<PathBuf> {
    let mut agents = host.agents();
    agents.retain(|agent| arguments(agent).iter().any(|word| word == b"serve"));
    agents
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Controller => "controller",
            Self::SourceAgent => "source agent",
            Self::DestinationAgent => "destination agent",
            Self::ControllerSsh => "ssh of the controller",
            Self::HostSsh => "ssh between the hosts",
        })
    }
}
