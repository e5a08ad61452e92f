//! The options that several commands share, and what they mean once the configuration file and
//! the defaults are taken into account. The same parsers read the command line and the file.

use std::ffi::{OsStr, OsString};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{ArgAction, Args, ValueEnum};
use kvm_clone_protocol::digest::HashKind;
use kvm_clone_protocol::message::{ApplyChoice, Compression, IoChoice};
use kvm_clone_protocol::sync::MAX_STREAMS;

use crate::config::Config;
use crate::endpoint::DiskSpec;
use crate::error::{Error, Result};
use crate::transfer::{
    MethodChoice, Operation, Options, Request, RouteChoice, Streams, Verification,
};

/// The options that every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Globals {
    /// Configuration file for ssh
    #[arg(short = 'F', long, global = true, value_name = "FILE")]
    pub ssh_config: Option<PathBuf>,
    /// Private key for ssh
    #[arg(short = 'i', long, global = true, value_name = "FILE")]
    pub ssh_key: Option<PathBuf>,
    /// Option for ssh, as after its -o; may be repeated
    #[arg(long = "ssh-option", global = true, value_name = "KEY=VALUE")]
    pub ssh_options: Vec<String>,
    /// Run the agent through "sudo -n"; only one that root owns (see "agent install")
    #[arg(long, global = true)]
    pub sudo: bool,
    /// Use this agent on the hosts, and deploy nothing
    #[arg(long, global = true, value_name = "PATH")]
    pub agent_path: Option<PathBuf>,
    /// Deploy this agent to hosts of its machine, and not the one that this program carries
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        conflicts_with = "agent_path"
    )]
    pub agent: Option<PathBuf>,
    /// Where libvirt listens on the hosts [default: qemu:///system]
    #[arg(long, global = true, value_name = "URI")]
    pub connect: Option<String>,
    /// Let the hosts use this machine's ssh agent
    #[arg(long, global = true)]
    pub forward_agent: bool,
    /// Form of the results on standard output
    #[arg(
        short,
        long,
        global = true,
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub output: OutputFormat,
    /// Print errors and results only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more on standard error; up to three times
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Form of the log on standard error
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Show no progress
    #[arg(long, global = true)]
    pub no_progress: bool,
    /// Configuration file [default: ~/.config/kvm-clone-ctl/config.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people
    Text,
    /// One JSON object
    Json,
    /// The same as YAML
    Yaml,
}

/// How log lines are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// A wrong value of an option or of a key of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadValue(String);

impl BadValue {
    /// What was expected instead.
    pub fn new(expected: impl Into<String>) -> Self {
        Self(expected.into())
    }
}

impl FromStr for MethodChoice {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "rsync" => Ok(Self::Rsync),
            "libvirt" => Ok(Self::Libvirt),
            "blocksync" => Ok(Self::Blocksync),
            "auto" => Ok(Self::Auto),
            _ => Err(BadValue::new("expected rsync, libvirt, blocksync or auto")),
        }
    }
}

impl FromStr for RouteChoice {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "auto" => Ok(Self::Auto),
            "direct" => Ok(Self::Direct),
            "relay" => Ok(Self::Relay),
            _ => Err(BadValue("expected auto, direct or relay".to_owned())),
        }
    }
}

/// [`ApplyChoice`] as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApplyArg(pub ApplyChoice);

impl FromStr for ApplyArg {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "auto" => Ok(Self(ApplyChoice::Auto)),
            "inplace" => Ok(Self(ApplyChoice::Inplace)),
            "staged" => Ok(Self(ApplyChoice::Staged)),
            "reflink" => Ok(Self(ApplyChoice::Reflink)),
            _ => Err(BadValue(
                "expected auto, inplace, staged or reflink".to_owned(),
            )),
        }
    }
}

/// [`IoChoice`] as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoArg(pub IoChoice);

impl FromStr for IoArg {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "auto" => Ok(Self(IoChoice::Auto)),
            "buffered" => Ok(Self(IoChoice::Buffered)),
            "direct" => Ok(Self(IoChoice::Direct)),
            _ => Err(BadValue("expected auto, buffered or direct".to_owned())),
        }
    }
}

impl FromStr for Verification {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "streamed" => Ok(Self::Streamed),
            "none" => Ok(Self::None),
            "reread" => Ok(Self::Reread),
            _ => Err(BadValue("expected none, streamed or reread".to_owned())),
        }
    }
}

/// [`Compression`] as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressChoice(pub Compression);

impl FromStr for CompressChoice {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Self(Compression::Auto)),
            ("off", _) => Ok(Self(Compression::Off)),
            (_, Ok(level @ 1..=19)) => Ok(Self(Compression::Level(level))),
            _ => Err(BadValue(
                "expected auto, off or a level from 1 to 19".to_owned(),
            )),
        }
    }
}

