//! What the methods that run another program have in common: finding out, before it starts, what
//! is under both paths and whether it may be read and written, and putting the copy in its place.
//!
//! A destination that does not exist is written under the same temporary name that the agents use,
//! so that it never stands half done under its own, and one method can take up what another left.

use kvm_clone_protocol::PARTIAL_SUFFIX;

use super::request::{Operation, Request};
use super::result::{Route, TransferResult};
use super::{Context, LiveRead};
use crate::endpoint::DiskSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{FileFacts, FileKind, Host};
use crate::output;

/// QEMU's image locks (block/file-posix.c): bytes that a writer, or one who may resize, holds.
const WRITERS: [u64; 2] = [101, 103];
/// Bytes that anyone who has the image open holds, and 201, with which a sync of ours keeps others
/// away.
const ANYONE: [u64; 4] = [100, 101, 103, 201];

/// Both ends, found fit for a copy.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) from: Host,
    pub(super) to: Host,
    /// The source behind all symbolic links.
    pub(super) source: String,
    pub(super) source_facts: FileFacts,
    /// The destination behind all symbolic links.
    pub(super) destination: String,
    /// What is there already.
    pub(super) existing: Option<FileFacts>,
    /// What is written: the destination, or its temporary name.
    pub(super) written: String,
}

/// What a method does with holes while it copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holes {
    /// It leaves them out.
    Kept,
    /// It writes them as zeros, which take room.
    Filled,
}

/// Looks at both ends, and refuses what cannot end well before anything is changed.
///
/// # Errors
/// Not found, refused, busy, no space or missing requirement, each naming the disk.
pub(super) async fn survey(
    context: &Context,
    request: &Request,
    method: &str,
    holes: Holes,
    result: &mut TransferResult,
) -> Result<Ground> {
    if request.operation != Operation::Sync || request.dry_run {
        return Err(cannot(method, "compare without writing").hint(BLOCKSYNC_CAN));
    }
    if context.ssh.sudo {
        return Err(cannot(method, "run through sudo").hint(BLOCKSYNC_CAN));
    }
    let from = context.host(&request.source.host);
    let to = context.host(&request.destination.host);
    tokio::try_join!(from.share(), to.share())?;
    let source = resolve(&from, &request.source, method).await?;
    let destination = resolve(&to, &request.destination, method).await?;
    let (source_facts, existing) =
        tokio::try_join!(from.file_facts(&source), to.file_facts(&destination))?;
    let source_facts = source_facts.ok_or_else(|| missing(&request.source))?;
    check_kind(&request.source, &source_facts)?;
    if let Some(facts) = &existing {
        check_kind(&request.destination, facts)?;
        if facts.kind == FileKind::Device {
            return Err(cannot(method, "write to a block device")
                .caused_by(format!("{} is one", request.destination))
                .hint(BLOCKSYNC_CAN));
        }
    }
    let ground = Ground {
        written: existing
            .as_ref()
            .map_or_else(|| partial(&destination), |_| destination.clone()),
        from,
        to,
        source,
        source_facts,
        destination,
        existing,
    };
    ground.check_distinct(request).await?;
    ground.check_left_over().await?;
    ground.check_whole().await?;
    ground.check_locks(request).await?;
    ground.check_room(request, holes).await?;
    ground.tell(request, method, result).await?;
    Ok(ground)
}

/// What a refusal of another method says.
pub(super) const BLOCKSYNC_CAN: &str = "--method blocksync can";

/// The refusal of something that a method is not able to do.
pub(super) fn cannot(method: &str, what: &str) -> Error {
    let message = format!("the method {method} cannot {what}");
    Error::new(ErrorCode::MissingRequirement, message)
}

/// The path behind all symbolic links; of what does not exist, behind those of its directory.
async fn resolve(host: &Host, disk: &DiskSpec, method: &str) -> Result<String> {
    let path = disk.path().ok_or_else(|| {
        cannot(method, "reach what an NBD server exports")
            .caused_by(disk.to_string())
            .hint(BLOCKSYNC_CAN)
    })?;
    let path = path.to_str().ok_or_else(|| {
        cannot(method, "take a path that is not UTF-8")
            .caused_by(disk.to_string())
            .hint(BLOCKSYNC_CAN)
    })?;
    let output = host.tool(&["readlink", "-f", "--", path], b"").await?;
    let resolved = String::from_utf8_lossy(&output.stdout);
    let resolved = resolved.strip_suffix('\n').unwrap_or(&resolved);
    if output.status.success() && !resolved.is_empty() {
        return Ok(resolved.to_owned());
    }
    let message = format!("{disk} does not exist, and neither does its directory");
    Err(Error::new(ErrorCode::NotFound, message))
}

