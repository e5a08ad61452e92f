//! Network interfaces of a definition, and their addresses.

use std::fmt;
use std::str::FromStr;

use roxmltree::Node;

use super::{attribute, child};
use crate::cli::options::BadValue;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its address, as it is written.
    pub mac: Option<String>,
    /// What it is connected to.
    pub source: InterfaceSource,
    /// `virtio`, `e1000`, …
    pub model: Option<String>,
}

/// What an interface is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InterfaceSource {
    /// A network of libvirt.
    Network(String),
    /// A bridge of the host.
    Bridge(String),
    /// A device of the host, through macvtap.
    Direct(String),
    /// Something without a name on the host, by libvirt's name for its kind: `user`, `ethernet`, …
    Other(String),
}

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress([u8; 6]);

impl Interface {
    pub(super) fn read(node: Node<'_, '_>) -> Self {
        Self {
            mac: child(node, "mac").and_then(|mac| attribute(mac, "address")),
            source: InterfaceSource::read(node),
            model: child(node, "model").and_then(|model| attribute(model, "type")),
        }
    }
}

impl InterfaceSource {
    fn read(node: Node<'_, '_>) -> Self {
        let kind = node.attribute("type").unwrap_or("network");
        let value = |name| {
            child(node, "source")
                .and_then(|source| attribute(source, name))
                .unwrap_or_default()
        };
        match kind {
            "network" => Self::Network(value("network")),
            "bridge" => Self::Bridge(value("bridge")),
            "direct" => Self::Direct(value("dev")),
            other => Self::Other(other.to_owned()),
        }
    }
}

impl MacAddress {
    /// An address of the range that QEMU and libvirt draw theirs from.
    pub fn random_qemu(bytes: [u8; 3]) -> Self {
        Self([0x52, 0x54, 0x00, bytes[0], bytes[1], bytes[2]])
    }
}

impl FromStr for MacAddress {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let bad = || BadValue::new(format!("\"{}\" is no MAC address", text.escape_debug()));
        let mut bytes = [0; 6];
        let mut parts = text.trim().split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| (1..=2).contains(&part.len()))
                .ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            Err(bad())
        } else {
            Ok(Self(bytes))
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
