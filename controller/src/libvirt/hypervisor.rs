//! A hypervisor: a host whose libvirt is spoken to through `virsh` there.

use std::str::FromStr;

use serde::Serialize;

use crate::error::{Error, ErrorCode, Result};
use crate::host::Host;

/// A host and the libvirt on it. Clones are the same hypervisor.
#[derive(Debug, Clone)]
pub struct Hypervisor {
    host: Host,
    uri: String,
}

/// What a domain is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainState {
    /// Its processors run, or wait for work.
    Running,
    /// Suspended in memory, by a user or by an I/O error.
    Paused,
    /// Off.
    Stopped,
    /// On its way to being off.
    Stopping,
    /// Off after its guest or QEMU crashed.
    Crashed,
    /// Asleep by the guest's own wish, in memory.
    Sleeping,
}

impl DomainState {
    /// Whether no process of QEMU holds its disks.
    pub fn is_off(self) -> bool {
        matches!(self, Self::Stopped | Self::Crashed)
    }
}

impl FromStr for DomainState {
    type Err = Error;

    /// As `virsh domstate` says it in the locale C.
    fn from_str(text: &str) -> Result<Self> {
        Ok(match text.trim() {
            "running" | "idle" | "no state" => Self::Running,
            "paused" => Self::Paused,
            "shut off" => Self::Stopped,
            "in shutdown" => Self::Stopping,
            "crashed" => Self::Crashed,
            "pmsuspended" => Self::Sleeping,
            other => {
                let message = format!("virsh names a state of a VM that is not known: \"{other}\"");
                return Err(Error::new(ErrorCode::Internal, message));
            }
        })
    }
}

impl std::fmt::Display for DomainState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Stopping => "stopping",
            Self::Crashed => "crashed",
            Self::Sleeping => "sleeping",
        })
    }
}

impl Hypervisor {
    /// The libvirt at `uri` as seen from `host`.
    pub fn new(host: Host, uri: impl Into<String>) -> Self {
        Self {
            host,
            uri: uri.into(),
        }
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Runs one command of virsh, or several as one word with `;` between, and gives what it
    /// wrote.
    ///
    /// # Errors
    /// Not found, for a domain, pool or network that is not there; missing requirement, when virsh
    /// or libvirt cannot be used; io with virsh's complaint otherwise.
    pub async fn virsh(&self, words: &[&str]) -> Result<String> {
        self.virsh_with(words, b"").await
    }

    /// As [`Hypervisor::virsh`], with something on its standard input.
    ///
    /// # Errors
    /// As [`Hypervisor::virsh`].
    pub async fn virsh_with(&self, words: &[&str], input: &[u8]) -> Result<String> {
        let all = self.words(words);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let output = self.host.tool(&all, input).await?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(self.explain(words, &output.stderr))
    }

    /// The URI of its libvirt, as seen from the host.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The command line of virsh with these words.
    fn words(&self, words: &[&str]) -> Vec<String> {
        let all = ["virsh", "-q", "-c", &self.uri]
            .into_iter()
            .chain(words.iter().copied());
        all.map(str::to_owned).collect()
    }

    /// What virsh's complaint means.
    fn explain(&self, words: &[&str], stderr: &str) -> Error {
        let said = stderr.trim();
        let complains = |patterns: &[&str]| patterns.iter().any(|pattern| said.contains(pattern));
        let (code, message) = if complains(&[
            "failed to get domain",
            "failed to get pool",
            "failed to get network",
            "failed to get vol",
            "Domain not found",
            "Network not found",
            "Storage pool not found",
            "Storage volume not found",
        ]) {
            let what = words.get(1).copied().unwrap_or_default();
            (
                ErrorCode::NotFound,
                format!("{} has no \"{what}\"", self.host),
            )
        } else if complains(&["failed to connect to the hypervisor"]) {
            let message = format!("{} does not reach libvirt at {}", self.host, self.uri);
            return Error::new(ErrorCode::MissingRequirement, message)
                .caused_by(said.to_owned())
                .hint(
                    "start libvirtd there, let the user into the group libvirt, or name another \
                     place with --connect",
                );
        } else {
            let command = words.first().copied().unwrap_or_default();
            (
                ErrorCode::Io,
                format!("virsh {command} failed on {}", self.host),
            )
        };
        Error::new(code, message).caused_by(said.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read_as_virsh_says_them() {
        for (text, state) in [
            ("running\n", DomainState::Running),
            ("shut off\n\n", DomainState::Stopped),
            ("paused", DomainState::Paused),
        ] {
            assert_eq!(text.parse::<DomainState>().unwrap(), state);
        }
        assert!("dancing".parse::<DomainState>().is_err());
        assert!(DomainState::Crashed.is_off() && !DomainState::Sleeping.is_off());
    }

    #[test]
    fn virshs_complaints_get_the_code_of_their_cause() {
        let host = Host::new("hv1".parse().unwrap(), std::sync::Arc::default());
        let hypervisor = Hypervisor::new(host, "qemu:///system");
        for (said, code) in [
            ("error: failed to get domain 'web'", ErrorCode::NotFound),
            (
                "error: failed to connect to the hypervisor",
                ErrorCode::MissingRequirement,
            ),
            ("error: internal error: no", ErrorCode::Io),
        ] {
            let error = hypervisor.explain(&["dumpxml", "web"], said);
            assert_eq!(error.code(), code);
            assert!(error.one_line().contains("hv1") && error.one_line().contains(said));
        }
    }
}
