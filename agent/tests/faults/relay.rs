//! A data connection in two halves, with this process in the middle: it moves bytes, and does not
//! always do that well.
//!
//! ```text
//!   agent of the source ── attach ──► Relay ──► attach ── agent of the destination
//!                                 ◄──       ◄──
//! ```

use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use kvm_clone_protocol::message::Listening;
use kvm_clone_tests::image::Random;

use crate::program::with_faults;

/// Longer than whoever waits for a byte bears it.
const FOR_EVER: Duration = Duration::from_secs(60);

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    ToDestination,
    ToSource,
}

impl Way {
    pub(crate) const BOTH: [Self; 2] = [Self::ToDestination, Self::ToSource];
}

/// What becomes of the bytes that go one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// They arrive.
    None,
    /// After so many the connection ends.
    CutAt(u64),
    /// After so many nothing moves any more this way, and nothing ends.
    StallAt(u64),
    /// After so many nothing moves for a while.
    PauseAt(u64, Duration),
    /// Each arrives so much later.
    Late(Duration),
    /// They arrive in pieces of any length, the first ones one by one.
    Dribble(u64),
}

/// What becomes of a connection. What is not said of a way arrives.
pub(crate) type Plan = (Way, Trouble);

/// Bytes that have arrived at the destination, and at the source.
#[derive(Debug, Default)]
pub(crate) struct Arrived([AtomicU64; 2]);

impl Arrived {
    pub(crate) fn at(&self, way: Way) -> u64 {
        self.0[way as usize].load(Ordering::Relaxed)
    }
}

/// A connection while it lasts.
pub(crate) struct Relay {
    children: [Child; 2],
    pub(crate) arrived: Arc<Arrived>,
}

impl Relay {
    /// Attaches to both agents, and starts to move bytes.
    pub(crate) fn start(source: &Listening, destination: &Listening, plans: &[Plan]) -> Self {
        let (one, from_source, to_source) = attach(source);
        let (other, from_destination, to_destination) = attach(destination);
        let arrived = Arc::new(Arrived::default());
        for (way, from, to) in [
            (Way::ToDestination, from_source, to_destination),
            (Way::ToSource, from_destination, to_source),
        ] {
            let plan = plans.iter().find(|plan| plan.0 == way);
            let pump = Pump {
                way,
                trouble: plan.map_or(Trouble::None, |plan| plan.1),
                arrived: Arc::clone(&arrived),
            };
            std::thread::spawn(move || pump.run(from, to));
        }
        Self {
            children: [one, other],
            arrived,
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn attach(listening: &Listening) -> (Child, ChildStdout, ChildStdin) {
    let mut child = Command::new(with_faults())
        .args(["attach", &listening.name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (stdout, mut stdin) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
    let token = listening.token.0.map(|byte| format!("{byte:02x}"));
    stdin.write_all((token.concat() + "\n").as_bytes()).unwrap();
    (child, stdout, stdin)
}

/// Moves bytes one way.
struct Pump {
    way: Way,
    trouble: Trouble,
    arrived: Arc<Arrived>,
}

impl Pump {
    fn run(self, mut from: ChildStdout, mut to: ChildStdin) {
        if let Trouble::Late(by) = self.trouble {
            return self.run_late(from, to, by);
        }
        let mut random = Random::new(match self.trouble {
            Trouble::Dribble(seed) => seed,
            _ => 0,
        });
        let mut bytes = vec![0; 64 * 1024];
        let mut moved = 0;
        loop {
            let at_once = match self.trouble {
                Trouble::CutAt(at) if moved == at => return,
                Trouble::StallAt(at) if moved == at => return std::thread::sleep(FOR_EVER),
                Trouble::PauseAt(at, pause) if moved == at => {
                    std::thread::sleep(pause);
                    bytes.len()
                }
                Trouble::CutAt(at) | Trouble::StallAt(at) | Trouble::PauseAt(at, _)
                    if moved < at =>
                {
                    bytes.len().min(usize::try_from(at - moved).unwrap())
                }
                Trouble::Dribble(_) if moved < 2000 => 1,
                Trouble::Dribble(_) => {
                    std::thread::sleep(Duration::from_micros(random.below(1500)));
                    1 + usize::try_from(random.below(20_000)).unwrap()
                }
                _ => bytes.len(),
            };
            let read = match from.read(&mut bytes[..at_once]) {
                Ok(0) | Err(_) => return,
                Ok(read) => read,
            };
            if to.write_all(&bytes[..read]).is_err() {
                return;
            }
            moved += read as u64;
            self.arrived.0[self.way as usize].store(moved, Ordering::Relaxed);
        }
    }

    fn run_late(&self, mut from: ChildStdout, mut to: ChildStdin, by: Duration) {
        let (under_way, arriving) = channel::<(Instant, Vec<u8>)>();
        std::thread::spawn(move || {
            let mut bytes = vec![0; 64 * 1024];
            while let Ok(read @ 1..) = from.read(&mut bytes) {
                let sent = under_way.send((Instant::now() + by, bytes[..read].to_vec()));
                if sent.is_err() {
                    return;
                }
            }
        });
        for (due, bytes) in arriving {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
    }
}
