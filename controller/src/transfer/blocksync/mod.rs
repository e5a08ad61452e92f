//! Method `blocksync`: two agents, a route between them, one session, one commit.
//!
//! ```text
//!  connect ─ open both disks ─ check ─ route ─ start ─ session … ended ─ prepare ─ commit
//! ```

mod pair;
mod relay;
mod route;

use std::os::unix::ffi::OsStrExt as _;
use std::pin::Pin;

use kvm_clone_protocol::digest::Seed;
use kvm_clone_protocol::message::{
    Access, ApplyChoice, Commit, Control, Counters, DiskKind, Ended, Open, Opened, Prepare, Role,
    SessionParams, Start,
};
use kvm_clone_protocol::units::{BLOCK_SIZE, Geometry};

use super::copy::torn;
use super::request::{LiveRead, Operation, Request, Verification};
use super::result::TransferResult;
use super::{Context, Method, Working};
use crate::endpoint::DiskSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::progress::Progress;
use pair::{Pair, Side, unexpected};
use route::Connection;

/// As results name it.
pub(super) const NAME: &str = "blocksync";

/// The one disk's number on both control connections.
const DISK: u32 = 0;

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
        request: &'a Request,
        result: &'a mut TransferResult,
    ) -> Working<'a> {
        Box::pin(transfer(context, request, &mut self.pair, result))
    }

    fn end<'a>(
        &'a mut self,
        done: &'a Result<()>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            match (self.pair.take(), done) {
                (Some(pair), Ok(())) => pair.close().await,
                (Some(pair), Err(error)) => pair.abort(&error.one_line()).await,
                (None, _) => {}
            }
        })
    }
}

async fn transfer(
    context: &Context,
    request: &Request,
    connected: &mut Option<Pair>,
    result: &mut TransferResult,
) -> Result<()> {
    let (source, destination) = (
        context.host(&request.source.host),
        context.host(&request.destination.host),
    );
    let pair = connected.insert(Pair::connect(&source, &destination).await?);
    for agent in [&pair.source, &pair.destination] {
        result.warnings.extend_from_slice(agent.warnings());
    }
    let disks = open(pair, request, result).await?;
    let connection = route::connect(pair, request.options.route).await?;
    result.route = Some(connection.route);
    result.protocol_version = Some(connection.version);
    let ships = request.operation == Operation::Sync && !request.dry_run;
    let session = Session {
        request,
        disks: &disks,
        ships,
    };
    session.run(pair, connection, context, result).await?;
    if ships {
        commit(pair).await?;
        if request.options.verify == Verification::Streamed {
            result.verified = "streamed";
        }
    }
    if request.operation == Operation::Verify {
        return equal(&disks, result);
    }
    Ok(())
}

/// What both paths turned out to be.
#[derive(Debug)]
struct Disks {
    source: Opened,
    destination: Opened,
}

/// Opens both disks, and refuses what cannot end well before anything is changed.
async fn open(pair: &mut Pair, request: &Request, result: &mut TransferResult) -> Result<Disks> {
    let writes = request.operation == Operation::Sync;
    // A dry run looks at a destination as a run would, and tells of one that is not there.
    let access = if writes {
        Access::Destination
    } else {
        Access::Compare
    };
    if request.options.live == LiveRead::Torn {
        result.warnings.push(torn(&request.source));
    }
    let reading = if request.options.live.reads_in_use() {
        Access::LiveSource
    } else {
        Access::Source
    };
    let source = open_one(pair, Side::Source, &request.source, reading).await?;
    let destination = open_one(pair, Side::Destination, &request.destination, access).await?;
    result.bytes_total = Some(source.size);
    result.blocks_total = Some(source.size.div_ceil(BLOCK_SIZE));
    result.resumed = destination.resumed && !request.dry_run;
    let disks = Disks {
        source,
        destination,
    };
    check_distinct(pair, request, &disks)?;
    check_sizes(request, &disks, result)?;
    Ok(disks)
}

async fn open_one(pair: &mut Pair, side: Side, disk: &DiskSpec, access: Access) -> Result<Opened> {
    let path = disk.path.as_os_str().as_bytes().to_vec();
    match pair
        .ask(
            side,
            &Open {
                disk: DISK,
                path,
                access,
            },
        )
        .await?
    {
        Control::Opened(opened) => Ok(opened),
        answer => Err(unexpected("open", &answer)),
    }
}

/// One kernel, one identity: one and the same storage.
fn check_distinct(pair: &Pair, request: &Request, disks: &Disks) -> Result<()> {
    let one_kernel = pair.source.welcome().boot_id == pair.destination.welcome().boot_id;
    let same =
        disks.source.identity.is_some() && disks.source.identity == disks.destination.identity;
    if one_kernel && same {
        let (source, destination) = (&request.source, &request.destination);
        let message = format!("{source} and {destination} are one and the same disk");
        return Err(Error::new(ErrorCode::Refused, message));
    }
    Ok(())
}

fn check_sizes(request: &Request, disks: &Disks, result: &mut TransferResult) -> Result<()> {
    let (source, destination) = (&disks.source, &disks.destination);
    if Geometry::new(source.size).is_none() {
        let message = format!("{} is larger than any disk may be", request.source);
        return Err(Error::new(ErrorCode::Refused, message));
    }
    if destination.kind != DiskKind::Device {
        return Ok(());
    }
    if destination.size < source.size {
        let message = format!(
            "the device {} has {} bytes, {} has {}",
            request.destination, destination.size, request.source, source.size
        );
        return Err(Error::new(ErrorCode::NoSpace, message).hint("take a larger device"));
    }
    if destination.size > source.size {
        result.warnings.push(format!(
            "the device {} is larger than the source: its last {} bytes are left as they are",
            request.destination,
            destination.size - source.size
        ));
    }
    Ok(())
}

