//! The record of a clone under way, kept on the destination until the new VM is complete. It says
//! which files are the clone's, so that the same command takes an interrupted one up again with
//! the same names and addresses, and nothing is left over.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::naming;
use super::state::{self, Kind};
use crate::error::Result;
use crate::libvirt::Hypervisor;

/// A clone that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CloneRecord {
    /// Version of this format; 1.
    pub(super) format: u32,
    /// The VM that is cloned.
    pub(super) source_uuid: Uuid,
    /// The new VM.
    pub(super) name: String,
    pub(super) uuid: Uuid,
    /// The new VM's addresses, by the place of the interface.
    pub(super) macs: BTreeMap<usize, String>,
    /// The clone's copy of each file of the source.
    pub(super) files: BTreeMap<String, String>,
    /// Other files and directories that are made for it.
    pub(super) made: Vec<String>,
    /// The VM whose place it takes.
    pub(super) replaced: Option<Replaced>,
}

/// A VM that gives way to a clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Replaced {
    pub(super) uuid: Uuid,
    /// Its definition, to be restored if the clone cannot be defined.
    pub(super) definition: String,
    pub(super) autostart: bool,
    /// Its disks, which go once the clone is defined.
    pub(super) files: Vec<String>,
}

impl CloneRecord {
    /// The record for a VM of this name.
    pub(super) async fn read(on: &Hypervisor, name: &str) -> Result<Option<Self>> {
        state::read(on, Kind::Clones, name).await
    }

    pub(super) async fn write(&self, on: &Hypervisor) -> Result<()> {
        state::write(on, Kind::Clones, &self.name, self).await
    }

    pub(super) async fn forget(&self, on: &Hypervisor) -> Result<()> {
        state::forget(on, Kind::Clones, &self.name).await
    }

    /// Removes everything that was made for the clone, and gives the VM that it was to replace its
    /// place again.
    ///
    /// # Errors
    /// When something cannot be removed or restored; then it is remembered as before.
    pub(super) async fn roll_back(&self, on: &Hypervisor) -> Result<()> {
        if let Some(replaced) = &self.replaced
            && on.find_domain(&replaced.uuid.to_string()).await?.is_none()
        {
            replaced.restore(on).await?;
        }
        on.host().remove(&self.leftovers()).await?;
        self.forget(on).await
    }

    /// Everything that the clone may have made, complete or not.
    pub(super) fn leftovers(&self) -> Vec<String> {
        let mut paths = self.made.clone();
        for path in self.files.values() {
            let (directory, name) = naming::split(path);
            paths.push(naming::join(directory, &naming::partial(name)));
            paths.push(path.clone());
        }
        paths
    }
}

impl Replaced {
    /// Defines it as it was.
    ///
    /// # Errors
    /// When libvirt refuses that.
    pub(super) async fn restore(&self, on: &Hypervisor) -> Result<()> {
        on.virsh_with(&["define", "/dev/stdin"], self.definition.as_bytes())
            .await?;
        if self.autostart {
            on.virsh(&["autostart", &self.uuid.to_string()]).await?;
        }
        Ok(())
    }
}
