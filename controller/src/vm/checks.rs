//! What a destination must have for a VM to run there, looked for before anything is moved.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::naming;
use super::network::{Known, name_of};
use super::obstacle::Obstacles;
use super::survey::{Survey, holds_data};
use crate::error::{ErrorCode, Result};
use crate::libvirt::definition::{
    Definition, Disk, DiskDevice, DiskSource, Edit, InterfaceSource, MacAddress,
};
use crate::libvirt::{DomainCapabilities, Hypervisor, Memory};
use crate::output;

/// What is on the destination already.
#[derive(Debug)]
pub(super) struct Destination {
    pub(super) on: Hypervisor,
    pub(super) definitions: Vec<Definition>,
    pub(super) network: Known,
    memory: Memory,
    secrets: Vec<String>,
}

impl Destination {
    /// Looks at the destination.
    ///
    /// # Errors
    /// Whatever keeps the host or its libvirt from answering.
    pub(super) async fn survey(on: &Hypervisor) -> Result<Self> {
        let (definitions, networks, active_networks, devices, memory, secrets) = tokio::try_join!(
            on.definitions(),
            on.names(&["net-list", "--all", "--name"]),
            on.names(&["net-list", "--name"]),
            on.host().names_in("/sys/class/net"),
            on.memory(),
            on.secrets(),
        )?;
        Ok(Self {
            on: on.clone(),
            definitions,
            network: Known {
                networks,
                active_networks,
                devices: devices.unwrap_or_default(),
            },
            memory,
            secrets,
        })
    }

    /// The domain of this name.
    pub(super) fn named(&self, name: &str) -> Option<&Definition> {
        self.definitions
            .iter()
            .find(|definition| definition.name() == name)
    }

    /// The domain with this UUID.
    pub(super) fn with_uuid(&self, uuid: Uuid) -> Option<&Definition> {
        self.definitions
            .iter()
            .find(|definition| definition.uuid() == uuid)
    }

    /// Whether a VM has the file at `path` as a disk.
    pub(super) fn uses(&self, path: &str) -> bool {
        let mut disks = self.definitions.iter().flat_map(Definition::disks);
        disks.any(|disk| is_at(disk, path))
    }

    /// Every MAC address in use.
    pub(super) fn macs(&self) -> BTreeSet<MacAddress> {
        self.definitions
            .iter()
            .flat_map(Definition::interfaces)
            .filter_map(|interface| interface.mac.as_ref()?.parse().ok())
            .collect()
    }
}

/// What cannot be moved wherever it goes: it belongs to the source host, or to several VMs.
pub(super) fn portable(
    survey: &Survey,
    excluded: &[String],
    leave_out: impl Fn(&str) -> String,
    obstacles: &mut Obstacles,
) {
    let definition = &survey.domain.definition;
    let vm = definition.name();
    for device in definition.host_devices() {
        obstacles.refused(
            format!("{vm} uses a device of its host: {device}"),
            "detach it (virsh detach-device --config), and attach one of the destination afterwards",
        );
    }
    if let Some(tpm) = definition.tpm().filter(|tpm| tpm.backend != "emulator") {
        obstacles.refused(
            format!("{vm} uses its host's TPM (backend {})", tpm.backend),
            "an emulated one can be cloned; take it out of the definition otherwise",
        );
    }
    for disk in definition
        .disks()
        .iter()
        .filter(|disk| !excluded.contains(&disk.target))
    {
        let name = &disk.target;
        let leave_out = leave_out(name);
        if let DiskSource::Other(kind) = &disk.source
            && holds_data(disk)
        {
            obstacles.refused(
                format!("disk {name} of {vm} is of type {kind}, which cannot be copied"),
                &leave_out,
            );
        }
        if disk.device == DiskDevice::Lun {
            obstacles.refused(
                format!("disk {name} of {vm} is a SCSI device of its host"),
                &leave_out,
            );
        }
        if disk.shareable && holds_data(disk) {
            obstacles.refused(
                format!("disk {name} of {vm} is shared with other VMs"),
                &leave_out,
            );
        }
        if disk.transient {
            obstacles.refused(format!("disk {name} of {vm} is transient"), &leave_out);
        }
    }
    images(survey, obstacles);
    if survey.domain.has_saved_state {
        obstacles.refused(
            format!("{vm} has a saved state: its disks are only half of it"),
            format!("start it, or drop the state with \"virsh managedsave-remove {vm}\""),
        );
    }
}

