//! Failover: a VM starts from a point of its replica, where that is. And the way back from it.
//!
//! ```text
//!  planned only    obstacles? ─ shut the source down ─ a last point
//!  always          lock ─ obstacles? ─ role.json ─ point copied to DIR/live ─ define ─ start
//!                         └ the source must be known not to run
//! ```
//!
//! `DIR/role.json` says that the replica is live: nothing is replicated over it until
//! [`undo`] has removed it. Whatever fails before the VM runs is taken back, and of a planned
//! failover the source is started again.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::checks::{self, Connecting, Destination};
use super::network::NetworkConfig;
use super::obstacle::{Obstacles, to_error};
use super::outcome::Outcome;
use super::point::{Point, Points};
use super::replica::{self, Replica, ReplicaRequest};
use super::{naming, result::VmResult, state};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;
use crate::libvirt::definition::{Definition, Edit};
use crate::transfer::Context;

/// The version of the format of `role.json`.
const FORMAT: u32 = 1;

/// How long a fence may take.
const FENCE_LIMIT: Duration = Duration::from_mins(2);

/// How often a VM that shuts down is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Which replica is to be started, and what is known of its source.
#[derive(Debug, Clone)]
pub struct FailoverRequest {
    /// The host that has the VM; without it, the one that the point names.
    pub source: Option<HostSpec>,
    /// The host that has the replica.
    pub destination: HostSpec,
    /// The directory of the replica.
    pub directory: String,
    /// The newest point that is not newer than this one; without it, the newest.
    pub point: Option<String>,
    /// The user knows that the source does not run, and will not.
    pub source_is_dead: bool,
    /// For a shell of this machine: makes sure of that, where the source cannot be asked.
    pub fence: Option<String>,
    /// How the VM is connected there; goes before what the point says of that.
    pub network: NetworkConfig,
}

/// A failover that leaves nothing behind.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The last run.
    pub last: ReplicaRequest,
    /// How the source is shut down.
    pub stop: Stop,
}

/// How a guest is shut down.
#[derive(Debug, Clone, Copy)]
pub struct Stop {
    /// How long it has.
    pub timeout: Duration,
    /// It is switched off after that.
    pub force: bool,
}

/// What became of one VM.
#[derive(Debug, Serialize)]
pub struct FailoverResult {
    /// Whether it runs, and what else there is to say.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The point that it was started from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// The age of that, when it was started, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<i64>,
}

/// What is remembered of a replica that is live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Role {
    format: u32,
    /// The VM's name.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// The host that had it.
    pub source: String,
    /// The point that it was started from.
    pub point: String,
    /// When.
    pub since: Timestamp,
    /// Files outside of the replica that were made for it.
    made: Vec<String>,
    /// The host that had it started it by itself, until a planned failover.
    #[serde(default)]
    pub(super) autostart: bool,
    /// The point that holds what was on the disks of that host, once a failback has made it.
    #[serde(default)]
    pub(super) kept: Option<String>,
    /// A failback was about to start the VM at its source: if it runs there, that one counts.
    #[serde(default)]
    pub(super) returning: bool,
    /// It is not to be undone.
    #[serde(default)]
    committed: bool,
}

/// A failover that is final.
#[derive(Debug, Serialize)]
pub struct Committed {
    /// The VM.
    pub vm: String,
    /// The point that it was started from.
    pub point: String,
    /// Newer points, which went.
    pub removed: Vec<String>,
}

/// Starts a VM from its replica. A failure is part of the result.
pub async fn failover(
    context: &Context,
    connect: &str,
    vm: &str,
    request: &FailoverRequest,
    planned: Option<&Planned>,
) -> FailoverResult {
    let started = Instant::now();
    let mut result = FailoverResult {
        outcome: Outcome::of(vm),
        point: None,
        age_seconds: None,
    };
    let done = match planned {
        None => Box::pin(start(context, connect, request, &mut result)).await,
        Some(planned) => {
            Box::pin(start_planned(
                context,
                connect,
                request,
                planned,
                &mut result,
            ))
            .await
        }
    };
    result.outcome.end(started, done);
    result
}

