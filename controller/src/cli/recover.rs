//! `recover`: ends what broken runs have left on hosts. The agents there see to disks, and the
//! records of this program tell of VMs; this asks both, and says what became of each.

use clap::Args;
use kvm_clone_protocol::message::{Fate, Recovery};
use serde::Serialize;

use super::App;
use super::answers::{Answer, report_judged};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::Host;
use crate::libvirt::Hypervisor;
use crate::transfer;
use crate::vm::recover::{self as vm, Subject};

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
    found: Vec<Left>,
}

/// What a run that broke off has left.
#[derive(Debug, Serialize)]
struct Left {
    kind: Kind,
    /// A disk's path, or a VM's name.
    name: String,
    /// `finished`, `rolled_back`, `waiting`, `unfinished`, `torn`, `running` or `stuck`.
    state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    note: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Disk,
    Vm,
    Clone,
}

pub(super) async fn run(app: &App, args: Arguments) -> Result<()> {
    let recovery = match (args.dry_run, args.keep) {
        (true, _) => Recovery::List,
        (false, true) => Recovery::Finish,
        (false, false) => Recovery::RollBack,
    };
    let connect = app.connect().to_owned();
    let work = move |host| on_host(Hypervisor::new(host, connect.clone()), recovery);
    let judge = |found: &Found| match recovery {
        Recovery::List => Ok(()),
        Recovery::Finish | Recovery::RollBack => found.judge(),
    };
    report_judged(app, "recover", args.hosts, work, judge, text).await
}

async fn on_host(on: Hypervisor, recovery: Recovery) -> Result<Found> {
    let disks = transfer::recover::recover(on.host(), recovery).await?;
    let vms = match on.host().share().await {
        Ok(()) => vm::recover(&on, recovery, &disks).await,
        // A login that starts an agent and runs no commands sees no VMs.
        Err(error) if error.code() == ErrorCode::MissingRequirement => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    let mut found: Vec<Left> = disks.into_iter().map(Left::from).collect();
    match vms {
        Ok(vms) => found.extend(vms.into_iter().map(Left::from)),
        // What was done to the disks is told all the same.
        Err(error) => found.push(Left::unseen(on.host(), &error)),
    }
    Ok(Found { found })
}

impl Found {
    /// What is not whole is a failure.
    fn judge(&self) -> Result<()> {
        let is_open = |left: &&Left| matches!(left.state, "stuck" | "torn");
        let open: Vec<String> = self
            .found
            .iter()
            .filter(is_open)
            .map(|left| format!("{}: {}", left.name, left.said()))
            .collect();
        if open.is_empty() {
            return Ok(());
        }
        let message = format!("{} of {} are not whole", open.len(), self.found.len());
        Err(Error::new(ErrorCode::Partial, message)
            .caused_by(open.join("; "))
            .hint("a sync onto a torn disk that runs to its end mends it"))
    }
}

impl Left {
    /// The VMs of a host could not be looked for.
    fn unseen(host: &Host, error: &Error) -> Self {
        Self {
            kind: Kind::Vm,
            name: host.to_string(),
            state: state(Fate::Stuck),
            note: error.one_line(),
        }
    }

    /// What became of it, for people.
    fn said(&self) -> String {
        let said = match (self.kind, self.state) {
            (_, "running") => "a run is at it, and was left alone",
            (Kind::Disk, "unfinished") => "committed, and not finished",
            (Kind::Disk, "finished") => "finished: it is the new version",
            (Kind::Disk, "waiting") => {
                "not committed: it is the old version, and what arrived waits for the next run"
            }
            (Kind::Disk, "rolled_back") => "rolled back: it is the old version",
            (_, "torn") => "torn: it was written in place by a run that broke off",
            (Kind::Vm, "finished") => "put right",
            (Kind::Vm, "waiting" | "unfinished") => "not put right",
            (Kind::Clone, "waiting") => "waits for the same clone command",
            (Kind::Clone, "rolled_back") => "what was made for it is removed",
            _ => "could not be seen to",
        };
        match self.note.as_str() {
            "" => said.to_owned(),
            note => format!("{said} ({note})"),
        }
    }
}

impl From<transfer::recover::Left> for Left {
    fn from(left: transfer::recover::Left) -> Self {
        Self {
            kind: Kind::Disk,
            name: left.path,
            state: state(left.fate),
            note: left.note,
        }
    }
}

impl From<vm::Left> for Left {
    fn from(left: vm::Left) -> Self {
        Self {
            kind: match left.subject {
                Subject::Vm => Kind::Vm,
                Subject::Clone => Kind::Clone,
            },
            name: left.name,
            state: state(left.fate),
            note: left.note,
        }
    }
}

fn state(fate: Fate) -> &'static str {
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
        let Some(Found { found }) = answer else {
            continue;
        };
        if found.is_empty() {
            text += &format!("{host}: nothing was left\n");
        }
        for left in found {
            let kind = match left.kind {
                Kind::Disk => "",
                Kind::Vm => "VM ",
                Kind::Clone => "clone ",
            };
            text += &format!("{host}: {kind}{}: {}\n", left.name, left.said());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(state: &'static str) -> Left {
        Left {
            kind: Kind::Disk,
            name: "/images/web".into(),
            state,
            note: "why".into(),
        }
    }

    #[test]
    fn what_is_not_whole_is_a_failure_and_is_told_with_the_rest() {
        let found = Found {
            found: vec![left("finished"), left("stuck")],
        };
        let error = found.judge().unwrap_err();
        assert_eq!(error.code(), ErrorCode::Partial);
        let said = error.for_people();
        assert!(
            said.contains("1 of 2") && said.contains("/images/web"),
            "{said}"
        );
        let host = Answer {
            host: "hv1".into(),
            answer: Some(found),
            error: Some((&error).into()),
        };
        let text = text(&[host]);
        assert_eq!(text.lines().count(), 2, "{text}");
        let whole = ["finished", "rolled_back", "waiting", "running"].map(left);
        Found {
            found: whole.into(),
        }
        .judge()
        .unwrap();
    }
}
