//! `sync`: brings the disks of a VM on the destination up to date with those of its source.

use std::num::NonZeroUsize;
use std::time::Instant;

use kvm_clone_protocol::message::ApplyChoice;
use uuid::Uuid;

use super::checkpoint::Checkpoint;
use super::container::{self, Containers, Written};
use super::lineage::{self, Lineage};
use super::live::{self, Hold, LiveChoice, Quiesce, Reading, Versions};
use super::obstacle::{Obstacles, to_error};
use super::pairs::{self, Subject};
use super::reference::Reference;
use super::result::VmResult;
use super::state::{self, Kind};
use super::survey::Survey;
use super::transfers::{Move, Moves};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::Guard;
use crate::libvirt::Hypervisor;
use crate::transfer::{BeforeChange, Context, MethodChoice, Operation, Options};

/// What is brought up to date, and how.
#[derive(Debug, Clone)]
pub struct SyncRequest {
    /// The host that has the VM.
    pub source: HostSpec,
    /// The host that has the VM which follows it.
    pub destination: HostSpec,
    /// Name or UUID of the VM.
    pub vm: String,
    /// Name of the VM on the destination; without it, the same.
    pub target_name: Option<String>,
    /// Keep the state of the destination's disks before the sync, and so many of such states.
    pub checkpoint: Option<NonZeroUsize>,
    /// Only say what would be shipped.
    pub dry_run: bool,
    /// The destination may be overwritten wherever it came from.
    pub overwrite: bool,
    /// Disks that are left out, by target.
    pub exclude_disks: Vec<String>,
    /// What is done about a VM that runs.
    pub live: LiveChoice,
    /// Whether its file systems are frozen for that.
    pub quiesce: Quiesce,
    /// How many disks are transferred at once.
    pub parallel: NonZeroUsize,
    /// How each is transferred.
    pub options: Options,
}

/// Both VMs, found fit for a sync.
struct Fit {
    source: Survey,
    target: Survey,
    moves: Vec<Move>,
    subject: Subject,
    reading: Reading,
    versions: Versions,
    options: Options,
    checkpoint: Checkpoint,
    /// Keeps other runs away from the one that is overwritten; a dry run overwrites none.
    _lock: Option<Guard>,
}

/// Syncs a VM. A failure is part of the result.
pub async fn run(context: &Context, connect: &str, request: &SyncRequest) -> VmResult {
    let started = Instant::now();
    let (source, destination) = (request.source.to_string(), request.destination.to_string());
    let mut result = VmResult::new("sync", source, destination);
    result.vm.clone_from(&request.vm);
    result.target_vm = request
        .target_name
        .clone()
        .unwrap_or_else(|| request.vm.clone());
    result.dry_run = request.dry_run;
    let done = sync(context, connect, request, &mut result).await;
    result.ended(started, done)
}

async fn sync(
    context: &Context,
    connect: &str,
    request: &SyncRequest,
    result: &mut VmResult,
) -> Result<()> {
    let from = Hypervisor::new(context.host(&request.source), connect);
    let to = Hypervisor::new(context.host(&request.destination), connect);
    tokio::try_join!(from.host().share(), to.host().share())?;
    let mut fit = prepare(&from, &to, request, result).await?;
    if request.checkpoint.is_some() && !request.dry_run {
        result.checkpoints = fit.checkpoint.take(&fit.target).await?;
    }
    let versions = Some(&fit.versions).filter(|_| !request.dry_run);
    let warnings = &mut result.warnings;
    let hold = Hold::begin(&fit.source, fit.reading, versions, warnings).await?;
    if let Some(hold) = &hold {
        hold.redirect(&mut fit.moves, &mut fit.options);
    }
    result.consistency = live::consistency(fit.reading, hold.as_ref());
    let done = if request.dry_run {
        look(context, request, &mut fit, result).await
    } else {
        Box::pin(copy(context, request, &mut fit, result)).await
    };
    if let Some(hold) = &hold {
        hold.name_results(&fit.options, &mut result.disks, &mut result.warnings);
    }
    live::let_end(hold, done).await?;
    if request.dry_run {
        return Ok(());
    }
    if matches!(fit.reading, Reading::Snapshot(_)) {
        live::prune(&fit.source, &fit.versions).await?;
    }
    fit.checkpoint.prune(&fit.target).await
}

