//! Peers that break the rules, one rule at a time: each ends with the error that names the rule,
//! and none with a panic.

#![cfg(test)]

use bytes::Bytes;
use kvm_clone_protocol::digest::{Content, Digest, Digester, HashKind, Seed};
use kvm_clone_protocol::frame::{Frame, FrameKind};
use kvm_clone_protocol::message::*;
use kvm_clone_protocol::sync::{
    CHANGE_COST, Compared, DATA_AHEAD, DIGEST_AHEAD, DiskDone, DiskOp, Machine, MapRun,
    Misbehaviour, Receiver, RunKind, Sender, SyncError, Ticket, push_content,
};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};

/// Blocks of the disks here; the last has [`TAIL`] bytes.
const BLOCKS: u64 = 9;
const TAIL: usize = 100;
const ROOT: Digest = Digest([1; 16]);

fn geometry(blocks: u64) -> Geometry {
    Geometry::new((blocks - 1) * BLOCK_SIZE + TAIL as u64).unwrap()
}

fn params(blocks: u64, compare: bool, ship: bool) -> SessionParams {
    SessionParams {
        size: geometry(blocks).size(),
        hash: HashKind::Xxh3,
        seed: Seed([3; 32]),
        compare,
        ship,
    }
}

fn sender(blocks: u64, compare: bool, ship: bool) -> Sender {
    Sender::new(params(blocks, compare, ship), geometry(blocks))
}

fn receiver(blocks: u64, compare: bool, ship: bool) -> Receiver {
    Receiver::new(params(blocks, compare, ship), geometry(blocks))
}

/// A disk that is data throughout, and never what the other end has.
fn answer(op: &DiskOp, blocks: u64) -> DiskDone {
    match op {
        DiskOp::Map { from } => DiskDone::Mapped {
            runs: vec![MapRun {
                kind: RunKind::Data,
                count: blocks - from,
            }],
            data_bytes: 0,
        },
        DiskOp::Compare { run, .. } => {
            let changed = |index| Compared::Changed {
                digest: ROOT,
                encoding: Encoding::Raw,
                payload: vec![1; geometry(blocks).block_len(index)].into(),
            };
            DiskDone::Compared((run.first..run.end()).map(changed).collect())
        }
        DiskOp::Digest { run } => DiskDone::Digested(digests(run.count)),
        DiskOp::Write { blocks } => DiskDone::Written(vec![Content::Digest(ROOT); blocks.len()]),
        DiskOp::Zero { .. } | DiskOp::Trim { .. } => DiskDone::Zeroed,
    }
}

/// Lets a machine do all that it can without its peer; returns what it sends.
fn settle(machine: &mut dyn Machine, blocks: u64) -> Vec<Frame> {
    let mut sent = Vec::new();
    loop {
        let before = sent.len();
        let mut worked = false;
        while let Some((ticket, op)) = machine.poll_disk() {
            machine.handle_disk(ticket, answer(&op, blocks)).unwrap();
            worked = true;
        }
        while let Some(frame) = machine.poll_transmit() {
            sent.push(frame);
        }
        if !worked && sent.len() == before {
            return sent;
        }
    }
}

/// The digests of `count` blocks of data.
fn digests(count: u64) -> Bytes {
    vec![7; usize::try_from(count).unwrap() * 16].into()
}

fn frame(message: &impl Message) -> Frame {
    message.frame().unwrap()
}

fn with_payload(message: &impl Message, payload: impl Into<Bytes>) -> Frame {
    Frame {
        payload: payload.into(),
        ..frame(message)
    }
}

fn data(index: u64, encoding: Encoding, len: usize) -> Frame {
    with_payload(&Data { index, encoding }, vec![1; len])
}

fn raw(index: u64) -> Frame {
    data(index, Encoding::Raw, BLOCK_LEN)
}

fn zeros(first: u64, count: u64) -> Frame {
    frame(&Zeros {
        run: BlockRun { first, count },
    })
}

fn holes(first: u64, count: u64) -> Frame {
    frame(&Holes {
        run: BlockRun { first, count },
    })
}

fn told(first: u64, count: u64) -> Frame {
    with_payload(&Digests { first }, digests(count))
}

fn settled(next: u64) -> Frame {
    frame(&Settled { next })
}

fn end() -> Frame {
    frame(&End { root: ROOT })
}

fn agreed() -> Frame {
    frame(&Agreed { root: ROOT })
}

fn credit(consumed: u64) -> Frame {
    frame(&Credit { consumed })
}

