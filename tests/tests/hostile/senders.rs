//! Hostile senders: what a receiver is sent, and must not take.

use kvm_clone_protocol::message::FailureCode;
use kvm_clone_tests::hostile::agent::Agent;
use kvm_clone_tests::hostile::frames::{
    Repeated, agreed, credit, digests, end, holes, raw, settled, zeros, zstd,
};
use kvm_clone_tests::hostile::ground::{BLOCKS, TAIL, size_of};
use kvm_clone_tests::hostile::trial::{Onto, Trial};
use kvm_clone_tests::image::BLOCK;

use super::{Story, block, broken_frames, tell};

/// A gibibyte of zeros in 32 KiB.
fn bomb() -> Repeated {
    Repeated::new(0, &[128 << 10; 8 << 10])
}

/// A block that decompresses as it should.
fn good() -> Repeated {
    Repeated::new(0xee, &[64 << 10])
}

/// What no sender may send to a receiver that has told of all its blocks.
fn sender_stories() -> Vec<Story> {
    use FailureCode::{Mismatch, Protocol};
    let two = |one: Vec<u8>, other: Vec<u8>| [one, other].concat();
    let last = BLOCKS - 1;
    vec![
        ("digests", Protocol, digests(0, 1)),
        ("holes", Protocol, holes(0, 1)),
        ("credit", Protocol, credit(0)),
        ("agreement", Protocol, agreed([0; 16])),
        (
            "a block twice",
            Protocol,
            two(raw(1, &block()), raw(1, &block())),
        ),
        (
            "a block backwards",
            Protocol,
            two(raw(5, &block()), raw(4, &block())),
        ),
        (
            "a block beyond the session",
            Protocol,
            raw(BLOCKS, &block()),
        ),
        ("the last block of all", Protocol, raw(u64::MAX, &block())),
        ("an empty block", Protocol, raw(0, &[])),
        ("a block that is short", Protocol, raw(0, &block()[1..])),
        (
            "a whole block for the short last one",
            Protocol,
            raw(last, &block()),
        ),
        (
            "a byte too many for the short last block",
            Protocol,
            raw(last, &block()[..=size_of(TAIL)]),
        ),
        ("zeros of 2^63 blocks", Protocol, zeros(0, 1 << 63)),
        (
            "zeros beyond what a number holds",
            Protocol,
            zeros(1, u64::MAX),
        ),
        (
            "zeros from the last block of all",
            Protocol,
            zeros(u64::MAX, 1),
        ),
        ("no zeros", Protocol, zeros(0, 0)),
        (
            "zeros that overlap",
            Protocol,
            two(zeros(0, 3), zeros(2, 3)),
        ),
        ("zeros beyond the session", Protocol, zeros(last, 2)),
        ("settled beyond the session", Protocol, settled(BLOCKS + 1)),
        ("settled beyond all", Protocol, settled(u64::MAX)),
        ("settled backwards", Protocol, two(settled(5), settled(4))),
        ("the end at the beginning", Protocol, end([0; 16])),
        (
            "the end before the last block",
            Protocol,
            two(settled(last), end([0; 16])),
        ),
        (
            "the end with a made-up root",
            Mismatch,
            two(settled(BLOCKS), end([7; 16])),
        ),
        (
            "a changed block, and the end with a made-up root",
            Mismatch,
            [raw(2, &block()), settled(BLOCKS), end([7; 16])].concat(),
        ),
    ]
}

/// What is no block, compressed. Each is shorter than a block, so only decompressing tells.
fn zstd_stories() -> Vec<Story> {
    use FailureCode::Protocol;
    let good = good().encode();
    let half = || Repeated::new(0xee, &[32 << 10]).encode();
    let skippable = [&0x184d_2a50_u32.to_le_bytes()[..], &[4, 0, 0, 0], b"junk"].concat();
    let of = |payload: Vec<u8>| zstd(0, &payload);
    vec![
        ("a bomb", Protocol, of(bomb().encode())),
        (
            "a bomb that claims to be a block",
            Protocol,
            of(Repeated {
                claims: Some(BLOCK),
                ..bomb()
            }
            .encode()),
        ),
        (
            "a claim of 2^60 bytes",
            Protocol,
            of(Repeated {
                claims: Some(1 << 60),
                ..self::good()
            }
            .encode()),
        ),
        (
            "a byte too many",
            Protocol,
            of(Repeated::new(0xee, &[64 << 10, 1]).encode()),
        ),
        (
            "a byte too few",
            Protocol,
            of(Repeated::new(0xee, &[(64 << 10) - 1]).encode()),
        ),
        ("nothing", Protocol, of(Repeated::new(0xee, &[0]).encode())),
        ("an empty payload", Protocol, of(Vec::new())),
        ("no zstd", Protocol, of(vec![0xee; 100])),
        (
            "a frame that breaks off",
            Protocol,
            of(good[..good.len() - 2].to_vec()),
        ),
        (
            "bytes behind the frame",
            Protocol,
            of([&good[..], &[0]].concat()),
        ),
        (
            "two frames that make a block",
            Protocol,
            of([half(), half()].concat()),
        ),
        (
            "a frame behind one to be skipped",
            Protocol,
            of([&skippable[..], &good].concat()),
        ),
        (
            "a frame to be skipped behind it",
            Protocol,
            of([&good[..], &skippable].concat()),
        ),
        (
            "a wrong checksum",
            Protocol,
            of(Repeated {
                checksum: Some([1; 4]),
                ..self::good()
            }
            .encode()),
        ),
        (
            "a dictionary",
            Protocol,
            of(Repeated {
                dictionary: Some(7),
                ..self::good()
            }
            .encode()),
        ),
        (
            "as long as the block",
            Protocol,
            of(vec![0xee; size_of(BLOCK)]),
        ),
        (
            "a bomb in the last block",
            Protocol,
            zstd(BLOCKS - 1, &bomb().encode()[..50]),
        ),
    ]
}

/// Plays stories against one receiver after another, all of one agent.
fn play(onto: Onto, stories: Vec<Story>) {
    let mut agent = Agent::greeted();
    for (name, code, bytes) in stories {
        tell(name, onto);
        let mut trial = Trial::receiver(&mut agent, onto);
        trial.link.write(&bytes);
        trial.fails(code);
    }
    agent.leave();
}

#[test]
fn what_is_no_frame_ends_a_receiver() {
    play(Onto::Staged, broken_frames());
}

#[test]
fn a_sender_that_breaks_a_rule_ends_a_receiver() {
    for onto in [Onto::New, Onto::Inplace, Onto::Staged] {
        play(onto, sender_stories());
    }
}

#[test]
fn what_is_no_compressed_block_ends_a_receiver() {
    for onto in [Onto::New, Onto::Inplace, Onto::Staged] {
        play(onto, zstd_stories());
    }
}
