//! A run of a policy: a new point of each VM that it is about, and the points that it makes one too
//! many go.

use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::keep::{FromTheFuture, newest};
use super::policy::Policy;
use crate::error::{Error, ErrorCode, Result};
use crate::history::{Begun, Recording};
use crate::host::Host;
use crate::libvirt::Hypervisor;
use crate::transfer::Context;
use crate::vm::VmResult;
use crate::vm::failover::{self, Standing};
use crate::vm::point::Point;
use crate::vm::replica;

/// What a run did with one VM.
#[derive(Debug, Serialize)]
pub struct VmRun {
    /// The policy.
    pub policy: String,
    /// What was done.
    #[serde(flatten)]
    pub result: VmResult,
    /// The new point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// The points that went.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<String>,
}

/// Which VMs of its policy a run is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All.
    All,
    /// Those of which a point is due.
    Due,
}

/// What a policy finds on its hosts.
#[derive(Debug)]
pub struct Found {
    /// VMs that it is about, in the order of their names.
    pub vms: Vec<String>,
    /// VMs that it is about by their names or their replicas, and that its source does not have.
    pub gone: Vec<String>,
}

/// Looks for the VMs of a policy.
///
/// # Errors
/// When one of the hosts cannot be asked.
pub async fn find(source: &Hypervisor, destination: &Host, policy: &Policy) -> Result<Found> {
    tokio::try_join!(source.host().share(), destination.share())?;
    let definitions = source.definitions().await?;
    let names = definitions.iter().map(|vm| vm.name().to_owned());
    let mut vms: Vec<String> = names.filter(|name| policy.is_about(name)).collect();
    vms.sort();
    let mut gone = policy.named();
    gone.extend(replica::names(destination, &policy.place()).await?);
    gone.retain(|name| policy.is_about(name) && !vms.contains(name));
    gone.sort();
    gone.dedup();
    Ok(Found { vms, gone })
}

/// Runs a policy. What fails is in the answer, also when no VM could be looked for.
pub async fn run(context: &Context, connect: &str, policy: &Policy, which: Which) -> Vec<VmRun> {
    let source = Hypervisor::new(context.host(&policy.source), connect);
    let destination = context.host(&policy.destination);
    let found = match find(&source, &destination, policy).await {
        Ok(found) => found,
        Err(error) => return vec![failed(policy, "", error)],
    };
    let turns = Arc::new(Semaphore::new(policy.parallel.get()));
    let mut running = JoinSet::new();
    for (at, vm) in found.vms.into_iter().enumerate() {
        let (context, connect) = (context.clone(), connect.to_owned());
        let (policy, turns) = (policy.clone(), Arc::clone(&turns));
        running.spawn(async move {
            // The semaphore is never closed; without a permit the work is done all the same.
            let _turn = turns.acquire_owned().await;
            (
                at,
                Box::pin(vm_run(&context, &connect, &policy, &vm, which)).await,
            )
        });
    }
    let mut done = running.join_all().await;
    done.sort_by_key(|(at, _)| *at);
    let mut all: Vec<VmRun> = done.into_iter().filter_map(|(_, run)| run).collect();
    let on = Hypervisor::new(destination.clone(), connect);
    let mut gone = Vec::new();
    for vm in found.gone {
        // Of one that has failed over nobody needs the source any more.
        match failover::role(&on, &policy.directory_of(&vm)).await {
            Ok(Some(_)) => {}
            Ok(None) => gone.push(vm),
            Err(error) => all.push(failed(policy, &vm, error)),
        }
    }
    all.extend(gone.iter().map(|vm| {
        let message = format!(
            "{vm} is gone from {}; what there is of its replica stays",
            policy.source
        );
        let error = Error::new(ErrorCode::NotFound, message);
        let hint = format!("exclude it from {} if that is meant", policy.name);
        failed(policy, vm, error.hint(hint))
    }));
    all
}

/// One VM; `None` when nothing is due.
async fn vm_run(
    context: &Context,
    connect: &str,
    policy: &Policy,
    vm: &str,
    which: Which,
) -> Option<VmRun> {
    if context.cancelled.is_cancelled() {
        let error = Error::new(ErrorCode::Cancelled, "stopped by the user");
        return Some(failed(policy, vm, error));
    }
    let destination = context.host(&policy.destination);
    let directory = policy.directory_of(vm);
    if which == Which::Due {
        let source = Hypervisor::new(context.host(&policy.source), connect);
        let on = Hypervisor::new(destination.clone(), connect);
        match is_due(&source, &on, &directory, policy).await {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => return Some(failed(policy, vm, error)),
        }
    }
    let request = policy.request(vm);
    let recording = Recording::begin(&Begun {
        operation: "replicate",
        vm: Some(vm),
        source: policy.source.to_string(),
        destination: policy.destination.to_string(),
    });
    let (result, point) = replica::refresh(context, connect, &request).await;
    let mut run = VmRun {
        policy: policy.name.clone(),
        result,
        point: point.map(|point| point.name),
        removed: Vec::new(),
    };
    if run.point.is_some() {
        let warnings = &mut run.result.warnings;
        match prune(&destination, &directory, policy, warnings).await {
            Ok(removed) => run.removed = removed,
            Err(error) => warnings.push(error.one_line()),
        }
    }
    if let Err(error) = recording.and_then(|recording| recording.end(&run)) {
        run.result.warnings.push(error.one_line());
    }
    Some(run)
}

/// Whether a point is due. Of a replica that is live none is, but that its source runs as well is to
/// be told at once.
async fn is_due(
    source: &Hypervisor,
    on: &Hypervisor,
    directory: &str,
    policy: &Policy,
) -> Result<bool> {
    match failover::standing(on, directory, source).await? {
        Standing::Live => return Ok(false),
        Standing::SplitBrain => return Ok(true),
        Standing::Follows => {}
    }
    let now = Timestamp::now();
    let listed = replica::points(on.host(), directory).await?;
    let newest = newest(listed.instants(), now);
    Ok(!policy.is_quiet(now) && policy.schedule.due(newest, now).is_some())
}

/// Removes the points that need not stay, and gives back their names.
async fn prune(
    on: &Host,
    directory: &str,
    policy: &Policy,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>> {
    let listed = replica::points(on, directory).await?;
    let instants: Vec<Timestamp> = listed.instants().collect();
    warnings.extend(listed.strange);
    let stays = policy
        .keep
        .choose(&instants, &policy.zone, Timestamp::now());
    let stays = stays.map_err(|FromTheFuture(instant)| {
        let message = format!(
            "no point is removed: one of {directory} is of {instant}, which has not come by this clock"
        );
        Error::new(ErrorCode::Refused, message)
    })?;
    let goes = listed.points.into_iter().zip(stays);
    let goes = goes.filter(|(point, stays)| !stays && !point.pinned);
    let goes: Vec<Point> = goes.map(|(point, _)| point).collect();
    match goes.is_empty() {
        true => Ok(Vec::new()),
        false => replica::remove_points(on, directory, &goes).await,
    }
}

fn failed(policy: &Policy, vm: &str, error: Error) -> VmRun {
    let (source, destination) = (&policy.source, &policy.destination);
    VmRun {
        policy: policy.name.clone(),
        result: VmResult::failed("replicate", source, destination, vm, error),
        point: None,
        removed: Vec::new(),
    }
}
