//! What a transfer is asked to do.

use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use kvm_clone_protocol::digest::HashKind;
use kvm_clone_protocol::message::{ApplyChoice, Compression, IoChoice};

use serde::Serialize;

use crate::endpoint::DiskSpec;
use crate::error::{Error, Result};

/// What is done with the two disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Make the destination hold what the source holds.
    Sync,
    /// Say how much that would ship.
    Diff,
    /// Say whether they are equal.
    Verify,
}

impl Operation {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sync => "disk-sync",
            Self::Diff => "disk-diff",
            Self::Verify => "disk-verify",
        }
    }
}

/// Which way of transferring the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MethodChoice {
    /// rsync from host to host.
    Rsync,
    /// scp from host to host.
    Libvirt,
    /// The pair of agents.
    Blocksync,
    /// Whichever serves best.
    Auto,
}

impl MethodChoice {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rsync => "rsync",
            Self::Libvirt => "libvirt",
            Self::Blocksync => "blocksync",
            Self::Auto => "auto",
        }
    }

    /// Whether a program of the hosts does it, and not our agents.
    fn is_program(self) -> bool {
        matches!(self, Self::Rsync | Self::Libvirt)
    }
}

/// Whether the source may be in use, and what the user is told of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LiveRead {
    /// It must not be.
    #[default]
    No,
    /// It is read as it is; the copy may be torn.
    Torn,
    /// Whoever uses it is suspended meanwhile.
    Paused,
}

impl LiveRead {
    /// Whether a holder of the source's locks is no reason to refuse.
    pub fn reads_in_use(self) -> bool {
        self != Self::No
    }
}

/// How frames travel between two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouteChoice {
    /// Direct where that works, else relay.
    #[default]
    Auto,
    /// From host to host.
    Direct,
    /// Through this machine.
    Relay,
}

/// How many data connections a disk has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Streams {
    /// As many as are worth it.
    #[default]
    Auto,
    /// So many, 1 to [`MAX_STREAMS`](kvm_clone_protocol::sync::MAX_STREAMS).
    Count(NonZeroU16),
}

/// How the destination's contents are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verification {
    /// The result makes no claim.
    None,
    /// Both ends must agree on the digest of what was shipped and what was left.
    #[default]
    Streamed,
    /// And the destination is read once more, past its host's page cache.
    Reread,
}

impl Verification {
    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Streamed => "streamed",
            Self::Reread => "reread",
        }
    }
}

/// One disk, from where to where, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Where from.
    pub source: DiskSpec,
    /// Where to.
    pub destination: DiskSpec,
    /// Only say what would be done.
    pub dry_run: bool,
    /// A qcow2 image on the destination's host that stands on the destination, and gets what that
    /// loses: the method blocksync alone does it, where changes wait beside a disk.
    pub preserve: Option<PathBuf>,
    /// How.
    pub options: Options,
}

/// How a disk is transferred.
#[derive(Debug, Clone)]
pub struct Options {
    /// By which method.
    pub method: MethodChoice,
    /// The user named it: it is no default.
    pub method_is_given: bool,
    /// Whether the source may be in use.
    pub live: LiveRead,
    /// How frames travel.
    pub route: RouteChoice,
    /// How many data connections carry them.
    pub streams: Streams,
    /// Whether blocks are compressed.
    pub compression: Compression,
    /// How blocks are digested.
    pub hash: HashKind,
    /// How changes get into a destination that exists.
    pub apply: ApplyChoice,
    /// Where the changes of a block device wait, on its host; `None` for the agent's own place.
    pub stage_dir: Option<PathBuf>,
    /// Both disks are read, whatever digests of them were kept.
    pub full_scan: bool,
    /// A reflink copy of each source stays on its host until the next run, if its file system keeps
    /// so many bytes free whatever is written.
    pub keep_sent: Option<u64>,
    /// How disks are read.
    pub io: IoChoice,
    /// What the result claims.
    pub verify: Verification,
    /// Bytes a second; `None` for no limit.
    pub bandwidth_limit: Option<u64>,
    /// On both hosts others come first.
    pub nice: bool,
    /// Bytes a second that each host reads at most; `None` for no limit.
    pub read_limit: Option<u64>,
    /// For the whole run.
    pub timeout: Option<Duration>,
}

