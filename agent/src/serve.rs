//! `kvm-clone-agent serve`: the one process on a host that owns disks, for one controller.
//!
//! It speaks the protocol on its standard input and output, and ends with its input, or when the
//! controller is silent for too long. Requests are answered by tasks of their own, in their order
//! for each disk, and what may block is done on other threads: a slow fsync keeps nobody from
//! being heard. All answers go through one queue to the controller. What a controller can make us
//! hold is bounded: disks, links, requests under way, and answers that it does not read.

use std::collections::HashMap;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvm_clone_protocol::frame::Frame;
use kvm_clone_protocol::message::{
    Alive, Commit, Committed, Control, Dial, Dialed, FailureCode, Hello, Leftover, Listen,
    Listening, Message, Open, Prepare, Preserve, Recover, Recovered, Start, Summarize, Welcome,
};
use kvm_clone_protocol::preamble::{Preamble, SUPPORTED, Versions};
use kvm_clone_protocol::sync::MAX_STREAMS;
use nix::unistd::geteuid;
use tokio::sync::{Mutex, OwnedSemaphorePermit, RwLock, Semaphore};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use crate::answers::{self, Answers};
use crate::channel::{BEAT, FrameReader, FrameWriter, SILENCE};
use crate::commands::Commands;
use crate::disk::{self, Run};
use crate::failure::{Failure, short};
use crate::link::{self, Link, Listener};
use crate::links::{Linking, Links};
use crate::play::Stage;
use crate::pool::Pool;
use crate::priority;
use crate::slot::Slot;

/// More than any VM has.
const MAX_DISKS: usize = 256;

/// The same for data connections that wait for their session.
const MAX_LINKS: usize = 512;

/// Requests that are being answered at one time: one for each disk and each data connection, and
/// some. A controller that sends more does not wait for any answer.
const MAX_REQUESTS: usize = 1024;

/// A controller has this long for preamble and hello: as long as it gives an agent.
const GREETING: Duration = Duration::from_secs(30);

/// A commit that is under way when the controller goes may end within this time, since a
/// destination that is finished is worth more than one that waits for `recover`.
const COMMIT_GRACE: Duration = Duration::from_secs(5);

/// What a source held may be noted within this time, since that saves the next run its reading.
const NOTE_GRACE: Duration = Duration::from_secs(2);

/// Serves a controller until it hangs up. It may have us run `commands`.
///
/// # Errors
/// [`Failure`] when what comes is not a controller of a version that is understood.
pub(crate) async fn serve(commands: Commands) -> Result<(), Failure> {
    let broken =
        |error: io::Error| Failure::link(format!("opening the control connection: {error}"));
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(broken)?;
    let output = io::stdout().as_fd().try_clone_to_owned().map_err(broken)?;
    let mut reader = FrameReader::new(input).map_err(broken)?;
    let mut writer = FrameWriter::new(output).map_err(broken)?;
    let late = || Failure::link("no controller said hello in time");
    let version = tokio::time::timeout(GREETING, greet(&mut reader, &mut writer))
        .await
        .map_err(|_| late())??;

    let (answers, mut outbox) = answers::queue();
    let pool = Pool::start().map_err(|error| {
        Failure::new(FailureCode::Internal, format!("starting threads: {error}"))
    })?;
    let mut server = Server::new(version, answers, pool, commands);
    let mut beats = interval_at(Instant::now() + BEAT, BEAT);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = loop {
        if let Err(failure) = outbox.check() {
            break Err(failure);
        }
        let silent = sleep_until(reader.heard() + SILENCE);
        tokio::select! {
            // What has come is heard before the time is looked at.
            biased;
            frame = reader.next() => match frame {
                Ok(None) => break Ok(()),
                Ok(Some(frame)) => match server.handle(&frame) {
                    Ok(Continue::Serving) => {}
                    Ok(Continue::Stopping) => break Ok(()),
                    Err(failure) => break Err(failure),
                },
                Err(error) => break Err(Failure::from(error)),
            },
            () = silent => if reader.heard().elapsed() >= SILENCE {
                break Err(Failure::link("the controller is silent"));
            },
            Some(frame) = outbox.next(), if writer.is_empty() => writer.push(&frame),
            _ = beats.tick() => if writer.is_empty() {
                writer.push(&Alive {}.frame()?);
            },
            written = writer.write_some() => if written.is_err() {
                break Ok(());
            },
        }
    };
    server.abandon().await;
    if let Err(failure) = &end
        && let Ok(frame) = failure.clone().message(None).frame()
    {
        writer.push(&frame);
        // The controller may be gone already, or stuck; the exit status tells the same.
        let _ = tokio::time::timeout(BEAT, writer.flush()).await;
    }
    end
}

