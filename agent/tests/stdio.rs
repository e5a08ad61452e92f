//! The real agent over pipes: what it does with a controller that makes sense, and with others.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not see as such"
)]

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use kvm_clone_protocol::frame;
use kvm_clone_protocol::message::{
    Access, ApplyChoice, Commit, Control, Credit, FailureCode, Hello, IoChoice, Listen, Listening,
    Location, Message, Open, Prepare, Role, SessionParams, Start,
};
use kvm_clone_protocol::preamble::{self, MAGIC, Preamble, SUPPORTED, Versions};

const DEADLINE: Duration = Duration::from_secs(20);

/// An agent that serves this test.
struct Agent {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    buffer: BytesMut,
}

fn command(args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_kvm-clone-agent"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

impl Agent {
    fn start() -> Self {
        let mut child = command(&["serve"]);
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        Self {
            child,
            stdin,
            stdout,
            buffer: BytesMut::new(),
        }
    }

    /// An agent that has said welcome.
    fn greeted() -> Self {
        let mut agent = Self::start();
        agent.write(&Preamble::of_this_build(SUPPORTED).encode());
        let hello = Hello {
            release: "test".to_owned(),
            version: SUPPORTED.max,
        };
        agent.send(&hello);
        agent.read_preamble();
        assert!(matches!(agent.next(), Some(Control::Welcome(_))));
        agent
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    fn send(&mut self, message: &impl Message) {
        self.write(&message.frame().unwrap().encode());
    }

    fn fill(&mut self) -> bool {
        let mut bytes = [0; 4096];
        let n = self.stdout.read(&mut bytes).unwrap();
        self.buffer.extend_from_slice(&bytes[..n]);
        n > 0
    }

    fn read_preamble(&mut self) -> Preamble {
        loop {
            if let Some((preamble, noise)) = preamble::find(&mut self.buffer).unwrap() {
                assert!(
                    noise.is_empty(),
                    "the agent's output carries the protocol alone"
                );
                return preamble;
            }
            assert!(self.fill(), "the agent ended without a preamble");
        }
    }

    fn next(&mut self) -> Option<Control> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer).unwrap() {
                return Some(Control::read(&frame).unwrap());
            }
            if !self.fill() {
                return None;
            }
        }
    }

    fn failure(&mut self) -> (FailureCode, String) {
        match self.next() {
            Some(Control::Failed(failed)) => (failed.code, failed.message),
            other => panic!("expected a failure, got {other:?}"),
        }
    }

    /// Hangs up, and waits for the end.
    fn end(mut self) -> (ExitStatus, String) {
        drop(self.stdin.take());
        wait(self.child)
    }
}

fn wait(mut child: Child) -> (ExitStatus, String) {
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > DEADLINE {
            child.kill().unwrap();
            panic!("the agent did not end");
        }
        std::thread::yield_now();
    };
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    (status, stderr)
}

#[test]
fn it_ends_with_its_input() {
    let (status, stderr) = Agent::greeted().end();
    assert!(status.success(), "{stderr}");
    assert_eq!(stderr, "");
}

#[test]
fn what_is_no_controller_is_told_so() {
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"", &MAGIC] {
        let mut agent = Agent::start();
        agent.write(garbage);
        let (status, stderr) = agent.end();
        assert_eq!(status.code(), Some(1));
        assert!(stderr.contains("preamble"), "{stderr}");
    }
}

#[test]
fn a_controller_of_another_time_is_told_both_ranges() {
    let mut agent = Agent::start();
    let versions = Versions { min: 900, max: 901 };
    agent.write(&Preamble { versions, build: 0 }.encode());
    assert_eq!(agent.read_preamble().versions, SUPPORTED);
    let (status, stderr) = agent.end();
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("900 to 901"), "{stderr}");
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_agent_lives_on() {
    let mut agent = Agent::greeted();
    let prepare = Prepare {
        disk: 7,
        reread: false,
    };
    agent.send(&prepare);
    assert_eq!(agent.failure().0, FailureCode::Protocol);
    agent.send(&Commit { disks: vec![7] });
    assert_eq!(agent.failure().0, FailureCode::Protocol);
    agent.send(&Open {
        disk: 0,
        location: Location::Path(b"relative".to_vec()),
        access: Access::Source,
    });
    assert_eq!(agent.failure().0, FailureCode::Refused);
    agent.send(&Open {
        disk: 0,
        location: Location::Path(b"/no/such/disk".to_vec()),
        access: Access::Source,
    });
    let (code, message) = agent.failure();
    assert_eq!(code, FailureCode::NotFound);
    assert!(message.contains("/no/such/disk"), "{message}");
    let (status, stderr) = agent.end();
    assert!(status.success(), "{stderr}");
}

