//! Which VMs get a point next: a queue that reads no clock and reaches no host, so that thirty days
//! of two thousand VMs can be played to it in seconds. The daemon tells it what has come about, and
//! starts what it says.
//!
//! ```text
//!  found ─► coming ── its time has come ─► ready ── hosts have room ─► running ─► ended
//!              ▲                                                                   │
//!              └───────────────── the next time, or later after a failure ─────────┘
//! ```
//!
//! Of those that are ready the one whose promise breaks first goes first. It waits with the promise
//! that it has, while each one that ran gets a later one: so nobody waits for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::policy::{Limits, Policy};
use super::schedule::Schedule;

/// How long a VM that failed once is left alone; twice as long each time that it fails again.
const FIRST_PAUSE: SignedDuration = SignedDuration::from_secs(10);

/// The longest such pause.
const LONGEST_PAUSE: SignedDuration = SignedDuration::from_mins(15);

/// How long one is left alone that needs no point now, or that somebody else is at.
const LOOK_AGAIN: SignedDuration = SignedDuration::from_mins(1);

/// By how much VMs that are due together are spread, at most.
const SPREAD: SignedDuration = SignedDuration::from_secs(60);

/// A VM of a policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job {
    /// The policy's name.
    pub policy: String,
    /// The VM's.
    pub vm: String,
}

/// How a run of a job has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// There is a point of this instant.
    Made(Timestamp),
    /// There is none, and that is right: the replica is live, or another controller is at it.
    NotNow,
    /// There is none.
    Failed,
}

/// A policy, and what its jobs are counted by.
#[derive(Debug)]
struct Rules {
    policy: Arc<Policy>,
    hosts: [String; 2],
    link: String,
}

/// What is known of a job.
#[derive(Debug)]
struct State {
    policy: Arc<Policy>,
    /// The instant of its newest point.
    newest: Option<Timestamp>,
    /// Since when it is known.
    since: Timestamp,
    /// Where it is among those that are spread, of 65,536.
    place: i32,
    /// Failures since it last went well.
    failures: u32,
    stage: Stage,
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its time comes then.
    Coming(Timestamp),
    /// It waits for its hosts; its promise breaks then.
    Ready(Timestamp),
    Running,
    /// It runs, and nobody wants it any more.
    Leaving,
}

/// The queue.
#[derive(Debug, Default)]
pub struct Scheduler {
    policies: BTreeMap<String, Rules>,
    limits: Limits,
    jobs: BTreeMap<Job, State>,
    coming: BTreeSet<(Timestamp, Job)>,
    /// By policy.
    ready: BTreeMap<String, BTreeSet<(Timestamp, Job)>>,
    /// Jobs that run, by policy, by host, and by link.
    of_policy: BTreeMap<String, usize>,
    of_host: BTreeMap<String, usize>,
    of_link: BTreeMap<String, usize>,
}

impl Scheduler {
    /// These are the policies from now on. Jobs of others go; what runs is waited for.
    pub fn set(&mut self, policies: &[Policy], limits: Limits) {
        let policies = policies.iter().cloned();
        self.policies = policies
            .map(|policy| (policy.name.clone(), Rules::of(Arc::new(policy))))
            .collect();
        self.limits = limits;
        let all: Vec<Job> = self.jobs.keys().cloned().collect();
        for job in all {
            match self.policies.get(&job.policy) {
                None => self.leave(&job),
                Some(rules) => {
                    let policy = Arc::clone(&rules.policy);
                    if let Some(state) = self.jobs.get_mut(&job) {
                        state.policy = policy;
                    }
                    self.plan(&job, None);
                }
            }
        }
    }

