//! A disk's own holes and data, as they become known.

use std::collections::VecDeque;

use crate::units::BlockRun;

/// Whether blocks occupy space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Reads as zeros and occupies no space.
    Hole,
    /// Has to be read.
    Data,
}

/// Consecutive blocks of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapRun {
    /// Holes or data.
    pub kind: RunKind,
    /// How many blocks, at least one.
    pub count: u64,
}

/// The runs between what has been planned and what has been mapped.
#[derive(Debug)]
pub(super) struct Runs {
    queue: VecDeque<MapRun>,
    /// First block of the front of the queue.
    at: u64,
    /// First block that has not been mapped.
    mapped: u64,
    total: u64,
    asked: bool,
}

impl Runs {
    pub(super) fn new(total: u64) -> Self {
        Self {
            queue: VecDeque::new(),
            at: 0,
            mapped: 0,
            total,
            asked: false,
        }
    }

    /// Where to map from, if the queue has run dry; asks once.
    pub(super) fn wanted(&mut self) -> Option<u64> {
        let wanted = self.queue.is_empty() && !self.asked && self.mapped < self.total;
        self.asked |= wanted;
        wanted.then_some(self.mapped)
    }

    /// Adds runs that follow what has been mapped.
    pub(super) fn extend(&mut self, runs: &[MapRun]) {
        self.asked = false;
        self.mapped += runs.iter().map(|run| run.count).sum::<u64>();
        debug_assert!(
            self.mapped <= self.total,
            "a disk mapped past the end of the session"
        );
        self.queue.extend(runs);
    }

    pub(super) fn front(&self) -> Option<MapRun> {
        self.queue.front().copied()
    }

    /// Takes `count` blocks off the front run.
    pub(super) fn take(&mut self, count: u64) -> BlockRun {
        let taken = BlockRun {
            first: self.at,
            count,
        };
        self.at += count;
        if let Some(front) = self.queue.front_mut() {
            debug_assert!(count <= front.count, "took more than the front run");
            front.count -= count;
            if front.count == 0 {
                self.queue.pop_front();
            }
        }
        taken
    }

    pub(super) fn all_taken(&self) -> bool {
        self.at == self.total
    }
}
