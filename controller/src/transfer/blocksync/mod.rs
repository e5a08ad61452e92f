//! Method `blocksync`: two agents, a data connection and a session for each disk, one commit for
//! all of them.
//!
//! ```text
//!  connect ─ open all ─ check ─ for each disk: route ─ start ─ session … ended ─ prepare all ─ commit
//! ```

mod pair;
mod relay;
mod route;
mod sessions;

use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt as _;
use std::pin::Pin;

use kvm_clone_protocol::message::{
    Access, ApplyChoice, Commit, Control, DiskKind, Message as _, Open, Opened, Prepare, Preserve,
};
use kvm_clone_protocol::units::{BLOCK_SIZE, Geometry};

use super::copy::torn;
use super::request::{LiveRead, Operation, Request, Verification};
use super::result::TransferResult;
use super::{At as _, BeforeChange, Context, Job, Method, Stopped, Working, unexpected};
use crate::error::{Error, ErrorCode, Result};
use pair::{Pair, Side};
use sessions::Sessions;

/// As results name it.
pub(super) const NAME: &str = "blocksync";

/// The pair of agents, once they are connected.
#[derive(Debug, Default)]
pub(super) struct Blocksync {
    pair: Option<Pair>,
}

impl Method for Blocksync {
    fn name(&self) -> &'static str {
        NAME
    }

    fn transfer<'a>(
        &'a mut self,
        context: &'a Context,
        jobs: &'a mut [Job<'_>],
        parallel: NonZeroUsize,
        before: BeforeChange<'a>,
    ) -> Working<'a> {
        Box::pin(transfer(context, jobs, parallel, before, &mut self.pair))
    }

    fn end<'a>(
        &'a mut self,
        failed: Option<&'a Error>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            match (self.pair.take(), failed) {
                (Some(pair), None) => pair.close().await,
                (Some(pair), Some(error)) => pair.abort(&error.one_line()).await,
                (None, _) => {}
            }
        })
    }
}