/// The role of a replica: `None` as long as it only follows.
///
/// # Errors
/// When the host cannot be reached.
pub async fn role(on: &Hypervisor, directory: &str) -> Result<Option<Role>> {
    state::read_from(on, &note(directory)).await
}

/// What a run finds of the role of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It follows its source.
    Follows,
    /// It is live, and its source does not run.
    Live,
    /// It is live, and its source runs as well.
    SplitBrain,
}

/// Looks for the role of a replica, and at its source if it is live.
///
/// # Errors
/// When a host cannot be asked.
pub async fn standing(on: &Hypervisor, directory: &str, source: &Hypervisor) -> Result<Standing> {
    let Some(role) = role(on, directory).await? else {
        return Ok(Standing::Follows);
    };
    match source.find_domain(&role.uuid.to_string()).await? {
        Some(domain) if !domain.state.is_off() => Ok(Standing::SplitBrain),
        _ => Ok(Standing::Live),
    }
}

/// Ends the role of a replica whose VM is off: the VM is undefined there, and what it wrote is
/// lost. Gives back what was undone; `None` where nothing is live.
///
/// # Errors
/// Refused, when the VM is not off; when the host cannot be asked.
pub async fn undo(on: &Hypervisor, directory: &str) -> Result<Option<Role>> {
    if role(on, directory).await?.is_none() {
        return Ok(None);
    }
    let lock = replica::lock(on.host(), directory).await?;
    let Some(role) = role(on, directory).await? else {
        return Ok(None);
    };
    if role.committed {
        let message = format!("the failover of {} to {} was committed", role.vm, on.host());
        return Err(Error::new(ErrorCode::Refused, message)
            .hint("\"kvm-clone-ctl replicate failback\" brings it back, with what it wrote"));
    }
    take_back(on, directory, &role).await?;
    lock.end().await?;
    Ok(Some(role))
}

/// Makes a failover final: points that are newer than the one that was taken go, but for those that
/// are pinned, and it can no longer be undone. Gives back what was done; `None` where nothing is live.
///
/// # Errors
/// Busy, when a run is at the replica; when the host cannot be asked.
pub async fn commit(on: &Hypervisor, directory: &str) -> Result<Option<Committed>> {
    let Some(mut role) = role(on, directory).await? else {
        return Ok(None);
    };
    let listed = Points::of(on.host(), directory).list().await?;
    let newer = listed
        .points
        .into_iter()
        .filter(|point| point.name > role.point);
    let newer: Vec<Point> = newer.collect();
    role.committed = true;
    role.write(on, directory).await?;
    Ok(Some(Committed {
        vm: role.vm,
        point: role.point,
        removed: replica::remove_points(on.host(), directory, &newer).await?,
    }))
}

fn note(directory: &str) -> String {
    naming::join(directory, "role.json")
}

/// Shuts the source down, makes a last point, and starts the VM from that; or starts the source
/// again.
async fn start_planned(
    context: &Context,
    connect: &str,
    request: &FailoverRequest,
    planned: &Planned,
    result: &mut FailoverResult,
) -> Result<()> {
    let source = Hypervisor::new(context.host(&planned.last.source), connect);
    source.host().share().await?;
    let domain = source.domain(&planned.last.vm).await?;
    look_ahead(context, connect, request, result).await?;
    let uuid = domain.definition.uuid().to_string();
    let ran = !domain.state.is_off();
    let done = async {
        if ran {
            shut_down(context, &source, &uuid, &planned.last.vm, planned.stop).await?;
        }
        let (last, _) = replica::refresh(context, connect, &planned.last).await;
        let VmResult {
            warnings,
            error,
            obstacles,
            ..
        } = last;
        result.outcome.warnings.extend(warnings);
        if let Some(error) = error {
            result.outcome.obstacles = obstacles;
            return Err(error);
        }
        Box::pin(start(context, connect, request, result)).await
    };
    let done = done.await;
    let (vm, host) = (&planned.last.vm, source.host());
    let Err(error) = done else {
        if domain.autostart {
            let on = destination(context, connect, request).await?;
            let disabled = no_longer_start(&source, &uuid, &on, &request.directory).await;
            result.outcome.warnings.push(match disabled {
                Ok(()) => format!("{vm} no longer starts with {host}, until a failback"),
                Err(why) => format!("{vm} still starts with {host}: {}", why.one_line()),
            });
        }
        return Ok(());
    };
    if !ran || !source.state(&uuid).await?.is_off() {
        return Err(error);
    }
    // Only where it is sure that the other does not run.
    let on = destination(context, connect, request).await?;
    if role(&on, &request.directory).await?.is_some() {
        let there = on.host();
        return Err(error.with_note(format!(
            "{vm} is off on {host}, and stays so: it may run on {there}"
        )));
    }
    source.virsh(&["start", &uuid]).await?;
    Err(error.with_note(format!("{vm} was started again on {host}")))
}

