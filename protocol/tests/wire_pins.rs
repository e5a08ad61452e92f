//! The bytes of every kind of frame, as a second implementation would have to write them.
//!
//! A pin is never edited to make a change of `message.rs` pass: a published message is frozen, and
//! other bytes are another protocol version. The preamble is pinned in `preamble.rs`.

#![cfg(test)]

use std::fs;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use kvm_clone_protocol::digest::{Digest, Digester, HashKind, RangeHasher, Seed, disk_root};
use kvm_clone_protocol::frame::{self, Frame, FrameKind, HEAD_LEN};
use kvm_clone_protocol::message::*;
use kvm_clone_protocol::units::{BlockRun, Geometry};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// One frame: what it says, and its bytes.
struct Pin {
    frame: Frame,
    message: Any,
    bytes: Vec<u8>,
}

/// A message of either sort of connection.
#[derive(Debug, PartialEq)]
enum Any {
    Control(Control),
    Stream(Stream),
}

impl Any {
    fn read(frame: &Frame) -> Result<Self, MessageError> {
        if frame.kind.is_data() {
            Stream::read(frame).map(Self::Stream)
        } else {
            Control::read(frame).map(Self::Control)
        }
    }
}

macro_rules! pin {
    ($family:ident, $name:ident { $($fields:tt)* }, $hex:literal) => {
        pin!($family, $name { $($fields)* }, b"", $hex)
    };
    ($family:ident, $name:ident { $($fields:tt)* }, $payload:expr, $hex:literal) => {{
        let message = $name { $($fields)* };
        Pin {
            frame: Frame {
                payload: Bytes::from_static($payload),
                ..message.frame().unwrap()
            },
            message: Any::$family($family::$name(message)),
            bytes: hex($hex),
        }
    }};
}

/// Bytes from pairs of hex digits; what follows a `#` is comment.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .lines()
        .flat_map(|line| line.split('#').next().unwrap().bytes())
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// The pin of a kind. A kind without one does not compile.
fn pin(kind: FrameKind) -> Pin {
    match kind {
        FrameKind::Hello => hello(),
        FrameKind::Welcome => welcome(),
        FrameKind::Open => open(),
        FrameKind::Opened => opened(),
        FrameKind::Listen => listen(),
        FrameKind::Listening => listening(),
        FrameKind::Dial => dial(),
        FrameKind::Dialed => dialed(),
        FrameKind::Start => start(),
        FrameKind::Started => started(),
        FrameKind::Progress => progress(),
        FrameKind::Ended => ended(),
        FrameKind::Prepare => prepare(),
        FrameKind::Prepared => prepared(),
        FrameKind::Commit => commit(),
        FrameKind::Committed => committed(),
        FrameKind::Abort => abort(),
        FrameKind::Failed => failed(),
        FrameKind::Digests => digests(),
        FrameKind::Holes => holes(),
        FrameKind::Data => data(),
        FrameKind::Zeros => zeros(),
        FrameKind::Settled => settled(),
        FrameKind::Credit => credit(),
        FrameKind::End => end(),
        FrameKind::Agreed => agreed(),
        FrameKind::Alive => alive(),
        FrameKind::Warning => warning(),
        FrameKind::Recover => recover(),
        FrameKind::Leftover => leftover(),
        FrameKind::Recovered => recovered(),
        FrameKind::Preserve => preserve(),
        FrameKind::Preserved => preserved(),
        FrameKind::Summarize => summarize(),
        FrameKind::Summary => summary(),
        FrameKind::Beat => beat(),
        FrameKind::Place => place(),
    }
}

fn hello() -> Pin {
    pin!(
        Control,
        Hello {
            release: "0.1.0".to_owned(),
            version: 2,
        },
        "07000000  # 7 bytes of meta and payload
         01 00     # Hello, no flags
         0700      # all of them meta
         05 302e312e30  # release: 5 bytes, 0.1.0
         02        # version"
    )
}

fn welcome() -> Pin {
    pin!(
        Control,
        Welcome {
            release: "0.1.0".to_owned(),
            arch: "x86_64".to_owned(),
            agent_digest: std::array::from_fn(|at| u8::try_from(at).unwrap()),
            boot_id: "c0ffee".to_owned(),
            aes: true,
            uid: 1000,
            processors: 2,
        },
        "38000000 02 00 3800  # 56 bytes, Welcome, no flags, all meta
         05 302e312e30        # release: 0.1.0
         06 7838365f3634      # arch: x86_64
         000102030405060708090a0b0c0d0e0f  # agent_digest: 32 bytes, no length
         101112131415161718191a1b1c1d1e1f
         06 633066666565      # boot_id: c0ffee
         01                   # aes: yes
         e807                 # uid: 1000, seven bits a byte, the lowest first
         02                   # processors"
    )
}

