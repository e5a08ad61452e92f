//! `recover`: ends what broken runs have left on hosts. The agents there know how; this asks them,
//! and says what became of each disk.

use std::os::unix::ffi::OsStringExt as _;

use clap::Args;
use kvm_clone_protocol::message::{Control, Fate, Leftover, Recover, Recovery};
use serde::Serialize;

use super::App;
use super::answers::{Answer, report};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{AgentConnection, Host};

/// The most disks that one host can have left: what an agent says is bounded.
const MAX_LEFTOVERS: usize = 10_000;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Host: [USER@]NAME[:PORT], an alias of the ssh configuration, or "local"
    #[arg(required = true, value_name = "HOST")]
    hosts: Vec<HostSpec>,
    /// Keep what has arrived of runs that were not committed, for the next run to take up
    #[arg(long)]
    keep: bool,
    /// Only say what there is
    #[arg(long)]
    dry_run: bool,
}

/// What a host had.
#[derive(Debug, Serialize)]
struct Found {
    disks: Vec<Disk>,
}

/// A destination whose run broke off.
#[derive(Debug, Serialize)]
struct Disk {
    path: String,
    /// `finished`, `rolled_back`, `waiting`, `unfinished`, `torn`, `running` or `stuck`.
    state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    note: String,
}

pub(super) async fn run(app: &App, args: Arguments) -> Result<()> {
    let recovery = match (args.dry_run, args.keep) {
        (true, _) => Recovery::List,
        (false, true) => Recovery::Finish,
        (false, false) => Recovery::RollBack,
    };
    let done = report(
        app,
        "recover",
        args.hosts,
        move |host| on_host(host, recovery),
        text,
    );
    done.await
}

async fn on_host(host: Host, recovery: Recovery) -> Result<Found> {
    let mut agent = host.start_agent().await?;
    let found = ask(&mut agent, recovery).await;
    agent.close().await;
    let found = found?;
    if recovery == Recovery::List {
        return Ok(found);
    }
    let open: Vec<&Disk> = found
        .disks
        .iter()
        .filter(|disk| matches!(disk.state, "stuck" | "torn"))
        .collect();
    if open.is_empty() {
        return Ok(found);
    }
    let each: Vec<String> = open
        .iter()
        .map(|disk| format!("{} is {}: {}", disk.path, disk.state, advice(disk)))
        .collect();
    let message = format!(
        "{} of {} disks are not whole",
        open.len(),
        found.disks.len()
    );
    Err(Error::new(ErrorCode::Partial, message)
        .caused_by(each.join("; "))
        .hint("a sync onto a torn disk that runs to its end mends it"))
}

fn advice(disk: &Disk) -> &str {
    match (disk.state, disk.note.as_str()) {
        ("torn", "") => "it was written in place by a run that broke off",
        (_, note) => note,
    }
}

async fn ask(agent: &mut AgentConnection, recovery: Recovery) -> Result<Found> {
    agent.send(&Recover { recovery }).await?;
    let mut disks = Vec::new();
    loop {
        match agent.next().await? {
            Control::Leftover(leftover) if disks.len() < MAX_LEFTOVERS => {
                disks.push(leftover.into());
            }
            Control::Recovered(_) => return Ok(Found { disks }),
            Control::Failed(failed) => return Err(failed.into()),
            answer => {
                let message = format!("an agent answers recover with {:?}", answer.kind());
                return Err(Error::new(ErrorCode::Protocol, message));
            }
        }
    }
}

impl From<Leftover> for Disk {
    fn from(leftover: Leftover) -> Self {
        let path = std::ffi::OsString::from_vec(leftover.path);
        Self {
            path: path.to_string_lossy().into_owned(),
            state: name(leftover.fate),
            note: leftover.message,
        }
    }
}

fn name(fate: Fate) -> &'static str {
    match fate {
        Fate::Running => "running",
        Fate::Unfinished => "unfinished",
        Fate::Finished => "finished",
        Fate::Waiting => "waiting",
        Fate::RolledBack => "rolled_back",
        Fate::Torn => "torn",
        Fate::Stuck => "stuck",
    }
}

fn text(answers: &[Answer<Found>]) -> String {
    let mut text = String::new();
    for Answer { host, answer, .. } in answers {
        let Some(found) = answer else { continue };
        if found.disks.is_empty() {
            text += &format!("{host}: nothing was left\n");
        }
        for disk in &found.disks {
            let note = if disk.note.is_empty() {
                String::new()
            } else {
                format!(" ({})", disk.note)
            };
            text += &format!("{host}: {}: {}{note}\n", disk.path, said(disk.state));
        }
    }
    text
}

/// What became of a disk, for people.
fn said(state: &str) -> &str {
    match state {
        "running" => "a run is at it, and was left alone",
        "unfinished" => "committed, and not finished",
        "finished" => "finished: it is the new version",
        "waiting" => {
            "not committed: it is the old version, and what arrived waits for the next run"
        }
        "rolled_back" => "rolled back: it is the old version",
        "torn" => "torn: it was written in place",
        _ => "could not be seen to",
    }
}
