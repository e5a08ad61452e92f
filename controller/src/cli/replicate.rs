//! `replicate`: policies, their runs, and what came of them.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use jiff::SignedDuration;
use serde::Serialize;

use super::options::{OutputFormat, TimeLimit};
use super::{App, together};
use crate::endpoint::DiskSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::output;
use crate::replicate::check::{Checked, check};
use crate::replicate::daemon::{self, Said, Surroundings};
use crate::replicate::failover::{How, Replicas, SHUTDOWN_TIMEOUT};
use crate::replicate::policy::{self, Policy, TEMPLATE};
use crate::replicate::run::{VmRun, Which, run as run_policy};
use crate::replicate::status::{VmStatus, status};
use crate::replicate::systemd::{self, Wanted};
use crate::transfer::Context;
use crate::vm::failback::FailbackResult;
use crate::vm::failover::{FailoverResult, Role, Stop};
use crate::vm::network::NetworkConfig;
use crate::vm::point::Point;
use crate::vm::replica;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Write a file of policies, with every key and a comment on each
    Init(File),
    /// Look at the policies and at their hosts, and say what is in the way
    Check(Named),
    /// Make new points of VMs, and remove those that need not stay
    Run(Run),
    /// Make new points as they come due, until it is stopped; SIGHUP has it read the policies again
    Daemon(Daemon),
    /// Write units for systemd: the daemon, or a timer for "run --due"
    Systemd(Systemd),
    /// List the points that there are
    Points(Named),
    /// Say how old the newest points are, against what was promised
    Status(Status),
    /// Have a point stay whatever its policy keeps
    Pin(Pin),
    /// Start VMs from their points, where those are; nothing is replicated over them from then on
    Failover(Box<Failover>),
    /// Bring VMs that run from their replicas back to their source, with what they wrote
    Failback(Failback),
    /// Take back failovers whose VMs are off: they are undefined there, and what they wrote is lost
    Undo(Undo),
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
pub(super) struct Daemon {
    #[command(flatten)]
    file: File,
    /// Keep figures for Prometheus in this file, for the textfile collector of its node exporter
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Systemd {
    #[command(flatten)]
    file: File,
    /// A timer that starts "run --due" each minute, in place of the daemon
    #[arg(long)]
    timer: bool,
    /// The user whose ssh keys reach the hosts
    #[arg(long, value_name = "NAME", default_value = "root")]
    user: String,
    /// Write the units into this directory, such as /etc/systemd/system [default: print them]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Status {
    #[command(flatten)]
    named: Named,
    /// End with exit status 1 when a promise is not kept
    #[arg(long)]
    exit_code: bool,
}

#[derive(Debug, Args)]
pub(super) struct Pin {
    #[command(flatten)]
    file: File,
    /// Policy
    #[arg(value_name = "POLICY")]
    policy: String,
    /// VM
    #[arg(value_name = "VM")]
    vm: String,
    /// Point, as "points" shows it
    #[arg(value_name = "POINT")]
    point: String,
    /// Let it go again
    #[arg(long)]
    off: bool,
}

/// Which replicas are meant.
#[derive(Debug, Args)]
struct Chosen {
    #[command(flatten)]
    file: File,
    /// Policy
    #[arg(value_name = "POLICY", required_unless_present = "from")]
    policy: Option<String>,
    /// Only this VM; may be repeated
    #[arg(long = "vm", value_name = "NAME")]
    vms: Vec<String>,
    /// The replicas in this directory, or the one that it is, whatever has become of source and
    /// policy
    #[arg(long, value_name = "HOST:DIR", conflicts_with = "policy")]
    from: Option<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct Failover {
    #[command(flatten)]
    chosen: Chosen,
    /// The newest points that are not newer than this one [default: the newest]
    #[arg(long, value_name = "POINT")]
    point: Option<String>,
    /// Shut the VMs down at their source first, and make last points: nothing is lost
    #[arg(long, conflicts_with_all = ["from", "point", "source_is_dead"])]
    planned: bool,
    #[command(flatten)]
    stopping: Stopping,
    /// The VMs do not run at their source, and will not: I have made sure of that
    #[arg(long)]
    source_is_dead: bool,
    /// Connect interfaces of network or bridge OLD to NEW; may be repeated
    #[arg(long, value_name = "OLD=NEW")]
    network_map: Vec<String>,
}

/// How guests are shut down.
#[derive(Debug, Args)]
struct Stopping {
    /// How long a guest has to shut down [default: 5m]
    #[arg(long, value_name = "DURATION")]
    shutdown_timeout: Option<TimeLimit>,
    /// Switch a guest off that has not shut down by then
    #[arg(long)]
    force_stop: bool,
}

impl Stopping {
    fn stop(&self) -> Stop {
        let limit = self.shutdown_timeout.as_ref();
        Stop {
            timeout: limit.map_or(SHUTDOWN_TIMEOUT, |TimeLimit(limit)| *limit),
            force: self.force_stop,
        }
    }