impl Options {
    /// Refuses what spares a host's guests or leaves something there, and is beyond a method: nothing
    /// of that is left out in silence.
    ///
    /// # Errors
    /// Usage, which names the methods that can.
    pub fn check(&self, method: MethodChoice) -> Result<()> {
        let by_programs = method.is_program();
        let (what, can) = match method {
            _ if by_programs && self.read_limit.is_some() => {
                ("keep --read-limit", "--method blocksync can")
            }
            _ if by_programs && self.keep_sent.is_some() => (
                "leave a copy for the next run (--keep-sent)",
                "--method blocksync can",
            ),
            // sftp at the other end is sshd's.
            MethodChoice::Libvirt if self.nice => (
                "be --nice on both hosts",
                "--method blocksync and --method rsync can",
            ),
            _ => return Ok(()),
        };
        let message = format!("the method {} cannot {what}", method.name());
        Err(Error::usage(message).hint(can))
    }

    /// What was asked for that means nothing to a method, for people; `None` when there is no such
    /// thing.
    pub fn without_meaning(&self, method: MethodChoice) -> Option<String> {
        let asked = [
            ("--streams", self.streams != Streams::Auto),
            (
                "--apply",
                matches!(self.apply, ApplyChoice::Staged | ApplyChoice::Reflink),
            ),
            ("--stage-dir", self.stage_dir.is_some()),
            ("--verify reread", self.verify == Verification::Reread),
            ("--hash", self.hash != HashKind::Xxh3),
            (
                "--compress",
                !matches!(self.compression, Compression::Auto | Compression::Off),
            ),
            ("--io", self.io != IoChoice::Auto),
        ];
        let asked = asked.iter().filter(|(_, is_asked)| *is_asked);
        let names: Vec<&str> = asked.map(|(name, _)| *name).collect();
        (method.is_program() && !names.is_empty()).then(|| {
            let (names, method) = (names.join(", "), method.name());
            format!("the method {method} does without {names}: --method blocksync does not")
        })
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            method: MethodChoice::Blocksync,
            method_is_given: false,
            live: LiveRead::No,
            route: RouteChoice::Auto,
            streams: Streams::Auto,
            compression: Compression::Auto,
            hash: HashKind::Xxh3,
            apply: ApplyChoice::Auto,
            stage_dir: None,
            full_scan: false,
            keep_sent: None,
            io: IoChoice::Auto,
            verify: Verification::Streamed,
            bandwidth_limit: None,
            nice: false,
            read_limit: None,
            timeout: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_that_cannot_spare_the_guests_or_keep_a_copy_is_refused() {
        use MethodChoice::{Auto, Blocksync, Libvirt, Rsync};
        let check = |nice, read_limit, method| {
            let options = Options {
                nice,
                read_limit,
                ..Options::default()
            };
            options.check(method).map_err(|error| error.exit_code())
        };
        for method in [Auto, Blocksync] {
            assert_eq!(check(true, Some(1), method), Ok(()));
        }
        assert_eq!(check(true, None, Rsync), Ok(()));
        assert_eq!(check(true, None, Libvirt), Err(2));
        for method in [Rsync, Libvirt] {
            assert_eq!(check(false, Some(1), method), Err(2));
            assert_eq!(check(false, None, method), Ok(()));
        }
        let keeping = Options {
            keep_sent: Some(0),
            ..Options::default()
        };
        let methods = [Auto, Blocksync, Rsync, Libvirt];
        let refused = methods.map(|method| keeping.check(method).is_err());
        assert_eq!(refused, [false, false, true, true]);
    }

    #[test]
    fn what_means_nothing_to_a_method_is_named() {
        use MethodChoice::{Auto, Blocksync, Libvirt, Rsync};
        let plain = Options {
            compression: Compression::Off,
            apply: ApplyChoice::Inplace,
            full_scan: true,
            ..Options::default()
        };
        let wanting = Options {
            apply: ApplyChoice::Staged,
            hash: HashKind::Blake3,
            ..Options::default()
        };
        for method in [Auto, Blocksync, Rsync, Libvirt] {
            assert_eq!(plain.without_meaning(method), None);
            let is_named = wanting
                .without_meaning(method)
                .is_some_and(|warning| warning.contains("--apply, --hash"));
            assert_eq!(is_named, matches!(method, Rsync | Libvirt));
        }
    }
}
