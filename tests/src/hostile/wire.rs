//! Two real agents, and the wire between them, on which one bit may be flipped.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use kvm_clone_protocol::digest::{Digest, HashKind, Seed};
use kvm_clone_protocol::frame::{self, FrameKind};
use kvm_clone_protocol::message::{
    Access, ApplyChoice, Commit, Compression, Control, FailureCode, Prepare, Role, SessionParams,
    Start,
};
use kvm_clone_protocol::preamble::PREAMBLE_LEN;

use super::DEADLINE;
use super::agent::Agent;
use super::ground::contents;
use super::link::{Link, Streams};
use super::trial::start;

/// How long the receiver's frames are held up, where both ends are to beat: then neither has
/// anything to say.
const HOLD_UP: Duration = Duration::from_secs(6);

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Way {
    ToReceiver,
    ToSender,
}

/// The bit that is flipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flip {
    pub way: Way,
    pub at: At,
    /// Which of the byte's eight.
    pub bit: u8,
}

/// A byte of what goes one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Counted from the first of the preamble.
    Byte(usize),
    /// Of the first frame of this kind.
    Frame(FrameKind, usize),
}

/// What went one way: the preamble, and then frames.
#[derive(Debug, Clone, Default)]
pub struct Recorded {
    pub units: Vec<(Option<FrameKind>, Vec<u8>)>,
    pub flipped: bool,
}

impl Recorded {
    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.units.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Whether nothing went this way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }
}

/// How a run ended.
#[derive(Debug)]
pub enum Outcome {
    /// An agent, or the controller, has found an error; nothing was committed.
    Error(FailureCode),
    /// It was committed, and is what the source is.
    Right,
    /// It is not.
    Wrong(String),
}

/// A run, from the opening of both disks to the commit.
#[derive(Debug)]
pub struct Passage {
    pub outcome: Outcome,
    pub to_receiver: Recorded,
    pub to_sender: Recorded,
}

/// Syncs `source` onto `destination` with a bit flipped, or none.
///
/// # Panics
/// When an agent hangs, panics, or breaks the protocol.
#[must_use]
pub fn pass(source: &Path, destination: &Path, flip: Option<Flip>, beats: bool) -> Passage {
    let old = contents(destination);
    let (mut sender, mut receiver) = (Agent::greeted(), Agent::greeted());
    let size = sender.open(0, source, Access::Source).size;
    receiver.open(0, destination, Access::Destination);
    let there = Link::attach(&sender.listen(0)).into_streams();
    let here = Link::attach(&receiver.listen(0)).into_streams();
    let [to_receiver, to_sender] = join(there, here, flip, beats);
    let params = SessionParams {
        size,
        hash: HashKind::Xxh3,
        seed: Seed([5; 32]),
        compare: true,
        ship: true,
    };
    for (agent, role) in [(&mut receiver, Role::Receiver), (&mut sender, Role::Sender)] {
        let start = start(0, role, params, ApplyChoice::Staged);
        agent.send(&Start {
            compression: Compression::Level(3),
            ..start
        });
        match agent.next() {
            Some(Control::Started(_)) => {}
            other => panic!("expected a session, got {other:?}"),
        }
    }
    let roots = ends(&mut sender, &mut receiver);
    let outcome = match roots {
        Ok([one, other]) if one.is_some() && one == other => {
            commit(&mut receiver);
            if contents(destination) == contents(source) {
                Outcome::Right
            } else {
                Outcome::Wrong("what was committed is not the source".to_owned())
            }
        }
        Ok(_) => Outcome::Error(FailureCode::Mismatch),
        Err(code) => Outcome::Error(code),
    };
    sender.leave();
    receiver.leave();
    let outcome = match outcome {
        Outcome::Error(_) if contents(destination) != old => {
            Outcome::Wrong("it was written though there was an error".to_owned())
        }
        outcome => outcome,
    };
    Passage {
        outcome,
        to_receiver: to_receiver.join().expect("a thread that moves bytes"),
        to_sender: to_sender.join().expect("a thread that moves bytes"),
    }
}