fn out_of_order(kind: FrameKind, expected: u64, got: u64) -> Misbehaviour {
    Misbehaviour::OutOfOrder {
        kind,
        expected,
        got,
    }
}

fn out_of_range(kind: FrameKind, end: u64, limit: u64) -> Misbehaviour {
    Misbehaviour::OutOfRange { kind, end, limit }
}

fn bad_payload(kind: FrameKind, len: usize) -> Misbehaviour {
    Misbehaviour::BadPayload { kind, len }
}

/// Frames of which all but the last are fine, and what the last one breaks.
type Case = (Vec<Frame>, Misbehaviour);

fn check(name: &str, cases: Vec<Case>, blocks: u64, machine: impl Fn() -> Box<dyn Machine>) {
    for (at, (frames, broken)) in cases.into_iter().enumerate() {
        let mut machine = machine();
        settle(&mut *machine, blocks);
        let (last, good) = frames.split_last().unwrap();
        for frame in good {
            let handled = machine.handle_frame(frame);
            assert_eq!(handled, Ok(()), "{name}, case {at}, {:?}", frame.kind);
            settle(&mut *machine, blocks);
        }
        assert_eq!(
            machine.handle_frame(last),
            Err(SyncError::PeerMisbehaved(broken)),
            "{name}, case {at}"
        );
    }
}

#[test]
fn a_receiver_that_compares_sees_what_a_sender_breaks() {
    use FrameKind as Kind;
    let cases = vec![
        // Below what is settled, in each kind; overlapping; and twice the same.
        (vec![raw(3), raw(3)], out_of_order(Kind::Data, 4, 3)),
        (vec![settled(5), raw(4)], out_of_order(Kind::Data, 5, 4)),
        (
            vec![zeros(2, 3), zeros(4, 2)],
            out_of_order(Kind::Zeros, 5, 4),
        ),
        (
            vec![settled(5), settled(4)],
            out_of_order(Kind::Settled, 5, 4),
        ),
        // Off the disk, by a little and by as much as a number can say.
        (
            vec![raw(BLOCKS)],
            out_of_range(Kind::Data, BLOCKS + 1, BLOCKS),
        ),
        (
            vec![raw(u64::MAX)],
            out_of_range(Kind::Data, u64::MAX, BLOCKS),
        ),
        (
            vec![zeros(8, 2)],
            out_of_range(Kind::Zeros, BLOCKS + 1, BLOCKS),
        ),
        (
            vec![zeros(1, u64::MAX)],
            out_of_range(Kind::Zeros, u64::MAX, BLOCKS),
        ),
        (vec![zeros(4, 0)], out_of_range(Kind::Zeros, 4, 4)),
        (
            vec![settled(u64::MAX)],
            out_of_range(Kind::Settled, u64::MAX, BLOCKS),
        ),
        // Blocks of the wrong length, as they are and compressed.
        (vec![data(0, Encoding::Raw, 0)], bad_payload(Kind::Data, 0)),
        (
            vec![data(0, Encoding::Raw, BLOCK_LEN - 1)],
            bad_payload(Kind::Data, BLOCK_LEN - 1),
        ),
        (
            vec![data(BLOCKS - 1, Encoding::Raw, BLOCK_LEN)],
            bad_payload(Kind::Data, BLOCK_LEN),
        ),
        (vec![data(0, Encoding::Zstd, 0)], bad_payload(Kind::Data, 0)),
        (
            vec![data(0, Encoding::Zstd, BLOCK_LEN)],
            bad_payload(Kind::Data, BLOCK_LEN),
        ),
        (
            vec![data(BLOCKS - 1, Encoding::Zstd, TAIL)],
            bad_payload(Kind::Data, TAIL),
        ),
        // The end.
        (
            vec![end()],
            Misbehaviour::EarlyEnd {
                at: 0,
                count: BLOCKS,
            },
        ),
        (
            vec![settled(BLOCKS - 1), end()],
            Misbehaviour::EarlyEnd {
                at: BLOCKS - 1,
                count: BLOCKS,
            },
        ),
    ];
    check("comparing receiver", cases, BLOCKS, || {
        Box::new(receiver(BLOCKS, true, true))
    });
}

#[test]
fn a_receiver_takes_nothing_for_blocks_that_it_has_not_told() {
    for (frame, end) in [(raw(0), 1), (zeros(0, 3), 3), (settled(2), 2)] {
        let broken = Misbehaviour::OutOfRange {
            kind: frame.kind,
            end,
            limit: 0,
        };
        let mut machine = receiver(BLOCKS, true, true);
        assert_eq!(machine.handle_frame(&frame), Err(broken.into()));
    }
}

