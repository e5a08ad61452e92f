//! Which method a transfer takes, and why.

use super::blocksync::Blocksync;
use super::request::{MethodChoice, Operation, Request};
use super::rsync::Rsync;
use super::scp::Scp;
use super::{Context, Method};
use crate::error::{ErrorCode, Result};
use crate::host::Host;

/// A method, and why `auto` chose it.
pub(super) struct Chosen {
    pub(super) method: Box<dyn Method>,
    pub(super) reason: Option<String>,
}

/// What `auto` takes for a disk that the destination does not have.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Choice {
    /// The method.
    pub method: MethodChoice,
    /// Why.
    pub reason: String,
}

/// The method for a request.
pub(super) async fn choose(context: &Context, request: &Request) -> Result<Chosen> {
    // Only the agents can tell without writing.
    let wanted = if request.operation == Operation::Sync && !request.dry_run {
        request.options.method
    } else {
        MethodChoice::Blocksync
    };
    let (method, reason) = match wanted {
        MethodChoice::Auto => {
            let choice = automatic(context, request).await?;
            (choice.method, Some(choice.reason))
        }
        other => (other, None),
    };
    let method: Box<dyn Method> = match method {
        MethodChoice::Rsync => Box::new(Rsync),
        MethodChoice::Libvirt => Box::new(Scp),
        MethodChoice::Blocksync | MethodChoice::Auto => Box::new(Blocksync::default()),
    };
    Ok(Chosen { method, reason })
}

async fn automatic(context: &Context, request: &Request) -> Result<Choice> {
    let from = context.host(&request.source.host);
    let to = context.host(&request.destination.host);
    tokio::try_join!(from.share(), to.share())?;
    let holds_a_copy = match request.destination.path.to_str() {
        Some(path) => to.file_facts(path).await?.is_some(),
        // Another method could not take such a path anyway.
        None => true,
    };
    if holds_a_copy {
        return Ok(blocksync("the destination holds an older copy"));
    }
    first_copy(&from, &to).await
}

/// The method for a disk that the destination does not have. Measured on one machine, the first
/// copy by the agents takes as long as the bare connection; scp and rsync take 2.5 times that.
///
/// # Errors
/// When a host cannot be reached.
pub async fn first_copy(from: &Host, to: &Host) -> Result<Choice> {
    let one_host = from.spec() == to.spec() || from.is_local() || to.is_local();
    if !one_host && to.reachable_from(from).await.is_err() {
        return Ok(blocksync(
            "the source host has no direct way to the destination host",
        ));
    }
    let mut why = None;
    for host in [from, to] {
        match host.start_agent().await {
            Ok(agent) => agent.close().await,
            Err(error) if error.code() == ErrorCode::MissingRequirement => why = Some(error),
            Err(error) => return Err(error),
        }
    }
    let Some(why) = why else {
        return Ok(blocksync(
            "it is the fastest for a first copy, and both hosts run its agent",
        ));
    };
    let (method, program) = match (
        has_both(from, to, "scp").await,
        has_both(from, to, "rsync").await,
    ) {
        (true, _) => (MethodChoice::Libvirt, "scp"),
        (false, true) => (MethodChoice::Rsync, "rsync"),
        (false, false) => return Err(why),
    };
    Ok(Choice {
        method,
        reason: format!(
            "both hosts have {program}, and one cannot run the agent: {}",
            why.one_line()
        ),
    })
}

fn blocksync(reason: &str) -> Choice {
    Choice {
        method: MethodChoice::Blocksync,
        reason: reason.to_owned(),
    }
}

async fn has_both(from: &Host, to: &Host, program: &str) -> bool {
    from.require(program).await.is_ok() && to.require(program).await.is_ok()
}
