//! `kvm-clone-agent serve`: the one process on a host that owns disks, for one controller.
//!
//! It speaks the protocol on its standard input and output, and ends with its input. Requests are
//! answered by tasks of their own, so that a slow one (an fsync) keeps nobody from being heard;
//! all answers go through one queue to the controller.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use kvm_clone_protocol::frame::Frame;
use kvm_clone_protocol::message::{
    Access, Commit, Committed, Control, Dial, Dialed, Ended, Failed, FailureCode, Hello, Listen,
    Listening, Message, Open, Prepare, Prepared, Progress, Role, Start, Started, Welcome,
};
use kvm_clone_protocol::preamble::{Preamble, SUPPORTED, Versions};
use kvm_clone_protocol::sync::{Machine, Receiver, Sender};
use kvm_clone_protocol::units::Geometry;
use nix::unistd::geteuid;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::channel::{FrameReader, FrameWriter};
use crate::disk::{self, Disk, Stage, Target, Version};
use crate::failure::Failure;
use crate::link::{self, Link, Listener};
use crate::pool::Pool;
use crate::session::Session;

/// Serves a controller until it hangs up.
///
/// # Errors
/// [`Failure`] when what comes is not a controller of a version that is understood.
pub(crate) async fn serve() -> Result<(), Failure> {
    let broken =
        |error: io::Error| Failure::link(format!("opening the control connection: {error}"));
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(broken)?;
    let output = io::stdout().as_fd().try_clone_to_owned().map_err(broken)?;
    let mut reader = FrameReader::new(input).map_err(broken)?;
    let mut writer = FrameWriter::new(output).map_err(broken)?;
    greet(&mut reader, &mut writer).await?;

    let (answers, mut outbox) = mpsc::unbounded_channel();
    let pool = Pool::start().map_err(|error| {
        Failure::new(FailureCode::Internal, format!("starting threads: {error}"))
    })?;
    let mut server = Server {
        answers,
        pool,
        disks: HashMap::new(),
        links: HashMap::new(),
    };
    let end = loop {
        tokio::select! {
            frame = reader.next() => match frame {
                Ok(None) => break Ok(()),
                Ok(Some(frame)) => match server.handle(&frame) {
                    Ok(Continue::Serving) => {}
                    Ok(Continue::Stopping) => break Ok(()),
                    Err(failure) => break Err(failure),
                },
                Err(error) => break Err(Failure::from(error)),
            },
            Some(frame) = outbox.recv() => writer.push(&frame),
            written = writer.write_some() => if written.is_err() {
                break Ok(());
            },
        }
    };
    server.abandon();
    if let Err(failure) = &end
        && let Ok(frame) = failure.clone().message(None).frame()
    {
        writer.push(&frame);
        // The controller may be gone already; the exit status tells the same.
        let _ = writer.flush().await;
    }
    end
}

/// Preambles, then hello and welcome.
async fn greet(reader: &mut FrameReader, writer: &mut FrameWriter) -> Result<(), Failure> {
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
            let message = format!("expected a hello for version {version}, got {other:?}");
            return Err(Failure::new(FailureCode::Protocol, message));
        }
    }
    writer.push(&welcome()?.frame()?);
    writer.flush().await.map_err(gone)
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
    })
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
    answers: mpsc::UnboundedSender<Frame>,
    pool: Pool,
    disks: HashMap<u32, Slot>,
    links: HashMap<u32, JoinHandle<Result<Link, Failure>>>,
}

/// A disk under its number.
#[derive(Debug)]
struct Slot {
    access: Access,
    disk: Option<Arc<Disk>>,
    /// What a source was when it was opened.
    version: Option<Version>,
    /// The way to its name, of a destination that does not exist yet.
    stage: Option<Stage>,
    /// Of the session that has been started.
    geometry: Option<Geometry>,
    milestones: Arc<Milestones>,
    session: Option<JoinHandle<()>>,
}

/// How far a disk has come. A destination is prepared only after a session that ended well, and
/// committed only when it is prepared, whatever the controller asks.
#[derive(Debug, Default)]
struct Milestones {
    ended: AtomicBool,
    prepared: AtomicBool,
    failed: OnceLock<FailureCode>,
}

/// More than any VM has; what a controller can make us hold is bounded.
const MAX_DISKS: usize = 256;

