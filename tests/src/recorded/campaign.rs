//! Power cuts by the hundred, and what is found after each.
//!
//! A round records one run and cuts it at many places, then does the same to the recovery from
//! some of them. It has mounts of its own and disks in memory, and leaves nothing. No two runs
//! are recorded alike, so a seed alone repeats nothing: what a failure was found in is kept on
//! request, and a cut is the same there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::ground::Ground;
use super::image::Image;
use super::neighbour::Neighbour;
use super::platter::{Cut, Platter};
use super::record::Record;
use super::recorder::{Recorder, format};
use super::story::{Seen, Story};
use super::subject::Subject;
use super::tally::Tally;
use crate::image::Random;
use crate::mount::Kind;
use crate::namespace::apart;
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
                cuts: seed.wrapping_add(1),
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
            record.materialise(cut, &directory.join("cut"));
            record.materialise(cut, &ground.image());
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
        let disk = ground.disk();
        let old = self.subject.overwrites().then_some(disk.as_path());
        Story::lay_out(seed, &ground.source(), old)
    }

    fn record_run(&self, ground: &Ground, seed: u64) -> Record {
        let act = |recorder: &Recorder| {
            // Without one nothing else brings the file system's journal to the disk, which would
            // hide a sync that is missing; with one few writes wait for a flush.
            let _neighbour = (seed & 1 == 0).then(|| Neighbour::start(&ground.mount_point(), seed));
            let (source, disk) = (ground.source(), ground.disk());
            self.subject.replace(&ground.controller, &source, &disk);
            recorder.entries()
        };
        self.record(ground, seed, (format!("{seed}"), seed), act)
    }

    /// Records the recovery from a cut.
    fn record_recovery(&self, ground: &Ground, story: &Story, from: &Record, cut: Cut) -> Record {
        from.materialise(cut, &ground.image());
        let act = |recorder: &Recorder| {
            self.subject.recover(&ground.controller, &ground.disk());
            match story.seen(&ground.disk()) {
                _ if cut.at >= from.promised => 0,
                Seen::New => recorder.entries(),
                _ => usize::MAX,
            }
        };
        let name = format!("{}-{}", from.name, cut.seed);
        self.record(ground, from.seed, (name, cut.seed), act)
    }

    /// Records what is done on the image, which gives after how many entries the new version is
    /// promised.
    fn record(
        &self,
        ground: &Ground,
        seed: u64,
        (name, cuts): (String, u64),
        act: impl FnOnce(&Recorder) -> usize,
    ) -> Record {
        let before = Platter::of_image(&ground.image());
        let recorder = Recorder::start(self.kind, &ground.image(), &ground.mount_point());
        let state = ground.bind_state();
        let promised = act(&recorder);
        drop(state);
        let log = recorder.stop();
        before.assert_leads_to(&log, &ground.image());
        Record {
            name,
            seed,
            before,
            log,
            cuts,
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
        let mut random = Random::new(record.cuts);
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
        // A recovery that fails, and a file system that does not mount, is counted and kept as well.
        let looked = catch_unwind(AssertUnwindSafe(|| {
            let mut image = Image::mount(self.subject, ground, story, &mut wrong);
            let has_left = image.has_left_something();
            let found = image.find(cut.at >= record.promised);
            tally.found.add(&found);
            tally.recovered.add(&image.recover(&found));
            if tally.cuts.is_multiple_of(self.again_every) {
                tally.again.add(&image.run_again());
            }
            has_left || found == Seen::Absent
        }));
        tally.cuts += 1;
        let is_worth = looked.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            wrong.push(text.unwrap_or("a panic").to_owned());
            false
        });
        let place = record.place(cut);
        let failures = wrong.iter().map(|wrong| format!("{place}: {wrong}"));
        tally.failures.extend(failures);
        is_worth
    }
}
