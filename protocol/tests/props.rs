//! Laws of the wire and of the arithmetic, for any input. That any two images converge is in
//! `pair/images.rs`.

#![cfg(test)]

use bytes::{BufMut, Bytes, BytesMut};
use kvm_clone_protocol::digest::{
    Content, DIGEST_LEN, Digest, Digester, HashKind, RangeHasher, Seed,
};
use kvm_clone_protocol::frame::{self, Frame, FrameKind, HEAD_LEN, MAX_META, MAX_PAYLOAD};
use kvm_clone_protocol::message::*;
use kvm_clone_protocol::sync::{
    Compared, DiskDone, DiskOp, MAX_READS, MAX_WRITES, Machine, MapRun, Receiver, RunKind, Sender,
    push_content,
};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry, MAX_DISK_SIZE};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::FileFailurePersistence;

/// Failures are kept beside this file, to be committed.
fn config() -> ProptestConfig {
    let kept = FileFailurePersistence::WithSource("regressions");
    ProptestConfig {
        failure_persistence: Some(Box::new(kept)),
        ..ProptestConfig::default()
    }
}

fn bytes(len: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), len).prop_map(Bytes::from)
}

/// A frame of any kind, mostly small, sometimes as large as can be.
fn frames() -> impl Strategy<Value = Frame> {
    let meta = prop_oneof![
        9 => bytes(0..100),
        1 => Just(Bytes::from(vec![5; MAX_META])),
    ];
    let payload = prop_oneof![
        9 => bytes(0..100),
        1 => Just(Bytes::from(vec![6; MAX_PAYLOAD])),
    ];
    (select(FrameKind::ALL.to_vec()), meta, payload).prop_map(|(kind, meta, payload)| Frame {
        kind,
        meta,
        payload: if kind.has_payload() {
            payload
        } else {
            Bytes::new()
        },
    })
}