fn missing(disk: &DiskSpec) -> Error {
    Error::new(ErrorCode::NotFound, format!("{disk} does not exist"))
}

fn check_kind(disk: &DiskSpec, facts: &FileFacts) -> Result<()> {
    let what = match facts.kind {
        FileKind::File | FileKind::Device => return Ok(()),
        FileKind::Directory => "a directory",
        FileKind::Other => "neither a regular file nor a block device",
    };
    Err(Error::new(ErrorCode::Refused, format!("{disk} is {what}")))
}

/// The name that the destination has until it is complete.
fn partial(destination: &str) -> String {
    let (directory, name) = destination.rsplit_once('/').unwrap_or(("", destination));
    format!("{directory}/.{name}{PARTIAL_SUFFIX}")
}

impl Ground {
    /// One kernel, one file system, one inode: one and the same storage.
    async fn check_distinct(&self, request: &Request) -> Result<()> {
        let Some(existing) = &self.existing else {
            return Ok(());
        };
        let identity = |facts: &FileFacts| (facts.device, facts.inode);
        if identity(existing) != identity(&self.source_facts) {
            return Ok(());
        }
        let boot = "/proc/sys/kernel/random/boot_id";
        let (here, there) = tokio::try_join!(self.from.read_file(boot), self.to.read_file(boot))?;
        if here.is_some() && here == there {
            let (source, destination) = (&request.source, &request.destination);
            let message = format!("{source} and {destination} are one and the same disk");
            return Err(Error::new(ErrorCode::Refused, message));
        }
        Ok(())
    }

    /// Nobody writes to the source, and nobody has the destination open, by QEMU's locks.
    async fn check_locks(&self, request: &Request) -> Result<()> {
        if request.options.live == LiveRead::No {
            let locks = locks(&self.from).await?;
            check_free(&request.source, &locks, &self.source_facts, &WRITERS)?;
        }
        // A new destination's temporary file may be another run's at this moment.
        if let Some(written) = self.to.file_facts(&self.written).await? {
            let locks = locks(&self.to).await?;
            check_free(&request.destination, &locks, &written, &ANYONE)?;
        }
        Ok(())
    }

    /// What lies under the temporary name is what an interrupted run has left, and nothing that
    /// leads elsewhere or is known under another name as well.
    async fn check_left_over(&self) -> Result<()> {
        if self.existing.is_some() {
            return Ok(());
        }
        let words = ["stat", "-c", "%h %F", "--", &self.written];
        let output = self.to.tool(&words, b"").await?;
        let said = String::from_utf8_lossy(&output.stdout);
        let is_plain = matches!(said.trim(), "1 regular file" | "1 regular empty file");
        if !output.status.success() || is_plain {
            return Ok(());
        }
        let message = format!(
            "{} on {} is not what an interrupted run leaves",
            self.written, self.to
        );
        Err(Error::new(ErrorCode::Refused, message).hint("look at it, and remove it"))
    }

    /// Neither is half changed by a run of the agents that broke off.
    async fn check_whole(&self) -> Result<()> {
        for (host, path) in [(&self.from, &self.source), (&self.to, &self.destination)] {
            let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
            let applying = format!("{directory}/.{name}.kc-applying");
            if host.file_facts(&applying).await?.is_some() {
                let message = format!("{path} on {host} is half changed by a run that broke off");
                let hint = format!("\"kvm-clone-ctl recover {host}\" ends that");
                return Err(Error::new(ErrorCode::Refused, message).hint(hint));
            }
        }
        Ok(())
    }

