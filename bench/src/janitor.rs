//! Cleans up when the bench ends, however it ends: gigabytes of images and an sshd must not stay
//! behind an impatient Ctrl-C.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

/// Where in its directory a file system may be mounted.
pub(crate) const VOLUME: &str = "volume";

/// Waits for the end of its standard input, which comes with the end of the bench at the latest.
/// Somebody may still write to the volume then: it goes from sight at once, and for good with the
/// last of them.
const SCRIPT: &str = r#"
trap "" INT TERM HUP
read -r _
[ -f "$1/sshd.pid" ] && kill "$(cat "$1/sshd.pid")"
mountpoint -q "$1/$2" && umount --lazy "$1/$2"
rm -rf --one-file-system -- "$1"
"#;

/// A shell that outlives the bench by a moment; it ends its work before `drop` returns.
#[derive(Debug)]
pub(crate) struct Janitor(Child);

impl Janitor {
    /// Removes `dir` in the end, and ends the sshd whose process number stands there, and the file
    /// system that is mounted there.
    pub(crate) fn hire(dir: &Path) -> Result<Self> {
        let child = Command::new("sh")
            .args(["-c", SCRIPT, "janitor"])
            .arg(dir)
            .arg(VOLUME)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting sh")?;
        Ok(Self(child))
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // There is nobody to tell.
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_goes_with_the_janitor() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("with a space");
        std::fs::create_dir_all(dir.join("images")).unwrap();
        let janitor = Janitor::hire(&dir).unwrap();
        assert!(dir.exists());
        drop(janitor);
        assert!(!dir.exists());
        assert!(parent.path().exists());
    }
}