impl FromStr for Streams {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let count = text.parse::<NonZeroU16>();
        match (text, count) {
            ("auto", _) => Ok(Self::Auto),
            (_, Ok(count)) if count.get() <= MAX_STREAMS => Ok(Self::Count(count)),
            _ => Err(BadValue(format!(
                "expected auto or a number from 1 to {MAX_STREAMS}"
            ))),
        }
    }
}

/// [`HashKind`] as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashChoice(pub HashKind);

impl FromStr for HashChoice {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "xxh3" => Ok(Self(HashKind::Xxh3)),
            "blake3" => Ok(Self(HashKind::Blake3)),
            _ => Err(BadValue("expected xxh3 or blake3".to_owned())),
        }
    }
}

/// Bytes a second; at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub u64);

impl FromStr for Rate {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text.parse::<ByteSize>() {
            Ok(rate) if rate.as_u64() > 0 => Ok(Self(rate.as_u64())),
            Ok(_) => Err(BadValue("a limit of nothing would never end".to_owned())),
            Err(_) => Err(BadValue(
                "expected bytes a second, such as 100M, 1G or 64KiB".to_owned(),
            )),
        }
    }
}

/// Bytes; none, perhaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space(pub u64);

impl FromStr for Space {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text.parse::<ByteSize>() {
            Ok(space) => Ok(Self(space.as_u64())),
            Err(_) => Err(BadValue("expected bytes, such as 10G or 512MiB".to_owned())),
        }
    }
}

/// A time limit; not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeLimit(pub Duration);

impl FromStr for TimeLimit {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match humantime::parse_duration(text) {
            Ok(limit) if !limit.is_zero() => Ok(Self(limit)),
            Ok(_) => Err(BadValue(
                "a time limit of nothing is over at once".to_owned(),
            )),
            Err(_) => Err(BadValue(
                "expected a duration, such as 90s, 15m or 1h30m".to_owned(),
            )),
        }
    }
}

/// The options of a command that ships blocks.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Transfer options")]
pub struct TransferArgs {
    /// How to transfer: rsync, libvirt (scp from host to host), blocksync (only what differs), or
    /// auto
    #[arg(long, alias = "transfer-method", value_name = "METHOD")]
    pub method: Option<MethodChoice>,
    /// Ship at most so many bytes a second, such as 100M
    #[arg(long, value_name = "RATE")]
    pub bandwidth_limit: Option<Rate>,
    /// Compress blocks on the wire: auto, off, or a zstd level from 1 to 19 [default: auto]
    #[arg(long, value_name = "auto|off|1..19")]
    pub compress: Option<CompressChoice>,
    /// How many ssh connections carry a disk side by side: auto, or 1 to 16 [default: auto, several
    /// for a first copy of 1 GiB and more, where both hosts have the processors]
    #[arg(long, value_name = "auto|N")]
    pub streams: Option<Streams>,
    #[command(flatten)]
    pub compare: CompareArgs,
    /// How to change a destination that exists: staged (changes wait beside it until all are there),
    /// reflink (they go into a copy that shares its blocks), inplace (torn until the run has
    /// finished) [default: auto, reflink where the file system can, else staged]
    #[arg(long, value_name = "auto|inplace|staged|reflink")]
    pub apply: Option<ApplyArg>,
    /// Directory on the destination host in which the changes of a block device wait [default:
    /// /var/lib/kvm-clone]
    #[arg(long, value_name = "DIR")]
    pub stage_dir: Option<PathBuf>,
    /// Read both disks, also where they have not changed since their digests were kept
    #[arg(long)]
    pub full_scan: bool,
    /// Keep a reflink copy of what was sent beside each source disk, so that the next run reads only
    /// what was written since; where MIN_FREE bytes stay free whatever is written [default: 10G]
    #[arg(
        long,
        value_name = "MIN_FREE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "10G"
    )]
    pub keep_sent: Option<Space>,
    /// How to check the result: streamed (both ends' root digests must agree) or reread (and the
    /// destination is read once more, past the page cache) [default: streamed]
    #[arg(long, value_name = "none|streamed|reread")]
    pub verify: Option<Verification>,
    /// Compare and count, and write nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// The options of a command that compares two disks.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Transfer options")]
pub struct CompareArgs {
    /// How the agents reach each other: from host to host, or through this machine [default: auto]
    #[arg(long, value_name = "auto|direct|relay")]
    pub route: Option<RouteChoice>,
    /// How blocks are compared [default: xxh3; blake3 also withstands an adversary]
    #[arg(long, value_name = "xxh3|blake3")]
    pub hash: Option<HashChoice>,
    /// How disks are read: buffered (through the page cache), direct (past it), or auto: past it what
    /// is not in it [default: auto]
    #[arg(long, value_name = "auto|buffered|direct")]
    pub io: Option<IoArg>,
    /// On both hosts, leave the processor and the disks to others first
    #[arg(long)]
    pub nice: bool,
    /// Read at most so many bytes a second on each host, such as 100M
    #[arg(long, value_name = "RATE")]
    pub read_limit: Option<Rate>,
    /// Give up after so long, such as 15m; the same command takes the run up again
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<TimeLimit>,
}

