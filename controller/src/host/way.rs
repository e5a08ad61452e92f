//! The way from one host to another for a program that starts ssh by itself, such as rsync and
//! scp: which words it must hand to ssh so that nothing has to be configured where it runs.

use std::ffi::OsString;

use super::ssh::Sharing;
use super::{Host, ssh};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};

/// How a program on one host reaches another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// What to put before the colon.
    pub name: String,
    /// Lines of a known_hosts file, to be given to [`Host::errand`].
    pub known_hosts: Vec<u8>,
    /// Words between `ssh` and the host.
    words: Vec<String>,
}

impl Way {
    /// ssh and its words, as rsync takes them after `-e`: it splits them at spaces itself, and
    /// knows quotes.
    pub fn shell(&self) -> String {
        let quoted = self.words.iter().map(|word| {
            if word.contains([' ', '\'']) {
                format!("\"{word}\"")
            } else {
                word.clone()
            }
        });
        std::iter::once("ssh".to_owned())
            .chain(quoted)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// The same for scp, some of whose own options have the names of ssh's.
    pub fn scp_words(&self) -> Vec<String> {
        let (mut scp, mut words) = (Vec::new(), self.words.iter());
        while let Some(word) = words.next() {
            let mut next = || words.next().cloned().unwrap_or_default();
            match word.as_str() {
                "-T" | "-A" => {}
                "-e" => drop(next()),
                "-p" => scp.extend(["-P".to_owned(), next()]),
                "-l" => scp.extend(["-o".to_owned(), format!("User={}", next())]),
                "-S" => scp.extend(["-o".to_owned(), format!("ControlPath={}", next())]),
                _ => scp.push(word.clone()),
            }
        }
        scp
    }
}

impl Host {
    /// The way to this host for a program that runs on `from`.
    ///
    /// # Errors
    /// Host key, when this machine knows no key of the host; missing requirement, when this host
    /// is this machine, which has no name for others.
    pub async fn way_from(&self, from: &Self) -> Result<Way> {
        let (HostSpec::Ssh(target), true) = (self.spec(), from.is_local()) else {
            return self.way_from_afar().await;
        };
        let socket = self.socket();
        let sharing = socket
            .as_deref()
            .map_or(Sharing::Alone, |socket| Sharing::Channel(socket.path()));
        let argv = self.ssh_argv(target, sharing).await?;
        // Between "ssh" and "--", the host.
        let words = argv[1..argv.len() - 2]
            .iter()
            .map(text)
            .collect::<Result<_>>()?;
        Ok(Way {
            name: bracketed(&target.name),
            known_hosts: Vec::new(),
            words,
        })
    }

    async fn way_from_afar(&self) -> Result<Way> {
        let reach = self.reach().await?;
        let mut words: Vec<String> = ["-T", "-e", "none"].map(str::to_owned).into();
        for option in reach.options {
            words.extend(["-o".to_owned(), option]);
        }
        words.extend([
            "-p".to_owned(),
            reach.port.to_string(),
            "-l".to_owned(),
            reach.user,
        ]);
        Ok(Way {
            name: bracketed(&reach.hostname),
            known_hosts: reach.known_hosts,
            words,
        })
    }

    /// Whether a login from `from` to this host works, without a question to anybody.
    ///
    /// # Errors
    /// What keeps it from working.
    pub async fn reachable_from(&self, from: &Self) -> Result<()> {
        let way = self.way_from(from).await?;
        let mut words = vec!["ssh".to_owned()];
        words.extend(way.words.iter().cloned());
        words.extend(["--".to_owned(), way.name.clone(), "true".to_owned()]);
        let errand = from.errand(&words, &way.known_hosts).await?;
        match errand.end().await {
            Ok((status, _)) if status.success() => Ok(()),
            Ok((_, said)) => Err(self.explain(&said)),
            Err(error) => Err(error),
        }
    }

    /// Finds out whether the host has a program.
    ///
    /// # Errors
    /// Missing requirement, when it has not.
    pub async fn require(&self, program: &str) -> Result<()> {
        // Whatever it says to that, it is there.
        match self.tool(&[program, "--version"], b"").await {
            Err(error) if error.code() == ErrorCode::MissingRequirement => Err(error.hint(
                format!("install {program} there, or use --method blocksync"),
            )),
            other => other.map(drop),
        }
    }
}

/// An IPv6 address would otherwise end at its first colon.
fn bracketed(name: &str) -> String {
    if name.contains(':') {
        format!("[{name}]")
    } else {
        name.to_owned()
    }
}

fn text(word: &OsString) -> Result<String> {
    word.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Error::usage(format!("not UTF-8: {}", ssh::lossy(word))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rsync_and_scp_get_the_same_in_their_own_words() {
        let words = [
            "-T", "-e", "none", "-o", "A=b c", "-p", "22", "-l", "root", "-S", "/s", "-A", "-F",
            "/f",
        ];
        let way = Way {
            name: "h".into(),
            known_hosts: Vec::new(),
            words: words.map(str::to_owned).into(),
        };
        assert_eq!(
            way.shell(),
            "ssh -T -e none -o \"A=b c\" -p 22 -l root -S /s -A -F /f"
        );
        assert_eq!(
            way.scp_words(),
            [
                "-o",
                "A=b c",
                "-P",
                "22",
                "-o",
                "User=root",
                "-o",
                "ControlPath=/s",
                "-F",
                "/f"
            ]
        );
        assert_eq!(bracketed("fe80::1"), "[fe80::1]");
    }
}
