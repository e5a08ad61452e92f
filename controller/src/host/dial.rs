//! Route `direct`: what the other host runs to come here by itself. It gets everything that it
//! must know, so that it needs no configuration of its own: name, port, user, and the host keys
//! that this machine trusts.

use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use super::{AgentPath, Host, Resolved, quote, ssh};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};

/// Options that let nothing of the other host's user into the connection but its keys.
/// `{known_hosts}` is filled in by the agent there.
const OPTIONS: [&str; 15] = [
    "BatchMode=yes",
    "ConnectTimeout=5",
    "StrictHostKeyChecking=yes",
    "UserKnownHostsFile={known_hosts}",
    "GlobalKnownHostsFile=/dev/null",
    "ControlMaster=no",
    "ControlPath=none",
    "ForwardAgent=no",
    "ClearAllForwardings=yes",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "UpdateHostKeys=no",
    "LogLevel=ERROR",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
];

/// All that another host must know to come here.
#[derive(Debug, Clone)]
pub struct Reach {
    /// Values for `ssh -o`; `{known_hosts}` in one stands for the path of a file with
    /// `known_hosts`.
    pub options: Vec<String>,
    /// Name or address.
    pub hostname: String,
    /// The login.
    pub user: String,
    /// The port.
    pub port: u16,
    /// Lines of a known_hosts file.
    pub known_hosts: Vec<u8>,
}

/// Stands for the path of a file with host keys, which is known only where ssh is started.
pub(super) const KNOWN_HOSTS: &str = "{known_hosts}";

impl Host {
    /// Program and arguments with which another host reaches the agent here, and the known_hosts
    /// lines that go with them. `name` is what `attach` is told.
    ///
    /// # Errors
    /// Host key, when this machine knows no key of the host; missing requirement for this
    /// machine itself, which has no name that another could dial.
    pub async fn dial_command(
        &self,
        agent: &AgentPath,
        name: &str,
    ) -> Result<(Vec<Vec<u8>>, Vec<u8>)> {
        let reach = self.reach().await?;
        let mut argv: Vec<Vec<u8>> = ["ssh", "-T", "-e", "none"].map(Into::into).to_vec();
        for option in &reach.options {
            argv.extend([b"-o".to_vec(), option.clone().into_bytes()]);
        }
        argv.extend([
            b"-p".to_vec(),
            reach.port.to_string().into(),
            b"-l".to_vec(),
            reach.user.clone().into(),
        ]);
        argv.extend([b"--".to_vec(), reach.hostname.clone().into()]);
        let mut remote = b"exec ".to_vec();
        remote.extend(quote::command(agent.attach_words(name)?)?.into_encoded_bytes());
        argv.push(remote);
        Ok((argv, reach.known_hosts))
    }

    /// How another host reaches this one.
    ///
    /// # Errors
    /// As [`Host::dial_command`].
    pub async fn reach(&self) -> Result<Reach> {
        let Some(resolved) = self.resolved().await? else {
            return Err(Error::new(
                ErrorCode::MissingRequirement,
                "this machine, as \"local\", has no name that another host could reach it by",
            ));
        };
        let fixed = OPTIONS.into_iter().chain(ssh::fast_cipher(resolved));
        Ok(Reach {
            options: fixed.map(str::to_owned).collect(),
            hostname: resolved.hostname.clone(),
            user: resolved.user.clone(),
            port: resolved.port,
            known_hosts: self.known_hosts(resolved).await?,
        })
    }

    /// The keys of this host that this machine trusts, filed under the name that ssh on another
    /// host will look for.
    async fn known_hosts(&self, resolved: &Resolved) -> Result<Vec<u8>> {
        let filed = resolved.known_hosts_name();
        let lookup = resolved.filed_under();
        let mut lines = Vec::new();
        for file in &resolved.known_hosts {
            lines.extend(rename(&look_up(&lookup, file).await?, &filed));
        }
        if lines.is_empty() {
            let HostSpec::Ssh(target) = self.spec() else {
                return Ok(lines);
            };
            return Err(Error::new(
                ErrorCode::HostKey,
                format!("no known_hosts file here has a key of {target}"),
            ));
        }
        Ok(lines)
    }
}

/// Asks ssh-keygen, which understands hashed names and patterns.
async fn look_up(name: &str, file: &Path) -> Result<Vec<u8>> {
    let output = Command::new("ssh-keygen")
        .args(["-F", name, "-f"])
        .arg(file)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(ssh::cannot_run_ssh)?;
    // It fails for a file that is not there, or does not know the host.
    Ok(if output.status.success() {
        output.stdout
    } else {
        Vec::new()
    })
}

/// Puts `name` in place of what the keys are filed under, and leaves the comments out.
fn rename(listing: &[u8], name: &str) -> Vec<u8> {
    let mut lines = Vec::new();
    for line in listing.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii) {
        let mut words = line.splitn(2, |byte| *byte == b' ');
        let (Some(first), Some(rest)) = (words.next(), words.next()) else {
            continue;
        };
        if first.starts_with(b"#") {
            continue;
        }
        let (marker, rest) = if first.starts_with(b"@") {
            let Some(at) = rest.iter().position(|byte| *byte == b' ') else {
                continue;
            };
            (Some(first), &rest[at + 1..])
        } else {
            (None, rest)
        };
        if let Some(marker) = marker {
            lines.extend_from_slice(marker);
            lines.push(b' ');
        }
        lines.extend_from_slice(name.as_bytes());
        lines.push(b' ');
        lines.extend_from_slice(rest);
        lines.push(b'\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_filed_anew_and_markers_stay() {
        let listing = b"# Host hv found: line 1\n|1|abc=|def= ssh-ed25519 AAAA comment\n\
                        @cert-authority *.example ssh-rsa BBBB\n@revoked hv ssh-rsa CCCC\n\n";
        assert_eq!(
            String::from_utf8(rename(listing, "[10.0.0.1]:22022")).unwrap(),
            "[10.0.0.1]:22022 ssh-ed25519 AAAA comment\n\
             @cert-authority [10.0.0.1]:22022 ssh-rsa BBBB\n@revoked [10.0.0.1]:22022 ssh-rsa CCCC\n"
        );
    }

    #[test]
    fn the_name_of_a_data_connection_is_letters_and_digits() {
        let agent = AgentPath::Sudo(b"/a b/agent".to_vec());
        let command = |agent: &AgentPath| quote::command(agent.attach_words("x1").unwrap());
        assert_eq!(command(&agent).unwrap(), "sudo -n '/a b/agent' attach x1");
        assert_eq!(
            command(&AgentPath::Forced).unwrap(),
            "kvm-clone-agent attach x1"
        );
        for name in ["", "-x", "a b", "a;b"] {
            assert!(agent.attach_words(name).is_err());
        }
    }
}
