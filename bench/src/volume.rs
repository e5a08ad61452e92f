//! A file system for disks larger than ext4 can hold: xfs on a loop device, made in a file and
//! removed with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::janitor::{Janitor, VOLUME};
use crate::size::Size;

/// The volume, gone when dropped.
#[derive(Debug)]
pub(crate) struct Volume {
    mounted: PathBuf,
    _janitor: Janitor,
}

impl Volume {
    /// Makes one in a directory of its own in `parent`; needs root.
    pub(crate) fn new(parent: &Path, size: Size) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "a file system of the bench's own needs root"
        );
        let dir = TempDir::with_prefix_in("kvm-clone-bench-", parent)
            .with_context(|| format!("making a directory in {}", parent.display()))?
            .keep();
        let janitor = Janitor::hire(&dir)?;
        let (image, mounted) = (dir.join("volume.img"), dir.join(VOLUME));
        File::create(&image)?.set_len(size.0)?;
        fs::create_dir(&mounted)?;
        run(Command::new("mkfs.xfs").arg("-q").arg(&image))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&mounted))?;
        Ok(Self {
            mounted,
            _janitor: janitor,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.mounted
    }
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    let output = command.output();
    let output = output.with_context(|| format!("running {program}: install xfsprogs"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{program}: {}", errors.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvm_clone_tests::skip::{obstacle, skip};

    use super::*;

    #[test]
    fn it_takes_a_disk_of_16_tib_and_leaves_nothing_behind() {
        if let Some(reason) = obstacle() {
            return skip(&reason);
        }
        let parent = tempfile::tempdir_in("/var/tmp").unwrap();
        let volume = Volume::new(parent.path(), Size::MIB * 512).unwrap();
        let disk = File::create(volume.path().join("disk")).unwrap();
        disk.set_len(16 << 40).unwrap();
        drop((disk, volume));
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
