//! When a campaign kills.
//!
//! Three of four kills are spread evenly over the life of the victim in an undisturbed run. The
//! fourth goes where little time is spent and much happens: the last part of the run, in which
//! changes are made durable and come to count, and, where it can be seen, the time while the
//! destination has no name. Such a moment counts from something that is seen on the disk, since
//! half of a run are handshakes, whose length varies more than what is to be hit is long.

use std::fmt;
use std::time::{Duration, Instant};

use super::Apply;
use super::site::Site;
use super::victim::Victim;
use crate::controller::Running;
use crate::image::Random;

/// How often the disk is looked at while a moment is waited for.
const POLL: Duration = Duration::from_micros(500);

/// How often the processes are looked for while an undisturbed run is measured. That costs some
/// milliseconds, which the run must do without.
const SIGHT: Duration = Duration::from_millis(40);

/// A moment may be later than the end by this part of the run.
const OVERTIME: f64 = 1.05;

/// The last part of a run begins here.
const LATE: f64 = 0.85;

/// One in so many kills is not spread but aimed.
const AIMED_EVERY: u64 = 4;

/// When to kill.
#[derive(Debug, Clone, Copy)]
pub enum Moment {
    /// So long after the start of the run.
    AfterStart(Duration),
    /// So long after something has appeared beside the destination.
    AfterBegin(Duration),
    /// So long after the destination has lost its name.
    AfterAway(Duration),
}

/// How an undisturbed run goes, counted from its start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rhythm {
    pub(super) length: Duration,
    /// When something appeared beside the destination.
    begin: Duration,
    /// When the destination had no name, from and until.
    away: Option<Span>,
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
    apply: Apply,
    spread: [f64; Victim::ALL.len()],
    aimed: [f64; 2],
    turns: [u64; Victim::ALL.len()],
}

impl Moments {
    pub(super) fn new(apply: Apply, random: &mut Random) -> Self {
        Self {
            apply,
            spread: std::array::from_fn(|_| share(random)),
            aimed: std::array::from_fn(|_| share(random)),
            // They aim in turn, and the agent that could be applying is the first to be aimed at.
            turns: std::array::from_fn(|at| (at as u64 + 2) % AIMED_EVERY),
        }
    }

    /// The moment for the next kill of a victim.
    pub(super) fn next(&mut self, victim: Victim, rhythm: &Rhythm) -> Moment {
        let at = victim.index();
        let turn = self.turns[at];
        self.turns[at] += 1;
        if !turn.is_multiple_of(AIMED_EVERY) {
            return Moment::AfterStart(rhythm.life(victim).at(step(&mut self.spread[at])));
        }
        match rhythm.away {
            Some(away) if self.apply == Apply::Staged && (turn / AIMED_EVERY).is_multiple_of(2) => {
                Moment::AfterAway(away.len().mul_f64(step(&mut self.aimed[0]) * OVERTIME))
            }
            _ => {
                let late = LATE + step(&mut self.aimed[1]) * (OVERTIME - LATE);
                Moment::AfterBegin(rhythm.length.mul_f64(late).saturating_sub(rhythm.begin))
            }
        }
    }
}

impl Rhythm {
    /// Watches an undisturbed run to its end.
    pub(super) fn watch(running: &mut Running, site: &Site) -> Self {
        let mut rhythm = Self {
            length: Duration::ZERO,
            begin: Duration::ZERO,
            away: None,
            lives: [None; Victim::ALL.len()],
        };
        let mut sight = Duration::ZERO;
        while running.is_alive() {
            let now = running.elapsed();
            rhythm.length = now;
            if rhythm.begin.is_zero() && site.has_begun() {
                rhythm.begin = now;
            }
            if site.is_away() {
                note(&mut rhythm.away, now);
            }
            if now >= sight {
                rhythm.look_for_victims(now, site, running);
                sight = running.elapsed() + SIGHT;
            }
            std::thread::sleep(POLL);
        }
        rhythm
    }

    fn look_for_victims(&mut self, now: Duration, site: &Site, running: &Running) {
        for (victim, life) in Victim::ALL.into_iter().zip(&mut self.lives) {
            if !victim.find(site, running).is_empty() {
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
        scale(&mut self.begin);
        for span in self.lives.iter_mut().chain([&mut self.away]).flatten() {
            scale(&mut span.from);
            scale(&mut span.until);
        }
    }

    /// When a victim lives; all the time, if it was never seen.
    fn life(&self, victim: Victim) -> Span {
        self.lives[victim.index()].unwrap_or(Span {
            from: Duration::ZERO,
            until: self.length,
        })
    }
}

impl fmt::Display for Rhythm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.2?}, the disk is touched after {:.2?}",
            self.length, self.begin
        )?;
        if let Some(away) = self.away {
            write!(f, ", has no name for {:.2?}", away.len())?;
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

/// Waits for the moment, and then until `kill` finds somebody. Gives the time that had passed;
/// `None` when the run was over first.
pub(super) fn wait(
    running: &mut Running,
    moment: Moment,
    site: &Site,
    mut kill: impl FnMut(&Running) -> bool,
) -> Option<Duration> {
    let mut due = None;
    while running.is_alive() {
        let (is_reached, after) = match moment {
            Moment::AfterStart(after) => (true, after.saturating_sub(running.elapsed())),
            Moment::AfterBegin(after) => (site.has_begun(), after),
            Moment::AfterAway(after) => (site.is_away(), after),
        };
        if due.is_none() && is_reached {
            due = Some(Instant::now() + after);
        }
        if due.is_some_and(|due| Instant::now() >= due) && kill(running) {
            return Some(running.elapsed());
        }
        std::thread::sleep(POLL);
    }
    None
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AfterStart(after) => write!(f, "{after:.2?} after the start"),
            Self::AfterBegin(after) => write!(f, "{after:.2?} after the begin on the disk"),
            Self::AfterAway(after) => write!(f, "{after:.2?} after the name has gone"),
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
