//! When a campaign kills.
//!
//! Three of four kills are spread evenly over the life of the victim in an undisturbed run. The
//! fourth goes where little time is spent and much happens: the last part of the run, in which
//! changes are made durable and come to count, and, shorter still, what comes after the commit.
//! Such a moment counts from something that is seen on the disk, since most of a run are
//! handshakes, whose length varies more than what is to be hit is long.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use super::site::Site;
use super::turn::{Aim, Turn};
use super::victim::Victim;
use crate::controller::Running;
use crate::image::Random;
use crate::process::{arguments, kill};

/// How often the disk is looked at while a moment is waited for.
const POLL: Duration = Duration::from_millis(1);

/// How often, once something lies beside the destination: the commit is over in some milliseconds.
const CLOSE_POLL: Duration = Duration::from_micros(200);

/// What comes after the commit takes about as long, where it is too short to be measured.
const SHORTEST: Duration = Duration::from_millis(8);

/// How often the processes are looked for while an undisturbed run is measured. That costs some
/// milliseconds, which the run must do without.
const SIGHT: Duration = Duration::from_millis(40);

/// A moment may be later than the end by this part of the run.
const OVERTIME: f64 = 1.05;

/// The last part of the time in which something lies beside the destination begins here: it is
/// about the last seventh of a run.
const LATE: f64 = 0.7;

/// When to kill.
#[derive(Debug, Clone, Copy)]
pub enum Moment {
    /// So long after the start of the run.
    AfterStart(Duration),
    /// So long after something has appeared beside the destination.
    AfterBegin(Duration),
    /// So long after the commit.
    AfterCommit(Duration),
}

/// How an undisturbed run goes, counted from its start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rhythm {
    pub(super) length: Duration,
    /// When something lay beside the destination.
    beside: Option<Span>,
    /// From the commit until nothing lay beside it.
    committed: Option<Span>,
    /// When each victim lived.
    lives: [Option<Span>; Victim::ALL.len()],
}

#[derive(Debug, Clone, Copy)]
struct Span {
    from: Duration,
    until: Duration,
}

/// Where in their spans the kills go: by steps of the golden ratio, which are evenly spread
/// however many are taken.
#[derive(Debug)]
pub(super) struct Moments {
    life: [f64; Victim::ALL.len()],
    late: f64,
    committed: f64,
}

impl Moments {
    pub(super) fn new(random: &mut Random) -> Self {
        Self {
            life: std::array::from_fn(|_| share(random)),
            late: share(random),
            committed: share(random),
        }
    }

    /// The moment for the next kill.
    pub(super) fn next(&mut self, turn: Turn, rhythm: &Rhythm) -> Moment {
        match turn.aim {
            Aim::Life => {
                let share = step(&mut self.life[turn.victim.index()]);
                Moment::AfterStart(rhythm.life(turn.victim).at(share))
            }
            Aim::Late => {
                let share = LATE + step(&mut self.late) * (OVERTIME - LATE);
                let beside = rhythm.beside.unwrap_or_else(|| rhythm.whole());
                Moment::AfterBegin(beside.len().mul_f64(share))
            }
            Aim::Commit => {
                let share = step(&mut self.committed) * OVERTIME;
                let length = rhythm.committed.map_or(Duration::ZERO, Span::len);
                Moment::AfterCommit(length.max(SHORTEST).mul_f64(share))
            }
        }
    }
}

impl Rhythm {
    /// Watches an undisturbed run to its end.
    pub(super) fn watch(running: &mut Running, site: &Site) -> Self {
        let mut rhythm = Self {
            length: Duration::ZERO,
            beside: None,
            committed: None,
            lives: [None; Victim::ALL.len()],
        };
        let mut traces = Traces::default();
        let mut sight = Duration::ZERO;
        while running.is_alive() {
            let now = running.elapsed();
            rhythm.length = now;
            let phase = traces.look(site);
            if phase >= Phase::Begun {
                note(&mut rhythm.beside, now);
            }
            if phase == Phase::Committed {
                note(&mut rhythm.committed, now);
            }
            if now >= sight {
                rhythm.look_for_victims(now, site, running);
                sight = running.elapsed() + SIGHT;
            }
            std::thread::sleep(phase.poll());
        }
        rhythm
    }

    fn look_for_victims(&mut self, now: Duration, site: &Site, running: &Running) {
        for (victim, life) in Victim::ALL.into_iter().zip(&mut self.lives) {
            if !victim.find(&site.lab, running).is_empty() {
                note(life, now);
            }
        }
    }

    /// Another undisturbed run has taken this long: others use the machine as well, so that runs
    /// become slower and faster again. Half of it is believed.
    pub(super) fn adapt(&mut self, length: Duration) {
        let ratio = (length + self.length).as_secs_f64() / (2.0 * self.length.as_secs_f64());
        let scale = |time: &mut Duration| *time = time.mul_f64(ratio);
        scale(&mut self.length);
        let marks = [&mut self.committed, &mut self.beside];
        for span in self.lives.iter_mut().chain(marks).flatten() {
            scale(&mut span.from);
            scale(&mut span.until);
        }
    }