/// Has a source no longer start its VM by itself, and remembers that beside the replica.
async fn no_longer_start(
    source: &Hypervisor,
    uuid: &str,
    on: &Hypervisor,
    directory: &str,
) -> Result<()> {
    source.virsh(&["autostart", "--disable", uuid]).await?;
    match role(on, directory).await? {
        None => Ok(()),
        Some(role) => {
            let role = Role {
                autostart: true,
                ..role
            };
            role.write(on, directory).await
        }
    }
}

/// The host of the replica.
async fn destination(
    context: &Context,
    connect: &str,
    request: &FailoverRequest,
) -> Result<Hypervisor> {
    let on = Hypervisor::new(context.host(&request.destination), connect);
    on.host().share().await?;
    Ok(on)
}

/// What would be in the way of the newest point will be in the way of the last: the source is not
/// shut down for that.
async fn look_ahead(
    context: &Context,
    connect: &str,
    request: &FailoverRequest,
    result: &mut FailoverResult,
) -> Result<()> {
    let on = destination(context, connect, request).await?;
    let wanted = request.point.as_deref();
    let Ok(point) = choose(&on, &request.directory, wanted).await else {
        return Ok(());
    };
    let request = FailoverRequest {
        source_is_dead: true,
        ..request.clone()
    };
    prepare(context, connect, &on, &request, &point, result).await?;
    result.outcome.warnings.clear();
    Ok(())
}

/// Has a guest shut down, and waits for that.
pub(super) async fn shut_down(
    context: &Context,
    source: &Hypervisor,
    uuid: &str,
    vm: &str,
    stop: Stop,
) -> Result<()> {
    // A guest that does not listen is no other than one that takes too long.
    let asked = source.virsh(&["shutdown", uuid]).await;
    let deadline = Instant::now() + stop.timeout;
    while Instant::now() < deadline {
        if source.state(uuid).await?.is_off() {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = context.cancelled.cancelled() => {
                return Err(Error::new(ErrorCode::Cancelled, "stopped by the user"));
            }
        }
    }
    if stop.force {
        source.virsh(&["destroy", uuid]).await?;
        return Ok(());
    }
    let limit = humantime::format_duration(stop.timeout);
    let message = format!(
        "{vm} on {} was asked to shut down, and runs after {limit}: it may yet do so",
        source.host()
    );
    let error = Error::new(ErrorCode::Timeout, message)
        .hint("give it more time with --shutdown-timeout, or switch it off with --force-stop");
    Err(match asked {
        Ok(_) => error,
        Err(why) => error.caused_by(why.one_line()),
    })
}

/// Starts the VM from the point that is wanted.
async fn start(
    context: &Context,
    connect: &str,
    request: &FailoverRequest,
    result: &mut FailoverResult,
) -> Result<()> {
    let on = destination(context, connect, request).await?;
    let directory = &request.directory;
    let point = choose(&on, directory, request.point.as_deref()).await?;
    result.outcome.vm.clone_from(&point.manifest.vm);
    let lock = replica::lock(on.host(), directory).await?;
    let definition = prepare(context, connect, &on, request, &point, result).await?;
    let role = Role {
        format: FORMAT,
        vm: point.manifest.vm.clone(),
        uuid: point.manifest.uuid,
        source: point.manifest.source.clone(),
        point: point.name.clone(),
        since: Timestamp::now(),
        made: point.made(&definition),
        autostart: false,
        kept: None,
        returning: false,
        committed: false,
    };
    role.write(&on, directory).await?;
    let started = Box::pin(bring_up(&on, directory, &point, &definition)).await;
    if let Err(error) = started {
        return Err(match take_back(&on, directory, &role).await {
            Ok(()) => error,
            Err(why) => error
                .with_note(format!(
                    "what was made could not be taken back: {}",
                    why.one_line()
                ))
                .hint("\"kvm-clone-ctl replicate undo\" does that"),
        });
    }
    let age = role.since.duration_since(point.manifest.instant);
    result.age_seconds = Some(age.as_secs());
    result.point = Some(point.name);
    lock.end().await
}