/// One pass over the disk.
struct Session<'a> {
    request: &'a Request,
    disks: &'a Disks,
    ships: bool,
}

impl Session<'_> {
    async fn run(
        &self,
        pair: &mut Pair,
        mut connection: Connection,
        context: &Context,
        result: &mut TransferResult,
    ) -> Result<()> {
        let params = self.params()?;
        for (side, role) in [
            (Side::Source, Role::Sender),
            (Side::Destination, Role::Receiver),
        ] {
            let start = Start {
                disk: DISK,
                link: connection.link,
                role,
                params,
                compression: self.request.options.compression,
                rate_limit: match role {
                    Role::Sender => self.request.options.bandwidth_limit.unwrap_or(0),
                    Role::Receiver => 0,
                },
                apply: ApplyChoice::Inplace,
                stage_dir: Vec::new(),
            };
            match pair.ask(side, &start).await? {
                Control::Started(_) => {}
                answer => return Err(unexpected("start", &answer)),
            }
        }
        let mut progress = Progress::new(params.size, &context.progress);
        let ended = self.watch(pair, &mut progress, result).await;
        progress.finish();
        match ended {
            Err(error) if error.code() == ErrorCode::Interrupted => match &mut connection.relay {
                Some(relay) => Err(relay.failure().await.unwrap_or(error)),
                None => Err(error),
            },
            ended => ended,
        }
    }

    fn params(&self) -> Result<SessionParams> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| {
            Error::new(ErrorCode::Internal, "the system gives no random numbers").caused_by(error)
        })?;
        let destination = &self.disks.destination;
        Ok(SessionParams {
            size: self.disks.source.size,
            hash: self.request.options.hash,
            seed: Seed(seed),
            compare: destination.kind != DiskKind::Missing || (self.ships && destination.resumed),
            ship: self.ships,
        })
    }

    /// Until both halves have ended.
    async fn watch(
        &self,
        pair: &mut Pair,
        progress: &mut Progress,
        result: &mut TransferResult,
    ) -> Result<()> {
        let (mut sent, mut received): (Option<Ended>, Option<Ended>) = (None, None);
        loop {
            if let (Some(sent), Some(received)) = (&sent, &received) {
                return self.agree(sent, received);
            }
            match pair.next().await? {
                (Side::Source, Control::Progress(news)) => result.count_sender(&news.counters),
                (Side::Destination, Control::Progress(news)) => {
                    result.count_receiver(&news.counters);
                    show(progress, &news.counters, result.bytes_read_source);
                }
                (Side::Source, Control::Ended(ended)) => {
                    result.count_sender(&ended.counters);
                    if !self.ships {
                        result.first_difference = ended.first_difference.map(|n| n * BLOCK_SIZE);
                    }
                    sent = Some(ended);
                }
                (Side::Destination, Control::Ended(ended)) => {
                    result.count_receiver(&ended.counters);
                    received = Some(ended);
                }
                (_, other) => return Err(unexpected("a session", &other)),
            }
        }
    }

    /// The agents have compared their roots; so does the controller, which trusts neither alone.
    fn agree(&self, sent: &Ended, received: &Ended) -> Result<()> {
        if self.ships && (sent.root.is_none() || sent.root != received.root) {
            let message = format!(
                "{} does not hold what {} holds: the digests differ",
                self.request.destination, self.request.source
            );
            return Err(Error::new(ErrorCode::Mismatch, message)
                .hint("run the same command again; if it stays so, a disk or a host is broken"));
        }
        Ok(())
    }
}

/// What the user sees is what has reached the destination.
fn show(progress: &mut Progress, received: &Counters, read_source: Option<u64>) {
    let settled = received.blocks_settled.saturating_mul(BLOCK_SIZE);
    progress.update(settled, read_source.unwrap_or(0), received.bytes_wire);
}

/// Makes the destination durable, and lets it take its name.
async fn commit(pair: &mut Pair) -> Result<()> {
    match pair
        .ask(
            Side::Destination,
            &Prepare {
                disk: DISK,
                reread: false,
            },
        )
        .await?
    {
        Control::Prepared(_) => {}
        answer => return Err(unexpected("prepare", &answer)),
    }
    match pair
        .ask(Side::Destination, &Commit { disks: vec![DISK] })
        .await?
    {
        Control::Committed(_) => Ok(()),
        answer => Err(unexpected("commit", &answer)),
    }
}

/// Whether a comparison found the disks equal.
fn equal(disks: &Disks, result: &TransferResult) -> Result<()> {
    let (source, destination) = (&disks.source, &disks.destination);
    if destination.kind == DiskKind::File && destination.size != source.size {
        let message = format!(
            "{} has {} bytes, {} has {}",
            result.source, source.size, result.destination, destination.size
        );
        return Err(Error::new(ErrorCode::Mismatch, message));
    }
    match result.first_difference {
        Some(offset) => {
            let blocks = result.blocks_changed.unwrap_or(0) + result.blocks_zeroed.unwrap_or(0);
            let (source, destination) = (&result.source, &result.destination);
            let message = format!(
                "{source} and {destination} differ in {blocks} blocks of 64 KiB, the first at byte {offset}"
            );
            Err(Error::new(ErrorCode::Mismatch, message))
        }
        None => Ok(()),
    }
}
