//! Runs one command and takes its figures.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// How often the sizes of the processes are looked at. The kernel keeps the peak itself, so only
/// growth in the last moment of a process can be missed.
const PEAK_INTERVAL: Duration = Duration::from_millis(50);

/// How long processes and connections may take to go once the command has ended.
const SETTLE: Duration = Duration::from_secs(3);

/// What one run took.
#[derive(Debug, Clone)]
pub(crate) struct Figures {
    pub(crate) wall_seconds: f64,
    /// Both sides, ssh and sshd included.
    pub(crate) cpu_seconds: f64,
    /// Both directions, as the meter counts.
    pub(crate) wire_bytes: u64,
    /// Largest resident size of the tool's own processes, where it was seen.
    pub(crate) peak_kib: Option<u64>,
}

/// A command, and what is needed to measure it.
#[derive(Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) command: Command,
    /// What has to be on the disk at the end: the time for that counts.
    pub(crate) result: Option<&'a Path>,
    /// Whether a process of this name is one of the tool's own.
    pub(crate) is_worker: fn(&str) -> bool,
    /// Where the command's outputs go.
    pub(crate) outputs: &'a Path,
}

/// What counts the bytes between the hosts.
pub(crate) trait Meter {
    /// Those that it has counted so far.
    fn bytes(&self) -> Result<u64>;

    /// Whether nothing is under way, as far as it can tell.
    fn is_idle(&self) -> bool;
}

/// Runs the subject to its end.
pub(crate) fn measure(subject: Subject<'_>, meter: &impl Meter) -> Result<Figures> {
    let background = process::running()?;
    let wire_before = meter.bytes()?;
    let cpu_before = process::cpu_seconds()?;
    let (wall, peaks) = watched(|| run_and_sync(subject.command, subject.result, subject.outputs))?;
    settle(meter, background)?;
    Ok(Figures {
        wall_seconds: wall.as_secs_f64(),
        cpu_seconds: process::cpu_seconds()? - cpu_before,
        wire_bytes: meter.bytes()? - wire_before,
        peak_kib: peaks
            .into_iter()
            .filter(|(name, _)| (subject.is_worker)(name))
            .map(|(_, kib)| kib)
            .max(),
    })
}

/// Runs `work` and tells how long it took, and the peaks of the processes meanwhile.
fn watched(work: impl FnOnce() -> Result<()>) -> Result<(Duration, BTreeMap<String, u64>)> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peaks = BTreeMap::new();
            while !done.load(Ordering::Acquire) {
                // A process that ends while it is looked at is no error.
                let _ = process::note_peaks(&mut peaks);
                thread::park_timeout(PEAK_INTERVAL);
            }
            peaks
        });
        let start = Instant::now();
        let outcome = work();
        let wall = start.elapsed();
        done.store(true, Ordering::Release);
        watcher.thread().unpark();
        let peaks = watcher
            .join()
            .ok()
            .context("the watching thread panicked")?;
        outcome.map(|()| (wall, peaks))
    })
}

fn run_and_sync(mut command: Command, result: Option<&Path>, outputs: &Path) -> Result<()> {
    run(&mut command, outputs)?;
    if let Some(path) = result {
        // As a process, so that it counts as processor time like a tool's own fsync.
        let status = Command::new("sync")
            .arg(path)
            .status()
            .context("running sync")?;
        ensure!(
            status.success(),
            "sync of {} ended with {status}",
            path.display()
        );
    }
    Ok(())
}

/// Runs a command; its standard output is left in `outputs/stdout`.
pub(crate) fn run(command: &mut Command, outputs: &Path) -> Result<()> {
    let [stdout, stderr] = ["stdout", "stderr"].map(|name| outputs.join(name));
    let status = command
        .stdout(File::create(stdout)?)
        .stderr(File::create(&stderr)?)
        .status()
        .with_context(|| format!("running {}", command.get_program().display()))?;
    if !status.success() {
        let errors = fs::read(stderr)?;
        let errors = String::from_utf8_lossy(&errors[errors.len().saturating_sub(2000)..]);
        bail!(
            "{} ended with {status}: {}",
            command.get_program().display(),
            errors.trim()
        );
    }
    Ok(())
}

/// Waits until what the command started is gone, so that its figures are complete and the next
/// run has the machine for itself.
fn settle(meter: &impl Meter, background: usize) -> Result<()> {
    let deadline = Instant::now() + SETTLE;
    while Instant::now() < deadline && !(meter.is_idle() && process::running()? <= background) {
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
