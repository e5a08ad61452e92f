//! The replica of a VM: its disks as raw files below one directory of another host, brought up to
//! date by each run, which then keeps them as a new [`point`]. libvirt there knows
//! nothing of it.
//!
//! ```text
//!  DIR/replica.json    what the head is, and that a run has begun to change it
//!      replica.lock    a run is at it, from whichever controller
//!      head/vda.raw …  the newest version
//!      points/…        versions that stay
//!      deltas/…        their disks, where files share no blocks: chain.rs
//! ```

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use kvm_clone_protocol::message::{ApplyChoice, Recovery};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::chain;
use super::checks;
use super::failover;
use super::lineage::{self, Left};
use super::live::{self, Hold, LiveChoice, Quiesce, Reading, Version, Versions};
use super::naming;
use super::obstacle::{Obstacle, Obstacles, to_error};
pub(super) use super::point::live;
use super::point::{self, Listed, Making, Point, PointConsistency, PointFormat, Points};
use super::result::VmResult;
use super::space;
use super::state;
use super::survey::Survey;
use super::transfers::{Move, Moves};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Guard, Host};
use crate::libvirt::Hypervisor;
use crate::output;
use crate::transfer::recover::recover;
use crate::transfer::{Context, MethodChoice, Operation, Options};

/// The version of the format of `replica.json`.
const FORMAT: u32 = 1;

/// Which VM is brought up to date where, and how.
#[derive(Debug, Clone)]
pub struct ReplicaRequest {
    /// The host that has the VM.
    pub source: HostSpec,
    /// The host that has its replica.
    pub destination: HostSpec,
    /// Its name or UUID.
    pub vm: String,
    /// The directory of its replica.
    pub directory: String,
    /// What is done about it if it runs.
    pub live: LiveChoice,
    /// Whether its file systems are frozen for that.
    pub quiesce: Quiesce,
    /// Bytes that stay free on the destination's file system.
    pub min_free: u64,
    /// Of how many points it may come to consist.
    pub most_points: usize,
    /// After so long a run reads all, whatever is known of what has changed; `None` for never.
    pub full_scan_after: Option<SignedDuration>,
    /// Bytes a second, of all disks together; `None` for no limit.
    pub bandwidth_limit: Option<u64>,
    /// What networks and bridges of the source are on the destination.
    pub networks: BTreeMap<String, String>,
}

/// What a run does about a replica that is live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// It is refused: the replica follows its source.
    Follow,
    /// It keeps what a source has that is off; what is live is another copy, and is not touched.
    Keep,
}

/// How many disks are transferred at once.
const PARALLEL: NonZeroUsize = NonZeroUsize::new(4).expect("four is not zero");

/// What is remembered of the head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    format: u32,
    source_uuid: Uuid,
    /// A run began to change it, and has not ended.
    unfinished: bool,
    /// What its files were when the last run had ended.
    files: BTreeMap<String, Left>,
    /// What the replica is called there, whatever becomes of a run.
    pair: String,
    /// By this the source's host knows what the guest has written since.
    version: Option<Version>,
    /// When a run has last read all.
    #[serde(default)]
    scanned: Option<Timestamp>,
}

/// A replica, and where it is.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) on: Hypervisor,
    pub(super) directory: String,
}

/// Both ends, found fit.
struct Fit {
    source: Survey,
    moves: Vec<Move>,
    reading: Reading,
    versions: Versions,
    options: Options,
    /// When a run has last read all: before this one, and once it has ended.
    scanned_before: Option<Timestamp>,
    scanned: Option<Timestamp>,
    /// The points before this run.
    points: Vec<Point>,
    /// What the disks of the new one will be.
    format: PointFormat,
    /// Keeps other runs away.
    lock: Guard,
}

/// Brings a replica up to date, and makes a point of it. A failure is part of the result.
pub async fn refresh(
    context: &Context,
    connect: &str,
    request: &ReplicaRequest,
) -> (VmResult, Option<Point>) {
    let started = Instant::now();
    let (source, destination) = (request.source.to_string(), request.destination.to_string());
    let mut result = VmResult::new("replicate", source, destination);
    result.vm.clone_from(&request.vm);
    result.target_vm.clone_from(&request.vm);
    let run = run(context, connect, request, Purpose::Follow, &mut result);
    match Box::pin(run).await {
        Ok(point) => (result.ended(started, Ok(())), Some(point)),
        Err(error) => (result.ended(started, Err(error)), None),
    }
}

