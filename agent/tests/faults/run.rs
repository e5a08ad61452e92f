//! A run as a controller plays it: open, a session for each disk, prepare all, commit all.

use std::sync::Arc;

use kvm_clone_protocol::digest::{Digest, HashKind, Seed};
use kvm_clone_protocol::message::{
    Access, Apply, ApplyChoice, Commit, Compression, Control, Dial, DiskKind, Failed, FailureCode,
    IoChoice, Listen, Listening, Location, Open, Opened, Prepare, Role, SessionParams, Start,
    Started,
};
use kvm_clone_protocol::preamble::SUPPORTED;

use crate::agent::{Agent, Broken, bytes_of};
use crate::ground::{Disk, Ground};
use crate::relay::{Arrived, Plan, Relay};

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    pub(crate) apply: ApplyChoice,
    pub(crate) reread: bool,
}

impl Wish {
    pub(crate) fn new(apply: ApplyChoice) -> Self {
        Self {
            apply,
            reread: false,
        }
    }
}

/// How a run went that went well.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) applied: Vec<Apply>,
    pub(crate) resumed: Vec<bool>,
    /// Blocks whose data was shipped.
    pub(crate) shipped: u64,
}

/// How a run did not go well.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// The agent of the destination died.
    Died,
    /// An agent said why: of the source, or of the destination.
    Failed(Role, Failed),
}

/// As many as an agent opens.
const MAX_DISKS: u32 = 256;

/// An agent that reads sources, for many runs.
pub(crate) struct Source {
    agent: Agent,
    faults: String,
    /// Of the next disk and link.
    number: u32,
    /// What happens to the next data connections, where they go through this process.
    pub(crate) plans: Option<Vec<Plan>>,
    /// Each session is promised a second data connection, which never comes.
    pub(crate) misses_one: bool,
    /// What has arrived over the last one.
    pub(crate) arrived: Option<Arc<Arrived>>,
}

impl Source {
    /// Its agent has these faults.
    pub(crate) fn new(ground: &Ground, faults: &str) -> Self {
        Self {
            agent: Agent::start(ground, faults),
            faults: faults.to_owned(),
            number: 0,
            plans: None,
            misses_one: false,
            arrived: None,
        }
    }

    /// Makes the destinations what their sources are.
    pub(crate) fn sync(
        &mut self,
        ground: &Ground,
        to: &mut Agent,
        disks: &[Disk],
        wish: Wish,
    ) -> Result<Done, Stopped> {
        let mut done = Done::default();
        if self.number > MAX_DISKS - 2 {
            self.agent = Agent::start(ground, &self.faults);
            self.number = 0;
        }
        let first = self.number;
        let numbers = || first..first + u32::try_from(disks.len()).unwrap();
        self.number = numbers().end;
        for (number, disk) in numbers().zip(disks) {
            self.session(to, number, disk, wish, &mut done)?;
        }
        for disk in numbers() {
            let reread = wish.reread;
            to.send(&Prepare { disk, reread });
            match to.answer().map_err(of_destination)? {
                Control::Prepared(prepared) => assert_eq!(prepared.root.is_some(), reread),
                other => panic!("expected a disk that is prepared, got {other:?}"),
            }
        }
        to.send(&Commit {
            disks: numbers().collect(),
        });
        match to.answer().map_err(of_destination)? {
            Control::Committed(_) => Ok(done),
            other => panic!("expected a commit, got {other:?}"),
        }
    }

