//! A domain's definition: libvirt's XML, read for what this program must know, and changed without
//! touching a byte that it does not mean to change.
//!
//! Text in, values and text out; nothing here asks a host. Elements are found by their place below
//! `<domain>` and nowhere else: metadata of other tools may hold elements of any name.

mod differences;
mod disk;
mod edit;
mod interface;
mod splice;

use roxmltree::{Document, Node};
use uuid::Uuid;

pub use disk::{Disk, DiskDevice, DiskSource};
pub use edit::Edit;
pub use interface::{Interface, InterfaceSource, MacAddress};
pub(super) use splice::escape;

use crate::error::{Error, ErrorCode, Result};

/// A definition, as `virsh dumpxml --inactive --security-info` gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    text: String,
    values: Values,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Values {
    name: String,
    uuid: Uuid,
    virt_type: String,
    memory_bytes: u64,
    vcpus: u32,
    arch: Option<String>,
    machine: Option<String>,
    emulator: Option<String>,
    cpu_model: Option<String>,
    disks: Vec<Disk>,
    interfaces: Vec<Interface>,
    firmware: Firmware,
    boot_files: Vec<BootFile>,
    tpm: Option<Tpm>,
    secrets: Vec<Secret>,
    host_devices: Vec<String>,
    shared_directories: Vec<SharedDirectory>,
    host_paths: Vec<HostPath>,
    has_genid: bool,
    has_guest_agent: bool,
    has_serial: bool,
}

/// What the domain's firmware is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firmware {
    /// libvirt chooses it: `<os firmware='efi'>`.
    pub auto: bool,
    /// Path of the code, where the definition names it.
    pub loader: Option<String>,
    /// Path of the variables, where the definition names it; empty where libvirt is to choose.
    pub nvram: Option<String>,
    /// Path of what the variables are made from.
    pub nvram_template: Option<String>,
}

/// A file of the host that the domain is booted from, or fed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFile {
    /// `kernel`, `initrd`, `dtb`, …
    pub element: String,
    /// Its path.
    pub path: String,
}

/// A TPM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tpm {
    /// `emulator`, `passthrough`, `external`.
    pub backend: String,
    /// `1.2` or `2.0`.
    pub version: Option<String>,
}

/// A secret that libvirt must have for the domain to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// UUID, or the usage name.
    pub id: String,
    /// `disk vda`, `the TPM`.
    pub used_by: String,
}

/// A directory of the host that the guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedDirectory {
    /// `virtiofs`, `path`, …
    pub driver: String,
    /// The directory on the host.
    pub source: String,
    /// The guest's name for it.
    pub target: String,
}

/// Something else that the host must have under a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPath {
    /// What it is for.
    pub what: String,
    /// Where it is.
    pub path: String,
}

impl Definition {
    /// Reads a definition.
    ///
    /// # Errors
    /// Internal, for text that is no definition of a domain.
    pub fn parse(text: String) -> Result<Self> {
        let wrong = |what: String| {
            Error::new(
                ErrorCode::Internal,
                format!("libvirt's definition of a VM {what}"),
            )
        };
        let document = Document::parse(&text)
            .map_err(|error| wrong("is no XML".to_owned()).caused_by(error))?;
        let values = Values::read(document.root_element())
            .ok_or_else(|| wrong("has no name, no UUID, or is of no domain".to_owned()))?;
        Ok(Self { text, values })
    }

    /// The XML.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The domain's name.
    pub fn name(&self) -> &str {
        &self.values.name
    }

    /// The domain's UUID.
    pub fn uuid(&self) -> Uuid {
        self.values.uuid
    }

    /// `kvm`, `qemu`, …
    pub fn virt_type(&self) -> &str {
        &self.values.virt_type
    }

    /// Memory at the most, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.values.memory_bytes
    }

    /// Virtual processors at the most.
    pub fn vcpus(&self) -> u32 {
        self.values.vcpus
    }

    /// `x86_64`, …
    pub fn arch(&self) -> Option<&str> {
        self.values.arch.as_deref()
    }

    /// `pc-q35-7.2`, …
    pub fn machine(&self) -> Option<&str> {
        self.values.machine.as_deref()
    }

    /// Path of QEMU.
    pub fn emulator(&self) -> Option<&str> {
        self.values.emulator.as_deref()
    }

    /// The processor's model, where the definition names one.
    pub fn cpu_model(&self) -> Option<&str> {
        self.values.cpu_model.as_deref()
    }

    /// Disks and drives, in order.
    pub fn disks(&self) -> &[Disk] {
        &self.values.disks
    }

    /// Network interfaces, in order.
    pub fn interfaces(&self) -> &[Interface] {
        &self.values.interfaces
    }

    /// BIOS or UEFI, and from where.
    pub fn firmware(&self) -> &Firmware {
        &self.values.firmware
    }

    /// Kernel, initrd and their like.
    pub fn boot_files(&self) -> &[BootFile] {
        &self.values.boot_files
    }

    /// The TPM.
    pub fn tpm(&self) -> Option<&Tpm> {
        self.values.tpm.as_ref()
    }

    /// Secrets that disks and the TPM need.
    pub fn secrets(&self) -> &[Secret] {
        &self.values.secrets
    }

    /// Devices of the host that the domain has for itself, one description each.
    pub fn host_devices(&self) -> &[String] {
        &self.values.host_devices
    }

    /// Directories of the host.
    pub fn shared_directories(&self) -> &[SharedDirectory] {
        &self.values.shared_directories
    }

    /// Other things of the host.
    pub fn host_paths(&self) -> &[HostPath] {
        &self.values.host_paths
    }

    /// Whether the guest can tell by an id that it was cloned.
    pub fn has_genid(&self) -> bool {
        self.values.has_genid
    }

    /// Whether there is a channel to QEMU's agent in the guest.
    pub fn has_guest_agent(&self) -> bool {
        self.values.has_guest_agent
    }

    /// Whether the guest has a serial port.
    pub fn has_serial(&self) -> bool {
        self.values.has_serial
    }
}