/// Eight bytes that may be a head, and a few more.
fn heads() -> impl Strategy<Value = BytesMut> {
    let kind = prop_oneof![
        4 => select(FrameKind::ALL.to_vec()).prop_map(|kind| kind as u8),
        1 => any::<u8>(),
    ];
    let len = prop_oneof![0..200_u32, 0..200_000_u32, any::<u32>()];
    let flags = prop_oneof![9 => Just(0), 1 => any::<u8>()];
    (len, kind, flags, any::<u16>(), bytes(0..100)).prop_map(|(len, kind, flags, meta, rest)| {
        let mut head = BytesMut::new();
        head.put_u32_le(len);
        head.put_u8(kind);
        head.put_u8(flags);
        head.put_u16_le(meta);
        head.put_slice(&rest);
        head
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn decode_gives_back_what_encode_was_given(frame in frames()) {
        let mut input = BytesMut::from(&frame.encode()[..]);
        prop_assert_eq!(input.len(), frame.wire_len());
        prop_assert_eq!(frame::decode(&mut input), Ok(Some(frame)));
        prop_assert!(input.is_empty());
    }

    #[test]
    fn any_split_of_a_stream_gives_the_same_frames(
        frames in prop::collection::vec(frames(), 1..8),
        cuts in prop::collection::vec(any::<Index>(), 0..20),
    ) {
        let stream: Vec<u8> = frames.iter().flat_map(|frame| frame.encode()).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        let mut input = BytesMut::new();
        let mut arrived = Vec::new();
        for piece in cuts.windows(2) {
            input.extend_from_slice(&stream[piece[0]..piece[1]]);
            while let Some(frame) = frame::decode(&mut input).unwrap() {
                arrived.push(frame);
            }
        }
        prop_assert_eq!(arrived, frames);
        prop_assert!(input.is_empty());
    }

    /// The decoder takes what is a frame, refuses what is none, and in between reserves no more
    /// than the largest frame.
    #[test]
    fn any_bytes_are_decoded_without_panic_or_much_memory(
        input in prop_oneof![heads(), bytes(0..200).prop_map(|bytes| BytesMut::from(&bytes[..]))],
    ) {
        let mut input = input;
        while let Ok(Some(frame)) = frame::decode(&mut input) {
            let _ = (Stream::read(&frame).is_ok(), Control::read(&frame).is_ok());
        }
        let most = HEAD_LEN + MAX_META + MAX_PAYLOAD;
        prop_assert!(input.capacity() <= most, "{} reserved", input.capacity());
    }

    /// A meta that can be read is the one that its message is written as, but for the longer
    /// forms of numbers that postcard takes as well.
    #[test]
    fn any_meta_that_is_read_comes_back(kind in select(FrameKind::ALL.to_vec()), meta in bytes(0..60)) {
        let frame = Frame { kind, meta, payload: Bytes::new() };
        if let Ok(stream) = Stream::read(&frame) {
            let again = stream.frame().unwrap();
            prop_assert!(again.meta.len() <= frame.meta.len());
            prop_assert_eq!(Stream::read(&again), Ok(stream));
        }
        let _ = Control::read(&frame).is_ok();
    }
}

/// A disk size: around the first blocks, or anywhere.
fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![0..5 * BLOCK_SIZE, 0..=MAX_DISK_SIZE]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn blocks_cover_a_disk_without_gap_or_overlap(size in sizes(), cut: Index) {
        let disk = Geometry::new(size).unwrap();
        let count = disk.block_count();
        let cut = if count == 0 { 0 } else { cut.index(usize::try_from(count).unwrap()) as u64 };
        let head = BlockRun { first: 0, count: cut };
        let tail = BlockRun { first: cut, count: count - cut };
        let (start, head_len) = disk.byte_range(head);
        let (middle, tail_len) = disk.byte_range(tail);
        prop_assert_eq!((start, middle), (0, head_len));
        prop_assert_eq!(head_len + tail_len, size);
        prop_assert_eq!(disk.contains(tail), count > 0);
        if count > 0 {
            let one = disk.byte_range(BlockRun { first: cut, count: 1 });
            prop_assert_eq!(one, (cut * BLOCK_SIZE, disk.block_len(cut) as u64));
            prop_assert_eq!(disk.block_len(cut) < BLOCK_LEN, size < (cut + 1) * BLOCK_SIZE);
        }
    }

    #[test]
    fn runs_from_the_wire_stay_on_the_disk(size in sizes(), first: u64, count: u64) {
        let disk = Geometry::new(size).unwrap();
        let run = BlockRun { first, count };
        let (start, len) = disk.byte_range(run);
        prop_assert!(start + len <= size);
        let fits = first.checked_add(count).is_some_and(|end| end <= disk.block_count());
        prop_assert_eq!(disk.contains(run), fits && count > 0);
    }

    /// A root says what the blocks hold, not how zeros were counted; and it says where.
    #[test]
    fn a_range_root_depends_on_contents_alone(
        contents in prop::collection::vec(prop::option::of(0..3_u8), 0..40),
        first in 0..1_u64 << 40,
        blake3: bool,
        changed: Index,
    ) {
        let hash = if blake3 { HashKind::Blake3 } else { HashKind::Xxh3 };
        let digester = Digester::new(hash, Seed([9; 32]));
        let root = |contents: &[Option<u8>], grouped: bool| {
            let mut hasher = RangeHasher::new(&digester, first);
            for run in contents.chunk_by(|a, b| grouped && a.is_none() && b.is_none()) {
                match run[0] {
                    None => hasher.zeros(run.len() as u64),
                    Some(byte) => hasher.content(&Content::Digest(Digest([byte; DIGEST_LEN]))),
                }
            }
            hasher.finish()
        };
        let own = root(&contents, true);
        prop_assert_eq!(own, root(&contents, false));
        if !contents.is_empty() {
            let mut other = contents.clone();
            let at = changed.index(other.len());
            other[at] = if other[at].is_some() { None } else { Some(1) };
            prop_assert_ne!(own, root(&other, true));
        }
    }
}

/// Blocks of the disk that a hostile peer is let at.
const BLOCKS: u64 = 70;

/// Numbers that a peer may come up with: on the disk, just beyond it, or absurd.
fn numbers() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0..BLOCKS + 2,
        1 => Just(BLOCKS),
        1 => (u64::MAX - 3)..=u64::MAX,
    ]
}

fn block_runs() -> impl Strategy<Value = BlockRun> {
    (numbers(), prop_oneof![4 => 0..6_u64, 1 => numbers()])
        .prop_map(|(first, count)| BlockRun { first, count })
}

fn payloads() -> impl Strategy<Value = Bytes> {
    select(vec![0, 1, 15, 16, 17, 32, 160, BLOCK_LEN - 1, BLOCK_LEN])
        .prop_map(|len| vec![1; len].into())
}

/// Frames whose meta is in order; what they say need not be.
fn stream_frames() -> impl Strategy<Value = Frame> {
    let encodings = select(vec![Encoding::Raw, Encoding::Zstd]);
    let root = Just(Digest([1; DIGEST_LEN]));
    let data = (numbers(), encodings, payloads()).prop_map(|(index, encoding, payload)| Frame {
        payload,
        ..Stream::Data(Data { index, encoding }).frame().unwrap()
    });
    let digests = (numbers(), payloads()).prop_map(|(first, payload)| Frame {
        payload,
        ..Stream::Digests(Digests { first }).frame().unwrap()
    });
    let others = prop_oneof![
        block_runs().prop_map(|run| Stream::Holes(Holes { run })),
        block_runs().prop_map(|run| Stream::Zeros(Zeros { run })),
        numbers().prop_map(|next| Stream::Settled(Settled { next })),
        numbers().prop_map(|consumed| Stream::Credit(Credit { consumed })),
        root.prop_map(|root| Stream::End(End { root })),
        root.prop_map(|root| Stream::Agreed(Agreed { root })),
    ];
    prop_oneof![2 => data, 1 => digests, 4 => others.prop_map(|stream| stream.frame().unwrap())]
}

