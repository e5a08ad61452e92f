//! Power cuts by the hundred, and what is found after each.
//!
//! A round records one run and cuts it at many places, then does the same to the recovery from
//! some of them. It has mounts of its own and disks in memory, and leaves nothing. No two runs
//! are recorded alike, so a seed alone repeats nothing: what a failure was found in is kept on
//! request, and a cut is the same there.

use std::fmt;
use std::fs;
use std::ops::AddAssign;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::ground::Ground;
use super::log::Log;
use super::namespace::apart;
use super::neighbour::Neighbour;
use super::platter::{Cut, Platter};
use super::recorder::{Recorder, format};
use super::story::{Seen, Story};
use super::subject::Subject;
use crate::image::Random;
use crate::mount::Kind;
use crate::skip::{recording_obstacle, skip};

/// Where runs with failures are kept, unless somewhere else is chosen.
pub const KEPT: &str = "/var/tmp/kvm-clone-crash";

/// How many recoveries of a round are recorded as well, and the share of the cuts for them.
const RECOVERIES: usize = 2;
const RECOVERY_SHARE: usize = 4;

/// What is tried, and on what.
#[derive(Debug)]
pub struct Campaign<'a> {
    /// What replaces a file.
    pub subject: &'a dyn Subject,
    /// The file system.
    pub kind: Kind,
    /// From which the seeds of all rounds are drawn.
    pub seed: u64,
    /// After one in so many cuts the run is done once more, and has to succeed.
    pub again_every: usize,
    /// Where what a failure was found in is kept.
    pub keep: Option<PathBuf>,
}

/// How often something was found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub old: usize,
    pub new: usize,
    pub absent: usize,
    pub torn: usize,
}

/// What was found in some rounds.
#[derive(Debug, Default)]
pub struct Tally {
    /// Power cuts.
    pub cuts: usize,
    /// Those of them that interrupted a recovery.
    pub in_recovery: usize,
    /// What was there after the cut.
    pub found: Counts,
    /// What was there after recovery.
    pub recovered: Counts,
    /// What was there after another run.
    pub again: Counts,
    /// What must not be.
    pub failures: Vec<String>,
    /// Where that is kept.
    pub kept: Vec<PathBuf>,
}

/// A run, recorded.
#[derive(Debug)]
struct Record {
    name: String,
    seed: u64,
    before: Platter,
    log: Log,
    /// From which its cuts are drawn.
    cuts: Random,
    /// After so many entries the new version was promised.
    promised: usize,
}

impl<'a> Campaign<'a> {
    /// A campaign; `None`, and a line that says so, where none can be.
    #[must_use]
    pub fn new(subject: &'a dyn Subject, kind: Kind) -> Option<Self> {
        if let Some(reason) = recording_obstacle() {
            skip(&reason);
            return None;
        }
        Some(Self {
            subject,
            kind,
            seed: 1,
            again_every: 10,
            keep: Some(KEPT.into()),
        })
    }

    /// Records a run and cuts it so many times.
    ///
    /// # Panics
    /// When the run fails by itself, or the laboratory does.
    #[must_use]
    pub fn round(&self, number: u64, cuts: usize) -> Tally {
        let seed = Random::new(self.seed.wrapping_add(number)).draw();
        apart(|| {
            let ground = Ground::new();
            let mut tally = Tally::default();
            let story = self.lay_out(&ground, seed);
            let record = self.record_run(&ground, seed);
            let each = cuts / RECOVERY_SHARE / RECOVERIES;
            let first = cuts - each * RECOVERIES;
            let worth = self.cut(&ground, &story, &record, first, &mut tally);
            for cut in worth.into_iter().take(RECOVERIES) {
                let record = self.record_recovery(&ground, &story, &record, cut);
                self.cut(&ground, &story, &record, each, &mut tally);
            }
            tally.in_recovery = tally.cuts - first;
            // Where there was nothing to recover.
            let record = Record {
                cuts: Random::new(seed + 1),
                ..record
            };
            self.cut(&ground, &story, &record, cuts - tally.cuts, &mut tally);
            tally
        })
    }

    /// Tries a cut of a run that was kept, and leaves the image of it there, as `cut`.
    ///
    /// # Panics
    /// When the directory does not hold what a failure was found in.
    #[must_use]
    pub fn replay(&self, directory: &Path, cut_seed: u64) -> Tally {
        apart(|| {
            let ground = Ground::new();
            let (record, cut) = Record::kept(directory, cut_seed);
            let story = self.lay_out(&ground, record.seed);
            let mut platter = record.before.clone();
            platter.advance(&record.log, cut);
            platter.materialise(cut, &directory.join("cut"));
            platter.materialise(cut, &ground.image());
            let mut tally = Tally::default();
            let _ = self.look(&ground, &story, &record, cut, &mut tally);
            tally
        })
    }

