//! `replicate test`, `verify`, `restore`, `failover`, `failback`, `commit` and `undo`: VMs that run from their replicas.

use std::ffi::{OsStr, OsString};

use clap::Args;
use serde::Serialize;

use super::{App, File, OfPolicy, ended, report, result_of, span};
use crate::cli::options::TimeLimit;
use crate::endpoint::{DiskSpec, HostSpec};
use crate::error::{Error, Result};
use crate::output;
use crate::replicate::failover::{How, Replicas, SHUTDOWN_TIMEOUT};
use crate::replicate::policy::Policy;
use crate::transfer::Context;
use crate::vm::audit::{AuditResult, Audited};
use crate::vm::failback::FailbackResult;
use crate::vm::failover::{Committed, FailoverResult, Role, Stop};
use crate::vm::mount::{self, MountRequest, Mounted};
use crate::vm::network::NetworkConfig;
use crate::vm::rehearsal::{RehearsalResult, Sign};
use crate::vm::replica::ReplicaRequest;
use crate::vm::restore::{self, RestoreRequest, RestoreResult};

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

/// Replicas of a policy, which has to be there.
#[derive(Debug, Args)]
struct Replicated {
    #[command(flatten)]
    file: File,
    /// Policy
    #[arg(value_name = "POLICY")]
    policy: String,
    /// Only this VM; may be repeated
    #[arg(long = "vm", value_name = "NAME")]
    vms: Vec<String>,
}

