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
mod request;
mod result;
mod rsync;
mod scp;

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Host, SshOptions};
use crate::progress::Style;
pub use choice::{Abilities, Choice, direct};
pub use request::{LiveRead, MethodChoice, Operation, Options, Request, RouteChoice, Verification};
pub use result::{Route, TransferResult};

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

/// Work that goes on, and how it ends.
type Working<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// A way to make one disk hold what another holds.
trait Method: Send + Sync {
    /// As results name it.
    fn name(&self) -> &'static str;

    /// Does what the request asks, and counts in the result. Dropped before it has ended, it
    /// leaves nothing running here; [`Method::end`] sees to the hosts.
    fn transfer<'a>(
        &'a mut self,
        context: &'a Context,
        request: &'a Request,
        result: &'a mut TransferResult,
    ) -> Working<'a>;

    /// Ends in order what the transfer has opened, however it ended.
    fn end<'a>(
        &'a mut self,
        _done: &'a Result<()>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async {})
    }
}

/// Does what the request asks. A failure is part of the result.
pub async fn run(context: &Context, request: &Request) -> TransferResult {
    let started = Instant::now();
    let mut result = TransferResult::new(request);
    match supervised(context, request, &mut result).await {
        Ok(()) => result.success = true,
        Err(error) => result.error = Some(error),
    }
    result.duration_seconds = started.elapsed().as_secs_f64();
    result
}

/// Until it is done, the user wants to stop, or the time is over.
async fn supervised(
    context: &Context,
    request: &Request,
    result: &mut TransferResult,
) -> Result<()> {
    let timeout = request.options.timeout;
    let over = async {
        match timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let mut method: Option<Box<dyn Method>> = None;
    let work = async {
        let chosen = choice::choose(context, request).await?;
        let method = method.insert(chosen.method);
        result.method = method.name();
        result.method_reason = chosen.reason;
        method.transfer(context, request, result).await
    };
    let again = "the same command takes the run up again";
    let done = tokio::select! {
        done = work => done,
        () = context.cancelled.cancelled() => {
            Err(Error::new(ErrorCode::Cancelled, "stopped by the user").hint(again))
        }
        () = over => {
            Err(Error::new(ErrorCode::Timeout, "the time given with --timeout is over").hint(again))
        }
    };
    if let Some(mut method) = method {
        method.end(&done).await;
    }
    done
}