fn open() -> Pin {
    pin!(
        Control,
        Open {
            disk: 3,
            location: Location::Path(b"/a\xff\n".to_vec()),
            access: Access::Destination,
        },
        "08000000 03 00 0800  # 8 bytes, Open
         03           # disk
         00           # location: Path
         04 2f61ff0a  # 4 bytes, of which the third is no UTF-8
         01           # access: Destination"
    )
}

fn opened() -> Pin {
    pin!(
        Control,
        Opened {
            disk: 3,
            kind: DiskKind::Device,
            size: 65_537,
            identity: Some(Identity {
                device: 0,
                inode: 300,
            }),
            resumed: false,
            storage: b"w".to_vec(),
            keeps: Some(Keeps {
                hash: HashKind::Xxh3,
                seed: Seed([0x5e; 32]),
            }),
        },
        "2e000000 04 00 2e00  # 46 bytes, Opened
         03      # disk
         01      # kind: Device
         818004  # size: 65537
         01      # identity: there is one
         00      #   device
         ac02    #   inode: 300
         00      # resumed: no
         01 77   # storage: one byte
         01      # keeps: there is one
         00      #   hash: Xxh3
         5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e  # seed: 32 bytes, no length
         5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e"
    )
}

fn listen() -> Pin {
    pin!(
        Control,
        Listen {
            link: 1,
            version: 1
        },
        "02000000 05 00 0200  # 2 bytes, Listen
         01  # link
         01  # version"
    )
}

fn listening() -> Pin {
    pin!(
        Control,
        Listening {
            link: 1,
            name: "x7".to_owned(),
            token: Token([0xab; 16]),
        },
        "14000000 06 00 1400  # 20 bytes, Listening
         01       # link
         02 7837  # name: x7
         abababababababababababababababab  # token: 16 bytes, no length"
    )
}

fn dial() -> Pin {
    pin!(
        Control,
        Dial {
            link: 2,
            version: 1,
            command: vec![b"ssh".to_vec(), b"hv\xfe".to_vec()],
            known_hosts: b"k\n".to_vec(),
            token: Token([0xcd; 16]),
            name: "n".to_owned(),
        },
        "20000000 07 00 2000  # 32 bytes, Dial
         02         # link
         01         # version
         02         # command: 2 words
         03 737368  #   ssh
         03 6876fe  #   hv and a byte that is no UTF-8
         02 6b0a    # known_hosts
         cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd  # token
         01 6e      # name: n"
    )
}

fn dialed() -> Pin {
    pin!(
        Control,
        Dialed { link: 2 },
        "01000000 08 00 0100  # 1 byte, Dialed
         02  # link"
    )
}

fn start() -> Pin {
    pin!(
        Control,
        Start {
            disk: 3,
            link: 2,
            links: 1,
            role: Role::Receiver,
            params: SessionParams {
                size: 1 << 20,
                hash: HashKind::Blake3,
                seed: Seed([0x5e; 32]),
                compare: true,
                ship: false,
            },
            compression: Compression::Level(3),
            rate_limit: 1_000_000,
            apply: ApplyChoice::Staged,
            stage_dir: b"/s".to_vec(),
            full_scan: true,
            keep_sent: Some(128),
            io: IoChoice::Direct,
            nice: true,
            read_limit: 2_000_000,
        },
        "3c000000 09 00 3c00  # 60 bytes, Start
         03      # disk
         02      # link
         01      # links
         01      # role: Receiver
         808040  # params: size 2^20
         01      #   hash: Blake3
         5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e  # seed: 32 bytes, no length
         5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e
         01      #   compare: yes
         00      #   ship: no
         02 03   # compression: Level, 3 (a byte as it is)
         c0843d  # rate_limit: 1000000
         02      # apply: Staged
         02 2f73 # stage_dir: 2 bytes
         01      # full_scan: yes
         01 8001 # keep_sent: 128 bytes stay free
         02      # io: Direct
         01      # nice: yes
         80897a  # read_limit: 2000000"
    )
}

