//! The figures of every single run, and the medians of those that belong together.

use std::fmt::Display;

use anyhow::Result;

use crate::lab::Outcome;
use crate::say;

/// One number of a run, as a column shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Figure {
    Wall,
    Cpu,
    Peak,
    Wire,
    Allocated,
}

impl Figure {
    /// The head of its column, with the unit.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Wall => "wall s",
            Self::Cpu => "CPU s",
            Self::Peak => "peak RSS MiB",
            Self::Wire => "wire MB",
            Self::Allocated => "on disk MiB",
        }
    }

    fn decimals(self) -> usize {
        match self {
            Self::Wall | Self::Cpu => 2,
            Self::Wire => 1,
            Self::Peak | Self::Allocated => 0,
        }
    }

    fn of(self, outcome: &Outcome) -> Option<f64> {
        let figures = &outcome.figures;
        match self {
            Self::Wall => Some(figures.wall_seconds),
            Self::Cpu => Some(figures.cpu_seconds),
            Self::Peak => Some(figures.peak_kib? as f64 / 1024.0),
            Self::Wire => Some(figures.wire_bytes as f64 / 1e6),
            Self::Allocated => Some(outcome.allocated_bytes? as f64 / 1_048_576.0),
        }
    }
}

/// What tells one measurement from another; its text is for people.
pub(crate) trait Key: Clone + PartialEq + Display {
    /// The names of its fields.
    const FIELDS: &'static str;

    /// Its fields, none with a comma in it.
    fn fields(&self) -> String;

    /// What it has in common with those that blocksync does alike.
    fn kind(&self) -> String;
}

/// All runs of one command of the bench.
#[derive(Debug)]
pub(crate) struct Samples<K> {
    runs: Vec<(K, u32, Outcome)>,
    notes: Vec<String>,
    failed: bool,
}

impl<K: Key> Samples<K> {
    pub(crate) fn new() -> Self {
        Self {
            runs: Vec::new(),
            notes: Vec::new(),
            failed: false,
        }
    }

    /// Measures as often as was asked for.
    pub(crate) fn take(&mut self, key: &K, runs: u32, measure: impl Fn() -> Result<Outcome>) {
        for run in 1..=runs {
            say(&format!("{key}, run {run} of {runs}"));
            self.add(key, run, measure());
        }
    }

    /// Takes a run in; one that failed becomes a note and makes the samples invalid.
    fn add(&mut self, key: &K, run: u32, outcome: Result<Outcome>) {
        match outcome {
            Ok(outcome) => {
                self.runs.push((key.clone(), run, outcome));
            }
            Err(error) => {
                self.failed = true;
                self.note(format!("FAILED: {key}, run {run}: {error:#}"));
            }
        }
    }

    /// Something that readers of the tables must know.
    pub(crate) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// What readers must know, and what blocksync says of its runs.
    pub(crate) fn notes(&self) -> Vec<String> {
        let said = self.said();
        let alike = said.len() == 1;
        let said = said.into_iter().map(|(what, kinds)| match alike {
            true => format!("blocksync, always: {what}"),
            false => format!("{what}: {}", kinds.join("; ")),
        });
        self.notes.iter().cloned().chain(said).collect()
    }

    /// What blocksync says, and of which kinds of measurements.
    fn said(&self) -> Vec<(String, Vec<String>)> {
        let mut said: Vec<(String, Vec<String>)> = Vec::new();
        for (key, _, outcome) in &self.runs {
            let (Some(sync), kind) = (&outcome.sync, key.kind()) else {
                continue;
            };
            let what = sync.to_string();
            match said.iter_mut().find(|(known, _)| *known == what) {
                Some((_, kinds)) if kinds.contains(&kind) => {}
                Some((_, kinds)) => kinds.push(kind),
                None => said.push((what, vec![kind])),
            }
        }
        said
    }

    /// Whether every run ended well, with a result equal to its source.
    pub(crate) fn all_valid(&self) -> bool {
        !self.failed
    }

