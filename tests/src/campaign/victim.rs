//! Whom a campaign kills.

use std::fmt;
use std::path::PathBuf;

use super::site::Site;
use crate::controller::Running;
use crate::host::Host;
use crate::journey::Journey;
use crate::process::{arguments, is_ssh, kill, processes_in, ssh_clients_of};

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

/// Kills until everyone has been killed.
pub(super) const TURNS: u64 = 5;

/// Whose turn it is, and the route of the run: by turns as well, but that only a direct run has a
/// connection from host to host.
pub(super) fn turn(number: u64) -> (Victim, Journey) {
    let victim = Victim::ALL[usize::try_from(number % TURNS).expect("a small number")];
    // The fifth does not count: so over two turns each of the others meets both routes.
    let by = if victim == Victim::HostSsh || (number % TURNS + number / TURNS).is_multiple_of(2) {
        Journey::Direct
    } else {
        Journey::Relay
    };
    (victim, by)
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

    /// The processes of a run that it may be, as `/proc/PID` directories.
    pub(super) fn find(self, site: &Site, running: &Running) -> Vec<PathBuf> {
        let lab = &site.lab;
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

    /// Kills it, or one of them as `pick` has it; false when there is none.
    pub(super) fn kill(self, site: &Site, running: &Running, pick: u64) -> bool {
        let found = self.find(site, running);
        let chosen = pick.checked_rem(found.len() as u64);
        let chosen = chosen.map(|at| usize::try_from(at).expect("an index"));
        chosen.is_some_and(|at| kill(&found[at]))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_victim_meets_both_routes_as_often() {
        for victim in Victim::ALL {
            let turns = (0..2 * TURNS).map(turn).filter(|turn| turn.0 == victim);
            let direct = turns.filter(|turn| turn.1 == Journey::Direct).count();
            let expected = if victim == Victim::HostSsh { 2 } else { 1 };
            assert_eq!(direct, expected, "{victim}");
        }
    }
}
