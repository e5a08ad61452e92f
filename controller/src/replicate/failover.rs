//! Failover of a policy's VMs, or of what lies in a directory of replicas: one after the other, in
//! the policy's order, and else in that of their names.

use std::time::Duration;

use serde::Serialize;

use super::policy::Policy;
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::history::{Begun, Recording};
use crate::host::Host;
use crate::libvirt::Hypervisor;
use crate::transfer::Context;
use crate::vm::audit::{AuditRequest, AuditResult, Audited, audit};
use crate::vm::failback::{self, FailbackRequest, FailbackResult};
use crate::vm::failover::{self, Committed, FailoverRequest, FailoverResult, Planned, Role, Stop};
use crate::vm::network::NetworkConfig;
use crate::vm::order::Order;
use crate::vm::outcome::Outcome;
use crate::vm::rehearsal::{RehearsalRequest, RehearsalResult, rehearse};
use crate::vm::replica;

/// How long a guest has to shut down, unless the user says otherwise.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_mins(5);

/// Which replicas are meant.
#[derive(Debug)]
pub struct Replicas {
    /// Where they are.
    pub destination: HostSpec,
    /// VMs, each with the directory of its replica, in the order in which they are started.
    pub all: Vec<(String, String)>,
    order: Order,
}

/// How they are started.
#[derive(Debug)]
pub struct How {
    /// The newest points that are not newer than this one.
    pub point: Option<String>,
    /// The user knows that the sources do not run, and will not.
    pub source_is_dead: bool,
    /// How the VMs are connected, ahead of what policy and points say.
    pub network: NetworkConfig,
    /// Their sources are shut down, in so much time, and a last point is made.
    pub planned: Option<Stop>,
}

impl Replicas {
    /// Those of a policy, or of these VMs of it.
    ///
    /// # Errors
    /// Not found; when the destination cannot be reached.
    pub async fn of_policy(context: &Context, policy: &Policy, vms: &[String]) -> Result<Self> {
        let host = context.host(&policy.destination);
        let all = at(&host, &policy.place()).await?;
        let order = policy.order.clone();
        Self::chosen(policy.destination.clone(), all, vms, &policy.place(), order)
    }

    /// Those in a directory, which may be that of one.
    ///
    /// # Errors
    /// As [`Replicas::of_policy`].
    pub async fn in_directory(
        context: &Context,
        connect: &str,
        host: HostSpec,
        directory: &str,
        vms: &[String],
    ) -> Result<Self> {
        let on = context.host(&host);
        let all = match replica::vm_of(&on, directory).await? {
            Some(vm) => vec![(vm, directory.to_owned())],
            None => at(&on, directory).await?,
        };
        let order = Order::kept(&Hypervisor::new(on, connect), directory).await?;
        Self::chosen(host, all, vms, directory, order)
    }

    fn chosen(
        destination: HostSpec,
        mut all: Vec<(String, String)>,
        vms: &[String],
        place: &str,
        order: Order,
    ) -> Result<Self> {
        let has: Vec<String> = all.iter().map(|(vm, _)| vm.clone()).collect();
        let missing = vms.iter().find(|vm| !has.contains(vm));
        if has.is_empty() || missing.is_some() {
            let what = missing.map_or("any VM", String::as_str);
            let message = format!("there is no replica of {what} in {place} on {destination}");
            let error = Error::new(ErrorCode::NotFound, message);
            return Err(match has.is_empty() {
                true => error.hint("\"kvm-clone-ctl replicate status\" shows where they are"),
                false => error.hint(format!("there are: {}", has.join(", "))),
            });
        }
        all.retain(|(vm, _)| vms.is_empty() || vms.contains(vm));
        all.sort_by_key(|(vm, _)| order.place(vm));
        Ok(Self {
            destination,
            all,
            order,
        })
    }

    /// Starts the VMs. A failure is part of each result.
    pub async fn start(
        &self,
        context: &Context,
        connect: &str,
        policy: Option<&Policy>,
        how: &How,
    ) -> Vec<FailoverResult> {
        let mut results = Vec::new();
        let mut before = None;
        for (vm, directory) in &self.all {
            let place = self.order.place(vm);
            if before.is_some_and(|before| before < place) {
                wait(context, self.order.delay()).await;
            }
            before = Some(place);
            let network = how.network.clone();
            let network = match policy {
                Some(policy) => policy.network_config(network),
                None => network,
            };
            let request = FailoverRequest {
                source: policy.map(|policy| policy.source.clone()),
                destination: self.destination.clone(),
                directory: directory.clone(),
                point: how.point.clone(),
                source_is_dead: how.source_is_dead,
                fence: policy.and_then(|policy| policy.fence.clone()),
                network,
            };
            let planned = policy.zip(how.planned).map(|(policy, stop)| Planned {
                last: policy.request(vm),
                stop,
            });
            let source = policy.map(|policy| &policy.source);
            let begun = begun("failover", vm, source, &self.destination);
            let planned = planned.as_ref();
            let started = failover::failover(context, connect, vm, &request, planned);
            results.push(recorded(&begun, started).await);
        }
        results
    }

