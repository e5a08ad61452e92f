//! Alarms: what is wrong with a VM's replica, told once, again after a while as long as it stays so,
//! when it gets worse, and when it is over. They are kept, so that a daemon that starts again does
//! not tell of what was told.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::scheduler::Job;
use crate::error::Result;
use crate::store::Store;

/// What is wrong, from the lightest on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A run has made no point.
    Failed,
    /// The source does not have the VM any more.
    Gone,
    /// The newest point is older than was promised.
    Late,
    /// The newest point is so unlike the one before that no older one goes.
    Doubtful,
    /// The VM runs at its source and from its replica.
    SplitBrain,
}

/// What is wrong with a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Of which kind.
    pub kind: Kind,
    /// For people.
    pub message: String,
}

/// Why somebody is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// It was well before.
    Raised,
    /// It was less wrong before.
    Worse,
    /// It is as it was for a while.
    Still,
    /// It is well again.
    Over,
}

/// What somebody is told: the JSON that a command and a webhook get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Notice {
    /// Why.
    pub event: Event,
    /// What is wrong, or was.
    pub kind: Kind,
    /// The policy.
    pub policy: String,
    /// The VM; empty when the VMs of the policy are not known.
    pub vm: String,
    /// For people.
    pub message: String,
    /// Since when.
    pub raised_at: Timestamp,
}

/// An alarm that is not over.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Raised {
    kind: Kind,
    message: String,
    raised_at: Timestamp,
    told_at: Timestamp,
}

/// The alarms that are not over.
#[derive(Debug)]
pub struct Alarms {
    store: Store,
    raised: BTreeMap<Job, Raised>,
    /// Of whom the store does not know yet what is so.
    unsaved: BTreeSet<Job>,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::Failed,
        Self::Gone,
        Self::Late,
        Self::Doubtful,
        Self::SplitBrain,
    ];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Gone => "gone",
            Self::Late => "late",
            Self::Doubtful => "doubtful",
            Self::SplitBrain => "split-brain",
        }
    }
}

impl Event {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raised => "raised",
            Self::Worse => "worse",
            Self::Still => "still",
            Self::Over => "over",
        }
    }
}

impl Alarms {
    /// Those that an earlier daemon has raised, and that are not over.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn of(store: Store) -> Result<Self> {
        let sql = "SELECT policy, vm, kind, message, raised_at, told_at FROM alarm";
        let rows = store.rows(sql, [], |row| {
            let job = Job {
                policy: row.get(0)?,
                vm: row.get(1)?,
            };
            let [kind, message, raised_at, told_at]: [String; 4] =
                [row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?];
            Ok((job, kind, message, raised_at, told_at))
        })?;
        // What is not understood was written by somebody else, and is raised anew if it is so.
        let raised = rows
            .into_iter()
            .filter_map(|(job, kind, message, raised_at, told_at)| {
                let raised = Raised {
                    kind: Kind::ALL.into_iter().find(|known| known.name() == kind)?,
                    message,
                    raised_at: raised_at.parse().ok()?,
                    told_at: told_at.parse().ok()?,
                };
                Some((job, raised))
            });
        let raised = raised.collect();
        Ok(Self {
            store,
            raised,
            unsaved: BTreeSet::new(),
        })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.raised.is_empty()
    }

    /// Those whom there is something wrong with.
    pub fn jobs(&self) -> Vec<Job> {
        self.raised.keys().cloned().collect()
    }

    /// What is wrong with a VM now, if anything is; gives back what is to be told of that.
    pub fn judge(
        &mut self,
        job: &Job,
        problem: Option<&Problem>,
        now: Timestamp,
        repeat: SignedDuration,
    ) -> Option<Notice> {
        let (event, after) = judge(self.raised.get(job), problem, now, repeat)?;
        let notice = Notice {
            event,
            kind: after.kind,
            policy: job.policy.clone(),
            vm: job.vm.clone(),
            message: after.message.clone(),
            raised_at: after.raised_at,
        };
        match event {
            Event::Over => self.raised.remove(job),
            Event::Raised | Event::Worse | Event::Still => self.raised.insert(job.clone(), after),
        };
        self.unsaved.insert(job.clone());
        Some(notice)
    }

    /// Keeps what has changed for a daemon that comes after this one.
    ///
    /// # Errors
    /// When it cannot be written; the next call tries again.
    pub fn save(&mut self) -> Result<()> {
        while let Some(job) = self.unsaved.first() {
            let Job { policy, vm } = job;
            match self.raised.get(job) {
                None => {
                    let sql = "DELETE FROM alarm WHERE policy = ? AND vm = ?";
                    self.store.change(sql, (policy, vm))?;
                }
                Some(raised) => {
                    let sql = "INSERT INTO alarm (policy, vm, kind, message, raised_at, told_at)
                               VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                               ON CONFLICT (policy, vm) DO UPDATE
                               SET kind = ?3, message = ?4, raised_at = ?5, told_at = ?6";
                    let [raised_at, told_at] =
                        [raised.raised_at, raised.told_at].map(|time| time.to_string());
                    let kind = raised.kind.name();
                    let values = (policy, vm, kind, &raised.message, raised_at, told_at);
                    self.store.change(sql, values)?;
                }
            }
            self.unsaved.pop_first();
        }
        Ok(())
    }
}

