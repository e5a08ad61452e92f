//! A run of a policy: a new point of each VM that it is about, and the points that it makes one too
//! many go.

use std::sync::Arc;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::keep::{FromTheFuture, newest};
use super::policy::Policy;
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::history::{Begun, Recording};
use crate::host::Host;
use crate::libvirt::Hypervisor;
use crate::transfer::Context;
use crate::vm::VmResult;
use crate::vm::doubt::{self, Doubt};
use crate::vm::failover::{self, Standing};
use crate::vm::pause;
use crate::vm::point::{Listed, Point};
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
    /// The instant of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instant: Option<Timestamp>,
    /// The points that went.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<String>,
    /// Why none goes until somebody has looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doubt: Option<Doubt>,
}

/// Which VMs of its policy a run is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All.
    All,
    /// Those of which a point is due.
    Due,
    /// Those that a scheduler has found due, but for those that are live.
    Scheduled,
}

/// What became of one VM.
#[derive(Debug)]
pub struct Turn {
    /// What its replica was found to be; of one that was not looked at, that it follows.
    pub standing: Standing,
    /// What was done; `None` where nothing had to be.
    pub run: Option<VmRun>,
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

/// Of the VMs that a source does not have any more those that somebody has to be told of: one that
/// has failed over needs its source no longer.
///
/// # Errors
/// When the destination cannot be asked.
pub async fn missed(on: &Hypervisor, policy: &Policy, gone: Vec<String>) -> Result<Vec<String>> {
    let mut missed = Vec::new();
    for vm in gone {
        if failover::role(on, &policy.directory_of(&vm))
            .await?
            .is_none()
        {
            missed.push(vm);
        }
    }
    Ok(missed)
}

/// The error for a VM that its source does not have any more.
pub fn is_gone(policy: &Policy, vm: &str) -> Error {
    let message = format!(
        "{vm} is gone from {}; what there is of its replica stays",
        policy.source
    );
    let hint = format!("exclude it from {} if that is meant", policy.name);
    Error::new(ErrorCode::NotFound, message).hint(hint)
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
            let turn = one(&context, &connect, &policy, &vm, which, Pruning::Wanted);
            (at, Box::pin(turn).await)
        });
    }
    let mut done = running.join_all().await;
    done.sort_by_key(|(at, _)| *at);
    let mut all: Vec<VmRun> = done.into_iter().filter_map(|(_, turn)| turn.run).collect();
    let on = Hypervisor::new(destination.clone(), connect);
    match missed(&on, policy, found.gone).await {
        Ok(missed) => {
            let missed = missed.iter();
            all.extend(missed.map(|vm| failed(policy, vm, is_gone(policy, vm))));
        }
        Err(error) => all.push(failed(policy, "", error)),
    }
    all
}

/// Whether points that need not stay go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pruning {
    /// They do.
    Wanted,
    /// They do not: the clock is not believed.
    Suspended,
}

/// One VM.
pub async fn one(
    context: &Context,
    connect: &str,
    policy: &Policy,
    vm: &str,
    which: Which,
    pruning: Pruning,
) -> Turn {
    let (standing, run) = match look(context, connect, policy, vm, which).await {
        Ok((standing, false)) => (standing, None),
        Ok((standing, true)) => {
            let made = make(context, connect, policy, vm, pruning).await;
            (standing, Some(made))
        }
        Err(error) => (Standing::Follows, Some(failed(policy, vm, error))),
    };
    Turn { standing, run }
}

/// What a replica is found to be, and whether it needs a point.
async fn look(
    context: &Context,
    connect: &str,
    policy: &Policy,
    vm: &str,
    which: Which,
) -> Result<(Standing, bool)> {
    if context.cancelled.is_cancelled() {
        return Err(Error::new(ErrorCode::Cancelled, "stopped by the user"));
    }
    let on = Hypervisor::new(context.host(&policy.destination), connect);
    if let Some(pause) = pause::paused(&on, &policy.place()).await? {
        if which != Which::All {
            return Ok((Standing::Follows, false));
        }
        let message = format!("{} is paused since {}", policy.name, pause.since);
        return Err(Error::new(ErrorCode::Refused, message)
            .hint("\"kvm-clone-ctl replicate resume\" ends that"));
    }
    if which == Which::All {
        return Ok((Standing::Follows, true));
    }
    let directory = policy.directory_of(vm);
    let source = Hypervisor::new(context.host(&policy.source), connect);
    let standing = failover::standing(&on, &directory, &source).await?;
    let needs_one = match standing {
        Standing::Live => false,
        // That its source runs as well is to be told at once.
        Standing::SplitBrain => true,
        Standing::Follows => {
            which == Which::Scheduled || is_due(on.host(), &directory, policy).await?
        }
    };
    Ok((standing, needs_one))
}

