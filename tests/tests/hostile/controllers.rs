//! Hostile controllers: what ends an agent.

use std::time::{Duration, Instant};

use kvm_clone_protocol::digest::Digest;
use kvm_clone_protocol::frame::FrameKind;
use kvm_clone_protocol::message::*;
use kvm_clone_protocol::preamble::{MAGIC, MAX_NOISE, Preamble, SUPPORTED, Versions};
use kvm_clone_tests::hostile::agent::Agent;
use kvm_clone_tests::hostile::frames::{credit, end, frame, head, message, raw, settled};
use kvm_clone_tests::hostile::ground::Ground;

use super::{Story, block, broken_frames, tell};

/// A controller that says nothing is given up after 20 s, and after 30 s before its hello.
const SILENCE: Duration = Duration::from_secs(40);

fn hello(version: u16) -> Vec<u8> {
    message(&Hello {
        release: "hostile".to_owned(),
        version,
    })
}

/// What only agents say.
fn answers() -> Vec<Story> {
    use FailureCode::Protocol;
    let text = || "hostile".to_owned();
    let counters = Counters::default();
    let welcome = Welcome {
        release: text(),
        arch: text(),
        agent_digest: [0; 32],
        boot_id: text(),
        aes: true,
        uid: 0,
        processors: 2,
    };
    let opened = Opened {
        disk: 0,
        kind: DiskKind::File,
        size: 0,
        identity: None,
        resumed: false,
        storage: Vec::new(),
        keeps: None,
    };
    let listening = Listening {
        link: 0,
        name: text(),
        token: Token([0; 16]),
    };
    let started = Started {
        disk: 0,
        apply: None,
        resumed: false,
    };
    let ended = Ended {
        disk: 0,
        counters,
        first_difference: None,
        root: Some(Digest([0; 16])),
    };
    let failed = Failed {
        code: FailureCode::Internal,
        disk: None,
        offset: None,
        message: text(),
    };
    let leftover = Leftover {
        path: vec![b'/'; 60_000],
        fate: Fate::Stuck,
        message: text(),
    };
    let warning = Warning {
        disk: None,
        message: text(),
    };
    vec![
        ("a welcome", Protocol, message(&welcome)),
        ("an open disk", Protocol, message(&opened)),
        ("a listener", Protocol, message(&listening)),
        ("a link", Protocol, message(&Dialed { link: 0 })),
        ("a session", Protocol, message(&started)),
        (
            "progress",
            Protocol,
            message(&Progress { disk: 0, counters }),
        ),
        ("the end of a session", Protocol, message(&ended)),
        (
            "a prepared disk",
            Protocol,
            message(&Prepared {
                disk: 0,
                root: None,
            }),
        ),
        (
            "a summary",
            Protocol,
            message(&Summary {
                disk: 0,
                root: Digest([0; 16]),
            }),
        ),
        (
            "a preserved disk",
            Protocol,
            message(&Preserved { disk: 0 }),
        ),
        (
            "a committed disk",
            Protocol,
            message(&Committed { disks: vec![0] }),
        ),
        ("a failure", Protocol, message(&failed)),
        ("a warning", Protocol, message(&warning)),
        ("a leftover with a long name", Protocol, message(&leftover)),
        ("the end of recovery", Protocol, message(&Recovered {})),
    ]
}