    /// Whether anything is said of it.
    fn is_given(&self) -> bool {
        self.shutdown_timeout.is_some() || self.force_stop
    }
}

#[derive(Debug, Args)]
pub(super) struct Failback {
    #[command(flatten)]
    file: File,
    /// Policy
    #[arg(value_name = "POLICY")]
    policy: String,
    /// Only this VM; may be repeated
    #[arg(long = "vm", value_name = "NAME")]
    vms: Vec<String>,
    /// Overwrite what is on the source's disks, and do not keep it as a point first
    #[arg(long)]
    discard_diverged: bool,
    #[command(flatten)]
    stopping: Stopping,
}

#[derive(Debug, Args)]
pub(super) struct Undo {
    #[command(flatten)]
    chosen: Chosen,
}

/// What scripts get.
#[derive(Debug, Serialize)]
struct Report<T> {
    operation: &'static str,
    success: bool,
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
struct Pinned {
    points: Vec<Point>,
}

#[derive(Debug, Serialize)]
struct Started {
    vms: Vec<FailoverResult>,
}

#[derive(Debug, Serialize)]
struct Returned {
    vms: Vec<FailbackResult>,
}

#[derive(Debug, Serialize)]
struct Undone {
    undone: Vec<Role>,
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
        Command::Daemon(args) => daemon(app, &args).await,
        Command::Systemd(args) => systemd(app, &args),
        Command::Points(named) => points(app, &named).await,
        Command::Status(args) => show_status(app, &args).await,
        Command::Pin(args) => pin(app, &args).await,
        Command::Failover(args) => fail_over(app, *args).await,
        Command::Failback(args) => fail_back(app, &args).await,
        Command::Undo(args) => undo(app, &args.chosen).await,
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

impl Chosen {
    /// Looks for them, and gives the policy that they are of.
    async fn find(&self, app: &App, context: &Context) -> Result<(Replicas, Option<Policy>)> {
        if let Some(from) = &self.from {
            let from = DiskSpec::parse(from)?;
            let directory = from.path().and_then(|path| path.to_str()).ok_or_else(|| {
                Error::usage(format!(
                    "--from {from}: expected HOST:DIR with an absolute path"
                ))
            })?;
            let host = from.host.clone();
            let replicas = Replicas::in_directory(context, host, directory, &self.vms).await?;
            return Ok((replicas, None));
        }
        let names: Vec<String> = self.policy.iter().cloned().collect();
        let policy = self.file.load(app, &names)?.into_iter().next();
        let policy = policy.ok_or_else(|| Error::usage("a policy, or --from, is needed"))?;
        let replicas = Replicas::of_policy(context, &policy, &self.vms).await?;
        Ok((replicas, Some(policy)))
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
    let errors = runs.iter().filter_map(|run| {
        let error = run.result.error.as_ref()?;
        Some((format!("{}: {}", run.policy, run.result.vm), error))
    });
    let failed = in_common(errors, runs.len());
    report(app, "replicate-run", Runs { runs }, failed, |what| {
        run_table(&what.runs)
    })
}

async fn daemon(app: &App, args: &Daemon) -> Result<()> {
    let context = || app.quiet_context();
    let say = |said: &Said<'_>| say(app, said);
    daemon::run(&Surroundings {
        connect: app.connect(),
        policies: &args.file.path(app),
        metrics: args.metrics.as_deref(),
        context: &context,
        cancelled: app.cancelled.clone(),
        say: &say,
    })
    .await
}

/// One line for each thing that the daemon says, on standard output what it did.
fn say(app: &App, said: &Said<'_>) {
    let printed = match said {
        Said::Ran(run) => match app.format() {
            OutputFormat::Text => output::to_stdout(format!("{}\n", run_line(run))),
            OutputFormat::Json | OutputFormat::Yaml => {
                let json = serde_json::to_string(run).unwrap_or_default();
                output::to_stdout(format!("{json}\n"))
            }
        },
        Said::Alarm(notice) => {
            let (event, kind) = (notice.event.name(), notice.kind.name());
            let (policy, vm) = (&notice.policy, &notice.vm);
            let text = format!("alarm {event}: {kind}: {policy} {vm}: {}", notice.message);
            output::to_stderr(&format!("{}\n", output::printable(text.trim())));
            Ok(())
        }
        Said::Warning(warning) => {
            app.warn(warning);
            Ok(())
        }
    };
    if let Err(error) = printed {
        tracing::warn!(
            error = error.one_line(),
            "nobody reads what the daemon says"
        );
    }
}

fn run_line(run: &VmRun) -> String {
    let result = &run.result;
    let shipped = result.totals.bytes_wire.map(output::iec);
    let seconds = result.duration_seconds;
    let ended = match (&result.error, &run.point) {
        (Some(error), _) => format!("{}: {}", error.code().name(), error.one_line()),
        (None, Some(point)) => format!("point {point}, {} shipped", shipped.unwrap_or_default()),
        (None, None) => "no point".to_owned(),
    };
    let line = format!("{} {}: {ended}, {seconds:.1} s", run.policy, result.vm);
    output::printable(&line)
}

fn systemd(app: &App, args: &Systemd) -> Result<()> {
    let program = std::env::current_exe();
    let program = program.map_err(|error| Error::io("looking for this program", error))?;
    let policies = args.file.path(app);
    let policies = std::path::absolute(&policies).unwrap_or(policies);
    let wanted = Wanted {
        program: &program,
        policies: &policies,
        config: app.globals.config.as_deref(),
        ssh_config: app.ssh.config.as_deref(),
        user: &args.user,
    };
    let units = match args.timer {
        true => systemd::timer(&wanted)?,
        false => systemd::daemon(&wanted)?,
    };
    let Some(directory) = &args.directory else {
        let all = units
            .iter()
            .map(|unit| format!("# {}\n{}\n", unit.name, unit.text));
        return output::to_stdout(all.collect::<String>());
    };
    for unit in &units {
        let path = directory.join(unit.name);
        let written = std::fs::write(&path, &unit.text);
        written.map_err(|error| Error::io(format!("writing {}", path.display()), error))?;
    }
    let last = units.last().map_or("", |unit| unit.name);
    output::to_stdout(format!(
        "systemctl daemon-reload && systemctl enable --now {last}\n"
    ))
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

async fn look(app: &App, named: &Named) -> Result<Vec<VmStatus>> {
    let context = app.transfer_context();
    let (mut vms, mut warnings) = (Vec::new(), Vec::new());
    for policy in named.file.load(app, &named.names)? {
        vms.extend(status(&context, app.connect(), &policy, &mut warnings).await?);
    }
    for warning in &warnings {
        app.warn(warning);
    }
    Ok(vms)
}

async fn points(app: &App, named: &Named) -> Result<()> {
    let vms = look(app, named).await?;
    report(app, "replicate-points", Vms { vms }, None, |what| {
        point_table(&what.vms)
    })
}

async fn pin(app: &App, args: &Pin) -> Result<()> {
    let policies = args.file.load(app, std::slice::from_ref(&args.policy))?;
    let context = app.transfer_context();
    let mut points = Vec::new();
    for policy in &policies {
        let on = context.host(&policy.destination);
        let directory = policy.directory_of(&args.vm);
        points.push(replica::pin(&on, &directory, &args.point, !args.off).await?);
    }
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

async fn show_status(app: &App, args: &Status) -> Result<()> {
    let vms = look(app, &args.named).await?;
    let not_kept = vms.iter().filter(|vm| !vm.state.is_well()).count();
    let failed = (args.exit_code && not_kept > 0).then(|| {
        let message = format!("of {not_kept} of {} VMs the promise is not kept", vms.len());
        Error::new(ErrorCode::Partial, message)
    });
    report(app, "replicate-status", Vms { vms }, failed, |what| {
        status_table(&what.vms)
    })
}

async fn fail_over(app: &App, args: Failover) -> Result<()> {
    let mut network = NetworkConfig::default();
    for rule in &args.network_map {
        network.add(rule)?;
    }
    if args.stopping.is_given() && !args.planned {
        let message =
            "--shutdown-timeout and --force-stop are about the source of a planned failover";
        return Err(Error::usage(message).hint("add --planned, or leave them out"));
    }
    let how = How {
        point: args.point,
        source_is_dead: args.source_is_dead,
        network,
        planned: args.planned.then(|| args.stopping.stop()),
    };
    let context = app.transfer_context();
    let (replicas, policy) = args.chosen.find(app, &context).await?;
    let vms = replicas
        .start(&context, app.connect(), policy.as_ref(), &how)
        .await;
    for vm in &vms {
        for warning in &vm.warnings {
            app.warn(&format!("{}: {warning}", vm.vm));
        }
    }
    let errors = vms
        .iter()
        .filter_map(|vm| Some((vm.vm.clone(), vm.error.as_ref()?)));
    let failed = in_common(errors, vms.len());
    report(app, "replicate-failover", Started { vms }, failed, |what| {
        let mut table = output::table(&["VM", "point", "age", "time", "result"]);
        for vm in &what.vms {
            table.add_row([
                output::printable(&vm.vm),
                vm.point.clone().unwrap_or_default(),
                vm.age_seconds.map(span).unwrap_or_default(),
                format!("{:.1} s", vm.duration_seconds),
                vm.error
                    .as_ref()
                    .map_or("running", |error| error.code().name())
                    .to_owned(),
            ]);
        }
        output::table_text(&table)
    })
}

async fn fail_back(app: &App, args: &Failback) -> Result<()> {
    let policies = args.file.load(app, std::slice::from_ref(&args.policy))?;
    let context = app.transfer_context();
    let (stop, discards) = (args.stopping.stop(), args.discard_diverged);
    let mut vms = Vec::new();
    for policy in &policies {
        let replicas = Replicas::of_policy(&context, policy, &args.vms).await?;
        let back = replicas.bring_back(&context, app.connect(), policy, stop, discards);
        vms.extend(back.await);
    }
    for vm in &vms {
        for warning in &vm.warnings {
            app.warn(&format!("{}: {warning}", vm.vm));
        }
    }
    let errors = vms
        .iter()
        .filter_map(|vm| Some((vm.vm.clone(), vm.error.as_ref()?)));
    let failed = in_common(errors, vms.len());
    report(
        app,
        "replicate-failback",
        Returned { vms },
        failed,
        |what| {
            let mut table = output::table(&["VM", "kept", "shipped", "down", "time", "result"]);
            for vm in &what.vms {
                let down = vm.down_seconds.map(|seconds| format!("{seconds:.1} s"));
                table.add_row([
                    output::printable(&vm.vm),
                    vm.kept.clone().unwrap_or_default(),
                    output::iec(vm.bytes_wire),
                    down.unwrap_or_default(),
                    format!("{:.1} s", vm.duration_seconds),
                    vm.error
                        .as_ref()
                        .map_or("running", |error| error.code().name())
                        .to_owned(),
                ]);
            }
            output::table_text(&table)
        },
    )
}

async fn undo(app: &App, chosen: &Chosen) -> Result<()> {
    let context = app.transfer_context();
    let (replicas, _) = chosen.find(app, &context).await?;
    let undone = replicas.undo(&context, app.connect()).await?;
    report(app, "replicate-undo", Undone { undone }, None, |what| {
        let lines = what.undone.iter();
        let lines = lines.map(|role| format!("{} follows {} again\n", role.vm, role.source));
        let text: String = lines.collect();
        match text.is_empty() {
            true => "nothing is live\n".to_owned(),
            false => text,
        }
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
    let mut table = output::table(&[
        "policy",
        "VM",
        "newest point",
        "age",
        "RPO",
        "points",
        "state",
    ]);
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