    /// Brings the VMs back to the source of their policy, one after the other. A failure is part of
    /// each result, and keeps no other one from going.
    pub async fn bring_back(
        &self,
        context: &Context,
        connect: &str,
        policy: &Policy,
        stop: Stop,
        discards: bool,
    ) -> Vec<FailbackResult> {
        let mut results = Vec::new();
        for (vm, _) in &self.all {
            let request = FailbackRequest {
                replica: policy.request(vm),
                stop,
                discards,
            };
            let begun = begun("failback", vm, Some(&policy.destination), &policy.source);
            let back = Box::pin(failback::failback(context, connect, &request));
            results.push(recorded(&begun, back).await);
        }
        results
    }

    /// Rehearses the failover of each VM, one after the other. A failure is part of each result.
    pub async fn rehearse(
        &self,
        context: &Context,
        connect: &str,
        policy: &Policy,
        point: Option<&str>,
        limit: Duration,
    ) -> Vec<RehearsalResult> {
        let mut results = Vec::new();
        for (vm, directory) in &self.all {
            let request = RehearsalRequest {
                destination: self.destination.clone(),
                directory: directory.clone(),
                point: point.map(str::to_owned),
                networks: policy.network_config(NetworkConfig::default()),
                isolated: policy.test_network.clone(),
                says: policy.sign_of_life.clone(),
                limit,
            };
            let begun = begun(
                "replicate-test",
                vm,
                Some(&policy.source),
                &self.destination,
            );
            let tested = Box::pin(rehearse(context, connect, vm, &request));
            results.push(recorded(&begun, tested).await);
        }
        results
    }

    /// Reads points of each VM, one after the other. A failure is part of each result.
    pub async fn audit(
        &self,
        context: &Context,
        connect: &str,
        policy: &Policy,
        points: &Audited,
    ) -> Vec<AuditResult> {
        let mut results = Vec::new();
        for (vm, directory) in &self.all {
            let request = AuditRequest {
                destination: self.destination.clone(),
                directory: directory.clone(),
                points: points.clone(),
            };
            let begun = begun(
                "replicate-verify",
                vm,
                Some(&policy.source),
                &self.destination,
            );
            let audited = audit(context, connect, vm, &request);
            results.push(recorded(&begun, audited).await);
        }
        results
    }

    /// Makes the failovers of those that are live final.
    ///
    /// # Errors
    /// The first that could not be committed; those before it are.
    pub async fn commit(&self, context: &Context, connect: &str) -> Result<Vec<Committed>> {
        let on = Hypervisor::new(context.host(&self.destination), connect);
        let mut committed = Vec::new();
        for (_, directory) in &self.all {
            committed.extend(failover::commit(&on, directory).await?);
        }
        Ok(committed)
    }

    /// Ends the roles of those that are live.
    ///
    /// # Errors
    /// The first that could not be ended; those before it are.
    pub async fn undo(&self, context: &Context, connect: &str) -> Result<Vec<Role>> {
        let on = Hypervisor::new(context.host(&self.destination), connect);
        let mut ended = Vec::new();
        for (_, directory) in &self.all {
            ended.extend(failover::undo(&on, directory).await?);
        }
        Ok(ended)
    }
}

fn begun<'a>(
    operation: &'a str,
    vm: &'a str,
    source: Option<&HostSpec>,
    destination: &HostSpec,
) -> Begun<'a> {
    Begun {
        operation,
        vm: Some(vm),
        source: source.map(HostSpec::to_string).unwrap_or_default(),
        destination: destination.to_string(),
    }
}

/// Does something with a VM, and records it. That it could not be recorded is a warning.
async fn recorded<R>(begun: &Begun<'_>, work: impl Future<Output = R>) -> R
where
    R: Serialize + AsMut<Outcome>,
{
    let recording = Recording::begin(begun);
    let mut result = work.await;
    if let Err(error) = recording.and_then(|recording| recording.end(&result)) {
        result.as_mut().warnings.push(error.one_line());
    }
    result
}

/// Waits, unless the user wants to stop.
async fn wait(context: &Context, delay: Duration) {
    tokio::select! {
        () = tokio::time::sleep(delay) => {}
        () = context.cancelled.cancelled() => {}
    }
}

/// The replicas at a place.
async fn at(on: &Host, place: &str) -> Result<Vec<(String, String)>> {
    let names = replica::names(on, place).await?.into_iter();
    let mut all: Vec<_> = names
        .map(|vm| {
            let directory = replica::directory_of(place, &vm);
            (vm, directory)
        })
        .collect();
    all.sort();
    Ok(all)
}