/// Keeps the disks of a source as a point that stays, while the VM runs from its replica.
///
/// # Errors
/// As a run; refused, when the VM runs at its source.
pub(super) async fn keep_source(
    context: &Context,
    connect: &str,
    request: &ReplicaRequest,
    warnings: &mut Vec<String>,
) -> Result<Point> {
    let (source, destination) = (request.source.to_string(), request.destination.to_string());
    let mut result = VmResult::new("replicate", source, destination);
    let run = run(context, connect, request, Purpose::Keep, &mut result);
    let point = Box::pin(run).await;
    warnings.append(&mut result.warnings);
    let point = point?;
    let on = context.host(&request.destination);
    pin(&on, &request.directory, &point.name, true).await
}

/// The points of a replica.
///
/// # Errors
/// When the host cannot be reached.
pub async fn points(on: &Host, directory: &str) -> Result<Listed> {
    Points::of(on, directory).list().await
}

/// Removes points of a replica, unless a run is at it, but for those that are pinned by now. Gives
/// back the names of those that went.
///
/// # Errors
/// Busy; when the host cannot be reached, or one cannot be removed.
pub async fn remove_points(on: &Host, directory: &str, points: &[Point]) -> Result<Vec<String>> {
    let lock = lock(on, directory).await?;
    let all = Points::of(on, directory);
    let pinned = all.pinned().await?;
    let goes = points.iter().filter(|point| !pinned.contains(&point.path));
    let goes: Vec<&Point> = goes.collect();
    all.remove(&goes).await?;
    lock.end().await?;
    Ok(goes.iter().map(|point| point.name.clone()).collect())
}

/// Has a point stay whatever is removed, or lets it go again.
///
/// # Errors
/// Not found, for no point of that name; busy, when a run is at the replica; when the host cannot be
/// reached.
pub async fn pin(on: &Host, directory: &str, name: &str, stays: bool) -> Result<Point> {
    let all = Points::of(on, directory);
    let points = all.list().await?.points;
    let names: Vec<&str> = points.iter().map(|point| point.name.as_str()).collect();
    let Some(point) = points.iter().find(|point| point.name == name) else {
        let message = format!("{directory} on {on} has no point {name}");
        let error = Error::new(ErrorCode::NotFound, message);
        return Err(match names.is_empty() {
            true => error,
            false => error.hint(format!("it has: {}", names.join(", "))),
        });
    };
    let lock = lock(on, directory).await?;
    all.pin(point, stays).await?;
    lock.end().await?;
    Ok(Point {
        pinned: stays,
        ..point.clone()
    })
}

/// Does something with a point that no run removes meanwhile.
///
/// # Errors
/// As [`pin`]; that of the work.
pub(super) async fn while_pinned(
    on: &Host,
    directory: &str,
    point: &Point,
    work: impl Future<Output = Result<()>>,
) -> Result<()> {
    if point.pinned {
        return work.await;
    }
    pin(on, directory, &point.name, true).await?;
    let done = work.await;
    let let_go = pin(on, directory, &point.name, false).await;
    let let_go = let_go.map(drop).map_err(|error| {
        let name = &point.name;
        error.context(format!("point {name} stays until \"pin --off\""))
    });
    done.and(let_go)
}