fn images(survey: &Survey, obstacles: &mut Obstacles) {
    for disk in &survey.disks {
        for image in disk.images.iter().filter(|image| image.data_file.is_some()) {
            obstacles.refused(
                format!(
                    "disk {}: {} keeps its data in another file",
                    disk.target, image.path
                ),
                "convert it to one file with qemu-img convert",
            );
        }
    }
}

/// Files of the source that lie where the destination may well see them too.
///
/// # Errors
/// When the source cannot be asked.
pub(super) async fn not_shared(survey: &Survey, obstacles: &mut Obstacles) -> Result<()> {
    for disk in &survey.disks {
        for image in disk.images.iter().filter(|image| !image.is_device()) {
            let space = survey.on.host().space(naming::split(&image.path).0).await?;
            if space.is_shared() {
                obstacles.refused(
                    format!("disk {}: {} is on shared storage ({})", disk.target, image.path, space.kind),
                    format!(
                        "hosts that share storage need no copy; else leave it out with --exclude-disk {}",
                        disk.target
                    ),
                );
            }
        }
    }
    Ok(())
}

/// What the definition names and the destination lacks.
///
/// # Errors
/// When the destination cannot be asked.
pub(super) async fn equipment(
    definition: &Definition,
    to: &Destination,
    starts: bool,
    obstacles: &mut Obstacles,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let host = to.on.host();
    if let Some(emulator) = definition.emulator()
        && host.file_facts(emulator).await?.is_none()
    {
        obstacles.missing(
            format!("{host} has no emulator {emulator}"),
            "install QEMU there, or edit <emulator> of the source VM",
        );
    } else {
        machine(definition, to, obstacles, warnings).await?;
    }
    memory(definition, to, starts, obstacles, warnings);
    secrets(definition, to, obstacles);
    for directory in definition.shared_directories() {
        if host.file_facts(&directory.source).await?.is_none() {
            obstacles.missing(
                format!(
                    "{host} has no directory {} to share with the guest",
                    directory.source
                ),
                "make it there, or take the <filesystem> out of the definition",
            );
        }
    }
    for needed in definition.host_paths() {
        if host.file_facts(&needed.path).await?.is_none() {
            obstacles.missing(
                format!("{host} has no {} for {}", needed.path, needed.what),
                "provide it there, or take it out of the definition",
            );
        }
    }
    if definition.tpm().is_some() && host.tool(&["swtpm", "--version"], b"").await.is_err() {
        obstacles.missing(
            format!("{host} has no swtpm for the TPM"),
            "install swtpm and swtpm-tools there",
        );
    }
    Ok(())
}

