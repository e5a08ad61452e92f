//! Looks at a process while a story goes on: how much memory it takes, and whether it ever ends.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::DEADLINE;
use crate::process::peak_resident;

/// How often a process is looked at.
const POLL: Duration = Duration::from_millis(5);

/// Looks at a process while it runs: its memory, and whether it ever ends.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    peak: Arc<AtomicU64>,
    thread: JoinHandle<bool>,
}

impl Watch {
    /// Begins to look at the process with this number.
    #[must_use]
    pub fn start(id: u32) -> Self {
        let (stop, peak) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (stopped, seen) = (Arc::clone(&stop), Arc::clone(&peak));
        let thread = std::thread::spawn(move || watch(id, &stopped, &seen));
        Self { stop, peak, thread }
    }

    /// Counts from now on.
    ///
    /// # Panics
    /// When the process is not ours.
    pub fn forget(&self, id: u32) {
        // Resets VmHWM, as proc(5) has it.
        std::fs::write(format!("/proc/{id}/clear_refs"), "5").expect("an own process");
        self.peak.store(0, Ordering::Relaxed);
    }

    /// Whether the process had to be killed, and the most that it had resident, in bytes.
    ///
    /// # Panics
    /// When looking itself failed.
    #[must_use]
    pub fn stop(self) -> (bool, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let hung = self.thread.join().expect("a thread that looks at /proc");
        (hung, self.peak.load(Ordering::Relaxed))
    }
}

fn watch(id: u32, stopped: &AtomicBool, peak: &AtomicU64) -> bool {
    let process = PathBuf::from(format!("/proc/{id}"));
    let deadline = Instant::now() + DEADLINE;
    while !stopped.load(Ordering::Relaxed) {
        peak.fetch_max(peak_resident(&process).unwrap_or(0), Ordering::Relaxed);
        if Instant::now() > deadline {
            let id = i32::try_from(id).expect("process ids are small");
            let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
            return true;
        }
        std::thread::sleep(POLL);
    }
    false
}
