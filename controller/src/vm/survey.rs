//! What a VM on its hypervisor consists of: the images of its disks, its UEFI variables, the state
//! of its TPM, the files that it boots from.

use crate::error::{Error, ErrorCode, Result};
use crate::host::FileKind;
use crate::libvirt::definition::{Disk, DiskDevice, DiskSource};
use crate::libvirt::{Domain, Hypervisor, Image};

use super::naming;
use super::obstacle::Obstacles;

/// A VM and all that belongs to it.
#[derive(Debug, Clone)]
pub(super) struct Survey {
    pub(super) on: Hypervisor,
    pub(super) domain: Domain,
    /// The disks whose contents belong to the VM, in the definition's order.
    pub(super) disks: Vec<SurveyedDisk>,
    /// The file with its UEFI variables, if there is one yet.
    pub(super) nvram: Option<String>,
    /// The files of its TPM's state, relative to the TPM's directory.
    pub(super) tpm_files: Vec<String>,
}

/// A disk with its images.
#[derive(Debug, Clone)]
pub(super) struct SurveyedDisk {
    /// Its place among the definition's disks.
    pub(super) index: usize,
    /// `vda`, `sda`, …
    pub(super) target: String,
    /// From the one that the guest writes to the one at the bottom; at least one.
    pub(super) images: Vec<Image>,
}

impl SurveyedDisk {
    /// Whether the bytes of its one image are what the guest sees.
    pub(super) fn is_plain(&self) -> bool {
        self.images.len() == 1 && self.images[0].format == "raw"
    }

    /// What the guest sees, in bytes.
    pub(super) fn size_bytes(&self) -> u64 {
        self.images[0].virtual_size_bytes
    }
}

impl Survey {
    /// Looks at everything. What is in the way of moving it goes to `obstacles`; disks in
    /// `excluded` are not looked at.
    ///
    /// # Errors
    /// Not found, when there is no such VM; whatever keeps the host from answering.
    pub(super) async fn of(
        on: &Hypervisor,
        vm: &str,
        excluded: &[String],
        obstacles: &mut Obstacles,
    ) -> Result<Self> {
        let domain = on.domain(vm).await?;
        Self::of_domain(on, domain, excluded, obstacles).await
    }

    /// The same for a domain that was found.
    ///
    /// # Errors
    /// Whatever keeps the host from answering.
    pub(super) async fn of_domain(
        on: &Hypervisor,
        domain: Domain,
        excluded: &[String],
        obstacles: &mut Obstacles,
    ) -> Result<Self> {
        let in_use = !domain.state.is_off();
        let mut disks = Vec::new();
        for (index, disk) in domain.definition.disks().iter().enumerate() {
            if !holds_data(disk) || excluded.contains(&disk.target) {
                continue;
            }
            let images = match source_path(on, disk).await {
                Ok(Some(path)) => {
                    let images = on.images(&path, disk.format.as_deref(), in_use).await;
                    match images {
                        Err(error) => Err(explained(on, &path, error).await),
                        images => images,
                    }
                }
                Ok(None) => continue,
                Err(error) => Err(error),
            };
            match images {
                Ok(images) => disks.push(SurveyedDisk {
                    index,
                    target: disk.target.clone(),
                    images,
                }),
                Err(error) => obstacles.take(error.context(format!("disk {}", disk.target)))?,
            }
        }
        check_excluded(&domain, excluded)?;
        let nvram = existing_nvram(on, &domain).await?;
        let tpm_files = tpm_files(on, &domain).await?;
        Ok(Self {
            on: on.clone(),
            domain,
            disks,
            nvram,
            tpm_files,
        })
    }

    pub(super) fn name(&self) -> &str {
        self.domain.definition.name()
    }

    /// The definition's word on a disk.
    pub(super) fn defined(&self, disk: &SurveyedDisk) -> &Disk {
        &self.domain.definition.disks()[disk.index]
    }
}

/// Whether a disk's contents are the VM's own: not a drive for media.
pub(super) fn holds_data(disk: &Disk) -> bool {
    matches!(disk.device, DiskDevice::Disk | DiskDevice::Lun)
}

/// The path under which the host has a disk; `None` for one that has no source, or none that is a
/// path.
pub(super) async fn source_path(on: &Hypervisor, disk: &Disk) -> Result<Option<String>> {
    match &disk.source {
        DiskSource::File(path) | DiskSource::Block(path) => Ok(Some(path.clone())),
        DiskSource::Volume { pool, volume } => {
            let path = on
                .virsh(&["vol-path", "--pool", pool, "--vol", volume])
                .await?;
            Ok(Some(path.trim().to_owned()))
        }
        DiskSource::None | DiskSource::Other(_) => Ok(None),
    }
}

/// Why a disk cannot be looked at, where that is a run which has not finished.
async fn explained(on: &Hypervisor, path: &str, error: Error) -> Error {
    let (directory, name) = naming::split(path);
    let applying = naming::join(directory, &naming::applying(name));
    match on.host().file_facts(&applying).await {
        Ok(Some(_)) => {
            let host = on.host();
            let message = format!("{path} on {host} is half changed by a run that broke off");
            Error::new(ErrorCode::Refused, message)
                .hint(format!("\"kvm-clone-ctl recover {host}\" ends that"))
        }
        _ => error,
    }
}

/// A name in `--exclude-disk` that no disk has is a mistake that must not pass.
fn check_excluded(domain: &Domain, excluded: &[String]) -> Result<()> {
    let targets: Vec<&str> = domain
        .definition
        .disks()
        .iter()
        .map(|disk| disk.target.as_str())
        .collect();
    match excluded
        .iter()
        .find(|name| !targets.contains(&name.as_str()))
    {
        None => Ok(()),
        Some(name) => {
            let message = format!("{} has no disk \"{name}\"", domain.definition.name());
            Err(Error::new(ErrorCode::NotFound, message)
                .hint(format!("its disks are: {}", targets.join(", "))))
        }
    }
}

async fn existing_nvram(on: &Hypervisor, domain: &Domain) -> Result<Option<String>> {
    let definition = &domain.definition;
    let Some(path) = Hypervisor::nvram_path(definition, definition.name()) else {
        return Ok(None);
    };
    let facts = on.host().file_facts(&path).await?;
    Ok(facts
        .filter(|facts| facts.kind == FileKind::File)
        .map(|_| path))
}

async fn tpm_files(on: &Hypervisor, domain: &Domain) -> Result<Vec<String>> {
    let definition = &domain.definition;
    if definition.tpm().is_none_or(|tpm| tpm.backend != "emulator") {
        return Ok(Vec::new());
    }
    let directory = Hypervisor::tpm_directory(definition.uuid());
    if on.host().file_facts(&directory).await?.is_none() {
        return Ok(Vec::new());
    }
    let words = ["find", &directory, "-type", "f", "-printf", "%P\n"];
    let found = on.host().tool_output(&words, b"").await?;
    // swtpm's lock file belongs to a process, not to the TPM.
    Ok(found
        .lines()
        .filter(|name| !name.is_empty() && !name.ends_with(".lock"))
        .map(str::to_owned)
        .collect())
}