/// Whether QEMU there knows the machine type and the processor.
async fn machine(
    definition: &Definition,
    to: &Destination,
    obstacles: &mut Obstacles,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let host = to.on.host();
    let known: DomainCapabilities = match to.on.domain_capabilities(definition).await {
        Ok(known) => known,
        Err(error) if matches!(error.code(), ErrorCode::Io | ErrorCode::NotFound) => {
            let machine = definition.machine().unwrap_or("its default");
            obstacles.missing(
                format!(
                    "{host} cannot run machine type {machine} with {}: {}",
                    definition.virt_type(),
                    error.causes().map(ToString::to_string).collect::<Vec<_>>().join(": ")
                ),
                "give the source VM a machine type that both hosts have (virsh domcapabilities lists them)",
            );
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    if let Some(model) = definition.cpu_model() {
        match known.cpu_models.get(model) {
            None => obstacles.missing(
                format!("{host} does not know the CPU model {model}"),
                "give the source VM a CPU model that both hosts have (virsh domcapabilities lists them)",
            ),
            Some(false) => warnings.push(format!("{host} cannot give a guest all of the CPU model {model}")),
            Some(true) => {}
        }
    }
    Ok(())
}

fn memory(
    definition: &Definition,
    to: &Destination,
    starts: bool,
    obstacles: &mut Obstacles,
    warnings: &mut Vec<String>,
) {
    let (wanted, host) = (definition.memory_bytes(), to.on.host());
    let Memory {
        total_bytes,
        available_bytes,
    } = to.memory;
    let message = |has: u64, what: &str| {
        let (wanted, has) = (output::iec(wanted), output::iec(has));
        format!(
            "{} needs {wanted} of memory, {host} has {has}{what}",
            definition.name()
        )
    };
    if wanted > total_bytes {
        obstacles.missing(
            message(total_bytes, ""),
            "give the source VM less memory, or take another host",
        );
    } else if wanted > available_bytes && starts {
        obstacles.missing(
            message(available_bytes, " free"),
            "clone without --start, or make room",
        );
    } else if wanted > available_bytes {
        warnings.push(message(available_bytes, " free"));
    }
}

fn secrets(definition: &Definition, to: &Destination, obstacles: &mut Obstacles) {
    for secret in definition.secrets() {
        if !to.secrets.contains(&secret.id) {
            obstacles.missing(
                format!("{} has no secret {} for {}", to.on.host(), secret.id, secret.used_by),
                "define it there with virsh secret-define and secret-set-value; secrets are never copied",
            );
        }
    }
}

/// The interfaces of a VM on their way to a destination.
pub(super) struct Connecting<'a> {
    pub(super) vm: &'a str,
    pub(super) to: &'a Destination,
    /// It is to run there at once.
    pub(super) starts: bool,
}

impl Connecting<'_> {
    /// Connects an interface to what the user wants, or looks whether it finds there what it has
    /// been connected to.
    pub(super) fn connect(
        &self,
        interface: usize,
        source: &InterfaceSource,
        wanted: Option<&str>,
        obstacles: &mut Obstacles,
        warnings: &mut Vec<String>,
    ) -> Option<Edit> {
        let (vm, host) = (self.vm, self.to.on.host());
        if let InterfaceSource::Other(kind) = source
            && kind == "vhostuser"
        {
            obstacles.refused(
                format!("{vm} is connected to a switch of its host by vhost-user"),
                "detach that interface, and attach one of the destination afterwards",
            );
            return None;
        }
        let Some(wanted) = wanted else {
            self.check(source, obstacles, warnings);
            return None;
        };
        let Some(source) = self.to.network.resolve(wanted, source) else {
            obstacles.missing(
                format!(
                    "{host} has no network or bridge {wanted} for {}",
                    name_of(source).unwrap_or("an interface")
                ),
                "name one of those in \"virsh net-list --all\", or a bridge",
            );
            return None;
        };
        self.check(&source, obstacles, warnings);
        Some(Edit::InterfaceSource { interface, source })
    }

    fn check(
        &self,
        source: &InterfaceSource,
        obstacles: &mut Obstacles,
        warnings: &mut Vec<String>,
    ) {
        let (vm, to) = (self.vm, self.to);
        let host = to.on.host();
        let name = name_of(source).unwrap_or_default();
        if !to.network.has(source) {
            let what = match source {
                InterfaceSource::Network(_) => "network",
                InterfaceSource::Bridge(_) => "bridge",
                _ => "network device",
            };
            obstacles.missing(
                format!("{host} has no {what} {name}, which {vm} is connected to"),
                format!("make it there, or connect the clone elsewhere: --network-map {name}=NAME"),
            );
        } else if matches!(source, InterfaceSource::Network(_))
            && !to
                .network
                .active_networks
                .iter()
                .any(|active| active == name)
        {
            let message = format!("the network {name} on {host} is not started");
            if self.starts {
                obstacles.missing(message, format!("start it there: virsh net-start {name}"));
            } else {
                warnings.push(message);
            }
        }
    }
}

/// Whether a disk is the file at `path`. A volume's path is not looked up: files of a pool are
/// named by their path as well in nearly every definition, and a wrong "no" only keeps a file.
pub(super) fn is_at(disk: &Disk, path: &str) -> bool {
    match &disk.source {
        DiskSource::File(theirs) | DiskSource::Block(theirs) => theirs == path,
        DiskSource::Volume { volume, .. } => naming::split(path).1 == volume,
        DiskSource::None | DiskSource::Other(_) => false,
    }
}
