//! Other programs: run to their end, waited for with a deadline, looked at in /proc.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::skip::find_tool;

/// How often something is looked at while it is waited for.
const POLL: Duration = Duration::from_millis(10);

/// Runs a tool of the machine to its end and gives its standard output, without the last newline.
///
/// # Panics
/// When it cannot be started or fails; its standard error is in the message.
pub fn tool<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> String {
    let mut command = Command::new(find_tool(name).unwrap_or_else(|| name.into()));
    command.args(args);
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{name} could not be started: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?} ended with {}: {stderr}",
        output.status
    );
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}

/// A program of the workspace that was built beside the running test, or that the environment
/// names.
///
/// Cargo builds the binaries of other packages for no test, so `tests/run` builds them first.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn built(name: &str, variable: &str) -> PathBuf {
    if let Some(chosen) = std::env::var_os(variable) {
        return chosen.into();
    }
    let test = std::env::current_exe().expect("a test knows its executable");
    let beside = test
        .parent()
        .and_then(Path::parent)
        .expect("target/PROFILE/deps/TEST");
    let binary = beside.join(name);
    assert!(
        binary.exists(),
        "no {}: run tests/run, or `cargo build --workspace`",
        binary.display()
    );
    binary
}

/// Waits until `probe` gives something.
///
/// # Panics
/// When `limit` passes first; `what` is in the message.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(POLL);
    }
}

/// The agents that run in a mount namespace, as `/proc/PID` directories.
///
/// An agent is known by its executable, which lies in the directory `kvm-clone` of a cache.
/// ssh's own processes only have that path among their arguments.
#[must_use]
pub fn agents_in(mount_namespace: &OsStr) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|process| {
            let link = |name| std::fs::read_link(process.join(name)).ok();
            link("ns/mnt").is_some_and(|namespace| namespace.as_os_str() == mount_namespace)
                && link("exe")
                    .is_some_and(|exe| exe.to_string_lossy().contains("/kvm-clone/agent-"))
        })
        .collect()
}

/// The ssh clients that were given this configuration file, as `/proc/PID` directories.
#[must_use]
pub fn ssh_clients_of(config: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let config = config.as_os_str().as_encoded_bytes();
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|process| {
            let command = std::fs::read(process.join("cmdline")).unwrap_or_default();
            let mut words = command.split(|byte| *byte == 0);
            let program = words.next().unwrap_or_default();
            program.ends_with(b"ssh") && words.any(|word| word == config)
        })
        .collect()
}

/// The most memory that a process ever had resident, in bytes; `None` once it has ended.
#[must_use]
pub fn peak_resident(process: &Path) -> Option<u64> {
    let status = std::fs::read_to_string(process.join("status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Watches the memory of a host's agents while a run goes.
#[derive(Debug)]
pub struct MemoryWatch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<u64>>,
}

impl MemoryWatch {
    /// Starts to look at the agents of this mount namespace, a hundred times a second.
    #[must_use]
    pub fn start(mount_namespace: OsString) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut peak = None;
            while !stopped.load(Ordering::Relaxed) {
                let agents = agents_in(&mount_namespace);
                peak = peak.max(agents.iter().filter_map(|agent| peak_resident(agent)).max());
                std::thread::sleep(POLL);
            }
            peak
        });
        Self { stop, thread }
    }

    /// Stops, and gives the most that an agent ever had resident, in bytes; `None` when none was
    /// seen.
    ///
    /// # Panics
    /// When the watching itself failed.
    #[must_use]
    pub fn peak(self) -> Option<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .expect("the watching thread only reads /proc")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_gives_its_output() {
        assert_eq!(tool("echo", ["two words"]), "two words");
    }

    #[test]
    fn waiting_ends_when_the_probe_gives_something() {
        let mut calls = 0;
        let found = wait_for("three calls", Duration::from_secs(5), || {
            calls += 1;
            (calls == 3).then_some("there")
        });
        assert_eq!((found, calls), ("there", 3));
    }

    #[test]
    fn this_process_has_a_peak_and_is_no_agent() {
        let own = PathBuf::from(format!("/proc/{}", std::process::id()));
        assert!(peak_resident(&own).unwrap() > 1 << 16);
        let namespace = std::fs::read_link("/proc/self/ns/mnt").unwrap();
        assert!(!agents_in(namespace.as_os_str()).contains(&own));
    }
}
