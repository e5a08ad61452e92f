//! Changes of a definition, each of one thing.

use roxmltree::{Document, Node};
use uuid::Uuid;

use super::splice::{Splices, escape};
use super::{Definition, DiskSource, InterfaceSource, MacAddress, child, elements, of_devices};
use crate::error::{Error, ErrorCode, Result};

/// A change. Indexes count as [`Definition::disks`] and [`Definition::interfaces`] do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// Another name.
    Name(String),
    /// Another UUID, also where the firmware tells it to the guest.
    Uuid(Uuid),
    /// Another generation id, where there is one.
    GenId(Uuid),
    /// Another address.
    Mac {
        /// Which interface.
        interface: usize,
        /// Its address.
        mac: MacAddress,
    },
    /// Connected to something else.
    InterfaceSource {
        /// Which interface.
        interface: usize,
        /// What it is connected to.
        source: InterfaceSource,
    },
    /// Connected as before, by a cable that is unplugged.
    LinkDown {
        /// Which interface.
        interface: usize,
    },
    /// Contents from elsewhere; from nowhere, for a drive.
    DiskSource {
        /// Which disk.
        disk: usize,
        /// Where they are.
        source: DiskSource,
    },
    /// A disk whose image has another format.
    DiskFormat {
        /// Which disk.
        disk: usize,
        /// `raw`, `qcow2`, …
        format: String,
    },
    /// The images below a disk are no longer named here, but read from the disk.
    DropBackingStore {
        /// Which disk.
        disk: usize,
    },
    /// A disk less.
    RemoveDisk {
        /// Which disk.
        disk: usize,
    },
    /// The UEFI variables in another file.
    Nvram(String),
    /// What the guest says on its first serial console is written to a file as well.
    ConsoleLog(String),
}

impl Definition {
    /// The definition with these changes, and no others.
    ///
    /// # Errors
    /// Internal, for a change of something that is not there, or that leaves no definition.
    pub fn edited(&self, edits: &[Edit]) -> Result<Self> {
        let lost = |what: &str| {
            let message = format!(
                "the definition of {} has no {what} to be changed",
                self.name()
            );
            Error::new(ErrorCode::Internal, message)
        };
        let document =
            Document::parse(&self.text).map_err(|error| lost("text").caused_by(error))?;
        let mut splices = Splices::of(&self.text);
        for edit in edits {
            make(document.root_element(), edit, &mut splices)
                .ok_or_else(|| lost(&format!("place for {edit:?}")))?;
        }
        Self::parse(splices.apply())
    }
}

/// `None` when the place is not there.
fn make(domain: Node<'_, '_>, edit: &Edit, splices: &mut Splices<'_>) -> Option<()> {
    let disk = |index: &usize| of_devices(domain, "disk").nth(*index);
    let interface = |index: &usize| of_devices(domain, "interface").nth(*index);
    match edit {
        Edit::Name(name) => splices.set_text(child(domain, "name")?, name),
        Edit::Uuid(uuid) => {
            splices.set_text(child(domain, "uuid")?, &uuid.to_string());
            for entry in smbios_uuids(domain) {
                splices.set_text(entry, &uuid.to_string());
            }
        }
        Edit::GenId(id) => splices.set_text(child(domain, "genid")?, &id.to_string()),
        Edit::Mac {
            interface: index,
            mac,
        } => set_mac(interface(index)?, *mac, splices)?,
        Edit::InterfaceSource {
            interface: index,
            source,
        } => connect(interface(index)?, source, splices)?,
        Edit::LinkDown { interface: index } => unplug(interface(index)?, splices)?,
        Edit::DiskSource {
            disk: index,
            source: DiskSource::None,
        } => eject(disk(index)?, splices),
        Edit::DiskSource {
            disk: index,
            source,
        } => set_source(disk(index)?, source, splices)?,
        Edit::DiskFormat {
            disk: index,
            format,
        } => set_format(disk(index)?, format, splices)?,
        Edit::DropBackingStore { disk: index } => {
            splices.remove(child(disk(index)?, "backingStore")?);
        }
        Edit::RemoveDisk { disk: index } => splices.remove(disk(index)?),
        Edit::Nvram(path) => set_nvram(child(domain, "os")?, path, splices)?,
        Edit::ConsoleLog(path) => log_console(of_devices(domain, "serial").next()?, path, splices)?,
    }
    Some(())
}

/// libvirt refuses a domain whose firmware tells the guest another UUID than its own.
fn smbios_uuids<'a, 'i: 'a>(domain: Node<'a, 'i>) -> impl Iterator<Item = Node<'a, 'i>> {
    let system = child(domain, "sysinfo").and_then(|sysinfo| child(sysinfo, "system"));
    let entries = system.into_iter().flat_map(elements);
    entries.filter(|node| node.has_tag_name("entry") && node.attribute("name") == Some("uuid"))
}

fn set_mac(interface: Node<'_, '_>, mac: MacAddress, splices: &mut Splices<'_>) -> Option<()> {
    match child(interface, "mac").and_then(|node| node.attribute_node("address")) {
        Some(address) => splices.set_value(&address, &mac.to_string()),
        None => {
            let element = format!("<mac address='{mac}'/>");
            splices.insert_before(elements(interface).next()?, &element);
        }
    }
    Some(())
}