/// Removes a replica with all its points. Gives back the names of those.
///
/// # Errors
/// Not found, where there is none; refused, while it is live, or for points that the user wants to
/// stay, unless `pinned_too`; busy, when a run is at it; when the host cannot be reached.
pub async fn remove(on: &Hypervisor, directory: &str, pinned_too: bool) -> Result<Vec<String>> {
    let host = on.host();
    let names = host.names_in(directory).await?.unwrap_or_default();
    let is_replica = ["head", "points"]
        .iter()
        .any(|own| names.iter().any(|name| name == own));
    if !is_replica {
        let message = format!("there is no replica in {directory} on {host}");
        return Err(Error::new(ErrorCode::NotFound, message));
    }
    let lock = lock(host, directory).await?;
    let mut obstacles = Obstacles::default();
    if let Some(role) = failover::role(on, directory).await? {
        obstacles.refused(
            format!("{} runs on {host} from its replica", role.vm),
            "\"kvm-clone-ctl replicate failback\" brings it back; \"undo\" gives it up",
        );
    }
    let points = points(host, directory).await?.points;
    let pinned = points.iter().filter(|point| point.pinned);
    let pinned: Vec<&str> = pinned.map(|point| point.name.as_str()).collect();
    if !pinned.is_empty() && !pinned_too {
        obstacles.refused(
            format!(
                "{} of its points are to stay: {}",
                pinned.len(),
                pinned.join(", ")
            ),
            "\"pin --off\" lets one go, --pinned all of them",
        );
    }
    let found = obstacles.into_found();
    if let Some(error) = to_error(&found, &format!("cannot remove {directory} on {host}")) {
        return Err(error);
    }
    // Without its name it is a replica no more, whatever becomes of us.
    let (place, file) = naming::split(directory);
    let leaving = naming::join(place, &format!(".gone-{file}"));
    host.tool_output(&["mv", "-T", "--", directory, &leaving], b"")
        .await?;
    lock.end().await?;
    host.remove(std::slice::from_ref(&leaving)).await?;
    Ok(points.into_iter().map(|point| point.name).collect())
}

/// The VMs that have replicas at a place.
///
/// # Errors
/// When the host cannot be reached.
pub async fn names(on: &Host, place: &str) -> Result<Vec<String>> {
    let names = on.names_in(place).await?.unwrap_or_default();
    let files = names.iter().filter(|name| !name.starts_with('.'));
    Ok(files.filter_map(|file| state::name_of(file)).collect())
}

/// The instants of the newest points at a place, to a second, by VM: all by one command, for who
/// looks often.
///
/// # Errors
/// When the host cannot be reached.
pub async fn newest_points(on: &Host, place: &str) -> Result<BTreeMap<String, Timestamp>> {
    let mut newest = BTreeMap::new();
    if on.names_in(place).await?.is_none() {
        return Ok(newest);
    }
    let depth = "3";
    let words = [
        "find",
        place,
        "-ignore_readdir_race",
        "-mindepth",
        depth,
        "-maxdepth",
        depth,
    ];
    let said = on
        .tool_output(&[&words[..], &["-path", "*/points/*"]].concat(), b"")
        .await?;
    for line in said.lines() {
        let (points, name) = naming::split(line);
        let file = naming::split(naming::split(points).0).1;
        if let (Some(vm), Some(instant)) = (state::name_of(file), point::instant_of(name)) {
            let known = newest.entry(vm).or_insert(instant);
            *known = instant.max(*known);
        }
    }
    Ok(newest)
}

/// The VM of which a directory is the replica; `None` for one that holds no points.
///
/// # Errors
/// When the host cannot be reached.
pub async fn vm_of(on: &Host, directory: &str) -> Result<Option<String>> {
    let listed = points(on, directory).await?;
    Ok(listed.points.last().map(|point| point.manifest.vm.clone()))
}

/// The directory of a VM's replica at a place.
pub fn directory_of(place: &str, vm: &str) -> String {
    naming::join(place, &state::file_name(vm))
}

/// What keeps replicas from being at a place of a host, which need not exist; `gone` are VMs that
/// have one there, and that their source has no more.
///
/// # Errors
/// When the host cannot be reached, or may not look.
pub async fn check_place(
    on: &Host,
    place: &str,
    min_free: u64,
    most_points: usize,
    gone: &[String],
) -> Result<Vec<Obstacle>> {
    let mut obstacles = Obstacles::default();
    for vm in gone {
        let hint = "exclude it from the policy if that is meant";
        obstacles.add(
            ErrorCode::NotFound,
            format!("{vm} is gone from its source"),
            hint,
        );
    }
    if let Some(directory) = space::existing(on, place).await? {
        check_file_system(on, &directory, min_free, most_points, &mut obstacles).await?;
    }
    Ok(obstacles.into_found())
}

