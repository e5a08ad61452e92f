//! What broken runs have left of disks on a host. The agent there knows, and ends it.

use std::os::unix::ffi::OsStringExt as _;

use kvm_clone_protocol::message::{Control, Fate, Leftover, Recover, Recovery};

use super::unexpected;
use crate::error::Result;
use crate::host::{AgentConnection, Host};

/// The most disks that one host can have left: what an agent says is bounded.
const MAX_LEFTOVERS: usize = 10_000;

/// A destination whose run broke off.
#[derive(Debug, Clone)]
pub struct Left {
    /// Where it is.
    pub path: String,
    /// What became of it.
    pub fate: Fate,
    /// Why, where that is not plain.
    pub note: String,
}

/// Sees to all that broken runs have left, or only says what there is.
///
/// # Errors
/// When the host cannot be reached, or runs no agent; what cannot be ended is in the answer.
pub async fn recover(host: &Host, recovery: Recovery) -> Result<Vec<Left>> {
    let mut agent = host.start_agent().await?;
    let left = ask(&mut agent, recovery).await;
    agent.close().await;
    left
}

async fn ask(agent: &mut AgentConnection, recovery: Recovery) -> Result<Vec<Left>> {
    agent.send(&Recover { recovery }).await?;
    let mut left = Vec::new();
    loop {
        match agent.next().await? {
            Control::Leftover(leftover) if left.len() < MAX_LEFTOVERS => {
                left.push(leftover.into());
            }
            Control::Recovered(_) => return Ok(left),
            Control::Failed(failed) => return Err(failed.into()),
            answer => return Err(unexpected("recover", &answer)),
        }
    }
}

impl From<Leftover> for Left {
    fn from(leftover: Leftover) -> Self {
        let path = std::ffi::OsString::from_vec(leftover.path);
        Self {
            path: path.to_string_lossy().into_owned(),
            fate: leftover.fate,
            note: leftover.message,
        }
    }
}
