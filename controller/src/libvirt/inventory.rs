//! The VMs of a hypervisor at a glance, in as few commands as can be.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;

use super::definition::{Definition, DiskSource, InterfaceSource};
use super::domain::lines;
use super::{DomainState, Hypervisor};
use crate::error::Result;

/// A VM at a glance. What is not known is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// What it does.
    pub state: Option<DomainState>,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Whether it starts with its host.
    pub autostart: bool,
    /// Its disks and drives.
    pub disks: Vec<DiskSummary>,
    /// What its interfaces are connected to.
    pub networks: Vec<String>,
}

/// A disk at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskSummary {
    /// `vda`, `sda`, …
    pub target: String,
    /// `raw`, `qcow2`, …
    pub format: Option<String>,
    /// Path, or `POOL/VOLUME`; `None` for an empty drive.
    pub source: Option<String>,
    /// What the guest sees, in bytes.
    pub bytes_total: Option<u64>,
    /// What it occupies, in bytes.
    pub bytes_allocated: Option<u64>,
}

/// What `virsh domstats` says of one domain.
type Stats = BTreeMap<String, String>;

impl Hypervisor {
    /// All VMs, in the order of their names.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn inventory(&self) -> Result<Vec<VmSummary>> {
        self.host().share().await?;
        let autostart = ["list", "--all", "--autostart", "--uuid"];
        let stats = ["domstats", "--state", "--block", "--raw"];
        let (definitions, autostart, stats) = tokio::try_join!(
            self.definitions(),
            self.virsh(&autostart),
            self.virsh(&stats)
        )?;
        let (autostart, stats) = (lines(&autostart), parse_stats(&stats));
        let mut vms: Vec<VmSummary> = definitions
            .iter()
            .map(|definition| {
                let none = Stats::new();
                let stats = stats.get(definition.name()).unwrap_or(&none);
                summary(definition, stats, &autostart)
            })
            .collect();
        vms.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(vms)
    }
}

fn summary(definition: &Definition, stats: &Stats, autostart: &[String]) -> VmSummary {
    let uuid = definition.uuid();
    let networks = definition
        .interfaces()
        .iter()
        .map(|interface| match &interface.source {
            InterfaceSource::Network(name)
            | InterfaceSource::Bridge(name)
            | InterfaceSource::Direct(name)
            | InterfaceSource::Other(name) => name.clone(),
        });
    let state = stats.get("state.state").and_then(|number| state(number));
    // Of a file that QEMU has open libvirt tells by "physical" what it occupies, and by
    // "allocation" how far the guest has written; of one that it looks at itself, by "allocation"
    // what it occupies, and by "physical" its length.
    let occupied = if state.is_some_and(DomainState::is_off) {
        "allocation"
    } else {
        "physical"
    };
    VmSummary {
        name: definition.name().to_owned(),
        uuid,
        state,
        vcpus: definition.vcpus(),
        memory_bytes: definition.memory_bytes(),
        autostart: autostart.contains(&uuid.to_string()),
        disks: definition
            .disks()
            .iter()
            .map(|disk| {
                let size = |what: &str| block(stats, &disk.target, what);
                DiskSummary {
                    target: disk.target.clone(),
                    format: disk.format.clone(),
                    source: match &disk.source {
                        DiskSource::None => None,
                        DiskSource::File(path) | DiskSource::Block(path) => Some(path.clone()),
                        DiskSource::Volume { pool, volume } => Some(format!("{pool}/{volume}")),
                        DiskSource::Other(kind) => Some(kind.clone()),
                    },
                    bytes_total: size("capacity"),
                    bytes_allocated: size(occupied),
                }
            })
            .collect(),
        networks: networks.collect(),
    }
}

/// libvirt's numbers for states (virDomainState).
fn state(number: &str) -> Option<DomainState> {
    Some(match number {
        "1" | "2" => DomainState::Running,
        "3" => DomainState::Paused,
        "4" => DomainState::Stopping,
        "5" => DomainState::Stopped,
        "6" => DomainState::Crashed,
        "7" => DomainState::Sleeping,
        _ => return None,
    })
}

/// A figure of the disk with this target: `block.N.name=vda`, `block.N.capacity=…`.
fn block(stats: &Stats, target: &str, what: &str) -> Option<u64> {
    let (key, _) = stats
        .iter()
        .find(|(key, value)| key.ends_with(".name") && *value == target)?;
    let number = key.strip_suffix(".name")?;
    stats.get(&format!("{number}.{what}"))?.parse().ok()
}

/// `Domain: 'NAME'`, then lines of `key=value`, for each domain.
fn parse_stats(text: &str) -> BTreeMap<String, Stats> {
    let (mut all, mut name) = (BTreeMap::new(), String::new());
    for line in text.lines() {
        if let Some(named) = line.strip_prefix("Domain: '") {
            named
                .strip_suffix('\'')
                .unwrap_or(named)
                .clone_into(&mut name);
        } else if let Some((key, value)) = line.trim().split_once('=') {
            let stats: &mut Stats = all.entry(name.clone()).or_default();
            stats.insert(key.to_owned(), value.to_owned());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_by_the_disks_target() {
        let text = "Domain: 'a b'\n  state.state=5\n  block.count=2\n  block.0.name=vda\n  block.1.name=vdb\n  block.1.capacity=7\nDomain: 'c'\n  state.state=1\n";
        let all = parse_stats(text);
        assert_eq!(block(&all["a b"], "vdb", "capacity"), Some(7));
        assert_eq!(block(&all["a b"], "vda", "capacity"), None);
        assert_eq!(state(&all["c"]["state.state"]), Some(DomainState::Running));
    }
}