/// Preambles, then hello and welcome. Gives the protocol version.
async fn greet(reader: &mut FrameReader, writer: &mut FrameWriter) -> Result<u16, Failure> {
    let gone = |error: io::Error| Failure::link(format!("writing to the controller: {error}"));
    writer.push_bytes(Bytes::copy_from_slice(
        &Preamble::of_this_build(SUPPORTED).encode(),
    ));
    writer.flush().await.map_err(gone)?;
    let (_, version) = reader.preamble(SUPPORTED).await?;
    let Some(frame) = reader.next().await? else {
        return Err(Failure::link("the controller hung up before its hello"));
    };
    match Control::read(&frame)? {
        Control::Hello(Hello {
            version: theirs, ..
        }) if theirs == version => {}
        other => {
            let kind = other.kind();
            let message = format!("expected a hello for version {version}, got {kind:?}");
            return Err(Failure::new(FailureCode::Protocol, message));
        }
    }
    writer.push(&welcome()?.frame()?);
    writer.flush().await.map_err(gone)?;
    Ok(version)
}

fn welcome() -> Result<Welcome, Failure> {
    let internal = |what: &str, error: io::Error| {
        Failure::new(FailureCode::Internal, format!("reading {what}: {error}"))
    };
    let own = "/proc/self/exe";
    let own = std::fs::read(own).map_err(|error| internal(own, error))?;
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let boot_id = std::fs::read_to_string(boot_id).map_err(|error| internal(boot_id, error))?;
    Ok(Welcome {
        release: env!("CARGO_PKG_VERSION").to_owned(),
        arch: std::env::consts::ARCH.to_owned(),
        agent_digest: *blake3::hash(&own).as_bytes(),
        boot_id: boot_id.trim().to_owned(),
        aes: has_aes(),
        uid: geteuid().as_raw(),
        processors: processors(),
    })
}

