//! Data connections that do not come into being, break, fall silent or flood.

use std::time::{Duration, Instant};

use kvm_clone_protocol::digest::Digest;
use kvm_clone_protocol::frame::FrameKind;
use kvm_clone_protocol::message::{Access, ApplyChoice, Control, FailureCode, Role, SessionParams};
use kvm_clone_protocol::preamble::{MAGIC, MAX_NOISE, Preamble, SUPPORTED, Versions};
use kvm_clone_tests::hostile::agent::Agent;
use kvm_clone_tests::hostile::frames::{
    Repeated, beat, end, head, holes, raw, settled, zeros, zstd,
};
use kvm_clone_tests::hostile::ground::{BLOCKS, Ground, size_of};
use kvm_clone_tests::hostile::link::{Link, token_line};
use kvm_clone_tests::hostile::trial::{Onto, Trial, params};
use kvm_clone_tests::image::{BLOCK, GIB, MIB};

use super::{Story, block, tell};

/// A peer that is silent is taken for dead after 20 s.
const SILENCE: Duration = Duration::from_secs(30);

/// A link that does not come into being is given up after 30 s.
const SETUP: Duration = Duration::from_secs(40);

fn preamble(min: u16, max: u16) -> Vec<u8> {
    let versions = Versions { min, max };
    Preamble { versions, build: 0 }.encode().to_vec()
}

fn good_preamble() -> Vec<u8> {
    preamble(SUPPORTED.max, SUPPORTED.max)
}

#[test]
fn only_the_right_token_opens_a_link_and_only_once() {
    let mut agent = Agent::greeted();
    let mut trial = Trial::open(
        &mut agent,
        Ground::longer(),
        Access::Destination,
        |listening| {
            let right = token_line(&listening.token);
            let wrong = right.replace(|c: char| c.is_ascii_hexdigit(), "0");
            for token in [&wrong, "\n", "no token at all, but some 33 bytes of it", ""] {
                tell(token.trim(), "token");
                let mut link = Link::attach_with(&listening.name, token);
                link.hang_up();
                link.expect_closed_at_once();
            }
            Link::attach_with("0000", &right).expect_closed_at_once();
            let link = Link::greeted(listening);
            Link::attach_with(&listening.name, &right).expect_closed_at_once();
            link
        },
    );
    trial.start(Role::Receiver, params(Onto::Inplace), ApplyChoice::Inplace);
    trial.link.hear_all(BLOCKS);
    agent.leave();
}

#[test]
fn what_is_no_preamble_opens_no_link() {
    use FailureCode::{LinkLost, Protocol};
    let stories: Vec<Story> = vec![
        ("another version", Protocol, preamble(900, 901)),
        ("an impossible range", Protocol, preamble(3, 2)),
        ("all versions", Protocol, preamble(0, SUPPORTED.max - 1)),
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
        (
            "a preamble behind a banner that is too long",
            LinkLost,
            [vec![b'x'; MAX_NOISE + 1], good_preamble()].concat(),
        ),
    ];
    let mut agent = Agent::greeted();
    for (name, code, bytes) in stories {
        tell(name, "preamble");
        let mut trial = Trial::open(
            &mut agent,
            Ground::longer(),
            Access::Destination,
            Link::attach,
        );
        trial.start(Role::Receiver, params(Onto::Staged), ApplyChoice::Staged);
        trial.link.write(&bytes);
        trial.link.hang_up();
        trial.fails(code);
    }
    agent.leave();
}

#[test]
fn a_preamble_in_pieces_and_behind_a_banner_opens_a_link() {
    let mut agent = Agent::greeted();
    let mut trial = Trial::open(
        &mut agent,
        Ground::longer(),
        Access::Destination,
        |listening| {
            let mut link = Link::attach(listening);
            for byte in [b"Welcome to hv1!\n", &good_preamble()[..]].concat() {
                link.write(&[byte]);
            }
            link.listen();
            link
        },
    );
    trial.start(Role::Receiver, params(Onto::Inplace), ApplyChoice::Inplace);
    trial.link.hear_all(BLOCKS);
    agent.leave();
}

#[test]
fn a_link_that_breaks_is_lost() {
    let stories: [(&str, Vec<u8>); 4] = [
        ("at once", Vec::new()),
        ("in a head", vec![1, 2, 3]),
        ("in a payload", raw(0, &block())[..5000].to_vec()),
        ("behind a frame", settled(3)),
    ];
    let mut agent = Agent::greeted();
    for (name, bytes) in stories {
        for onto in [Onto::Staged, Onto::New, Onto::Inplace] {
            tell(name, onto);
            let mut trial = Trial::receiver(&mut agent, onto);
            trial.link.write(&bytes);
            trial.link.hang_up();
            trial.fails(FailureCode::LinkLost);
        }
        tell(name, "sender");
        let mut trial = Trial::sender(&mut agent);
        trial.link.write(&bytes[..bytes.len().min(3)]);
        trial.link.hang_up();
        trial.fails(FailureCode::LinkLost);
    }
    agent.leave();
}

