//! `agent deploy`, `agent status`, `agent remove` and `agent install`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;

use clap::Subcommand;
use serde::Serialize;

use super::App;
use super::answers::{Answer, report};
use crate::agent_binary::{self, Agent as Ours};
use crate::endpoint::HostSpec;
use crate::error::Result;
use crate::host::{AgentConnection, AgentPath, DEFAULT_INSTALL_PATH, Host, Removed, Unwanted};
use crate::output;

/// What can be done with agents.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Copy the agent to the hosts where it is missing, and start it once
    Deploy {
        /// Host: [USER@]NAME[:PORT], an alias of the ssh configuration, or "local"
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<HostSpec>,
    },
    /// Say which hosts have the agent of this release
    Status {
        /// Host: [USER@]NAME[:PORT], an alias of the ssh configuration, or "local"
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<HostSpec>,
    },
    /// Remove the agents that transfers have copied to the hosts
    Remove {
        /// Keep the one of this release, and remove what other releases and broken uploads left
        #[arg(long)]
        old: bool,
        /// Host: [USER@]NAME[:PORT], an alias of the ssh configuration, or "local"
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<HostSpec>,
    },
    /// Put a root-owned agent under a stable name, for --sudo and for authorized_keys
    Install {
        /// Host, with a login that is root or may use "sudo -n"
        #[arg(value_name = "HOST")]
        host: HostSpec,
        /// Where to; all directories above must be root's
        #[arg(long, value_name = "PATH", default_value = DEFAULT_INSTALL_PATH)]
        path: OsString,
    },
}

/// An agent that answered.
#[derive(Debug, Serialize)]
struct Agent {
    /// `copied`, `found`, `absent`, or `forced`: authorized_keys names it.
    state: &'static str,
    path: Option<String>,
    release: Option<String>,
    protocol_min: Option<u16>,
    protocol_max: Option<u16>,
    architecture: Option<String>,
    /// It is byte by byte the one that this program carries.
    digest_matches: Option<bool>,
    /// Bytes, where it is the one that this program carries.
    size: Option<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

pub(super) async fn run(app: &App, command: Command) -> Result<()> {
    match command {
        Command::Deploy { hosts } => {
            report(
                app,
                "agent-deploy",
                hosts,
                |host| async move { Ok(about(host.start_agent().await?).await) },
                agents_text,
            )
            .await
        }
        Command::Status { hosts } => {
            let status = |host: Host| async move {
                match host.find_agent().await? {
                    Some(agent) => Ok(about(agent).await),
                    None => Ok(absent()),
                }
            };
            report(app, "agent-status", hosts, status, agents_text).await
        }
        Command::Remove { old, hosts } => {
            let which = if old { Unwanted::Old } else { Unwanted::All };
            report(
                app,
                "agent-remove",
                hosts,
                |host| async move { host.remove_agents(which).await },
                |answers| removed_text(answers, which),
            )
            .await
        }
        Command::Install { host, path } => install(app, &host, path).await,
    }
}

/// What an agent says about itself; ends it.
async fn about(agent: AgentConnection) -> Agent {
    let (welcome, versions) = (agent.welcome(), agent.versions());
    let ours = agent_binary::with_digest(welcome.agent_digest);
    let path = agent.agent_path();
    let forced = *path == AgentPath::Forced;
    let about = Agent {
        state: if forced {
            "forced"
        } else if agent.was_copied() {
            "copied"
        } else {
            "found"
        },
        path: (!forced).then(|| path.display()),
        release: Some(welcome.release.clone()),
        protocol_min: Some(versions.min),
        protocol_max: Some(versions.max),
        architecture: Some(welcome.arch.clone()),
        digest_matches: Some(ours.is_some()),
        size: ours.map(Ours::size),
        warnings: agent.warnings().to_vec(),
    };
    agent.close().await;
    about
}

fn absent() -> Agent {
    Agent {
        state: "absent",
        path: None,
        release: None,
        protocol_min: None,
        protocol_max: None,
        architecture: None,
        digest_matches: None,
        size: None,
        warnings: Vec::new(),
    }
}

fn agents_text(answers: &[Answer<Agent>]) -> String {
    let mut table = output::table(&[
        "HOST", "AGENT", "RELEASE", "MACHINE", "PROTOCOL", "BYTES", "SIZE", "PATH",
    ]);
    let dash = || "-".to_owned();
    for Answer {
        host,
        answer,
        error,
    } in answers
    {
        let Some(agent) = answer else {
            let code = error
                .as_ref()
                .map(|error| error.code.name().to_owned())
                .unwrap_or_default();
            table.add_row([host, "failed", &code, "-", "-", "-", "-", "-"]);
            continue;
        };
        let protocol = match (agent.protocol_min, agent.protocol_max) {
            (Some(min), Some(max)) if min == max => min.to_string(),
            (Some(min), Some(max)) => format!("{min}-{max}"),
            _ => dash(),
        };
        let bytes = match agent.digest_matches {
            Some(true) => "as carried",
            Some(false) => "other",
            None => "-",
        };
        table.add_row([
            host.clone(),
            agent.state.to_owned(),
            agent.release.clone().unwrap_or_else(dash),
            agent.architecture.clone().unwrap_or_else(dash),
            protocol,
            bytes.to_owned(),
            agent.size.map_or_else(dash, |size| {
                output::iec(u64::try_from(size).unwrap_or(u64::MAX))
            }),
            agent.path.clone().unwrap_or_else(dash),
        ]);
    }
    output::table_text(&table)
}

fn removed_text(answers: &[Answer<Removed>], which: Unwanted) -> String {
    let none = match which {
        Unwanted::All => "there was none",
        Unwanted::Old => "there was no old one",
    };
    let mut text = String::new();
    for Answer { host, answer, .. } in answers {
        let Some(removed) = answer else { continue };
        if removed.removed.is_empty() && removed.kept.is_empty() {
            text += &format!("{host}: {none}\n");
        }
        for file in &removed.removed {
            text += &format!("{host}: removed {file}\n");
        }
        for file in &removed.kept {
            text += &format!("{host}: could not remove {file}\n");
        }
    }
    text
}

#[derive(Debug, Serialize)]
struct Installed {
    host: String,
    path: String,
    release: &'static str,
}

async fn install(app: &App, spec: &HostSpec, path: OsString) -> Result<()> {
    let host = app.host(spec);
    host.install_agent(path.as_bytes()).await?;
    let installed = Installed {
        host: host.to_string(),
        path: path.to_string_lossy().into_owned(),
        release: env!("CARGO_PKG_VERSION"),
    };
    output::print(&installed, app.format(), || {
        format!(
            "{}: installed {path}\nfor --sudo, give a user this line in sudoers:\n  USER ALL=(root) NOPASSWD: {path}\n",
            installed.host,
            path = installed.path
        )
    })
}