/// The file system of a directory must leave so much free. Where files cannot share blocks there, its
/// host needs QEMU's tools for points, and there must not be too many. Gives back what those are.
async fn check_file_system(
    on: &Host,
    directory: &str,
    needed: u64,
    most_points: usize,
    obstacles: &mut Obstacles,
) -> Result<PointFormat> {
    let free = on.space(directory).await?.free_bytes;
    if free < needed {
        let (free, needed) = (output::iec(free), output::iec(needed));
        obstacles.add(
            ErrorCode::NoSpace,
            format!("{directory} on {on} has {free} free, and {needed} are needed"),
            "make room there, or keep fewer points",
        );
    }
    if shares_blocks(on, directory).await? {
        return Ok(PointFormat::Raw);
    }
    if most_points > chain::MOST {
        let most = chain::MOST;
        obstacles.refused(
            format!(
                "\"keep\" is for {most_points} points, and where files share no blocks, as in {directory} on \
                 {on}, there can be {most}"
            ),
            "keep fewer, or choose a \"directory\" on XFS or btrfs",
        );
    }
    let found = on.tool(&["qemu-img", "--version"], b"").await?;
    if !found.status.success() {
        obstacles.missing(
            format!("files share no blocks in {directory} on {on}, and {on} has no qemu-img"),
            "install qemu-utils (Debian) there, or choose a \"directory\" on XFS or btrfs",
        );
    }
    Ok(PointFormat::Delta)
}

async fn shares_blocks(on: &Host, directory: &str) -> Result<bool> {
    let [one, other] = [".kc-one", ".kc-other"].map(|name| naming::join(directory, name));
    // A file without contents has no blocks, and is copied anywhere.
    on.write_file(&one, b"a block").await?;
    let words = ["cp", "--reflink=always", "--", &one, &other];
    let copied = on.tool(&words, b"").await?;
    // Whatever became of it.
    on.remove(&[one, other]).await?;
    Ok(copied.status.success())
}

/// Keeps other runs away from a replica.
///
/// # Errors
/// Busy, when one is at it; when the host cannot be reached.
pub(super) async fn lock(on: &Host, directory: &str) -> Result<Guard> {
    let path = naming::join(directory, "replica.lock");
    on.lock(&path).await?.ok_or_else(|| {
        let message = format!("another run is at {directory} on {on}, or reads a point there");
        Error::new(ErrorCode::Busy, message).hint("wait until it has ended")
    })
}

async fn run(
    context: &Context,
    connect: &str,
    request: &ReplicaRequest,
    purpose: Purpose,
    result: &mut VmResult,
) -> Result<Point> {
    let from = Hypervisor::new(context.host(&request.source), connect);
    let to = Hypervisor::new(context.host(&request.destination), connect);
    tokio::try_join!(from.host().share(), to.host().share())?;
    let replica = Replica::new(&to, &request.directory);
    let mut fit = Box::pin(prepare(&from, &replica, request, purpose, result)).await?;
    // Ahead of the instant that the disks are read as of: no point is taken for newer than it is.
    let now = unused_instant(&fit.points).await;
    let warnings = &mut result.warnings;
    let hold = Hold::begin(&fit.source, fit.reading, Some(&fit.versions), warnings).await?;
    if let Some(hold) = &hold {
        hold.redirect(&mut fit.moves, &mut fit.options);
    }
    result.consistency = live::consistency(fit.reading, hold.as_ref());
    let copied = Box::pin(copy(context, request, &replica, &fit, result)).await;
    if let Some(hold) = &hold {
        hold.name_results(&fit.options, &mut result.disks, &mut result.warnings);
    }
    let (small, done) = match copied {
        Ok(small) => (small, Ok(())),
        Err(error) => (Vec::new(), Err(error)),
    };
    live::let_end(hold, done).await?;
    let point = replica
        .points()
        .make(&Making {
            survey: &fit.source,
            instant: now,
            sequence: point::next(&fit.points),
            consistency: PointConsistency::of(result.consistency),
            head: &replica.head(),
            format: fit.format,
            brought: &result.disks,
            small: &small,
            networks: &request.networks,
        })
        .await?;
    fit.points.push(point.clone());
    chain::link(replica.on.host(), &fit.points, Some(&point)).await?;
    replica.end(&fit).await?;
    if matches!(fit.reading, Reading::Snapshot(_)) {
        live::prune(&fit.source, &fit.versions).await?;
    }
    // Who comes next, to remove points, must not find it busy.
    fit.lock.end().await?;
    Ok(point)
}

