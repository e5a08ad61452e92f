//! Several transfers side by side: the disks of a VM.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use kvm_clone_protocol::message::ApplyChoice;

use super::result::DiskResult;
use crate::endpoint::{DiskLocation, DiskSpec, HostSpec};
use crate::error::{Error, ErrorCode, Result};
use crate::transfer::{
    self, BeforeChange, Context, MethodChoice, Operation, Options, Request, TransferResult,
};

/// One file to be transferred or compared.
#[derive(Debug, Clone)]
pub(super) struct Move {
    pub(super) target: String,
    pub(super) source: String,
    /// What is read in its place: something that holds still.
    pub(super) read_from: Option<DiskLocation>,
    pub(super) destination: String,
    /// What is written, or compared with, in its place.
    pub(super) write_to: Option<DiskLocation>,
    /// It is the image that the guest writes to.
    pub(super) is_of_guest: bool,
    /// The two hold different references to the image below them, each its own.
    pub(super) own_reference: bool,
    /// The image, which stands on the destination, that keeps what the destination loses.
    pub(super) preserve: Option<String>,
}

impl Move {
    /// The image that the guest writes to, read and written as it is.
    pub(super) fn of_guest(target: &str, source: String, destination: String) -> Self {
        Self {
            target: target.to_owned(),
            source,
            read_from: None,
            destination,
            write_to: None,
            is_of_guest: true,
            own_reference: false,
            preserve: None,
        }
    }
}

/// What the transfers of a VM have in common.
#[derive(Debug, Clone)]
pub(super) struct Moves {
    pub(super) operation: Operation,
    pub(super) from: HostSpec,
    pub(super) to: HostSpec,
    pub(super) options: Options,
    pub(super) dry_run: bool,
    /// How many at once.
    pub(super) parallel: NonZeroUsize,
}

impl Moves {
    /// Does them all. When one fails the others are stopped, since nothing comes of them alone;
    /// a comparison goes on, since each disk's difference is news.
    ///
    /// The error is that of the first that failed; the disks come in the order of `moves`.
    pub(super) async fn run(
        &self,
        context: &Context,
        moves: &[Move],
        before: BeforeChange<'_>,
    ) -> (Vec<DiskResult>, Result<()>) {
        let requests: Vec<Request> = moves
            .iter()
            .map(|each| self.request(each, moves.len()))
            .collect();
        let results = if self.counts_together() {
            transfer::run_all(context, &requests, self.parallel, before).await
        } else {
            if let Err(error) = before.await {
                return (Vec::new(), Err(error));
            }
            self.run_each(context, requests).await
        };
        let named = |(each, mut transfer): (&Move, TransferResult)| {
            // Nobody knows what was read and written in their place.
            transfer.source = DiskSpec::at(self.from.clone(), &each.source).to_string();
            transfer.destination = DiskSpec::at(self.to.clone(), &each.destination).to_string();
            let target = each.target.clone();
            DiskResult {
                target,
                scan: None,
                transfer,
            }
        };
        let disks: Vec<DiskResult> = moves.iter().zip(results).map(named).collect();
        let failed = first_failure(&disks);
        (disks, failed.map_or(Ok(()), Err))
    }

    /// Whether the agents do it, who let all disks count at one instant.
    fn counts_together(&self) -> bool {
        let by_agents = matches!(
            self.options.method,
            MethodChoice::Blocksync | MethodChoice::Auto
        );
        by_agents || self.dry_run || self.operation != Operation::Sync
    }

    /// Each by itself, by another program.
    async fn run_each(&self, context: &Context, requests: Vec<Request>) -> Vec<TransferResult> {
        let turns = Arc::new(Semaphore::new(self.parallel.get()));
        let context = context.child();
        // The time limit is the run's, and some have to wait for their turn.
        let deadline = self.options.timeout.map(|limit| Instant::now() + limit);
        let mut running = JoinSet::new();
        for (at, mut request) in requests.into_iter().enumerate() {
            let (turns, context) = (Arc::clone(&turns), context.clone());
            running.spawn(async move {
                // The semaphore is never closed; without a permit the work is done all the same.
                let _turn = turns.acquire_owned().await;
                request.options.timeout =
                    deadline.map(|end| end.saturating_duration_since(Instant::now()));
                let result = transfer::run(&context, &request).await;
                if result.error.is_some() {
                    context.cancelled.cancel();
                }
                (at, result)
            });
        }
        let mut done = running.join_all().await;
        done.sort_by_key(|(at, _)| *at);
        done.into_iter().map(|(_, result)| result).collect()
    }

    fn request(&self, each: &Move, n_moves: usize) -> Request {
        let mut source = DiskSpec::at(self.from.clone(), &each.source);
        if let Some(location) = &each.read_from {
            source.location = location.clone();
        }
        let mut options = self.options.clone();
        // The limit is the run's, so those that run at once share it.
        let share = u64::try_from(self.parallel.get().min(n_moves).max(1)).unwrap_or(1);
        options.bandwidth_limit = options.bandwidth_limit.map(|limit| (limit / share).max(1));
        let mut destination = DiskSpec::at(self.to.clone(), &each.destination);
        if let Some(location) = &each.write_to {
            destination.location = location.clone();
            options.apply = ApplyChoice::Auto;
        }
        Request {
            operation: self.operation,
            source,
            destination,
            dry_run: self.dry_run,
            preserve: each.preserve.as_ref().map(PathBuf::from),
            options,
        }
    }
}

/// What went wrong first. That a disk was stopped because of another one is no reason.
fn first_failure(disks: &[DiskResult]) -> Option<Error> {
    let failed = || {
        disks
            .iter()
            .filter_map(|disk| Some((disk, disk.transfer.error.as_ref()?)))
    };
    let is_reason = |(_, error): &(&DiskResult, &Error)| error.code() != ErrorCode::Cancelled;
    let (disk, error) = failed().find(is_reason).or_else(|| failed().next())?;
    Some(error.like().context(format!("disk {}", disk.target)))
}