fn started() -> Pin {
    pin!(
        Control,
        Started {
            disk: 3,
            apply: Some(Apply::Reflink),
            resumed: true,
        },
        "04000000 0a 00 0400  # 4 bytes, Started
         03     # disk
         01 03  # apply: Reflink
         01     # resumed: yes"
    )
}

/// Eight numbers of one, two and three bytes.
const COUNTERS: Counters = Counters {
    bytes_data: 9,
    bytes_read: 1,
    bytes_trusted: 2,
    bytes_wire: 127,
    blocks_settled: 128,
    blocks_changed: 16_383,
    blocks_zeroed: 16_384,
    bytes_changed: 5,
};

fn progress() -> Pin {
    pin!(
        Control,
        Progress {
            disk: 3,
            counters: COUNTERS,
        },
        "0d000000 0b 00 0d00  # 13 bytes, Progress
         03      # disk
         09      # bytes_data
         01      # bytes_read
         02      # bytes_trusted
         7f      # bytes_wire: 127, the last in one byte
         8001    # blocks_settled: 128
         ff7f    # blocks_changed: 16383, the last in two
         808001  # blocks_zeroed: 16384
         05      # bytes_changed"
    )
}

fn ended() -> Pin {
    pin!(
        Control,
        Ended {
            disk: 3,
            counters: COUNTERS,
            first_difference: Some(9),
            root: Some(Digest([0xd1; 16])),
        },
        "20000000 0c 00 2000  # 32 bytes, Ended
         03     # disk
         09 01 02 7f 8001 ff7f 808001 05  # counters, as in Progress
         01 09  # first_difference: block 9
         01     # root: there is one
         d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1"
    )
}

fn prepare() -> Pin {
    pin!(
        Control,
        Prepare {
            disk: 3,
            reread: true,
        },
        "02000000 0d 00 0200  # 2 bytes, Prepare
         03  # disk
         01  # reread: yes"
    )
}

fn prepared() -> Pin {
    pin!(
        Control,
        Prepared {
            disk: 3,
            root: None,
        },
        "02000000 0e 00 0200  # 2 bytes, Prepared
         03  # disk
         00  # root: none"
    )
}

fn preserve() -> Pin {
    pin!(
        Control,
        Preserve {
            disk: 3,
            path: b"/d".to_vec(),
        },
        "04000000 18 00 0400  # 4 bytes, Preserve
         03  # disk
         02 2f64  # path: /d"
    )
}

fn preserved() -> Pin {
    pin!(
        Control,
        Preserved { disk: 3 },
        "01000000 19 00 0100  # 1 byte, Preserved
         03  # disk"
    )
}

fn summarize() -> Pin {
    pin!(
        Control,
        Summarize {
            disk: 3,
            size: 65_537,
            hash: HashKind::Blake3,
            seed: Seed([0xee; 32]),
        },
        "25000000 1a 00 2500  # 37 bytes, Summarize
         03      # disk
         818004  # size: 65537
         01      # hash: blake3
         eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee
         eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"
    )
}

fn summary() -> Pin {
    pin!(
        Control,
        Summary {
            disk: 3,
            root: Digest([0xd1; 16]),
        },
        "11000000 1b 00 1100  # 17 bytes, Summary
         03  # disk
         d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1d1"
    )
}

fn commit() -> Pin {
    pin!(
        Control,
        Commit {
            disks: vec![0, 3, 200],
        },
        "05000000 0f 00 0500  # 5 bytes, Commit
         03 00 03 c801  # disks: three of them, 0, 3 and 200"
    )
}

fn committed() -> Pin {
    pin!(
        Control,
        Committed {
            disks: vec![0, 3, 200],
        },
        "05000000 10 00 0500  # 5 bytes, Committed
         03 00 03 c801  # disks: three of them, 0, 3 and 200"
    )
}

fn abort() -> Pin {
    pin!(
        Control,
        Abort {
            reason: "stop".to_owned(),
        },
        "05000000 11 00 0500  # 5 bytes, Abort
         04 73746f70  # reason: stop"
    )
}

fn failed() -> Pin {
    pin!(
        Control,
        Failed {
            code: FailureCode::Io,
            disk: Some(3),
            offset: Some(4096),
            message: "\u{e9}".to_owned(),
        },
        "09000000 12 00 0900  # 9 bytes, Failed
         03       # code: Io
         01 03    # disk: there is one, 3
         01 8020  # offset: there is one, 4096
         02 c3a9  # message: two bytes of UTF-8"
    )
}

