//! Units for systemd: the daemon as a service, or a timer that runs what is due.

use std::fmt::Write as _;
use std::path::Path;

use crate::error::{Error, Result};

/// What the units are to start, and as whom.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// This program.
    pub program: &'a Path,
    /// The file of policies.
    pub policies: &'a Path,
    /// The configuration file, where it is not the usual one.
    pub config: Option<&'a Path>,
    /// That of ssh, where it is not the usual one.
    pub ssh_config: Option<&'a Path>,
    /// The user whose ssh keys reach the hosts.
    pub user: &'a str,
}

/// A unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// The name of its file.
    pub name: &'static str,
    /// What is in it.
    pub text: String,
}

/// What both services may: speak to hosts, and write the state of their user. A policy whose source
/// or destination is this machine needs more, and says so by failing. `/var/spool` is for mail.
const HARDENED: &str = "\
StateDirectory=kvm-clone-ctl
Environment=XDG_STATE_HOME=/var/lib
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictNamespaces=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallArchitectures=native
UMask=0077
ReadWritePaths=-/var/spool
";

/// A service that runs the daemon.
///
/// # Errors
/// Usage, for a name that a unit cannot hold.
pub fn daemon(wanted: &Wanted<'_>) -> Result<Vec<Unit>> {
    let command = wanted.command("daemon", &[])?;
    let text = format!(
        "[Unit]\nDescription=Replication of virtual machines\nDocumentation=man:kvm-clone-ctl(1)\n\
         Wants=network-online.target\nAfter=network-online.target\n\n\
         [Service]\nType=notify\nUser={user}\nExecStart={command}\n\
         ExecReload=/bin/kill -HUP $MAINPID\nRestart=on-failure\nRestartSec=5\n\
         WatchdogSec=120\nTimeoutStopSec=120\n{HARDENED}\n\
         [Install]\nWantedBy=multi-user.target\n",
        user = wanted.user()?,
    );
    let name = "kvm-clone-replicate.service";
    Ok(vec![Unit { name, text }])
}

/// A timer, and the service that it starts.
///
/// # Errors
/// As [`daemon`].
pub fn timer(wanted: &Wanted<'_>) -> Result<Vec<Unit>> {
    let command = wanted.command("run", &["--due"])?;
    let service = format!(
        "[Unit]\nDescription=Points of virtual machines that are due\n\
         Documentation=man:kvm-clone-ctl(1)\n\
         Wants=network-online.target\nAfter=network-online.target\n\n\
         [Service]\nType=oneshot\nUser={user}\nExecStart={command}\n{HARDENED}",
        user = wanted.user()?,
    );
    let timer = "[Unit]\nDescription=Points of virtual machines, each minute those that are due\n\n\
                 [Timer]\nOnCalendar=minutely\nAccuracySec=1s\n\n\
                 [Install]\nWantedBy=timers.target\n";
    Ok(vec![
        Unit {
            name: "kvm-clone-replicate-due.service",
            text: service,
        },
        Unit {
            name: "kvm-clone-replicate-due.timer",
            text: timer.to_owned(),
        },
    ])
}

impl Wanted<'_> {
    fn command(&self, what: &str, options: &[&str]) -> Result<String> {
        let mut words = vec![path(self.program)?];
        for (option, file) in [("--config", self.config), ("--ssh-config", self.ssh_config)] {
            if let Some(file) = file {
                let file = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
                words.extend([option.to_owned(), path(&file)?]);
            }
        }
        words.extend(["replicate".to_owned(), what.to_owned()]);
        words.extend(options.iter().map(|option| (*option).to_owned()));
        words.extend(["--policies".to_owned(), path(self.policies)?]);
        words.push("--no-progress".to_owned());
        let mut line = String::new();
        for (at, word) in words.iter().enumerate() {
            let space = if at == 0 { "" } else { " " };
            // Writing to a string does not fail.
            let _ = write!(line, "{space}{}", quoted(word));
        }
        Ok(line)
    }

    fn user(&self) -> Result<&str> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.$".contains(c);
        match !self.user.is_empty() && self.user.chars().all(is_plain) {
            true => Ok(self.user),
            false => Err(Error::usage(format!(
                "{:?} is no name of a user",
                self.user
            ))),
        }
    }
}

fn path(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .filter(|text| !text.contains(char::is_control));
    let text = text.ok_or_else(|| {
        Error::usage(format!("{} cannot stand in a unit", path.display()))
            .hint("choose a path without control characters")
    })?;
    Ok(text.to_owned())
}

/// A word of a command line in a unit: systemd.service(5), "Command lines", and specifiers.
fn quoted(word: &str) -> String {
    let word = word
        .replace('\\', "\\\\")
        .replace('%', "%%")
        .replace('$', "$$");
    match word.contains([' ', '"', '\'', ';']) {
        true => format!("\"{}\"", word.replace('"', "\\\"")),
        false => word,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_paths_are_quoted_and_impossible_ones_refused() {
        let wanted = |policies: &'static str, user: &'static str| Wanted {
            program: Path::new("/opt/my tools/kvm-clone-ctl"),
            policies: Path::new(policies),
            config: None,
            ssh_config: Some(Path::new("/etc/ssh/100%\"$x")),
            user,
        };
        let units = daemon(&wanted("/etc/p.toml", "root")).unwrap();
        let line = units[0]
            .text
            .lines()
            .find(|line| line.starts_with("ExecStart="));
        assert_eq!(
            line.unwrap(),
            "ExecStart=\"/opt/my tools/kvm-clone-ctl\" --ssh-config \"/etc/ssh/100%%\\\"$$x\" \
             replicate daemon --policies /etc/p.toml --no-progress"
        );
        assert!(daemon(&wanted("/etc/a\nb", "root")).is_err());
        assert!(timer(&wanted("/etc/p.toml", "root\nExecStart=x")).is_err());
    }
}
