//! The tools: what each is called, what it needs, and the command lines that make a copy with it.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::Deserialize;

use crate::case::Case;
use crate::lab::Paths;
use crate::sshd::HOST;

/// What is measured: tools, and limits that no tool can beat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Tool {
    Blocksync,
    /// With the digests that a run before has left.
    BlocksyncKept,
    /// And with a copy of the source that proves what did not change, where files can share blocks.
    BlocksyncSent,
    Rsync,
    Scp,
    BlocksyncFast,
    Bdsync,
    Diskrsync,
    /// Both disks' data read and digested, nothing else.
    #[value(skip)]
    ScanLimit,
    /// The bytes to ship through a bare ssh, with its default cipher.
    #[value(skip)]
    WireLimit,
    /// The same with aes128-gcm.
    #[value(skip)]
    WireLimitAes,
    /// Logging in and nothing else.
    #[value(skip)]
    Login,
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocksync => "blocksync",
            Self::BlocksyncKept => "blocksync, kept digests",
            Self::BlocksyncSent => "blocksync, kept copy",
            Self::Rsync => "rsync",
            Self::Scp => "scp",
            Self::BlocksyncFast => "blocksync-fast",
            Self::Bdsync => "bdsync",
            Self::Diskrsync => "diskrsync",
            Self::ScanLimit => "*scan limit*",
            Self::WireLimit => "*wire limit*",
            Self::WireLimitAes => "*wire limit, aes128-gcm*",
            Self::Login => "*ssh HOST true*",
        })
    }
}

impl Tool {
    /// The program that must be on PATH; `None` for what the bench builds itself.
    fn program(self) -> Option<&'static str> {
        match self {
            Self::Rsync => Some("rsync"),
            Self::Scp => Some("scp"),
            Self::BlocksyncFast => Some("blocksync-fast"),
            Self::Bdsync => Some("bdsync"),
            Self::Diskrsync => Some("diskrsync"),
            Self::Blocksync
            | Self::BlocksyncKept
            | Self::BlocksyncSent
            | Self::ScanLimit
            | Self::WireLimit
            | Self::WireLimitAes
            | Self::Login => None,
        }
    }

    /// Whether it does a case in a way of its own: nothing is kept of what is not there yet.
    pub(crate) fn has_part_in(self, case: Case) -> bool {
        match self {
            Self::BlocksyncKept => case != Case::First,
            Self::BlocksyncSent => !matches!(case, Case::First | Case::Changed(0)),
            _ => true,
        }
    }

    /// Whether it is the product.
    pub(crate) fn is_blocksync(self) -> bool {
        matches!(
            self,
            Self::Blocksync | Self::BlocksyncKept | Self::BlocksyncSent
        )
    }

    /// Whether it ships a case's bytes without looking at what the destination has.
    pub(crate) fn is_wire_limit(self) -> bool {
        matches!(self, Self::WireLimit | Self::WireLimitAes)
    }

    /// Whether it leaves something on the destination's disk.
    pub(crate) fn has_result(self) -> bool {
        !matches!(self, Self::ScanLimit | Self::Login)
    }

    /// Its name without the marks and commas that a table or a list may have.
    pub(crate) fn plain_name(self) -> String {
        self.to_string().replace(['*', ','], "")
    }

    /// Whether a process of this name does the tool's own work, ssh and shells apart.
    pub(crate) fn is_worker(self) -> fn(&str) -> bool {
        match self {
            Self::Blocksync | Self::BlocksyncKept | Self::BlocksyncSent => {
                |name| name.starts_with("agent-") || name.starts_with("kvm-clone-agent")
            }
            Self::Rsync => |name| name == "rsync",
            Self::Scp => |name| name == "scp" || name == "sftp-server",
            Self::BlocksyncFast => |name| name == "blocksync-fast",
            Self::Bdsync => |name| name == "bdsync",
            Self::Diskrsync => |name| name == "diskrsync",
            Self::ScanLimit => |name| name == "kvm-clone-bench",
            Self::WireLimit | Self::WireLimitAes | Self::Login => |_| false,
        }
    }

    /// The command that makes the destination equal to the source.
    pub(crate) fn command(self, case: Case, paths: &Paths) -> Result<Command> {
        match self {
            Self::Blocksync => {
                let mut command = paths.sync(&paths.source);
                command.arg("--full-scan");
                Ok(command)
            }
            Self::BlocksyncKept => Ok(paths.sync(&paths.source)),
            Self::BlocksyncSent => {
                let mut command = paths.sync(&paths.source);
                command.arg("--keep-sent=0");
                Ok(command)
            }
            Self::Rsync => rsync(case, paths),
            Self::Scp => Ok(scp(paths)),
            Self::BlocksyncFast => pipeline(BLOCKSYNC_FAST, paths),
            Self::Bdsync => pipeline(BDSYNC, paths),
            Self::Diskrsync => diskrsync(paths),
            Self::ScanLimit => scan(paths),
            Self::WireLimit => wire(paths, &[]),
            Self::WireLimitAes => wire(paths, &["-c", "aes128-gcm@openssh.com"]),
            Self::Login => Ok(login(paths)),
        }
    }
}