/// Makes a new point of a VM.
async fn make(
    context: &Context,
    connect: &str,
    policy: &Policy,
    vm: &str,
    pruning: Pruning,
) -> VmRun {
    let request = policy.request(vm);
    let recording = Recording::begin(&Begun {
        operation: "replicate",
        vm: Some(vm),
        source: policy.source.to_string(),
        destination: policy.destination.to_string(),
    });
    let before = ("before", policy.hooks.before.as_ref());
    let begun = hook(context, policy, vm, before, &[]).await;
    let has_begun = begun.is_ok();
    let (result, point) = match begun {
        Ok(()) => replica::refresh(context, connect, &request).await,
        Err(error) => (failed(policy, vm, error).result, None),
    };
    let mut run = VmRun {
        policy: policy.name.clone(),
        result,
        instant: point.as_ref().map(|point| point.manifest.instant),
        point: point.map(|point| point.name),
        removed: Vec::new(),
        doubt: None,
    };
    if has_begun {
        let result = if run.point.is_some() {
            "made"
        } else {
            "failed"
        };
        let point = run.point.as_deref().unwrap_or_default();
        let variables = [("RESULT", result), ("POINT", point)];
        let after = ("after", policy.hooks.after.as_ref());
        let ended = hook(context, policy, vm, after, &variables).await;
        let warning = ended.err().map(|error| error.one_line());
        run.result.warnings.extend(warning);
    }
    if let Some(point) = run.point.clone() {
        let on = Hypervisor::new(context.host(&policy.destination), connect);
        let tidied = tidy(&on, &request.directory, policy, &point, pruning, &mut run).await;
        run.result
            .warnings
            .extend(tidied.err().map(|error| error.one_line()));
    }
    if let Err(error) = recording.and_then(|recording| recording.end(&run)) {
        run.result.warnings.push(error.one_line());
    }
    run
}

/// A command of the user around a run, if there is one, with these variables besides policy and VM.
async fn hook(
    context: &Context,
    policy: &Policy,
    vm: &str,
    (name, command): (&str, Option<&String>),
    variables: &[(&str, &str)],
) -> Result<()> {
    let Some(command) = command else {
        return Ok(());
    };
    let always = [("POLICY", policy.name.as_str()), ("VM", vm)];
    let variables = [&always, variables].concat();
    let here = context.host(&HostSpec::Local);
    let limit = policy.hooks.limit.unsigned_abs();
    let done = here.user_command(command, &variables, b"", limit).await;
    done.map_err(|error| error.context(format!("\"{name}\" of {} failed", policy.name)))
}

/// Whether a point is due.
async fn is_due(on: &Host, directory: &str, policy: &Policy) -> Result<bool> {
    let now = Timestamp::now();
    let listed = replica::points(on, directory).await?;
    let newest = newest(listed.instants(), now);
    Ok(!policy.is_quiet(now) && policy.schedule.due(newest, now).is_some())
}

/// After a run has made a point: what a failover needs is beside it, and points that need not stay
/// go, unless it is unlike the one before.
async fn tidy(
    on: &Hypervisor,
    directory: &str,
    policy: &Policy,
    point: &str,
    pruning: Pruning,
    run: &mut VmRun,
) -> Result<()> {
    policy.order.keep(on, &policy.place()).await?;
    keep_policy(on.host(), policy).await?;
    let listed = replica::points(on.host(), directory).await?;
    let unlike = doubt::unlike(&run.result, &listed.points, policy.max_change);
    run.doubt = doubt::raise(on, directory, point, unlike).await?;
    if let Some(doubt) = &run.doubt {
        run.result.warnings.push(format!(
            "no point is removed since {}: {}; \"kvm-clone-ctl replicate accept\" says that this is right",
            doubt.point, doubt.why
        ));
    } else if pruning == Pruning::Wanted {
        let warnings = &mut run.result.warnings;
        run.removed = prune(on.host(), directory, policy, listed, warnings).await?;
    }
    Ok(())
}

/// Has the policy beside its replicas, for whoever has lost the file. Hidden, as what is no replica.
async fn keep_policy(on: &Host, policy: &Policy) -> Result<()> {
    let path = format!("{}/.policy.toml", policy.place());
    let kept = on.read_file(&path).await?;
    match kept.as_deref() == Some(policy.text.as_bytes()) {
        true => Ok(()),
        false => on.write_file(&path, policy.text.as_bytes()).await,
    }
}

/// Removes the points that need not stay, and gives back their names.
async fn prune(
    on: &Host,
    directory: &str,
    policy: &Policy,
    listed: Listed,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>> {
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

/// What a run says that could not begin.
pub fn failed(policy: &Policy, vm: &str, error: Error) -> VmRun {
    let (source, destination) = (&policy.source, &policy.destination);
    VmRun {
        policy: policy.name.clone(),
        result: VmResult::failed("replicate", source, destination, vm, error),
        point: None,
        instant: None,
        removed: Vec::new(),
        doubt: None,
    }
}
