//! Hostile peers of the agent and of the controller: each story ends with the failure that it must,
//! in time, within bounded memory, and with nothing written that must not be.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod agents;
mod controllers;
mod flips;
mod floods;
mod links;
mod receivers;
mod requests;
mod senders;

use kvm_clone_protocol::frame::{FrameKind, MAX_PAYLOAD};
use kvm_clone_protocol::message::{Abort, Commit, FailureCode, Hello};
use kvm_clone_tests::hostile::frames::{frame, head, message};
use kvm_clone_tests::hostile::ground::size_of;
use kvm_clone_tests::image::BLOCK;

/// What a peer sends, and how the session ends.
type Story = (&'static str, FailureCode, Vec<u8>);

/// Names a story that begins: when one fails, the last that was named is it.
#[expect(clippy::print_stderr, reason = "the runner shows it with a failure")]
fn tell(name: &str, of: impl std::fmt::Debug) {
    eprintln!("{of:?}: {name}");
}

fn kind(kind: FrameKind) -> u8 {
    kind as u8
}

/// A block that no disk here has.
fn block() -> Vec<u8> {
    vec![0xee; size_of(BLOCK)]
}

/// What is no frame, or none of a data connection. Both halves of a session must say so.
fn broken_frames() -> Vec<Story> {
    use FailureCode::Protocol;
    let data = kind(FrameKind::Data);
    vec![
        ("kind 0", Protocol, head(0, 0, 0, 0)),
        ("an unknown kind", Protocol, head(0, 0x7f, 0, 0)),
        ("flags", Protocol, head(0, data, 1, 0)),
        ("4 GiB", Protocol, head(u32::MAX, data, 0, 0)),
        (
            "a payload of a byte too many",
            Protocol,
            head(u32::try_from(MAX_PAYLOAD).unwrap() + 4, data, 0, 3),
        ),
        ("meta longer than the frame", Protocol, head(4, data, 0, 5)),
        (
            "a payload on a kind that has none",
            Protocol,
            frame(FrameKind::Settled, &[1], &[1]),
        ),
        ("no meta", Protocol, frame(FrameKind::Data, &[], &[])),
        (
            "meta with a byte left over",
            Protocol,
            frame(FrameKind::Settled, &[1, 0], &[]),
        ),
        (
            "a number without an end",
            Protocol,
            frame(FrameKind::Settled, &[0xff; 11], &[]),
        ),
        (
            "an encoding that does not exist",
            Protocol,
            frame(FrameKind::Data, &[0, 2], &block()),
        ),
        (
            "a commit on a data connection",
            Protocol,
            message(&Commit { disks: vec![0] }),
        ),
        (
            "a hello on a data connection",
            Protocol,
            message(&Hello {
                release: "x".to_owned(),
                version: 2,
            }),
        ),
        (
            "an abort on a data connection",
            Protocol,
            message(&Abort {
                reason: "x".to_owned(),
            }),
        ),
        (
            "64 KiB of meta in a beat",
            Protocol,
            frame(FrameKind::Beat, &[0; 65_535], &[]),
        ),
    ]
}