#[test]
fn a_destination_takes_its_name_only_after_a_session_that_ended_well() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let mut agent = Agent::greeted();
    agent.send(&Open {
        disk: 0,
        location: Location::Path(path.as_os_str().as_encoded_bytes().to_vec()),
        access: Access::Destination,
    });
    assert!(matches!(agent.next(), Some(Control::Opened(_))));
    agent.send(&Prepare {
        disk: 0,
        reread: false,
    });
    assert_eq!(agent.failure().0, FailureCode::Protocol);
    agent.send(&Commit { disks: vec![0] });
    assert_eq!(agent.failure().0, FailureCode::Protocol);
    assert!(agent.end().0.success());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_session_needs_an_open_disk_and_a_link() {
    let mut agent = Agent::greeted();
    let params = SessionParams {
        size: 1,
        hash: kvm_clone_protocol::digest::HashKind::Xxh3,
        seed: kvm_clone_protocol::digest::Seed([0; 32]),
        compare: true,
        ship: true,
    };
    let start = Start {
        disk: 0,
        link: 0,
        links: 1,
        role: Role::Sender,
        params,
        compression: kvm_clone_protocol::message::Compression::Off,
        rate_limit: 0,
        apply: ApplyChoice::Inplace,
        stage_dir: Vec::new(),
        full_scan: false,
        keep_sent: None,
        io: IoChoice::Auto,
        nice: false,
        read_limit: 0,
    };
    agent.send(&start);
    assert_eq!(agent.failure().0, FailureCode::Protocol);
    let absurd = SessionParams {
        size: u64::MAX,
        ..params
    };
    agent.send(&Start {
        params: absurd,
        ..start
    });
    assert_eq!(agent.failure().0, FailureCode::Protocol);
}

#[test]
fn a_link_of_a_version_that_is_not_spoken_is_refused() {
    let mut agent = Agent::greeted();
    agent.send(&Listen {
        link: 0,
        version: SUPPORTED.max + 1,
    });
    let (code, message) = agent.failure();
    assert_eq!(code, FailureCode::Protocol);
    assert!(message.contains("version"), "{message}");
}

#[test]
fn data_on_the_control_connection_ends_it() {
    let mut agent = Agent::greeted();
    agent.send(&Credit { consumed: 1 });
    assert_eq!(agent.failure().0, FailureCode::Protocol);
    assert_eq!(agent.next(), None);
    assert_eq!(agent.end().0.code(), Some(1));
}

fn listen(agent: &mut Agent) -> Listening {
    agent.send(&Listen {
        link: 0,
        version: SUPPORTED.max,
    });
    match agent.next() {
        Some(Control::Listening(listening)) => listening,
        other => panic!("expected a listener, got {other:?}"),
    }
}

/// What `attach` gives on its output after this token, until it ends or says a preamble.
fn attached(listening: &Listening, token: &str) -> Vec<u8> {
    let mut child = command(&["attach", &listening.name]);
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(token.as_bytes()).unwrap();
    let mut output = [0; preamble::PREAMBLE_LEN];
    let mut stdout = child.stdout.take().unwrap();
    let mut filled = 0;
    while filled < output.len() {
        match stdout.read(&mut output[filled..]).unwrap() {
            0 => break,
            n => filled += n,
        }
    }
    drop((stdin, stdout));
    wait(child);
    output[..filled].to_vec()
}

#[test]
fn only_the_right_token_attaches() {
    let mut agent = Agent::greeted();
    let listening = listen(&mut agent);
    let hex: String = listening
        .token
        .0
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let wrong = if hex.starts_with('0') {
        hex.replacen('0', "1", 1)
    } else {
        "0".repeat(32)
    };
    assert_eq!(attached(&listening, &(wrong + "\n")), b"");
    assert_eq!(
        attached(&listening, "no token at all, but some 33 bytes of it"),
        b""
    );
    let mut output = BytesMut::from(&attached(&listening, &(hex.clone() + "\n"))[..]);
    assert!(
        preamble::find(&mut output).unwrap().is_some(),
        "the right one opens the connection"
    );
    assert!(!output.has_remaining());
    assert_eq!(
        attached(&listening, &(hex + "\n")),
        b"",
        "and is good for once"
    );
}

#[test]
fn an_agent_that_is_killed_takes_its_attached_processes_with_it() {
    let mut agent = Agent::greeted();
    let listening = listen(&mut agent);
    let mut child = command(&["attach", &listening.name]);
    let hex: String = listening
        .token
        .0
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    child
        .stdin
        .as_mut()
        .unwrap()
        .write_all((hex + "\n").as_bytes())
        .unwrap();
    let mut preamble = [0; preamble::PREAMBLE_LEN];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut preamble)
        .unwrap();
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    wait(child);
}
