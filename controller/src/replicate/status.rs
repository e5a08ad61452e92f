//! How old the newest points are, against what was promised.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::keep::newest;
use super::policy::Policy;
use super::run::{Found, find};
use super::scheduler::Job;
use crate::error::Result;
use crate::history::{Filter, History, Record};
use crate::libvirt::Hypervisor;
use crate::transfer::Context;
use crate::vm::doubt::{self, Doubt};
use crate::vm::point::Point;
use crate::vm::{failover, pause, replica};

/// How many of the newest runs are looked at for the last of each VM.
const RUNS: u32 = 20_000;

/// Whether a promise is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The newest point is younger than that.
    Kept,
    /// It is older.
    Late,
    /// There is none.
    None,
    /// The source does not have the VM any more.
    Gone,
    /// The VM runs from the replica.
    Live,
    /// It is older, and the policy is paused.
    Paused,
    /// The newest point is so unlike the one before that no older one goes.
    Doubtful,
}

impl State {
    /// Whether nobody has to do anything.
    pub fn is_well(self) -> bool {
        matches!(self, Self::Kept | Self::Live)
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Late => "late",
            Self::None => "none",
            Self::Gone => "gone",
            Self::Live => "live",
            Self::Paused => "paused",
            Self::Doubtful => "doubtful",
        }
    }
}

/// One VM.
#[derive(Debug, Serialize)]
pub struct VmStatus {
    /// The policy.
    pub policy: String,
    /// The VM.
    pub vm: String,
    /// Whether the promise is kept.
    pub state: State,
    /// From the instant of the newest point until now, in seconds.
    pub age_seconds: Option<i64>,
    /// How old that may be.
    pub rpo_seconds: i64,
    /// When the next one is due; `None` for one that is live, gone or paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_run: Option<Timestamp>,
    /// The last run, as far as the history of this machine knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_run: Option<LastRun>,
    /// Why no point goes until somebody has looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doubt: Option<Doubt>,
    /// Its points, from the oldest on.
    pub points: Vec<Point>,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastRun {
    /// When it began, RFC 3339.
    pub began_at: String,
    /// Whether it has made a point.
    pub success: bool,
    /// From its beginning to its end.
    pub duration_seconds: Option<f64>,
    /// Bytes carried between the agents.
    pub bytes_wire: Option<u64>,
    /// Why it has made none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl LastRun {
    fn read(record: &Record) -> Self {
        let result = record.result.clone().unwrap_or_default();
        Self {
            began_at: record.began_at.clone(),
            success: record.success == Some(true),
            duration_seconds: result["duration_seconds"].as_f64(),
            bytes_wire: result["bytes_wire"].as_u64(),
            error: result["error"]["message"].as_str().map(str::to_owned),
        }
    }
}

/// The last runs that have ended.
pub type LastRuns = BTreeMap<Job, LastRun>;

/// Looks for the last runs of all policies in the history of this user.
///
/// # Errors
/// When it cannot be read.
pub fn last_runs() -> Result<LastRuns> {
    let filter = Filter {
        limit: RUNS,
        operation: Some("replicate"),
        ..Filter::default()
    };
    let mut last = BTreeMap::new();
    for record in History::open()?.list(&filter)? {
        let policy = record
            .result
            .as_ref()
            .and_then(|result| result["policy"].as_str());
        if let (Some(policy), Some(vm)) = (policy, &record.vm) {
            let job = Job {
                policy: policy.to_owned(),
                vm: vm.clone(),
            };
            last.entry(job).or_insert_with(|| LastRun::read(&record));
        }
    }
    Ok(last)
}

/// Looks at all VMs of a policy.
///
/// # Errors
/// When the destination cannot be asked. A source that cannot be is a warning: its replicas are
/// told of all the same.
pub async fn status(
    context: &Context,
    connect: &str,
    policy: &Policy,
    last: &LastRuns,
    warnings: &mut Vec<String>,
) -> Result<Vec<VmStatus>> {
    let source = Hypervisor::new(context.host(&policy.source), connect);
    let destination = context.host(&policy.destination);
    destination.share().await?;
    let found = match find(&source, &destination, policy).await {
        Ok(found) => found,
        Err(error) => {
            warnings.push(format!(
                "{}: which VMs there are on {} is not known: {}",
                policy.name,
                policy.source,
                error.one_line()
            ));
            Found {
                vms: replica::names(&destination, &policy.place()).await?,
                gone: Vec::new(),
            }
        }
    };
    let on = Hypervisor::new(destination.clone(), connect);
    let is_paused = pause::paused(&on, &policy.place()).await?.is_some();
    let mut all = Vec::new();
    let vms = found.vms.iter().map(|vm| (vm, false));
    for (vm, is_gone) in vms.chain(found.gone.iter().map(|vm| (vm, true))) {
        let listed = replica::points(&destination, &policy.directory_of(vm)).await?;
        let now = Timestamp::now();
        let role = failover::role(&on, &policy.directory_of(vm)).await?;
        let newest = newest(listed.instants(), now);
        let age = newest.map(|instant| now.duration_since(instant));
        let doubt = doubt::doubt(&on, &policy.directory_of(vm)).await?;
        let state = match (role, state(age, policy.rpo, is_gone)) {
            (Some(_), _) => State::Live,
            (None, State::Late) if is_paused => State::Paused,
            (None, State::Kept) if doubt.is_some() => State::Doubtful,
            (None, state) => state,
        };
        let due = newest.map_or(Some(now), |newest| policy.schedule.after(newest));
        let is_run = !is_paused && !matches!(state, State::Live | State::Gone);
        warnings.extend(listed.strange);
        let job = Job {
            policy: policy.name.clone(),
            vm: vm.clone(),
        };
        all.push(VmStatus {
            last_run: last.get(&job).cloned(),
            policy: job.policy,
            vm: job.vm,
            state,
            age_seconds: age.map(|age| age.as_secs()),
            rpo_seconds: policy.rpo.as_secs(),
            doubt,
            next_run: due.filter(|_| is_run),
            points: listed.points,
        });
    }
    Ok(all)
}

fn state(age: Option<SignedDuration>, rpo: SignedDuration, is_gone: bool) -> State {
    match age {
        _ if is_gone => State::Gone,
        None => State::None,
        Some(age) if age <= rpo => State::Kept,
        Some(_) => State::Late,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_kept_up_to_its_last_second() {
        let seconds = SignedDuration::from_secs;
        let of = |age: Option<i64>, is_gone| state(age.map(seconds), seconds(60), is_gone);
        assert_eq!(of(Some(60), false), State::Kept);
        assert_eq!(of(Some(61), false), State::Late);
        assert_eq!(of(None, false), State::None);
        assert_eq!(of(Some(1), true), State::Gone);
    }
}
