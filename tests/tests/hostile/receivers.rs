//! Hostile receivers: what a sender is told, and must not believe.

use kvm_clone_protocol::frame::FrameKind;
use kvm_clone_protocol::message::{Digests, End, FailureCode, SessionParams, Stream};
use kvm_clone_protocol::sync::{DATA_AHEAD, DIGEST_AHEAD, WINDOW};
use kvm_clone_tests::hostile::agent::Agent;
use kvm_clone_tests::hostile::frames::{
    agreed, credit, digests, end, frame, holes, raw, settled, with_payload, zeros,
};
use kvm_clone_tests::hostile::ground::{BLOCKS, Ground, size_of};
use kvm_clone_tests::hostile::link::Link;
use kvm_clone_tests::hostile::trial::{Onto, Trial, params};
use kvm_clone_tests::image::BLOCK;

use super::{Story, broken_frames, tell};

/// What no receiver may send to a sender that ships.
fn stories() -> Vec<Story> {
    use FailureCode::Protocol;
    let two = |one: Vec<u8>, other: Vec<u8>| [one, other].concat();
    let misaligned = |len| with_payload(&Digests { first: 0 }, &vec![0x77; len]);
    let blocks = size_of(BLOCKS);
    vec![
        ("a block", Protocol, raw(0, &[1; 65_536])),
        ("zeros", Protocol, zeros(0, 1)),
        ("settled", Protocol, settled(0)),
        ("the end", Protocol, end([0; 16])),
        ("digests beyond the disk", Protocol, digests(0, blocks + 1)),
        ("no digests", Protocol, misaligned(0)),
        ("a digest and a byte", Protocol, misaligned(17)),
        ("digests that skip a block", Protocol, digests(1, 1)),
        ("digests twice", Protocol, two(digests(0, 2), digests(0, 2))),
        (
            "digests from the last block of all",
            Protocol,
            digests(u64::MAX, 1),
        ),
        (
            "holes and digests of the same",
            Protocol,
            two(holes(0, 3), digests(2, 1)),
        ),
        ("2^63 holes", Protocol, holes(0, 1 << 63)),
        (
            "holes beyond what a number holds",
            Protocol,
            two(holes(0, 1), holes(1, u64::MAX)),
        ),
        ("no holes", Protocol, holes(0, 0)),
        ("holes beyond the disk", Protocol, holes(0, BLOCKS + 1)),
        ("credit for nothing", Protocol, credit(1)),
        ("credit for everything", Protocol, credit(u64::MAX)),
        ("agreement at the beginning", Protocol, agreed([0; 16])),
        (
            "digests without meta",
            Protocol,
            frame(FrameKind::Digests, &[], &[0; 16]),
        ),
    ]
}

/// Plays stories against one sender after another, all of one agent.
fn play(stories: Vec<Story>) {
    let mut agent = Agent::greeted();
    for (name, code, bytes) in stories {
        tell(name, "sender");
        let mut trial = Trial::sender(&mut agent);
        trial.link.write(&bytes);
        trial.fails(code);
    }
    agent.leave();
}

#[test]
fn what_is_no_frame_ends_a_sender() {
    play(broken_frames());
}

#[test]
fn a_receiver_that_breaks_a_rule_ends_a_sender() {
    play(stories());
}

/// The root of the source, once all has been shipped to a receiver that had nothing of it.
fn shipped(trial: &mut Trial<'_>) -> [u8; 16] {
    trial.link.write(&digests(0, size_of(BLOCKS)));
    loop {
        let frame = trial.link.next().expect("a sender that ships");
        if let Ok(Stream::End(End { root })) = Stream::read(&frame) {
            return root.0;
        }
    }
}

/// What a receiver makes of the root that it was sent.
type Answer = fn([u8; 16]) -> Vec<u8>;

#[test]
fn after_the_end_a_sender_takes_its_own_root_and_no_other() {
    let cases: [(&str, Answer); 6] = [
        ("another root", |root| agreed(root.map(|byte| !byte))),
        ("no root", |_| agreed([0; 16])),
        ("digests of blocks that do not exist", |_| {
            digests(BLOCKS, 1)
        }),
        ("credit that falls", |_| {
            [credit(1000), credit(999)].concat()
        }),
        ("more credit than was sent", |_| {
            credit(BLOCKS * (BLOCK + 256) + 1)
        }),
        ("the end, back", end),
    ];
    let mut agent = Agent::greeted();
    for (name, answer) in cases {
        tell(name, "sender at its end");
        let mut trial = Trial::sender(&mut agent);
        let root = shipped(&mut trial);
        trial.link.write(&answer(root));
        trial.fails(FailureCode::Protocol);
    }
    let mut trial = Trial::sender(&mut agent);
    let root = shipped(&mut trial);
    trial.link.write(&agreed(root));
    let ended = trial.succeeds();
    assert_eq!(ended.root.map(|root| root.0), Some(root));
    agent.leave();
}

#[test]
fn a_sender_that_only_compares_is_not_told_that_different_disks_are_equal() {
    let mut agent = Agent::greeted();
    let params = params(Onto::Compared);
    let mut trial = Trial::sender_with(&mut agent, Ground::equal(), params, Link::greeted);
    let root = shipped(&mut trial);
    trial.link.write(&agreed(root));
    trial.fails(FailureCode::Protocol);
    agent.leave();
}

#[test]
fn more_digests_than_may_be_ahead_end_a_sender() {
    // Without credit it ships 16 MiB, and then what it is told piles up.
    let (blocks, filled) = (DIGEST_AHEAD + 2048, DATA_AHEAD / BLOCK + 16 * WINDOW);
    let params = SessionParams {
        size: blocks * BLOCK,
        ..params(Onto::Staged)
    };
    let mut agent = Agent::greeted();
    let ground = Ground::sparse(blocks, filled);
    let mut trial = Trial::sender_with(&mut agent, ground, params, Link::greeted);
    for first in (0..blocks).step_by(4096) {
        let count = (blocks - first).min(4096);
        trial.link.write(&digests(first, size_of(count)));
    }
    trial.fails(FailureCode::Protocol);
    agent.leave();
}