#[test]
fn a_receiver_that_only_compares_takes_no_changes() {
    for frame in [raw(0), zeros(0, 1)] {
        let broken = Misbehaviour::NotInThisSession(frame.kind);
        let mut machine = receiver(BLOCKS, true, false);
        settle(&mut machine, BLOCKS);
        assert_eq!(machine.handle_frame(&frame), Err(broken.into()));
    }
}

#[test]
fn a_receiver_takes_nothing_after_the_end() {
    let all = [zeros(0, 1), raw(0), settled(BLOCKS), end(), credit(0)];
    for after in all {
        let mut machine = receiver(BLOCKS, true, false);
        settle(&mut machine, BLOCKS);
        machine.handle_frame(&settled(BLOCKS)).unwrap();
        machine.handle_frame(&end()).unwrap();
        let broken = Misbehaviour::AfterEnd(after.kind);
        assert_eq!(machine.handle_frame(&after), Err(broken.into()));
    }
}

#[test]
fn a_sender_sees_what_a_receiver_breaks() {
    use FrameKind as Kind;
    let cases = vec![
        // Blocks that were told before, or that do not come next.
        (
            vec![told(0, 2), told(1, 2)],
            out_of_order(Kind::Digests, 2, 1),
        ),
        (
            vec![told(0, 2), holes(0, 2)],
            out_of_order(Kind::Holes, 2, 0),
        ),
        (vec![told(3, 2)], out_of_order(Kind::Digests, 0, 3)),
        (
            vec![holes(u64::MAX, 1)],
            out_of_order(Kind::Holes, 0, u64::MAX),
        ),
        // Off the disk.
        (
            vec![told(0, BLOCKS + 1)],
            out_of_range(Kind::Digests, BLOCKS + 1, BLOCKS),
        ),
        (
            vec![told(0, BLOCKS), told(BLOCKS, 1)],
            out_of_range(Kind::Digests, BLOCKS + 1, BLOCKS),
        ),
        (
            vec![holes(0, u64::MAX)],
            out_of_range(Kind::Holes, u64::MAX, BLOCKS),
        ),
        (vec![holes(0, 0)], out_of_range(Kind::Holes, 0, BLOCKS)),
        // Rows of digests that are none.
        (
            vec![frame(&Digests { first: 0 })],
            bad_payload(Kind::Digests, 0),
        ),
        (
            vec![with_payload(&Digests { first: 0 }, vec![7; 17])],
            bad_payload(Kind::Digests, 17),
        ),
        // Credit for what was not sent, or less than before.
        (
            vec![credit(1)],
            Misbehaviour::FalseCredit {
                consumed: 1,
                sent: 0,
            },
        ),
        (
            vec![told(0, 2), credit(u64::MAX)],
            Misbehaviour::FalseCredit {
                consumed: u64::MAX,
                sent: 2 * (BLOCK_SIZE + CHANGE_COST),
            },
        ),
        (
            vec![told(0, 2), credit(BLOCK_SIZE), credit(BLOCK_SIZE - 1)],
            Misbehaviour::FalseCredit {
                consumed: BLOCK_SIZE - 1,
                sent: 2 * (BLOCK_SIZE + CHANGE_COST),
            },
        ),
        // Agreement before the end, and on something else.
        (
            vec![agreed()],
            Misbehaviour::EarlyEnd {
                at: 0,
                count: BLOCKS,
            },
        ),
        (
            vec![told(0, BLOCKS - 1), agreed()],
            Misbehaviour::EarlyEnd {
                at: BLOCKS - 1,
                count: BLOCKS,
            },
        ),
        (vec![told(0, BLOCKS), agreed()], Misbehaviour::WrongRoot),
    ];
    check("sender", cases, BLOCKS, || {
        Box::new(sender(BLOCKS, true, true))
    });
}

#[test]
fn a_sender_that_does_not_compare_is_told_nothing() {
    for frame in [told(0, 1), holes(0, 1)] {
        let broken = Misbehaviour::NotInThisSession(frame.kind);
        let mut machine = sender(BLOCKS, false, true);
        assert_eq!(machine.handle_frame(&frame), Err(broken.into()));
    }
}

/// Without shipping, the roots must differ exactly if blocks did.
#[test]
fn a_sender_that_only_compares_is_not_told_that_different_disks_are_equal() {
    let mut machine = sender(BLOCKS, true, false);
    settle(&mut machine, BLOCKS);
    machine.handle_frame(&told(0, BLOCKS)).unwrap();
    let sent = settle(&mut machine, BLOCKS);
    let Stream::End(End { root }) = Stream::read(sent.last().unwrap()).unwrap() else {
        panic!("no end: {sent:?}");
    };
    let broken = Err(Misbehaviour::WrongRoot.into());
    assert_eq!(machine.handle_frame(&frame(&Agreed { root })), broken);
}

