//! `replicate`: policies, their runs, and what came of them.

use std::io::Write as _;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use jiff::SignedDuration;
use serde::Serialize;

use super::App;
use crate::error::{Error, ErrorCode, Result};
use crate::output;
use crate::replicate::check::{Checked, check};
use crate::replicate::policy::{self, Policy, TEMPLATE};
use crate::replicate::run::{VmRun, Which, run as run_policy};
use crate::replicate::status::{State, VmStatus, status};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Write a file of policies, with every key and a comment on each
    Init(File),
    /// Look at the policies and at their hosts, and say what is in the way
    Check(Named),
    /// Make new points of VMs, and remove those that need not stay
    Run(Run),
    /// List the points that there are
    Points(Named),
    /// Say how old the newest points are, against what was promised
    Status(Status),
}

/// The file of policies.
#[derive(Debug, Args)]
pub(super) struct File {
    /// File of policies [default: replication.toml beside the configuration file]
    #[arg(long, value_name = "FILE")]
    policies: Option<PathBuf>,
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

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true))]
pub(super) struct Run {
    #[command(flatten)]
    file: File,
    /// Policies
    #[arg(value_name = "POLICY", group = "which")]
    names: Vec<String>,
    /// All policies
    #[arg(long, group = "which", conflicts_with = "names")]
    all: bool,
    /// Only VMs of which a point is due by the schedule of their policy; of all policies, unless
    /// some are named
    #[arg(long, group = "which")]
    due: bool,
}

#[derive(Debug, Args)]
pub(super) struct Status {
    #[command(flatten)]
    named: Named,
    /// End with exit status 1 when a promise is not kept
    #[arg(long)]
    exit_code: bool,
}

/// What scripts get.
#[derive(Debug, Serialize)]
struct Report<T> {
    operation: &'static str,
    success: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Error>,
    #[serde(flatten)]
    what: T,
}

#[derive(Debug, Serialize)]
struct Runs {
    runs: Vec<VmRun>,
}

#[derive(Debug, Serialize)]
struct Policies {
    policies: Vec<Checked>,
}

#[derive(Debug, Serialize)]
struct Vms {
    vms: Vec<VmStatus>,
}

pub(super) async fn run(app: &App, command: Command) -> Result<()> {
    match command {
        Command::Init(file) => init(&file.path(app)),
        Command::Check(named) => check_policies(app, &named).await,
        Command::Run(args) => run_policies(app, args).await,
        Command::Points(named) => points(app, &named).await,
        Command::Status(args) => show_status(app, &args).await,
    }
}

impl File {
    fn path(&self, app: &App) -> PathBuf {
        let beside = || app.config_file.path().with_file_name("replication.toml");
        self.policies.clone().unwrap_or_else(beside)
    }

    /// Those of these names; all, without any.
    fn load(&self, app: &App, names: &[String]) -> Result<Vec<Policy>> {
        let path = self.path(app);
        let all = policy::load(&path)?;
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

fn init(path: &std::path::Path) -> Result<()> {
    let shown = path.display();
    if let Some(directory) = path.parent() {
        let made = std::fs::create_dir_all(directory);
        made.map_err(|error| Error::io(format!("making {}", directory.display()), error))?;
    }
    let file = std::fs::File::create_new(path);
    let mut file = file.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::new(ErrorCode::Refused, format!("{shown} is there already"))
                .hint("edit it, or choose another with --policies")
        }
        _ => Error::io(format!("making {shown}"), error),
    })?;
    let written = file.write_all(TEMPLATE.as_bytes());
    written.map_err(|error| Error::io(format!("writing {shown}"), error))?;
    output::to_stdout(format!("{shown}\n"))
}

async fn check_policies(app: &App, named: &Named) -> Result<()> {
    let policies = named.file.load(app, &named.names)?;
    let context = app.transfer_context();
    let (mut all, mut failed) = (Vec::new(), None);
    for policy in &policies {
        match check(&context, app.connect(), policy).await {
            Ok(checked) => all.push(checked),
            Err(error) => {
                failed.get_or_insert_with(|| error.context(format!("policy {}", policy.name)));
            }
        }
    }
    let found = all.iter().find_map(|checked| {
        let first = checked.obstacles.first()?;
        let message = format!("policy {}: {}", checked.policy, first.message);
        Some(Error::new(first.code, message).hint(&first.hint))
    });
    let what = Policies { policies: all };
    report(app, "replicate-check", what, failed.or(found), |what| {
        let mut text = String::new();
        for checked in &what.policies {
            let (policy, vms) = (&checked.policy, checked.vms.join(", "));
            text += &format!("{policy}: {vms}\n");
            for obstacle in &checked.obstacles {
                text += &format!("  {}\n     -> {}\n", obstacle.message, obstacle.hint);
            }
        }
        text
    })
}