impl TransferArgs {
    /// The command line, over the configuration, over the defaults; `method` is the command's.
    ///
    /// # Errors
    /// Usage, for what the method cannot do.
    pub fn resolve(&self, config: &Config, method: MethodChoice) -> Result<Options> {
        let default = Options::default();
        let options = Options {
            method: self.method.or(config.method).unwrap_or(method),
            method_is_given: self.method.or(config.method).is_some(),
            bandwidth_limit: self
                .bandwidth_limit
                .or(config.bandwidth_limit)
                .map(|rate| rate.0),
            compression: self
                .compress
                .or(config.compress)
                .map_or(default.compression, |choice| choice.0),
            streams: self.streams.unwrap_or(default.streams),
            apply: self
                .apply
                .or(config.apply)
                .map_or(default.apply, |choice| choice.0),
            stage_dir: self.stage_dir.clone(),
            full_scan: self.full_scan,
            keep_sent: self.keep_sent.map(|space| space.0),
            verify: self.verify.unwrap_or(default.verify),
            ..self.compare.resolve(config)
        };
        options.check(options.method)?;
        Ok(options)
    }
}

impl CompareArgs {
    /// The command line, over the configuration, over the defaults.
    pub fn resolve(&self, config: &Config) -> Options {
        let default = Options::default();
        Options {
            route: self.route.or(config.route).unwrap_or(default.route),
            hash: self
                .hash
                .or(config.hash)
                .map_or(default.hash, |choice| choice.0),
            io: self.io.map_or(default.io, |choice| choice.0),
            nice: self.nice,
            read_limit: self.read_limit.map(|rate| rate.0),
            timeout: self.timeout.or(config.timeout).map(|limit| limit.0),
            ..default
        }
    }
}

/// The two disks of a command.
#[derive(Debug, Clone, Args)]
pub struct DiskArgs {
    /// Disk that is read: HOST:/absolute/path, or /absolute/path on this machine
    #[arg(value_name = "SRC_DISK")]
    pub source: OsString,
    /// Disk that is made equal to it, or compared with it, written alike
    #[arg(value_name = "DST_DISK")]
    pub destination: OsString,
}

impl DiskArgs {
    /// What to do with both disks.
    ///
    /// # Errors
    /// Usage, for what is not a disk.
    pub fn request(
        &self,
        operation: Operation,
        options: Options,
        dry_run: bool,
    ) -> Result<Request> {
        Ok(Request {
            operation,
            source: parse_disk(&self.source, "SRC_DISK")?,
            destination: parse_disk(&self.destination, "DST_DISK")?,
            dry_run,
            preserve: None,
            options,
        })
    }
}

fn parse_disk(text: &OsStr, argument: &str) -> Result<DiskSpec> {
    DiskSpec::parse(text).map_err(|error| {
        let hint = error.hint_text().unwrap_or_default().to_owned();
        Error::usage(format!("{argument}: {error}")).hint(hint)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_the_manual_writes_them() {
        assert_eq!("100M".parse(), Ok(Rate(100_000_000)));
        assert_eq!("64KiB".parse(), Ok(Rate(65_536)));
        assert_eq!("4096".parse(), Ok(Rate(4096)));
        assert_eq!("1h30m".parse(), Ok(TimeLimit(Duration::from_secs(5400))));
        assert_eq!("90s".parse(), Ok(TimeLimit(Duration::from_secs(90))));
        assert_eq!("19".parse(), Ok(CompressChoice(Compression::Level(19))));
        for text in ["0", "x", "-1"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
            assert!(text.parse::<TimeLimit>().is_err(), "{text}");
        }
        for text in ["0", "20", "", "zstd"] {
            assert!(text.parse::<CompressChoice>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_command_line_wins_over_the_configuration_and_that_over_the_defaults() {
        let config = Config {
            hash: Some(HashChoice(HashKind::Blake3)),
            route: Some(RouteChoice::Direct),
            ..Config::default()
        };
        let args = TransferArgs {
            compare: CompareArgs {
                route: Some(RouteChoice::Relay),
                ..CompareArgs::default()
            },
            ..TransferArgs::default()
        };
        let options = args.resolve(&config, MethodChoice::Rsync).unwrap();
        assert_eq!(options.method, MethodChoice::Rsync);
        assert_eq!(options.route, RouteChoice::Relay);
        assert_eq!(options.hash, HashKind::Blake3);
        assert_eq!(options.compression, Compression::Auto);
    }
}
