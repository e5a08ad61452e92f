//! A campaign of kills: again and again `disk sync` brings a destination from one version to
//! another, one process of the run is killed at some moment, and what must hold after that is
//! looked at.
//!
//! ```text
//!  story   sync onto OLD ─ kill ─ end, quiet ─ look ─┬─ recover ─ look ─┬─ sync ─ NEW, and no more
//!                                                    └──────────────────┘
//!  look    the destination, through its name: OLD, NEW, or absent; else it is torn
//! ```
//!
//! There are two versions, and each story goes from the one that the story before it has ended
//! with to the other. So nothing is put back between stories, and the destination ages as a real
//! one does.

mod moment;
mod report;
mod site;
mod turn;
mod versions;
mod victim;

use std::fmt;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use moment::Moment;
pub use report::Report;
pub use victim::Victim;

use crate::controller::{Run, Running};
use crate::image::Random;
use crate::journey::Journey;
use crate::lab::LabSpec;
use crate::mount::Kind;
use moment::Moments;
use site::Site;
use turn::Turn;
use versions::{Found, Version};

/// After a kill all processes of a run are gone within this time.
const QUIET: Duration = Duration::from_secs(10);

/// How often the undisturbed run is measured again, since others use the machine as well.
const MEASURE_EVERY: u64 = 50;

/// How changes get into the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apply {
    Staged,
    Reflink,
}

/// What is to be done.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Processes to kill.
    pub kills: u64,
    pub apply: Apply,
    /// The file system of the destination.
    pub on: Kind,
    /// Decides the moments.
    pub seed: u64,
}

/// One kill and what came of it.
#[derive(Debug)]
pub struct Story {
    pub number: u64,
    pub victim: Victim,
    pub by: Journey,
    pub moment: Moment,
    /// When it was killed, after the start of the run; `None` when the run was over before.
    pub killed: Option<Duration>,
    /// From the kill until nothing ran any more.
    pub quiet: Duration,
    /// What the destination was found to be after the kill.
    found: Option<Found>,
    /// What it was after `recover`, where that was run.
    recovered: Option<Found>,
    /// The run that came to its end.
    pub next: Next,
    pub orphans: u64,
    pub left_over: u64,
    /// Everything that must not be.
    pub violations: Vec<String>,
}

/// The run after a kill.
#[derive(Debug, Default)]
pub struct Next {
    pub resumed: bool,
    pub bytes_wire: u64,
    /// It had all to do that there is to do.
    is_whole: bool,
}

/// Runs a campaign, and calls with every story as it ends. `None`, and a line that says so, where
/// none can be run.
///
/// # Panics
/// When the laboratory breaks; what the product does wrong is in the report.
pub fn run(plan: &Plan, mut each: impl FnMut(&Story)) -> Option<Report> {
    let site = Site::new(LabSpec::new()?, plan);
    let mut campaign = Campaign::new(plan, site);
    let mut report = Report::new(plan);
    while report.kills() < plan.kills && !report.is_hopeless() {
        let story = campaign.story();
        each(&story);
        report.add(&story);
    }
    report.end(campaign.site.measured());
    Some(report)
}

struct Campaign {
    site: Site,
    moments: Moments,
    random: Random,
    number: u64,
}

impl Campaign {
    fn new(plan: &Plan, site: Site) -> Self {
        let mut random = Random::new(plan.seed);
        Self {
            site,
            moments: Moments::new(&mut random),
            random,
            number: 0,
        }
    }

    /// Kills once, and sees to what is left.
    fn story(&mut self) -> Story {
        if self.number.is_multiple_of(MEASURE_EVERY) {
            self.site.measure();
        }
        let number = self.number;
        self.number += 1;
        let turn = Turn::of(number);
        let rhythm = self.site.rhythm(turn.by);
        let moment = self.moments.next(turn, rhythm);
        let mut story = Story::new(number, turn.victim, turn.by, moment);
        self.kill(&mut story);
        if story.killed.is_some() {
            if turn.recovers {
                self.recover(&mut story);
            }
            self.complete(&mut story);
        }
        self.site.turn_over();
        if !story.violations.is_empty() {
            self.site.start_afresh();
        }
        story
    }

