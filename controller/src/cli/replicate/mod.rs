//! `replicate`: policies, their runs, and what came of them.

mod failover;
mod points;
mod policies;
mod run;

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use jiff::SignedDuration;
use serde::Serialize;

use super::{App, together};
use crate::error::{Error, ErrorCode, Result};
use crate::output;
use crate::replicate::policy::{self, Policy};
use crate::vm::outcome::Outcome;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Write a file of policies, with every key and a comment on each
    Init(File),
    /// Look at the policies and at their hosts, and say what is in the way
    Check(Named),
    /// Make new points of VMs, and remove those that need not stay
    Run(run::Run),
    /// Make new points as they come due, until it is stopped; SIGHUP has it read the policies again
    Daemon(run::Daemon),
    /// Write units for systemd: the daemon, or a timer for "run --due"
    Systemd(policies::Systemd),
    /// Begin the replica of a VM with images that are on its host already: the first run ships what differs
    Adopt(run::Adopt),
    /// Have nothing replicated by policies, from whichever controller, until "resume"
    Pause(Named),
    /// End the pause of policies
    Resume(Named),
    /// List the points that there are
    Points(Named),
    /// Say how old the newest points are, against what was promised
    Status(points::Status),
    /// Write a page for people: promises kept and missed in thirty days, traffic, tests of failovers
    Report(points::Report),
    /// Have a point stay whatever its policy keeps
    Pin(points::Pin),
    /// Say that a point which is very unlike the one before is right: older ones go again
    Accept(points::Accept),
    /// Remove the replica of a VM that is no longer to have one, with all its points
    Remove(points::Remove),
    /// Bring a point of a VM to a directory of any host: its disks, its definition, its small files
    Restore(failover::Restore),
    /// Read points, and say whether their disks are what they were when they were made
    Verify(failover::Verify),
    /// Show the file systems of a point on its host, read-only, until Ctrl-C
    Mount(failover::Mount),
    /// Boot copies of points where nobody reaches them, and say how long a failover takes and what it loses
    Test(failover::Test),
    /// Start VMs from their points, where those are; nothing is replicated over them from then on
    Failover(Box<failover::Failover>),
    /// Bring VMs that run from their replicas back to their source, with what they wrote
    Failback(failover::Failback),
    /// Make failovers final: points that are newer than those taken go, and there is no undo
    Commit(failover::Commit),
    /// Take back failovers whose VMs are off: they are undefined there, and what they wrote is lost
    Undo(failover::Undo),
}

/// The file of policies.
#[derive(Debug, Args)]
pub(super) struct File {
    /// File of policies [default: replication.toml beside the configuration file]
    #[arg(long, value_name = "FILE")]
    policies: Option<PathBuf>,
}

/// A VM of a policy.
#[derive(Debug, Args)]
pub(super) struct OfPolicy {
    #[command(flatten)]
    file: File,
    /// Policy
    #[arg(value_name = "POLICY")]
    policy: String,
    /// VM
    #[arg(value_name = "VM", value_parser = NonEmptyStringValueParser::new())]
    vm: String,
}

/// Policies of the file.
#[derive(Debug, Args)]
pub(super) struct Named {
    #[command(flatten)]
    file: File,
    /// Policies [default: all]
    #[arg(value_name = "POLICY")]
    names: Vec<String>,
}

/// What scripts get.
#[derive(Debug, Serialize)]
struct Answer<T> {
    operation: &'static str,
    success: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Error>,
    #[serde(flatten)]
    what: T,
}