#[test]
fn a_block_that_comes_before_it_was_told_of_ends_a_receiver() {
    // So much to digest that nothing can have been told of the last block.
    let blocks = 2 * GIB / BLOCK;
    let frames = [
        raw(blocks - 1, &block()),
        zeros(blocks - 1, 1),
        settled(blocks),
    ];
    let mut agent = Agent::greeted();
    for frame in frames {
        let ground = Ground::sparse(blocks, blocks / 2);
        let mut trial = Trial::open(&mut agent, ground, Access::Destination, Link::greeted);
        trial.link.write(&frame);
        let params = SessionParams {
            size: blocks * BLOCK,
            ..params(Onto::Staged)
        };
        trial.start(Role::Receiver, params, ApplyChoice::Staged);
        trial.fails(FailureCode::Protocol);
    }
    agent.leave();
}

/// The end of a session in which nothing was changed.
fn unchanged(trial: &Trial<'_>) -> Vec<u8> {
    let root = trial.ground.root(&params(Onto::Staged));
    [settled(BLOCKS), end(root)].concat()
}

#[test]
fn nothing_may_come_after_the_end() {
    let mut agent = Agent::greeted();
    let after = [
        ("settled", settled(BLOCKS)),
        ("the end", end([0; 16])),
        ("zeros", zeros(0, 1)),
    ];
    for (name, frame) in after {
        tell(name, "after the end");
        let mut trial = Trial::receiver(&mut agent, Onto::Staged);
        // In one write, so that they are there before the agent has agreed.
        let end = unchanged(&trial);
        trial.link.write(&[end, frame].concat());
        trial.fails(FailureCode::Protocol);
    }
    agent.leave();
}

#[test]
fn any_number_of_beats_changes_nothing() {
    let mut agent = Agent::greeted();
    let mut trial = Trial::receiver(&mut agent, Onto::Staged);
    let many = beat().repeat(10_000);
    for _ in 0..100 {
        assert!(trial.link.write(&many));
    }
    let end = unchanged(&trial);
    trial.link.write(&end);
    let ended = trial.succeeds();
    assert_eq!(
        ended.root,
        Some(Digest(trial.ground.root(&params(Onto::Staged))))
    );
    agent.leave();
}

#[test]
fn a_sender_that_ships_all_at_once_and_reads_nothing_does_not_fill_the_memory() {
    let blocks = 64 * MIB / BLOCK;
    let zero = vec![0; size_of(BLOCK)];
    let small = Repeated::new(0, &[64 << 10]).encode();
    type Ship<'a> = &'a dyn Fn(u64) -> Vec<u8>;
    let kinds: [(&str, Ship<'_>); 3] = [
        ("blocks", &|index| raw(index, &zero)),
        ("compressed blocks", &|index| zstd(index, &small)),
        ("zeros", &|index| zeros(index, 1)),
    ];
    for (name, frame) in kinds {
        tell(name, "without credit");
        let mut agent = Agent::greeted();
        let params = SessionParams {
            size: blocks * BLOCK,
            ..params(Onto::New)
        };
        let mut trial = Trial::receiver_with(&mut agent, Onto::New, params, Link::deaf);
        for index in 0..blocks {
            trial.link.write(&frame(index));
        }
        trial.link.write(&end([0; 16]));
        match trial.agent.next() {
            Some(Control::Failed(failed)) => assert!(
                matches!(failed.code, FailureCode::Protocol | FailureCode::Mismatch),
                "{failed:?}"
            ),
            other => panic!("expected a failure, got {other:?}"),
        }
        trial.assert_kept();
        agent.leave();
    }
}

#[test]
fn zeros_over_what_is_no_data_take_no_space() {
    // 16 million blocks that the destination does not even have.
    let size = 1 << 40;
    let params = SessionParams {
        size,
        ..params(Onto::Staged)
    };
    let mut agent = Agent::greeted();
    let mut trial = Trial::receiver_with(&mut agent, Onto::Staged, params, Link::greeted);
    trial.link.hear_all(size / BLOCK);
    let before = trial.ground.allocated();
    trial.link.write(&zeros(0, size / BLOCK));
    trial.link.write(&end([0; 16]));
    let started = Instant::now();
    let failed = trial.agent.expect(FailureCode::Mismatch);
    assert_eq!(failed.disk, Some(trial.disk));
    assert!(started.elapsed() < Duration::from_secs(5));
    let taken = trial.ground.allocated() - before;
    assert!(taken < MIB, "{taken} bytes were taken");
    trial.assert_kept();
    agent.leave();
}

#[test]
fn a_receiver_that_reads_nothing_does_not_fill_a_senders_memory() {
    let blocks = 300_000;
    let params = SessionParams {
        size: blocks * BLOCK,
        ..params(Onto::Staged)
    };
    let mut agent = Agent::greeted();
    let ground = Ground::sparse(blocks, 0);
    let mut trial = Trial::sender_with(&mut agent, ground, params, Link::deaf);
    for index in 0..blocks {
        trial.link.write(&holes(index, 1));
    }
    trial.link.hang_up();
    trial.fails(FailureCode::LinkLost);
    agent.leave();
}

/// Begins with a session that runs; what then does not come is noticed.
type Silence = fn(&mut Agent) -> Trial<'_>;

fn receiver_without_a_word(agent: &mut Agent) -> Trial<'_> {
    Trial::receiver(agent, Onto::Staged)
}