fn alive() -> Pin {
    pin!(Control, Alive {}, "00000000 13 00 0000  # no bytes, Alive")
}

fn warning() -> Pin {
    pin!(
        Control,
        Warning {
            disk: Some(3),
            message: "so".to_owned(),
        },
        "05000000 14 00 0500  # 5 bytes, Warning
         01 03    # disk: there is one, 3
         02 736f  # message: so"
    )
}

fn recover() -> Pin {
    pin!(
        Control,
        Recover {
            recovery: Recovery::RollBack,
        },
        "01000000 15 00 0100  # 1 byte, Recover
         02  # recovery: RollBack"
    )
}

fn leftover() -> Pin {
    pin!(
        Control,
        Leftover {
            path: b"/d".to_vec(),
            fate: Fate::RolledBack,
            message: "so".to_owned(),
        },
        "07000000 16 00 0700  # 7 bytes, Leftover
         02 2f64  # path: /d
         04       # fate: RolledBack
         02 736f  # message: so"
    )
}

fn recovered() -> Pin {
    pin!(
        Control,
        Recovered {},
        "00000000 17 00 0000  # no bytes, Recovered"
    )
}

fn beat() -> Pin {
    pin!(Stream, Beat {}, "00000000 48 00 0000  # no bytes, Beat")
}

fn place() -> Pin {
    pin!(
        Stream,
        Place { number: 300 },
        "02000000 49 00 0200  # 2 bytes, Place
         ac02  # number"
    )
}

fn digests() -> Pin {
    pin!(
        Stream,
        Digests { first: 300 },
        b"\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\
          \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        "22000000  # 34 bytes of meta and payload
         40 00     # Digests, no flags
         0200      # 2 of them meta
         ac02      # first: 300
         11111111111111111111111111111111  # the digest of block 300
         00000000000000000000000000000000  # block 301 holds only zeros"
    )
}

fn holes() -> Pin {
    pin!(
        Stream,
        Holes {
            run: BlockRun {
                first: 302,
                count: 1 << 30,
            },
        },
        "07000000 41 00 0700  # 7 bytes, Holes
         ae02        # run: first 302
         8080808004  #   count 2^30"
    )
}

fn data() -> Pin {
    pin!(
        Stream,
        Data {
            index: 300,
            encoding: Encoding::Zstd,
        },
        b"payload",
        "0a000000 42 00 0300  # 10 bytes, Data, 3 of them meta
         ac02  # index: 300
         01    # encoding: Zstd
         7061796c6f6164  # the block, as it is encoded"
    )
}

fn zeros() -> Pin {
    pin!(
        Stream,
        Zeros {
            run: BlockRun { first: 5, count: 2 },
        },
        "02000000 43 00 0200  # 2 bytes, Zeros
         05 02  # run: first 5, count 2"
    )
}

fn settled() -> Pin {
    pin!(
        Stream,
        Settled { next: u64::MAX },
        "0a000000 44 00 0a00  # 10 bytes, Settled
         ffffffffffffffffff01  # next: 2^64 - 1, the longest number there is"
    )
}

fn credit() -> Pin {
    pin!(
        Stream,
        Credit { consumed: 1 << 20 },
        "03000000 45 00 0300  # 3 bytes, Credit
         808040  # consumed: 1 MiB"
    )
}

fn end() -> Pin {
    pin!(
        Stream,
        End {
            root: Digest([0xee; 16]),
        },
        "10000000 46 00 1000  # 16 bytes, End
         eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee  # root: no length"
    )
}

fn agreed() -> Pin {
    pin!(
        Stream,
        Agreed {
            root: Digest([0xee; 16]),
        },
        "10000000 47 00 1000  # 16 bytes, Agreed
         eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee  # root: no length"
    )
}

#[test]
fn every_kind_has_the_bytes_of_its_pin() {
    for kind in FrameKind::ALL {
        let pin = pin(kind);
        assert_eq!(pin.frame.kind, kind);
        assert_eq!(
            pin.frame.encode(),
            pin.bytes,
            "{kind:?}: {:02x?}",
            &pin.frame.encode()[..]
        );
        let mut input = BytesMut::from(&pin.bytes[..]);
        let frame = frame::decode(&mut input).unwrap().unwrap();
        assert_eq!(frame, pin.frame);
        assert_eq!(Any::read(&frame), Ok(pin.message));
        assert!(input.is_empty(), "{kind:?} leaves bytes behind");
    }
}

