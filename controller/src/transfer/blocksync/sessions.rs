//! The sessions of a transfer: some of its disks at once, each on a data connection of its own.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt as _;

use kvm_clone_protocol::digest::{Digest, Seed};
use kvm_clone_protocol::message::{
    Apply, Control, Counters, DiskKind, Ended, Role, SessionParams, Start, Started,
};
use kvm_clone_protocol::units::{BLOCK_SIZE, MAX_DISK_SIZE};

use super::pair::{Pair, Side, answers};
use super::route::{self, Connection, Unreached};
use super::{Disks, number};
use crate::error::{Error, ErrorCode, Result};
use crate::host::AgentConnection;
use crate::progress::Progress;
use crate::transfer::request::{Operation, Request, RouteChoice, Streams};
use crate::transfer::result::Route;
use crate::transfer::summary::Summary;
use crate::transfer::{At as _, Context, Job, Stopped, unexpected};

/// The most warnings of one disk: an agent has a handful.
const MAX_WARNINGS: usize = 100;

/// A first copy of this size, in bytes, is worth further logins: it takes seconds.
const MUCH: u64 = 1 << 30;

/// Data connections of a disk where the user does not say how many: what a fast link takes.
const MOST_BY_ITSELF: u16 = 4;

/// What both ends agreed on for a disk, where anything was shipped.
pub(super) type Root = Option<Digest>;

/// All disks of a transfer.
pub(super) struct Sessions<'a, 'b> {
    context: &'a Context,
    pair: &'a mut Pair,
    jobs: &'a mut [Job<'b>],
    disks: &'a [Disks],
    ships: bool,
    running: BTreeMap<usize, Running>,
    roots: Vec<Root>,
    /// The route that the first one found.
    route: Option<RouteChoice>,
}

/// A disk whose session is under way.
struct Running {
    connection: Connection,
    params: SessionParams,
    progress: Progress,
    sent: Option<Ended>,
    received: Option<Ended>,
}