    /// When a victim lives; all the time, if it was never seen.
    fn life(&self, victim: Victim) -> Span {
        self.lives[victim.index()].unwrap_or_else(|| self.whole())
    }

    fn whole(&self) -> Span {
        Span {
            from: Duration::ZERO,
            until: self.length,
        }
    }
}

impl fmt::Display for Rhythm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2?}", self.length)?;
        if let Some(beside) = self.beside {
            write!(f, ", something beside the disk for {:.2?}", beside.len())?;
        }
        if let Some(committed) = self.committed {
            write!(f, ", {:.2?} of it after the commit", committed.len())?;
        }
        Ok(())
    }
}

impl Span {
    fn len(self) -> Duration {
        self.until.saturating_sub(self.from)
    }

    /// The moment at a share of it, and of a bit more.
    fn at(self, share: f64) -> Duration {
        self.from + self.len().mul_f64(share * OVERTIME)
    }
}

fn note(span: &mut Option<Span>, now: Duration) {
    let from = span.map_or(now, |span| span.from);
    *span = Some(Span { from, until: now });
}

/// A number from 0 up to 1.
fn share(random: &mut Random) -> f64 {
    f64::from(u32::try_from(random.below(1 << 32)).expect("32 bits")) / f64::from(u32::MAX)
}

/// The next of evenly spread numbers.
fn step(at: &mut f64) -> f64 {
    const GOLDEN: f64 = 0.618_033_988_749_895;
    *at = (*at + GOLDEN).fract();
    *at
}

/// How far a run has come, as far as the disk shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Nothing lies beside the destination, not yet or not any more.
    Clear,
    /// Something does.
    Begun,
    /// What is noted of the run on its host was written once more since.
    Committed,
}

impl Phase {
    fn poll(self) -> Duration {
        if self == Self::Clear {
            POLL
        } else {
            CLOSE_POLL
        }
    }
}

/// What was seen of a run on the disk.
#[derive(Debug, Default)]
struct Traces {
    noted: Option<SystemTime>,
}

impl Traces {
    fn look(&mut self, site: &Site) -> Phase {
        if site.beside().is_empty() {
            return Phase::Clear;
        }
        let Some(now) = site.noted() else {
            return Phase::Begun;
        };
        if *self.noted.get_or_insert(now) == now {
            Phase::Begun
        } else {
            Phase::Committed
        }
    }
}

/// Kills one of those whom `find` finds, as `pick` has it, at a moment, or as soon after it as
/// there is one. Gives the time that had passed; `None` when the run was over first.
pub(super) fn kill_at(
    moment: Moment,
    running: &mut Running,
    site: &Site,
    pick: u64,
    find: impl Fn(&Running) -> Vec<PathBuf>,
) -> Option<Duration> {
    let mut traces = Traces::default();
    let mut due = None;
    // To find it takes some milliseconds, in which what is to be hit may be over.
    let mut target = None;
    while running.is_alive() {
        let phase = match moment {
            Moment::AfterStart(_) => Phase::Clear,
            _ => traces.look(site),
        };
        if due.is_none() {
            let after = moment.reached(phase, running);
            due = after.map(|after| Instant::now() + after);
        }
        let is_due = due.is_some_and(|due| Instant::now() >= due);
        if target.is_none() && (is_due || phase >= Phase::Begun) {
            target = Target::choose(&find(running), pick);
        }
        if is_due && target.take().is_some_and(|target| target.kill()) {
            return Some(running.elapsed());
        }
        std::thread::sleep(phase.poll());
    }
    None
}

/// A process that is to be killed, and nobody else who has got its number since.
struct Target {
    process: PathBuf,
    arguments: Vec<Vec<u8>>,
}

impl Target {
    fn choose(found: &[PathBuf], pick: u64) -> Option<Self> {
        let at = pick.checked_rem(found.len() as u64)?;
        let process = found.get(usize::try_from(at).expect("an index"))?.clone();
        let arguments = arguments(&process);
        Some(Self { process, arguments })
    }

    /// False when it was gone.
    fn kill(&self) -> bool {
        arguments(&self.process) == self.arguments && kill(&self.process)
    }
}

impl Moment {
    /// How long it is until then, once that can be told.
    fn reached(self, phase: Phase, running: &Running) -> Option<Duration> {
        match self {
            Self::AfterStart(after) => Some(after.saturating_sub(running.elapsed())),
            Self::AfterBegin(after) => (phase >= Phase::Begun).then_some(after),
            Self::AfterCommit(after) => (phase == Phase::Committed).then_some(after),
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AfterStart(after) => write!(f, "{after:.2?} after the start"),
            Self::AfterBegin(after) => write!(f, "{after:.2?} after the begin on the disk"),
            Self::AfterCommit(after) => write!(f, "{after:.2?} after the commit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_evenly_spread_however_many_there_are() {
        let mut at = share(&mut Random::new(7));
        let mut steps: Vec<f64> = (0..60).map(|_| step(&mut at)).collect();
        steps.sort_by(f64::total_cmp);
        let widest = steps.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(widest.fold(0.0, f64::max) < 3.0 / 60.0);
    }
}