    /// These are the VMs of a policy now, each with the instant of its newest point.
    pub fn found(&mut self, policy: &str, vms: &[(String, Option<Timestamp>)], now: Timestamp) {
        let Some(rules) = self.policies.get(policy) else {
            return;
        };
        let policy = Arc::clone(&rules.policy);
        let gone: Vec<Job> = self
            .jobs
            .keys()
            .filter(|job| job.policy == policy.name)
            .filter(|job| !vms.iter().any(|(vm, _)| *vm == job.vm))
            .cloned()
            .collect();
        for job in gone {
            self.leave(&job);
        }
        for (vm, newest) in vms {
            let job = Job {
                policy: policy.name.clone(),
                vm: vm.clone(),
            };
            match self.jobs.get_mut(&job) {
                None => {
                    let state = State {
                        policy: Arc::clone(&policy),
                        newest: *newest,
                        since: now,
                        place: place(&job),
                        failures: 0,
                        stage: Stage::Coming(now),
                    };
                    self.coming.insert((now, job.clone()));
                    self.jobs.insert(job.clone(), state);
                    self.plan(&job, None);
                }
                Some(state) => {
                    if state.stage == Stage::Leaving {
                        state.stage = Stage::Running;
                    }
                    // Another controller may have made one, or somebody removed it.
                    if state.newest != *newest && !state.is_running() {
                        state.newest = *newest;
                        self.plan(&job, None);
                    }
                }
            }
        }
    }

    /// The jobs that begin now; each is to be told of by [`Scheduler::ended`].
    pub fn start(&mut self, now: Timestamp) -> Vec<(Job, Arc<Policy>)> {
        while let Some((time, job)) = self
            .coming
            .first()
            .filter(|(time, _)| *time <= now)
            .cloned()
        {
            self.coming.remove(&(time, job.clone()));
            let Some(state) = self.jobs.get_mut(&job) else {
                continue;
            };
            if state.policy.is_quiet(now) {
                // Windows begin and end with a minute.
                let again = now.saturating_add(LOOK_AGAIN).unwrap_or(now);
                state.stage = Stage::Coming(again);
                self.coming.insert((again, job));
                continue;
            }
            let deadline = state.deadline();
            state.stage = Stage::Ready(deadline);
            let ready = self.ready.entry(job.policy.clone()).or_default();
            ready.insert((deadline, job));
        }
        let mut starting = Vec::new();
        while let Some((deadline, job)) = self.first_with_room() {
            self.no_longer_ready(deadline, &job);
            let Some(state) = self.jobs.get_mut(&job) else {
                continue;
            };
            state.stage = Stage::Running;
            let policy = Arc::clone(&state.policy);
            self.count(&policy, |running| running + 1);
            starting.push((job, policy));
        }
        starting
    }

    /// A job that was started has ended. `policy` is the one that it was started with.
    pub fn ended(&mut self, job: &Job, policy: &Arc<Policy>, how: Ended, now: Timestamp) {
        self.count(policy, |running| running.saturating_sub(1));
        let Some(state) = self.jobs.get_mut(job) else {
            return;
        };
        if state.stage == Stage::Leaving {
            self.jobs.remove(job);
            return;
        }
        let pause = match how {
            Ended::Made(instant) => {
                state.newest = Some(instant);
                state.failures = 0;
                None
            }
            Ended::NotNow => {
                state.failures = 0;
                Some(LOOK_AGAIN)
            }
            Ended::Failed => {
                state.failures += 1;
                let doubled = 1 << (state.failures - 1).min(10);
                let pause = FIRST_PAUSE.checked_mul(doubled).unwrap_or(LONGEST_PAUSE);
                let spread = spread(state.place, FIRST_PAUSE);
                Some(pause.min(LONGEST_PAUSE).saturating_add(spread))
            }
        };
        state.stage = Stage::Coming(now);
        self.coming.insert((now, job.clone()));
        let not_before = pause.and_then(|pause| now.checked_add(pause).ok());
        self.plan(job, not_before);
    }

    /// When there may be something to start that there is not now.
    pub fn wake(&self) -> Option<Timestamp> {
        self.coming.first().map(|(time, _)| *time)
    }

