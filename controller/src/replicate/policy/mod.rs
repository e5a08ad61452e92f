//! Policies: which VMs have a replica where, how old it may be, and which older points stay.
//! `read.rs` reads them from a file.

mod read;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use jiff::civil::{Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

pub use read::{Mistake, load, parse};

use super::keep::Keep;
use super::schedule::Schedule;
use crate::endpoint::HostSpec;
use crate::vm::network::NetworkConfig;
use crate::vm::order::Order;
use crate::vm::replica::{self, ReplicaRequest};
use crate::vm::{LiveChoice, Quiesce};

/// What `replicate init` writes: every key, with what holds without it.
pub const TEMPLATE: &str = include_str!("policies.toml");

/// How long an alarm stays as it is before it is told again, where nothing else is said.
const REPEAT: SignedDuration = SignedDuration::from_hours(4);

/// What the file says.
#[derive(Debug, Clone)]
pub struct Policies {
    /// The policies, by their names.
    pub all: Vec<Policy>,
    /// How much the daemon does at once.
    pub limits: Limits,
    /// Who is told of what it finds.
    pub notify: Notify,
}

/// How many VMs get a point at once, over all policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// From or to one host.
    pub host: NonZeroUsize,
    /// From one host to another one.
    pub link: NonZeroUsize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            host: const { NonZeroUsize::new(4).expect("four is not zero") },
            link: const { NonZeroUsize::new(2).expect("two is not zero") },
        }
    }
}

/// Who is told of alarms, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notify {
    /// For a shell, on the machine of the controller; it gets the alarm as JSON.
    pub command: Option<String>,
    /// Gets a mail by the sendmail of that machine.
    pub mail: Option<String>,
    /// Gets the same JSON by POST.
    pub webhook: Option<String>,
    /// Is fetched as long as all is well: its silence is an alarm.
    pub heartbeat: Option<String>,
    /// How long an alarm stays as it is before it is told again.
    pub repeat: SignedDuration,
}

impl Default for Notify {
    fn default() -> Self {
        Self {
            command: None,
            mail: None,
            webhook: None,
            heartbeat: None,
            repeat: REPEAT,
        }
    }
}

/// A policy.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Its name in the file.
    pub name: String,
    /// What the file says of it, by which it can be written once more.
    pub text: String,
    /// The host that has the VMs.
    pub source: HostSpec,
    /// The host that has their replicas.
    pub destination: HostSpec,
    /// Where, there.
    pub directory: String,
    /// Names of VMs, or patterns of such; one of them has to match.
    pub vms: Vec<String>,
    /// None of these must.
    pub exclude: Vec<String>,
    /// When it runs.
    pub schedule: Schedule,
    /// Whose calendar and clocks count.
    pub zone: TimeZone,
    /// How old the newest point may be.
    pub rpo: SignedDuration,
    /// Which points stay.
    pub keep: Keep,
    /// When it does not run by itself.
    pub quiet: Vec<Window>,
    /// VMs at once.
    pub parallel: NonZeroUsize,
    /// What is done about a VM that runs.
    pub live: LiveChoice,
    /// Whether its file systems are frozen for that.
    pub quiesce: Quiesce,
    /// After so long a run reads all; `None` for never.
    pub full_scan_after: Option<SignedDuration>,
    /// Which share of a disk's data may change at once, before somebody has to look.
    pub max_change: f64,
    /// Bytes a second, for each VM.
    pub bandwidth_limit: Option<u64>,
    /// The same for runs that begin in these windows; the first of them counts.
    pub bandwidth_between: Vec<(Window, u64)>,
    /// Bytes that stay free on the destination's file system.
    pub min_free: u64,
    /// What networks and bridges of the source are on the destination.
    pub networks: BTreeMap<String, String>,
    /// What VMs are connected to when their failover is tested; to nothing, without one.
    pub test_network: Option<String>,
    /// What a VM says on its console when it is up, as `grep -E` has it.
    pub sign_of_life: Option<String>,
    /// In which order a failover starts VMs.
    pub order: Order,
    /// For a shell: makes sure that a source does not run which cannot be asked.
    pub fence: Option<String>,
    /// For a shell: what is done before each run of a VM, and after it.
    pub hooks: Hooks,
}