/// What is told, and what holds after it; `None` when nothing is.
fn judge(
    before: Option<&Raised>,
    problem: Option<&Problem>,
    now: Timestamp,
    repeat: SignedDuration,
) -> Option<(Event, Raised)> {
    let (event, problem) = match (before, problem) {
        (None, None) => return None,
        (None, Some(problem)) => (Event::Raised, problem),
        (Some(before), None) => return Some((Event::Over, before.clone())),
        (Some(before), Some(problem)) if problem.kind > before.kind => (Event::Worse, problem),
        (Some(before), Some(problem)) => {
            // A clock that was put back lets nobody wait for ever.
            let told = now.duration_since(before.told_at).abs();
            if told < repeat {
                return None;
            }
            (Event::Still, problem)
        }
    };
    let after = Raised {
        kind: problem
            .kind
            .max(before.map_or(problem.kind, |before| before.kind)),
        message: problem.message.clone(),
        raised_at: before.map_or(now, |before| before.raised_at),
        told_at: now,
    };
    Some((event, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPEAT: SignedDuration = SignedDuration::from_mins(10);

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn an_incident_is_told_once_when_it_gets_worse_after_a_while_and_when_it_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("history.db");
        let mut alarms = Alarms::of(Store::at(&path).unwrap()).unwrap();
        let job = Job {
            policy: "shop".to_owned(),
            vm: "web".to_owned(),
        };
        let is = |kind| {
            let message = "no luck".to_owned();
            Some(Problem { kind, message })
        };
        let (failed, late) = (is(Kind::Failed), is(Kind::Late));
        let steps = [
            (0, None, None),
            (10, failed.clone(), Some(Event::Raised)),
            (20, failed.clone(), None),
            (30, late, Some(Event::Worse)),
            // What is late and fails is not less late.
            (40, failed.clone(), None),
            (629, failed.clone(), None),
            (630, failed.clone(), Some(Event::Still)),
            (640, None, Some(Event::Over)),
            (650, None, None),
            (660, failed, Some(Event::Raised)),
        ];
        for (second, problem, told) in steps {
            let judged = alarms.judge(&job, problem.as_ref(), at(second), REPEAT);
            let event = judged.map(|notice| notice.event);
            assert_eq!(event, told, "at {second}");
            alarms.save().unwrap();
            // As if the daemon were another one each time.
            alarms = Alarms::of(Store::at(&path).unwrap()).unwrap();
        }
        assert_eq!(alarms.jobs(), [job]);
    }
}
