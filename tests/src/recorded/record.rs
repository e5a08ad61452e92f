//! A run that was recorded: where it began, what its disk was told, and what was promised.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::log::Log;
use super::platter::{Cut, Platter};

/// A run, recorded.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) name: String,
    /// Of its story.
    pub(super) seed: u64,
    /// From which its cuts are drawn.
    pub(super) cuts: u64,
    pub(super) before: Platter,
    pub(super) log: Log,
    /// After so many entries the new version was promised.
    pub(super) promised: usize,
}

impl Record {
    /// Makes a file hold what the disk holds after a cut.
    pub(super) fn materialise(&self, cut: Cut, path: &Path) {
        let mut platter = self.before.clone();
        platter.advance(&self.log, cut);
        platter.materialise(cut, path);
    }

    /// Where a cut is, for a message.
    pub(super) fn place(&self, cut: Cut) -> String {
        let (name, entries) = (&self.name, self.log.entries().len());
        let promise = match self.promised {
            usize::MAX => "no promise".to_owned(),
            promised => format!("promised at {promised}"),
        };
        let Cut { seed, at } = cut;
        format!("run {name}, cut {seed} (at {at} of {entries}, {promise})")
    }

    /// Leaves it in a directory.
    pub(super) fn keep(&self, directory: &Path, failures: &[String]) {
        let kept = |result: std::io::Result<()>| {
            result.unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        };
        kept(fs::create_dir_all(directory));
        let nothing = Cut { seed: 0, at: 0 };
        self.before.materialise(nothing, &directory.join("before"));
        kept(fs::write(directory.join("log"), self.log.bytes()));
        let facts = json!({ "name": self.name, "seed": self.seed, "promised": self.promised });
        kept(fs::write(directory.join("record.json"), facts.to_string()));
        kept(fs::write(directory.join("failures"), failures.join("\n")));
    }

    /// What was left in a directory, and the cut of a seed.
    pub(super) fn kept(directory: &Path, cut_seed: u64) -> (Self, Cut) {
        let facts = directory.join("record.json");
        let facts = fs::read(&facts).unwrap_or_else(|error| panic!("{}: {error}", facts.display()));
        let facts: Value = serde_json::from_slice(&facts).expect("a record is JSON");
        let number = |field: &str| facts[field].as_u64().expect("a record holds numbers");
        let record = Self {
            name: facts["name"].as_str().unwrap_or_default().to_owned(),
            seed: number("seed"),
            before: Platter::of_image(&directory.join("before")),
            log: Log::read(&directory.join("log")),
            cuts: cut_seed,
            promised: usize::try_from(number("promised")).expect("it was a count"),
        };
        let cut = Cut::draw(cut_seed, record.log.entries().len());
        (record, cut)
    }
}
