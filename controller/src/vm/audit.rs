//! Points are read, and compared with what their disks were when they were made: a medium decays, and
//! people write to files that are not theirs.

use std::time::Instant;

use serde::Serialize;

use super::failover::choose;
use super::outcome::Outcome;
use super::point::Point;
use super::replica;
use super::shown::Shown;
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;
use crate::transfer::Context;

/// Which points are read.
#[derive(Debug, Clone)]
pub struct AuditRequest {
    /// The host that has the replica.
    pub destination: HostSpec,
    /// The directory of the replica.
    pub directory: String,
    /// Which of its points.
    pub points: Audited,
}

/// Which points of a replica are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audited {
    /// The newest.
    Newest,
    /// The newest that is not newer than this one.
    NotAfter(String),
    /// All.
    All,
}

/// What became of the points of one VM.
#[derive(Debug, Serialize)]
pub struct AuditResult {
    /// Whether all are what they were, and what else there is to say.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Those that were read to their ends.
    pub points: Vec<AuditedPoint>,
}

/// A point that was read.
#[derive(Debug, Serialize)]
pub struct AuditedPoint {
    /// The point.
    pub point: String,
    /// Disks that are not what they were.
    pub differ: Vec<String>,
    /// Bytes that a guest sees, of all disks that were read.
    pub bytes_total: u64,
}

/// Reads points of a VM. A failure is part of the result.
pub async fn audit(
    context: &Context,
    connect: &str,
    vm: &str,
    request: &AuditRequest,
) -> AuditResult {
    let started = Instant::now();
    let mut result = AuditResult {
        outcome: Outcome::of(vm),
        points: Vec::new(),
    };
    let done = Box::pin(read_all(context, connect, request, &mut result)).await;
    result.outcome.end(started, done);
    result
}

async fn read_all(
    context: &Context,
    connect: &str,
    request: &AuditRequest,
    result: &mut AuditResult,
) -> Result<()> {
    let on = Hypervisor::new(context.host(&request.destination), connect);
    on.host().share().await?;
    let directory = &request.directory;
    let points = match &request.points {
        Audited::Newest => vec![choose(&on, directory, None).await?],
        Audited::NotAfter(name) => vec![choose(&on, directory, Some(name)).await?],
        Audited::All => replica::points(on.host(), directory).await?.points,
    };
    for point in &points {
        let shown = Shown::open(&on, directory, point).await?;
        let read = tokio::select! {
            read = read(&on, point, &shown) => read,
            () = context.cancelled.cancelled() => {
                Err(Error::new(ErrorCode::Cancelled, "stopped by the user"))
            }
        };
        let ended = shown.end().await;
        result.points.push(read?);
        ended?;
    }
    let ill = result
        .points
        .iter()
        .filter(|point| !point.differ.is_empty());
    let ill: Vec<String> = ill
        .map(|point| format!("{} (disk {})", point.point, point.differ.join(", disk ")))
        .collect();
    if ill.is_empty() {
        return Ok(());
    }
    let vm = &result.outcome.vm;
    let message = format!("points of {vm} are not what they were: {}", ill.join(", "));
    Err(Error::new(ErrorCode::Mismatch, message)
        .hint("\"restore\" and \"failover\" take another one with --point; \"full-scan\" mends newer ones"))
}

/// Reads the disks of a point that is shown.
async fn read(on: &Hypervisor, point: &Point, shown: &Shown) -> Result<AuditedPoint> {
    let mut audited = AuditedPoint {
        point: point.name.clone(),
        differ: Vec::new(),
        bytes_total: 0,
    };
    for disk in &point.manifest.disks {
        let Some(summary) = &disk.summary else {
            let (target, point) = (&disk.target, &point.name);
            let message = format!("what disk {target} of {point} was is not in its manifest.json");
            return Err(Error::new(ErrorCode::NotFound, message));
        };
        let is_same = summary.is_of(on.host(), &shown.location(disk)).await;
        let is_same = is_same.map_err(|error| {
            let (target, point) = (&disk.target, &point.name);
            error.context(format!("disk {target} of {point}"))
        })?;
        if !is_same {
            audited.differ.push(disk.target.clone());
        }
        audited.bytes_total += disk.size_bytes;
    }
    Ok(audited)
}
