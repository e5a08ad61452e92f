//! `replicate run`, `daemon` and `adopt`: new points, once and for ever, and what the first begins
//! with.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{App, File, OfPolicy, in_common, report};
use crate::cli::options::OutputFormat;
use crate::error::Result;
use crate::libvirt::Hypervisor;
use crate::output;
use crate::replicate::daemon::{self as service, Said, Surroundings};
use crate::replicate::run::{VmRun, Which, run as run_policy};
use crate::vm::seed::{self, Seed};

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true))]
pub(in crate::cli) struct Run {
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
pub(in crate::cli) struct Daemon {
    #[command(flatten)]
    file: File,
    /// Keep figures for Prometheus in this file, for the textfile collector of its node exporter
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Serve them on this address, as http://ADDRESS/metrics: to whoever can reach it
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Adopt {
    #[command(flatten)]
    of: OfPolicy,
    /// A disk of the VM, and its image on the host of the replica, which stays as it is; raw, unless
    /// its format is said
    #[arg(value_name = "TARGET=[FORMAT:]PATH", required = true)]
    seeds: Vec<Seed>,
}

#[derive(Debug, Serialize)]
struct Adopted {
    directory: String,
}

#[derive(Debug, Serialize)]
struct Runs {
    runs: Vec<VmRun>,
}

pub(super) async fn run_policies(app: &App, args: Run) -> Result<()> {
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

pub(super) async fn adopt(app: &App, args: &Adopt) -> Result<()> {
    let policy = args.of.load(app)?;
    let on = app.transfer_context().host(&policy.destination);
    on.share().await?;
    let on = Hypervisor::new(on, app.connect());
    let directory = policy.directory_of(&args.of.vm);
    seed::adopt(&on, &directory, &args.seeds).await?;
    report(
        app,
        "replicate-adopt",
        Adopted { directory },
        None,
        |what| format!("{} begins with these disks\n", what.directory),
    )
}

pub(super) async fn daemon(app: &App, args: &Daemon) -> Result<()> {
    let context = || app.quiet_context();
    let say = |said: &Said<'_>| say(app, said);
    service::run(&Surroundings {
        connect: app.connect(),
        policies: &args.file.path(app),
        metrics: args.metrics.as_deref(),
        listen: args.listen,
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
