//! A domain as a whole: its definition, and what libvirt keeps beside it.

use uuid::Uuid;

use super::definition::Definition;
use super::{DomainState, Hypervisor};
use crate::error::{Error, ErrorCode, Result};

/// Where libvirt keeps a domain's UEFI variables, unless its definition says otherwise.
const NVRAM_DIRECTORY: &str = "/var/lib/libvirt/qemu/nvram";
/// Where libvirt keeps the state of emulated TPMs, each under its domain's UUID.
const TPM_DIRECTORY: &str = "/var/lib/libvirt/swtpm";

/// Between the answers of several commands that one virsh is given. No XML holds it.
const SEPARATOR: &str = "<<<kvm-clone>>>";

/// A domain, as it was a moment ago.
#[derive(Debug, Clone)]
pub struct Domain {
    /// What the next start of it uses.
    pub definition: Definition,
    /// What it does.
    pub state: DomainState,
    /// Whether it starts with its host.
    pub autostart: bool,
    /// Whether its memory lies in a file of libvirt's, and its disks are half of a whole.
    pub has_saved_state: bool,
    /// Names of its snapshots.
    pub snapshots: Vec<String>,
}

impl Hypervisor {
    /// The domain of this name or UUID; `None` when there is none.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn find_domain(&self, name: &str) -> Result<Option<Domain>> {
        match self.domain(name).await {
            Ok(domain) => Ok(Some(domain)),
            Err(error) if error.code() == ErrorCode::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The domain of this name or UUID.
    ///
    /// # Errors
    /// Not found, when there is none; as [`Hypervisor::virsh`].
    pub async fn domain(&self, name: &str) -> Result<Domain> {
        let not_there = |error: Error| {
            if error.code() != ErrorCode::NotFound {
                return error;
            }
            let message = format!("{} has no VM \"{name}\"", self.host());
            Error::new(ErrorCode::NotFound, message).hint(format!(
                "\"kvm-clone-ctl list {}\" shows those it has",
                self.host()
            ))
        };
        let dump = ["dumpxml", "--inactive", "--security-info", "--domain", name];
        let definition = Definition::parse(self.virsh(&dump).await.map_err(not_there)?)?;
        let uuid = definition.uuid().to_string();
        let (info, names) = (["dominfo", &uuid], ["snapshot-list", "--name", &uuid]);
        let (state, info, snapshots) =
            tokio::try_join!(self.state(&uuid), self.virsh(&info), self.virsh(&names))?;
        Ok(Domain {
            state,
            autostart: says(&info, "Autostart:", "enable"),
            has_saved_state: says(&info, "Managed save:", "yes"),
            snapshots: lines(&snapshots),
            definition,
        })
    }

    /// Takes a domain that is off out of libvirt, with what that keeps of its snapshots; its disks,
    /// UEFI variables and TPM state stay.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn undefine(&self, uuid: &str) -> Result<()> {
        let keep = [
            "undefine",
            uuid,
            "--keep-nvram",
            "--keep-tpm",
            "--managed-save",
        ];
        let metadata = ["--snapshots-metadata", "--checkpoints-metadata"];
        self.virsh(&[&keep[..], &metadata].concat()).await.map(drop)
    }

    /// What the domain is doing now.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn state(&self, uuid: &str) -> Result<DomainState> {
        self.virsh(&["domstate", uuid]).await?.parse()
    }

    /// The definitions of all domains, by one process of virsh. One that vanishes meanwhile is
    /// left out.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn definitions(&self) -> Result<Vec<Definition>> {
        let uuids = lines(&self.virsh(&["list", "--all", "--uuid"]).await?);
        if uuids.is_empty() {
            return Ok(Vec::new());
        }
        let commands: String = uuids
            .iter()
            .map(|uuid| format!("dumpxml --inactive {uuid}; echo '{SEPARATOR}'; "))
            .collect();
        let answers = self.virsh(&[&commands]).await?;
        answers
            .split(SEPARATOR)
            .map(str::trim)
            .filter(|answer| !answer.is_empty())
            .map(|answer| Definition::parse(answer.to_owned()))
            .collect()
    }

    /// The file that holds a domain's UEFI variables, by its definition or by libvirt's custom;
    /// `None` for a domain that has none.
    pub fn nvram_path(definition: &Definition, name: &str) -> Option<String> {
        let firmware = definition.firmware();
        match &firmware.nvram {
            Some(path) if !path.is_empty() => Some(path.clone()),
            Some(_) => Some(Self::default_nvram_path(name)),
            None if firmware.auto => Some(Self::default_nvram_path(name)),
            None => None,
        }
    }

    /// Where libvirt puts the UEFI variables of a domain of this name.
    pub fn default_nvram_path(name: &str) -> String {
        format!("{NVRAM_DIRECTORY}/{name}_VARS.fd")
    }

    /// The directory that holds the state of a domain's emulated TPM.
    pub fn tpm_directory(uuid: Uuid) -> String {
        format!("{TPM_DIRECTORY}/{uuid}")
    }
}

/// Whether a line of `virsh dominfo` has this value.
fn says(info: &str, key: &str, value: &str) -> bool {
    info.lines()
        .filter_map(|line| line.strip_prefix(key))
        .any(|said| said.trim() == value)
}

/// The lines that hold something.
pub(super) fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect()
}
