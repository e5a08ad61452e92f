//! What a campaign has found, as a table.

use std::fmt;
use std::time::{Duration, Instant};

use super::versions::{Found, Version};
use super::{Plan, Story, Victim};
use crate::image::KIB;

/// A campaign with so many more misses than kills never comes to an end.
const HOPELESS: u64 = 20;

/// What happened to a victim.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    kills: u64,
    missed: u64,
    old: u64,
    new: u64,
    absent: u64,
    torn: u64,
    left_over: u64,
    orphans: u64,
    resumed: u64,
}

/// The result of a campaign.
#[derive(Debug)]
pub struct Report {
    plan: Plan,
    tallies: [Tally; Victim::ALL.len()],
    /// What runs that took up another one shipped.
    resumed_bytes: Vec<u64>,
    slowest_end: Duration,
    since: Instant,
    elapsed: Duration,
    measured: String,
    /// Everything that must not be.
    pub violations: Vec<String>,
}

impl Report {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            plan: *plan,
            tallies: [Tally::default(); Victim::ALL.len()],
            resumed_bytes: Vec::new(),
            slowest_end: Duration::ZERO,
            since: Instant::now(),
            elapsed: Duration::ZERO,
            measured: String::new(),
            violations: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, story: &Story) {
        self.tallies[story.victim.index()].add(story);
        self.slowest_end = self.slowest_end.max(story.quiet);
        if story.next.resumed {
            self.resumed_bytes.push(story.next.bytes_wire);
        }
        if !story.violations.is_empty() {
            self.violations.push(story.to_string());
        }
    }

    pub(super) fn end(&mut self, measured: String) {
        self.elapsed = self.since.elapsed();
        self.measured = measured;
        if self.kills() < self.plan.kills {
            self.violations
                .push("runs end before they can be killed".to_owned());
        }
    }

    /// Kills that were done.
    #[must_use]
    pub fn kills(&self) -> u64 {
        self.total().kills
    }

    /// How often a destination was found absent.
    #[must_use]
    pub fn absent(&self) -> u64 {
        self.total().absent
    }

    /// Whether there are so many misses that the campaign would not end.
    pub(super) fn is_hopeless(&self) -> bool {
        self.total().missed > self.kills() + HOPELESS
    }

    fn total(&self) -> Tally {
        let add = |one: Tally, other: &Tally| Tally {
            kills: one.kills + other.kills,
            missed: one.missed + other.missed,
            old: one.old + other.old,
            new: one.new + other.new,
            absent: one.absent + other.absent,
            torn: one.torn + other.torn,
            left_over: one.left_over + other.left_over,
            orphans: one.orphans + other.orphans,
            resumed: one.resumed + other.resumed,
        };
        self.tallies.iter().fold(Tally::default(), add)
    }
}

impl Tally {
    fn add(&mut self, story: &Story) {
        self.left_over += story.left_over;
        self.orphans += story.orphans;
        if story.killed.is_none() {
            self.missed += 1;
            return;
        }
        self.kills += 1;
        self.resumed += u64::from(story.next.resumed);
        match story.found {
            Some(Found::Is(Version::Old)) => self.old += 1,
            Some(Found::Is(Version::New)) => self.new += 1,
            Some(Found::Absent) => self.absent += 1,
            Some(Found::Torn(_)) => self.torn += 1,
            None => {}
        }
    }

    fn row(self, name: &str) -> String {
        let Self {
            kills,
            old,
            new,
            absent,
            torn,
            ..
        } = self;
        let (left_over, orphans) = (self.left_over, self.orphans);
        let (resumed, missed) = (self.resumed, self.missed);
        format!(
            "| {name:<21} | {kills:>5} | {old:>4} | {new:>4} | {absent:>6} | {torn:>4} \
             | {left_over:>9} | {orphans:>7} | {resumed:>7} | {missed:>6} |"
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan {
            apply, on, seed, ..
        } = self.plan;
        let (kills, seconds) = (self.kills(), self.elapsed.as_secs_f64());
        let each = self
            .elapsed
            .checked_div(u32::try_from(kills).unwrap_or(u32::MAX));
        writeln!(
            f,
            "{kills} kills, {} on {on}, seed {seed}: {seconds:.0} s, {:.2?} for each",
            apply.name(),
            each.unwrap_or_default()
        )?;
        writeln!(f, "undisturbed: {}", self.measured)?;
        writeln!(f, "slowest to become quiet: {:.2?}", self.slowest_end)?;
        let shipped = self.resumed_bytes.iter().sum::<u64>();
        let most = self.resumed_bytes.iter().max().copied().unwrap_or_default();
        let mean = shipped.checked_div(self.resumed_bytes.len() as u64);
        writeln!(
            f,
            "resumed runs shipped {} KiB in the mean, {} KiB at most",
            mean.unwrap_or_default() / KIB,
            most / KIB
        )?;
        writeln!(
            f,
            "| {:<21} | kills |  old |  new | absent | torn | left over | orphans | resumed | missed |",
            "victim"
        )?;
        let dashes = "| --- ".repeat(10);
        writeln!(f, "{dashes}|")?;
        for (victim, tally) in Victim::ALL.iter().zip(self.tallies) {
            writeln!(f, "{}", tally.row(&victim.to_string()))?;
        }
        write!(f, "{}", self.total().row("all"))?;
        for violation in &self.violations {
            write!(f, "\n{violation}")?;
        }
        Ok(())
    }
}