/// The fuzzers start from real messages; KVM_CLONE_BLESS=1 writes them anew.
#[test]
fn every_pin_is_a_seed_of_the_fuzzers() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for kind in FrameKind::ALL {
        let frame = pin(kind).frame;
        // The first byte of each is explained in `fuzzing`.
        let seeds = [
            ("frame", [&[0][..], &frame.encode()].concat()),
            ("message", [&[kind as u8][..], &frame.meta].concat()),
        ];
        for (target, seed) in seeds {
            let name = format!("pin-{kind:?}").to_lowercase();
            let path = corpus.join(target).join(name);
            if std::env::var_os("KVM_CLONE_BLESS").is_some() {
                fs::write(&path, &seed).unwrap();
            }
            let found = fs::read(&path).unwrap_or_default();
            assert!(
                found == seed,
                "{} is missing or old, see KVM_CLONE_BLESS",
                path.display()
            );
        }
    }
}

#[test]
fn encode_head_leaves_exactly_the_payload() {
    for kind in FrameKind::ALL {
        let pin = pin(kind);
        let mut head = BytesMut::new();
        pin.frame.encode_head(&mut head);
        assert_eq!([&head[..], &pin.frame.payload].concat(), pin.bytes);
        assert_eq!(pin.frame.wire_len(), pin.bytes.len());
    }
}

#[test]
fn every_prefix_waits_and_loses_nothing() {
    for kind in FrameKind::ALL {
        let bytes = pin(kind).bytes;
        for len in 0..bytes.len() {
            let mut input = BytesMut::from(&bytes[..len]);
            assert_eq!(frame::decode(&mut input), Ok(None), "{kind:?} cut at {len}");
            assert_eq!(&input[..], &bytes[..len], "{kind:?} cut at {len}");
        }
    }
}

/// A frame whose meta has one byte too few or too many is no message, whatever its kind.
#[test]
fn meta_that_is_too_short_or_too_long_is_malformed() {
    for kind in FrameKind::ALL {
        let frame = pin(kind).frame;
        let malformed = Err(MessageError::Malformed { kind });
        let mut longer = frame.meta.to_vec();
        longer.push(0);
        for len in 0..frame.meta.len() {
            let cut = Frame {
                meta: frame.meta.slice(..len),
                ..frame.clone()
            };
            assert_eq!(Any::read(&cut), malformed, "cut at {len}");
        }
        let longer = Frame {
            meta: longer.into(),
            ..frame
        };
        assert_eq!(Any::read(&longer), malformed);
    }
}

#[test]
fn no_kind_is_read_on_the_wrong_sort_of_connection() {
    for kind in FrameKind::ALL {
        let frame = pin(kind).frame;
        let misplaced = MessageError::Misplaced { kind };
        if kind.is_data() {
            assert_eq!(Control::read(&frame), Err(misplaced));
        } else {
            assert_eq!(Stream::read(&frame), Err(misplaced));
        }
        assert_eq!(pin(kind).bytes[4] >= 0x40, kind.is_data());
        assert!(frame.payload.is_empty() || kind.has_payload());
    }
}

/// The byte of a meta of which all but that byte is pinned above.
fn byte_of(message: &impl Message, at: usize) -> u8 {
    message.frame().unwrap().encode()[HEAD_LEN + at]
}