impl<'a, 'b> Sessions<'a, 'b> {
    pub(super) fn new(
        context: &'a Context,
        pair: &'a mut Pair,
        jobs: &'a mut [Job<'b>],
        disks: &'a [Disks],
        ships: bool,
    ) -> Self {
        let roots = vec![None; jobs.len()];
        Self {
            context,
            pair,
            jobs,
            disks,
            ships,
            running: BTreeMap::new(),
            roots,
            route: None,
        }
    }

    /// Runs them all, `parallel` at once. One that fails ends the others, since nothing comes of
    /// them alone; a comparison goes on, since each disk's difference is news.
    pub(super) async fn run(&mut self, parallel: NonZeroUsize) -> Result<Vec<Root>, Stopped> {
        let mut next = 0;
        loop {
            while next < self.jobs.len() && self.running.len() < parallel.get() {
                self.start(next).await.at(next)?;
                next += 1;
            }
            if self.running.is_empty() {
                return Ok(std::mem::take(&mut self.roots));
            }
            match self.pair.next().await {
                Ok((side, said)) => self.hear(side, said)?,
                Err(stopped) => self.failed(stopped).await?,
            }
        }
    }

    async fn failed(&mut self, stopped: Stopped) -> Result<(), Stopped> {
        let Stopped { at, mut error } = stopped;
        if self.jobs[at].result.error.is_some() {
            // The other end of a session that has failed already.
            return Ok(());
        }
        let ended = self.running.remove(&at);
        if let Some(Running {
            mut connection,
            progress,
            ..
        }) = ended
        {
            progress.finish();
            if error.code() == ErrorCode::Interrupted {
                for relay in &mut connection.relays {
                    error = relay.failure().await.unwrap_or(error);
                }
            }
        }
        let goes_on = self.jobs[0].request.operation == Operation::Verify
            && !matches!(error.code(), ErrorCode::Interrupted | ErrorCode::Protocol);
        if !goes_on {
            return Err(Stopped { at, error });
        }
        self.jobs[at].result.error = Some(error);
        Ok(())
    }

    async fn start(&mut self, at: usize) -> Result<()> {
        let request = self.jobs[at].request;
        let choice = self.route.unwrap_or(request.options.route);
        let streams = self.streams(at);
        let mut connection = route::begin(self.pair, choice, number(at), streams).await?;
        let params = self.params(at)?;
        // The destination is read while the agents still look for each other.
        self.tell(at, &connection, Side::Destination, params)
            .await?;
        let is_certain = connection.is_certain();
        if is_certain {
            self.tell(at, &connection, Side::Source, params).await?;
        }
        if let Err(failure) = connection.complete(self.pair).await {
            let Unreached { dialing, error } = failure;
            let reason = self.pair.reason(dialing, number(at)).await;
            return Err(reason.unwrap_or(error));
        }
        if !is_certain {
            self.tell(at, &connection, Side::Source, params).await?;
        }
        if connection.route == Route::Relay {
            self.route = Some(RouteChoice::Relay);
        }
        for side in [Side::Destination, Side::Source] {
            self.started(at, side).await?;
        }
        let result = &mut self.jobs[at].result;
        result.route = Some(connection.route);
        result.protocol_version = Some(connection.version);
        let running = Running {
            connection,
            params,
            progress: Progress::new(params.size, &self.context.progress),
            sent: None,
            received: None,
        };
        self.running.insert(at, running);
        Ok(())
    }

    /// Has a side start.
    async fn tell(
        &mut self,
        at: usize,
        connection: &Connection,
        side: Side,
        params: SessionParams,
    ) -> Result<()> {
        let request = self.jobs[at].request;
        let start = start(request, number(at), connection, side, params);
        self.pair.tell(side, &start).await
    }

    /// Waits until a side has started.
    async fn started(&mut self, at: usize, side: Side) -> Result<()> {
        let disk = number(at);
        let is_it = |said: &Control| answers(said, Some(disk));
        match self.pair.answer(side, is_it).await? {
            Control::Started(started) if started.disk == disk => {
                self.begun(at, side, &started);
                Ok(())
            }
            answer => Err(unexpected("start", &answer)),
        }
    }

    /// How many data connections a disk gets.
    fn streams(&self, at: usize) -> u16 {
        let disks = &self.disks[at];
        match self.jobs[at].request.options.streams {
            Streams::Count(count) => count.get(),
            Streams::Auto if disks.destination.kind != DiskKind::Missing => 1,
            Streams::Auto if !self.ships || disks.source.size < MUCH => 1,
            // They would share its processors.
            Streams::Auto if self.pair.is_one_kernel() => 1,
            Streams::Auto => {
                let of = |agent: &AgentConnection| agent.welcome().processors;
                let fewest = of(&self.pair.source).min(of(&self.pair.destination));
                fewest.clamp(1, MOST_BY_ITSELF)
            }
        }
    }

    fn begun(&mut self, at: usize, side: Side, started: &Started) {
        if side != Side::Destination {
            return;
        }
        let result = &mut self.jobs[at].result;
        result.resumed |= started.resumed;
        if let Some(apply) = started.apply {
            result.apply = name_of(apply);
        }
    }

    fn params(&self, at: usize) -> Result<SessionParams> {
        let Disks {
            source,
            destination,
        } = &self.disks[at];
        let hash = self.jobs[at].request.options.hash;
        // Digests that were kept are of use under the same seed alone.
        let kept = destination
            .keeps
            .filter(|keeps| self.ships && keeps.hash == hash);
        let seed = match kept {
            Some(keeps) => keeps.seed,
            None => random_seed()?,
        };
        Ok(SessionParams {
            size: source.size,
            hash,
            seed,
            compare: destination.kind != DiskKind::Missing || (self.ships && destination.resumed),
            ship: self.ships,
        })
    }

    /// Takes in what an agent says while sessions run.
    fn hear(&mut self, side: Side, said: Control) -> Result<(), Stopped> {
        match (side, said) {
            (_, Control::Warning(warning)) => {
                let at = warning.disk.and_then(|disk| usize::try_from(disk).ok());
                let at = at.filter(|at| *at < self.jobs.len()).unwrap_or(0);
                let warnings = &mut self.jobs[at].result.warnings;
                if warnings.len() >= MAX_WARNINGS {
                    return Err(protocol("an agent warns without end").into());
                }
                warnings.push(warning.message);
                Ok(())
            }
            (Side::Source, Control::Progress(news)) => {
                let at = self.at(news.disk)?;
                self.check(at, &news.counters).at(at)?;
                self.jobs[at].result.count_sender(&news.counters);
                Ok(())
            }
            (Side::Destination, Control::Progress(news)) => {
                let at = self.at(news.disk)?;
                self.check(at, &news.counters).at(at)?;
                let result = &mut self.jobs[at].result;
                result.count_receiver(&news.counters);
                let read = result.bytes_read_source;
                if let Some(running) = self.running.get_mut(&at) {
                    show(&mut running.progress, &news.counters, read);
                }
                Ok(())
            }
            (side, Control::Ended(ended)) => self.ended(side, ended),
            (_, other) => Err(unexpected("a session", &other).into()),
        }
    }

    /// The job of a disk whose session is under way.
    fn at(&self, disk: u32) -> Result<usize> {
        let at = usize::try_from(disk).ok();
        at.filter(|at| self.running.contains_key(at))
            .ok_or_else(|| {
                protocol(format!(
                    "an agent speaks of disk {disk}, on which nothing runs"
                ))
            })
    }

    /// Refuses counters that no session on this disk can have.
    fn check(&self, at: usize, counters: &Counters) -> Result<()> {
        let blocks = self.blocks(at);
        let shipped = counters
            .blocks_changed
            .checked_add(counters.blocks_zeroed)
            .filter(|shipped| *shipped <= counters.blocks_settled);
        let is_counted = counters.blocks_settled <= blocks && shipped.is_some();
        let bytes = [
            counters.bytes_data,
            counters.bytes_read,
            counters.bytes_trusted,
            counters.bytes_wire,
            counters.bytes_changed,
        ];
        // What is read, and what is carried besides, may be more than the disk holds.
        if is_counted && bytes.iter().all(|bytes| *bytes <= MAX_DISK_SIZE) {
            return Ok(());
        }
        let disk = &self.jobs[at].result.source;
        Err(protocol(format!("an agent counts what {disk} cannot have")))
    }

    fn blocks(&self, at: usize) -> u64 {
        self.disks[at].source.size.div_ceil(BLOCK_SIZE)
    }

    fn ended(&mut self, side: Side, ended: Ended) -> Result<(), Stopped> {
        let at = self.at(ended.disk)?;
        self.check(at, &ended.counters).at(at)?;
        let blocks = self.blocks(at);
        if ended.first_difference.is_some_and(|block| block >= blocks) {
            return Err(protocol("an agent finds a difference beyond the disk")).at(at);
        }
        let result = &mut self.jobs[at].result;
        let Some(running) = self.running.get_mut(&at) else {
            return Ok(());
        };
        let before = match side {
            Side::Source => &running.sent,
            Side::Destination => &running.received,
        };
        if before.is_some() {
            return Err(protocol("an agent ends a session twice")).at(at);
        }
        match side {
            Side::Source => {
                result.count_sender(&ended.counters);
                if !self.ships {
                    result.first_difference = ended.first_difference.map(|n| n * BLOCK_SIZE);
                }
                running.sent = Some(ended);
            }
            Side::Destination => {
                result.count_receiver(&ended.counters);
                running.received = Some(ended);
            }
        }
        let (Some(sent), Some(received)) = (&running.sent, &running.received) else {
            return Ok(());
        };
        // The agents have compared their roots; so does the controller, which trusts neither
        // alone.
        if self.ships && (sent.root.is_none() || sent.root != received.root) {
            return Err(differ(self.jobs[at].request)).at(at);
        }
        self.roots[at] = sent.root;
        let SessionParams {
            size, hash, seed, ..
        } = running.params;
        result.summary = sent.root.map(|root| Summary::new(size, hash, seed, root));
        if let Some(running) = self.running.remove(&at) {
            running.progress.finish();
        }
        Ok(())
    }
}

