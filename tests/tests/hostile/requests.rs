//! Hostile controllers: requests that make no sense are refused, and what there is goes on.

use kvm_clone_protocol::digest::{HashKind, Seed};
use kvm_clone_protocol::message::*;
use kvm_clone_protocol::preamble::SUPPORTED;
use kvm_clone_protocol::units::MAX_DISK_SIZE;
use kvm_clone_tests::hostile::agent::Agent;
use kvm_clone_tests::hostile::frames::{end, message, raw, settled};
use kvm_clone_tests::hostile::ground::{BLOCKS, Ground};
use kvm_clone_tests::hostile::link::Link;
use kvm_clone_tests::hostile::trial::{Onto, Trial, params, start};

use super::{Story, block, tell};

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
            location: Location::Path(path),
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
                location: Location::Path(disk.to_vec()),
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
            "a summary of no disk",
            Protocol,
            message(&Summarize {
                disk: 7,
                size: 1,
                hash: HashKind::Xxh3,
                seed: Seed([0; 32]),
            }),
        ),
        (
            "a summary of a destination",
            Protocol,
            message(&Summarize {
                disk: 0,
                size: 1,
                hash: HashKind::Xxh3,
                seed: Seed([0; 32]),
            }),
        ),
        (
            "a preserve of no disk",
            Protocol,
            message(&Preserve {
                disk: 7,
                path: b"/d".to_vec(),
            }),
        ),
        (
            "a preserve before the session",
            Protocol,
            message(&Preserve {
                disk: 0,
                path: b"/d".to_vec(),
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