/// Makes the disks of the destination equal to what is read.
async fn copy(
    context: &Context,
    request: &SyncRequest,
    fit: &mut Fit,
    result: &mut VmResult,
) -> Result<()> {
    let (to, uuid) = (&fit.target.on, fit.target.domain.definition.uuid());
    let (references, images) = match fit.subject {
        Subject::Images => (Reference::replaced(&fit.source, &fit.target), Vec::new()),
        Subject::Contents => (Vec::new(), container::of_target(&fit.source, &fit.target)),
    };
    let options = &fit.options;
    let by_agents =
        options.method == MethodChoice::Blocksync && options.apply != ApplyChoice::Inplace;
    let pair = &fit.versions.pair;
    let mut lineage = Lineage::begun(&fit.source, pair, fit.subject, by_agents, references);
    let containers = Containers::open(to, fit.target.name(), &uuid.to_string(), images).await?;
    if let Some(containers) = &containers {
        containers.redirect(&mut fit.moves, &fit.versions);
    }
    let raw = fit.moves.iter().filter(|each| each.write_to.is_none());
    let raw: Vec<String> = raw.map(|each| each.destination.clone()).collect();
    let before = Box::pin(async {
        match containers.as_ref().filter(|_| by_agents) {
            Some(containers) => {
                let overlays = containers.note(&raw).await?;
                lineage.write_with(overlays, to, uuid).await
            }
            None => lineage.write(to, uuid).await,
        }
    });
    let copied = ship(context, request, fit, before, result).await;
    match containers {
        Some(containers) => put(to, uuid, containers, &mut lineage, copied).await?,
        None => copied?,
    }
    let paths = fit.moves.iter().map(|each| each.destination.clone());
    let paths: Vec<String> = paths.collect();
    let version = Some(fit.versions.becomes.clone());
    let version = version.filter(|_| fit.subject == Subject::Contents);
    lineage.end(to, uuid, &paths, version).await
}

/// Puts what was written through servers into its place, if all was `copied`.
async fn put(
    on: &Hypervisor,
    uuid: Uuid,
    containers: Containers,
    lineage: &mut Lineage,
    copied: Result<()>,
) -> Result<()> {
    let mut named = copied;
    if named.is_ok() && lineage.overlays().is_none() {
        // In place: no instant is left at which raw disks came to count.
        named = match containers.note(&[]).await {
            Ok(overlays) => lineage.write_with(overlays, on, uuid).await,
            Err(error) => Err(error),
        };
    }
    let (written, ended) = containers.end().await;
    match (named.and(ended), lineage.overlays()) {
        (Ok(()), Some(overlays)) => overlays.apply(on).await,
        (Ok(()), None) => Ok(()),
        // Whether it had come to count, only the agents know.
        (Err(error), Some(_)) => Err(Box::pin(settled(on, uuid, &written, error)).await),
        (Err(error), None) => {
            written.discard().await?;
            Err(error)
        }
    }
}

/// Ends what a run has left that failed with `error`, or says who does.
async fn settled(on: &Hypervisor, uuid: Uuid, written: &Written, error: Error) -> Error {
    let settled = match lineage::settle(on, &uuid.to_string()).await {
        // Those that the lineage had not come to name.
        Ok(_) => written.discard().await,
        Err(why) => Err(why),
    };
    let Err(why) = settled else { return error };
    let (note, host) = (why.one_line(), on.host());
    error
        .with_note(format!("what it has left could not be ended: {note}"))
        .hint(format!("\"kvm-clone-ctl recover {host}\" ends that"))
}

/// Says what would be shipped.
async fn look(
    context: &Context,
    request: &SyncRequest,
    fit: &mut Fit,
    result: &mut VmResult,
) -> Result<()> {
    let reading = Reading::to_look_at(&fit.target, fit.subject);
    let shown = Hold::begin(&fit.target, reading, None, &mut result.warnings).await?;
    if let Some(shown) = &shown {
        shown.redirect_destination(&mut fit.moves);
    }
    // The other methods cannot tell without writing.
    fit.options.method = MethodChoice::Blocksync;
    let nothing = Box::pin(async { Ok(()) });
    let looked = ship(context, request, fit, nothing, result).await;
    live::let_end(shown, looked).await
}