    /// The measurements, in the order in which they were taken.
    pub(crate) fn keys(&self) -> Vec<K> {
        let mut keys: Vec<K> = self.runs.iter().map(|(key, ..)| key.clone()).collect();
        keys.dedup();
        keys
    }

    pub(crate) fn median(&self, key: &K, figure: Figure) -> Option<f64> {
        let runs = self.runs.iter().filter(|(of, ..)| of == key);
        median(
            runs.filter_map(|(.., outcome)| figure.of(outcome))
                .collect(),
        )
    }

    /// How many times as long as another measurement one took.
    pub(crate) fn ratio(&self, key: &K, yardstick: &K) -> Option<f64> {
        Some(self.median(key, Figure::Wall)? / self.median(yardstick, Figure::Wall)?)
    }

    /// The median as a table shows it.
    pub(crate) fn cell(&self, key: &K, figure: Figure) -> String {
        cell(self.median(key, figure), figure.decimals())
    }

    /// Every single run.
    pub(crate) fn csv(&self) -> String {
        let fields = K::FIELDS;
        let head = format!(
            "{fields},run,wall_seconds,cpu_seconds,peak_rss_kib,wire_bytes,allocated_bytes\n"
        );
        let lines = self.runs.iter().map(|(key, run, outcome)| {
            let figures = &outcome.figures;
            format!(
                "{},{run},{:.4},{:.2},{},{},{}\n",
                key.fields(),
                figures.wall_seconds,
                figures.cpu_seconds,
                or_nothing(figures.peak_kib),
                figures.wire_bytes,
                or_nothing(outcome.allocated_bytes),
            )
        });
        std::iter::once(head).chain(lines).collect()
    }
}

fn or_nothing(value: Option<u64>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// A number in a table; a dash where there is none.
pub(crate) fn cell(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.decimals$}"))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        Some((values.get(middle.checked_sub(1)?)? + values.get(middle)?) / 2.0)
    } else {
        values.get(middle).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Figures;

    impl Key for &'static str {
        const FIELDS: &'static str = "name";

        fn fields(&self) -> String {
            (*self).to_owned()
        }

        fn kind(&self) -> String {
            (*self).to_owned()
        }
    }

    fn outcome(wall_seconds: f64) -> Outcome {
        Outcome {
            figures: Figures {
                wall_seconds,
                cpu_seconds: 1.0,
                wire_bytes: 2_000_000,
                peak_kib: None,
            },
            allocated_bytes: Some(3 << 20),
            sync: None,
        }
    }

    #[test]
    fn medians_and_ratios_are_of_what_belongs_together() {
        let mut samples = Samples::new();
        for (run, wall) in [(1, 4.0), (2, 9.0), (3, 6.0)] {
            samples.add(&"quick", run, Ok(outcome(wall / 3.0)));
        }
        for (run, wall) in [(1, 4.0), (2, 9.0), (3, 6.0)] {
            samples.add(&"slow", run, Ok(outcome(wall)));
        }
        assert_eq!(samples.keys(), ["quick", "slow"]);
        assert_eq!(samples.ratio(&"slow", &"quick"), Some(3.0));
        assert_eq!(samples.cell(&"slow", Figure::Wall), "6.00");
        assert_eq!(samples.cell(&"slow", Figure::Wire), "2.0");
        assert_eq!(samples.cell(&"slow", Figure::Peak), "–");
        assert!(samples.all_valid());
        assert_eq!(samples.csv().lines().count(), 7);
        assert!(
            samples
                .csv()
                .ends_with("slow,3,6.0000,1.00,,2000000,3145728\n")
        );
    }

    #[test]
    fn a_failed_run_is_said_and_makes_the_samples_invalid() {
        let mut samples = Samples::new();
        samples.add(&"scp", 1, Err(anyhow::anyhow!("no luck")));
        assert!(!samples.all_valid());
        assert_eq!(samples.notes(), ["FAILED: scp, run 1: no luck"]);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }
}
