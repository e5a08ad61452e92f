//! Files of a hypervisor, looked at and made with its own programs: what a VM consists of besides
//! the contents of its disks, which are a transfer's business.

use super::Host;
use crate::error::{Error, ErrorCode, Result};

/// What something under a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A block device.
    Device,
    /// A directory.
    Directory,
    /// Anything else.
    Other,
}

/// What `stat` says of a file, symbolic links followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileFacts {
    /// What it is.
    pub kind: FileKind,
    /// Its length in bytes; of a device, its capacity.
    pub size_bytes: u64,
    /// The bytes that it occupies.
    pub allocated_bytes: u64,
    /// When it was last written, in seconds since 1970 with nanoseconds as a fraction. Text,
    /// because it is only ever compared and shown.
    pub modified: String,
    /// Its number on its file system.
    pub inode: u64,
    /// The number of its file system, as the kernel has it.
    pub device: u64,
}

/// The file system under a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// Bytes that may still be written.
    pub free_bytes: u64,
    /// Names the file system on this host.
    pub id: String,
    /// Its type, as `stat -f` names it: `ext2/ext3`, `xfs`, `nfs`, …
    pub kind: String,
}

impl Space {
    /// Whether other hosts may well see the same files.
    pub fn is_shared(&self) -> bool {
        // FUSE is not among them: it may be as local as any.
        const NETWORK: [&str; 9] = [
            "nfs", "nfs4", "ceph", "gfs/gfs2", "gfs2", "ocfs2", "lustre", "smb", "smb2",
        ];
        NETWORK.contains(&self.kind.as_str())
    }
}

/// Ends the name of a file that is being written by [`Host::write_file`].
pub const UNFINISHED: &str = ".new";

impl Host {
    /// What is under `path`; `None` when nothing is.
    ///
    /// # Errors
    /// When the host cannot be reached, or may not look.
    pub async fn file_facts(&self, path: &str) -> Result<Option<FileFacts>> {
        let words = ["stat", "-L", "-c", "%s %b %B %.9Y %i %d %F", "--", path];
        let output = self.tool(&words, b"").await?;
        if !output.status.success() {
            return if is_missing(&output.stderr) {
                Ok(None)
            } else {
                Err(self.cannot("look at", path, &output.stderr))
            };
        }
        let said = String::from_utf8_lossy(&output.stdout);
        let mut facts = parse_facts(said.trim())
            .ok_or_else(|| self.cannot("understand what stat says of", path, &said))?;
        if facts.kind == FileKind::Device {
            let size = self
                .tool_output(&["blockdev", "--getsize64", path], b"")
                .await?;
            facts.size_bytes = size.trim().parse().unwrap_or_default();
            facts.allocated_bytes = facts.size_bytes;
        }
        Ok(Some(facts))
    }

    /// Where a path leads to, which exists: without symbolic links.
    ///
    /// # Errors
    /// When the host cannot be reached, or may not look.
    pub async fn real_path(&self, path: &str) -> Result<String> {
        let said = self
            .tool_output(&["readlink", "-f", "--", path], b"")
            .await?;
        Ok(said.trim_end_matches('\n').to_owned())
    }

    /// The file system of an existing directory.
    ///
    /// # Errors
    /// When the host cannot be reached, or may not look.
    pub async fn space(&self, directory: &str) -> Result<Space> {
        let words = ["stat", "-f", "-c", "%a %S %i %T", "--", directory];
        let said = self.tool_output(&words, b"").await?;
        parse_space(said.trim())
            .ok_or_else(|| self.cannot("understand what stat -f says of", directory, &said))
    }

    /// The names in a directory, those that start with a dot included; `None` when it is not there.
    ///
    /// # Errors
    /// When the host cannot be reached, or may not look.
    pub async fn names_in(&self, directory: &str) -> Result<Option<Vec<String>>> {
        let output = self.tool(&["ls", "-A1", "--", directory], b"").await?;
        if output.status.success() {
            let names = String::from_utf8_lossy(&output.stdout);
            return Ok(Some(names.lines().map(str::to_owned).collect()));
        }
        if is_missing(&output.stderr) {
            return Ok(None);
        }
        Err(self.cannot("list", directory, &output.stderr))
    }

    /// The contents of a small file; `None` when it is not there.
    ///
    /// # Errors
    /// When the host cannot be reached, or may not read it.
    pub async fn read_file(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let output = self.tool(&["cat", "--", path], b"").await?;
        if output.status.success() {
            return Ok(Some(output.stdout));
        }
        if is_missing(&output.stderr) {
            return Ok(None);
        }
        Err(self.cannot("read", path, &output.stderr))
    }

    /// Makes `path` hold `contents`, all of it or nothing, synced, for its owner's eyes only.
    ///
    /// # Errors
    /// When the host cannot be reached, or the file cannot be written.
    pub async fn write_file(&self, path: &str, contents: &[u8]) -> Result<()> {
        let temporary = format!("{path}{UNFINISHED}");
        let target = format!("of={temporary}");
        self.make_file(&temporary).await?;
        self.tool_output(
            &["dd", &target, "bs=1M", "conv=fsync", "status=none"],
            contents,
        )
        .await?;
        self.tool_output(&["mv", "-f", "--", &temporary, path], b"")
            .await?;
        let directory = path
            .rsplit_once('/')
            .map_or("/", |(directory, _)| directory);
        self.tool_output(&["sync", "--", directory], b"").await?;
        Ok(())
    }