pub(super) async fn run(app: &App, command: Command) -> Result<()> {
    match command {
        Command::Init(file) => policies::init(&file.path(app)),
        Command::Check(named) => policies::check_policies(app, &named).await,
        Command::Run(args) => run::run_policies(app, args).await,
        Command::Daemon(args) => run::daemon(app, &args).await,
        Command::Systemd(args) => policies::systemd(app, &args),
        Command::Adopt(args) => run::adopt(app, &args).await,
        Command::Pause(named) => policies::pause(app, &named).await,
        Command::Resume(named) => policies::resume(app, &named).await,
        Command::Points(named) => points::points(app, &named).await,
        Command::Status(args) => points::show_status(app, &args).await,
        Command::Report(args) => points::write_report(app, &args).await,
        Command::Pin(args) => points::pin(app, &args).await,
        Command::Accept(args) => points::accept(app, &args).await,
        Command::Remove(args) => points::remove(app, &args).await,
        Command::Restore(args) => failover::restore(app, &args).await,
        Command::Verify(args) => failover::verify(app, args).await,
        Command::Mount(args) => failover::mount(app, &args).await,
        Command::Test(args) => failover::test(app, &args).await,
        Command::Failover(args) => failover::fail_over(app, *args).await,
        Command::Failback(args) => failover::fail_back(app, &args).await,
        Command::Commit(args) => failover::commit(app, &args).await,
        Command::Undo(args) => failover::undo(app, &args).await,
    }
}

impl OfPolicy {
    /// The policy.
    fn load(&self, app: &App) -> Result<Policy> {
        self.file.one(app, &self.policy)
    }
}

impl Named {
    /// The policies.
    fn load(&self, app: &App) -> Result<Vec<Policy>> {
        self.file.load(app, &self.names)
    }
}

impl File {
    fn path(&self, app: &App) -> PathBuf {
        let beside = || app.config_file.path().with_file_name("replication.toml");
        self.policies.clone().unwrap_or_else(beside)
    }

    /// The one of this name.
    fn one(&self, app: &App, name: &str) -> Result<Policy> {
        let names = [name.to_owned()];
        let mut found = self.load(app, &names)?;
        found.pop().ok_or_else(|| {
            let message = format!("policy {name} was there just now");
            Error::new(ErrorCode::Internal, message)
        })
    }

    /// Those of these names; all, without any.
    fn load(&self, app: &App, names: &[String]) -> Result<Vec<Policy>> {
        let path = self.path(app);
        let all = policy::load(&path)?.all;
        for name in names {
            if !all.iter().any(|policy| policy.name == *name) {
                let has: Vec<&str> = all.iter().map(|policy| policy.name.as_str()).collect();
                let message = format!("{} has no policy \"{name}\"", path.display());
                return Err(Error::new(ErrorCode::NotFound, message)
                    .hint(format!("its policies are: {}", has.join(", "))));
            }
        }
        let wanted = |policy: &Policy| names.is_empty() || names.contains(&policy.name);
        Ok(all.into_iter().filter(wanted).collect())
    }
}

/// One error for all VMs of so many that failed.
fn in_common<'a>(failed: impl Iterator<Item = (String, &'a Error)>, vms: usize) -> Option<Error> {
    let failed: Vec<(String, &Error)> = failed.collect();
    let (_, first) = failed.first()?;
    if vms == 1 {
        return Some(first.like());
    }
    Some(together(ErrorCode::Partial, &failed, vms, "VMs"))
}

/// A duration for people.
fn span(seconds: i64) -> String {
    format!("{:#}", SignedDuration::from_secs(seconds))
}

/// Tells all warnings, and gives one error for those that failed.
fn ended<'a>(app: &App, all: impl ExactSizeIterator<Item = &'a Outcome>) -> Option<Error> {
    let vms = all.len();
    let mut failed = Vec::new();
    for outcome in all {
        for warning in &outcome.warnings {
            app.warn(&format!("{}: {warning}", outcome.vm));
        }
        failed.extend(Some(outcome.vm.clone()).zip(outcome.error.as_ref()));
    }
    in_common(failed.into_iter(), vms)
}

fn result_of(outcome: &Outcome, well: &str) -> String {
    let error = outcome.error.as_ref();
    error.map_or(well, |error| error.code().name()).to_owned()
}

/// Prints the answer, also of a failure, and ends with that.
fn report<T: Serialize>(
    app: &App,
    operation: &'static str,
    what: T,
    error: Option<Error>,
    text: impl FnOnce(&T) -> String,
) -> Result<()> {
    let mut report = Answer {
        operation,
        success: error.is_none(),
        error,
        what,
    };
    output::print(&report, app.format(), || text(&report.what))?;
    report.error.take().map_or(Ok(()), Err)
}