/// Commands for the shell of the controller's machine, around each run of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hooks {
    /// Its failure keeps the run from beginning.
    pub before: Option<String>,
    /// Follows every run that began, with what came of it.
    pub after: Option<String>,
    /// How long each may take.
    pub limit: SignedDuration,
}

/// A part of some days of the week; one that begins later than it ends goes over midnight, and
/// belongs to the day on which it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// From Monday on.
    pub days: [bool; 7],
    /// From when.
    pub from: Time,
    /// Until when; not itself.
    pub to: Time,
}

impl Policy {
    /// The VMs that it names, and not by a pattern.
    pub fn named(&self) -> Vec<String> {
        let is_plain = |name: &&String| !name.contains(['*', '?', '[', '{', '!', '\\']);
        self.vms.iter().filter(is_plain).cloned().collect()
    }

    /// The directory of all its replicas.
    pub fn place(&self) -> String {
        format!("{}/{}", self.directory.trim_end_matches('/'), self.name)
    }

    /// The directory of the replica of a VM.
    pub fn directory_of(&self, vm: &str) -> String {
        replica::directory_of(&self.place(), vm)
    }

    /// What a run does with a VM.
    pub fn request(&self, vm: &str) -> ReplicaRequest {
        ReplicaRequest {
            source: self.source.clone(),
            destination: self.destination.clone(),
            vm: vm.to_owned(),
            directory: self.directory_of(vm),
            live: self.live,
            quiesce: self.quiesce,
            min_free: self.min_free,
            most_points: self.keep.most(),
            full_scan_after: self.full_scan_after,
            bandwidth_limit: self.limit_at(Timestamp::now()),
            networks: self.networks.clone(),
        }
    }

    /// How its VMs are connected at the destination, where `network` does not say otherwise.
    pub fn network_config(&self, mut network: NetworkConfig) -> NetworkConfig {
        for (old, new) in &self.networks {
            let entry = network.map.entry(old.clone());
            entry.or_insert_with(|| new.clone());
        }
        network
    }

    /// Whether it does not run by itself at an instant.
    pub fn is_quiet(&self, at: Timestamp) -> bool {
        self.quiet.iter().any(|window| self.is_in(window, at))
    }

    /// Bytes a second for a run that begins at an instant; `None` for no limit.
    pub fn limit_at(&self, at: Timestamp) -> Option<u64> {
        let mut windows = self.bandwidth_between.iter();
        let own = windows.find(|(window, _)| self.is_in(window, at));
        own.map(|(_, limit)| *limit).or(self.bandwidth_limit)
    }

    fn is_in(&self, window: &Window, at: Timestamp) -> bool {
        let zoned = at.to_zoned(self.zone.clone());
        window.contains(zoned.weekday(), zoned.time())
    }

    /// Whether a VM of this name is meant.
    pub fn is_about(&self, vm: &str) -> bool {
        let matches = |patterns: &[String]| {
            patterns
                .iter()
                .any(|pattern| glob_match::glob_match(pattern, vm))
        };
        matches(&self.vms) && !matches(&self.exclude)
    }
}

impl Window {
    /// Whether a local time is in it.
    pub fn contains(&self, day: Weekday, time: Time) -> bool {
        let is_of =
            |day: Weekday| self.days[usize::try_from(day.to_monday_zero_offset()).unwrap_or(0)];
        if self.from < self.to {
            return is_of(day) && self.from <= time && time < self.to;
        }
        (is_of(day) && self.from <= time) || (is_of(day.previous()) && time < self.to)
    }
}
