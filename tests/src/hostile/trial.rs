//! A session of the real agent with a hostile peer: everything honest until the peer begins.

use kvm_clone_protocol::digest::{HashKind, Seed};
use kvm_clone_protocol::message::{
    Access, ApplyChoice, Commit, Compression, Control, Ended, Failed, FailureCode, IoChoice,
    Listening, Prepare, Role, SessionParams, Start,
};

use super::agent::Agent;
use super::ground::{BLOCKS, Ground, SIZE};
use super::link::Link;

/// What the receiver's changes go onto.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Onto {
    /// A disk that does not exist yet.
    New,
    /// A disk that is written in place.
    Inplace,
    /// A disk beside which changes wait.
    Staged,
    /// A disk that is only compared.
    Compared,
}

/// An agent, a disk of its, and a data connection whose other end is the test.
#[derive(Debug)]
pub struct Trial<'a> {
    pub agent: &'a mut Agent,
    pub link: Link,
    pub ground: Ground,
    pub disk: u32,
    /// Of a receiver.
    onto: Option<Onto>,
}

/// How a data connection begins.
pub type Attach = fn(&Listening) -> Link;

/// What sessions here have in common.
#[must_use]
pub fn params(onto: Onto) -> SessionParams {
    SessionParams {
        size: SIZE,
        hash: HashKind::Xxh3,
        seed: Seed([9; 32]),
        compare: onto != Onto::New,
        ship: onto != Onto::Compared,
    }
}

/// A start that makes sense, on a disk and the link of the same number.
#[must_use]
pub fn start(disk: u32, role: Role, params: SessionParams, apply: ApplyChoice) -> Start {
    Start {
        disk,
        link: disk,
        links: 1,
        role,
        params,
        compression: Compression::Off,
        rate_limit: 0,
        apply,
        stage_dir: Vec::new(),
        full_scan: false,
        keep_sent: None,
        io: IoChoice::Auto,
        nice: false,
        read_limit: 0,
    }
}

impl<'a> Trial<'a> {
    /// A receiver whose session has been started, and has told of all its blocks.
    #[must_use]
    pub fn receiver(agent: &'a mut Agent, onto: Onto) -> Self {
        let mut trial = Self::receiver_with(agent, onto, params(onto), Link::greeted);
        if onto != Onto::New {
            trial.link.hear_all(BLOCKS);
        }
        trial
    }

    /// A receiver whose session has been started with these parameters.
    #[must_use]
    pub fn receiver_with(
        agent: &'a mut Agent,
        onto: Onto,
        params: SessionParams,
        attach: Attach,
    ) -> Self {
        let ground = match onto {
            Onto::New => Ground::missing(),
            _ => Ground::longer(),
        };
        let (access, apply) = match onto {
            Onto::New | Onto::Staged => (Access::Destination, ApplyChoice::Staged),
            Onto::Inplace => (Access::Destination, ApplyChoice::Inplace),
            Onto::Compared => (Access::Compare, ApplyChoice::Auto),
        };
        let mut trial = Self::open(agent, ground, access, attach);
        trial.onto = Some(onto);
        trial.start(Role::Receiver, params, apply);
        trial
    }

    /// A sender whose session has been started.
    #[must_use]
    pub fn sender(agent: &'a mut Agent) -> Self {
        Self::sender_with(agent, Ground::equal(), params(Onto::Staged), Link::greeted)
    }

    /// A sender of this disk whose session has been started with these parameters.
    #[must_use]
    pub fn sender_with(
        agent: &'a mut Agent,
        ground: Ground,
        params: SessionParams,
        attach: Attach,
    ) -> Self {
        let mut trial = Self::open(agent, ground, Access::Source, attach);
        trial.start(Role::Sender, params, ApplyChoice::Auto);
        trial
    }

    /// A disk that is open, and a link to it, but no session.
    #[must_use]
    pub fn open(agent: &'a mut Agent, ground: Ground, access: Access, attach: Attach) -> Self {
        let disk = agent.number();
        agent.open(disk, &ground.disk(), access);
        let link = attach(&agent.listen(disk));
        Self {
            agent,
            link,
            ground,
            disk,
            onto: None,
        }
    }

    /// Has the session started.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(&mut self, role: Role, params: SessionParams, apply: ApplyChoice) {
        self.agent.send(&start(self.disk, role, params, apply));
        match self.agent.next() {
            Some(Control::Started(started)) => assert_eq!(started.disk, self.disk),
            other => panic!("expected a session, got {other:?}"),
        }
    }

    /// Claims that the session ends with this failure, that the agent closes the link and lives
    /// on, that nothing can be committed, and that nothing was written that must not be.
    ///
    /// # Panics
    /// When one of that is otherwise.
    pub fn fails(mut self, code: FailureCode) -> Failed {
        let failed = self.agent.expect(code);
        assert_eq!(failed.disk, Some(self.disk), "{failed:?}");
        self.link.expect_closed();
        self.refuses(&Prepare {
            disk: self.disk,
            reread: false,
        });
        self.refuses(&Commit {
            disks: vec![self.disk],
        });
        self.assert_kept();
        failed
    }

    fn refuses(&mut self, request: &impl kvm_clone_protocol::message::Message) {
        self.agent.send(request);
        self.agent.expect(FailureCode::Protocol);
    }

    /// Claims that nothing was written that must not be.
    ///
    /// # Panics
    /// When it was.
    pub fn assert_kept(&self) {
        match self.onto {
            Some(Onto::Inplace) => self.ground.assert_untouched_from(SIZE),
            _ => self.ground.assert_untouched(),
        }
    }

    /// Claims that the session ends well.
    ///
    /// # Panics
    /// When it does not.
    pub fn succeeds(&mut self) -> Ended {
        match self.agent.next() {
            Some(Control::Ended(ended)) => {
                assert_eq!(ended.disk, self.disk);
                ended
            }
            other => panic!("expected the end of the session, got {other:?}"),
        }
    }
}
