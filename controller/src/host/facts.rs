//! What `doctor` asks a host, in one command over a connection of its own.

use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::deploy::{MAX_CHATTER, temporary_name};
use super::install::DEFAULT_INSTALL_PATH;
use super::{Host, find, lines_after, script};
use crate::error::Result;

/// What a host said about itself. An empty text: it could not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// What the login shell printed by itself.
    pub noise: String,
    /// As `uname -m` names it.
    pub machine: String,
    /// The login and its number.
    pub user: String,
    /// Its clock minus ours in seconds, as far as the time of the question tells.
    pub clock_ahead: Option<i64>,
    /// Half the time that the question took: `clock_ahead` is not better than this.
    pub clock_error: Duration,
    /// The directory that takes the agent; `None` when none does.
    pub cache: Option<String>,
    /// Directories that do not take it, and why.
    pub tried: Vec<String>,
    /// Where rsync is.
    pub rsync: String,
    /// Where scp is.
    pub scp: String,
    /// Where virsh is.
    pub virsh: String,
    /// Whether virsh reaches libvirt, and what it said.
    pub libvirt: (bool, String),
    /// Free bytes, and of which directory's file system.
    pub free: Option<(u64, String)>,
    /// Runs of this user that are under way there, or broke off.
    pub unfinished: u64,
    /// With `--sudo`: whether the root-owned agent runs, and what was said.
    pub sudo: Option<(bool, String)>,
}

impl Host {
    /// Asks for the facts.
    ///
    /// # Errors
    /// When the host cannot be reached, or runs no shell script.
    pub async fn facts(&self, libvirt: &str) -> Result<Facts> {
        let options = self.options();
        let given = options
            .agent_path
            .as_deref()
            .map(|path| path.as_os_str().as_bytes());
        let root_agent = options
            .sudo
            .then(|| given.unwrap_or(DEFAULT_INSTALL_PATH.as_bytes()));
        let script = script::facts(&temporary_name(), libvirt, root_agent)?;
        // The login is not part of the time that the clock's comparison allows for: the script
        // reads the clock early, and its start is what takes long.
        let asked = seconds_now();
        let output = self.run(&script, b"", MAX_CHATTER).await?;
        let answered = seconds_now();
        let lines = lines_after(&output.stdout, script::FACT);
        if !lines.iter().any(|line| line.starts_with("end")) {
            return Err(self.runs_no_script(&output));
        }
        let mut facts = parse(&lines, asked, answered);
        facts.tried = lines_after(&output.stdout, script::TRIED);
        let start = find(&output.stdout, script::FACT).unwrap_or_default();
        facts.noise = String::from_utf8_lossy(output.stdout[..start].trim_ascii()).into_owned();
        Ok(facts)
    }
}

fn parse(lines: &[String], asked: i64, answered: i64) -> Facts {
    let value = |key: &str| {
        let found = lines
            .iter()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        found.unwrap_or_default().trim().to_owned()
    };
    let between = i64::midpoint(asked, answered);
    let half = u64::try_from((answered - asked) / 2).unwrap_or_default();
    Facts {
        machine: value("machine"),
        user: value("user"),
        clock_ahead: value("time")
            .parse::<i64>()
            .ok()
            .map(|theirs| theirs - between),
        clock_error: Duration::from_secs(half + 1),
        cache: Some(value("cache")).filter(|cache| !cache.is_empty()),
        rsync: value("rsync"),
        scp: value("scp"),
        virsh: value("virsh"),
        libvirt: status_and_text(&value("libvirt")),
        free: free(&value("free")),
        unfinished: value("unfinished").parse().unwrap_or_default(),
        sudo: Some(value("sudo"))
            .filter(|sudo| !sudo.is_empty())
            .map(|said| sudo(&said)),
        ..Facts::default()
    }
}

fn status_and_text(value: &str) -> (bool, String) {
    let (status, text) = value.split_once(' ').unwrap_or((value, ""));
    (status == "0", text.to_owned())
}

/// An exit status of the agent, or the reason why it was not tried.
fn sudo(value: &str) -> (bool, String) {
    match value.strip_prefix("kvm-clone-refused ") {
        Some(reason) => (false, reason.to_owned()),
        None => status_and_text(value.strip_prefix("kvm-clone-").unwrap_or(value)),
    }
}

fn free(value: &str) -> Option<(u64, String)> {
    let (kibibytes, directory) = value.split_once(' ')?;
    Some((
        kibibytes.parse::<u64>().ok()?.checked_mul(1024)?,
        directory.to_owned(),
    ))
}

/// The time in seconds since 1970.
pub(super) fn seconds_now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_as_the_script_says_them() {
        let lines = [
            "machine x86_64",
            "time 1000",
            "user root 0",
            "rsync /usr/bin/rsync",
            "scp ",
            "virsh ",
            "libvirt 1 ",
            "cache /root/.cache/kvm-clone",
            "free 1024 /var/lib/libvirt/images",
            "unfinished 2",
            "sudo kvm-clone-refused /opt/agent is not there",
            "end",
        ]
        .map(str::to_owned);
        let facts = parse(&lines, 890, 910);
        assert_eq!(facts.clock_ahead, Some(100));
        assert_eq!(facts.clock_error, Duration::from_secs(11));
        assert_eq!(facts.unfinished, 2);
        assert_eq!(
            facts.free,
            Some((1 << 20, "/var/lib/libvirt/images".to_owned()))
        );
        assert_eq!(
            facts.sudo,
            Some((false, "/opt/agent is not there".to_owned()))
        );
        assert_eq!(
            (facts.rsync.as_str(), facts.scp.as_str()),
            ("/usr/bin/rsync", "")
        );
        assert_eq!(
            sudo("kvm-clone-0 kvm-clone-agent 0.1.0"),
            (true, "kvm-clone-agent 0.1.0".to_owned())
        );
        assert_eq!(
            sudo("kvm-clone-1 sudo: a password is required"),
            (false, "sudo: a password is required".to_owned())
        );
    }
}