#[test]
fn a_sender_takes_nothing_after_agreement() {
    for after in [agreed(), credit(0), told(0, 1), settled(0)] {
        let mut machine = sender(BLOCKS, false, true);
        let sent = settle(&mut machine, BLOCKS);
        let Stream::End(End { root }) = Stream::read(sent.last().unwrap()).unwrap() else {
            panic!("no end: {sent:?}");
        };
        machine.handle_frame(&frame(&Agreed { root })).unwrap();
        assert!(machine.outcome().is_some());
        let broken = Misbehaviour::AfterEnd(after.kind);
        assert_eq!(machine.handle_frame(&after), Err(broken.into()));
    }
}

fn machines() -> [Box<dyn Machine>; 2] {
    [
        Box::new(sender(BLOCKS, true, true)),
        Box::new(receiver(BLOCKS, true, true)),
    ]
}

#[test]
fn frames_of_the_wrong_side_are_refused() {
    let from_sender = [raw(0), zeros(0, 1), settled(0), end()];
    let from_receiver = [told(0, 1), holes(0, 1), credit(0), agreed()];
    for (at, wrong) in [from_sender, from_receiver].into_iter().enumerate() {
        for frame in wrong {
            let [sender, receiver] = machines();
            let mut machine = if at == 0 { sender } else { receiver };
            let broken = Misbehaviour::WrongSide(frame.kind);
            assert_eq!(machine.handle_frame(&frame), Err(broken.into()));
        }
    }
}

#[test]
fn control_frames_have_no_business_in_a_session() {
    for kind in FrameKind::ALL {
        if kind.is_data() {
            continue;
        }
        for mut machine in machines() {
            let frame = Frame {
                kind,
                meta: Bytes::new(),
                payload: Bytes::new(),
            };
            let error = MessageError::Misplaced { kind }.into();
            assert_eq!(machine.handle_frame(&frame), Err(error));
        }
    }
}

#[test]
fn meta_that_is_no_message_is_refused_in_every_kind() {
    let metas: [&[u8]; 4] = [
        b"",
        // A number without an end, and one that does not fit 64 bits.
        b"\xff",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        // Whatever it begins with, this is longer than any message of a session.
        &[0; 40],
    ];
    for kind in FrameKind::ALL.into_iter().filter(|kind| kind.is_data()) {
        // A beat is no bytes at all.
        let metas = metas
            .into_iter()
            .filter(|meta| kind != FrameKind::Beat || !meta.is_empty());
        for meta in metas {
            for mut machine in machines() {
                let frame = Frame {
                    kind,
                    meta: Bytes::from_static(meta),
                    payload: Bytes::new(),
                };
                let error = MessageError::Malformed { kind }.into();
                assert_eq!(machine.handle_frame(&frame), Err(error), "{meta:?}");
            }
        }
    }
}

#[test]
fn an_encoding_that_does_not_exist_is_malformed() {
    let mut machine = receiver(BLOCKS, false, true);
    let frame = Frame {
        meta: Bytes::from_static(&[0, 2]),
        ..raw(0)
    };
    let kind = FrameKind::Data;
    let error = MessageError::Malformed { kind }.into();
    assert_eq!(machine.handle_frame(&frame), Err(error));
}

/// A receiver that has as many blocks as there is credit for, of which the disk has taken one,
/// and that operation.
fn full_receiver(count: u64) -> (Receiver, Ticket, DiskOp) {
    let mut machine = receiver(count + 3, false, true);
    let mut first = None;
    for index in 0..count {
        machine.handle_frame(&raw(index)).unwrap();
        first = first.or_else(|| machine.poll_disk());
    }
    let (ticket, op) = first.unwrap();
    (machine, ticket, op)
}

#[test]
fn data_beyond_its_credit_is_refused_to_the_block() {
    let allowed = DATA_AHEAD / (CHANGE_COST + BLOCK_SIZE);
    let broken = Err(Misbehaviour::OverCredit(FrameKind::Data).into());
    let (mut machine, ..) = full_receiver(allowed);
    assert_eq!(machine.handle_frame(&raw(allowed)), broken);

    // Once the operation is done there is room for as much as it held, and no more.
    let (mut machine, ticket, op) = full_receiver(allowed);
    machine.handle_disk(ticket, answer(&op, allowed)).unwrap();
    assert_eq!(machine.handle_frame(&raw(allowed)), Ok(()));
    assert_eq!(machine.handle_frame(&raw(allowed + 1)), broken);
}

