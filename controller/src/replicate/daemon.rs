//! `replicate daemon`: starts what the scheduler says, looks after the VMs that there are, and tells
//! people when something is wrong. All decisions are the scheduler's and the alarms'; here are the
//! clock, the signals and the tasks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::alarms::{Alarms, Kind, Notice, Problem};
use super::keep::{TRUSTED, newest};
use super::listen;
use super::metrics::{self, Metrics, Standing as Measured};
use super::notify;
use super::policy::{self, Policies, Policy};
use super::run::{self, Pruning, Turn, VmRun, Which};
use super::scheduler::{Ended, Job, Scheduler};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;
use crate::store::Store;
use crate::transfer::Context;
use crate::vm::failover::Standing;
use crate::vm::{pause, replica};

/// How often the VMs of a policy are looked for.
const LOOK: Duration = Duration::from_secs(60);

/// How often one that could not be looked at is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// The longest sleep: until then promises break, and the lease is to be renewed.
const TICK: Duration = Duration::from_secs(5);

/// How long a lease holds that is not renewed: so long a new daemon waits for one that was killed.
const LEASE: SignedDuration = SignedDuration::from_secs(20);

/// How often the heartbeat is fetched.
const BEAT: Duration = Duration::from_secs(60);

/// What the daemon needs from the program around it.
pub struct Surroundings<'a> {
    /// Where libvirt listens on the hosts.
    pub connect: &'a str,
    /// The file of policies.
    pub policies: &'a Path,
    /// The file for Prometheus.
    pub metrics: Option<&'a Path>,
    /// Where the same is served by HTTP.
    pub listen: Option<SocketAddr>,
    /// Hosts that nobody has connected to yet: those of a broken network are not used again.
    pub context: &'a (dyn Fn() -> Context + Sync),
    /// The user wants to stop.
    pub cancelled: CancellationToken,
    /// Says something to the user.
    pub say: &'a (dyn Fn(&Said<'_>) + Sync),
}

impl std::fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Surroundings");
        shown
            .field("policies", &self.policies)
            .finish_non_exhaustive()
    }
}

/// What the daemon says.
#[derive(Debug)]
pub enum Said<'a> {
    /// A VM had its turn.
    Ran(&'a VmRun),
    /// Something is wrong, or well again.
    Alarm(&'a Notice),
    /// Something that the user ought to know.
    Warning(String),
}

/// What was found of a policy; nothing, while it is paused.
#[derive(Default)]
struct Found {
    vms: Vec<(String, Option<Timestamp>)>,
    missed: Vec<String>,
}

/// What a task has done.
enum Done {
    Looked(Result<Found>),
    Ran(Box<Turn>),
    Told(Vec<Error>),
}

/// What a task is about.
#[derive(Clone)]
enum Task {
    Look(String),
    Run(Job, Arc<Policy>),
    Tell,
}

/// The clock as it went when the file of policies was read.
struct Reference {
    wall: Timestamp,
    since_boot: SignedDuration,
}

struct Daemon<'a> {
    around: &'a Surroundings<'a>,
    policies: Policies,
    scheduler: Scheduler,
    alarms: Alarms,
    metrics: Metrics,
    /// The same as text, for who asks.
    figures: watch::Sender<String>,
    /// What is wrong by the last run of each.
    failed: BTreeMap<Job, Problem>,
    /// Those that their sources do not have any more; a policy whose VMs are not known has no name
    /// of one.
    missed: BTreeMap<Job, Problem>,
    /// Those that run from their replicas: nothing was promised of them.
    live: BTreeSet<Job>,
    /// Those that have had a turn, and policies whose VMs are known.
    turned: BTreeSet<Job>,
    seen: BTreeSet<String>,
    /// When each policy is looked at next.
    looks: BTreeMap<String, Instant>,
    beat: Instant,
    /// When the lease and the figures are renewed.
    tick: Instant,
    clock: Reference,
    believed: bool,
    warned: Option<String>,
    tasks: JoinSet<Done>,
    about: HashMap<Id, Task>,
}

