//! `agent install`: an agent under a stable name that only root can change, for sudoers and for
//! forced commands in authorized_keys.

use super::deploy::{MAX_CHATTER, damaged, temporary_name};
use super::{Host, find, line_after, script};
use crate::agent_binary::{self, Agent};
use crate::error::{Error, ErrorCode, Result};

/// Where `--sudo` looks, and where `agent install` puts the agent unless told otherwise.
pub const DEFAULT_INSTALL_PATH: &str = "/usr/local/lib/kvm-clone/kvm-clone-agent";

impl Host {
    /// Puts the agent under `path`, owned by root, with mode 0755, in a directory that only root
    /// can write, as are all above it.
    ///
    /// # Errors
    /// Missing requirement when others could change it, or when root cannot be had.
    pub async fn install_agent(&self, path: &[u8]) -> Result<()> {
        if !path.starts_with(b"/") || path.ends_with(b"/") {
            return Err(Error::usage("--path is not the absolute path of a file"));
        }
        let agent = self.agent_for_it().await?.bytes()?;
        let directory = path
            .iter()
            .rposition(|byte| *byte == b'/')
            .unwrap_or_default();
        let temporary = [&path[..=directory], temporary_name().as_bytes()].concat();
        let upload = script::install_upload(path, &temporary, agent.len())?;
        let output = self.run(&upload, agent, agent.len() + MAX_CHATTER).await?;
        if let Some(reason) = line_after(&output.stdout, script::REFUSED) {
            return Err(self.not_installed(&String::from_utf8_lossy(reason)));
        }
        let Some(at) = find(&output.stdout, script::BACK) else {
            return Err(self.not_installed(output.stderr.trim()).hint(
                "the login must be root, or one that may run \"sudo -n sh\"; for this once is enough",
            ));
        };
        if output.stdout[at + script::BACK.len()..] != *agent {
            let _ = self
                .run(&script::install_discard(&temporary)?, b"", MAX_CHATTER)
                .await;
            return Err(damaged(self, &temporary));
        }
        let output = self
            .run(&script::install_place(path, &temporary)?, b"", MAX_CHATTER)
            .await?;
        match find(&output.stdout, script::DONE) {
            Some(_) => Ok(()),
            None => Err(self.not_installed(output.stderr.trim())),
        }
    }

    async fn agent_for_it(&self) -> Result<&'static Agent> {
        let output = self
            .run("echo; echo kvm-clone-need $(uname -m)", b"", MAX_CHATTER)
            .await?;
        let machine =
            line_after(&output.stdout, script::NEED).ok_or_else(|| self.runs_no_script(&output))?;
        let machine = String::from_utf8_lossy(machine);
        agent_binary::for_machine(&self.to_string(), machine.trim())
    }

    fn not_installed(&self, reason: &str) -> Error {
        Error::new(
            ErrorCode::MissingRequirement,
            format!("the agent is not installed on {self}: {reason}"),
        )
    }
}
