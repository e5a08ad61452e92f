//! What a hypervisor can run, and what it has: memory, machine types, processors, secrets, pools.

use std::collections::BTreeMap;

use super::Hypervisor;
use super::definition::Definition;
use super::domain::lines;
use crate::error::{Error, ErrorCode, Result};

/// A host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All of it, in bytes.
    pub total_bytes: u64,
    /// What a VM could have now: free, or held by caches only.
    pub available_bytes: u64,
}

/// What QEMU offers to a domain of one kind and machine type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DomainCapabilities {
    /// Names of processor models, and whether the host can give all of one.
    pub cpu_models: BTreeMap<String, bool>,
}

/// A storage pool that is a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// The directory that its volumes are files in.
    pub directory: String,
}

impl Hypervisor {
    /// The host's memory.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn memory(&self) -> Result<Memory> {
        let stats = self.virsh(&["nodememstats"]).await?;
        let bytes = |key: &str| {
            let line = stats
                .lines()
                .find(|line| line.trim_start().starts_with(key));
            let kib = line.and_then(|line| {
                line.split_once(':')?
                    .1
                    .split_whitespace()
                    .next()?
                    .parse::<u64>()
                    .ok()
            });
            kib.unwrap_or_default().saturating_mul(1024)
        };
        Ok(Memory {
            total_bytes: bytes("total"),
            available_bytes: bytes("free") + bytes("buffers") + bytes("cached"),
        })
    }

    /// What QEMU offers to a domain like this one.
    ///
    /// # Errors
    /// Io, when it has no such machine type, architecture or kind of domain.
    pub async fn domain_capabilities(&self, definition: &Definition) -> Result<DomainCapabilities> {
        let mut words = vec!["domcapabilities", "--virttype", definition.virt_type()];
        for (option, value) in [
            ("--arch", definition.arch()),
            ("--machine", definition.machine()),
            ("--emulatorbin", definition.emulator()),
        ] {
            if let Some(value) = value {
                words.extend([option, value]);
            }
        }
        let text = self.virsh(&words).await?;
        let document = roxmltree::Document::parse(&text).map_err(|error| {
            let message = format!("{} describes its capabilities with no XML", self.host());
            Error::new(ErrorCode::Internal, message).caused_by(error)
        })?;
        let mut capabilities = DomainCapabilities::default();
        let custom = document
            .descendants()
            .filter(|node| node.has_tag_name("mode") && node.attribute("name") == Some("custom"));
        for model in custom
            .flat_map(|mode| mode.children())
            .filter(|node| node.has_tag_name("model"))
        {
            let name = model.text().unwrap_or_default().to_owned();
            capabilities
                .cpu_models
                .insert(name, model.attribute("usable") != Some("no"));
        }
        Ok(capabilities)
    }

    /// Names, one on a line, as several commands of virsh give them.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn names(&self, words: &[&str]) -> Result<Vec<String>> {
        Ok(lines(&self.virsh(words).await?))
    }

    /// The UUIDs and usage names of the secrets that are defined.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn secrets(&self) -> Result<Vec<String>> {
        let listed = self.virsh(&["secret-list"]).await?;
        Ok(listed.split_whitespace().map(str::to_owned).collect())
    }

    /// The pool of this name, which must be a directory and started.
    ///
    /// # Errors
    /// Not found, when there is none; refused, for one of another kind or one that is not started.
    pub async fn pool(&self, name: &str) -> Result<Pool> {
        let (host, dump) = (
            self.host(),
            self.virsh(&["pool-dumpxml", "--pool", name]).await,
        );
        let text = dump.map_err(|error| match error.code() {
            ErrorCode::NotFound => Error::new(
                ErrorCode::NotFound,
                format!("{host} has no storage pool \"{name}\""),
            )
            .hint("virsh pool-list --all shows those it has"),
            _ => error,
        })?;
        let document = roxmltree::Document::parse(&text).map_err(|error| {
            Error::new(
                ErrorCode::Internal,
                format!("{host} describes the pool {name} with no XML"),
            )
            .caused_by(error)
        })?;
        let pool = document.root_element();
        let kind = pool.attribute("type").unwrap_or_default().to_owned();
        let path = pool.descendants().find(|node| {
            node.has_tag_name("path")
                && node
                    .parent()
                    .is_some_and(|above| above.has_tag_name("target"))
        });
        let directory = path
            .and_then(|path| path.text())
            .unwrap_or_default()
            .to_owned();
        if !matches!(kind.as_str(), "dir" | "fs" | "netfs") || directory.is_empty() {
            let message = format!(
                "the pool {name} on {host} is of type {kind}, and disks are copied into directories only"
            );
            return Err(Error::new(ErrorCode::Refused, message)
                .hint("name a pool of type dir, or use --dest-dir"));
        }
        let info = self.virsh(&["pool-info", "--pool", name]).await?;
        if !info
            .lines()
            .any(|line| line.starts_with("State:") && line.contains("running"))
        {
            let message = format!("the pool {name} on {host} is not started");
            return Err(Error::new(ErrorCode::Refused, message)
                .hint(format!("start it: virsh pool-start {name}")));
        }
        Ok(Pool {
            name: name.to_owned(),
            directory,
        })
    }

    /// What tells this host's libvirt from any other.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn host_uuid(&self) -> Result<String> {
        let text = self.virsh(&["capabilities"]).await?;
        let uuid = text
            .split_once("<uuid>")
            .and_then(|(_, rest)| rest.split_once("</uuid>"));
        Ok(uuid
            .map(|(uuid, _)| uuid.trim().to_owned())
            .unwrap_or_default())
    }
}
