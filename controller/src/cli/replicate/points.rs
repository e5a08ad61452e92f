//! `replicate status`, `points`, `report`, `pin`, `accept` and `remove`: what there is, how old it
//! is, and what stays of it.

use std::path::PathBuf;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{App, Named, OfPolicy, report, span};
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;
use crate::output;
use crate::replicate::policy::Policy;
use crate::replicate::report as page;
use crate::replicate::status::{LastRun, LastRuns, State, VmStatus, last_runs, status};
use crate::vm::doubt::{self, Doubt};
use crate::vm::point::Point;
use crate::vm::replica;

#[derive(Debug, Args)]
pub(in crate::cli) struct Status {
    #[command(flatten)]
    named: Named,
    /// End with exit status 1 when a promise is not kept
    #[arg(long)]
    exit_code: bool,
    /// Print one line, and end with 0 to 3, as Nagios and Icinga expect of a plugin
    #[arg(long, conflicts_with = "exit_code")]
    nagios: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Report {
    #[command(flatten)]
    named: Named,
    /// Write the page to this file
    #[arg(long, value_name = "FILE", default_value = "replication.html")]
    to: PathBuf,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Pin {
    #[command(flatten)]
    of: OfPolicy,
    /// Point, as "points" shows it
    #[arg(value_name = "POINT")]
    point: String,
    /// Let it go again
    #[arg(long)]
    off: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Accept {
    #[command(flatten)]
    of: OfPolicy,
}

#[derive(Debug, Serialize)]
struct Accepted {
    doubts: Vec<Doubt>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Remove {
    #[command(flatten)]
    of: OfPolicy,
    /// Points that are to stay go as well
    #[arg(long)]
    pinned: bool,
}

#[derive(Debug, Serialize)]
struct Removed {
    points: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Pinned {
    points: Vec<Point>,
}

#[derive(Debug, Serialize)]
struct Written {
    file: String,
}

#[derive(Debug, Serialize)]
struct Vms {
    vms: Vec<VmStatus>,
}

async fn look(app: &App, policies: &[Policy]) -> Result<Vec<VmStatus>> {
    let context = app.transfer_context();
    let (mut vms, mut warnings) = (Vec::new(), Vec::new());
    let last = last_runs().unwrap_or_else(|error| {
        warnings.push(error.one_line());
        LastRuns::new()
    });
    for policy in policies {
        vms.extend(status(&context, app.connect(), policy, &last, &mut warnings).await?);
    }
    for warning in &warnings {
        app.warn(warning);
    }
    Ok(vms)
}

pub(super) async fn points(app: &App, named: &Named) -> Result<()> {
    let vms = look(app, &named.load(app)?).await?;
    report(app, "replicate-points", Vms { vms }, None, |what| {
        point_table(&what.vms)
    })
}

pub(super) async fn pin(app: &App, args: &Pin) -> Result<()> {
    let policy = args.of.load(app)?;
    let on = app.transfer_context().host(&policy.destination);
    let directory = policy.directory_of(&args.of.vm);
    let pinned = replica::pin(&on, &directory, &args.point, !args.off).await?;
    let points = vec![pinned];
    report(app, "replicate-pin", Pinned { points }, None, |what| {
        let points = what.points.iter();
        let said = points.map(|point| match point.pinned {
            true => format!("{} of {} stays\n", point.name, point.manifest.vm),
            false => format!(
                "{} of {} goes when its time comes\n",
                point.name, point.manifest.vm
            ),
        });
        said.collect()
    })
}

pub(super) async fn accept(app: &App, args: &Accept) -> Result<()> {
    let policy = args.of.load(app)?;
    let on = app.transfer_context().host(&policy.destination);
    let on = Hypervisor::new(on, app.connect());
    let accepted = doubt::accept(&on, &policy.directory_of(&args.of.vm)).await?;
    let doubts: Vec<Doubt> = accepted.into_iter().collect();
    report(app, "replicate-accept", Accepted { doubts }, None, |what| {
        let doubts = what.doubts.iter();
        let lines = doubts.map(|doubt| format!("accepted since {}: {}\n", doubt.point, doubt.why));
        let text: String = lines.collect();
        match text.is_empty() {
            true => "nothing is in doubt\n".to_owned(),
            false => text,
        }
    })
}

pub(super) async fn remove(app: &App, args: &Remove) -> Result<()> {
    let (policy, vm) = (args.of.load(app)?, &args.of.vm);
    let context = app.transfer_context();
    let source = Hypervisor::new(context.host(&policy.source), app.connect());
    if policy.is_about(vm) {
        let there = source.find_domain(vm).await?;
        if there.is_some_and(|domain| domain.definition.name() == vm) {
            let name = &policy.name;
            let message = format!("{vm} is on {}, and {name} is about it", policy.source);
            let hint = format!("exclude it from {name} first: the replica would be made again");
            return Err(Error::new(ErrorCode::Refused, message).hint(hint));
        }
    }
    let on = Hypervisor::new(context.host(&policy.destination), app.connect());
    let points = replica::remove(&on, &policy.directory_of(vm), args.pinned).await?;
    report(app, "replicate-remove", Removed { points }, None, |what| {
        format!("{} points removed\n", what.points.len())
    })
}

pub(super) async fn show_status(app: &App, args: &Status) -> Result<()> {
    let looked = match args.named.load(app) {
        Ok(policies) => look(app, &policies).await,
        Err(error) => Err(error),
    };
    if args.nagios {
        return nagios(looked);
    }
    let vms = looked?;
    let not_kept = vms.iter().filter(|vm| !vm.state.is_well()).count();
    let failed = (args.exit_code && not_kept > 0).then(|| {
        let message = format!("of {not_kept} of {} VMs the promise is not kept", vms.len());
        Error::new(ErrorCode::Partial, message)
    });
    report(app, "replicate-status", Vms { vms }, failed, |what| {
        status_table(&what.vms)
    })
}

/// The contract of plugins: <https://www.monitoring-plugins.org/doc/guidelines.html>.
fn nagios(vms: Result<Vec<VmStatus>>) -> Result<()> {
    let vms = match vms {
        Ok(vms) => vms,
        Err(error) => {
            let line = output::printable(&error.one_line());
            output::to_stdout(format!("REPLICATION UNKNOWN - {line}\n"))?;
            return Err(error.exiting_with(3));
        }
    };
    let mut ill: Vec<&VmStatus> = vms.iter().filter(|vm| !vm.state.is_well()).collect();
    let is_warning = |vm: &&VmStatus| matches!(vm.state, State::Paused | State::Doubtful);
    ill.sort_by_key(is_warning);
    let (name, status) = match ill.first() {
        None => ("OK", 0),
        Some(first) if is_warning(first) => ("WARNING", 1),
        Some(_) => ("CRITICAL", 2),
    };
    let each = ill.iter().map(|vm| {
        let age = vm.age_seconds.map(|age| format!(" {}", span(age)));
        let (policy, vm_name, state) = (&vm.policy, &vm.vm, vm.state.name());
        format!("; {policy}/{vm_name} {state}{}", age.unwrap_or_default())
    });
    let (well, all) = (vms.len() - ill.len(), vms.len());
    let line = format!(
        "REPLICATION {name} - {well} of {all} as promised{}",
        each.collect::<String>()
    );
    // What is behind the bar is for machines.
    let line = output::printable(&line).replace('|', "?");
    output::to_stdout(format!("{line} | kept={well};;;0;{all}\n"))?;
    match status {
        0 => Ok(()),
        status => {
            let message = format!("{} of {all} promises are not kept", ill.len());
            Err(Error::new(ErrorCode::Partial, message).exiting_with(status))
        }
    }
}

pub(super) async fn write_report(app: &App, args: &Report) -> Result<()> {
    let policies = args.named.load(app)?;
    let vms = look(app, &policies).await?;
    let page = page::Report::new(policies, vms)?.html();
    let file = args.to.display().to_string();
    let written = std::fs::write(&args.to, page);
    written.map_err(|error| Error::io(format!("writing {file}"), error))?;
    report(app, "replicate-report", Written { file }, None, |what| {
        format!("{}\n", what.file)
    })
}

fn point_table(vms: &[VmStatus]) -> String {
    let mut table = output::table(&[
        "policy",
        "VM",
        "point",
        "consistency",
        "pinned",
        "directory",
    ]);
    for vm in vms {
        for point in &vm.points {
            table.add_row([
                vm.policy.clone(),
                output::printable(&vm.vm),
                point.name.clone(),
                point.manifest.consistency.name().to_owned(),
                if point.pinned { "yes" } else { "no" }.to_owned(),
                point.path.clone(),
            ]);
        }
    }
    output::table_text(&table)
}

fn status_table(vms: &[VmStatus]) -> String {
    let header = [
        "policy", "VM", "state", "age", "RPO", "points", "next", "last run",
    ];
    let mut table = output::table(&header);
    for vm in vms {
        table.add_row([
            vm.policy.clone(),
            output::printable(&vm.vm),
            vm.state.name().to_owned(),
            vm.age_seconds.map(span).unwrap_or_default(),
            span(vm.rpo_seconds),
            vm.points.len().to_string(),
            vm.next_run.map(next).unwrap_or_default(),
            vm.last_run.as_ref().map(last).unwrap_or_default(),
        ]);
    }
    output::table_text(&table)
}

/// How long it is until then.
fn next(then: Timestamp) -> String {
    let left = then.duration_since(Timestamp::now()).as_secs();
    match left > 0 {
        true => format!("in {}", span(left)),
        false => "due".to_owned(),
    }
}

fn last(run: &LastRun) -> String {
    let seconds = run.duration_seconds.unwrap_or_default();
    match &run.error {
        None if run.success => {
            let shipped = run.bytes_wire.map(output::iec).unwrap_or_default();
            format!("{shipped} in {seconds:.1} s")
        }
        None => "failed".to_owned(),
        Some(error) => output::printable(error),
    }
}