    /// Jobs whose newest point is older than was promised, each with its age; of one that has none
    /// it counts since it is known.
    pub fn late(&self, now: Timestamp) -> impl Iterator<Item = (&Job, SignedDuration)> {
        self.jobs.iter().filter_map(move |(job, state)| {
            let age = now.duration_since(state.newest.unwrap_or(state.since));
            (age > state.policy.rpo).then_some((job, age))
        })
    }

    /// All jobs, each with its policy and the instant of its newest point.
    pub fn all(&self) -> impl Iterator<Item = (&Job, &Policy, Option<Timestamp>)> {
        let wanted = self.jobs.iter();
        let wanted = wanted.filter(|(_, state)| state.stage != Stage::Leaving);
        wanted.map(|(job, state)| (job, &*state.policy, state.newest))
    }

    /// How many run, and how many wait for a host.
    pub fn load(&self) -> (usize, usize) {
        let ready = self.ready.values().map(BTreeSet::len);
        (self.of_policy.values().sum(), ready.sum())
    }

    /// Puts a job that waits to where its times say, not before that one.
    fn plan(&mut self, job: &Job, not_before: Option<Timestamp>) {
        let Some(state) = self.jobs.get_mut(job) else {
            return;
        };
        match state.stage {
            Stage::Running | Stage::Leaving => return,
            Stage::Coming(time) => {
                self.coming.remove(&(time, job.clone()));
            }
            Stage::Ready(time) => self.no_longer_ready(time, job),
        }
        let Some(state) = self.jobs.get_mut(job) else {
            return;
        };
        let due = match state.newest {
            // One that has never run is due at once.
            None => state.since,
            Some(newest) => state
                .policy
                .schedule
                .after(newest)
                .unwrap_or(Timestamp::MAX),
        };
        let most = match state.policy.schedule {
            Schedule::Every(interval) => SPREAD.min(interval / 10),
            Schedule::Cron(..) => SPREAD / 2,
        };
        let due = due.saturating_add(spread(state.place, most)).unwrap_or(due);
        let time = not_before.map_or(due, |not_before| due.max(not_before));
        state.stage = Stage::Coming(time);
        self.coming.insert((time, job.clone()));
    }

    fn leave(&mut self, job: &Job) {
        let Some(state) = self.jobs.get_mut(job) else {
            return;
        };
        match state.stage {
            Stage::Running | Stage::Leaving => {
                state.stage = Stage::Leaving;
                return;
            }
            Stage::Coming(time) => {
                self.coming.remove(&(time, job.clone()));
            }
            Stage::Ready(time) => self.no_longer_ready(time, job),
        }
        self.jobs.remove(job);
    }

    fn no_longer_ready(&mut self, deadline: Timestamp, job: &Job) {
        if let Some(ready) = self.ready.get_mut(&job.policy) {
            ready.remove(&(deadline, job.clone()));
        }
    }

    /// Of the jobs whose hosts have room the one whose promise breaks first.
    fn first_with_room(&self) -> Option<(Timestamp, Job)> {
        let waiting = self.ready.iter().filter_map(|(policy, ready)| {
            let first = ready.first()?;
            Some((self.policies.get(policy)?, first))
        });
        let with_room = waiting.filter(|(rules, _)| self.has_room(rules));
        with_room.map(|(_, first)| first).min().cloned()
    }

    fn has_room(&self, rules: &Rules) -> bool {
        let running =
            |counts: &BTreeMap<String, usize>, of: &str| counts.get(of).copied().unwrap_or(0);
        running(&self.of_policy, &rules.policy.name) < rules.policy.parallel.get()
            && running(&self.of_link, &rules.link) < self.limits.link.get()
            && rules
                .hosts
                .iter()
                .all(|host| running(&self.of_host, host) < self.limits.host.get())
    }