    /// Makes an empty file, for its owner's eyes only, in place of what was there.
    ///
    /// # Errors
    /// When the host cannot be reached, or the file cannot be made.
    pub async fn make_file(&self, path: &str) -> Result<()> {
        let words = ["install", "-m", "0600", "/dev/null", path];
        self.tool_output(&words, b"").await.map(drop)
    }

    /// Makes a directory with those above it, for its owner's eyes only, unless it is there.
    ///
    /// # Errors
    /// When the host cannot be reached, or the directory cannot be made.
    pub async fn make_directory(&self, path: &str, mode: &str) -> Result<()> {
        self.tool_output(&["mkdir", "-p", "-m", mode, "--", path], b"")
            .await
            .map(drop)
    }

    /// Removes files and whole directories, which need not exist.
    ///
    /// # Errors
    /// When the host cannot be reached, or something cannot be removed.
    pub async fn remove(&self, paths: &[String]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        let mut words = vec!["rm", "-rf", "--"];
        words.extend(paths.iter().map(String::as_str));
        self.tool_output(&words, b"").await.map(drop)
    }

    fn cannot(&self, what: &str, path: &str, said: &str) -> Error {
        Error::new(ErrorCode::Io, format!("cannot {what} {path} on {self}"))
            .caused_by(said.trim().to_owned())
    }
}

fn is_missing(stderr: &str) -> bool {
    stderr.contains("No such file or directory") || stderr.contains("Not a directory")
}

fn parse_facts(said: &str) -> Option<FileFacts> {
    let mut words = said.splitn(7, ' ');
    let size_bytes = words.next()?.parse().ok()?;
    let blocks: u64 = words.next()?.parse().ok()?;
    let block_bytes: u64 = words.next()?.parse().ok()?;
    Some(FileFacts {
        size_bytes,
        allocated_bytes: blocks.checked_mul(block_bytes)?,
        modified: words.next()?.to_owned(),
        inode: words.next()?.parse().ok()?,
        device: words.next()?.parse().ok()?,
        kind: match words.next()? {
            "regular file" | "regular empty file" => FileKind::File,
            "block special file" => FileKind::Device,
            "directory" => FileKind::Directory,
            _ => FileKind::Other,
        },
    })
}

fn parse_space(said: &str) -> Option<Space> {
    let mut words = said.splitn(4, ' ');
    let free_blocks: u64 = words.next()?.parse().ok()?;
    let block_bytes: u64 = words.next()?.parse().ok()?;
    Some(Space {
        free_bytes: free_blocks.checked_mul(block_bytes)?,
        id: words.next()?.to_owned(),
        kind: words.next()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn here() -> Host {
        Host::new("local".parse().unwrap(), Arc::default())
    }

    fn path_in(directory: &tempfile::TempDir, name: &str) -> String {
        directory.path().join(name).to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_file_is_written_seen_read_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let odd = path_in(&directory, "-a 'b\" $(c)");
        let host = here();
        assert_eq!(host.file_facts(&odd).await.unwrap(), None);
        assert_eq!(host.read_file(&odd).await.unwrap(), None);
        host.write_file(&odd, b"one\ntwo").await.unwrap();
        host.write_file(&odd, b"three").await.unwrap();
        let facts = host.file_facts(&odd).await.unwrap().unwrap();
        assert_eq!((facts.kind, facts.size_bytes), (FileKind::File, 5));
        assert_eq!(host.read_file(&odd).await.unwrap().unwrap(), b"three");
        let names = host
            .names_in(directory.path().to_str().unwrap())
            .await
            .unwrap();
        assert_eq!(names.unwrap(), ["-a 'b\" $(c)"]);
        let link = path_in(&directory, "link");
        std::os::unix::fs::symlink(&odd, &link).unwrap();
        let real = std::fs::canonicalize(&odd).unwrap();
        let leads_to = host.real_path(&link).await.unwrap();
        assert_eq!(Some(leads_to.as_str()), real.to_str());
        host.remove(std::slice::from_ref(&odd)).await.unwrap();
        assert_eq!(host.file_facts(&odd).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_directory_has_a_file_system() {
        let directory = tempfile::tempdir().unwrap();
        let path = path_in(&directory, "a/b");
        let host = here();
        assert_eq!(host.names_in(&path).await.unwrap(), None);
        host.make_directory(&path, "0700").await.unwrap();
        let facts = host.file_facts(&path).await.unwrap().unwrap();
        assert_eq!(facts.kind, FileKind::Directory);
        let space = host.space(&path).await.unwrap();
        assert!(space.free_bytes > 0 && !space.kind.is_empty() && !space.is_shared());
        assert!(host.space(&path_in(&directory, "c")).await.is_err());
    }
}