#[test]
fn the_choices_have_their_numbers() {
    let open = |access| Open {
        disk: 0,
        location: Location::Path(Vec::new()),
        access,
    };
    let accesses = [
        Access::Source,
        Access::Destination,
        Access::Compare,
        Access::LiveSource,
    ];
    assert_eq!(accesses.map(|a| byte_of(&open(a), 3)), [0, 1, 2, 3]);

    let exports = [NbdServer::Unix(Vec::new()), NbdServer::Loopback(0)];
    let at = |server| Open {
        disk: 0,
        location: Location::Export(NbdExport {
            server,
            name: String::new(),
            history: None,
        }),
        access: Access::Source,
    };
    assert_eq!(exports.clone().map(|s| byte_of(&at(s), 1)), [1, 1]);
    assert_eq!(exports.map(|s| byte_of(&at(s), 2)), [0, 1]);

    let opened = |kind| Opened {
        disk: 0,
        kind,
        size: 0,
        identity: None,
        resumed: true,
        storage: Vec::new(),
        keeps: None,
    };
    let kinds = [
        DiskKind::File,
        DiskKind::Device,
        DiskKind::Missing,
        DiskKind::Export,
    ];
    assert_eq!(kinds.map(|k| byte_of(&opened(k), 1)), [0, 1, 2, 3]);

    let encodings = [Encoding::Raw, Encoding::Zstd];
    let data = |encoding| Data { index: 0, encoding };
    assert_eq!(encodings.map(|e| byte_of(&data(e), 1)), [0, 1]);

    let start = |role, hash, compression| Start {
        disk: 0,
        link: 0,
        links: 1,
        role,
        params: SessionParams {
            size: 0,
            hash,
            seed: Seed([0; 32]),
            compare: false,
            ship: false,
        },
        compression,
        rate_limit: 0,
        apply: ApplyChoice::Auto,
        stage_dir: Vec::new(),
        full_scan: false,
        keep_sent: None,
        io: IoChoice::Auto,
        nice: false,
        read_limit: 0,
    };
    let (sender, xxh3) = (Role::Sender, HashKind::Xxh3);
    let roles = [Role::Sender, Role::Receiver];
    assert_eq!(
        roles.map(|role| byte_of(&start(role, xxh3, Compression::Off), 3)),
        [0, 1]
    );
    let hashes = [HashKind::Xxh3, HashKind::Blake3];
    assert_eq!(
        hashes.map(|hash| byte_of(&start(sender, hash, Compression::Off), 5)),
        [0, 1]
    );
    let compressions = [Compression::Off, Compression::Auto, Compression::Level(9)];
    assert_eq!(
        compressions.map(|c| byte_of(&start(sender, xxh3, c), 40)),
        [0, 1, 2]
    );
}

#[test]
fn the_ways_to_apply_have_their_numbers() {
    let choices = [
        ApplyChoice::Auto,
        ApplyChoice::Inplace,
        ApplyChoice::Staged,
        ApplyChoice::Reflink,
    ];
    let applies = [Apply::New, Apply::Inplace, Apply::Staged, Apply::Reflink];
    let start = |apply| Start {
        disk: 0,
        link: 0,
        links: 1,
        role: Role::Receiver,
        params: SessionParams {
            size: 0,
            hash: HashKind::Xxh3,
            seed: Seed([0; 32]),
            compare: false,
            ship: false,
        },
        compression: Compression::Off,
        rate_limit: 0,
        apply,
        stage_dir: Vec::new(),
        full_scan: false,
        keep_sent: None,
        io: IoChoice::Auto,
        nice: false,
        read_limit: 0,
    };
    assert_eq!(choices.map(|c| byte_of(&start(c), 42)), [0, 1, 2, 3]);
    let started = |apply| Started {
        disk: 0,
        apply: Some(apply),
        resumed: false,
    };
    assert_eq!(applies.map(|a| byte_of(&started(a), 2)), [0, 1, 2, 3]);
    let recover = |recovery| Recover { recovery };
    let recoveries = [Recovery::List, Recovery::Finish, Recovery::RollBack];
    assert_eq!(recoveries.map(|r| byte_of(&recover(r), 0)), [0, 1, 2]);
    let leftover = |fate| Leftover {
        path: Vec::new(),
        fate,
        message: String::new(),
    };
    let fates = [
        Fate::Running,
        Fate::Unfinished,
        Fate::Finished,
        Fate::Waiting,
        Fate::RolledBack,
        Fate::Torn,
        Fate::Stuck,
    ];
    assert_eq!(
        fates.map(|f| byte_of(&leftover(f), 1)),
        [0, 1, 2, 3, 4, 5, 6]
    );
}

#[test]
fn the_failure_codes_have_their_numbers() {
    use FailureCode::*;
    // Exhaustive, so that a new code gets a number here.
    let number = |code| match code {
        NotFound => 0,
        Refused => 1,
        Busy => 2,
        Io => 3,
        NoSpace => 4,
        MissingRequirement => 5,
        LinkLost => 6,
        Protocol => 7,
        Mismatch => 8,
        Cancelled => 9,
        Internal => 10,
    };
    let codes = [
        NotFound,
        Refused,
        Busy,
        Io,
        NoSpace,
        MissingRequirement,
        LinkLost,
        Protocol,
        Mismatch,
        Cancelled,
        Internal,
    ];
    for code in codes {
        let failed = Failed {
            code,
            disk: None,
            offset: None,
            message: String::new(),
        };
        assert_eq!(byte_of(&failed, 0), number(code), "{code:?}");
    }
}