impl Server {
    /// Answers a frame of the controller, now or later.
    fn handle(&mut self, frame: &Frame) -> Result<Continue, Failure> {
        match Control::read(frame)? {
            Control::Open(open) => {
                let disk = open.disk;
                let result = self.open(&open);
                self.answer_or_fail(Some(disk), result);
            }
            Control::Listen(listen) => {
                let result = self.listen(&listen);
                self.answer_or_fail(None, result);
            }
            Control::Dial(dial) => {
                if let Err(failure) = self.dial(dial) {
                    self.fail(None, failure);
                }
            }
            Control::Start(start) => {
                let disk = start.disk;
                let result = self.start(&start);
                self.answer_or_fail(Some(disk), result);
            }
            Control::Prepare(prepare) => {
                if let Err(failure) = self.prepare(&prepare) {
                    self.fail(Some(prepare.disk), failure);
                }
            }
            Control::Commit(commit) => {
                let result = self.commit(commit);
                self.answer_or_fail(None, result);
            }
            Control::Abort(_) => return Ok(Continue::Stopping),
            other => {
                let message = format!("a controller does not send {other:?}");
                return Err(Failure::new(FailureCode::Protocol, message));
            }
        }
        Ok(Continue::Serving)
    }

    fn open(&mut self, open: &Open) -> Result<impl Message + use<>, Failure> {
        if self.disks.contains_key(&open.disk) || self.disks.len() >= MAX_DISKS {
            let message = format!("disk number {} is taken, or one too many", open.disk);
            return Err(Failure::new(FailureCode::Protocol, message));
        }
        let path = PathBuf::from(OsStr::from_bytes(&open.path));
        let target = disk::open(&path, open.access)?;
        let opened = target.describe(open.disk)?;
        let (disk, stage) = match target {
            Target::Open(disk) => (Some(Arc::new(disk)), None),
            Target::Missing(stage) => (None, Some(stage)),
        };
        let version = match (&disk, open.access) {
            (Some(disk), Access::Source) => Some(disk.version()?),
            _ => None,
        };
        let access = open.access;
        let slot = Slot {
            access,
            disk,
            version,
            stage,
            geometry: None,
            milestones: Arc::default(),
            session: None,
        };
        self.disks.insert(open.disk, slot);
        Ok(opened)
    }

    fn listen(&mut self, listen: &Listen) -> Result<impl Message + use<>, Failure> {
        let version = link_version(listen.version)?;
        let listener = Listener::bind()?;
        let listening = Listening {
            link: listen.link,
            name: listener.name().to_owned(),
            token: listener.token(),
        };
        self.links
            .insert(listen.link, tokio::spawn(listener.accept(version)));
        Ok(listening)
    }

    fn dial(&mut self, dial: Dial) -> Result<(), Failure> {
        let (number, answers) = (dial.link, self.answers.clone());
        let version = link_version(dial.version)?;
        let task = tokio::spawn(async move {
            let link = link::dial(&dial, version).await;
            let frame = match &link {
                Ok(_) => Dialed { link: dial.link }.frame(),
                Err(failure) => failure.clone().message(None).frame(),
            };
            // The controller may have hung up, and the process is about to end.
            let _ = frame.map(|frame| answers.send(frame));
            link
        });
        self.links.insert(number, task);
        Ok(())
    }

    fn start(&mut self, start: &Start) -> Result<impl Message + use<>, Failure> {
        let refused = |what: &str| Failure::new(FailureCode::Protocol, format!("start: {what}"));
        let params = start.params;
        let geometry = Geometry::new(params.size).ok_or_else(|| refused("the size is absurd"))?;
        let link = self
            .links
            .remove(&start.link)
            .ok_or_else(|| refused("no such link"))?;
        let slot = self
            .disks
            .get_mut(&start.disk)
            .ok_or_else(|| refused("no such disk"))?;
        if slot.session.is_some() || (start.role == Role::Sender) != slot.access.is_source() {
            return Err(refused("this disk is open for something else"));
        }
        if params.ship && slot.access == Access::Compare {
            return Err(refused("this disk is open for comparing only"));
        }
        slot.geometry = Some(geometry);
        if params.ship
            && slot.disk.is_none()
            && let Some(stage) = &slot.stage
        {
            slot.disk = Some(Arc::new(stage.open()?));
        }
        if params.ship
            && start.role == Role::Receiver
            && let Some(disk) = &slot.disk
        {
            disk.grow(geometry)?;
        }
        let machine: Box<dyn Machine> = match start.role {
            Role::Sender => Box::new(Sender::new(params, geometry)),
            Role::Receiver => Box::new(Receiver::new(params, geometry)),
        };
        let session = Session {
            machine,
            disk: slot.disk.clone(),
            geometry,
            params,
            compression: start.compression,
        };
        let task = SessionTask {
            disk: start.disk,
            rate_limit: start.rate_limit,
            version: slot.version,
            milestones: Arc::clone(&slot.milestones),
            answers: self.answers.clone(),
        };
        let pool = self.pool.clone();
        slot.session = Some(tokio::spawn(
            async move { task.run(session, link, &pool).await },
        ));
        Ok(Started {
            disk: start.disk,
            apply: None,
            resumed: false,
        })
    }

