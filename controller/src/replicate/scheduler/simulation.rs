//! Thirty days of 2,000 VMs on 40 hosts, with slow links, runs that fail, and hosts that are down
//! for hours, played to the scheduler as it is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::{Ended, Job, Scheduler};
use crate::replicate::policy::{self, Limits, Policy};

const SOURCES: u64 = 20;
const VMS_OF_A_SOURCE: u64 = 100;
const DAYS: i64 = 30;
const HOUR: i64 = 3600;

const INTERVAL: i64 = 4 * HOUR;
const RPO: i64 = 6 * HOUR;

/// Numbers that look drawn and are the same each time (SplitMix64).
struct Drawn(u64);

impl Drawn {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn seconds(&mut self, from: i64, to: i64) -> i64 {
        let span = u64::try_from(to - from).unwrap();
        from + i64::try_from(self.below(span)).unwrap()
    }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn hosts(policy: &Policy) -> [String; 2] {
    [&policy.source, &policy.destination].map(ToString::to_string)
}

/// Every source has two policies to two destinations, the second over a link that is slow.
fn policies() -> Vec<Policy> {
    let mut text = String::new();
    for source in 0..SOURCES {
        for (kind, to) in [("near", source), ("far", (source + 1) % SOURCES)] {
            let _ = write!(
                text,
                "[policy.{kind}-{source}]\nsource = \"a{source}\"\ndestination = \"b{to}\"\n\
                 vms = [\"*\"]\nparallel = 2\nevery = \"{}h\"\nrpo = \"{}h\"\n",
                INTERVAL / HOUR,
                RPO / HOUR
            );
        }
    }
    policy::parse(&text).unwrap().all
}

/// The hours in which a host is down: four times for some hours.
fn outages(drawn: &mut Drawn) -> BTreeMap<String, Vec<(i64, i64)>> {
    let hosts = (0..SOURCES).flat_map(|host| [format!("a{host}"), format!("b{host}")]);
    let mut outage = || {
        let from = drawn.seconds(0, DAYS * 24 * HOUR);
        (from, from + drawn.seconds(HOUR / 2, 8 * HOUR))
    };
    hosts
        .map(|host| (host, (0..4).map(|_| outage()).collect()))
        .collect()
}

/// The site, and what has come about on it so far.
struct Site {
    drawn: Drawn,
    outages: BTreeMap<String, Vec<(i64, i64)>>,
    limits: Limits,
    scheduler: Scheduler,
    /// When the newest point of each VM was begun.
    newest: BTreeMap<Job, i64>,
    running: BTreeMap<Job, Run>,
    ends: BinaryHeap<Reverse<(i64, Job)>>,
    on_host: BTreeMap<String, usize>,
    on_link: BTreeMap<[String; 2], usize>,
    /// When each VM has last failed, to explain what is late.
    failed: BTreeMap<Job, i64>,
    seen: Seen,
}

struct Run {
    policy: Arc<Policy>,
    began: i64,
    is_well: bool,
}

#[derive(Default)]
struct Seen {
    runs: i64,
    late: u64,
    /// The longest between two points, in seconds.
    longest: i64,
    most_on_host: usize,
    unexplained: BTreeSet<(Job, i64)>,
}

impl Site {
    fn new() -> Self {
        let mut drawn = Drawn(7);
        let limits = Limits {
            host: NonZeroUsize::new(4).unwrap(),
            link: NonZeroUsize::new(2).unwrap(),
        };
        let policies = policies();
        let mut scheduler = Scheduler::default();
        scheduler.set(&policies, limits);
        let mut newest = BTreeMap::new();
        for policy in &policies {
            let vms = (0..VMS_OF_A_SOURCE / 2).map(|vm| (format!("vm{vm}"), None));
            let vms: Vec<_> = vms.collect();
            scheduler.found(&policy.name, &vms, at(0));
            newest.extend(vms.into_iter().map(|(vm, _)| {
                let policy = policy.name.clone();
                (Job { policy, vm }, 0)
            }));
        }
        Self {
            outages: outages(&mut drawn),
            drawn,
            limits,
            scheduler,
            newest,
            running: BTreeMap::new(),
            ends: BinaryHeap::new(),
            on_host: BTreeMap::new(),
            on_link: BTreeMap::new(),
            failed: BTreeMap::new(),
            seen: Seen::default(),
        }
    }