    /// Makes the image of before, with the old version on it.
    fn lay_out(&self, ground: &Ground, seed: u64) -> Story {
        format(self.kind, &ground.image());
        let mounted = ground.mount();
        mounted.make_state();
        let disk = mounted.disk();
        let old = self.subject.overwrites().then_some(disk.as_path());
        Story::lay_out(seed, &ground.source(), old)
    }

    fn record_run(&self, ground: &Ground, seed: u64) -> Record {
        let before = Platter::of_image(&ground.image());
        let recorder = Recorder::start(self.kind, &ground.image(), &ground.mount_point());
        let state = ground.bind_state();
        // Without one nothing else brings the file system's journal to the disk, which would hide
        // a sync that is missing; with one there are few writes that no flush has covered.
        let neighbour = (seed & 1 == 0).then(|| Neighbour::start(&ground.mount_point(), seed));
        self.subject
            .replace(&ground.controller, &ground.source(), &ground.disk());
        let promised = recorder.entries();
        drop((neighbour, state));
        let log = recorder.stop();
        before.assert_leads_to(&log, &ground.image());
        Record {
            name: format!("{seed}"),
            seed,
            before,
            log,
            cuts: Random::new(seed),
            promised,
        }
    }

    /// Records the recovery from a cut.
    fn record_recovery(&self, ground: &Ground, story: &Story, from: &Record, cut: Cut) -> Record {
        let mut platter = from.before.clone();
        platter.advance(&from.log, cut);
        platter.materialise(cut, &ground.image());
        let before = Platter::of_image(&ground.image());
        let recorder = Recorder::start(self.kind, &ground.image(), &ground.mount_point());
        let state = ground.bind_state();
        self.subject.recover(&ground.controller, &ground.disk());
        let promised = match story.seen(&ground.disk()) {
            _ if cut.at >= from.promised => 0,
            Seen::New => recorder.entries(),
            _ => usize::MAX,
        };
        drop(state);
        let log = recorder.stop();
        before.assert_leads_to(&log, &ground.image());
        Record {
            name: format!("{}-{}", from.name, cut.seed),
            seed: from.seed,
            before,
            log,
            cuts: Random::new(cut.seed),
            promised,
        }
    }

    /// Cuts a record in many places. Gives those at which there was something to recover.
    fn cut(
        &self,
        ground: &Ground,
        story: &Story,
        record: &Record,
        cuts: usize,
        tally: &mut Tally,
    ) -> Vec<Cut> {
        let mut random = record.cuts.clone();
        let entries = record.log.entries().len();
        let mut all: Vec<_> = (0..cuts)
            .map(|_| Cut::draw(random.draw(), entries))
            .collect();
        // In the order of the log, since the platter only goes forward.
        all.sort_by_key(|cut| cut.at);
        let mut platter = record.before.clone();
        let failures = tally.failures.len();
        let mut worth = Vec::new();
        for cut in all {
            platter.advance(&record.log, cut);
            platter.materialise(cut, &ground.image());
            if self.look(ground, story, record, cut, tally) {
                worth.push(cut);
            }
        }
        let failures = &tally.failures[failures..];
        if let Some(keep) = self.keep.as_ref().filter(|_| !failures.is_empty()) {
            let directory = keep.join(&record.name);
            record.keep(&directory, failures);
            tally.kept.push(directory);
        }
        // From everywhere in the run, not only from its beginning.
        worth.sort_by_key(|cut| cut.seed);
        worth
    }