    async fn check_room(&self, request: &Request, holes: Holes) -> Result<()> {
        if self.existing.is_some() {
            return Ok(());
        }
        let directory = self.directory();
        let has = self.to.file_facts(&self.written).await?;
        let whole = match holes {
            Holes::Kept => self.data_bytes(),
            Holes::Filled => self.source_facts.size_bytes,
        };
        let needed = whole.saturating_sub(has.map_or(0, |facts| facts.allocated_bytes));
        let free = self.to.space(directory).await?.free_bytes;
        if needed > free {
            let (needed, free) = (output::iec(needed), output::iec(free));
            let message = format!(
                "{} needs {needed}, and {directory} has {free} free",
                request.destination
            );
            return Err(
                Error::new(ErrorCode::NoSpace, message).hint("make room, or choose another place")
            );
        }
        Ok(())
    }

    /// What the user must know before it begins, and what is known of the figures.
    async fn tell(
        &self,
        request: &Request,
        method: &str,
        result: &mut TransferResult,
    ) -> Result<()> {
        result.bytes_total = Some(self.source_facts.size_bytes);
        result.bytes_data = Some(self.data_bytes());
        if request.options.live == LiveRead::Torn {
            result.warnings.push(torn(&request.source));
        }
        if self.existing.is_some() {
            result.warnings.push(format!(
                "{method} overwrites {} in place: an interruption leaves it torn (--method blocksync mends that)",
                request.destination
            ));
        } else {
            result.resumed = self.to.file_facts(&self.written).await?.is_some();
        }
        Ok(())
    }

    /// The bytes of the source that are not holes.
    pub(super) fn data_bytes(&self) -> u64 {
        self.source_facts
            .allocated_bytes
            .min(self.source_facts.size_bytes)
    }

    fn directory(&self) -> &str {
        match self.destination.rsplit_once('/') {
            Some((directory, _)) if !directory.is_empty() => directory,
            _ => "/",
        }
    }

    /// Whether both ends are on one host, so that no ssh is needed between them.
    pub(super) fn is_one_host(&self) -> bool {
        self.from.spec() == self.to.spec()
    }

    /// The route that another program takes.
    pub(super) fn route(&self) -> Route {
        if self.is_one_host() {
            Route::Local
        } else {
            Route::Direct
        }
    }

    /// The error of a program whose ssh did not get to the other host, if it says so.
    pub(super) fn no_login(&self, stderr: &str) -> Option<Error> {
        const SAID: [&str; 8] = [
            "Permission denied (",
            "Host key verification failed",
            "host key is known",
            "Could not resolve",
            "Connection refused",
            "Connection timed out",
            "No route to host",
            "Network is unreachable",
        ];
        if !SAID.iter().any(|part| stderr.contains(part)) {
            return None;
        }
        let (from, to) = if self.to.is_local() {
            (&self.to, &self.from)
        } else {
            (&self.from, &self.to)
        };
        let message = format!("{from} does not reach {to} by ssh");
        Some(Error::new(to.explain(stderr).code(), message).caused_by(stderr.to_owned()))
    }

    /// Finds out whether the source is what it was before it was read.
    ///
    /// # Errors
    /// Io, when it has changed, unless the user wants it read in use.
    pub(super) async fn check_unchanged(&self, request: &Request) -> Result<()> {
        if request.options.live.reads_in_use() {
            return Ok(());
        }
        let facts = self.from.file_facts(&self.source).await?;
        let state = |facts: &FileFacts| (facts.size_bytes, facts.inode, facts.modified.clone());
        if facts.as_ref().map(state) == Some(state(&self.source_facts)) {
            return Ok(());
        }
        let message = format!("{} changed while it was read", request.source);
        Err(Error::new(ErrorCode::Io, message)
            .hint("stop whatever writes to it, and run the same command again"))
    }

    /// Makes what was written durable, and gives it its name unless something has that by now.
    ///
    /// # Errors
    /// Refused, when something has appeared under the name; io.
    pub(super) async fn place(&self) -> Result<()> {
        self.to
            .tool_output(&["sync", "--", &self.written], b"")
            .await?;
        if self.existing.is_some() {
            return Ok(());
        }
        // It does not replace, and says nothing of that.
        let words = ["mv", "-nT", "--", &self.written, &self.destination];
        let moved = self.to.tool(&words, b"").await?;
        if !moved.status.success() || self.to.file_facts(&self.written).await?.is_some() {
            let message = format!("{} on {} cannot get its name", self.destination, self.to);
            return Err(Error::new(ErrorCode::Refused, message)
                .caused_by(moved.stderr.trim().to_owned())
                .hint(format!("the copy is complete in {}", self.written)));
        }
        self.to
            .tool_output(&["sync", "--", self.directory()], b"")
            .await?;
        Ok(())
    }
}

