//! `disk sync`, `disk diff` and `disk verify`.

use clap::{Args, Subcommand};

use super::App;
use super::history::Recording;
use super::options::{CompareArgs, DiskArgs, OutputFormat, TransferArgs};
use crate::error::{Error, Result};
use crate::history::Begun;
use crate::output;
use crate::transfer::{self, LiveRead, MethodChoice, Operation, Request};
use crate::vm::LiveChoice;

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
    /// What to do about a source that is in use: refuse, or torn (read it as it is) [default:
    /// refuse]
    #[arg(long, value_name = "auto|refuse|torn")]
    live: Option<LiveChoice>,
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
    let request = match command {
        Command::Sync(sync) => {
            let mut options = sync
                .transfer
                .resolve(&app.config, MethodChoice::Blocksync)?;
            options.live = live(sync.live.unwrap_or_default())?;
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
    transfer_and_report(app, &request).await
}

/// How a disk's source is read. A disk has no VM that could be suspended.
fn live(choice: LiveChoice) -> Result<LiveRead> {
    match choice {
        LiveChoice::Auto | LiveChoice::Refuse => Ok(LiveRead::No),
        LiveChoice::Torn => Ok(LiveRead::Torn),
        LiveChoice::Pause | LiveChoice::Snapshot => Err(Error::usage(
            "--live pause and --live snapshot are for a VM, and a disk is none",
        )
        .hint("use \"clone\" or \"sync\" for a whole VM")),
    }
}

/// Prints the result, also of a failure, to which the figures so far belong.
async fn transfer_and_report(app: &App, request: &Request) -> Result<()> {
    let begun = Begun {
        operation: request.operation.name(),
        vm: None,
        source: request.source.to_string(),
        destination: request.destination.to_string(),
    };
    let recording = Recording::begin(app, &begun);
    let mut result = transfer::run(&app.transfer_context(), request).await;
    recording.end(app, &result);
    for warning in &result.warnings {
        app.warn(warning);
    }
    if result.success || app.format() != OutputFormat::Text {
        output::print(&result, app.format(), || output::transfer_text(&result))?;
    }
    result.error.take().map_or(Ok(()), Err)
}