    fn is_down(&self, hosts: &[String], from: i64, to: i64) -> bool {
        let mut all = hosts.iter().flat_map(|host| &self.outages[host]);
        all.any(|(down, up)| *down < to && from < *up)
    }

    fn begin(&mut self, job: &Job, policy: Arc<Policy>, now: i64) {
        let hosts = hosts(&policy);
        for host in &hosts {
            let count = self.on_host.entry(host.clone()).or_default();
            *count += 1;
            self.seen.most_on_host = self.seen.most_on_host.max(*count);
            assert!(*count <= self.limits.host.get(), "{host} at {now}");
        }
        let link = self.on_link.entry(hosts.clone()).or_default();
        *link += 1;
        assert!(*link <= self.limits.link.get(), "{hosts:?} at {now}");
        let slow = if policy.name.starts_with("far") { 4 } else { 1 };
        let mut takes = self.drawn.seconds(20, 120) * slow;
        let mut is_well = self.drawn.below(50) != 0;
        if self.is_down(&hosts, now, now + takes) {
            (takes, is_well) = (30, false);
        }
        self.ends.push(Reverse((now + takes, job.clone())));
        let run = Run {
            policy,
            began: now,
            is_well,
        };
        let before = self.running.insert(job.clone(), run);
        assert!(before.is_none(), "{job:?} runs beside itself at {now}");
        self.seen.runs += 1;
    }

    fn end(&mut self, job: &Job, now: i64) {
        let run = self.running.remove(job).unwrap();
        let hosts = hosts(&run.policy);
        for host in &hosts {
            *self.on_host.get_mut(host).unwrap() -= 1;
        }
        *self.on_link.get_mut(&hosts).unwrap() -= 1;
        let how = match run.is_well {
            true => Ended::Made(at(run.began)),
            false => Ended::Failed,
        };
        self.scheduler.ended(job, &run.policy, how, at(now));
        if !run.is_well {
            self.failed.insert(job.clone(), now);
            return;
        }
        let before = self.newest.insert(job.clone(), run.began).unwrap();
        self.seen.longest = self.seen.longest.max(now - before);
        if now - before > RPO {
            self.seen.late += 1;
            // One of its hosts was down, or it has failed itself.
            let has_failed = self.failed.get(job).is_some_and(|then| *then > before);
            if !has_failed && !self.is_down(&hosts, before, now) {
                self.seen.unexplained.insert((job.clone(), now));
            }
        }
    }

    /// When the next run ends, or the scheduler wants to be asked again.
    fn next(&self, now: i64) -> i64 {
        let wake = self.scheduler.wake().map(|wake| wake.duration_since(at(0)));
        let wake = wake.as_ref().map_or(i64::MAX, SignedDuration::as_secs);
        let end = self.ends.peek().map_or(i64::MAX, |Reverse((end, _))| *end);
        end.min(wake.max(now).saturating_add(1))
    }
}

#[test]
fn two_thousand_vms_of_forty_hosts_are_kept_for_thirty_days() {
    let mut site = Site::new();
    assert_eq!(site.newest.len(), 2000);
    let end = DAYS * 24 * HOUR;
    let mut now = 0;
    while now < end {
        for (job, policy) in site.scheduler.start(at(now)) {
            site.begin(&job, policy, now);
        }
        now = site.next(now);
        while let Some(Reverse((then, job))) = site.ends.peek().cloned() {
            if then > now {
                break;
            }
            site.ends.pop();
            site.end(&job, now);
        }
    }
    let Seen {
        runs,
        late,
        longest,
        most_on_host,
        unexplained,
    } = site.seen;
    let hours = longest / HOUR;
    eprintln!("{runs} runs, {late} of them late, the longest after {hours} h");
    assert_eq!(unexplained, BTreeSet::new());
    // Nobody was forgotten: each has run as often as its interval and the outages let it.
    let least = end / INTERVAL * 9 / 10 * 2000;
    assert!(runs >= least, "{runs} of {least}");
    let oldest = site.newest.values().min().unwrap();
    assert!(end - oldest < 20 * HOUR, "{oldest}");
    assert_eq!(most_on_host, site.limits.host.get(), "never reached");
}
