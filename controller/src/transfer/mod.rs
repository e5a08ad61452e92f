//! Transfers of disks: one disk made to hold what another holds, by one of three methods.
//!
//! ```text
//!  run ─ choose the method ─ Method::transfer ─ result
//!                            ├ blocksync   two agents that ship what differs
//!                            ├ rsync       rsync on the source host
//!                            └ scp         method "libvirt": scp on the source host
//! ```

mod blocksync;
mod choice;
mod copy;
pub mod recover;
mod request;
mod result;
mod rsync;
mod scp;
pub mod summary;

use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_clone_protocol::message::Control;
use tokio_util::sync::CancellationToken;

use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Host, SshOptions};
use crate::progress::Style;
pub use choice::{Abilities, Choice, direct};
pub use request::{
    LiveRead, MethodChoice, Operation, Options, Request, RouteChoice, Streams, Verification,
};
pub use result::{Consistency, Route, TransferResult};

/// What a transfer needs from the program around it. Clones share everything.
#[derive(Debug, Clone)]
pub struct Context {
    /// How hosts are reached.
    pub ssh: Arc<SshOptions>,
    /// The user wants to stop.
    pub cancelled: CancellationToken,
    /// Whether, and how, progress is shown.
    pub progress: Style,
    /// The hosts so far: who is named twice is connected to once.
    hosts: Arc<Mutex<Vec<Host>>>,
}

impl Context {
    /// No hosts yet.
    pub fn new(ssh: Arc<SshOptions>, cancelled: CancellationToken, progress: Style) -> Self {
        Self {
            ssh,
            cancelled,
            progress,
            hosts: Arc::default(),
        }
    }

    /// The host of this name, with the connection that it has already.
    pub fn host(&self, spec: &HostSpec) -> Host {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = hosts.iter().find(|host| host.spec() == spec) {
            return known.clone();
        }
        let host = Host::new(spec.clone(), Arc::clone(&self.ssh));
        hosts.push(host.clone());
        host
    }

    /// The same, to be cancelled by itself as well.
    pub(crate) fn child(&self) -> Self {
        Self {
            cancelled: self.cancelled.child_token(),
            ..self.clone()
        }
    }
}

/// One disk of a transfer, and what becomes of it.
#[derive(Debug)]
struct Job<'a> {
    request: &'a Request,
    result: TransferResult,
}

/// Why a transfer stopped, and at which of its disks.
#[derive(Debug)]
struct Stopped {
    at: usize,
    error: Error,
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self { at: 0, error }
    }
}

/// Puts the number of a disk to a failure.
trait At<T> {
    fn at(self, at: usize) -> Result<T, Stopped>;
}

impl<T> At<T> for Result<T> {
    fn at(self, at: usize) -> Result<T, Stopped> {
        self.map_err(|error| Stopped { at, error })
    }
}

/// An answer that is none to what was asked.
fn unexpected(asked: &str, answer: &Control) -> Error {
    Error::new(
        ErrorCode::Protocol,
        format!("an agent answers {asked} with {:?}", answer.kind()),
    )
}

/// What is done at the last moment before anything changes under the name of a disk; its failure
/// keeps that from happening. A run that never comes so far never awaits it.
pub type BeforeChange<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// Work that goes on, and how it ends.
type Working<'a> = Pin<Box<dyn Future<Output = Result<(), Stopped>> + Send + 'a>>;

/// A way to make disks hold what others hold. All requests of one transfer have the same hosts,
/// operation and options.
trait Method: Send + Sync {
    /// As results name it.
    fn name(&self) -> &'static str;

    /// Does what the jobs ask, `parallel` of them at once, and counts in their results. Dropped
    /// before it has ended, it leaves nothing running here; [`Method::end`] sees to the hosts.
    fn transfer<'a>(
        &'a mut self,
        context: &'a Context,
        jobs: &'a mut [Job<'_>],
        parallel: NonZeroUsize,
        before: BeforeChange<'a>,
    ) -> Working<'a>;

    /// Ends in order what the transfer has opened; `failed` says why it broke off, if it did.
    fn end<'a>(
        &'a mut self,
        _failed: Option<&'a Error>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async {})
    }
}

/// Does what the request asks. A failure is part of the result.
pub async fn run(context: &Context, request: &Request) -> TransferResult {
    let nothing = Box::pin(async { Ok(()) });
    let one = std::slice::from_ref(request);
    let mut results = run_all(context, one, NonZeroUsize::MIN, nothing).await;
    results.remove(0)
}

/// Does what the requests ask: the disks of a VM, which count together or not at all where the
/// method can. The results come in their order.
pub async fn run_all(
    context: &Context,
    requests: &[Request],
    parallel: NonZeroUsize,
    before: BeforeChange<'_>,
) -> Vec<TransferResult> {
    let started = Instant::now();
    let mut jobs: Vec<Job<'_>> = requests
        .iter()
        .map(|request| Job {
            request,
            result: TransferResult::new(request),
        })
        .collect();
    let stopped = supervised(context, &mut jobs, parallel, before).await.err();
    let mut results: Vec<_> = jobs.into_iter().map(|job| job.result).collect();
    if let Some(Stopped { at, error }) = stopped {
        for result in results.iter_mut().filter(|result| result.error.is_none()) {
            let message = "given up, since another disk failed";
            result.error = Some(Error::new(ErrorCode::Cancelled, message));
        }
        results[at].error = Some(error);
    }
    for result in &mut results {
        result.success = result.error.is_none();
        if !result.success {
            result.verified = Verification::None.name();
        }
        result.duration_seconds = started.elapsed().as_secs_f64();
    }
    results
}

/// Until it is done, the user wants to stop, or the time is over.
async fn supervised(
    context: &Context,
    jobs: &mut [Job<'_>],
    parallel: NonZeroUsize,
    before: BeforeChange<'_>,
) -> Result<(), Stopped> {
    let Some(first) = jobs.first().map(|job| job.request) else {
        return Ok(());
    };
    let timeout = first.options.timeout;
    let over = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let mut method: Option<Box<dyn Method>> = None;
    let work = async {
        let chosen = choice::choose(context, first).await?;
        let method = method.insert(chosen.method);
        for job in &mut *jobs {
            job.result.method = method.name();
            job.result.method_reason.clone_from(&chosen.reason);
        }
        jobs[0].result.warnings.extend(chosen.warning);
        method.transfer(context, jobs, parallel, before).await
    };
    let again = "the same command takes the run up again";
    let done = tokio::select! {
        done = work => done,
        () = context.cancelled.cancelled() => {
            Err(Error::new(ErrorCode::Cancelled, "stopped by the user").hint(again).into())
        }
        () = over => {
            Err(Error::new(ErrorCode::Timeout, "the time given with --timeout is over").hint(again).into())
        }
    };
    if let Some(mut method) = method {
        method
            .end(done.as_ref().err().map(|stopped| &stopped.error))
            .await;
    }
    done
}
