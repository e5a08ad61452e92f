//! `disk sync`, `disk diff` and `disk verify`.

use clap::{Args, Subcommand};

use super::App;
use super::history::Recording;
use super::options::{CompareArgs, DiskArgs, OutputFormat, TransferArgs};
use crate::error::Result;
use crate::history::Begun;
use crate::output;
use crate::transfer::{MethodChoice, Operation, Request};
use crate::vm::{LiveChoice, Quiesce, disk};

/// What can be done with two disks.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make DST_DISK hold what SRC_DISK holds
    Sync(Sync),
    /// Say how much a sync would ship; writes nothing
    Diff(Compare),
    /// Say whether both disks are equal; reads both and writes nothing
    Verify(Compare),
}

#[derive(Debug, Args)]
pub(super) struct Sync {
    #[command(flatten)]
    disks: DiskArgs,
    /// What to do about a source that a running VM writes to: snapshot (QEMU shows it as it is at one
    /// instant), pause (the VM is suspended meanwhile), refuse or torn (read it as it is) [default:
    /// auto, which is snapshot]
    #[arg(long, value_name = "auto|refuse|pause|snapshot|torn")]
    live: Option<LiveChoice>,
    /// Whether the guest's file systems are frozen at the instant of a snapshot: auto (if the guest
    /// agent answers), require or off [default: auto]
    #[arg(long, value_name = "auto|require|off")]
    quiesce: Option<Quiesce>,
    #[command(flatten)]
    transfer: TransferArgs,
}

#[derive(Debug, Args)]
pub(super) struct Compare {
    #[command(flatten)]
    disks: DiskArgs,
    #[command(flatten)]
    compare: CompareArgs,
}

pub(super) async fn run(app: &App, command: Command) -> Result<()> {
    let mut how = (LiveChoice::Refuse, Quiesce::default());
    let request = match command {
        Command::Sync(sync) => {
            let options = sync
                .transfer
                .resolve(&app.config, MethodChoice::Blocksync)?;
            how = (
                sync.live.unwrap_or_default(),
                sync.quiesce.unwrap_or_default(),
            );
            sync.disks
                .request(Operation::Sync, options, sync.transfer.dry_run)?
        }
        Command::Diff(diff) => {
            diff.disks
                .request(Operation::Diff, diff.compare.resolve(&app.config), false)?
        }
        Command::Verify(verify) => verify.disks.request(
            Operation::Verify,
            verify.compare.resolve(&app.config),
            false,
        )?,
    };
    transfer_and_report(app, &request, how).await
}

/// Prints the result, also of a failure, to which the figures so far belong.
async fn transfer_and_report(
    app: &App,
    request: &Request,
    (live, quiesce): (LiveChoice, Quiesce),
) -> Result<()> {
    let begun = Begun {
        operation: request.operation.name(),
        vm: None,
        source: request.source.to_string(),
        destination: request.destination.to_string(),
    };
    let recording = Recording::begin(app, &begun);
    let context = app.transfer_context();
    let mut result = disk::sync(&context, app.connect(), request, live, quiesce).await;
    recording.end(app, &result);
    for warning in &result.warnings {
        app.warn(warning);
    }
    if result.success || app.format() != OutputFormat::Text {
        output::print(&result, app.format(), || output::transfer_text(&result))?;
    }
    result.error.take().map_or(Ok(()), Err)
}
