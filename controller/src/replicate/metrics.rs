//! What the daemon knows, for Prometheus: in a file for the textfile collector of the node exporter, or
//! by HTTP ([`listen`](super::listen)).

use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::run::VmRun;
use super::scheduler::Job;
use crate::error::{Error, Result};
use crate::vm::Scan;

type Seconds = Gauge<f64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    policy: String,
    vm: String,
}

impl From<&Job> for Of {
    fn from(job: &Job) -> Self {
        Self {
            policy: job.policy.clone(),
            vm: job.vm.clone(),
        }
    }
}

/// What is counted since the daemon has started, and what is so now.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    newest: Family<Of, Seconds>,
    rpo: Family<Of, Seconds>,
    alarm: Family<Of, Gauge>,
    runs: Family<Of, Counter>,
    failures: Family<Of, Counter>,
    shipped: Family<Of, Counter>,
    full_scans: Family<Of, Counter>,
    duration: Family<Of, Seconds>,
    running: Gauge,
    waiting: Gauge,
    now: Seconds,
}

/// What is so of one VM.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    /// The instant of its newest point.
    pub newest: Option<Timestamp>,
    /// How old that may be, in seconds.
    pub rpo_seconds: f64,
    /// Whether there is an alarm.
    pub has_alarm: bool,
}

impl Metrics {
    /// Nothing yet.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("kvm_clone"),
            newest: Family::default(),
            rpo: Family::default(),
            alarm: Family::default(),
            runs: Family::default(),
            failures: Family::default(),
            shipped: Family::default(),
            full_scans: Family::default(),
            duration: Family::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            now: Seconds::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        let seconds = || Unit::Seconds;
        let newest = "The instant of consistency of the newest point, since 1970";
        registry.register_with_unit(
            "newest_point_timestamp",
            newest,
            seconds(),
            self.newest.clone(),
        );
        let rpo = "How old the newest point may be";
        registry.register_with_unit("rpo", rpo, seconds(), self.rpo.clone());
        let alarm = "Whether there is an alarm that is not over";
        registry.register("alarm", alarm, self.alarm.clone());
        let runs = "Runs that made a point";
        registry.register("points_made", runs, self.runs.clone());
        let failures = "Runs that made none, and should have";
        registry.register("failures", failures, self.failures.clone());
        let shipped = "Bytes carried between the agents";
        registry.register_with_unit("wire", shipped, Unit::Bytes, self.shipped.clone());
        let scans = "Disks that were read whole, since what had changed was not known";
        registry.register("full_scans", scans, self.full_scans.clone());
        let duration = "How long the last run took";
        registry.register_with_unit(
            "last_run_duration",
            duration,
            seconds(),
            self.duration.clone(),
        );
        let running = "VMs that get a point just now";
        registry.register("running", running, self.running.clone());
        let waiting = "VMs that wait for one";
        registry.register("waiting", waiting, self.waiting.clone());
        let now = "When this was written, since 1970";
        registry.register_with_unit("written_timestamp", now, seconds(), self.now.clone());
    }

    /// Counts a run.
    pub fn count(&self, job: &Job, run: &VmRun) {
        let (of, result) = (Of::from(job), &run.result);
        let ended = match &result.error {
            None => &self.runs,
            Some(_) => &self.failures,
        };
        ended.get_or_create(&of).inc();
        let shipped = result.totals.bytes_wire.unwrap_or(0);
        self.shipped.get_or_create(&of).inc_by(shipped);
        let whole = result
            .disks
            .iter()
            .filter(|disk| disk.scan == Some(Scan::Full));
        let whole = u64::try_from(whole.count()).unwrap_or(u64::MAX);
        self.full_scans.get_or_create(&of).inc_by(whole);
        self.duration
            .get_or_create(&of)
            .set(result.duration_seconds);
    }

    /// What is so now, in the OpenMetrics text format.
    pub fn text<'a>(
        &self,
        all: impl Iterator<Item = (&'a Job, Standing)>,
        (running, waiting): (usize, usize),
    ) -> String {
        // What is gone is not told of as it was.
        self.newest.clear();
        self.rpo.clear();
        self.alarm.clear();
        for (job, standing) in all {
            let of = Of::from(job);
            if let Some(newest) = standing.newest {
                self.newest.get_or_create(&of).set(since_1970(newest));
            }
            self.rpo.get_or_create(&of).set(standing.rpo_seconds);
            self.alarm
                .get_or_create(&of)
                .set(i64::from(standing.has_alarm));
        }
        let count = |number| i64::try_from(number).unwrap_or(i64::MAX);
        self.running.set(count(running));
        self.waiting.set(count(waiting));
        self.now.set(since_1970(Timestamp::now()));
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut text, &self.registry);
        text
    }
}

/// Writes figures to a file, at one instant for who reads it.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, text: &str) -> Result<()> {
    replace(path, text).map_err(|error| Error::io(format!("writing {}", path.display()), error))
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn since_1970(instant: Timestamp) -> f64 {
    instant.as_duration().as_secs_f64()
}

/// Readable for others: the collector is somebody else.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    let mut file = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o644))
        .tempfile_in(directory)?;
    file.write_all(text.as_bytes())?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::vm::VmResult;

    /// The names of figures in a text.
    fn names(text: &str) -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let ours = words.filter(|word| word.starts_with("kvm_clone_"));
        ours.map(str::to_owned).collect()
    }

    #[test]
    fn rules_and_dashboard_speak_of_figures_that_there_are() {
        let metrics = Metrics::new();
        let job = Job {
            policy: "shop".to_owned(),
            vm: "web".to_owned(),
        };
        let [source, destination] = ["hv1", "hv2"].map(|host| host.parse().unwrap());
        let error = Error::new(crate::error::ErrorCode::Io, "no luck");
        let failed = VmRun {
            policy: "shop".to_owned(),
            result: VmResult::failed("replicate", &source, &destination, "web", error),
            point: None,
            instant: None,
            removed: Vec::new(),
            doubt: None,
        };
        metrics.count(&job, &failed);
        let made = VmRun {
            result: VmResult {
                error: None,
                ..failed.result
            },
            ..failed
        };
        metrics.count(&job, &made);
        let standing = Standing {
            newest: Some(Timestamp::UNIX_EPOCH),
            rpo_seconds: 60.0,
            has_alarm: true,
        };
        let text = metrics.text(std::iter::once((&job, standing)), (1, 2));
        let of_web = "{policy=\"shop\",vm=\"web\"} ";
        for line in [
            format!("kvm_clone_newest_point_timestamp_seconds{of_web}0.0"),
            format!("kvm_clone_alarm{of_web}1"),
            format!("kvm_clone_failures_total{of_web}1"),
            format!("kvm_clone_points_made_total{of_web}1"),
            "kvm_clone_waiting 2".to_owned(),
        ] {
            assert!(text.lines().any(|known| known == line), "{line} in {text}");
        }
        let written: BTreeSet<String> = names(&text);
        for spoken in [
            include_str!("../../doc/alerts.yml"),
            include_str!("../../doc/dashboard.json"),
        ] {
            let unknown: Vec<String> = names(spoken).difference(&written).cloned().collect();
            assert_eq!(unknown, Vec::<String>::new());
        }
        serde_json::from_str::<serde_json::Value>(include_str!("../../doc/dashboard.json"))
            .unwrap();
    }
}
