//! Other programs: run to their end, waited for with a deadline, looked at in /proc.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::pages::root;
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
    // target/PROFILE/deps/TEST, or target/PROFILE/PROGRAM.
    let mut beside = test.ancestors().skip(1).take(2);
    let binary = beside.find_map(|directory| {
        let binary = directory.join(name);
        binary.is_file().then_some(binary)
    });
    binary.unwrap_or_else(|| {
        let test = test.display();
        panic!("no {name} beside {test}: run tests/run, or `cargo build --workspace`")
    })
}

/// A program of the workspace with a feature that those for users do not have. It is built beside a
/// `plain` one, with the same dependencies, so that only what is ours is compiled once more; `prepare`
/// is asked about the command.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn built_with(
    plain: &Path,
    name: &str,
    feature: &str,
    prepare: impl FnOnce(&mut Command),
) -> PathBuf {
    let directory = plain.parent().expect("target/PROFILE/PROGRAM");
    let target = directory.parent().expect("target/PROFILE");
    let profile = match directory.file_name().and_then(OsStr::to_str) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(root())
        .args(["build", "--quiet", "--workspace", "--locked"])
        .args(["--features", feature, "--bin", name])
        .args(["--profile", profile, "--target-dir"])
        .arg(target);
    prepare(&mut cargo);
    let status = cargo.status().expect("cargo runs this test");
    assert!(status.success(), "{cargo:?} failed");
    directory.join(name)
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

/// The processes of a mount namespace, as `/proc/PID` directories. Those that have ended and wait
/// for their parent are in none.
#[must_use]
pub fn processes_in(mount_namespace: &OsStr) -> Vec<PathBuf> {
    let is_there = |process: &PathBuf| {
        std::fs::read_link(process.join("ns/mnt"))
            .is_ok_and(|namespace| namespace.as_os_str() == mount_namespace)
    };
    all().filter(is_there).collect()
}

/// The agents that run in a mount namespace, as `/proc/PID` directories.
///
/// An agent is known by its executable, which lies in the directory `kvm-clone` of a cache, and which
/// is the first argument of an emulator. ssh's own processes have that path among their later ones.
#[must_use]
pub fn agents_in(mount_namespace: &OsStr) -> Vec<PathBuf> {
    let is_agent = |path: &str| path.contains("/kvm-clone/agent-");
    let mut found = processes_in(mount_namespace);
    found.retain(|process| {
        let Ok(exe) = std::fs::read_link(process.join("exe")) else {
            return false;
        };
        let exe = exe.to_string_lossy();
        let emulated = || {
            arguments(process)
                .get(1)
                .map(|word| String::from_utf8_lossy(word).into_owned())
        };
        match exe.contains("/qemu-aarch64") {
            true => emulated().is_some_and(|program| is_agent(&program)),
            false => is_agent(&exe),
        }
    });
    found
}

/// The ssh clients that were given this configuration file, as `/proc/PID` directories.
#[must_use]
pub fn ssh_clients_of(config: &Path) -> Vec<PathBuf> {
    let config = config.as_os_str().as_encoded_bytes();
    let is_ours = |process: &PathBuf| {
        let words = arguments(process);
        is_ssh(&words) && words.iter().any(|word| word == config)
    };
    all().filter(is_ours).collect()
}

/// Whether this is the command line of an ssh client.
#[must_use]
pub fn is_ssh(words: &[Vec<u8>]) -> bool {
    let program = words.first();
    program.is_some_and(|program| program == b"ssh" || program.ends_with(b"/ssh"))
}

/// The command line of a process; empty when it is gone.
#[must_use]
pub fn arguments(process: &Path) -> Vec<Vec<u8>> {
    let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect()
}

/// Kills a process with SIGKILL; false when it was gone.
///
/// # Panics
/// When this is no `/proc/PID` directory.
pub fn kill(process: &Path) -> bool {
    let id = process.file_name().and_then(OsStr::to_str);
    let id = id.and_then(|id| id.parse().ok()).expect("a /proc/PID");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), Signal::SIGKILL).is_ok()
}

fn all() -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten();
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
        .map(|entry| entry.path())
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