    /// Counts a job that begins or ends; its policy may be gone by now.
    fn count(&mut self, policy: &Arc<Policy>, change: impl Fn(usize) -> usize) {
        let rules = Rules::of(Arc::clone(policy));
        let apply = |count: &mut usize| *count = change(*count);
        apply(self.of_policy.entry(policy.name.clone()).or_default());
        for host in rules.hosts {
            apply(self.of_host.entry(host).or_default());
        }
        apply(self.of_link.entry(rules.link).or_default());
    }
}

impl Rules {
    fn of(policy: Arc<Policy>) -> Self {
        let hosts = [&policy.source, &policy.destination].map(ToString::to_string);
        Self {
            link: hosts.join(" "),
            hosts,
            policy,
        }
    }
}

impl State {
    fn is_running(&self) -> bool {
        matches!(self.stage, Stage::Running | Stage::Leaving)
    }

    /// When its promise breaks.
    fn deadline(&self) -> Timestamp {
        let from = self.newest.unwrap_or(self.since);
        from.saturating_add(self.policy.rpo).unwrap_or(from)
    }
}

/// The same for the same job each time.
fn place(job: &Job) -> i32 {
    let hash = blake3::hash(format!("{}/{}", job.policy, job.vm).as_bytes());
    let [first, second, ..] = hash.as_bytes();
    i32::from(u16::from_le_bytes([*first, *second]))
}

/// The part of a duration that belongs to a place.
fn spread(place: i32, most: SignedDuration) -> SignedDuration {
    most.checked_mul(place).unwrap_or_default() / (i32::from(u16::MAX) + 1)
}