fn processors() -> u16 {
    let found = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    u16::try_from(found).unwrap_or(u16::MAX)
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

enum Continue {
    Serving,
    Stopping,
}

struct Server {
    /// The protocol version of the control connection.
    version: u16,
    answers: Answers,
    pool: Pool,
    commands: Commands,
    disks: HashMap<u32, Shelf>,
    links: HashMap<u32, Linking>,
    /// One for each request that may be under way.
    requests: Arc<Semaphore>,
    /// The destinations that are changed together.
    run: Arc<Mutex<Option<Run>>>,
    sessions: Vec<AbortHandle>,
    commit: Option<JoinHandle<()>>,
    /// Read by whoever still notes what a source held.
    noting: Arc<RwLock<()>>,
}

/// Held while a request is being answered.
type Request = OwnedSemaphorePermit;

/// Owes the answer to a request to dial. A session that is over needs no further links, and has
/// them given up; that is answered as well.
struct Dialing(Option<Answers>);

impl Dialing {
    fn answer(mut self, link: u32, dialed: &Result<Link, Failure>) {
        if let Some(answers) = self.0.take() {
            match dialed {
                Ok(_) => answers.say(&Dialed { link }),
                Err(failure) => answers.fail(None, failure.clone()),
            }
        }
    }
}

impl Drop for Dialing {
    fn drop(&mut self) {
        if let Some(answers) = self.0.take() {
            let message = "a data connection that nobody waits for any more";
            answers.fail(None, Failure::new(FailureCode::Cancelled, message));
        }
    }
}

/// The place of a disk: empty until it is open. Its lock puts requests for the disk in order.
type Shelf = Arc<Mutex<Option<Slot>>>;

impl Server {
    fn new(version: u16, answers: Answers, pool: Pool, commands: Commands) -> Self {
        Self {
            version,
            answers,
            pool,
            commands,
            disks: HashMap::new(),
            links: HashMap::new(),
            requests: Arc::new(Semaphore::new(MAX_REQUESTS)),
            run: Arc::default(),
            sessions: Vec::new(),
            commit: None,
            noting: Arc::default(),
        }
    }

    /// Answers a frame of the controller, now or later.
    fn handle(&mut self, frame: &Frame) -> Result<Continue, Failure> {
        if frame.kind.since() > self.version {
            let message = format!(
                "{:?} is not of protocol version {}",
                frame.kind, self.version
            );
            return Err(protocol(message));
        }
        let message = Control::read(frame)?;
        match message {
            Control::Alive(Alive {}) => return Ok(Continue::Serving),
            Control::Abort(_) => return Ok(Continue::Stopping),
            _ => {}
        }
        let Ok(request) = Arc::clone(&self.requests).try_acquire_owned() else {
            let message = format!("more than {MAX_REQUESTS} requests before an answer");
            return Err(protocol(message));
        };
        // What cannot begin is answered now.
        let (disk, begun) = match message {
            Control::Open(open) => (Some(open.disk), self.open(open, request)),
            Control::Listen(listen) => (None, self.listen(&listen)),
            Control::Dial(dial) => (None, self.dial(dial, request)),
            Control::Start(start) => (Some(start.disk), self.start(start, request)),
            Control::Prepare(prepare) => (Some(prepare.disk), self.prepare(prepare, request)),
            Control::Preserve(preserve) => (Some(preserve.disk), self.preserve(preserve, request)),
            Control::Summarize(wanted) => (Some(wanted.disk), self.summarize(wanted, request)),
            Control::Commit(commit) => (None, self.commit(commit, request)),
            Control::Recover(recover) => (None, self.recover(&recover, request)),
            other => {
                let message = format!("a controller does not send {:?}", other.kind());
                return Err(protocol(message));
            }
        };
        if let Err(failure) = begun {
            self.answers.fail(disk, failure);
        }
        Ok(Continue::Serving)
    }

    fn shelf(&self, disk: u32, doing: &str) -> Result<Shelf, Failure> {
        let shelf = self.disks.get(&disk).cloned();
        shelf.ok_or_else(|| protocol(format!("{doing}: there is no disk {disk}")))
    }

    fn open(&mut self, open: Open, request: Request) -> Result<(), Failure> {
        let number = open.disk;
        let taken = || protocol(format!("disk number {number} is taken, or one too many"));
        if self.disks.len() >= MAX_DISKS && !self.disks.contains_key(&number) {
            return Err(taken());
        }
        let shelf = Arc::clone(self.disks.entry(number).or_default());
        let free = shelf.try_lock_owned().ok().filter(|slot| slot.is_none());
        let mut slot = free.ok_or_else(taken)?;
        let answers = self.answers.clone();
        tokio::spawn(async move {
            let opened = blocking(move || Slot::open(&open)).await;
            let opened = opened.map(|(new, opened, warnings)| {
                *slot = Some(new);
                answers.warn(number, warnings);
                opened
            });
            answers.answer(Some(number), opened);
            drop(request);
        });
        Ok(())
    }

    fn listen(&mut self, listen: &Listen) -> Result<(), Failure> {
        let version = link_version(listen.version)?;
        self.check_links(listen.link)?;
        let listener = Listener::bind()?;
        self.answers.say(&Listening {
            link: listen.link,
            name: listener.name().to_owned(),
            token: listener.token(),
        });
        let task = tokio::spawn(listener.accept(version));
        self.links.insert(listen.link, Linking(task));
        Ok(())
    }

    fn dial(&mut self, dial: Dial, request: Request) -> Result<(), Failure> {
        self.commands.permit(&dial.command)?;
        let number = dial.link;
        let version = link_version(dial.version)?;
        self.check_links(number)?;
        let dialing = Dialing(Some(self.answers.clone()));
        let task = tokio::spawn(async move {
            let link = link::dial(&dial, version).await;
            dialing.answer(number, &link);
            drop(request);
            link
        });
        self.links.insert(number, Linking(task));
        Ok(())
    }

    fn check_links(&self, link: u32) -> Result<(), Failure> {
        if self.links.contains_key(&link) || self.links.len() >= MAX_LINKS {
            return Err(protocol(format!(
                "link number {link} is taken, or one too many"
            )));
        }
        Ok(())
    }

    fn start(&mut self, start: Start, request: Request) -> Result<(), Failure> {
        let shelf = self.shelf(start.disk, "start")?;
        let links = Links::new(self.take_links(&start)?, start.rate_limit);
        let (number, disks) = (start.disk, self.disks.len() as u64);
        let (answers, run) = (self.answers.clone(), Arc::clone(&self.run));
        let stage = Stage {
            answers: self.answers.clone(),
            pool: self.pool.clone(),
            noting: Arc::clone(&self.noting),
        };
        disk::limit_reads(start.read_limit);
        if start.nice
            && let Err(error) = priority::be_nice()
        {
            let warning = format!("the agent could not step back behind others: {error}");
            self.answers.warn(number, vec![warning]);
        }
        let session = tokio::spawn(async move {
            let mut slot = shelf.lock_owned().await;
            let mut run = run.lock_owned().await;
            let ready =
                blocking(move || on(&mut slot, "start")?.start(&start, disks, &mut run)).await;
            match ready {
                Ok(ready) => {
                    answers.warn(number, ready.warnings.clone());
                    answers.say(&ready.started);
                    drop(request);
                    stage.play(number, ready, links).await;
                }
                Err(failure) => answers.fail(Some(number), failure),
            }
        });
        self.sessions.retain(|session| !session.is_finished());
        self.sessions.push(session.abort_handle());
        Ok(())
    }

    /// The data connections of a session.
    fn take_links(&mut self, start: &Start) -> Result<Vec<Linking>, Failure> {
        if !(1..=MAX_STREAMS).contains(&start.links) {
            let message = format!("start: {} data connections for a session", start.links);
            return Err(protocol(message));
        }
        let numbers = (0..u32::from(start.links)).map(|more| start.link.saturating_add(more));
        let taken = numbers.map(|link| {
            let missing = || protocol(format!("start: there is no link {link}"));
            self.links.remove(&link).ok_or_else(missing)
        });
        taken.collect()
    }

    fn prepare(&mut self, prepare: Prepare, request: Request) -> Result<(), Failure> {
        let of = (prepare.disk, "prepare");
        self.ask(of, request, move |slot| slot.prepare(&prepare))
    }

    fn preserve(&mut self, preserve: Preserve, request: Request) -> Result<(), Failure> {
        let of = (preserve.disk, "preserve");
        self.ask(of, request, move |slot| slot.preserve(&preserve))
    }

    fn summarize(&mut self, wanted: Summarize, request: Request) -> Result<(), Failure> {
        let of = (wanted.disk, "summarize");
        self.ask(of, request, move |slot| slot.summarize(&wanted))
    }

    /// Has a disk do something that blocks, and answers with what came of it.
    fn ask<M>(
        &mut self,
        (disk, doing): (u32, &'static str),
        request: Request,
        work: impl FnOnce(&mut Slot) -> Result<M, Failure> + Send + 'static,
    ) -> Result<(), Failure>
    where
        M: Message + Send + 'static,
    {
        let (shelf, answers) = (self.shelf(disk, doing)?, self.answers.clone());
        tokio::spawn(async move {
            let mut slot = shelf.lock_owned().await;
            let done = blocking(move || work(on(&mut slot, doing)?)).await;
            answers.answer(Some(disk), done);
            drop(request);
        });
        Ok(())
    }

    fn commit(&mut self, commit: Commit, request: Request) -> Result<(), Failure> {
        let running = self.commit.as_ref().is_some_and(|task| !task.is_finished());
        if running {
            return Err(protocol("commit: another is under way".to_owned()));
        }
        let shelves = commit
            .disks
            .iter()
            .map(|disk| self.shelf(*disk, "commit"))
            .collect::<Result<Vec<_>, _>>()?;
        if shelves.len() > MAX_DISKS || !are_distinct(&commit.disks) {
            return Err(protocol("commit: a disk is named twice".to_owned()));
        }
        let (answers, run) = (self.answers.clone(), Arc::clone(&self.run));
        self.commit = Some(tokio::spawn(async move {
            let mut slots = Vec::new();
            for shelf in shelves {
                slots.push(shelf.lock_owned().await);
            }
            let mut run = run.lock_owned().await;
            let committed = blocking(move || {
                let slots: Vec<_> = slots.iter().map(|slot| slot.as_ref()).collect();
                commit_all(&slots, &mut run)
            });
            let committed = committed.await.map(|()| Committed {
                disks: commit.disks,
            });
            answers.answer(None, committed);
            drop(request);
        }));
        Ok(())
    }

    fn recover(&self, recover: &Recover, request: Request) -> Result<(), Failure> {
        let (recovery, answers) = (recover.recovery, self.answers.clone());
        tokio::spawn(async move {
            let recovered = match blocking(move || disk::recover(recovery)).await {
                Ok(all) => {
                    for each in all {
                        // There may be more of them than a controller reads at once.
                        answers.room().await;
                        answers.say(&Leftover {
                            path: each.path.into_os_string().into_encoded_bytes(),
                            fate: each.fate,
                            message: short(each.message),
                        });
                    }
                    Ok(Recovered {})
                }
                Err(failure) => Err(failure),
            };
            answers.answer(None, recovered);
            drop(request);
        });
        Ok(())
    }

    /// Ends what runs, and leaves behind only what a next run can take up.
    async fn abandon(&mut self) {
        for session in &self.sessions {
            session.abort();
        }
        let _ = tokio::time::timeout(NOTE_GRACE, self.noting.write()).await;
        if let Some(commit) = self.commit.take() {
            // Whatever came of it, from here on only its note decides.
            let _ = tokio::time::timeout(COMMIT_GRACE, commit).await;
            return;
        }
        // What is locked is being worked on, by a thread that ends with the process.
        let slots = self.disks.values().map(|shelf| shelf.try_lock());
        let left: Vec<bool> = slots
            .map(|slot| slot.map_or(true, |slot| slot.as_ref().is_some_and(Slot::abandon)))
            .collect();
        if left.contains(&true) {
            return;
        }
        if let Ok(mut run) = self.run.try_lock()
            && let Some(run) = run.take()
        {
            // A note that stays says of nothing that it is unfinished.
            let _ = run.end();
        }
    }
}

/// Lets all changes count: one note names every destination, and from then on all go forward.
fn commit_all(slots: &[Option<&Slot>], run: &mut Option<Run>) -> Result<(), Failure> {
    let is_ready = |slot: &Option<&Slot>| slot.is_some_and(Slot::is_prepared);
    if slots.is_empty() || !slots.iter().all(is_ready) {
        return Err(protocol("commit: not all of them are prepared".to_owned()));
    }
    // What is written in place without a note counts already.
    let slots: Vec<&Slot> = slots.iter().copied().flatten().collect();
    let destinations: Vec<_> = slots.iter().filter_map(|slot| slot.destination()).collect();
    if destinations.len() != run.as_ref().map_or(0, Run::len) {
        return Err(protocol(
            "commit: disks that were changed together count together".to_owned(),
        ));
    }
    if let Some(noted) = run.as_mut() {
        noted.commit()?;
        disk::forward(&destinations)?;
    }
    if let Some(run) = run.take() {
        run.end()?;
    }
    slots.iter().for_each(|slot| slot.committed());
    Ok(())
}

/// The disk on a shelf.
fn on<'a>(shelf: &'a mut Option<Slot>, doing: &str) -> Result<&'a mut Slot, Failure> {
    let slot = shelf.as_mut();
    slot.ok_or_else(|| protocol(format!("{doing}: this disk is not open")))
}

fn are_distinct(numbers: &[u32]) -> bool {
    let all: std::collections::BTreeSet<_> = numbers.iter().collect();
    all.len() == numbers.len()
}

fn protocol(message: String) -> Failure {
    Failure::new(FailureCode::Protocol, message)
}

/// Does what may block on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let broken = |error| Failure::new(FailureCode::Internal, format!("a thread broke: {error}"));
    tokio::task::spawn_blocking(work)
        .await
        .map_err(broken)
        .and_then(|result| result)
}

/// The controller's choice, if this build speaks it.
fn link_version(version: u16) -> Result<u16, Failure> {
    Ok(SUPPORTED.negotiate(Versions::only(version))?)
}