fn random_seed() -> Result<Seed> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| {
        Error::new(ErrorCode::Internal, "the system gives no random numbers").caused_by(error)
    })?;
    Ok(Seed(seed))
}

fn protocol(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::Protocol, message)
}

fn start(
    request: &Request,
    disk: u32,
    connection: &Connection,
    side: Side,
    params: SessionParams,
) -> Start {
    let options = &request.options;
    let stage_dir = options.stage_dir.as_ref();
    let of_sender = side == Side::Source;
    Start {
        disk,
        link: connection.first(side),
        links: connection.links,
        role: match side {
            Side::Source => Role::Sender,
            Side::Destination => Role::Receiver,
        },
        params,
        compression: options.compression,
        rate_limit: options.bandwidth_limit.filter(|_| of_sender).unwrap_or(0),
        apply: options.apply,
        stage_dir: stage_dir.map_or_else(Vec::new, |path| path.as_os_str().as_bytes().to_vec()),
        full_scan: options.full_scan,
        keep_sent: options.keep_sent.filter(|_| of_sender),
        io: options.io,
        nice: options.nice,
        read_limit: options.read_limit.unwrap_or(0),
    }
}

/// A way to apply as results name it: what did not exist waits under a temporary name.
fn name_of(apply: Apply) -> &'static str {
    match apply {
        Apply::New | Apply::Staged => "staged",
        Apply::Inplace => "inplace",
        Apply::Reflink => "reflink",
    }
}

/// The error for digests that are not the same.
pub(super) fn differ(request: &Request) -> Error {
    let message = format!(
        "{} does not hold what {} holds: the digests differ",
        request.destination, request.source
    );
    Error::new(ErrorCode::Mismatch, message)
        .hint("run the same command again; if it stays so, a disk or a host is broken")
}

/// What the user sees is what has reached the destination.
fn show(progress: &mut Progress, received: &Counters, read_source: Option<u64>) {
    let settled = received.blocks_settled.saturating_mul(BLOCK_SIZE);
    progress.update(settled, read_source.unwrap_or(0), received.bytes_wire);
}
