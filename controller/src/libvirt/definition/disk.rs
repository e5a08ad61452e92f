//! Disks and drives of a definition.

use roxmltree::Node;

use super::{attribute, child, elements};

/// A disk, or a drive for media.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The guest's name for it: `vda`.
    pub target: String,
    /// What the guest sees.
    pub device: DiskDevice,
    /// Where its contents are.
    pub source: DiskSource,
    /// `raw`, `qcow2`, …, where the definition says.
    pub format: Option<String>,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Several domains may write to it.
    pub shareable: bool,
    /// What the guest writes is thrown away.
    pub transient: bool,
    /// The definition names the images below it.
    pub has_explicit_chain: bool,
}

/// What the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskDevice {
    /// A disk.
    Disk,
    /// A drive for CDs and DVDs.
    Cdrom,
    /// A drive for floppy disks.
    Floppy,
    /// A SCSI device of the host.
    Lun,
}

/// Where the contents of a disk are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// The drive is empty.
    None,
    /// A file, by path.
    File(String),
    /// A block device, by path.
    Block(String),
    /// A volume of a storage pool.
    Volume {
        /// The pool.
        pool: String,
        /// The volume.
        volume: String,
    },
    /// Something that is no path, by libvirt's name for its kind: `network`, `nvme`, …
    Other(String),
}

impl Disk {
    pub(super) fn read(node: Node<'_, '_>) -> Self {
        let driver = child(node, "driver");
        let chain = child(node, "backingStore");
        Self {
            target: target_of(node),
            device: match node.attribute("device") {
                Some("cdrom") => DiskDevice::Cdrom,
                Some("floppy") => DiskDevice::Floppy,
                Some("lun") => DiskDevice::Lun,
                _ => DiskDevice::Disk,
            },
            source: DiskSource::read(node),
            format: driver.and_then(|driver| attribute(driver, "type")),
            read_only: child(node, "readonly").is_some(),
            shareable: child(node, "shareable").is_some(),
            transient: child(node, "transient").is_some(),
            has_explicit_chain: chain.is_some_and(|chain| elements(chain).next().is_some()),
        }
    }
}

impl DiskSource {
    fn read(disk: Node<'_, '_>) -> Self {
        let kind = disk.attribute("type").unwrap_or("file");
        let source = child(disk, "source");
        let value = |name| {
            source
                .and_then(|source| attribute(source, name))
                .filter(|text| !text.is_empty())
        };
        match kind {
            "file" => value("file").map_or(Self::None, Self::File),
            "block" => value("dev").map_or(Self::None, Self::Block),
            "volume" => match (value("pool"), value("volume")) {
                (Some(pool), Some(volume)) => Self::Volume { pool, volume },
                _ => Self::None,
            },
            other => Self::Other(other.to_owned()),
        }
    }
}

/// The guest's name for a disk.
pub(super) fn target_of(disk: Node<'_, '_>) -> String {
    let target = child(disk, "target").and_then(|target| attribute(target, "dev"));
    target.unwrap_or_default()
}