/// Runs until the user wants it to stop; what runs then is ended in order.
///
/// # Errors
/// When the policies cannot be read at the start, or what is remembered cannot be.
pub async fn run(around: &Surroundings<'_>) -> Result<()> {
    let policies = policy::load(around.policies)?;
    let mut hangup =
        signal(SignalKind::hangup()).map_err(|error| Error::io("watching for signals", error))?;
    let lease = Lease::take(around).await?;
    let mut daemon = Daemon::new(around, policies)?;
    let _serving = match around.listen {
        Some(at) => Some(listen::serve(at, daemon.figures.subscribe()).await?),
        None => None,
    };
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    while !around.cancelled.is_cancelled() {
        if Instant::now() >= daemon.tick {
            daemon.tick = Instant::now() + TICK;
            match lease.renew() {
                // That the store fails keeps nobody's points from being made.
                Err(error) if error.code() != ErrorCode::Busy => daemon.warn(error.one_line()),
                renewed => renewed?,
            }
            daemon.look_at_clock();
            daemon.write_metrics();
        }
        daemon.step();
        let pause = daemon.pause();
        tokio::select! {
            Some(done) = daemon.tasks.join_next_with_id() => daemon.done(done),
            _ = hangup.recv() => daemon.reload(),
            () = around.cancelled.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    while let Some(done) = daemon.tasks.join_next_with_id().await {
        daemon.done(done);
    }
    daemon.write_metrics();
    lease.release()
}

impl<'a> Daemon<'a> {
    fn new(around: &'a Surroundings<'a>, policies: Policies) -> Result<Self> {
        let mut scheduler = Scheduler::default();
        scheduler.set(&policies.all, policies.limits);
        Ok(Self {
            around,
            policies,
            scheduler,
            alarms: Alarms::of(Store::open()?)?,
            metrics: Metrics::new(),
            figures: watch::Sender::default(),
            failed: BTreeMap::new(),
            missed: BTreeMap::new(),
            live: BTreeSet::new(),
            turned: BTreeSet::new(),
            seen: BTreeSet::new(),
            looks: BTreeMap::new(),
            beat: Instant::now() + BEAT,
            tick: Instant::now(),
            clock: Reference::now(),
            believed: true,
            warned: None,
            tasks: JoinSet::new(),
            about: HashMap::new(),
        })
    }

    /// Does what there is to do now.
    fn step(&mut self) {
        let now = Timestamp::now();
        let is_due = |policy: &&Policy| {
            let next = self.looks.get(&policy.name);
            next.is_none_or(|next| *next <= Instant::now())
        };
        let due = self.policies.all.iter().filter(is_due);
        let due: Vec<Policy> = due.cloned().collect();
        for policy in due {
            let next = Instant::now() + LOOK;
            self.looks.insert(policy.name.clone(), next);
            self.look(policy);
        }
        for (job, policy) in self.scheduler.start(now) {
            self.start(job, policy);
        }
        self.judge(now);
        if Instant::now() >= self.beat {
            self.beat = Instant::now() + BEAT;
            self.heartbeat();
        }
        let (running, waiting) = self.scheduler.load();
        let alarms = self.alarms.jobs().len();
        let status = format!("{running} run, {waiting} wait, {alarms} alarms");
        let _ = sd_notify::notify(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
    }

    /// Warns of something, once as long as it stays so.
    fn warn(&mut self, warning: String) {
        if self.warned.as_ref() != Some(&warning) {
            self.warned = Some(warning.clone());
            (self.around.say)(&Said::Warning(warning));
        }
    }

    /// How long there is nothing to do, unless a task ends.
    fn pause(&self) -> Duration {
        let wake = self.scheduler.wake();
        let wake = wake.map(|wake| wake.duration_since(Timestamp::now()));
        let wake = wake.and_then(|wake| Duration::try_from(wake).ok());
        // What is due and has no room waits for a task to end.
        wake.filter(|wake| !wake.is_zero())
            .map_or(TICK, |wake| wake.min(TICK))
    }

    fn spawn(&mut self, task: Task, work: impl Future<Output = Done> + Send + 'static) {
        let handle = self.tasks.spawn(work);
        self.about.insert(handle.id(), task);
    }

    fn look(&mut self, policy: Policy) {
        let (context, connect) = ((self.around.context)(), self.around.connect.to_owned());
        let task = Task::Look(policy.name.clone());
        self.spawn(task, async move {
            Done::Looked(Box::pin(look(&context, &connect, &policy)).await)
        });
    }

    fn start(&mut self, job: Job, policy: Arc<Policy>) {
        let (context, connect) = ((self.around.context)(), self.around.connect.to_owned());
        let pruning = match self.believed {
            true => Pruning::Wanted,
            false => Pruning::Suspended,
        };
        let task = Task::Run(job.clone(), Arc::clone(&policy));
        self.spawn(task, async move {
            let turn = run::one(
                &context,
                &connect,
                &policy,
                &job.vm,
                Which::Scheduled,
                pruning,
            );
            Done::Ran(Box::new(Box::pin(turn).await))
        });
    }

    /// A task has ended.
    fn done(&mut self, done: Result<(Id, Done), JoinError>) {
        let id = done.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let Some(task) = self.about.remove(&id) else {
            return;
        };
        let broke_off = || Error::new(ErrorCode::Internal, "the work on this broke off");
        match (task, done.map(|(_, done)| done)) {
            (Task::Look(policy), Ok(Done::Looked(found))) => self.looked(&policy, found),
            (Task::Look(policy), _) => self.looked(&policy, Err(broke_off())),
            (Task::Run(job, policy), Ok(Done::Ran(turn))) => self.ran(&job, &policy, &turn),
            (Task::Run(job, policy), _) => {
                let turn = Turn {
                    standing: Standing::Follows,
                    run: Some(run::failed(&policy, &job.vm, broke_off())),
                };
                self.ran(&job, &policy, &turn);
            }
            (Task::Tell, Ok(Done::Told(errors))) => {
                for error in errors {
                    (self.around.say)(&Said::Warning(error.one_line()));
                }
            }
            (Task::Tell, _) => (self.around.say)(&Said::Warning(broke_off().one_line())),
        }
    }

    fn looked(&mut self, policy: &str, found: Result<Found>) {
        if self.around.cancelled.is_cancelled() || !self.has(policy) {
            return;
        }
        let nobody = Job {
            policy: policy.to_owned(),
            vm: String::new(),
        };
        match found {
            Ok(found) => {
                self.missed.retain(|job, _| job.policy != policy);
                for vm in found.missed {
                    let of = self.policies.all.iter().find(|of| of.name == policy);
                    let message = of.map(|of| run::is_gone(of, &vm).one_line());
                    let job = Job {
                        policy: policy.to_owned(),
                        vm,
                    };
                    let kind = Kind::Gone;
                    let message = message.unwrap_or_default();
                    self.missed.insert(job, Problem { kind, message });
                }
                self.scheduler.found(policy, &found.vms, Timestamp::now());
                self.seen.insert(policy.to_owned());
                let is_wanted = |job: &Job| {
                    job.policy != policy || found.vms.iter().any(|(vm, _)| *vm == job.vm)
                };
                self.failed.retain(|job, _| is_wanted(job));
                self.live.retain(is_wanted);
            }
            Err(error) => {
                let again = Instant::now() + LOOK_AGAIN;
                self.looks.insert(policy.to_owned(), again);
                let message = format!(
                    "which VMs {policy} is about is not known: {}",
                    error.one_line()
                );
                // Where some are known, their own runs tell.
                let is_known = self.scheduler.all().any(|(job, ..)| job.policy == policy);
                if is_known {
                    (self.around.say)(&Said::Warning(message));
                } else {
                    let kind = Kind::Failed;
                    self.missed.insert(nobody, Problem { kind, message });
                }
            }
        }
    }

    /// Whether a policy is in the file still.
    fn has(&self, policy: &str) -> bool {
        self.policies.all.iter().any(|of| of.name == policy)
    }

    fn ran(&mut self, job: &Job, policy: &Arc<Policy>, turn: &Turn) {
        let error = turn.run.as_ref().and_then(|run| run.result.error.as_ref());
        // Another controller is at it, or the user stopped us: neither says anything of the VM.
        let says_nothing = error
            .is_some_and(|error| matches!(error.code(), ErrorCode::Busy | ErrorCode::Cancelled));
        let how = match (&turn.run, error) {
            (Some(run), None) => Ended::Made(run.instant.unwrap_or_else(Timestamp::now)),
            (Some(_), Some(_)) if !says_nothing => Ended::Failed,
            _ => Ended::NotNow,
        };
        if !says_nothing {
            self.turned.insert(job.clone());
        }
        match turn.standing {
            Standing::Live => self.live.insert(job.clone()),
            Standing::Follows | Standing::SplitBrain => self.live.remove(job),
        };
        let doubt = turn.run.as_ref().and_then(|run| run.doubt.as_ref());
        match error {
            None => match doubt {
                None => {
                    self.failed.remove(job);
                }
                Some(doubt) => {
                    let (kind, message) = (Kind::Doubtful, doubt.why.clone());
                    self.failed.insert(job.clone(), Problem { kind, message });
                }
            },
            Some(_) if says_nothing || !self.has(&job.policy) => {}
            Some(error) => {
                let kind = match turn.standing {
                    Standing::SplitBrain => Kind::SplitBrain,
                    Standing::Follows | Standing::Live => Kind::Failed,
                };
                let message = error.one_line();
                self.failed.insert(job.clone(), Problem { kind, message });
            }
        }
        if let Some(run) = turn.run.as_ref().filter(|_| !says_nothing) {
            self.metrics.count(job, run);
            (self.around.say)(&Said::Ran(run));
        }
        self.scheduler.ended(job, policy, how, Timestamp::now());
    }

    /// Raises alarms, and ends those that are over.
    fn judge(&mut self, now: Timestamp) {
        let mut problems = self.missed.clone();
        problems.extend(self.failed.clone());
        for (job, age) in self.scheduler.late(now) {
            if self.live.contains(job) {
                continue;
            }
            let age = SignedDuration::from_secs(age.as_secs());
            let mut message = format!("the newest point of {} is {age:#} old", job.vm);
            if let Some(why) = problems.get(job) {
                if why.kind >= Kind::Late {
                    continue;
                }
                message = format!("{message}: {}", why.message);
            }
            let kind = Kind::Late;
            problems.insert(job.clone(), Problem { kind, message });
        }
        let mut all = self.alarms.jobs();
        all.extend(problems.keys().cloned());
        all.sort();
        all.dedup();
        for job in all {
            let problem = problems.get(&job);
            if problem.is_none() && !self.knows(&job) {
                continue;
            }
            let repeat = self.policies.notify.repeat;
            if let Some(notice) = self.alarms.judge(&job, problem, now, repeat) {
                self.tell(notice);
            }
        }
        if let Err(error) = self.alarms.save() {
            self.warn(error.one_line());
        }
    }

    /// Whether it is known by now how a VM is: after a start there are alarms of which nobody has
    /// looked yet whether they are over.
    fn knows(&self, job: &Job) -> bool {
        let is_wanted = self.has(&job.policy);
        let is_there = || self.scheduler.all().any(|(of, ..)| of == job);
        !is_wanted || self.turned.contains(job) || (self.seen.contains(&job.policy) && !is_there())
    }

    fn tell(&mut self, notice: Notice) {
        (self.around.say)(&Said::Alarm(&notice));
        let here = (self.around.context)().host(&HostSpec::Local);
        let notify = self.policies.notify.clone();
        self.spawn(Task::Tell, async move {
            Done::Told(notify::tell(&here, &notify, &notice).await)
        });
    }

    /// Says that all is well, if it is.
    fn heartbeat(&mut self) {
        let Some(url) = self.policies.notify.heartbeat.clone() else {
            return;
        };
        if !self.alarms.is_empty() {
            return;
        }
        let here = (self.around.context)().host(&HostSpec::Local);
        self.spawn(Task::Tell, async move {
            let beat = notify::beat(&here, &url).await;
            Done::Told(beat.err().into_iter().collect())
        });
    }

    /// Reads the file of policies again; one with mistakes changes nothing.
    fn reload(&mut self) {
        let _ = NotifyState::monotonic_usec_now()
            .and_then(|now| sd_notify::notify(&[NotifyState::Reloading, now]));
        match policy::load(self.around.policies) {
            Ok(policies) => {
                self.scheduler.set(&policies.all, policies.limits);
                let has = |name: &str| policies.all.iter().any(|policy| policy.name == name);
                self.failed.retain(|job, _| has(&job.policy));
                self.missed.retain(|job, _| has(&job.policy));
                self.live.retain(|job| has(&job.policy));
                self.looks.clear();
                self.policies = policies;
                self.clock = Reference::now();
                self.believed = true;
            }
            Err(error) => {
                let kept = "the policies stay as they were";
                (self.around.say)(&Said::Warning(format!("{kept}: {}", error.one_line())));
            }
        }
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }

    /// A clock that has jumped may call old what is new: then nothing is removed.
    fn look_at_clock(&mut self) {
        let is_steady = self.clock.is_steady();
        if self.believed && !is_steady {
            let message = "the clock has jumped: no points are removed until it is what it was, or \
                           until a reload (SIGHUP) says that it is right";
            (self.around.say)(&Said::Warning(message.to_owned()));
        }
        self.believed = is_steady;
    }

    fn write_metrics(&mut self) {
        let ill = self.alarms.jobs();
        let all = self.scheduler.all().map(|(job, policy, newest)| {
            let measured = Measured {
                newest,
                rpo_seconds: policy.rpo.as_secs_f64(),
                has_alarm: ill.contains(job),
            };
            (job, measured)
        });
        let text = self.metrics.text(all, self.scheduler.load());
        let written = self.around.metrics.map(|path| metrics::write(path, &text));
        if let Some(Err(error)) = written {
            self.warn(error.one_line());
        }
        self.figures.send_replace(text);
    }
}

/// Looks for the VMs of a policy.
async fn look(context: &Context, connect: &str, policy: &Policy) -> Result<Found> {
    let source = Hypervisor::new(context.host(&policy.source), connect);
    let on = Hypervisor::new(context.host(&policy.destination), connect);
    let found = run::find(&source, on.host(), policy).await?;
    if pause::paused(&on, &policy.place()).await?.is_some() {
        return Ok(Found::default());
    }
    let now = Timestamp::now();
    let points = replica::newest_points(on.host(), &policy.place()).await?;
    let vms = found.vms.into_iter().map(|vm| {
        let known = points.get(&vm).copied();
        (vm, newest(known.into_iter(), now))
    });
    Ok(Found {
        vms: vms.collect(),
        missed: run::missed(&on, policy, found.gone).await?,
    })
}

impl Reference {
    fn now() -> Self {
        Self {
            wall: Timestamp::now(),
            since_boot: since_boot(),
        }
    }

    /// Whether the clock has gone as time has since then.
    fn is_steady(&self) -> bool {
        let by_clock = Timestamp::now().duration_since(self.wall);
        let passed = since_boot() - self.since_boot;
        (by_clock - passed).abs() <= TRUSTED
    }
}

/// Goes on while the machine sleeps, and is never set.
fn since_boot() -> SignedDuration {
    let time = clock_gettime(ClockId::Boottime);
    let nanoseconds = i32::try_from(time.tv_nsec).unwrap_or(0);
    SignedDuration::new(time.tv_sec, nanoseconds)
}

/// That no other daemon of this user works by the same file.
struct Lease {
    store: Store,
    name: String,
    holder: String,
}

impl Lease {
    /// Waits for it, as long as the user wants.
    async fn take(around: &Surroundings<'_>) -> Result<Self> {
        let path = around.policies;
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let lease = Self {
            store: Store::open()?,
            name: format!("daemon {}", path.display()),
            holder: uuid::Uuid::new_v4().to_string(),
        };
        let mut has_said = false;
        while !lease.is_had()? {
            if !has_said {
                let message = format!(
                    "waiting: another daemon works by {}, or did until just now",
                    path.display()
                );
                (around.say)(&Said::Warning(message));
                has_said = true;
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
                () = around.cancelled.cancelled() => break,
            }
        }
        Ok(lease)
    }

    fn is_had(&self) -> Result<bool> {
        self.store
            .lease(&self.name, &self.holder, Timestamp::now(), LEASE)
    }

    fn renew(&self) -> Result<()> {
        if self.is_had()? {
            return Ok(());
        }
        let message = "another daemon has taken over: this one was held up for too long";
        Err(Error::new(ErrorCode::Busy, message))
    }

    fn release(self) -> Result<()> {
        self.store.release(&self.name, &self.holder)
    }
}