/// What is no frame of a control connection.
fn misplaced() -> Vec<Story> {
    use FailureCode::Protocol;
    let open = |bytes: &[u8]| frame(FrameKind::Open, bytes, &[]);
    vec![
        ("a second hello", Protocol, hello(SUPPORTED.max)),
        ("a second preamble", Protocol, MAGIC.to_vec()),
        ("credit", Protocol, credit(0)),
        ("a block", Protocol, raw(0, &block())),
        ("settled", Protocol, settled(0)),
        ("the end", Protocol, end([0; 16])),
        (
            "a payload behind a request",
            Protocol,
            frame(FrameKind::Commit, &[0], b"x"),
        ),
        ("a request without meta", Protocol, open(&[])),
        (
            "a request with a byte left over",
            Protocol,
            open(&[0, 1, b'/', 0, 0]),
        ),
        (
            "access that does not exist",
            Protocol,
            open(&[0, 1, b'/', 9]),
        ),
        (
            "a path that is longer than the frame",
            Protocol,
            open(&[0, 0xff, 0x7f, b'/']),
        ),
        (
            "a path of 2^63 bytes",
            Protocol,
            open(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
        ),
        (
            "2^63 disks to commit",
            Protocol,
            frame(
                FrameKind::Commit,
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
                &[],
            ),
        ),
        (
            "a bool that is neither",
            Protocol,
            frame(FrameKind::Prepare, &[0, 2], &[]),
        ),
        (
            "text that is none",
            Protocol,
            frame(FrameKind::Abort, &[2, 0xc3, 0x28], &[]),
        ),
    ]
}

#[test]
fn a_controller_that_breaks_a_rule_ends_the_agent() {
    let of_links = [
        "a hello on a data connection",
        "an abort on a data connection",
    ];
    let frames = broken_frames().into_iter();
    let frames = frames
        .filter(|(name, ..)| *name != "a commit on a data connection" && !of_links.contains(name));
    for (name, code, bytes) in answers().into_iter().chain(misplaced()).chain(frames) {
        tell(name, "controller");
        let ground = Ground::longer();
        let mut agent = Agent::greeted();
        agent.open(0, &ground.disk(), Access::Destination);
        agent.write(&bytes);
        let end = agent.expect_end(code);
        assert!(
            end.stderr.lines().count() == 1 && end.stderr.len() < 300,
            "{end:?}"
        );
        ground.assert_untouched();
    }
}

#[test]
fn what_does_not_open_a_control_connection_ends_the_agent() {
    use FailureCode::{LinkLost, Protocol};
    let versions = |min, max| {
        Preamble {
            versions: Versions { min, max },
            build: 0,
        }
        .encode()
        .to_vec()
    };
    let good = || Preamble::of_this_build(SUPPORTED).encode().to_vec();
    let preserve = Preserve {
        disk: 0,
        path: b"/delta".to_vec(),
    };
    let then = |frame: Vec<u8>| [good(), frame].concat();
    let stories: Vec<Story> = vec![
        ("nothing", LinkLost, Vec::new()),
        ("half a preamble", LinkLost, MAGIC.to_vec()),
        (
            "a request of another protocol",
            LinkLost,
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        ),
        (
            "a banner without end",
            LinkLost,
            b"Welcome to hv1!\n".repeat(MAX_NOISE),
        ),
        ("versions of another time", Protocol, versions(900, 901)),
        ("an impossible range", Protocol, versions(3, 2)),
        ("no hello", LinkLost, good()),
        (
            "a hello of another version",
            Protocol,
            then(hello(SUPPORTED.max + 1)),
        ),
        ("a hello of no version", Protocol, then(hello(0))),
        (
            "a request first",
            Protocol,
            then(message(&Commit { disks: vec![0] })),
        ),
        ("a sign of life first", Protocol, then(message(&Alive {}))),
        (
            "a request of a newer version",
            Protocol,
            [versions(2, 2), hello(2), message(&preserve)].concat(),
        ),
        ("half a hello", LinkLost, then(hello(2)[..5].to_vec())),
        ("no frame", Protocol, then(head(u32::MAX, 1, 0, 0))),
    ];
    for (name, code, bytes) in stories {
        tell(name, "opening");
        let mut agent = Agent::start();
        agent.write(&bytes);
        let end = agent.end();
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        let expected = match code {
            LinkLost => ["preamble", "hung up", "broke"].as_slice(),
            _ => &["version", "hello", "limit"],
        };
        assert!(
            expected.iter().any(|word| end.stderr.contains(word)),
            "{end:?}"
        );
        assert!(end.stderr.len() < 400, "{end:?}");
    }
}

#[test]
fn a_preamble_in_pieces_opens_a_control_connection() {
    let mut agent = Agent::start();
    let bytes = [
        &Preamble::of_this_build(SUPPORTED).encode()[..],
        &hello(SUPPORTED.max),
    ]
    .concat();
    for byte in bytes {
        agent.write(&[byte]);
    }
    let _ = agent.preamble();
    assert!(matches!(agent.next(), Some(Control::Welcome(_))));
    agent.leave();
}

#[test]
fn a_controller_that_is_silent_is_given_up() {
    /// What it still says, and then.
    type Silence = (&'static str, bool, Vec<u8>, Vec<u8>);
    let preamble = Preamble::of_this_build(SUPPORTED).encode().to_vec();
    let silences: [Silence; 6] = [
        ("before its preamble", false, Vec::new(), Vec::new()),
        (
            "in its preamble",
            false,
            preamble[..10].to_vec(),
            Vec::new(),
        ),
        ("before its hello", false, preamble, Vec::new()),
        ("after its hello", true, Vec::new(), Vec::new()),
        (
            "in a frame",
            true,
            message(&Alive {})[..3].to_vec(),
            Vec::new(),
        ),
        (
            "in a frame, but for signs of life",
            true,
            head(60_000, FrameKind::Open as u8, 0, 60_000),
            message(&Alive {}),
        ),
    ];
    std::thread::scope(|scope| {
        for (name, greeted, start, then) in silences {
            scope.spawn(move || {
                let mut agent = if greeted {
                    Agent::greeted()
                } else {
                    Agent::start()
                };
                let began = Instant::now();
                agent.write(&start);
                while !agent.has_ended() && began.elapsed() < SILENCE {
                    agent.write(&then);
                    std::thread::sleep(Duration::from_millis(500));
                }
                assert!(agent.has_ended(), "{name}: it waits on");
                let end = agent.end();
                assert_eq!(end.status.code(), Some(1), "{name}: {end:?}");
                let expected = ["silent", "hello in time"];
                assert!(
                    expected.iter().any(|why| end.stderr.contains(why)),
                    "{name}: {end:?}"
                );
            });
        }
    });
}