async fn run_policies(app: &App, args: Run) -> Result<()> {
    let policies = args.file.load(app, &args.names)?;
    let which = match args.due {
        true => Which::Due,
        false => Which::All,
    };
    let context = app.transfer_context();
    let mut runs = Vec::new();
    for policy in &policies {
        runs.extend(run_policy(&context, app.connect(), policy, which).await);
    }
    for run in &runs {
        for warning in &run.result.warnings {
            app.warn(&format!("{}: {warning}", run.result.vm));
        }
    }
    let failed = first_failure(&runs);
    report(app, "replicate-run", Runs { runs }, failed, |what| {
        run_table(&what.runs)
    })
}

/// One error for all VMs that failed.
fn first_failure(runs: &[VmRun]) -> Option<Error> {
    let errors = runs.iter().filter_map(|run| {
        let error = run.result.error.as_ref()?;
        Some(
            error
                .like()
                .context(format!("{}: {}", run.policy, run.result.vm)),
        )
    });
    let mut errors: Vec<Error> = errors.collect();
    match errors.len() {
        0 => None,
        1 if runs.len() == 1 => errors.pop(),
        failed => {
            let each: Vec<String> = errors.iter().map(Error::one_line).collect();
            let message = format!("{failed} of {} VMs failed", runs.len());
            Some(Error::new(ErrorCode::Partial, message).caused_by(each.join("\n  ")))
        }
    }
}

async fn look(app: &App, named: &Named) -> Result<(Vec<VmStatus>, Vec<String>)> {
    let context = app.transfer_context();
    let (mut vms, mut warnings) = (Vec::new(), Vec::new());
    for policy in named.file.load(app, &named.names)? {
        vms.extend(status(&context, app.connect(), &policy, &mut warnings).await?);
    }
    for warning in &warnings {
        app.warn(warning);
    }
    Ok((vms, warnings))
}

async fn points(app: &App, named: &Named) -> Result<()> {
    let (vms, _) = look(app, named).await?;
    report(app, "replicate-points", Vms { vms }, None, |what| {
        point_table(&what.vms)
    })
}

async fn show_status(app: &App, args: &Status) -> Result<()> {
    let (vms, _) = look(app, &args.named).await?;
    let not_kept = vms.iter().filter(|vm| vm.state != State::Kept).count();
    let failed = (args.exit_code && not_kept > 0).then(|| {
        let message = format!("of {not_kept} of {} VMs the promise is not kept", vms.len());
        Error::new(ErrorCode::Partial, message)
    });
    report(app, "replicate-status", Vms { vms }, failed, |what| {
        status_table(&what.vms)
    })
}

/// Prints the answer, also of a failure, and ends with that.
fn report<T: Serialize>(
    app: &App,
    operation: &'static str,
    what: T,
    error: Option<Error>,
    text: impl FnOnce(&T) -> String,
) -> Result<()> {
    let mut report = Report {
        operation,
        success: error.is_none(),
        warnings: Vec::new(),
        error,
        what,
    };
    output::print(&report, app.format(), || text(&report.what))?;
    report.error.take().map_or(Ok(()), Err)
}

fn run_table(runs: &[VmRun]) -> String {
    if runs.is_empty() {
        return "nothing is due\n".to_owned();
    }
    let header = [
        "policy", "VM", "point", "shipped", "time", "removed", "result",
    ];
    let mut table = output::table(&header);
    for run in runs {
        let result = &run.result;
        let ended = match &result.error {
            None => result
                .consistency
                .map_or("off", |consistency| consistency.name()),
            Some(error) => error.code().name(),
        };
        table.add_row([
            run.policy.clone(),
            output::printable(&result.vm),
            run.point.clone().unwrap_or_default(),
            result
                .totals
                .bytes_wire
                .map(output::iec)
                .unwrap_or_default(),
            format!("{:.1} s", result.duration_seconds),
            run.removed.len().to_string(),
            ended.to_owned(),
        ]);
    }
    output::table_text(&table)
}

fn point_table(vms: &[VmStatus]) -> String {
    let mut table = output::table(&["policy", "VM", "point", "consistency", "directory"]);
    for vm in vms {
        for point in &vm.points {
            table.add_row([
                vm.policy.clone(),
                output::printable(&vm.vm),
                point.name.clone(),
                point.manifest.consistency.name().to_owned(),
                point.path.clone(),
            ]);
        }
    }
    output::table_text(&table)
}

fn status_table(vms: &[VmStatus]) -> String {
    let mut table = output::table(&[
        "policy",
        "VM",
        "newest point",
        "age",
        "RPO",
        "points",
        "state",
    ]);
    let span = |seconds: i64| format!("{:#}", SignedDuration::from_secs(seconds));
    for vm in vms {
        let newest = vm.points.last().map(|point| point.name.clone());
        table.add_row([
            vm.policy.clone(),
            output::printable(&vm.vm),
            newest.unwrap_or_default(),
            vm.age_seconds.map(span).unwrap_or_default(),
            span(vm.rpo_seconds),
            vm.points.len().to_string(),
            vm.state.name().to_owned(),
        ]);
    }
    output::table_text(&table)
}