impl Replicated {
    async fn find(&self, app: &App, context: &Context) -> Result<(Policy, Replicas)> {
        let policy = self.file.one(app, &self.policy)?;
        let replicas = Replicas::of_policy(context, &policy, &self.vms).await?;
        Ok((policy, replicas))
    }
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Failover {
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

#[derive(Debug, Args)]
pub(in crate::cli) struct Test {
    #[command(flatten)]
    of: Replicated,
    /// The newest points that are not newer than this one [default: the newest]
    #[arg(long, value_name = "POINT")]
    point: Option<String>,
    /// How long a guest has to show a sign of life
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    limit: TimeLimit,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Restore {
    #[command(flatten)]
    of: OfPolicy,
    /// Where its files go; none of them may be there
    #[arg(value_name = "HOST:DIR")]
    to: OsString,
    /// The newest point that is not newer than this one [default: the newest]
    #[arg(long, value_name = "POINT")]
    point: Option<String>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Verify {
    #[command(flatten)]
    of: Replicated,
    /// The newest points that are not newer than this one [default: the newest]
    #[arg(long, value_name = "POINT")]
    point: Option<String>,
    /// All points
    #[arg(long, conflicts_with = "point")]
    all: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Mount {
    #[command(flatten)]
    of: OfPolicy,
    /// The newest point that is not newer than this one [default: the newest]
    #[arg(long, value_name = "POINT")]
    point: Option<String>,
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
pub(in crate::cli) struct Failback {
    #[command(flatten)]
    of: Replicated,
    /// Overwrite what is on the source's disks, and do not keep it as a point first
    #[arg(long)]
    discard_diverged: bool,
    #[command(flatten)]
    stopping: Stopping,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Commit {
    #[command(flatten)]
    chosen: Chosen,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Undo {
    #[command(flatten)]
    chosen: Chosen,
}

#[derive(Debug, Serialize)]
struct Started {
    vms: Vec<FailoverResult>,
}

#[derive(Debug, Serialize)]
struct Restored {
    vms: Vec<RestoreResult>,
}

#[derive(Debug, Serialize)]
struct Tested {
    vms: Vec<RehearsalResult>,
}

#[derive(Debug, Serialize)]
struct Verified {
    vms: Vec<AuditResult>,
}

#[derive(Debug, Serialize)]
struct Returned {
    vms: Vec<FailbackResult>,
}

#[derive(Debug, Serialize)]
struct Final {
    committed: Vec<Committed>,
}

#[derive(Debug, Serialize)]
struct Undone {
    undone: Vec<Role>,
}

impl Chosen {
    /// Looks for them, and gives the policy that they are of.
    async fn find(&self, app: &App, context: &Context) -> Result<(Replicas, Option<Policy>)> {
        if let Some(from) = &self.from {
            let (host, directory) = host_and_directory(from)?;
            let replicas =
                Replicas::in_directory(context, app.connect(), host, &directory, &self.vms).await?;
            return Ok((replicas, None));
        }
        let name = self.policy.as_ref();
        let name = name.ok_or_else(|| Error::usage("a policy, or --from, is needed"))?;
        let policy = self.file.one(app, name)?;
        let replicas = Replicas::of_policy(context, &policy, &self.vms).await?;
        Ok((replicas, Some(policy)))
    }
}

pub(super) async fn test(app: &App, args: &Test) -> Result<()> {
    let context = app.transfer_context();
    let (policy, replicas) = args.of.find(app, &context).await?;
    let (point, TimeLimit(limit)) = (args.point.as_deref(), args.limit);
    let tested = replicas.rehearse(&context, app.connect(), &policy, point, limit);
    let vms = tested.await;
    let failed = ended(app, vms.iter().map(|vm| &vm.outcome));
    report(app, "replicate-test", Tested { vms }, failed, |what| {
        let header = ["VM", "point", "loses", "takes", "sign of life", "result"];
        let mut table = output::table(&header);
        for vm in &what.vms {
            let seconds = |seconds: Option<f64>| seconds.map(|seconds| format!("{seconds:.1} s"));
            table.add_row([
                output::printable(&vm.outcome.vm),
                vm.point.clone().unwrap_or_default(),
                seconds(vm.rpo_seconds).unwrap_or_default(),
                seconds(vm.rto_seconds).unwrap_or_default(),
                vm.sign.map_or("", Sign::name).to_owned(),
                result_of(&vm.outcome, "well"),
            ]);
        }
        output::table_text(&table)
    })
}

pub(super) async fn verify(app: &App, args: Verify) -> Result<()> {
    let context = app.transfer_context();
    let (policy, replicas) = args.of.find(app, &context).await?;
    let points = match args.point {
        _ if args.all => Audited::All,
        Some(point) => Audited::NotAfter(point),
        None => Audited::Newest,
    };
    let vms = replicas
        .audit(&context, app.connect(), &policy, &points)
        .await;
    let failed = ended(app, vms.iter().map(|vm| &vm.outcome));
    report(app, "replicate-verify", Verified { vms }, failed, |what| {
        let mut table = output::table(&["VM", "point", "disks", "result"]);
        for vm in &what.vms {
            for point in &vm.points {
                let differ = point.differ.join(", ");
                table.add_row([
                    output::printable(&vm.outcome.vm),
                    point.point.clone(),
                    output::iec(point.bytes_total),
                    match differ.is_empty() {
                        true => "as it was made".to_owned(),
                        false => format!("{differ}: not what was made"),
                    },
                ]);
            }
        }
        output::table_text(&table)
    })
}

pub(super) async fn fail_over(app: &App, args: Failover) -> Result<()> {
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
    let failed = ended(app, vms.iter().map(|vm| &vm.outcome));
    report(app, "replicate-failover", Started { vms }, failed, |what| {
        let mut table = output::table(&["VM", "point", "age", "time", "result"]);
        for vm in &what.vms {
            table.add_row([
                output::printable(&vm.outcome.vm),
                vm.point.clone().unwrap_or_default(),
                vm.age_seconds.map(span).unwrap_or_default(),
                format!("{:.1} s", vm.outcome.duration_seconds),
                result_of(&vm.outcome, "running"),
            ]);
        }
        output::table_text(&table)
    })
}

pub(super) async fn fail_back(app: &App, args: &Failback) -> Result<()> {
    let context = app.transfer_context();
    let (policy, replicas) = args.of.find(app, &context).await?;
    let (stop, discards) = (args.stopping.stop(), args.discard_diverged);
    let back = replicas.bring_back(&context, app.connect(), &policy, stop, discards);
    let vms = back.await;
    let failed = ended(app, vms.iter().map(|vm| &vm.outcome));
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
                    output::printable(&vm.outcome.vm),
                    vm.kept.clone().unwrap_or_default(),
                    output::iec(vm.bytes_wire),
                    down.unwrap_or_default(),
                    format!("{:.1} s", vm.outcome.duration_seconds),
                    result_of(&vm.outcome, "running"),
                ]);
            }
            output::table_text(&table)
        },
    )
}

pub(super) async fn commit(app: &App, args: &Commit) -> Result<()> {
    let context = app.transfer_context();
    let (replicas, _) = args.chosen.find(app, &context).await?;
    let committed = replicas.commit(&context, app.connect()).await?;
    let what = Final { committed };
    report(app, "replicate-commit", what, None, |what| {
        let all = what.committed.iter();
        let lines = all.map(|each| {
            let Committed { vm, point, removed } = each;
            format!(
                "{vm} stays with {point}; {} newer points removed\n",
                removed.len()
            )
        });
        some_or_nothing(lines.collect())
    })
}

/// `HOST:DIR` as the two.
fn host_and_directory(text: &OsStr) -> Result<(HostSpec, String)> {
    let spec = DiskSpec::parse(text)?;
    let directory = spec.path().and_then(|path| path.to_str());
    match directory {
        Some(directory) => Ok((spec.host.clone(), directory.to_owned())),
        None => Err(Error::usage(format!(
            "{spec}: expected HOST:DIR with an absolute path"
        ))),
    }
}

pub(super) async fn restore(app: &App, args: &Restore) -> Result<()> {
    let (policy, vm) = (args.of.load(app)?, &args.of.vm);
    let (to, to_directory) = host_and_directory(&args.to)?;
    // From where, and how fast just now, is what a run would say.
    let ReplicaRequest {
        destination,
        directory,
        bandwidth_limit,
        ..
    } = policy.request(vm);
    let request = RestoreRequest {
        from: destination,
        directory,
        point: args.point.clone(),
        to,
        to_directory,
        bandwidth_limit,
    };
    let context = app.transfer_context();
    let restored = restore::restore(&context, app.connect(), vm, &request).await;
    let vms = vec![restored];
    let failed = ended(app, vms.iter().map(|vm| &vm.outcome));
    report(app, "replicate-restore", Restored { vms }, failed, |what| {
        let mut table = output::table(&["VM", "point", "directory", "shipped", "result"]);
        for vm in &what.vms {
            table.add_row([
                output::printable(&vm.outcome.vm),
                vm.point.clone().unwrap_or_default(),
                vm.directory.clone(),
                vm.totals.bytes_wire.map(output::iec).unwrap_or_default(),
                result_of(&vm.outcome, "there"),
            ]);
        }
        output::table_text(&table)
    })
}

pub(super) async fn mount(app: &App, args: &Mount) -> Result<()> {
    let (policy, vm) = (args.of.load(app)?, &args.of.vm);
    let request = MountRequest {
        on: policy.destination.clone(),
        directory: policy.directory_of(vm),
        point: args.point.clone(),
    };
    let context = app.transfer_context();
    let told = |what| report(app, "replicate-mount", what, None, mounted_text);
    mount::mount(&context, app.connect(), &request, told).await
}

fn mounted_text(what: &Mounted) -> String {
    let Mounted {
        vm,
        point,
        directory,
        file_systems,
    } = what;
    let mut table = output::table(&["file system", "type", "directory"]);
    for found in file_systems {
        let path = found.path.clone();
        table.add_row([
            found.name.clone(),
            output::printable(&found.kind),
            path.unwrap_or_else(|| "not known to this host".to_owned()),
        ]);
    }
    let vm = output::printable(vm);
    format!(
        "{}{vm} of {point}, each disk as {directory}/DISK.raw, until Ctrl-C\n",
        output::table_text(&table)
    )
}

/// What was done, if anything was.
fn some_or_nothing(text: String) -> String {
    match text.is_empty() {
        true => "nothing is live\n".to_owned(),
        false => text,
    }
}

pub(super) async fn undo(app: &App, args: &Undo) -> Result<()> {
    let context = app.transfer_context();
    let (replicas, _) = args.chosen.find(app, &context).await?;
    let undone = replicas.undo(&context, app.connect()).await?;
    report(app, "replicate-undo", Undone { undone }, None, |what| {
        let lines = what.undone.iter();
        let lines = lines.map(|role| format!("{} follows {} again\n", role.vm, role.source));
        some_or_nothing(lines.collect())
    })
}