pub(crate) fn remote(path: &Path) -> String {
    // `Paths` are plain text: the lab has checked its directory.
    format!("{HOST}:{}", path.display())
}

/// The flags that `kvm-clone-ctl --method rsync` promises; onto an older copy with
/// `--ignore-times`, so that it reads both files as the others do.
fn rsync(case: Case, paths: &Paths) -> Result<Command> {
    let config = shlex::try_quote(paths.config()?)?;
    let mut command = Command::new("rsync");
    match case {
        Case::First => command.args(["-avS", "--partial", "--inplace"]),
        Case::Changed(_) => command.args([
            "-aS",
            "--inplace",
            "--partial",
            "--no-whole-file",
            "--ignore-times",
        ]),
    };
    command.arg("-e").arg(format!("ssh -F {config}"));
    command.arg(&paths.source).arg(remote(&paths.destination));
    Ok(command)
}

fn scp(paths: &Paths) -> Command {
    let mut command = Command::new("scp");
    command.arg("-q").arg("-F").arg(&paths.ssh_config);
    command.arg(&paths.source).arg(remote(&paths.destination));
    command
}

/// With a raw image as its result: by default it writes a format of its own. It splits the flags
/// for ssh at each space, and takes no quotes.
fn diskrsync(paths: &Paths) -> Result<Command> {
    let mut command = Command::new("diskrsync");
    command
        .arg("--no-compress")
        .arg(format!("--ssh-flags=-F {}", paths.config()?));
    command.arg(&paths.source).arg(remote(&paths.destination));
    Ok(command)
}

/// Digests are made on the far side in every run, fetched, and compared here: both disks are
/// read, as the others read them. Same block size and hash family as blocksync.
const BLOCKSYNC_FAST: &str = r#"
ssh -F "$CONFIG" "$HOST" "truncate -s $SIZE $DESTINATION &&
    blocksync-fast --silent --force --make-digest -s $DESTINATION -f $DIGEST.far -b 64K -a XXH3 &&
    cat $DIGEST.far" > "$DIGEST"
blocksync-fast --silent --make-delta -s "$SOURCE" -f "$DIGEST" -b 64K -a XXH3 |
    ssh -F "$CONFIG" "$HOST" "blocksync-fast --silent --apply-delta -d $DESTINATION"
"#;

/// Its patch goes straight into a second connection, as its manual has it.
const BDSYNC: &str = r#"
ssh -F "$CONFIG" "$HOST" "truncate -s $SIZE $DESTINATION"
bdsync --blocksize=65536 "ssh -F $CONFIG $HOST bdsync --server" "$SOURCE" "$DESTINATION" |
    ssh -F "$CONFIG" "$HOST" "bdsync --patch=$DESTINATION"