fn sender_without_a_word(agent: &mut Agent) -> Trial<'_> {
    Trial::sender(agent)
}

fn receiver_in_a_frame(agent: &mut Agent) -> Trial<'_> {
    let mut trial = Trial::receiver(agent, Onto::Inplace);
    trial.link.write(&raw(0, &block())[..5000]);
    trial
}

fn without_a_preamble(agent: &mut Agent) -> Trial<'_> {
    let ground = Ground::longer();
    let mut trial = Trial::open(agent, ground, Access::Destination, Link::attach);
    trial.start(Role::Receiver, params(Onto::Staged), ApplyChoice::Staged);
    trial
}

/// A link that is given signs of life which are none.
fn dribbled(agent: &mut Agent, onto: Option<Onto>, start: &[u8], then: &[u8]) -> Duration {
    let mut trial = match onto {
        Some(onto) => Trial::receiver(agent, onto),
        None => Trial::sender(agent),
    };
    let started = Instant::now();
    trial.link.write(start);
    // Until the agent has closed the link.
    while trial.link.write(then) && started.elapsed() < SETUP {
        trial.agent.idle(Duration::from_millis(500));
    }
    let elapsed = started.elapsed();
    trial.fails(FailureCode::LinkLost);
    elapsed
}

#[test]
fn silence_is_noticed_and_so_is_what_sounds_like_life_and_is_none() {
    std::thread::scope(|scope| {
        let silences: [(&str, Silence, Duration); 4] = [
            ("a sender", receiver_without_a_word, SILENCE),
            ("a receiver", sender_without_a_word, SILENCE),
            ("a sender in a frame", receiver_in_a_frame, SILENCE),
            ("a peer without a preamble", without_a_preamble, SETUP),
        ];
        for (name, silence, limit) in silences {
            scope.spawn(move || {
                let mut agent = Agent::greeted();
                let trial = silence(&mut agent);
                let started = Instant::now();
                trial.fails(FailureCode::LinkLost);
                assert!(started.elapsed() < limit, "{name}: {:?}", started.elapsed());
                agent.leave();
            });
        }
        // A length that a broken link has made longer swallows the beats that follow.
        let long = head(60_003, FrameKind::Data as u8, 0, 3);
        let long_digests = head(65_001, FrameKind::Digests as u8, 0, 1);
        let dribbles = [
            (
                "a byte at a time",
                Some(Onto::Staged),
                raw(0, &block()),
                vec![0],
            ),
            ("beats in a block", Some(Onto::Inplace), long, beat()),
            ("beats in digests", None, long_digests, beat()),
        ];
        for (name, onto, start, then) in dribbles {
            scope.spawn(move || {
                let mut agent = Agent::greeted();
                let start = &start[..start.len().min(5000)];
                let elapsed = dribbled(&mut agent, onto, start, &then);
                assert!(elapsed < SILENCE, "{name}: {elapsed:?}");
                agent.leave();
            });
        }
        scope.spawn(|| {
            // Nobody could have said anything before.
            let mut agent = Agent::greeted();
            let ground = Ground::longer();
            let mut trial = Trial::open(&mut agent, ground, Access::Destination, Link::greeted);
            trial.agent.idle(Duration::from_secs(22));
            trial.start(Role::Receiver, params(Onto::Staged), ApplyChoice::Staged);
            trial.link.hear_all(BLOCKS);
            agent.leave();
        });
    });
}