/// Gives `node` the type, and its `<source>` the attributes, that `new` names. What else says
/// where something is goes; whatever else there is stays.
fn relocate(
    node: Node<'_, '_>,
    kind: &str,
    new: &[(&str, &str)],
    locations: &[&str],
    splices: &mut Splices<'_>,
) -> Option<()> {
    let is_same = node.attribute("type").is_none_or(|had| had == kind);
    if let Some(attribute) = node.attribute_node("type").filter(|_| !is_same) {
        splices.set_value(&attribute, kind);
    }
    let text: Vec<String> = new
        .iter()
        .map(|(name, value)| format!("{name}='{}'", escape(value, Some('\''))))
        .collect();
    let text = text.join(" ");
    let Some(source) = child(node, "source") else {
        splices.insert_before(elements(node).last()?, &format!("<source {text}/>"));
        return Some(());
    };
    let mut old = source
        .attributes()
        .filter(|attribute| locations.contains(&attribute.name()));
    if is_same {
        for (name, value) in new {
            splices.set_value(&source.attribute_node(*name)?, value);
        }
        return Some(());
    }
    splices.replace_attribute(&old.next()?, &text);
    for attribute in old {
        splices.remove_attribute(&attribute);
    }
    Some(())
}

fn connect(interface: Node<'_, '_>, to: &InterfaceSource, splices: &mut Splices<'_>) -> Option<()> {
    const LOCATIONS: [&str; 6] = ["network", "portgroup", "portid", "bridge", "dev", "mode"];
    let had = interface.attribute("type");
    match to {
        InterfaceSource::Network(name) => relocate(
            interface,
            "network",
            &[("network", name)],
            &LOCATIONS,
            splices,
        ),
        InterfaceSource::Bridge(name) => relocate(
            interface,
            "bridge",
            &[("bridge", name)],
            &LOCATIONS,
            splices,
        ),
        InterfaceSource::Direct(name) if had == Some("direct") => {
            relocate(interface, "direct", &[("dev", name)], &LOCATIONS, splices)
        }
        InterfaceSource::Direct(name) => relocate(
            interface,
            "direct",
            &[("dev", name), ("mode", "bridge")],
            &LOCATIONS,
            splices,
        ),
        InterfaceSource::Other(_) => None,
    }
}

fn unplug(interface: Node<'_, '_>, splices: &mut Splices<'_>) -> Option<()> {
    match child(interface, "link").and_then(|link| link.attribute_node("state")) {
        Some(state) => splices.set_value(&state, "down"),
        None => splices.insert_after(elements(interface).last()?, "<link state='down'/>"),
    }
    Some(())
}

fn set_source(disk: Node<'_, '_>, to: &DiskSource, splices: &mut Splices<'_>) -> Option<()> {
    const LOCATIONS: [&str; 5] = ["file", "dev", "pool", "volume", "mode"];
    match to {
        DiskSource::File(path) => relocate(disk, "file", &[("file", path)], &LOCATIONS, splices),
        DiskSource::Block(path) => relocate(disk, "block", &[("dev", path)], &LOCATIONS, splices),
        DiskSource::Volume { pool, volume } => relocate(
            disk,
            "volume",
            &[("pool", pool), ("volume", volume)],
            &LOCATIONS,
            splices,
        ),
        DiskSource::None | DiskSource::Other(_) => None,
    }
}

fn set_format(disk: Node<'_, '_>, format: &str, splices: &mut Splices<'_>) -> Option<()> {
    match child(disk, "driver") {
        Some(driver) => match driver.attribute_node("type") {
            Some(had) => splices.set_value(&had, format),
            None => {
                let first = driver.attributes().next()?;
                let had = &format!("{}='{}'", first.name(), escape(first.value(), Some('\'')));
                splices.replace_attribute(&first, &format!("{had} type='{format}'"));
            }
        },
        None => {
            let element = format!("<driver name='qemu' type='{format}'/>");
            splices.insert_before(elements(disk).next()?, &element);
        }
    }
    Some(())
}

fn log_console(serial: Node<'_, '_>, path: &str, splices: &mut Splices<'_>) -> Option<()> {
    match (child(serial, "log"), elements(serial).next()) {
        (Some(had), _) => splices.set_value(&had.attribute_node("file")?, path),
        (None, Some(first)) => {
            let path = escape(path, Some('\''));
            splices.insert_before(first, &format!("<log file='{path}' append='off'/>"));
        }
        (None, None) => return None,
    }
    Some(())
}

fn eject(disk: Node<'_, '_>, splices: &mut Splices<'_>) {
    if let Some(source) = child(disk, "source") {
        splices.remove(source);
    }
    // An empty drive of another type is not understood everywhere.
    if let Some(kind) = disk
        .attribute_node("type")
        .filter(|kind| kind.value() != "file")
    {
        splices.set_value(&kind, "file");
    }
}

fn set_nvram(os: Node<'_, '_>, path: &str, splices: &mut Splices<'_>) -> Option<()> {
    match child(os, "nvram") {
        Some(nvram) => match child(nvram, "source") {
            Some(source) => splices.set_value(&source.attribute_node("file")?, path),
            None => splices.set_text(nvram, path),
        },
        None => {
            let element = format!("<nvram>{}</nvram>", escape(path, None));
            let last = child(os, "loader").or_else(|| elements(os).last())?;
            splices.insert_after(last, &element);
        }
    }
    Some(())
}
