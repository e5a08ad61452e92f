//! Several transfers side by side: the disks of a VM.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::result::DiskResult;
use crate::endpoint::{DiskSpec, HostSpec};
use crate::error::{Error, ErrorCode, Result};
use crate::transfer::{self, Context, Operation, Options, Request};

/// One file to be transferred or compared.
#[derive(Debug, Clone)]
pub(super) struct Move {
    pub(super) target: String,
    pub(super) source: String,
    pub(super) destination: String,
    /// The two hold different references to the image below them, each its own.
    pub(super) own_reference: bool,
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
    ) -> (Vec<DiskResult>, Result<()>) {
        let turns = Arc::new(Semaphore::new(self.parallel.get()));
        let context = context.child();
        // The time limit is the run's, and some have to wait for their turn.
        let deadline = self.options.timeout.map(|limit| Instant::now() + limit);
        let mut running = JoinSet::new();
        for (at, each) in moves.iter().enumerate() {
            let (mut request, context) = (self.request(each, moves.len()), context.clone());
            let (turns, target) = (Arc::clone(&turns), each.target.clone());
            running.spawn(async move {
                // The semaphore is never closed; without a permit the work is done all the same.
                let _turn = turns.acquire_owned().await;
                request.options.timeout =
                    deadline.map(|end| end.saturating_duration_since(Instant::now()));
                let transfer = transfer::run(&context, &request).await;
                (at, DiskResult { target, transfer })
            });
        }
        let (mut done, mut failed) = (Vec::new(), Ok(()));
        while let Some(ended) = running.join_next().await {
            let Ok((at, disk)) = ended else {
                failed = failed.and(Err(broken()));
                continue;
            };
            if let (Ok(()), Some(error)) = (&failed, &disk.transfer.error) {
                failed = Err(error.like().context(format!("disk {}", disk.target)));
                if self.operation == Operation::Sync {
                    context.cancelled.cancel();
                }
            }
            done.push((at, disk));
        }
        done.sort_by_key(|(at, _)| *at);
        (done.into_iter().map(|(_, disk)| disk).collect(), failed)
    }

    fn request(&self, each: &Move, n_moves: usize) -> Request {
        let disk = |host: &HostSpec, path: &str| DiskSpec {
            host: host.clone(),
            path: path.into(),
        };
        let mut options = self.options.clone();
        // The limit is the run's, so those that run at once share it.
        let share = u64::try_from(self.parallel.get().min(n_moves).max(1)).unwrap_or(1);
        options.bandwidth_limit = options.bandwidth_limit.map(|limit| (limit / share).max(1));
        Request {
            operation: self.operation,
            source: disk(&self.from, &each.source),
            destination: disk(&self.to, &each.destination),
            dry_run: self.dry_run,
            options,
        }
    }
}

fn broken() -> Error {
    Error::new(ErrorCode::Internal, "the transfer of a disk broke off")
}