"#;

/// A tool that takes several commands, as a script that ends with the first failure.
fn pipeline(script: &str, paths: &Paths) -> Result<Command> {
    let mut command = Command::new("bash");
    command
        .args(["-euo", "pipefail", "-c", script])
        .env("CONFIG", paths.config()?)
        .env("HOST", HOST)
        .env("SOURCE", &paths.source)
        .env("DESTINATION", &paths.destination)
        .env("DIGEST", paths.outputs.join("digest"))
        .env("SIZE", paths.source.metadata()?.len().to_string());
    Ok(command)
}

fn scan(paths: &Paths) -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command
        .arg("scan")
        .arg(&paths.source)
        .arg(&paths.destination);
    Ok(command)
}

fn wire(paths: &Paths, cipher: &[&str]) -> Result<Command> {
    let payload = std::fs::File::open(&paths.payload)?;
    let mut command = ssh(paths);
    command.args(cipher).arg(HOST);
    command.arg(format!("cat > {}", paths.destination.display()));
    command.stdin(Stdio::from(payload));
    Ok(command)
}

fn login(paths: &Paths) -> Command {
    let mut command = ssh(paths);
    command.args([HOST, "true"]);
    command
}

fn ssh(paths: &Paths) -> Command {
    let mut command = Command::new("ssh");
    command.arg("-F").arg(&paths.ssh_config);
    command
}

/// The tools to measure, and those of the usual ones that this machine has not. Where files share
/// no blocks, no copies can be kept.
pub(crate) fn select(wanted: &[Tool], share_blocks: bool) -> Result<(Vec<Tool>, Vec<Tool>)> {
    let is_there = |tool: &Tool| tool.program().is_none_or(on_path);
    if wanted.is_empty() {
        let usual = Tool::value_variants().iter();
        Ok(usual
            .filter(|tool| share_blocks || **tool != Tool::BlocksyncSent)
            .partition(|tool| is_there(tool)))
    } else {
        for tool in wanted {
            ensure!(is_there(tool), "{tool} is not on PATH");
        }
        Ok((wanted.to_vec(), Vec::new()))
    }
}

fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Builds the controller, which brings its agent, beside the bench's own binary.
pub(crate) fn build_controller() -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--bin",
            "kvm-clone-ctl",
            "--manifest-path",
        ])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .stdout(Stdio::null())
        .status()
        .context("running cargo")?;
    ensure!(status.success(), "building kvm-clone-ctl failed");
    let target = env::current_exe()?;
    let target = target
        .parent()
        .and_then(Path::parent)
        .context("the bench has no directory")?;
    let controller = target.join("release").join("kvm-clone-ctl");
    ensure!(
        controller.is_file(),
        "{} is missing: name it with --controller",
        controller.display()
    );
    Ok(controller)
}

/// The part of the controller's result that the report shows.
#[derive(Debug, Deserialize)]
pub(crate) struct SyncResult {
    success: bool,
    route: String,
    apply: Option<String>,
    verified: Option<String>,
}

impl SyncResult {
    /// Reads what `disk sync -o json` printed.
    pub(crate) fn parse(json: &[u8]) -> Result<Self> {
        let result: Self =
            serde_json::from_slice(json).context("reading the result of disk sync")?;
        ensure!(
            result.success,
            "disk sync ended well and says that it failed"
        );
        Ok(result)
    }
}

impl fmt::Display for SyncResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
        let (apply, verified) = (or_none(&self.apply), or_none(&self.verified));
        write!(
            f,
            "route {}, apply {apply}, verified {verified}",
            self.route
        )
    }
}

/// The environment that keeps the user's own configuration and history out of the bench.
pub(crate) fn isolated(program: &Path, home: &Path) -> Command {
    let mut command = Command::new(program);
    for name in [
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_STATE_HOME",
        "XDG_DATA_HOME",
    ] {
        command.env(name, home.join(OsStr::new(name)));
    }
    command
}