/// The warning about a source that is read while it is written.
pub(super) fn torn(source: &DiskSpec) -> String {
    format!(
        "{source} is in use and was read as it is: the copy may be torn, a mixture of old and new"
    )
}

/// The locks that a kernel keeps, as it lists them.
async fn locks(host: &Host) -> Result<String> {
    let listed = host.read_file("/proc/locks").await?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&listed).into_owned())
}

fn check_free(disk: &DiskSpec, listed: &str, facts: &FileFacts, bytes: &[u64]) -> Result<()> {
    if listed
        .lines()
        .any(|line| holds(line, facts, bytes).unwrap_or(false))
    {
        let message = format!("{disk} is in use: a running VM or another sync holds its lock");
        return Err(Error::new(ErrorCode::Busy, message));
    }
    Ok(())
}

/// Whether a line such as `1: OFDLCK ADVISORY READ -1 fd:00:1234 100 101` is a lock of one of the
/// bytes on this file. btrfs lists another device than stat gives, so the inode decides there.
fn holds(line: &str, facts: &FileFacts, bytes: &[u64]) -> Option<bool> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words
        .iter()
        .position(|word| word.matches(':').count() == 2)?;
    let mut numbers = words[at].split(':');
    let major = u64::from_str_radix(numbers.next()?, 16).ok()?;
    let minor = u64::from_str_radix(numbers.next()?, 16).ok()?;
    let inode: u64 = numbers.next()?.parse().ok()?;
    let first: u64 = words.get(at + 1)?.parse().ok()?;
    let last: u64 = words.get(at + 2)?.parse().unwrap_or(u64::MAX);
    let (our_major, our_minor) = split_device(facts.device);
    let is_device = (major, minor) == (our_major, our_minor) || our_major == 0;
    let is_open_file = words.contains(&"OFDLCK");
    Some(
        is_open_file
            && is_device
            && inode == facts.inode
            && bytes.iter().any(|byte| (first..=last).contains(byte)),
    )
}

/// Major and minor number, as glibc's makedev puts them together.
fn split_device(device: u64) -> (u64, u64) {
    let major = (device >> 8) & 0xfff | (device >> 32) & !0xfff;
    let minor = device & 0xff | (device >> 12) & !0xff;
    (major, minor & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_one_of_the_file_and_of_a_byte() {
        let facts = FileFacts {
            kind: FileKind::File,
            size_bytes: 0,
            allocated_bytes: 0,
            modified: String::new(),
            inode: 1234,
            device: 0xfd00,
        };
        let held = |line: &str, bytes: &[u64]| holds(line, &facts, bytes).unwrap_or(false);
        let line = "1: OFDLCK ADVISORY  READ -1 fd:00:1234 100 101";
        assert!(held(line, &ANYONE) && held(line, &WRITERS));
        assert!(!held(
            "1: OFDLCK ADVISORY READ -1 fd:00:1234 100 100",
            &WRITERS
        ));
        assert!(!held(
            "1: OFDLCK ADVISORY READ -1 fd:01:1234 101 101",
            &WRITERS
        ));
        assert!(!held(
            "1: OFDLCK ADVISORY READ -1 fd:00:1235 101 101",
            &WRITERS
        ));
        assert!(!held("1: POSIX ADVISORY READ 7 fd:00:1234 0 EOF", &ANYONE));
        assert!(held(
            "1: -> OFDLCK ADVISORY WRITE -1 fd:00:1234 0 EOF",
            &ANYONE
        ));
        assert!(!held("nonsense", &ANYONE));
    }

    #[test]
    fn numbers_of_devices_are_taken_apart() {
        assert_eq!(split_device(0xfd03), (253, 3));
        assert_eq!(split_device(0x0010_0801), (8, 0x101));
    }

    #[test]
    fn the_temporary_name_lies_beside_the_disk() {
        assert_eq!(partial("/a/b.raw"), "/a/.b.raw.kc-new");
        assert_eq!(partial("/b"), "/.b.kc-new");
    }
}
