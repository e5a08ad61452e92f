//! An agent, and what a controller says to it and hears of it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use kvm_clone_protocol::frame;
use kvm_clone_protocol::message::{
    Alive, Control, Failed, Fate, Hello, Leftover, Message, Recover, Recovery,
};
use kvm_clone_protocol::preamble::{self, Preamble, SUPPORTED};
use kvm_clone_tests::process::wait_for;

use crate::ground::Ground;
use crate::program::with_faults;

/// Longer than any silence that an agent bears.
const DEADLINE: Duration = Duration::from_secs(60);

/// How often the agent hears that its controller lives.
const BEAT: Duration = Duration::from_secs(3);

/// A running agent.
pub(crate) struct Agent {
    child: Child,
    /// Shared with a thread that says from time to time that the controller lives.
    stdin: Arc<Mutex<Option<ChildStdin>>>,
    is_silent: Arc<AtomicBool>,
    heard: Receiver<Control>,
    stderr: PathBuf,
}

/// Why an agent gave no answer.
#[derive(Debug)]
pub(crate) enum Broken {
    /// It said that something failed.
    Failed(Failed),
    /// It is gone.
    Gone,
}

impl Agent {
    /// An agent that has said welcome, with these faults.
    pub(crate) fn start(ground: &Ground, faults: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let stderr = ground.path(&format!("stderr-{number}"));
        let mut child = Command::new(with_faults())
            .arg("serve")
            .env("KVM_CLONE_FAULTS", faults)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        let stdin = Arc::new(Mutex::new(child.stdin.take()));
        let stdout = child.stdout.take().unwrap();
        let (to, heard) = channel();
        std::thread::spawn(move || listen(stdout, &to));
        let mut agent = Self {
            child,
            stdin,
            is_silent: Arc::default(),
            heard,
            stderr,
        };
        agent.write(&Preamble::of_this_build(SUPPORTED).encode());
        agent.send(&Hello {
            release: "test".to_owned(),
            version: SUPPORTED.max,
        });
        match agent.next() {
            Some(Control::Welcome(_)) => {
                let stdin = Arc::clone(&agent.stdin);
                let is_silent = Arc::clone(&agent.is_silent);
                std::thread::spawn(move || beat(&stdin, &is_silent));
                agent
            }
            other => panic!("expected a welcome, got {other:?}: {}", agent.said()),
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        // One that is gone is noticed where its answer is missing.
        let _ = self
            .stdin
            .lock()
            .unwrap()
            .as_mut()
            .unwrap()
            .write_all(bytes);
    }

    pub(crate) fn send(&mut self, message: &impl Message) {
        self.write(&message.frame().unwrap().encode());
    }

    /// What it says next that matters; `None` when it is gone.
    pub(crate) fn next(&mut self) -> Option<Control> {
        loop {
            match self.heard.recv_timeout(DEADLINE) {
                Ok(Control::Alive(_) | Control::Progress(_) | Control::Warning(_)) => {}
                Ok(said) => return Some(said),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the agent is silent for {DEADLINE:?}: {}", self.said())
                }
            }
        }
    }

    /// The answer to a request.
    pub(crate) fn answer(&mut self) -> Result<Control, Broken> {
        match self.next() {
            Some(Control::Failed(failed)) => Err(Broken::Failed(failed)),
            Some(said) => Ok(said),
            None => Err(Broken::Gone),
        }
    }

    /// Has it see to what broken runs have left.
    pub(crate) fn recover(&mut self, recovery: Recovery) -> Result<Vec<Fate>, Broken> {
        self.send(&Recover { recovery });
        let mut fates = Vec::new();
        loop {
            match self.answer()? {
                Control::Leftover(Leftover { fate, .. }) => fates.push(fate),
                Control::Recovered(_) => return Ok(fates),
                other => panic!("expected what is left, got {other:?}"),
            }
        }
    }

    /// What it said on standard error.
    pub(crate) fn said(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    /// From now on it hears nothing but requests.
    pub(crate) fn falls_silent(&mut self) {
        self.is_silent.store(true, Ordering::Relaxed);
    }

    /// Hangs up, and waits for the end.
    pub(crate) fn end(self) -> (ExitStatus, String) {
        self.stdin.lock().unwrap().take();
        self.ends_by_itself()
    }

    /// Waits for the end.
    pub(crate) fn ends_by_itself(mut self) -> (ExitStatus, String) {
        let status = wait_for("the end of the agent", DEADLINE, || {
            self.child.try_wait().unwrap()
        });
        (status, self.said())
    }

    /// Waits for the end of one that was killed. Gives what it said on standard error.
    pub(crate) fn killed(self) -> String {
        let (status, said) = self.end();
        assert_eq!(status.signal(), Some(9), "{status}: {said}");
        said
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.stderr);
        self.stdin.lock().unwrap().take();
    }
}

/// Keeps the agent from taking a test that waits for the machine for one that is gone.
fn beat(stdin: &Mutex<Option<ChildStdin>>, is_silent: &AtomicBool) {
    let beat = Alive {}.frame().unwrap().encode();
    while !is_silent.load(Ordering::Relaxed) {
        std::thread::sleep(BEAT);
        let mut stdin = stdin.lock().unwrap();
        let Some(stdin) = stdin.as_mut() else { return };
        if stdin.write_all(&beat).is_err() {
            return;
        }
    }
}

/// Passes on what comes, until it ends or nobody wants it.
fn listen(mut stdout: ChildStdout, to: &Sender<Control>) {
    let mut buffer = BytesMut::new();
    let mut greeted = false;
    let mut bytes = [0; 4096];
    loop {
        greeted = greeted || preamble::find(&mut buffer).unwrap().is_some();
        while greeted && let Some(frame) = frame::decode(&mut buffer).unwrap() {
            if to.send(Control::read(&frame).unwrap()).is_err() {
                return;
            }
        }
        match stdout.read(&mut bytes) {
            Ok(0) | Err(_) => return,
            Ok(n) => buffer.extend_from_slice(&bytes[..n]),
        }
    }
}

/// The path as it travels.
pub(crate) fn bytes_of(path: &Path) -> Vec<u8> {
    path.as_os_str().as_encoded_bytes().to_vec()
}