async fn transfer(
    context: &Context,
    jobs: &mut [Job<'_>],
    parallel: NonZeroUsize,
    before: BeforeChange<'_>,
    connected: &mut Option<Pair>,
) -> Result<(), Stopped> {
    let Some(request) = jobs.first().map(|job| job.request) else {
        return Ok(());
    };
    let (source, destination) = (
        context.host(&request.source.host),
        context.host(&request.destination.host),
    );
    let pair = connected.insert(Pair::connect(&source, &destination, jobs.len()).await?);
    for agent in [&pair.source, &pair.destination] {
        jobs[0].result.warnings.extend_from_slice(agent.warnings());
    }
    for job in &mut *jobs {
        job.result.agent_source = Some(pair.source.build());
        job.result.agent_destination = Some(pair.destination.build());
    }
    let ships = request.operation == Operation::Sync && !request.dry_run;
    if jobs.iter().any(|job| job.request.preserve.is_some()) {
        pair.destination.check_knows(Preserve::KIND)?;
    }
    let mut disks = Vec::new();
    for (at, job) in jobs.iter_mut().enumerate() {
        disks.push(open(pair, at, job).await.at(at)?);
    }
    let mut before = Some(before);
    if ships
        && request.options.apply == ApplyChoice::Inplace
        && let Some(before) = before.take()
    {
        before.await?;
    }
    let mut sessions = Sessions::new(context, pair, jobs, &disks, ships);
    let roots = sessions.run(parallel).await?;
    if ships {
        prepare(pair, jobs, &roots).await?;
        if let Some(before) = before {
            before.await?;
        }
        preserve(pair, jobs).await?;
        commit(pair, jobs).await?;
    }
    if request.operation == Operation::Verify {
        for (job, disks) in jobs.iter_mut().zip(&disks) {
            if job.result.error.is_none() {
                job.result.error = difference(disks, &job.result);
            }
        }
    }
    Ok(())
}

/// What both paths of a job turned out to be.
#[derive(Debug)]
struct Disks {
    source: Opened,
    destination: Opened,
}

/// Opens both disks, and refuses what cannot end well before anything is changed.
async fn open(pair: &mut Pair, at: usize, job: &mut Job<'_>) -> Result<Disks> {
    let request = job.request;
    // A dry run looks at a destination as a run would, and tells of one that is not there; of an
    // export it needs no more than to read.
    let reads = request.dry_run && request.destination.path().is_none();
    let access = if request.operation == Operation::Sync && !reads {
        Access::Destination
    } else {
        Access::Compare
    };
    if request.options.live == LiveRead::Torn {
        job.result.warnings.push(torn(&request.source));
    }
    let reading = if request.options.live.reads_in_use() {
        Access::LiveSource
    } else {
        Access::Source
    };
    let source = open_one(pair, Side::Source, at, request, reading).await?;
    let destination = open_one(pair, Side::Destination, at, request, access).await?;
    let result = &mut job.result;
    result.bytes_total = Some(source.size);
    result.blocks_total = Some(source.size.div_ceil(BLOCK_SIZE));
    result.resumed = destination.resumed && !request.dry_run;
    let disks = Disks {
        source,
        destination,
    };
    check_distinct(pair, request, &disks)?;
    check_reread(request, &disks)?;
    check_sizes(request, &disks, result)?;
    Ok(disks)
}

async fn open_one(
    pair: &mut Pair,
    side: Side,
    at: usize,
    request: &Request,
    access: Access,
) -> Result<Opened> {
    let disk = match side {
        Side::Source => &request.source,
        Side::Destination => &request.destination,
    };
    let open = Open {
        disk: number(at),
        location: disk.location.on_wire(),
        access,
    };
    match pair.ask(side, Some(open.disk), &open).await? {
        Control::Opened(opened) if opened.disk == open.disk => Ok(opened),
        answer => Err(unexpected("open", &answer)),
    }
}

/// The number of a job's disk, on both control connections.
fn number(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

/// One kernel, one identity: one and the same storage. Or two kernels, and one storage that both
/// give the same name.
fn check_distinct(pair: &Pair, request: &Request, disks: &Disks) -> Result<()> {
    let (ours, theirs) = (&disks.source, &disks.destination);
    let same_identity = ours.identity.is_some() && ours.identity == theirs.identity;
    let same_storage = !ours.storage.is_empty() && ours.storage == theirs.storage;
    let (source, destination) = (&request.source, &request.destination);
    let same_export = ours.kind == DiskKind::Export && source.location == destination.location;
    if pair.is_one_kernel() && (same_identity || same_export) || same_storage {
        let message = format!("{source} and {destination} are one and the same disk");
        return Err(Error::new(ErrorCode::Refused, message));
    }
    Ok(())
}

/// What a server has written is in its caches as well, which nobody else can look past.
fn check_reread(request: &Request, disks: &Disks) -> Result<()> {
    let rereads = request.options.verify == Verification::Reread;
    if !rereads || disks.destination.kind != DiskKind::Export {
        return Ok(());
    }
    let message = format!(
        "{} cannot be read again past its server's caches",
        request.destination
    );
    Err(Error::new(ErrorCode::MissingRequirement, message)
        .hint("--verify streamed compares what was received"))
}

fn check_sizes(request: &Request, disks: &Disks, result: &mut TransferResult) -> Result<()> {
    let (source, destination) = (&disks.source, &disks.destination);
    if Geometry::new(source.size).is_none() {
        let message = format!("{} is larger than any disk may be", request.source);
        return Err(Error::new(ErrorCode::Refused, message));
    }
    let what = match destination.kind {
        DiskKind::Device => "device",
        DiskKind::Export => "export",
        DiskKind::File | DiskKind::Missing => return Ok(()),
    };
    let name = &request.destination;
    if destination.size < source.size {
        let (size, needed, of) = (destination.size, source.size, &request.source);
        let message = format!("the {what} {name} has {size} bytes, {of} has {needed}");
        let hint = format!("take a larger {what}");
        return Err(Error::new(ErrorCode::NoSpace, message).hint(hint));
    }
    if destination.size > source.size {
        let rest = destination.size - source.size;
        result.warnings.push(format!(
            "the {what} {name} is larger than the source: its last {rest} bytes are left as they are"
        ));
    }
    Ok(())
}

/// Makes all destinations durable.
async fn prepare(
    pair: &mut Pair,
    jobs: &mut [Job<'_>],
    roots: &[sessions::Root],
) -> Result<(), Stopped> {
    for (at, job) in jobs.iter_mut().enumerate() {
        let verify = job.request.options.verify;
        let prepare = Prepare {
            disk: number(at),
            reread: verify == Verification::Reread,
        };
        let answer = pair
            .ask(Side::Destination, Some(prepare.disk), &prepare)
            .await
            .at(at)?;
        let prepared = match answer {
            Control::Prepared(prepared) if prepared.disk == prepare.disk => prepared,
            answer => return Err(unexpected("prepare", &answer)).at(at),
        };
        if prepare.reread && prepared.root != roots[at] {
            return Err(sessions::differ(job.request)).at(at);
        }
        job.result.verified = verify.name();
    }
    Ok(())
}

/// Has what they are about to lose kept, where that is wanted.
async fn preserve(pair: &mut Pair, jobs: &[Job<'_>]) -> Result<(), Stopped> {
    for (at, job) in jobs.iter().enumerate() {
        let Some(path) = &job.request.preserve else {
            continue;
        };
        let preserve = Preserve {
            disk: number(at),
            path: path.as_os_str().as_bytes().to_vec(),
        };
        let disk = Some(preserve.disk);
        match pair.ask(Side::Destination, disk, &preserve).await.at(at)? {
            Control::Preserved(preserved) if preserved.disk == preserve.disk => {}
            answer => return Err(unexpected("preserve", &answer)).at(at),
        }
    }
    Ok(())
}

/// Lets all of them count at once.
async fn commit(pair: &mut Pair, jobs: &[Job<'_>]) -> Result<()> {
    let all = Commit {
        disks: (0..jobs.len()).map(number).collect(),
    };
    match pair.ask(Side::Destination, None, &all).await? {
        Control::Committed(committed) if committed.disks == all.disks => Ok(()),
        answer => Err(unexpected("commit", &answer)),
    }
}

/// How a comparison found the disks to differ.
fn difference(disks: &Disks, result: &TransferResult) -> Option<Error> {
    let (source, destination) = (&disks.source, &disks.destination);
    if destination.kind == DiskKind::File && destination.size != source.size {
        let message = format!(
            "{} has {} bytes, {} has {}",
            result.source, source.size, result.destination, destination.size
        );
        return Some(Error::new(ErrorCode::Mismatch, message));
    }
    let offset = result.first_difference?;
    let [changed, zeroed] =
        [result.blocks_changed, result.blocks_zeroed].map(Option::unwrap_or_default);
    let blocks = changed.saturating_add(zeroed);
    let (source, destination) = (&result.source, &result.destination);
    let message = format!(
        "{source} and {destination} differ in {blocks} blocks of 64 KiB, the first at byte {offset}"
    );
    Some(Error::new(ErrorCode::Mismatch, message))
}
