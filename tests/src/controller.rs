//! `kvm-clone-ctl`, run as a user runs it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use crate::process::{built, wait_for};

/// No run of a test takes longer; one that hangs is killed and fails the test.
const LIMIT: Duration = Duration::from_secs(150);

/// The controller with a home and an ssh configuration of its own.
#[derive(Debug)]
pub struct Controller {
    program: PathBuf,
    home: PathBuf,
    ssh_config: PathBuf,
    agent_socket: Option<PathBuf>,
    network: Option<String>,
    runs: AtomicU32,
}

impl Controller {
    /// A controller at home in `home`, which talks to the hosts of `ssh_config`.
    ///
    /// # Panics
    /// When the directory is not writable.
    #[must_use]
    pub fn new(home: PathBuf, ssh_config: PathBuf) -> Self {
        fs::create_dir_all(home.join("runs")).expect("the laboratory's directory is writable");
        Self {
            program: binary(),
            home,
            ssh_config,
            agent_socket: None,
            network: None,
            runs: AtomicU32::new(0),
        }
    }

    /// Its home directory.
    #[must_use]
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Its ssh configuration.
    #[must_use]
    pub fn ssh_config(&self) -> &Path {
        &self.ssh_config
    }

    /// Another build of it.
    #[must_use]
    pub fn program(self, program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            ..self
        }
    }

    /// Runs it in a network namespace.
    #[must_use]
    pub fn within(self, network: &str) -> Self {
        Self {
            network: Some(network.to_owned()),
            ..self
        }
    }

    /// Gives it the keys of an ssh agent, which it has none of otherwise.
    pub fn use_ssh_agent(&mut self, socket: PathBuf) {
        self.agent_socket = Some(socket);
    }

    /// Runs it to its end with results as JSON.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        self.start(args).wait()
    }

    /// Starts it with results as JSON.
    pub fn start<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Running {
        let json = ["-o", "json", "--no-progress", "-F"].map(OsString::from);
        let fixed = json.into_iter().chain([self.ssh_config.clone().into()]);
        self.start_plain(fixed.chain(args.into_iter().map(|arg| arg.as_ref().to_owned())))
    }

    /// Runs it to its end with these arguments and no others.
    pub fn run_plain<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        self.start_plain(args).wait()
    }

    fn start_plain<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Running {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let file = |name| self.home.join(format!("runs/{number}-{name}"));
        let (stdout, stderr) = (file("stdout"), file("stderr"));
        let create = |path: &Path| File::create(path).expect("the laboratory is writable");
        let mut command = self.command(&self.program);
        command.args(args);
        command.stdout(create(&stdout)).stderr(create(&stderr));
        // As a shell starts what it is told.
        command.process_group(0);
        let child = command.spawn().expect("the controller can be executed");
        let arguments = format!("{:?}", command.get_args().collect::<Vec<_>>());
        Running {
            child,
            arguments,
            stdout,
            stderr,
            since: Instant::now(),
        }
    }

    /// A program, such as another build of the controller, in this one's place: its home, its
    /// network, its keys.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = match &self.network {
            None => Command::new(program),
            Some(network) => {
                // It becomes the program, so that a signal reaches that.
                let mut command = Command::new("ip");
                command.args(["netns", "exec", network]).arg(program);
                command
            }
        };
        command
            .current_dir(&self.home)
            .env("HOME", &self.home)
            .env("XDG_CACHE_HOME", self.home.join(".cache"))
            .env("XDG_CONFIG_HOME", self.home.join(".config"))
            .env("XDG_STATE_HOME", self.home.join(".local/state"))
            .env_remove("SSH_AUTH_SOCK")
            .env_remove("XDG_RUNTIME_DIR")
            .stdin(Stdio::null());
        if let Some(socket) = &self.agent_socket {
            command.env("SSH_AUTH_SOCK", socket);
        }
        command
    }
}

/// The controller that was built beside the running test, or that `KVM_CLONE_CTL` names.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn binary() -> PathBuf {
    built("kvm-clone-ctl", "KVM_CLONE_CTL")
}

/// A controller that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    arguments: String,
    stdout: PathBuf,
    stderr: PathBuf,
    since: Instant,
}

impl Running {
    /// Whether it has not ended yet.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its process, as a `/proc/PID` directory.
    #[must_use]
    pub fn process(&self) -> PathBuf {
        format!("/proc/{}", self.id()).into()
    }

    /// How long it has been running.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).expect("process ids are small");
        kill(Pid::from_raw(id), signal).expect("the controller still runs");
    }

    /// Ctrl-C: a terminal sends it to the program and to what that has started.
    ///
    /// # Panics
    /// When it is gone.
    pub fn interrupt(&self) {
        let id = i32::try_from(self.child.id()).expect("process ids are small");
        killpg(Pid::from_raw(id), Signal::SIGINT).expect("the controller still runs");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end; it is killed then.
    #[must_use]
    pub fn wait(mut self) -> Run {
        let status = wait_for(&format!("the end of {}", self.arguments), LIMIT, || {
            self.child.try_wait().expect("the controller is a child")
        });
        Run {
            status,
            elapsed: self.since.elapsed(),
            arguments: std::mem::take(&mut self.arguments),
            stdout: fs::read(&self.stdout).expect("a run's output was just written"),
            stderr: text(&fs::read(&self.stderr).expect("a run's output was just written")),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A test that fails, or that runs out of time, takes its controller with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run that has ended.
#[derive(Debug)]
pub struct Run {
    status: ExitStatus,
    arguments: String,
    /// How long it took.
    pub elapsed: Duration,
    /// The results.
    pub stdout: Vec<u8>,
    /// Everything else that it said.
    pub stderr: String,
}

impl Run {
    /// The exit code; `None` when a signal ended it.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Whether a caller sees it ended by Ctrl-C: exit code 130, or the signal itself, which a
    /// shell reports as 130.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        use std::os::unix::process::ExitStatusExt as _;
        self.code() == Some(130) || self.status.signal() == Some(Signal::SIGINT as i32)
    }

    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        text(&self.stdout)
    }

    /// Claims this exit code.
    ///
    /// # Panics
    /// When it was another; shows what the run said.
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.code(), Some(code), "{self}");
        self
    }

    /// Claims success, and gives the result.
    ///
    /// # Panics
    /// When it failed, or gave no JSON.
    #[must_use]
    pub fn expect_json(&self) -> Value {
        self.expect_code(0).json()
    }

    /// Standard output as the one JSON value that it has to be.
    ///
    /// # Panics
    /// When it is not.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self}"))
    }

    /// Claims a failure as cli.md promises it: exit code, error code, `success: false`, and a
    /// message that names the thing. Gives the message.
    ///
    /// # Panics
    /// When one of them is otherwise.
    pub fn expect_failure(&self, code: i32, error_codes: &[&str], names: &str) -> String {
        let result = self.expect_code(code).json();
        assert_eq!(result["success"], false, "{self}");
        let error = &result["error"];
        let field = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        assert!(
            error_codes.contains(&field("code").as_str()),
            "error.code in {self}"
        );
        let message = field("message");
        assert!(
            message.contains(names),
            "{message:?} does not name {names:?} in {self}"
        );
        assert!(
            self.stderr.contains(names),
            "standard error does not name {names:?} in {self}"
        );
        message
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            status,
            arguments,
            elapsed,
            stderr,
            ..
        } = self;
        let stdout = self.text();
        write!(
            f,
            "kvm-clone-ctl {arguments}\n{status} after {elapsed:?}\n{stdout}\n{stderr}"
        )
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