    fn kill(&mut self, story: &mut Story) {
        let mut running = self.site.start_sync(story.by);
        let pick = self.random.draw();
        let find = |running: &Running| story.victim.find(&self.site.lab, running);
        let killed = moment::kill_at(story.moment, &mut running, &self.site, pick, find);
        let since = Instant::now();
        story.killed = killed;
        let run = running.wait();
        let orphans = self.site.wait_until_quiet(since + QUIET);
        story.quiet = since.elapsed();
        story.orphans = orphans.len() as u64;
        if !orphans.is_empty() {
            let orphans = orphans.join("\n  ");
            story.violates(format!(
                "still running after {QUIET:?}:\n  {orphans}\n{run}"
            ));
        }
        if killed.is_none() {
            self.is_complete(story, &run);
            return;
        }
        let found = self.site.look();
        story.found = Some(found);
        if !self.site.may_be(found) {
            story.violates(format!("the destination is {found} after\n{run}"));
        }
    }

    /// `recover` makes an absent one new, leaves whole what is whole, and leaves nothing else.
    fn recover(&self, story: &mut Story) {
        let run = self.site.recover();
        story.check_success(&run);
        let recovered = self.site.look();
        story.recovered = Some(recovered);
        let expected: &[Found] = match story.found {
            Some(Found::Absent | Found::Is(Version::New)) => &[Found::Is(Version::New)],
            _ => &[Found::Is(Version::Old), Found::Is(Version::New)],
        };
        if !expected.contains(&recovered) {
            story.violates(format!("the destination is {recovered} after\n{run}"));
        }
        let mut left = self.site.beside();
        left.extend(self.site.runs());
        story.leaves(&left, "recover");
    }

    /// The next run completes, and nothing is left of the one that was killed.
    fn complete(&mut self, story: &mut Story) {
        let run = self.site.start_sync(story.by).wait();
        self.is_complete(story, &run);
    }

    /// The run has come to its end: the destination is new, and nothing else is there.
    fn is_complete(&mut self, story: &mut Story, run: &Run) {
        if story.check_success(run) {
            story.next = Next::of(&run.json());
            if story.next.is_whole {
                self.site.rhythm(story.by).adapt(run.elapsed);
            }
        }
        let found = self.site.look();
        if found != Found::Is(Version::New) {
            story.violates(format!("the destination is {found} after\n{run}"));
        }
        let mut left = self.site.beside();
        left.extend(self.site.runs());
        left.extend(self.site.elsewhere());
        story.leaves(&left, "the run that came to its end");
    }
}

impl Story {
    fn new(number: u64, victim: Victim, by: Journey, moment: Moment) -> Self {
        Self {
            number,
            victim,
            by,
            moment,
            killed: None,
            quiet: Duration::ZERO,
            found: None,
            recovered: None,
            next: Next::default(),
            orphans: 0,
            left_over: 0,
            violations: Vec::new(),
        }
    }

    fn violates(&mut self, what: String) {
        self.violations.push(what);
    }

    fn check_success(&mut self, run: &Run) -> bool {
        let is_success = run.code() == Some(0);
        if !is_success {
            self.violates(format!("failed: {run}"));
        }
        is_success
    }

    fn leaves(&mut self, left: &[String], after: &str) {
        if left.is_empty() {
            return;
        }
        self.left_over += left.len() as u64;
        self.violates(format!("left after {after}: {}", left.join(", ")));
    }
}

impl Next {
    fn of(result: &Value) -> Self {
        let resumed = result["resumed"] == true;
        let changed = result["blocks_changed"].as_u64();
        Self {
            resumed,
            bytes_wire: result["bytes_wire"].as_u64().unwrap_or_default(),
            is_whole: !resumed && changed.is_some_and(|blocks| blocks > 0),
        }
    }
}

impl Apply {
    /// As the command line and results name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Reflink => "reflink",
        }
    }
}

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, victim, .. } = self;
        write!(f, "#{number} {victim}, {:?}, {}: ", self.by, self.moment)?;
        match self.killed {
            Some(at) => write!(f, "killed after {at:.3?}, quiet after {:.3?}", self.quiet)?,
            None => write!(f, "over before the kill")?,
        }
        if let Some(found) = self.found {
            write!(f, "; {found}")?;
        }
        if let Some(recovered) = self.recovered {
            write!(f, "; recovered: {recovered}")?;
        }
        let resumed = if self.next.resumed { "resumed, " } else { "" };
        write!(f, "; next: {resumed}{} bytes", self.next.bytes_wire)?;
        for violation in &self.violations {
            write!(f, "\nVIOLATION: {violation}")?;
        }
        Ok(())
    }
}
