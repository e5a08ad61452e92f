//! Hostile controllers: what an agent is asked, and in which order.

use std::time::{Duration, Instant};

use kvm_clone_protocol::digest::Digest;
use kvm_clone_protocol::frame::FrameKind;
use kvm_clone_protocol::message::*;
use kvm_clone_protocol::preamble::{MAGIC, MAX_NOISE, Preamble, SUPPORTED, Versions};
use kvm_clone_protocol::units::MAX_DISK_SIZE;
use kvm_clone_tests::hostile::agent::Agent;
use kvm_clone_tests::hostile::frames::{credit, end, frame, head, message, raw, settled};
use kvm_clone_tests::hostile::ground::{BLOCKS, Ground};
use kvm_clone_tests::hostile::link::Link;
use kvm_clone_tests::hostile::trial::{Onto, Trial, params, start};

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
    };
    let opened = Opened {
        disk: 0,
        kind: DiskKind::File,
        size: 0,
        identity: None,
        resumed: false,
        storage: Vec::new(),
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
#[expect(
    clippy::too_many_lines,
    reason = "a table of requests and what each is told"
)]
fn requests_that_make_no_sense_are_refused_one_by_one() {
    use FailureCode::{Io, NotFound, Protocol, Refused};
    let ground = Ground::longer();
    let open = |path: &[u8], access| {
        let path = path.to_vec();
        message(&Open {
            disk: 9,
            path,
            access,
        })
    };
    let begin = |disk, link, role, size| {
        let params = SessionParams {
            size,
            ..params(Onto::Staged)
        };
        message(&Start {
            link,
            ..start(disk, role, params, ApplyChoice::Auto)
        })
    };
    let dial = |link, name: &str, command: Vec<Vec<u8>>| {
        message(&Dial {
            link,
            version: SUPPORTED.max,
            command,
            known_hosts: vec![b'x'; 1000],
            token: Token([0; 16]),
            name: name.to_owned(),
        })
    };
    let disk = ground.disk();
    let disk = disk.as_os_str().as_encoded_bytes();
    let below = [disk, b"/below"].concat();
    let stories: Vec<Story> = vec![
        ("a relative path", Refused, open(b"disk", Access::Source)),
        ("no path", Refused, open(b"", Access::Destination)),
        (
            "a path with a zero byte",
            Io,
            open(b"/a\0b", Access::Source),
        ),
        (
            "a path of 60,000 bytes",
            Io,
            open(&[&b"/"[..], &[0xff; 60_000]].concat(), Access::Source),
        ),
        ("a directory", Refused, open(b"/", Access::Source)),
        (
            "a directory to be made",
            Refused,
            open(b"/tmp/", Access::Destination),
        ),
        (
            "a device that is no disk",
            Refused,
            open(b"/dev/zero", Access::Destination),
        ),
        ("below a file", Io, open(&below, Access::Source)),
        (
            "nothing to read",
            NotFound,
            open(b"/no/such/disk", Access::Compare),
        ),
        (
            "a disk number that is taken",
            Protocol,
            message(&Open {
                disk: 0,
                path: disk.to_vec(),
                access: Access::Source,
            }),
        ),
        (
            "a session on no disk",
            Protocol,
            begin(7, 0, Role::Receiver, 1),
        ),
        (
            "a session on no link",
            Protocol,
            begin(0, 7, Role::Receiver, 1),
        ),
        (
            "a prepare of no disk",
            Protocol,
            message(&Prepare {
                disk: 7,
                reread: false,
            }),
        ),
        (
            "a prepare before the session",
            Protocol,
            message(&Prepare {
                disk: 0,
                reread: true,
            }),
        ),
        (
            "a commit of no disk",
            Protocol,
            message(&Commit { disks: vec![7] }),
        ),
        (
            "a commit of nothing",
            Protocol,
            message(&Commit { disks: Vec::new() }),
        ),
        (
            "a commit before the session",
            Protocol,
            message(&Commit { disks: vec![0] }),
        ),
        (
            "a commit of one disk, twice",
            Protocol,
            message(&Commit { disks: vec![0, 0] }),
        ),
        (
            "a commit of 60,000 disks",
            Protocol,
            message(&Commit {
                disks: vec![0; 60_000],
            }),
        ),
        (
            "a listener of another version",
            Protocol,
            message(&Listen {
                link: 8,
                version: 900,
            }),
        ),
        (
            "a listener with a number that is taken",
            Protocol,
            message(&Listen {
                link: 0,
                version: 2,
            }),
        ),
        (
            "a link with a number that is taken",
            Protocol,
            dial(0, "x", Vec::new()),
        ),
        (
            "a link by a name that is a path",
            Protocol,
            dial(20, "../x", Vec::new()),
        ),
        (
            "a link by a name that is an option",
            Protocol,
            dial(21, "--version", Vec::new()),
        ),
        (
            "a link by no program",
            FailureCode::LinkLost,
            dial(22, "x", vec![Vec::new()]),
        ),
        (
            "a link by a program with a zero byte",
            FailureCode::LinkLost,
            dial(23, "x", vec![b"a\0b".to_vec()]),
        ),
        (
            "a link by 60,000 words",
            FailureCode::LinkLost,
            dial(24, "x", vec![Vec::new(); 60_000]),
        ),
        (
            "a link by a program that says nothing",
            FailureCode::LinkLost,
            dial(25, "x", vec![b"/bin/true".to_vec()]),
        ),
        (
            "a link to nobody",
            FailureCode::LinkLost,
            dial(26, "x", Vec::new()),
        ),
    ];
    let mut agent = Agent::greeted();
    agent.open(0, &ground.disk(), Access::Destination);
    let _ = agent.listen(0);
    for (name, code, bytes) in stories {
        tell(name, "request");
        agent.write(&bytes);
        let failed = agent.expect(code);
        assert!(failed.message.len() < 5000, "{failed:?}");
    }
    agent.leave();
    ground.assert_untouched();
}