impl Values {
    fn read(domain: Node<'_, '_>) -> Option<Self> {
        if !domain.has_tag_name("domain") {
            return None;
        }
        let devices = child(domain, "devices");
        let kind = child(domain, "os").and_then(|os| child(os, "type"));
        let emulator = devices.and_then(|devices| child(devices, "emulator"));
        let model = child(domain, "cpu").and_then(|cpu| child(cpu, "model"));
        Some(Self {
            name: text_of(child(domain, "name")?),
            uuid: text_of(child(domain, "uuid")?).trim().parse().ok()?,
            virt_type: domain.attribute("type").unwrap_or_default().to_owned(),
            memory_bytes: child(domain, "memory")
                .map(memory_bytes)
                .unwrap_or_default(),
            vcpus: child(domain, "vcpu")
                .and_then(|n| text_of(n).trim().parse().ok())
                .unwrap_or(1),
            arch: kind.and_then(|kind| attribute(kind, "arch")),
            machine: kind.and_then(|kind| attribute(kind, "machine")),
            emulator: emulator.map(|node| text_of(node).trim().to_owned()),
            cpu_model: model.map(|node| text_of(node).trim().to_owned()),
            disks: of_devices(domain, "disk").map(Disk::read).collect(),
            interfaces: of_devices(domain, "interface")
                .map(Interface::read)
                .collect(),
            firmware: Firmware::read(domain),
            boot_files: boot_nodes(domain)
                .map(|node| BootFile {
                    element: node.tag_name().name().to_owned(),
                    path: text_of(node).trim().to_owned(),
                })
                .collect(),
            tpm: of_devices(domain, "tpm").next().map(Tpm::read),
            secrets: secrets(domain),
            host_devices: host_devices(domain),
            shared_directories: of_devices(domain, "filesystem")
                .filter_map(SharedDirectory::read)
                .collect(),
            host_paths: host_paths(domain),
            has_genid: child(domain, "genid").is_some(),
            has_serial: of_devices(domain, "serial").next().is_some(),
            has_guest_agent: of_devices(domain, "channel")
                .filter_map(|channel| child(channel, "target"))
                .any(|target| target.attribute("name") == Some("org.qemu.guest_agent.0")),
        })
    }
}

impl Firmware {
    fn read(domain: Node<'_, '_>) -> Self {
        let Some(os) = child(domain, "os") else {
            return Self::default();
        };
        let nvram = child(os, "nvram");
        let loader = child(os, "loader").map(|node| text_of(node).trim().to_owned());
        Self {
            auto: os.attribute("firmware") == Some("efi"),
            loader: loader.filter(|path| !path.is_empty()),
            nvram: nvram.map(|node| match child(node, "source") {
                Some(source) => source.attribute("file").unwrap_or_default().to_owned(),
                None => text_of(node).trim().to_owned(),
            }),
            nvram_template: nvram.and_then(|node| attribute(node, "template")),
        }
    }
}

impl Tpm {
    fn read(node: Node<'_, '_>) -> Self {
        let backend = child(node, "backend");
        let of_backend = |name| backend.and_then(|backend| attribute(backend, name));
        Self {
            backend: of_backend("type").unwrap_or_default(),
            version: of_backend("version"),
        }
    }
}

impl SharedDirectory {
    fn read(node: Node<'_, '_>) -> Option<Self> {
        let source = attribute(child(node, "source")?, "dir")?;
        let driver = child(node, "driver").and_then(|driver| attribute(driver, "type"));
        let target = child(node, "target").and_then(|target| attribute(target, "dir"));
        Some(Self {
            driver: driver.unwrap_or_else(|| "path".to_owned()),
            source,
            target: target.unwrap_or_default(),
        })
    }
}

