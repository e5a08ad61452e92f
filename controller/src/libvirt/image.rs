//! Disk images as `qemu-img` on the hypervisor describes them: format, sizes, and the chain of
//! images that one stands on.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Hypervisor;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{FileFacts, FileKind};

/// One file or device of a disk: the disk itself, or what it is backed by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Absolute path on its host.
    pub path: String,
    /// `raw`, `qcow2`, …
    pub format: String,
    /// What a guest sees, in bytes.
    pub virtual_size_bytes: u64,
    /// The file that holds it.
    pub facts: FileFacts,
    /// The reference to the next image of the chain, word for word as this one holds it.
    pub backing: Option<String>,
    /// Snapshots inside of the image.
    pub internal_snapshots: Vec<String>,
    /// A second file that holds the data, which qcow2 can have.
    pub data_file: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    filename: String,
    format: String,
    virtual_size: u64,
    backing_filename: Option<String>,
    #[serde(default)]
    snapshots: Vec<Snapshot>,
    format_specific: Option<FormatSpecific>,
}

#[derive(Debug, Deserialize)]
struct Snapshot {
    name: String,
}

#[derive(Debug, Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: serde_json::Value,
}

impl Hypervisor {
    /// The images of a disk, from the one that the guest writes to the one at the bottom. A disk
    /// whose format nobody stated is raw: what its guest wrote into it is not believed.
    ///
    /// With `in_use`, a VM may have it open; otherwise QEMU's image lock tells of anyone who
    /// writes to it, whether libvirt knows of them or not.
    ///
    /// # Errors
    /// Not found, when an image is missing; busy, when a process writes to one; missing
    /// requirement without `qemu-img`.
    pub async fn images(
        &self,
        path: &str,
        format: Option<&str>,
        in_use: bool,
    ) -> Result<Vec<Image>> {
        let mut words = vec!["qemu-img", "info", "--output=json", "--backing-chain"];
        words.extend(["-f", format.unwrap_or("raw")]);
        if in_use {
            words.push("-U");
        }
        words.push(path);
        let infos: Vec<Info> = self.info(path, &words).await?;
        let mut images = Vec::new();
        for info in infos {
            images.push(self.image(info).await?);
        }
        Ok(images)
    }

    /// The reference that an image holds to the one below it, word for word. Whether that is there
    /// does not matter.
    ///
    /// # Errors
    /// As [`Hypervisor::images`].
    pub async fn reference(&self, path: &str, format: &str) -> Result<Option<String>> {
        let words = ["qemu-img", "info", "--output=json", "-f", format, path];
        let info: Info = self.info(path, &words).await?;
        Ok(info.backing_filename)
    }

    /// Writes another such reference into an image, whose contents stay as they are.
    ///
    /// # Errors
    /// When `qemu-img` refuses it.
    pub async fn set_reference(
        &self,
        [path, format]: [&str; 2],
        [backing, backing_format]: [&str; 2],
    ) -> Result<()> {
        let words = [
            "qemu-img",
            "rebase",
            "-u",
            "-f",
            format,
            "-F",
            backing_format,
            "-b",
            backing,
            path,
        ];
        self.host().tool_output(&words, b"").await.map(drop)
    }

    /// What `qemu-img info` says.
    async fn info<T: DeserializeOwned>(&self, path: &str, words: &[&str]) -> Result<T> {
        let output = self.host().tool(words, b"").await?;
        if !output.status.success() {
            return Err(self.explain_image(path, &output.stderr));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| {
            let message = format!(
                "qemu-img on {} says of {path} what is not understood",
                self.host()
            );
            Error::new(ErrorCode::Internal, message).caused_by(error)
        })
    }

    async fn image(&self, info: Info) -> Result<Image> {
        let Some(facts) = self.host().file_facts(&info.filename).await? else {
            return Err(self.missing(&info.filename));
        };
        let data = info
            .format_specific
            .map(|specific| specific.data)
            .unwrap_or_default();
        Ok(Image {
            path: info.filename,
            format: info.format,
            virtual_size_bytes: info.virtual_size,
            facts,
            backing: info.backing_filename,
            internal_snapshots: info.snapshots.into_iter().map(|each| each.name).collect(),
            data_file: data["data-file"].as_str().map(str::to_owned),
        })
    }

    fn explain_image(&self, path: &str, stderr: &str) -> Error {
        let said = stderr.trim().to_owned();
        if said.contains("lock") {
            let message = format!(
                "{path} on {} is in use: a process holds QEMU's image lock",
                self.host()
            );
            return Error::new(ErrorCode::Busy, message)
                .caused_by(said)
                .hint("look for the process that has it open (a VM that libvirt does not know, qemu-nbd, qemu-img)");
        }
        if said.contains("No such file or directory") {
            return self.missing(path).caused_by(said);
        }
        let message = format!("qemu-img cannot read {path} on {}", self.host());
        Error::new(ErrorCode::Io, message).caused_by(said)
    }

    fn missing(&self, path: &str) -> Error {
        let message = format!(
            "the disk {path} or an image that it is backed by is not on {}",
            self.host()
        );
        Error::new(ErrorCode::NotFound, message)
    }
}

impl Image {
    /// Whether it lies on a block device.
    pub fn is_device(&self) -> bool {
        self.facts.kind == FileKind::Device
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;
    use std::process::Command;

    fn qemu_img(args: &[&str]) {
        let output = Command::new("qemu-img").args(args).output();
        assert!(
            output.is_ok_and(|output| output.status.success()),
            "this test needs qemu-img, which tests/run installs"
        );
    }

    fn here() -> Hypervisor {
        let host = Host::new("local".parse().unwrap(), std::sync::Arc::default());
        Hypervisor::new(host, "qemu:///system")
    }

    #[tokio::test]
    async fn a_chain_is_read_from_the_top_and_raw_contents_are_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (base, top) = (path("base.raw"), path("top.qcow2"));
        std::fs::write(&base, vec![0; 1 << 20]).unwrap();
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", &top,
        ]);
        let images = here().images(&top, Some("qcow2"), false).await.unwrap();
        assert_eq!(images.len(), 2);
        assert_eq!(images[0].backing.as_deref(), Some("base.raw"));
        assert_eq!(
            (images[1].path.as_str(), images[1].format.as_str()),
            (base.as_str(), "raw")
        );
        assert_eq!(images[0].virtual_size_bytes, 1 << 20);
        let reference = here().reference(&top, "qcow2").await.unwrap();
        assert_eq!(reference.as_deref(), Some("base.raw"));
        let elsewhere = ["/nowhere/base.raw", "raw"];
        let set = here().set_reference([&top, "qcow2"], elsewhere).await;
        set.unwrap();
        let reference = here().reference(&top, "qcow2").await.unwrap();
        assert_eq!(reference.as_deref(), Some("/nowhere/base.raw"));
        let as_raw = here().images(&top, None, false).await.unwrap();
        assert_eq!((as_raw.len(), as_raw[0].format.as_str()), (1, "raw"));
        let missing = here().images(&path("none"), None, false).await.unwrap_err();
        assert_eq!(missing.code(), ErrorCode::NotFound);
    }
}