/// Looks at both VMs; or gives all that is in the way as one error.
async fn prepare(
    from: &Hypervisor,
    to: &Hypervisor,
    request: &SyncRequest,
    result: &mut VmResult,
) -> Result<Fit> {
    let mut obstacles = Obstacles::default();
    let excluded = &request.exclude_disks;
    let mut source = Survey::of(from, &request.vm, excluded, &mut obstacles).await?;
    live::mend(from, &mut source, &mut result.warnings).await?;
    result.vm = source.name().to_owned();
    lineage::check_source(&source, &mut obstacles).await?;
    let target_name = request.target_name.as_deref();
    let target_name = target_name.unwrap_or_else(|| source.name());
    result.target_vm = target_name.to_owned();
    let there = to.domain(target_name).await?;
    let lock = if request.dry_run {
        None
    } else {
        let uuid = there.definition.uuid().to_string();
        let lock = lock(to, &uuid, target_name).await?;
        result.warnings.extend(lineage::settle(to, &uuid).await?);
        Some(lock)
    };
    let target = Survey::of_domain(to, there, &[], &mut obstacles).await?;
    let target = without(target, excluded);
    let mut reading = request
        .live
        .reading(request.quiesce, &source, &mut obstacles);
    let (host, state) = (to.host(), target.domain.state);
    if !state.is_off() {
        obstacles.refused(
            format!("{target_name} on {host}, which would be overwritten, is {state}"),
            "shut it down first; are the arguments in the right order?",
        );
    }
    if !request.overwrite && !request.dry_run {
        lineage::check(&source, &target, &mut obstacles).await?;
    }
    let holds = lineage::holds(&source, &target).await?;
    let mut options = request.options.clone();
    let subject = match reading {
        Reading::Snapshot(_) => Subject::Contents,
        _ => Subject::between(&source, &target, holds.contents),
    };
    let moves = pairs::pair(&source, &target, subject, &mut obstacles);
    if subject == Subject::Contents {
        reading = reading.of_contents(&source, &mut obstacles);
        pairs::for_agents(&mut options, &mut obstacles);
    } else if request.dry_run && reading != Reading::Still {
        // Not for that is a guest suspended.
        reading = Reading::Torn;
    }
    options.live = reading.live_read();
    let checkpoint = match request.checkpoint {
        Some(keep) if !request.dry_run => {
            Checkpoint::plan(&target, &time_name(), keep.get(), &mut obstacles).await?
        }
        _ => Checkpoint::default(),
    };
    let found = obstacles.into_found();
    let what = format!("cannot sync {} to {target_name} on {host}", source.name());
    if let Some(error) = to_error(&found, &what) {
        result.obstacles = found;
        return Err(error);
    }
    let versions = Versions::after(holds.pair, holds.version, &source).await?;
    Ok(Fit {
        source,
        target,
        moves,
        subject,
        reading,
        versions,
        options,
        checkpoint,
        _lock: lock,
    })
}

/// Keeps other runs away from a VM.
async fn lock(on: &Hypervisor, uuid: &str, name: &str) -> Result<Guard> {
    let lock = state::lock(on, Kind::Lineage, uuid).await?;
    lock.ok_or_else(|| {
        let message = format!("another run is at {name} on {}", on.host());
        Error::new(ErrorCode::Busy, message)
    })
}

/// A clone that was made without a disk has none of that name, so the user's word is not checked
/// against it.
fn without(mut survey: Survey, excluded: &[String]) -> Survey {
    survey.disks.retain(|disk| !excluded.contains(&disk.target));
    survey
}

async fn ship(
    context: &Context,
    request: &SyncRequest,
    fit: &Fit,
    before: BeforeChange<'_>,
    result: &mut VmResult,
) -> Result<()> {
    let moves = Moves {
        operation: Operation::Sync,
        from: request.source.clone(),
        to: request.destination.clone(),
        options: fit.options.clone(),
        dry_run: request.dry_run,
        parallel: request.parallel,
    };
    let (mut disks, done) = moves.run(context, &fit.moves, before).await;
    container::name_results(&mut disks, &fit.moves);
    result.take_disks(disks);
    done
}

/// The present time as a part of a file name whose order is that of time.
fn time_name() -> String {
    let now = std::time::SystemTime::now();
    humantime::format_rfc3339_seconds(now)
        .to_string()
        .replace([':', '-'], "")
}