#[test]
fn a_session_that_makes_no_sense_is_not_started() {
    let of = |size, apply| {
        start(
            0,
            Role::Receiver,
            SessionParams {
                size,
                ..params(Onto::Staged)
            },
            apply,
        )
    };
    let good = of(1 << 20, ApplyChoice::Staged);
    let level = |level| Start {
        compression: Compression::Level(level),
        ..good.clone()
    };
    let inplace = |size| of(size, ApplyChoice::Inplace);
    let cases = [
        ("2^63 bytes", FailureCode::Protocol, inplace(1 << 63)),
        (
            "a byte too many",
            FailureCode::Protocol,
            inplace(MAX_DISK_SIZE + 1),
        ),
        (
            "more than any file system has",
            FailureCode::NoSpace,
            inplace(MAX_DISK_SIZE),
        ),
        (
            "the other role",
            FailureCode::Protocol,
            Start {
                role: Role::Sender,
                ..good.clone()
            },
        ),
        ("level 0", FailureCode::Protocol, level(0)),
        ("level 20", FailureCode::Protocol, level(20)),
        ("level 255", FailureCode::Protocol, level(255)),
    ];
    for (name, code, start) in cases {
        tell(name, "start");
        let mut agent = Agent::greeted();
        let trial = Trial::open(
            &mut agent,
            Ground::longer(),
            Access::Destination,
            Link::greeted,
        );
        trial.agent.send(&start);
        trial.fails(code);
        agent.leave();
    }
}

#[test]
fn a_disk_that_holds_something_is_not_taken_for_empty() {
    let blind = SessionParams {
        compare: false,
        ..params(Onto::Staged)
    };
    for apply in [ApplyChoice::Staged, ApplyChoice::Inplace] {
        let mut agent = Agent::greeted();
        let ground = Ground::longer();
        let trial = Trial::open(&mut agent, ground, Access::Destination, Link::greeted);
        trial.agent.send(&start(0, Role::Receiver, blind, apply));
        trial.fails(FailureCode::Protocol);
        agent.leave();
    }
    // Nor is what a run has left that broke off.
    let mut agent = Agent::greeted();
    let ground = Trial::receiver(&mut agent, Onto::New).ground;
    agent.kill();
    let _ = agent.end();
    let mut agent = Agent::greeted();
    let trial = Trial::open(&mut agent, ground, Access::Destination, Link::greeted);
    trial
        .agent
        .send(&start(0, Role::Receiver, blind, ApplyChoice::Auto));
    trial.fails(FailureCode::Protocol);
    agent.leave();
}

#[test]
fn a_disk_that_is_only_compared_is_not_changed() {
    let mut agent = Agent::greeted();
    let trial = Trial::open(&mut agent, Ground::longer(), Access::Compare, Link::greeted);
    trial.agent.send(&start(
        0,
        Role::Receiver,
        params(Onto::Inplace),
        ApplyChoice::Inplace,
    ));
    trial.fails(FailureCode::Protocol);
    agent.leave();
}

#[test]
fn a_disk_has_one_session() {
    let mut agent = Agent::greeted();
    let mut trial = Trial::receiver(&mut agent, Onto::Staged);
    let other = Link::greeted(&trial.agent.listen(1));
    let again = start(0, Role::Receiver, params(Onto::Staged), ApplyChoice::Staged);
    trial.agent.send(&Start {
        link: 0,
        ..again.clone()
    });
    trial.agent.expect(FailureCode::Protocol);
    trial.agent.send(&Start { link: 1, ..again });
    trial.agent.expect(FailureCode::Protocol);
    drop(other);
    // The first goes on.
    let root = trial.ground.root(&params(Onto::Staged));
    trial.link.write(&[settled(BLOCKS), end(root)].concat());
    trial.succeeds();
    agent.leave();
}

/// A session that has ended well, and changed a block.
fn changed(agent: &mut Agent) -> Trial<'_> {
    let mut trial = Trial::receiver(agent, Onto::Staged);
    let root = trial.ground.root_with(&params(Onto::Staged), 1, &block());
    trial
        .link
        .write(&[raw(1, &block()), settled(BLOCKS), end(root)].concat());
    trial.succeeds();
    trial
}