/// The roots that both ended with, or the first failure that is more than a lost link.
fn ends(sender: &mut Agent, receiver: &mut Agent) -> Result<[Option<Digest>; 2], FailureCode> {
    let mut ends = [None, None];
    let began = Instant::now();
    while ends.iter().any(Option::is_none) {
        assert!(began.elapsed() < DEADLINE, "a session hangs: {ends:?}");
        for (end, agent) in ends.iter_mut().zip([&mut *sender, &mut *receiver]) {
            if end.is_none() {
                *end = match agent.next_within(Duration::from_millis(2)) {
                    None => None,
                    Some(Some(Control::Ended(ended))) => Some(Ok(ended.root)),
                    Some(Some(Control::Failed(failed))) => Some(Err(failed.code)),
                    Some(other) => panic!("expected the end of a session, got {other:?}"),
                };
            }
        }
    }
    let codes = ends.iter().flatten().filter_map(|end| end.err());
    let worst = codes.max_by_key(|code| *code != FailureCode::LinkLost);
    match worst {
        Some(code) => Err(code),
        None => Ok(ends.map(|end| end.and_then(Result::ok).flatten())),
    }
}

fn commit(receiver: &mut Agent) {
    receiver.send(&Prepare {
        disk: 0,
        reread: false,
    });
    match receiver.next() {
        Some(Control::Prepared(_)) => {}
        other => panic!("expected a prepared disk, got {other:?}"),
    }
    receiver.send(&Commit { disks: vec![0] });
    match receiver.next() {
        Some(Control::Committed(_)) => {}
        other => panic!("expected a committed disk, got {other:?}"),
    }
}

/// Threads that move what each says to the other, until it ends.
fn join(
    sender: Streams,
    receiver: Streams,
    flip: Option<Flip>,
    beats: bool,
) -> [JoinHandle<Recorded>; 2] {
    let Streams { input, output } = sender;
    let pump = |way, from, to| {
        let flip = flip
            .filter(|flip| flip.way == way)
            .map(|flip| (flip.at, flip.bit));
        let hold_up = beats && way == Way::ToSender;
        std::thread::spawn(move || pump(from, to, flip, hold_up))
    };
    [
        pump(Way::ToReceiver, output, receiver.input),
        pump(Way::ToSender, receiver.output, input),
    ]
}

fn pump(
    mut from: impl std::io::Read,
    mut to: impl std::io::Write,
    flip: Option<(At, u8)>,
    hold_up: bool,
) -> Recorded {
    let mut recorded = Recorded::default();
    let mut buffer = BytesMut::new();
    let mut chunk = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut chunk).unwrap_or(0);
        buffer.extend_from_slice(&chunk[..read]);
        while let Some((kind, mut bytes)) = take(&mut buffer, recorded.is_empty()) {
            if hold_up && recorded.units.len() == 1 {
                std::thread::sleep(HOLD_UP);
            }
            if let Some((at, bit)) = flip {
                turn(&mut recorded, kind, &mut bytes, at, bit);
            }
            let written = to.write_all(&bytes).and_then(|()| to.flush());
            recorded.units.push((kind, bytes));
            if written.is_err() {
                return recorded;
            }
        }
        if read == 0 {
            return recorded;
        }
    }
}

/// The preamble, or the next frame: what an agent says is whole.
fn take(buffer: &mut BytesMut, first: bool) -> Option<(Option<FrameKind>, Vec<u8>)> {
    if first {
        return (buffer.len() >= PREAMBLE_LEN)
            .then(|| (None, buffer.split_to(PREAMBLE_LEN).to_vec()));
    }
    let frame = frame::decode(buffer).expect("the agents speak the protocol")?;
    Some((Some(frame.kind), frame.encode().to_vec()))
}

/// Flips the bit, if it is one of these bytes.
fn turn(recorded: &mut Recorded, kind: Option<FrameKind>, bytes: &mut [u8], at: At, bit: u8) {
    let is_first = |of| !recorded.units.iter().any(|(kind, _)| *kind == Some(of));
    let place = match at {
        At::Byte(at) => at.checked_sub(recorded.len()),
        At::Frame(of, at) => (kind == Some(of) && is_first(of)).then_some(at),
    };
    if let Some(byte) = place.and_then(|at| bytes.get_mut(at)) {
        *byte ^= 1 << bit;
        recorded.flipped = true;
    }
}