#[cfg(test)]
mod simulation;

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::replicate::policy;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn policies(text: &str) -> Vec<Policy> {
        policy::parse(text).unwrap().all
    }

    fn one(rest: &str) -> Vec<Policy> {
        policies(&format!(
            "[policy.shop]\nsource = \"a\"\ndestination = \"b\"\nvms = [\"*\"]\n{rest}"
        ))
    }

    fn scheduler(rest: &str) -> Scheduler {
        let mut scheduler = Scheduler::default();
        scheduler.set(&one(rest), Limits::default());
        scheduler
    }

    fn names(started: &[(Job, Arc<Policy>)]) -> Vec<&str> {
        started.iter().map(|(job, _)| job.vm.as_str()).collect()
    }

    fn vms<const N: usize>(vms: [(&str, Option<i64>); N]) -> Vec<(String, Option<Timestamp>)> {
        vms.map(|(vm, newest)| (vm.to_owned(), newest.map(at)))
            .to_vec()
    }

    const MINUTELY: &str = "every = \"1m\"\nrpo = \"5m\"\n";

    #[test]
    fn who_breaks_a_promise_first_goes_first_and_nobody_runs_twice() {
        let mut scheduler = scheduler(MINUTELY);
        let all = vms([
            ("old", Some(-200)),
            ("older", Some(-900)),
            ("new", Some(-30)),
        ]);
        scheduler.found("shop", &all, at(0));
        let started = scheduler.start(at(10));
        assert_eq!(names(&started), ["older"]);
        // Missed fifteen times, it is made up for once.
        scheduler.found("shop", &all, at(11));
        assert!(scheduler.start(at(11)).is_empty());
        let (job, policy) = &started[0];
        scheduler.ended(job, policy, Ended::Made(at(10)), at(20));
        assert_eq!(names(&scheduler.start(at(20))), ["old"]);
        let late: Vec<&str> = scheduler
            .late(at(205))
            .map(|(job, _)| job.vm.as_str())
            .collect();
        assert_eq!(late, ["old"]);
    }

    #[test]
    fn who_fails_is_left_alone_for_longer_and_longer_and_then_runs_as_before() {
        let mut scheduler = scheduler(MINUTELY);
        scheduler.found("shop", &vms([("web", None)]), at(0));
        let mut now = 10;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let started = scheduler.start(at(now));
            let (job, policy) = started.first().expect("it is its time");
            scheduler.ended(job, policy, Ended::Failed, at(now));
            let next = scheduler.wake().unwrap();
            pauses.push(next.duration_since(at(now)).as_secs());
            assert!(
                scheduler
                    .start(next - SignedDuration::from_millis(1))
                    .is_empty()
            );
            now = next.as_second() - at(0).as_second() + 1;
        }
        assert!(pauses[0] >= 10 && pauses[0] <= 20, "{pauses:?}");
        assert!(pauses.is_sorted() && pauses[8] <= 910, "{pauses:?}");
        let started = scheduler.start(at(now));
        let (job, policy) = &started[0];
        scheduler.ended(job, policy, Ended::Made(at(now)), at(now + 5));
        let next = scheduler.wake().unwrap().duration_since(at(now)).as_secs();
        assert!((60..=66).contains(&next), "{next}");
    }

    #[test]
    fn limits_hold_for_policy_link_and_host() {
        let text = |name: &str, from: &str, to: &str, parallel: usize| {
            format!(
                "[policy.{name}]\nsource = \"{from}\"\ndestination = \"{to}\"\nvms = [\"*\"]\n\
                 parallel = {parallel}\n{MINUTELY}"
            )
        };
        let all = [
            text("one", "a", "b", 2),
            text("two", "a", "b", 9),
            text("three", "a", "c", 9),
        ];
        let mut scheduler = Scheduler::default();
        let limits = Limits {
            host: NonZeroUsize::new(5).unwrap(),
            link: NonZeroUsize::new(3).unwrap(),
        };
        scheduler.set(&policies(&all.concat()), limits);
        let many: Vec<_> = (0..9).map(|at| (format!("vm{at}"), None)).collect();
        for policy in ["one", "two", "three"] {
            scheduler.found(policy, &many, at(0));
        }
        let started = scheduler.start(at(60));
        let of = |name: &str| started.iter().filter(|(job, _)| job.policy == name).count();
        assert!(of("one") <= 2 && of("one") + of("two") <= 3 && of("three") <= 3);
        assert_eq!(scheduler.load(), (5, 22));
    }

    #[test]
    fn what_is_no_longer_wanted_goes_and_what_runs_is_counted_until_it_has_ended() {
        let mut scheduler = scheduler(MINUTELY);
        scheduler.found("shop", &vms([("a", None), ("b", None)]), at(0));
        let started = scheduler.start(at(10));
        assert_eq!(started.len(), 1);
        scheduler.set(&[], Limits::default());
        assert_eq!(scheduler.load(), (1, 0));
        let (job, policy) = &started[0];
        scheduler.ended(job, policy, Ended::Failed, at(11));
        assert_eq!(scheduler.load(), (0, 0));
        assert_eq!(scheduler.wake(), None);
        // One that comes back while it runs is not started beside itself.
        scheduler.set(&one(MINUTELY), Limits::default());
        scheduler.found("shop", &vms([("a", None)]), at(20));
        let started = scheduler.start(at(30));
        scheduler.found("shop", &[], at(31));
        scheduler.found("shop", &vms([("a", None)]), at(32));
        assert!(scheduler.start(at(40)).is_empty());
        let (job, policy) = &started[0];
        scheduler.ended(job, policy, Ended::NotNow, at(41));
        let next = scheduler.wake().unwrap();
        assert_eq!(next, at(101));
    }

    #[test]
    fn in_a_window_nothing_begins() {
        // 1,800,000,000 is 08:00:00 in UTC, on a Friday.
        let window = "not-between = [{ from = \"08:00\", to = \"08:10\" }]\n";
        let mut scheduler = scheduler(&format!("{MINUTELY}{window}"));
        scheduler.found("shop", &vms([("web", Some(-600))]), at(0));
        let mut now = at(0);
        let mut started = Vec::new();
        while started.is_empty() {
            now = scheduler.wake().unwrap().max(now);
            started = scheduler.start(now);
        }
        let waited = now.duration_since(at(0)).as_secs();
        assert!((600..660).contains(&waited), "{waited}");
    }
}
