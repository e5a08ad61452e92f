//! Seeds: disks that are there already, brought by hand or made by a clone, become the head of a
//! replica, so that the first run ships what differs and no more.

use super::point::file_of;
use super::{naming, replica, space};
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;

/// A disk to begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// Which of the VM: `vda`, …
    pub target: String,
    /// What its image is: `raw`, `qcow2`, … It is never guessed: a guest may write what looks like
    /// another format, with any file of the host below it.
    pub format: String,
    /// An image on the replica's host.
    pub path: String,
}

impl std::str::FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            "expected TARGET=PATH, or TARGET=FORMAT:PATH, such as vda=qcow2:/seed/web".to_owned()
        };
        let (target, image) = text.split_once('=').ok_or_else(expected)?;
        let (format, path) = match image.split_once(':') {
            Some((format, path)) if !format.contains('/') => (format, path),
            _ => ("raw", image),
        };
        let is_plain =
            |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric());
        if !is_plain(target) || !is_plain(format) || !path.starts_with('/') {
            return Err(expected());
        }
        Ok(Self {
            target: target.to_owned(),
            format: format.to_owned(),
            path: path.to_owned(),
        })
    }
}

/// Copies images to where the first run of a replica finds them; on XFS and btrfs a raw one shares
/// its blocks with the copy. The images stay as they are.
///
/// # Errors
/// Refused, where there is a replica already; not found, when there is no such image; io, when one is
/// in use, or cannot be copied: then nothing is left.
pub async fn adopt(on: &Hypervisor, directory: &str, seeds: &[Seed]) -> Result<()> {
    let host = on.host();
    for seed in seeds {
        if host.file_facts(&seed.path).await?.is_none() {
            let message = format!("there is no {} on {host}", seed.path);
            return Err(Error::new(ErrorCode::NotFound, message));
        }
    }
    if space::existing(host, directory).await?.as_deref() != Some(directory) {
        host.make_directory(directory, "0711").await?;
    }
    let lock = replica::lock(host, directory).await?;
    let head = naming::join(directory, "head");
    let has_head = host
        .names_in(&head)
        .await?
        .is_some_and(|names| !names.is_empty());
    if has_head {
        let message = format!("there is a replica in {directory} on {host}");
        return Err(Error::new(ErrorCode::Refused, message)
            .hint("\"kvm-clone-ctl replicate remove\" removes it"));
    }
    let unfinished = naming::join(directory, ".adopted");
    host.remove(std::slice::from_ref(&unfinished)).await?;
    host.make_directory(&unfinished, "0711").await?;
    let copied = async {
        for seed in seeds {
            let target = naming::join(&unfinished, &file_of(&seed.target));
            // QEMU refuses an image that a VM writes to; -C shares blocks where that can be.
            let words = ["qemu-img", "convert", "-C", "-f", &seed.format, "-O", "raw"];
            let words = [&words[..], &[&seed.path, &target]].concat();
            host.tool_output(&words, b"").await?;
        }
        host.remove(std::slice::from_ref(&head)).await?;
        let words = ["mv", "-T", "--", &unfinished, &head];
        host.tool_output(&words, b"").await.map(drop)
    };
    if let Err(error) = copied.await {
        host.remove(&[unfinished]).await?;
        return Err(error);
    }
    lock.end().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_disk_is_refused() {
        let read = |text: &str| {
            let seed: Seed = text.parse().unwrap();
            [seed.target, seed.format, seed.path]
        };
        assert_eq!(read("vda=/seed/a=b:c"), ["vda", "raw", "/seed/a=b:c"]);
        assert_eq!(read("vda=/seed/a=b.raw"), ["vda", "raw", "/seed/a=b.raw"]);
        assert_eq!(read("sda=qcow2:/seed/a"), ["sda", "qcow2", "/seed/a"]);
        for wrong in [
            "vda",
            "=/a",
            "vda=a",
            "../x=/a",
            "vd a=/a",
            "vda=-f:/a",
            "vda=:/a",
        ] {
            assert!(wrong.parse::<Seed>().is_err(), "{wrong}");
        }
    }
}