    fn session(
        &mut self,
        to: &mut Agent,
        number: u32,
        disk: &Disk,
        wish: Wish,
        done: &mut Done,
    ) -> Result<(), Stopped> {
        let opened = open(to, number, disk, Access::Destination).map_err(of_destination)?;
        open(&mut self.agent, number, disk, Access::Source).map_err(of_source)?;
        let _relay = self.connect(to, 2 * number)?;
        if self.misses_one {
            for agent in [&mut *to, &mut self.agent] {
                listen(agent, 2 * number + 1).map_err(of_destination)?;
            }
        }
        let params = SessionParams {
            size: disk.size(),
            hash: HashKind::Xxh3,
            seed: Seed([7; 32]),
            compare: opened.kind != DiskKind::Missing || opened.resumed,
            ship: true,
        };
        let start = |role| Start {
            disk: number,
            link: 2 * number,
            links: 1 + u16::from(self.misses_one),
            role,
            params,
            compression: Compression::Off,
            rate_limit: 0,
            apply: wish.apply,
            stage_dir: Vec::new(),
            full_scan: false,
            keep_sent: None,
            io: IoChoice::Auto,
            nice: false,
            read_limit: 0,
        };
        to.send(&start(Role::Receiver));
        self.agent.send(&start(Role::Sender));
        let received = ended(to, number);
        let sent = ended(&mut self.agent, number);
        match (received, sent) {
            (Ok((started, root, _)), Ok((_, sent, shipped))) => {
                assert_eq!(root, sent, "both ends agree");
                done.applied.extend(started.apply);
                done.resumed.push(started.resumed);
                done.shipped += shipped;
                Ok(())
            }
            // Who complains of the connection only is not to blame.
            (Err(Broken::Failed(failed)), Err(sender)) if failed.code == FailureCode::LinkLost => {
                Err(of_source(sender))
            }
            (Err(receiver), _) => Err(of_destination(receiver)),
            (_, Err(sender)) => Err(of_source(sender)),
        }
    }

    /// The source's agent runs `attach` for the destination's, or this process does for both.
    fn connect(&mut self, to: &mut Agent, link: u32) -> Result<Option<Relay>, Stopped> {
        let listening = listen(to, link).map_err(of_destination)?;
        if let Some(plans) = &self.plans {
            let ours = listen(&mut self.agent, link).map_err(of_source)?;
            let relay = Relay::start(&ours, &listening, plans);
            self.arrived = Some(Arc::clone(&relay.arrived));
            return Ok(Some(relay));
        }
        let version = SUPPORTED.max;
        self.agent.send(&Dial {
            link,
            version,
            command: Vec::new(),
            known_hosts: Vec::new(),
            token: listening.token,
            name: listening.name,
        });
        match self.agent.answer().map_err(of_source)? {
            Control::Dialed(_) => Ok(None),
            other => panic!("expected a connection, got {other:?}"),
        }
    }
}

fn listen(agent: &mut Agent, link: u32) -> Result<Listening, Broken> {
    let version = SUPPORTED.max;
    agent.send(&Listen { link, version });
    match agent.answer()? {
        Control::Listening(listening) => Ok(listening),
        other => panic!("expected a listener, got {other:?}"),
    }
}

fn open(agent: &mut Agent, number: u32, disk: &Disk, access: Access) -> Result<Opened, Broken> {
    let path = match access {
        Access::Destination => &disk.destination,
        _ => &disk.source,
    };
    agent.send(&Open {
        disk: number,
        location: Location::Path(bytes_of(path)),
        access,
    });
    match agent.answer()? {
        Control::Opened(opened) => Ok(opened),
        other => panic!("expected an open disk, got {other:?}"),
    }
}

/// How a session began and ended at one side, and how many blocks it shipped.
fn ended(agent: &mut Agent, number: u32) -> Result<(Started, Option<Digest>, u64), Broken> {
    let started = loop {
        match agent.answer()? {
            Control::Started(started) => break started,
            // Of an earlier run, whose session was given up.
            Control::Ended(_) => {}
            other => panic!("expected a session, got {other:?}"),
        }
    };
    match agent.answer()? {
        Control::Ended(ended) if ended.disk == number => {
            Ok((started, ended.root, ended.counters.blocks_changed))
        }
        other => panic!("expected the end of a session, got {other:?}"),
    }
}

fn of_destination(broken: Broken) -> Stopped {
    match broken {
        Broken::Failed(failed) => Stopped::Failed(Role::Receiver, failed),
        Broken::Gone => Stopped::Died,
    }
}

fn of_source(broken: Broken) -> Stopped {
    match broken {
        Broken::Failed(failed) => Stopped::Failed(Role::Sender, failed),
        Broken::Gone => panic!("the source's agent is gone"),
    }
}