/// Zeros have no payload, and a compressed block may have one byte: they cost credit all the same.
#[test]
fn changes_without_bytes_to_speak_of_are_bounded_too() {
    let changes: [fn(u64) -> Frame; 2] = [
        |index| zeros(index, 1),
        |index| data(index, Encoding::Zstd, 1),
    ];
    for change in changes {
        let blocks = 4 * DATA_AHEAD / CHANGE_COST;
        let mut machine = receiver(blocks, false, true);
        let (at, error) = (0..blocks / 2)
            .find_map(|at| Some((at, machine.handle_frame(&change(2 * at)).err()?)))
            .expect("there is an end to what a receiver takes");
        let kind = change(0).kind;
        assert_eq!(error, Misbehaviour::OverCredit(kind).into());
        assert!(at <= DATA_AHEAD / CHANGE_COST, "{at} {kind:?} were taken");
    }
}

/// How many blocks a receiver reads while the sender settles all that it is told, and the disk
/// begins every change and ends none.
fn blocks_read_while_changes_hang(content: fn(u64) -> Content, first: Option<Frame>) -> u64 {
    let blocks = 64 * DIGEST_AHEAD;
    let mut machine = receiver(blocks, true, true);
    let (mut read, mut next, mut first) = (0, 0, first);
    loop {
        let before = read;
        while let Some((ticket, op)) = machine.poll_disk() {
            let done = match &op {
                DiskOp::Digest { run } => {
                    read += run.count;
                    let mut digests = Vec::new();
                    (run.first..run.end()).for_each(|at| push_content(&mut digests, &content(at)));
                    DiskDone::Digested(digests.into())
                }
                DiskOp::Map { .. } => answer(&op, blocks),
                _ => continue,
            };
            machine.handle_disk(ticket, done).unwrap();
        }
        while let Some(told) = machine.poll_transmit() {
            next += told.payload.len() as u64 / 16;
        }
        if let Some(frame) = first.take() {
            machine.handle_frame(&frame).unwrap();
        }
        machine.handle_frame(&settled(next)).unwrap();
        if read == before {
            return read;
        }
    }
}

#[test]
fn a_write_that_hangs_stops_the_scan() {
    // The digests after it cannot go into the root, and must not pile up.
    let read = blocks_read_while_changes_hang(|_| Content::Digest(ROOT), Some(raw(0)));
    assert!(read <= DIGEST_AHEAD + 1, "{read} blocks were read");
}

#[test]
fn trims_that_hang_stop_the_scan() {
    let every_second = |at| match at % 2 {
        0 => Content::Zero,
        _ => Content::Digest(ROOT),
    };
    let read = blocks_read_while_changes_hang(every_second, None);
    assert!(read <= 4 * DIGEST_AHEAD, "{read} blocks were read");
}

#[test]
fn digests_beyond_their_credit_are_refused() {
    let blocks = 2 * DIGEST_AHEAD;
    let mut machine = sender(blocks, true, true);
    // Nothing is known of the source yet, so nothing can be settled.
    for first in (0..DIGEST_AHEAD).step_by(4096) {
        machine.handle_frame(&told(first, 4096)).unwrap();
    }
    // Holes cost nothing.
    machine.handle_frame(&holes(DIGEST_AHEAD, 1)).unwrap();
    let broken = Misbehaviour::OverCredit(FrameKind::Digests);
    assert_eq!(
        machine.handle_frame(&told(DIGEST_AHEAD + 1, 1)),
        Err(broken.into())
    );
}

/// What arrived is not what the sender digested: the last operation brings the error.
#[test]
fn roots_that_differ_are_a_mismatch() {
    let mut machine = receiver(1, false, true);
    let block = data(0, Encoding::Raw, TAIL);
    machine.handle_frame(&block).unwrap();
    let (ticket, op) = machine.poll_disk().unwrap();
    machine.handle_frame(&end()).unwrap();
    let contents = Digester::new(HashKind::Xxh3, Seed([3; 32])).content(&block.payload);
    assert!(matches!(op, DiskOp::Write { .. }));
    assert_eq!(
        machine.handle_disk(ticket, DiskDone::Written(vec![contents])),
        Err(SyncError::RootMismatch)
    );
    assert_eq!(machine.outcome(), None);
    assert_eq!(machine.poll_transmit(), None);
}