/// Now, or as soon as no point is called so: their names are of seconds.
async fn unused_instant(points: &[Point]) -> Timestamp {
    loop {
        let now = Timestamp::now();
        let name = point::name_of(now);
        if points.iter().all(|point| point.name != name) {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Looks at both ends; or gives all that is in the way as one error.
async fn prepare(
    from: &Hypervisor,
    replica: &Replica,
    request: &ReplicaRequest,
    purpose: Purpose,
    result: &mut VmResult,
) -> Result<Fit> {
    let mut obstacles = Obstacles::default();
    let mut source = Survey::of(from, &request.vm, &[], &mut obstacles).await?;
    live::mend(from, &mut source, &mut result.warnings).await?;
    result.vm = source.name().to_owned();
    result.target_vm = source.name().to_owned();
    lineage::check_source(&source, &mut obstacles).await?;
    let leave_out = |_: &str| "exclude the VM from the policy, or take it out of the VM".to_owned();
    checks::portable(&source, &[], leave_out, &mut obstacles);
    if source.disks.is_empty() {
        let hint = "exclude it from the policy";
        obstacles.refused(
            format!("{} has no disk that can be copied", source.name()),
            hint,
        );
    }
    let (host, directory) = (replica.on.host(), &replica.directory);
    let head = replica.read().await?;
    let seeded = host.names_in(&replica.head()).await?.unwrap_or_default();
    let is_first = head.is_none() && seeded.is_empty();
    let runs = !source.domain.state.is_off();
    replica.check_role(purpose, runs, &mut obstacles).await?;
    let uuid = source.domain.definition.uuid();
    if let Some(head) = head.as_ref().filter(|head| head.source_uuid != uuid) {
        obstacles.refused(
            format!(
                "{directory} on {host} is the replica of another VM, {}",
                head.source_uuid
            ),
            format!(
                "this {} is {uuid}: move that replica away if it is no longer needed",
                source.name()
            ),
        );
    }
    let reading = request
        .live
        .reading(request.quiesce, &source, &mut obstacles)
        .of_contents(&source, &mut obstacles);
    let mut options = Options {
        method: MethodChoice::Blocksync,
        live: reading.live_read(),
        bandwidth_limit: request.bandwidth_limit,
        ..Options::default()
    };
    let format = replica
        .check_room(&source, is_first, request, &mut obstacles)
        .await?;
    let found = obstacles.into_found();
    let what = format!("cannot replicate {} to {host}", source.name());
    if let Some(error) = to_error(&found, &what) {
        result.obstacles = found;
        return Err(error);
    }
    for inner in [directory, &replica.head(), &format!("{directory}/points")] {
        host.make_directory(inner, "0711").await?;
    }
    let lock = lock(host, directory).await?;
    // A failover may have had it until now.
    let mut obstacles = Obstacles::default();
    replica.check_role(purpose, runs, &mut obstacles).await?;
    if let Some(error) = to_error(&obstacles.into_found(), &what) {
        return Err(error);
    }
    let (head, points) = replica.settle().await?;
    let scanned_before = head.as_ref().and_then(|head| head.scanned);
    options.full_scan = is_scan_due(scanned_before, request.full_scan_after);
    let now = Timestamp::now();
    let scanned = scanned_before.filter(|_| !options.full_scan).or(Some(now));
    let (pair, version) = match head {
        Some(head) if replica.is_as_left(&head).await? => (Some(head.pair), head.version),
        Some(head) => (Some(head.pair), None),
        None => (None, None),
    };
    let versions = Versions::after(pair, version, &source).await?;
    let mut ends = chain::ends(&points);
    if !ends.is_empty() {
        // The agents know ahead of a commit what it overwrites only of what waits beside a disk.
        options.apply = ApplyChoice::Staged;
    }
    let moves = source.disks.iter().map(|disk| {
        let (target, image) = (&disk.target, disk.images[0].path.clone());
        let head = naming::join(&replica.head(), &point::file_of(target));
        Move {
            preserve: ends.remove(target),
            ..Move::of_guest(target, image, head)
        }
    });
    Ok(Fit {
        moves: moves.collect(),
        points,
        format,
        source,
        reading,
        versions,
        options,
        scanned_before,
        scanned,
        lock,
    })
}

/// Whether what is known of changes has been believed for so long; a first run reads all anyway. A
/// clock that was put back does not keep it away.
fn is_scan_due(last: Option<Timestamp>, period: Option<SignedDuration>) -> bool {
    let age = last.map(|last| Timestamp::now().duration_since(last).abs());
    age.zip(period).is_some_and(|(age, period)| age >= period)
}

/// Makes the head equal to what is read, and gives back the small files of the VM.
async fn copy(
    context: &Context,
    request: &ReplicaRequest,
    replica: &Replica,
    fit: &Fit,
    result: &mut VmResult,
) -> Result<Vec<(String, Vec<u8>)>> {
    let small = small_files(&fit.source).await?;
    let moves = Moves {
        operation: Operation::Sync,
        from: request.source.clone(),
        to: request.destination.clone(),
        options: fit.options.clone(),
        dry_run: false,
        parallel: PARALLEL,
    };
    let head = Head {
        format: FORMAT,
        source_uuid: fit.source.domain.definition.uuid(),
        unfinished: true,
        files: BTreeMap::new(),
        pair: fit.versions.pair.clone(),
        version: None,
        // Unless it ends well, the next one reads all that this one was to read.
        scanned: fit.scanned_before,
    };
    let before = Box::pin(replica.write(&head));
    let (disks, done) = moves.run(context, &fit.moves, before).await;
    result.take_disks(disks);
    done.map(|()| small)
}

/// UEFI variables and the state of the TPM, by their names in a point.
pub(super) async fn small_files(source: &Survey) -> Result<Vec<(String, Vec<u8>)>> {
    let directory = Hypervisor::tpm_directory(source.domain.definition.uuid());
    let tpm = source.tpm_files.iter();
    let tpm = tpm.map(|file| (format!("tpm/{file}"), naming::join(&directory, file)));
    let nvram = source
        .nvram
        .iter()
        .map(|path| ("nvram".to_owned(), path.clone()));
    let mut small = Vec::new();
    for (name, path) in nvram.chain(tpm) {
        // What went meanwhile is not there at the instant either.
        if let Some(contents) = source.on.host().read_file(&path).await? {
            small.push((name, contents));
        }
    }
    Ok(small)
}

impl Replica {
    pub(super) fn new(on: &Hypervisor, directory: &str) -> Self {
        Self {
            on: on.clone(),
            directory: directory.to_owned(),
        }
    }

    /// Adds an obstacle when the replica is live: it would be overwritten. `runs`: so does its source.
    async fn check_role(
        &self,
        purpose: Purpose,
        runs: bool,
        obstacles: &mut Obstacles,
    ) -> Result<()> {
        let Some(role) = failover::role(&self.on, &self.directory).await? else {
            return Ok(());
        };
        let (vm, host, since) = (&role.vm, self.on.host(), role.since);
        let live = format!("{vm} runs on {host} from its replica since {since}");
        if runs {
            let source = &role.source;
            obstacles.refused(
                format!("split brain: {live}, and on {source} as well"),
                "switch one of the two off; nothing is overwritten on either side",
            );
        } else if purpose == Purpose::Follow {
            let ways = "\"kvm-clone-ctl replicate failback\" brings it back; \"undo\" gives up what \
                        was written there";
            obstacles.refused(format!("{live}, and would be overwritten"), ways);
        }
        Ok(())
    }

    fn points(&self) -> Points<'_> {
        Points::of(self.on.host(), &self.directory)
    }

    fn head(&self) -> String {
        naming::join(&self.directory, "head")
    }

    fn note(&self) -> String {
        naming::join(&self.directory, "replica.json")
    }

    async fn write(&self, head: &Head) -> Result<()> {
        state::write_to(&self.on, &self.note(), head).await
    }

    /// What is remembered of the head; `None` before the first run has changed it.
    async fn read(&self) -> Result<Option<Head>> {
        state::read_from(&self.on, &self.note()).await
    }

    /// The same once what an earlier run has left half done is ended.
    async fn settle(&self) -> Result<(Option<Head>, Vec<Point>)> {
        self.points().sweep().await?;
        let head = self.read().await?;
        let listed = self.points().list().await?;
        chain::check(&listed)?;
        chain::check_count(&listed.points)?;
        let points = listed.points;
        let has_ends = !chain::ends(&points).is_empty();
        match &head {
            Some(head) if head.unfinished => {
                recover(self.on.host(), Recovery::Finish).await?;
                chain::link(self.on.host(), &points, None).await?;
            }
            Some(head) if !has_ends || self.is_as_left(head).await? => {}
            None if !has_ends => {}
            _ => {
                let (head, host) = (self.head(), self.on.host());
                let message = format!(
                    "{head} on {host} is not what the last run left there, and the points of the \
                     replica, which stand on it, may show anything"
                );
                let hint = format!("move {} away: the next run makes a new one", self.directory);
                return Err(Error::new(ErrorCode::Refused, message).hint(hint));
            }
        }
        Ok((head, points))
    }

    /// Keeps runs away as long as a point is read that stands on others, and [makes it
    /// readable](Self::make_readable); `None` for one that stands on nothing.
    ///
    /// # Errors
    /// Busy, when a run is at the replica; as there.
    pub(super) async fn hold(&self, point: &Point) -> Result<Option<Guard>> {
        if !chain::stands(point) {
            return Ok(None);
        }
        let lock = lock(self.on.host(), &self.directory).await?;
        self.make_readable(point).await?;
        Ok(Some(lock))
    }

    /// Sees to it that a point can be read: a sync onto the head that was committed, and broke off
    /// then, is finished first.
    ///
    /// # Errors
    /// When the host cannot be reached, or that cannot be finished.
    pub(super) async fn make_readable(&self, point: &Point) -> Result<()> {
        let head = self.read().await?;
        if chain::stands(point) && head.is_some_and(|head| head.unfinished) {
            recover(self.on.host(), Recovery::Finish).await?;
        }
        Ok(())
    }

    /// Whether nobody has written to the head since the last run.
    async fn is_as_left(&self, head: &Head) -> Result<bool> {
        if head.unfinished {
            return Ok(false);
        }
        for (path, left) in &head.files {
            let facts = self.on.host().file_facts(path).await?;
            if facts.as_ref().map(Left::of).as_ref() != Some(left) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the head takes, or a first copy, must leave this much free. Gives back what points are
    /// there.
    async fn check_room(
        &self,
        source: &Survey,
        is_first: bool,
        request: &ReplicaRequest,
        obstacles: &mut Obstacles,
    ) -> Result<PointFormat> {
        let images = source.disks.iter().flat_map(|disk| &disk.images);
        let data = images.map(|image| image.facts.allocated_bytes).sum::<u64>();
        let first = if is_first { data } else { 0 };
        let needed = request.min_free.saturating_add(first);
        let existing = space::existing(self.on.host(), &self.directory).await?;
        let directory = existing.as_ref().unwrap_or(&self.directory);
        let most_points = request.most_points;
        check_file_system(self.on.host(), directory, needed, most_points, obstacles).await
    }

    /// The run has ended well: the head is what it is now. Disks that the VM has no more go.
    async fn end(&self, fit: &Fit) -> Result<()> {
        let host = self.on.host();
        let ours: Vec<String> = fit
            .moves
            .iter()
            .map(|each| each.destination.clone())
            .collect();
        let names = host.names_in(&self.head()).await?.unwrap_or_default();
        let all = names.iter().map(|name| naming::join(&self.head(), name));
        let ends = chain::ends(&fit.points);
        let needed: Vec<String> = ends.keys().map(|target| point::file_of(target)).collect();
        let is_needed = |path: &str| needed.iter().any(|file| *file == naming::split(path).1);
        let others: Vec<String> = all
            .filter(|path| path.ends_with(".raw") && !ours.contains(path) && !is_needed(path))
            .collect();
        host.remove(&others).await?;
        let mut files = BTreeMap::new();
        for path in ours {
            if let Some(facts) = host.file_facts(&path).await? {
                files.insert(path, Left::of(&facts));
            }
        }
        self.write(&Head {
            format: FORMAT,
            source_uuid: fit.source.domain.definition.uuid(),
            unfinished: false,
            files,
            pair: fit.versions.pair.clone(),
            version: Some(fit.versions.becomes.clone()),
            scanned: fit.scanned,
        })
        .await
    }
}