    fn prepare(&mut self, prepare: &Prepare) -> Result<(), Failure> {
        let number = prepare.disk;
        let ready = self.disks.get(&number).and_then(|slot| {
            let is_ready =
                slot.access == Access::Destination && slot.milestones.ended.load(Ordering::Acquire);
            let milestones = Arc::clone(&slot.milestones);
            is_ready.then_some((slot.disk.clone()?, slot.geometry?, milestones))
        });
        let Some((disk, geometry, milestones)) = ready else {
            let message = format!("prepare: disk {number} has nothing to prepare");
            return Err(Failure::new(FailureCode::Protocol, message));
        };
        let answers = self.answers.clone();
        self.pool.submit(move |_| {
            let frame = match disk.prepare(geometry) {
                Ok(()) => {
                    milestones.prepared.store(true, Ordering::Release);
                    Prepared {
                        disk: number,
                        root: None,
                    }
                    .frame()
                }
                Err(failure) => milestones.fail(failure, number).frame(),
            };
            let _ = frame.map(|frame| answers.send(frame));
        });
        Ok(())
    }

    fn commit(&mut self, commit: Commit) -> Result<impl Message + use<>, Failure> {
        for number in &commit.disks {
            let slot = self.disks.get(number);
            if !slot.is_some_and(|slot| slot.milestones.prepared.load(Ordering::Acquire)) {
                let message = format!("commit: disk {number} is not prepared");
                return Err(Failure::new(FailureCode::Protocol, message));
            }
        }
        for number in &commit.disks {
            if let Some(slot) = self.disks.get_mut(number)
                && let Some(stage) = &slot.stage
            {
                stage.commit()?;
                slot.stage = None;
            }
        }
        Ok(Committed {
            disks: commit.disks,
        })
    }

    /// Ends what runs, and leaves behind only what a next run can take up.
    fn abandon(&mut self) {
        for slot in self.disks.values() {
            if let Some(session) = &slot.session {
                session.abort();
            }
            // Only a file that this process holds is its own to remove.
            if let (Some(stage), Some(_)) = (&slot.stage, &slot.disk) {
                let code = slot.milestones.failed.get();
                stage.abandon(code.copied().unwrap_or(FailureCode::Cancelled));
            }
        }
    }

    fn answer_or_fail<M: Message>(&self, disk: Option<u32>, result: Result<M, Failure>) {
        match result.and_then(|message| Ok(message.frame()?)) {
            // The queue ends with the process.
            Ok(frame) => drop(self.answers.send(frame)),
            Err(failure) => self.fail(disk, failure),
        }
    }

    fn fail(&self, disk: Option<u32>, failure: Failure) {
        let _ = failure
            .message(disk)
            .frame()
            .map(|frame| self.answers.send(frame));
    }
}

impl Milestones {
    /// Remembers why it went no further, and tells the controller.
    fn fail(&self, failure: Failure, disk: u32) -> Failed {
        // The first failure is the one that counts.
        let _ = self.failed.set(failure.code);
        failure.message(Some(disk))
    }
}

/// The controller's choice, if this build speaks it.
fn link_version(version: u16) -> Result<u16, Failure> {
    Ok(SUPPORTED.negotiate(Versions::only(version))?)
}

/// What a session needs beside the session itself.
struct SessionTask {
    disk: u32,
    rate_limit: u64,
    version: Option<Version>,
    milestones: Arc<Milestones>,
    answers: mpsc::UnboundedSender<Frame>,
}

impl SessionTask {
    async fn run(self, session: Session, link: JoinHandle<Result<Link, Failure>>, pool: &Pool) {
        let frame = match self.play(session, link, pool).await {
            Ok(ended) => ended.frame(),
            Err(failure) => self.milestones.fail(failure, self.disk).frame(),
        };
        let _ = frame.map(|frame| self.answers.send(frame));
    }

    async fn play(
        &self,
        session: Session,
        link: JoinHandle<Result<Link, Failure>>,
        pool: &Pool,
    ) -> Result<Ended, Failure> {
        let stopped = |_| Failure::new(FailureCode::Cancelled, "the data connection was given up");
        let mut link = link.await.map_err(stopped)??;
        link.writer.set_rate(self.rate_limit);
        let (disk, ships) = (self.disk, session.params.ship);
        let source = session.disk.clone();
        let report = |counters| {
            let _ = Progress { disk, counters }
                .frame()
                .map(|frame| self.answers.send(frame));
        };
        let outcome = session.run(link, pool, report).await?;
        if let (Some(version), Some(source)) = (&self.version, source) {
            source.check_unchanged(version)?;
        }
        self.milestones.ended.store(ships, Ordering::Release);
        Ok(Ended {
            disk,
            counters: outcome.counters,
            first_difference: outcome.first_difference,
            root: ships.then_some(outcome.root),
        })
    }
}