/// One step of a machine whose peer says anything, and whose disk takes its time.
#[derive(Debug, Clone)]
enum Poke {
    Frame(Frame),
    Finish(Index),
}

/// A disk of data and holes, on which every operation must lie.
fn answer(op: &DiskOp) -> DiskDone {
    let disk = Geometry::new(BLOCKS * BLOCK_SIZE).unwrap();
    let on_disk = |run: &BlockRun| assert!(disk.contains(*run), "{op:?}");
    match op {
        DiskOp::Map { from } => {
            let kind = [RunKind::Data, RunKind::Hole][usize::from(from % 10 > 5)];
            let count = (BLOCKS - from).min(3);
            DiskDone::Mapped {
                runs: vec![MapRun { kind, count }],
                data_bytes: 0,
            }
        }
        DiskOp::Compare { run, .. } => {
            on_disk(run);
            let compared = |index| match index % 3 {
                0 => Compared::Zeroed,
                1 => Compared::Equal(Content::Zero),
                _ => Compared::Changed {
                    digest: Digest([2; DIGEST_LEN]),
                    encoding: Encoding::Zstd,
                    payload: Bytes::from_static(b"x"),
                },
            };
            DiskDone::Compared((run.first..run.end()).map(compared).collect())
        }
        DiskOp::Digest { run } => {
            on_disk(run);
            let mut digests = Vec::new();
            for index in run.first..run.end() {
                let digest = u8::try_from(index % 3).unwrap();
                push_content(&mut digests, &Content::Digest(Digest([digest; DIGEST_LEN])));
            }
            DiskDone::Digested(digests.into())
        }
        DiskOp::Write { blocks } => {
            for block in blocks {
                on_disk(&BlockRun {
                    first: block.index,
                    count: 1,
                });
            }
            DiskDone::Written(vec![Content::Zero; blocks.len()])
        }
        DiskOp::Zero { run } | DiskOp::Trim { run } => {
            on_disk(run);
            DiskDone::Zeroed
        }
    }
}

/// Drives a machine through `pokes` until it is done or gives up.
fn poke(machine: &mut dyn Machine, pokes: Vec<Poke>) {
    let mut ops = Vec::new();
    for poke in pokes {
        ops.extend(std::iter::from_fn(|| machine.poll_disk()));
        assert!(ops.len() <= 1 + MAX_READS + MAX_WRITES);
        while machine.poll_transmit().is_some() {}
        let handled = match poke {
            Poke::Frame(frame) => machine.handle_frame(&frame),
            Poke::Finish(_) if ops.is_empty() => Ok(()),
            Poke::Finish(which) => {
                let (ticket, op) = ops.swap_remove(which.index(ops.len()));
                machine.handle_disk(ticket, answer(&op))
            }
        };
        if handled.is_err() {
            return;
        }
    }
}

proptest! {
    #![proptest_config(config())]

    /// Whatever the peer says and however the disk is, a machine goes on or gives an error.
    #[test]
    fn no_order_of_frames_makes_a_machine_panic_or_leave_the_disk(
        pokes in prop::collection::vec(
            prop_oneof![
                stream_frames().prop_map(Poke::Frame),
                any::<Index>().prop_map(Poke::Finish),
            ],
            0..80,
        ),
        compare: bool,
        ship: bool,
    ) {
        let params = SessionParams {
            size: BLOCKS * BLOCK_SIZE,
            hash: HashKind::Xxh3,
            seed: Seed([3; 32]),
            compare,
            ship,
        };
        let geometry = Geometry::new(params.size).unwrap();
        // A frame of the wrong side ends everything, so each gets those of the other side.
        let for_receiver = |poke: &Poke| {
            !matches!(poke, Poke::Frame(frame) if matches!(
                frame.kind,
                FrameKind::Digests | FrameKind::Holes | FrameKind::Credit | FrameKind::Agreed
            ))
        };
        let for_sender = |poke: &Poke| matches!(poke, Poke::Finish(_)) || !for_receiver(poke);
        let keep = |rule: &dyn Fn(&Poke) -> bool| pokes.iter().filter(|p| rule(p)).cloned().collect();
        poke(&mut Sender::new(params, geometry), keep(&for_sender));
        poke(&mut Receiver::new(params, geometry), keep(&for_receiver));
    }
}