/// The seed of the pinned digests: its first eight bytes are XXH3's.
const SEED: Seed = Seed(*b"\x01\x02\x03\x04\x05\x06\x07\x08 the rest of the key....");

/// What a digest is, said once more with the hash functions themselves.
fn hash(kind: HashKind, bytes: &[u8]) -> Digest {
    match kind {
        HashKind::Xxh3 => Digest(xxh3_128_with_seed(bytes, 0x0807_0605_0403_0201).to_le_bytes()),
        HashKind::Blake3 => {
            let whole = blake3::keyed_hash(&SEED.0, bytes);
            Digest(std::array::from_fn(|at| whole.as_bytes()[at]))
        }
    }
}

#[test]
fn digests_have_their_bytes() {
    let pins = [
        (HashKind::Xxh3, "2b1815fe1bf17a4a2ca89e2a81c4889d"),
        (HashKind::Blake3, "df4e4347abe538f0640c72d6cd2197c4"),
    ];
    for (kind, pinned) in pins {
        let digest = Digester::new(kind, SEED).digest(b"a block");
        assert_eq!(digest.0[..], hex(pinned), "{kind:?}: {:02x?}", digest.0);
        assert_eq!(digest, hash(kind, b"a block"));
    }
}

#[test]
fn roots_are_made_of_pinned_records() {
    for kind in [HashKind::Xxh3, HashKind::Blake3] {
        let digester = Digester::new(kind, SEED);
        let mut range = RangeHasher::new(&digester, 3);
        range.block(&Digest([0xaa; 16]));
        range.zeros(1);
        range.zeros(1);
        range.block(&Digest([0xbb; 16]));
        range.zeros(256);
        let root = range.finish();
        let records = hex("01 0300000000000000                  # a block: index 3
                aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa  #   digest
             00 0400000000000000                  # zeros: from block 4
                0200000000000000                  #   two blocks, however they were counted
             01 0600000000000000                  # a block: index 6
                bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb  #   digest
             00 0700000000000000                  # zeros: from block 7
                0001000000000000                  #   256 blocks");
        assert_eq!(root, hash(kind, &records), "{kind:?}");

        let disk = Geometry::new(65_537).unwrap();
        let size = hex("0100010000000000");
        assert_eq!(
            disk_root(&digester, disk, &[root, Digest([0xcc; 16])]),
            hash(kind, &[&size[..], &root.0, &[0xcc; 16]].concat()),
            "{kind:?}"
        );
    }
}

/// The example of PROTOCOL.md, whose values an implementation in another language also gave.
#[test]
fn the_example_of_the_specification_has_its_digests_and_roots() {
    let mut seed = [0; 32];
    seed.iter_mut().zip(0..).for_each(|(byte, n)| *byte = n);
    let (first, last) = (vec![0xa5; 65_536], b"kvm");
    let disk = Geometry::new(196_611).unwrap();
    let expected = [
        (
            HashKind::Xxh3,
            [
                "8fd472de78b2c91b8920fffc66870732",
                "92327bcbe9d29cd1d824b1d4c962fc44",
                "cb78ca87edd918b80732eec5d102131f",
                "3a4dc2ee88692b5f718f5f3ec6847cfa",
            ],
        ),
        (
            HashKind::Blake3,
            [
                "d7cde053ad23403093f204dc936db1f3",
                "437f60814181eaf02e835600631c62d0",
                "c8bbd66b9a8053e1dfa253bc3d647aba",
                "0234c9938f88ffd2458204c1e366c62e",
            ],
        ),
    ];
    for (kind, values) in expected {
        let digester = Digester::new(kind, Seed(seed));
        let (one, other) = (digester.digest(&first), digester.digest(last));
        let mut range = RangeHasher::new(&digester, 0);
        range.block(&one);
        range.zeros(2);
        range.block(&other);
        let range = range.finish();
        let root = disk_root(&digester, disk, &[range]);
        let found = [one, other, range, root].map(|digest| digest.0.to_vec());
        assert_eq!(found, values.map(hex), "{kind:?}");
    }
}