/// The newest point, or the newest that is not newer than one of this name.
pub(super) async fn choose(
    on: &Hypervisor,
    directory: &str,
    wanted: Option<&str>,
) -> Result<Point> {
    let host = on.host();
    let listed = Points::of(host, directory).list().await?;
    let is_wanted = |point: &Point| wanted.is_none_or(|name| point.name.as_str() <= name);
    let mut names: Vec<String> = listed
        .points
        .iter()
        .map(|point| point.name.clone())
        .collect();
    let chosen = listed.points.into_iter().rfind(is_wanted);
    chosen.ok_or_else(|| {
        names.extend(listed.strange);
        let message = match wanted {
            Some(name) => format!("{directory} on {host} has no point as old as {name}"),
            None => format!("{directory} on {host} has no point"),
        };
        let has = match names.is_empty() {
            true => "\"kvm-clone-ctl replicate points\" lists those that there are".to_owned(),
            false => format!("it has: {}", names.join(", ")),
        };
        Error::new(ErrorCode::NotFound, message).hint(has)
    })
}

/// The definition as it will be; or all that is in the way as one error.
async fn prepare(
    context: &Context,
    connect: &str,
    on: &Hypervisor,
    request: &FailoverRequest,
    point: &Point,
    result: &mut FailoverResult,
) -> Result<Definition> {
    let (host, directory) = (on.host(), &request.directory);
    let (vm, uuid) = (&point.manifest.vm, point.manifest.uuid);
    let mut obstacles = Obstacles::default();
    if let Some(role) = role(on, directory).await? {
        obstacles.refused(
            format!("the replica of {vm} on {host} is live since {}", role.since),
            "\"kvm-clone-ctl replicate undo\" ends that",
        );
    }
    let live = replica::live(directory);
    if obstacles.is_empty() && host.file_facts(&live).await?.is_some() {
        obstacles.refused(
            format!("{live} on {host} is there, and no failover has made it"),
            "somebody may have followed a RUNBOOK.txt: move it away if it is of no use",
        );
    }
    let destination = Destination::survey(on).await?;
    if destination.named(vm).is_some() || destination.with_uuid(uuid).is_some() {
        obstacles.refused(
            format!("{host} has a VM {vm}, or one with its UUID, already"),
            "undefine it there if it is of no use",
        );
    }
    let definition = definition_of(on, point).await?;
    let warnings = &mut result.outcome.warnings;
    checks::equipment(&definition, &destination, true, &mut obstacles, warnings).await?;
    let network = with_manifest(&request.network, point);
    let edits = connected(
        &definition,
        &destination,
        &network,
        vm,
        &mut obstacles,
        warnings,
    );
    if !request.source_is_dead {
        // A source is fenced when nothing else is in the way.
        let fence = request.fence.as_deref().filter(|_| obstacles.is_empty());
        check_source(context, connect, request, point, fence, &mut obstacles).await;
    }
    let found = obstacles.into_found();
    if let Some(error) = to_error(&found, &format!("cannot start {vm} on {host}")) {
        result.outcome.obstacles = found;
        return Err(error);
    }
    definition.edited(&edits)
}

/// The definition that a point holds.
pub(super) async fn definition_of(on: &Hypervisor, point: &Point) -> Result<Definition> {
    let path = naming::join(&point.path, "domain.xml");
    let text = on.host().read_file(&path).await?.unwrap_or_default();
    Definition::parse(String::from_utf8_lossy(&text).into_owned())
}

/// What the user says of networks, and else what the point does.
pub(super) fn with_manifest(network: &NetworkConfig, point: &Point) -> NetworkConfig {
    let mut network = network.clone();
    for (old, new) in &point.manifest.networks {
        network
            .map
            .entry(old.clone())
            .or_insert_with(|| new.clone());
    }
    network
}

