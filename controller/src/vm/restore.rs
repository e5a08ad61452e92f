//! A point brought to any directory of any host: its disks, its definition with the disks there, its
//! UEFI variables and TPM state. Nothing is defined, and nothing is overwritten.

use std::num::NonZeroUsize;
use std::time::Instant;

use serde::Serialize;

use super::failover::{choose, definition_of};
use super::naming;
use super::obstacle::{Obstacles, to_error};
use super::outcome::Outcome;
use super::point::{Point, file_of, moved};
use super::replica;
use super::result::Totals;
use super::shown::Shown;
use super::transfers::{Move, Moves};
use crate::endpoint::HostSpec;
use crate::error::Result;
use crate::host::Host;
use crate::libvirt::Hypervisor;
use crate::transfer::{Context, MethodChoice, Operation, Options};

/// How many disks are transferred at once.
const PARALLEL: NonZeroUsize = NonZeroUsize::new(4).expect("four is not zero");

/// Which point is brought where.
#[derive(Debug, Clone)]
pub struct RestoreRequest {
    /// The host that has the replica.
    pub from: HostSpec,
    /// The directory of the replica.
    pub directory: String,
    /// The newest point that is not newer than this one; without it, the newest.
    pub point: Option<String>,
    /// The host that gets it.
    pub to: HostSpec,
    /// Where, there.
    pub to_directory: String,
    /// Bytes a second, of all disks together; `None` for no limit.
    pub bandwidth_limit: Option<u64>,
}

/// What became of it.
#[derive(Debug, Serialize)]
pub struct RestoreResult {
    /// Whether it is there, and what else there is to say.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// Where its files are.
    pub directory: String,
    /// Sums over the disks, each as in a transfer.
    #[serde(flatten)]
    pub totals: Totals,
}

/// Brings a point to a directory. A failure is part of the result.
pub async fn restore(
    context: &Context,
    connect: &str,
    vm: &str,
    request: &RestoreRequest,
) -> RestoreResult {
    let started = Instant::now();
    let mut result = RestoreResult {
        outcome: Outcome::of(vm),
        point: None,
        directory: request.to_directory.clone(),
        totals: Totals::default(),
    };
    let done = Box::pin(bring(context, connect, request, &mut result)).await;
    result.outcome.end(started, done);
    result
}

async fn bring(
    context: &Context,
    connect: &str,
    request: &RestoreRequest,
    result: &mut RestoreResult,
) -> Result<()> {
    let from = Hypervisor::new(context.host(&request.from), connect);
    let to = context.host(&request.to);
    tokio::try_join!(from.host().share(), to.share())?;
    let point = choose(&from, &request.directory, request.point.as_deref()).await?;
    result.point = Some(point.name.clone());
    check(&to, &request.to_directory, &point, result).await?;
    to.make_directory(&request.to_directory, "0711").await?;
    let brought = Box::pin(show_and_copy(context, request, &from, &to, &point, result));
    replica::while_pinned(from.host(), &request.directory, &point, brought).await
}

/// Nothing that is there already is overwritten.
async fn check(
    to: &Host,
    directory: &str,
    point: &Point,
    result: &mut RestoreResult,
) -> Result<()> {
    let names = to.names_in(directory).await?.unwrap_or_default();
    let mut obstacles = Obstacles::default();
    let disks = point
        .manifest
        .disks
        .iter()
        .map(|disk| file_of(&disk.target));
    let others = ["domain.xml", "nvram", "tpm"].map(str::to_owned);
    for file in disks.chain(others) {
        if names.contains(&file) {
            obstacles.refused(
                format!(
                    "{} on {to} is there already",
                    naming::join(directory, &file)
                ),
                "choose another directory",
            );
        }
    }
    let found = obstacles.into_found();
    match to_error(&found, &format!("cannot restore to {directory} on {to}")) {
        None => Ok(()),
        Some(error) => {
            result.outcome.obstacles = found;
            Err(error)
        }
    }
}

/// Copies the files of a point, which is shown meanwhile.
async fn show_and_copy(
    context: &Context,
    request: &RestoreRequest,
    from: &Hypervisor,
    to: &Host,
    point: &Point,
    result: &mut RestoreResult,
) -> Result<()> {
    let shown = Shown::open(from, &request.directory, point).await?;
    let copied = Box::pin(files(context, request, from, to, (point, &shown), result)).await;
    let ended = shown.end().await;
    copied.and(ended)
}

async fn files(
    context: &Context,
    request: &RestoreRequest,
    from: &Hypervisor,
    to: &Host,
    (point, shown): (&Point, &Shown),
    result: &mut RestoreResult,
) -> Result<()> {
    let directory = &request.to_directory;
    let disks = point.manifest.disks.iter().map(|disk| {
        let (source, destination) = (
            point.file(disk),
            naming::join(directory, &file_of(&disk.target)),
        );
        Move {
            read_from: shown.server_of(disk),
            ..Move::of_guest(&disk.target, source, destination)
        }
    });
    let disks: Vec<Move> = disks.collect();
    let moves = Moves {
        operation: Operation::Sync,
        from: request.from.clone(),
        to: request.to.clone(),
        options: Options {
            method: MethodChoice::Blocksync,
            bandwidth_limit: request.bandwidth_limit,
            ..Options::default()
        },
        dry_run: false,
        parallel: PARALLEL,
    };
    let nothing = Box::pin(async { Ok(()) });
    let (disks, done) = moves.run(context, &disks, nothing).await;
    result.totals = Totals::of(&disks);
    done?;
    for name in &point.manifest.small_files {
        let contents = from
            .host()
            .read_file(&naming::join(&point.path, name))
            .await?;
        let path = naming::join(directory, name);
        to.make_directory(naming::split(&path).0, "0711").await?;
        to.write_file(&path, &contents.unwrap_or_default()).await?;
    }
    let definition = definition_of(from, point).await?;
    let edits = moved(&definition, &replica::live(&request.directory), directory);
    let definition = definition.edited(&edits)?;
    let path = naming::join(directory, "domain.xml");
    to.write_file(&path, definition.text().as_bytes()).await
}