#[test]
fn only_a_prepared_disk_is_committed_and_only_once() {
    let mut agent = Agent::greeted();
    let trial = changed(&mut agent);
    let prepare = Prepare {
        disk: trial.disk,
        reread: false,
    };
    let commit = Commit {
        disks: vec![trial.disk],
    };
    trial.agent.send(&commit);
    trial.agent.expect(FailureCode::Protocol);
    trial.assert_kept();
    trial.agent.send(&prepare);
    assert!(matches!(trial.agent.next(), Some(Control::Prepared(_))));
    trial.assert_kept();
    trial.agent.send(&prepare);
    trial.agent.expect(FailureCode::Protocol);
    trial.agent.send(&commit);
    assert!(matches!(trial.agent.next(), Some(Control::Committed(_))));
    trial.agent.send(&commit);
    trial.agent.expect(FailureCode::Protocol);
    trial.ground.assert_beside();
    agent.leave();
}

#[test]
fn disks_that_were_changed_together_are_not_committed_apart() {
    let mut agent = Agent::greeted();
    let one = changed(&mut agent).ground;
    let other = changed(&mut agent).ground;
    for disk in [0, 1] {
        agent.send(&Prepare {
            disk,
            reread: false,
        });
        assert!(matches!(agent.next(), Some(Control::Prepared(_))));
    }
    for disks in [vec![0], vec![1], vec![0, 0], vec![1, 1], vec![0, 1, 2]] {
        tell("some of them", &disks);
        agent.send(&Commit { disks });
        agent.expect(FailureCode::Protocol);
    }
    agent.leave();
    one.assert_untouched();
    other.assert_untouched();
}

#[test]
fn disks_and_links_are_bounded_and_what_there_is_goes_on() {
    let ground = Ground::longer();
    let path = ground.disk().into_os_string().into_encoded_bytes();
    let mut agent = Agent::greeted();
    let (mut opened, mut listening) = (0, 0);
    for number in 0..300 {
        let path = path.clone();
        agent.send(&Open {
            disk: number,
            path,
            access: Access::Compare,
        });
        match agent.next() {
            Some(Control::Opened(_)) => opened += 1,
            Some(Control::Failed(failed)) => assert_eq!(failed.code, FailureCode::Protocol),
            other => panic!("{other:?}"),
        }
    }
    for link in 0..600 {
        agent.send(&Listen {
            link,
            version: SUPPORTED.max,
        });
        match agent.next() {
            Some(Control::Listening(_)) => listening += 1,
            Some(Control::Failed(failed)) => assert_eq!(failed.code, FailureCode::Protocol),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((opened, listening), (256, 512));
    agent.leave();
    ground.assert_untouched();
}

/// Requests, each of which has to be answered, and how many.
type Flood = (&'static str, u32, fn(u32) -> Vec<u8>);

fn floods() -> [Flood; 5] {
    let open = |disk| {
        message(&Open {
            disk,
            path: b"/no/such/disk".to_vec(),
            access: Access::Source,
        })
    };
    [
        ("disks that do not exist", 1_000_000, open),
        ("a disk to be prepared", 1_000_000, |_| {
            message(&Prepare {
                disk: 0,
                reread: false,
            })
        }),
        ("no disk to be prepared", 1_000_000, |disk| {
            message(&Prepare {
                disk,
                reread: false,
            })
        }),
        ("recovery", 1_000_000, |_| {
            message(&Recover {
                recovery: Recovery::List,
            })
        }),
        ("listeners", 1_000_000, |link| {
            message(&Listen { link, version: 2 })
        }),
    ]
}

#[test]
fn a_controller_that_asks_and_does_not_listen_is_given_up() {
    let ground = Ground::longer();
    for (name, count, request) in floods() {
        tell(name, "flood");
        let mut agent = Agent::greeted();
        agent.open(0, &ground.disk(), Access::Destination);
        agent.deafen();
        let went_on = (0..count).all(|number| agent.write(&request(number)));
        let end = agent.end();
        assert!(!went_on, "{name}: all was taken");
        assert_eq!(end.status.code(), Some(1), "{end:?}");
        let expected = ["before an answer", "does not read"];
        assert!(
            expected.iter().any(|why| end.stderr.contains(why)),
            "{end:?}"
        );
    }
    ground.assert_untouched();
}

#[test]
fn what_a_controller_repeats_without_end_takes_no_memory() {
    let mut agent = Agent::greeted();
    let alive = message(&Alive {}).repeat(10_000);
    for _ in 0..100 {
        assert!(agent.write(&alive));
    }
    // Sessions that fail at once, one after the other.
    for number in 0..1000 {
        let _ = agent.listen(number);
        let params = params(Onto::Staged);
        agent.send(&start(0, Role::Receiver, params, ApplyChoice::Auto));
        agent.expect(FailureCode::Protocol);
        if number == 500 {
            break;
        }
    }
    agent.write(&message(&Abort {
        reason: "x".repeat(60_000),
    }));
    let end = agent.end();
    assert!(end.status.success() && end.stderr.is_empty(), "{end:?}");
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
