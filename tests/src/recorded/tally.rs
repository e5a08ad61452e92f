//! What power cuts have left, counted.

use std::fmt;
use std::ops::AddAssign;
use std::path::PathBuf;

use super::story::Seen;

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

impl Counts {
    pub(super) fn add(&mut self, seen: &Seen) {
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