/// The changes that connect a VM there.
pub(super) fn connected(
    definition: &Definition,
    to: &Destination,
    network: &NetworkConfig,
    vm: &str,
    obstacles: &mut Obstacles,
    warnings: &mut Vec<String>,
) -> Vec<Edit> {
    let connecting = Connecting {
        vm,
        to,
        starts: true,
    };
    let interfaces = definition.interfaces().iter().enumerate();
    let edits = interfaces.filter_map(|(index, interface)| {
        let wanted = network.target(interface);
        connecting.connect(index, &interface.source, wanted, obstacles, warnings)
    });
    edits.collect()
}

/// A source that is not known to be off counts as running.
async fn check_source(
    context: &Context,
    connect: &str,
    request: &FailoverRequest,
    point: &Point,
    fence: Option<&str>,
    obstacles: &mut Obstacles,
) {
    let (vm, uuid) = (&point.manifest.vm, point.manifest.uuid.to_string());
    let named = point.manifest.source.parse().ok();
    let state = async {
        let spec = request.source.clone().or(named);
        let spec = spec.ok_or_else(|| {
            let source = &point.manifest.source;
            Error::new(ErrorCode::NotFound, format!("\"{source}\" is no host"))
        })?;
        let source = Hypervisor::new(context.host(&spec), connect);
        source.host().share().await?;
        source.find_domain(&uuid).await
    };
    let source = &point.manifest.source;
    match state.await {
        Ok(None) => {}
        Ok(Some(domain)) if domain.state.is_off() => {}
        Ok(Some(domain)) => obstacles.refused(
            format!(
                "{vm} on {source} is {}: two of one VM spoil each other's work",
                domain.state
            ),
            "--planned shuts it down, and loses nothing",
        ),
        Err(why) => {
            let unknown = format!(
                "whether {vm} runs on {source} is not known: {}",
                why.one_line()
            );
            let hint = "make sure that it does not, and will not, and say so with --source-is-dead";
            match fence {
                None => obstacles.refused(unknown, hint),
                Some(fence) => {
                    let here = context.host(&HostSpec::Local);
                    let variables = [("SOURCE", source.as_str()), ("VM", vm.as_str())];
                    let fenced = here.user_command(fence, &variables, b"", FENCE_LIMIT);
                    if let Err(why) = fenced.await {
                        let why = why.one_line();
                        obstacles.refused(format!("{unknown}, and the fence failed: {why}"), hint);
                    }
                }
            }
        }
    }
}

/// Copies a point to where it may change, defines the VM and starts it.
async fn bring_up(
    on: &Hypervisor,
    directory: &str,
    point: &Point,
    definition: &Definition,
) -> Result<()> {
    let host = on.host();
    Replica::new(on, directory).make_readable(point).await?;
    for words in point.copying(definition, &replica::live(directory)) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        host.tool_output(&words, b"").await?;
    }
    let text = definition.text().as_bytes();
    on.virsh_with(&["define", "/dev/stdin"], text).await?;
    on.virsh(&["start", &point.manifest.uuid.to_string()])
        .await?;
    Ok(())
}

impl Role {
    pub(super) async fn write(&self, on: &Hypervisor, directory: &str) -> Result<()> {
        state::write_to(on, &note(directory), self).await
    }
}

/// Removes all that a start has made, unless the VM runs.
pub(super) async fn take_back(on: &Hypervisor, directory: &str, role: &Role) -> Result<()> {
    let uuid = role.uuid.to_string();
    if let Some(domain) = on.find_domain(&uuid).await? {
        if !domain.state.is_off() {
            let (vm, host, state) = (&role.vm, on.host(), domain.state);
            let message = format!("{vm} on {host}, whose writes would be lost, is {state}");
            return Err(Error::new(ErrorCode::Refused, message).hint("shut it down first"));
        }
        on.undefine(&uuid).await?;
    }
    let live = replica::live(directory);
    let all = role.made.iter().cloned().chain([live, note(directory)]);
    on.host().remove(&all.collect::<Vec<_>>()).await
}
