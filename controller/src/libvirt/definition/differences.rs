//! How two definitions differ, beyond what makes a clone another VM: name, UUID, addresses, paths.

use std::collections::BTreeMap;

use roxmltree::{Document, Node};

use super::Definition;

/// Elements whose content, and those whose attributes, are expected to differ: by their path below
/// the domain, numbers left out.
const OWN: [&str; 28] = [
    "name",
    "uuid",
    "genid",
    "sysinfo/system/entry",
    "os/nvram",
    "os/nvram/source/@file",
    "os/nvram/@template",
    "os/loader",
    "os/kernel",
    "os/initrd",
    "os/dtb",
    "devices/emulator",
    "devices/disk/@type",
    "devices/disk/source/@file",
    "devices/disk/source/@dev",
    "devices/disk/source/@pool",
    "devices/disk/source/@volume",
    "devices/disk/source/@index",
    "devices/disk/source/@mode",
    "devices/interface/mac",
    "devices/interface/mac/@address",
    "devices/interface/target/@dev",
    "devices/serial/source/@path",
    "devices/console/source/@path",
    "devices/channel/source/@path",
    "devices/console/@tty",
    "devices/tpm/backend/source/@path",
    "devices/filesystem/source/@dir",
];

impl Definition {
    /// What `other` says differently, a line each: names of elements and attributes with what
    /// stands here and there. White space, comments and the order of attributes do not count.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let (here, there) = (facts(&self.text), facts(&other.text));
        let mut lines = Vec::new();
        for (path, value) in &here {
            match there.get(path) {
                Some(theirs) if theirs == value => {}
                Some(theirs) => lines.push(format!("{path}: \"{value}\" here, \"{theirs}\" there")),
                None => lines.push(format!("{path}: \"{value}\" here, absent there")),
            }
        }
        for (path, value) in there.iter().filter(|(path, _)| !here.contains_key(*path)) {
            lines.push(format!("{path}: absent here, \"{value}\" there"));
        }
        lines
    }
}

/// Everything that a definition says: for the path of each element and attribute, its value.
fn facts(text: &str) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    // What was read once is XML.
    if let Ok(document) = Document::parse(text) {
        collect(document.root_element(), "", "", &mut facts);
    }
    facts
}

/// `path` counts elements of one name, `plain` does not.
fn collect(node: Node<'_, '_>, path: &str, plain: &str, facts: &mut BTreeMap<String, String>) {
    for attribute in node.attributes() {
        let name = attribute.name();
        if !OWN.contains(&join(plain, &format!("@{name}")).as_str()) {
            facts.insert(
                join(path, &format!("@{name}")),
                attribute.value().to_owned(),
            );
        }
    }
    let text: String = node
        .children()
        .filter(Node::is_text)
        .filter_map(|text| text.text())
        .collect();
    let is_own = OWN.contains(&plain);
    if !path.is_empty() && !is_own {
        facts.insert(path.to_owned(), text.trim().to_owned());
    }
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for child in node.children().filter(Node::is_element) {
        let name = child.tag_name().name();
        let inner = join(plain, name);
        if is_left_out(child, &inner) {
            continue;
        }
        let count = counts.entry(name).or_default();
        *count += 1;
        let named = match (name, child.attribute("type"), child.attribute("index")) {
            // libvirt puts those that it adds where it likes.
            ("controller", Some(kind), Some(index)) => format!("{name}[{kind} {index}]"),
            _ => format!("{name}[{count}]"),
        };
        collect(child, &join(path, &named), &inner, facts);
    }
}

/// A medium is not a part of its drive, and the images below a disk are read from it.
fn is_left_out(node: Node<'_, '_>, plain: &str) -> bool {
    let drive = node.parent().and_then(|disk| disk.attribute("device"));
    match plain {
        "devices/disk/backingStore" => true,
        "devices/disk/source" => matches!(drive, Some("cdrom" | "floppy")),
        _ => false,
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_owned()
    } else {
        format!("{path}/{name}")
    }
}
