//! The real agent, with a controller that it should not trust.

use std::ffi::OsString;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_clone_protocol::message::{
    Access, Alive, Control, Failed, FailureCode, Hello, Listen, Listening, Location, Message, Open,
    Opened, Welcome,
};
use kvm_clone_protocol::preamble::{Preamble, SUPPORTED};

use super::MEMORY;
use super::connection::{self, Incoming};
use super::watch::Watch;
use crate::process::built;

/// How often an agent hears of its controller.
const BEAT: Duration = Duration::from_secs(5);

/// The agent that was built beside the running test, or that `KVM_CLONE_AGENT` names.
///
/// # Panics
/// When it is not there.
#[must_use]
pub fn binary() -> PathBuf {
    built("kvm-clone-agent", "KVM_CLONE_AGENT")
}

/// An agent that serves a test.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    stdin: Option<ChildStdin>,
    incoming: Incoming,
    stderr: JoinHandle<String>,
    watch: Watch,
    numbers: u32,
    /// When it last heard of its controller.
    said: Instant,
}

/// How an agent ended.
#[derive(Debug)]
pub struct End {
    pub status: ExitStatus,
    pub stderr: String,
}

impl Agent {
    /// Starts an agent, and says nothing to it.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start() -> Self {
        let mut child = command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the agent can be executed");
        let stdout = child.stdout.take().expect("piped");
        let mut stderr = child.stderr.take().expect("piped");
        Self {
            stdin: child.stdin.take(),
            incoming: Incoming::start(stdout),
            stderr: std::thread::spawn(move || {
                let mut text = Vec::new();
                // What was said before a failure counts all the same.
                let _ = stderr.read_to_end(&mut text);
                String::from_utf8_lossy(&text).into_owned()
            }),
            watch: Watch::start(child.id()),
            numbers: 0,
            said: Instant::now(),
            child,
        }
    }

    /// An agent that has said welcome. Its memory counts from here on: before, it has read its own
    /// executable.
    #[must_use]
    pub fn greeted() -> Self {
        let mut agent = Self::start();
        let _ = agent.greet();
        agent.watch.forget(agent.child.id());
        agent
    }

    /// Says what a controller says first.
    ///
    /// # Panics
    /// When it is not answered.
    pub fn greet(&mut self) -> Welcome {
        self.write(&Preamble::of_this_build(SUPPORTED).encode());
        self.send(&Hello {
            release: "hostile".to_owned(),
            version: SUPPORTED.max,
        });
        let _ = self.incoming.preamble();
        match self.next() {
            Some(Control::Welcome(welcome)) => welcome,
            other => panic!("expected a welcome, got {other:?}"),
        }
    }

    /// A number that no disk and no link of its has.
    pub fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers - 1
    }

    /// Reads the agent's preamble.
    #[must_use]
    pub fn preamble(&mut self) -> Preamble {
        self.incoming.preamble()
    }

    /// Writes any bytes; false when the agent reads no more.
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        self.said = Instant::now();
        match &mut self.stdin {
            Some(stdin) => connection::write(stdin, bytes),
            None => false,
        }
    }

    /// Sends a message.
    ///
    /// # Panics
    /// When it does not fit a frame.
    pub fn send(&mut self, message: &impl Message) -> bool {
        let frame = message.frame().expect("the message fits a frame");
        self.write(&frame.encode())
    }

    /// What it says next, signs of life and of progress apart; `None` when it has ended. Gives
    /// signs of life meanwhile.
    ///
    /// # Panics
    /// When it says something that is no message.
    #[must_use]
    #[expect(
        clippy::should_implement_trait,
        reason = "it waits for a peer, which is no iteration"
    )]
    pub fn next(&mut self) -> Option<Control> {
        loop {
            if let Some(said) = self.next_within(BEAT) {
                return said;
            }
        }
    }

    /// The same, `Some(None)` when it has ended; `None` when nothing came in time.
    ///
    /// # Panics
    /// When it says something that is no message.
    #[must_use]
    pub fn next_within(&mut self, limit: Duration) -> Option<Option<Control>> {
        loop {
            if self.said.elapsed() > BEAT {
                self.send(&Alive {});
            }
            let Some(frame) = self.incoming.next_within(limit)? else {
                return Some(None);
            };
            match Control::read(&frame).expect("the agent speaks the protocol") {
                Control::Alive(_) | Control::Progress(_) => {}
                message => return Some(Some(message)),
            }
        }
    }

    /// The failure that it says next.
    ///
    /// # Panics
    /// When it says anything else.
    #[must_use]
    pub fn failure(&mut self) -> Failed {
        match self.next() {
            Some(Control::Failed(failed)) => failed,
            other => panic!("expected a failure, got {other:?}"),
        }
    }

    /// Claims that the next thing it says is this failure.
    ///
    /// # Panics
    /// When it is not.
    pub fn expect(&mut self, code: FailureCode) -> Failed {
        let failed = self.failure();
        assert_eq!(failed.code, code, "{failed:?}");
        failed
    }

    /// Has a disk opened.
    ///
    /// # Panics
    /// When it is not.
    pub fn open(&mut self, disk: u32, path: &std::path::Path, access: Access) -> Opened {
        self.send(&Open {
            disk,
            location: Location::Path(path.as_os_str().as_encoded_bytes().to_vec()),
            access,
        });
        match self.next() {
            Some(Control::Opened(opened)) => opened,
            other => panic!("expected an open disk, got {other:?}"),
        }
    }

    /// Has it listen.
    ///
    /// # Panics
    /// When it does not.
    pub fn listen(&mut self, link: u32) -> Listening {
        self.send(&Listen {
            link,
            version: SUPPORTED.max,
        });
        match self.next() {
            Some(Control::Listening(listening)) => listening,
            other => panic!("expected a listener, got {other:?}"),
        }
    }

    /// Gives signs of life for so long, and nothing else.
    pub fn idle(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            self.send(&Alive {});
            std::thread::sleep(BEAT.min(deadline.saturating_duration_since(Instant::now())));
        }
    }

    /// Reads nothing more of what it says.
    pub fn deafen(&mut self) {
        self.incoming.deafen();
    }

    /// Whether it has ended by itself.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn has_ended(&mut self) -> bool {
        let status = self.child.try_wait().expect("the agent is a child");
        status.is_some()
    }

    /// Stops it where it is, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Hangs up, and claims that it ends in order, without a word and within its memory.
    ///
    /// # Panics
    /// When it does not.
    pub fn leave(self) {
        let end = self.end();
        assert!(end.status.success(), "{end:?}");
        assert_eq!(end.stderr, "");
    }

    /// Claims that it has said a failure with this code, or can say nothing any more, and ended
    /// by itself.
    ///
    /// # Panics
    /// When it does not.
    pub fn expect_end(mut self, code: FailureCode) -> End {
        let mut said = None;
        while let Some(message) = self.next() {
            if let Control::Failed(failed) = message {
                said = Some(failed);
            }
        }
        let failed = said.expect("an agent that ends says why");
        assert_eq!(failed.code, code, "{failed:?}");
        let end = self.end();
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        end
    }

    /// Hangs up, and waits for the end.
    ///
    /// # Panics
    /// When it hangs, panics, or took too much memory.
    pub fn end(mut self) -> End {
        drop(self.stdin.take());
        let status = self.child.wait().expect("the agent is a child");
        let (hung, peak) = self.watch.stop();
        let stderr = self.stderr.join().expect("a thread that reads");
        let end = End { status, stderr };
        assert!(!hung, "the agent hung: {end:?}");
        assert!(!end.stderr.contains("panicked"), "{end:?}");
        assert!(peak < MEMORY, "the agent took {peak} bytes: {end:?}");
        end
    }
}

/// `kvm-clone-agent serve`, which keeps its notes of unfinished runs to itself: root's would lie in
/// `/var/lib/kvm-clone`.
fn command() -> Command {
    private(binary().into(), &["serve"])
}

/// A program in a mount namespace in which the agents' own directory is empty.
#[must_use]
pub fn private(program: OsString, args: &[&str]) -> Command {
    const ROOM: &str = r#"d=/var/lib/kvm-clone; mkdir -p "$d" &&
        mount -t tmpfs -o mode=0700 none "$d" && exec "$@""#;
    let mut command;
    if nix::unistd::geteuid().is_root() {
        command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", ROOM, "sh"]);
        command.arg(program);
    } else {
        command = Command::new(program);
        command.env("XDG_STATE_HOME", std::env::temp_dir().join("kc-state"));
    }
    command.args(args);
    command
}