    /// Looks at what a cut has left, recovers and looks again. Gives whether there was something
    /// to recover.
    fn look(
        &self,
        ground: &Ground,
        story: &Story,
        record: &Record,
        cut: Cut,
        tally: &mut Tally,
    ) -> bool {
        let mut wrong = Vec::new();
        // Also a recovery that fails, and a file system that does not mount, is to be kept and
        // counted.
        let judged = catch_unwind(AssertUnwindSafe(|| {
            self.judge(ground, story, cut.at >= record.promised, tally, &mut wrong)
        }));
        tally.cuts += 1;
        let is_worth = judged.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            wrong.push(text.unwrap_or("a panic").to_owned());
            false
        });
        let place = record.place(cut);
        tally
            .failures
            .extend(wrong.iter().map(|wrong| format!("{place}: {wrong}")));
        is_worth
    }

    fn judge(
        &self,
        ground: &Ground,
        story: &Story,
        is_promised: bool,
        tally: &mut Tally,
        wrong: &mut Vec<String>,
    ) -> bool {
        let subject = self.subject;
        let mounted = ground.mount();
        let _state = ground.bind_state();
        let disk = mounted.disk();
        let beside = mounted.beside();
        let found = story.seen(&disk);
        tally.found.add(&found);
        match &found {
            Seen::Torn(why) => wrong.push(format!("torn: {why}")),
            Seen::Absent if !subject.may_hide() => wrong.push("it has lost its name".to_owned()),
            Seen::Old if is_promised => wrong.push("the old version, after success".to_owned()),
            Seen::Old | Seen::New | Seen::Absent => {}
        }

        subject.recover(&ground.controller, &disk);
        let recovered = story.seen(&disk);
        tally.recovered.add(&recovered);
        match (&found, &recovered) {
            (_, Seen::New) | (Seen::Old, Seen::Old) | (Seen::Torn(_), Seen::Torn(_)) => {}
            _ => wrong.push(format!("recovery made {recovered:?} of {found:?}")),
        }
        let mut left = mounted.beside();
        left.retain(|name| !subject.may_leave(name));
        if !left.is_empty() {
            wrong.push(format!("left by recovery: {left:?}"));
        }

        if tally.cuts.is_multiple_of(self.again_every) {
            subject.replace(&ground.controller, &ground.source(), &disk);
            let again = story.seen(&disk);
            tally.again.add(&again);
            let left = mounted.beside();
            if again != Seen::New || !left.is_empty() {
                wrong.push(format!("another run left {again:?} and {left:?}"));
            }
        }
        found == Seen::Absent || !beside.is_empty()
    }
}

impl Record {
    fn place(&self, cut: Cut) -> String {
        let (name, entries) = (&self.name, self.log.entries().len());
        let promise = match self.promised {
            usize::MAX => "no promise".to_owned(),
            promised => format!("promised at {promised}"),
        };
        let Cut { seed, at } = cut;
        format!("run {name}, cut {seed} (at {at} of {entries}, {promise})")
    }

    fn keep(&self, directory: &Path, failures: &[String]) {
        let kept = |result: std::io::Result<()>| {
            result.unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        };
        kept(fs::create_dir_all(directory));
        let at = 0;
        let before = directory.join("before");
        self.before.materialise(Cut { seed: 0, at }, &before);
        kept(fs::write(directory.join("log"), self.log.bytes()));
        let facts = json!({ "name": self.name, "seed": self.seed, "promised": self.promised });
        kept(fs::write(directory.join("record.json"), facts.to_string()));
        kept(fs::write(directory.join("failures"), failures.join("\n")));
    }

    fn kept(directory: &Path, cut_seed: u64) -> (Self, Cut) {
        let facts = directory.join("record.json");
        let facts = fs::read(&facts).unwrap_or_else(|error| panic!("{}: {error}", facts.display()));
        let facts: Value = serde_json::from_slice(&facts).expect("a record is JSON");
        let number = |field: &str| facts[field].as_u64().expect("a record holds numbers");
        let record = Self {
            name: facts["name"].as_str().unwrap_or_default().to_owned(),
            seed: number("seed"),
            before: Platter::of_image(&directory.join("before")),
            log: Log::read(&directory.join("log")),
            cuts: Random::new(cut_seed),
            promised: usize::try_from(number("promised")).expect("it was a count"),
        };
        let cut = Cut::draw(cut_seed, record.log.entries().len());
        (record, cut)
    }
}

impl Counts {
    fn add(&mut self, seen: &Seen) {
        match seen {
            Seen::Old => self.old += 1,
            Seen::New => self.new += 1,
            Seen::Absent => self.absent += 1,
            Seen::Torn(_) => self.torn += 1,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            old,
            new,
            absent,
            torn,
        } = self;
        write!(f, "{old} old, {new} new, {absent} absent, {torn} torn")
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.old += other.old;
        self.new += other.new;
        self.absent += other.absent;
        self.torn += other.torn;
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.cuts += other.cuts;
        self.in_recovery += other.in_recovery;
        self.found += other.found;
        self.recovered += other.recovered;
        self.again += other.again;
        self.failures.extend(other.failures);
        self.kept.extend(other.kept);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} cuts, {} of them in a recovery",
            self.cuts, self.in_recovery
        )?;
        writeln!(f, "  found      {}", self.found)?;
        writeln!(f, "  recovered  {}", self.recovered)?;
        writeln!(f, "  run again  {}", self.again)?;
        write!(f, "  failures   {}", self.failures.len())?;
        for failure in &self.failures {
            write!(f, "\n    {failure}")?;
        }
        for directory in &self.kept {
            write!(f, "\n  kept in {}", directory.display())?;
        }
        Ok(())
    }
}