/// The elements below `<os>`, and the ACPI tables, that name a file by path.
fn boot_nodes<'a, 'i: 'a>(domain: Node<'a, 'i>) -> impl Iterator<Item = Node<'a, 'i>> {
    const BY_PATH: [&str; 4] = ["kernel", "initrd", "dtb", "shim"];
    let os = child(domain, "os");
    let direct = os.into_iter().flat_map(elements);
    let tables = os
        .and_then(|os| child(os, "acpi"))
        .into_iter()
        .flat_map(elements);
    direct
        .filter(|node| BY_PATH.contains(&node.tag_name().name()))
        .chain(tables.filter(|node| node.has_tag_name("table")))
}

fn secrets(domain: Node<'_, '_>) -> Vec<Secret> {
    // A disk names its secrets in elements, a TPM in an attribute of its encryption.
    let id = |node: Node<'_, '_>| match node.tag_name().name() {
        "secret" => attribute(node, "uuid").or_else(|| attribute(node, "usage")),
        "encryption" => attribute(node, "secret"),
        _ => None,
    };
    let of = |node: Node<'_, '_>, used_by: String| -> Vec<Secret> {
        let ids = node.descendants().filter_map(id);
        ids.map(|id| Secret {
            id,
            used_by: used_by.clone(),
        })
        .collect()
    };
    let disks = of_devices(domain, "disk")
        .flat_map(|node| of(node, format!("disk {}", disk::target_of(node))));
    let tpms = of_devices(domain, "tpm").flat_map(|node| of(node, "the TPM".to_owned()));
    disks.chain(tpms).collect()
}

fn host_devices(domain: Node<'_, '_>) -> Vec<String> {
    let mut found: Vec<String> = of_devices(domain, "hostdev")
        .map(|node| describe("hostdev", node))
        .collect();
    found.extend(
        of_devices(domain, "interface")
            .filter(|node| matches!(node.attribute("type"), Some("hostdev" | "vdpa")))
            .map(|node| describe("interface", node)),
    );
    found
}

/// `hostdev type='pci' 0000:01:00.0`, as far as the definition says so.
fn describe(what: &str, node: Node<'_, '_>) -> String {
    let kind = node
        .attribute("type")
        .or_else(|| node.attribute("mode"))
        .unwrap_or_default();
    let source = child(node, "source");
    let address = source.and_then(|source| child(source, "address"));
    let which: Vec<&str> = source
        .into_iter()
        .chain(source.into_iter().flat_map(elements))
        .chain(address)
        .flat_map(|node| node.attributes())
        .map(|attribute| attribute.value())
        .collect();
    let mut once: Vec<&str> = Vec::new();
    for word in which {
        if !once.contains(&word) {
            once.push(word);
        }
    }
    format!("{what} of type {kind} ({})", once.join(" "))
}

/// Devices of the host that the definition names by path.
fn host_paths(domain: Node<'_, '_>) -> Vec<HostPath> {
    let mut found = Vec::new();
    let mut add = |what: String, path: Option<String>| {
        if let Some(path) = path.filter(|path| !path.is_empty()) {
            found.push(HostPath { what, path });
        }
    };
    for node in of_devices(domain, "rng") {
        let backend =
            child(node, "backend").filter(|node| node.attribute("model") == Some("random"));
        add(
            "the random numbers".to_owned(),
            backend.map(|node| text_of(node).trim().to_owned()),
        );
    }
    for node in of_devices(domain, "input") {
        let source = child(node, "source");
        let path =
            source.and_then(|node| attribute(node, "evdev").or_else(|| attribute(node, "dev")));
        add("an input device".to_owned(), path);
    }
    for kind in ["serial", "parallel", "console", "channel"] {
        for node in of_devices(domain, kind).filter(|node| node.attribute("type") == Some("dev")) {
            let path = child(node, "source").and_then(|node| attribute(node, "path"));
            add(format!("a {kind} device"), path);
        }
    }
    found
}

fn memory_bytes(node: Node<'_, '_>) -> u64 {
    let unit: u64 = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "MB" => 1000 * 1000,
        "GB" => 1000 * 1000 * 1000,
        "TB" => 1000 * 1000 * 1000 * 1000,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        _ => 1 << 10,
    };
    let number: u64 = text_of(node).trim().parse().unwrap_or_default();
    number.saturating_mul(unit)
}

/// The elements directly below, without a namespace: libvirt's own.
fn elements<'a, 'i: 'a>(node: Node<'a, 'i>) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children()
        .filter(|node| node.is_element() && node.tag_name().namespace().is_none())
}

fn child<'a, 'i: 'a>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    elements(node).find(|node| node.has_tag_name(name))
}

fn of_devices<'a, 'i: 'a>(
    domain: Node<'a, 'i>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'i>> {
    let devices = child(domain, "devices").into_iter().flat_map(elements);
    devices.filter(move |node| node.has_tag_name(name))
}

fn attribute(node: Node<'_, '_>, name: &str) -> Option<String> {
    node.attribute(name).map(str::to_owned)
}

/// All text of an element: a comment may stand within it.
fn text_of(node: Node<'_, '_>) -> String {
    node.children()
        .filter(Node::is_text)
        .filter_map(|text| text.text())
        .collect()
}

#[cfg(test)]
mod tests;
