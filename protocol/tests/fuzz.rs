//! What the fuzz targets claim, on the stable toolchain: of the corpus that is checked in, and of
//! some thousand inputs made from it. `fuzz/run` goes on from there.

#![cfg(test)]

use std::fs;
use std::path::Path;

use kvm_clone_protocol::fuzzing;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

/// Mutants are cut to this length.
const MAX_LEN: usize = 2048;

/// Inputs that lead where chance would take long to come, by target and name. How they are read is
/// said in `fuzzing`, `fuzzing/peer.rs` and `fuzzing/pair.rs`.
const STORIES: [(&str, &str, &[u8]); 25] = [
    (
        "preamble",
        "plain",
        b"\x00\x00\x89KVC\r\n\x1a\n\x02\0\x02\0\x03\x02\x01\0\x01\0\x03\0",
    ),
    (
        "preamble",
        "greeting",
        b"\x00\x00Welcome to hv1!\n\x89KVC\r\n\x1a\n\x01\0\x03\0\x03\x02\x01\0",
    ),
    (
        "preamble",
        "in-pieces",
        b"\x00\x04\x03\x03\x08\x02\x89KVC\r\n\x1a\n\x01\0\x03\0\x03\x02\x01\0more",
    ),
    (
        "preamble",
        "empty-range",
        b"\x00\x00\x89KVC\r\n\x1a\n\x04\0\x02\0\x03\x02\x01\0",
    ),
    (
        "preamble",
        "at-the-limit",
        b"\xf8\x00\x89KVC\r\n\x1a\n\x01\0\x03\0\x03\x02\x01\0",
    ),
    (
        "preamble",
        "at-the-limit-in-pieces",
        b"\xf8\x01\x07\x89KVC\r\n\x1a\n\x01\0\x03\0\x03\x02\x01\0",
    ),
    (
        "preamble",
        "beyond-the-limit",
        b"\xf9\x00\x89KVC\r\n\x1a\n\x01\0\x03\0\x03\x02\x01\0",
    ),
    // 40 blocks, mapped; the receiver has holes; all is read and shipped; credit; end; agreement.
    (
        "operations",
        "sender-ends",
        &[
            0, 0, 40, 2, 0, 0, 1, 2, 3, 0x82, 2, 0, 0x81, 40, 0, 5, 4, 0x81, 2, 0, 0xe7,
        ],
    ),
    // The same, but for a root that is not the sender's.
    (
        "operations",
        "sender-given-wrong-root",
        &[
            0, 0, 40, 2, 0, 0, 1, 2, 3, 0x82, 2, 0, 0x81, 40, 0, 5, 4, 0x81, 2, 0, 7,
        ],
    ),
    // Blocks are shipped until there is no more credit, and again when there is.
    (
        "operations",
        "sender-out-of-credit",
        &[
            0, 0x82, 255, 255, 2, 0, 0x82, 5, 0, 0x81, 255, 0x82, 5, 0, 0x81, 255, 0, 5, 4, 0x81,
            255,
        ],
    ),
    (
        "operations",
        "sender-given-false-credit",
        &[0, 2, 40, 2, 0, 2, 0, 0x81, 9, 0, 5, 0x14],
    ),
    // As many digests as may be ahead, and one frame more.
    (
        "operations",
        "sender-told-too-much",
        &[
            0, 0x80, 255, 255, 0x80, 255, 0, 2, 0xfe, 0x80, 255, 0, 2, 0xfe, 0, 0, 2, 6,
        ],
    ),
    (
        "operations",
        "sender-told-beyond-its-disk",
        &[0, 0, 40, 2, 0, 0, 1, 2, 0x13],
    ),
    // Blocks arrive until there is no more credit; none is written meanwhile.
    (
        "operations",
        "receiver-given-too-much",
        &[
            1, 0x82, 255, 255, 0x80, 255, 2, 1, 0, 0, 0x80, 255, 2, 1, 0, 0,
        ],
    ),
    // Blocks arrive, are written in any order, and credit is given.
    (
        "operations",
        "receiver-writes",
        &[
            1, 0x82, 255, 255, 0x80, 99, 2, 1, 0, 0, 0x83, 9, 0, 3, 0x81, 1, 0x80, 255, 2, 1, 0, 0,
            0x83, 30, 0, 3, 0x81, 3,
        ],
    ),
    // Digests are made until as many are ahead as may be, and again when they are settled.
    (
        "operations",
        "receiver-far-ahead",
        &[
            1, 0x80, 255, 255, 2, 0, 0x82, 255, 0, 0x82, 255, 0, 0x81, 255, 0x81, 255, 0, 4, 2,
            0x82, 255, 0,
        ],
    ),
    // Blocks that are zero, and not holes, are settled and trimmed; the root is not the same.
    (
        "operations",
        "receiver-trims",
        &[
            1, 0, 40, 2, 0, 0x82, 1, 4, 0x81, 9, 0, 4, 2, 0x82, 20, 0, 0, 6,
        ],
    ),
    // Nothing is compared or shipped, and any root will do.
    ("operations", "receiver-ends", &[1, 6, 40, 0, 4, 3, 0, 6, 1]),
    (
        "operations",
        "receiver-told-to-end-early",
        &[1, 6, 40, 0, 4, 0x1b, 0, 6],
    ),
    (
        "operations",
        "receiver-told-more-after-the-end",
        &[1, 2, 1, 0, 2, 1, 0, 0, 0, 6, 0, 4, 1],
    ),
    (
        "operations",
        "receiver-given-endless-zeros",
        &[1, 2, 40, 0, 3, 1, 7],
    ),
    // Every sort of block beside every other; then the order in which things happen.
    (
        "operations",
        "pair",
        &[
            2, 0, 200, 9, 0, 0x12, 0x21, 0x33, 0x44, 5, 0x50, 0xf7, 0x11, 0x10, 4, 0, 0, 5, 0x40,
            2, 1, 0, 3, 5, 17, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,
        ],
    ),
    // More data than there is credit for, from a disk with a short last block.
    (
        "operations",
        "pair-out-of-credit",
        &[2, 0x88, 255, 255, 17, 1, 3, 2, 3, 4, 5, 0],
    ),
    (
        "operations",
        "pair-without-comparison",
        &[2, 3, 100, 3, 2, 0, 1, 7],
    ),
    (
        "operations",
        "pair-without-shipping",
        &[2, 4, 100, 4, 0x22, 0x32, 0x20, 0x02, 0x33],
    ),
];

/// An input under test: printed when its target panics.
struct Input<'a> {
    name: &'a str,
    data: &'a [u8],
}

impl Drop for Input<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.data.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("{}, as `xxd -r -p` reads it: {hex}", self.name);
        }
    }
}

fn run(target: fn(&[u8]), name: &str, data: &[u8]) {
    let input = Input { name, data };
    target(input.data);
}

/// The checked-in inputs of a target, by name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.display().to_string(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{}", directory.display());
    files
}

fn mutate(data: &mut Vec<u8>, others: &[(String, Vec<u8>)], rng: &mut SmallRng) {
    let at = rng.random_range(0..=data.len());
    let end = rng.random_range(at..=data.len().min(at + 16));
    match rng.random_range(0..6) {
        0 => drop(data.drain(at..end)),
        1 => data.insert(at, rng.random()),
        2 => data.extend_from_within(at..end),
        3 => {
            let (_, other) = others.choose(rng).unwrap();
            data.truncate(at);
            data.extend_from_slice(&other[at.min(other.len())..]);
        }
        4 => data[at..end]
            .iter_mut()
            .for_each(|byte| *byte = rng.random()),
        _ => data[at..end]
            .iter_mut()
            .for_each(|byte| *byte ^= 1 << rng.random_range(0..8)),
    }
}

/// Tries the corpus, and so many inputs made from it.
fn check(name: &str, target: fn(&[u8]), mutants: u32) {
    let seeds = corpus(name);
    for (path, data) in &seeds {
        run(target, path, data);
    }
    let mut rng = SmallRng::seed_from_u64(1);
    for _ in 0..mutants {
        let (path, seed) = seeds.choose(&mut rng).unwrap();
        let mut data = seed.clone();
        for _ in 0..rng.random_range(1..8) {
            mutate(&mut data, &seeds, &mut rng);
        }
        data.truncate(MAX_LEN);
        run(target, path, &data);
    }
}

#[test]
fn every_story_is_in_the_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (target, name, story) in STORIES {
        let path = corpus.join(target).join(name);
        if std::env::var_os("KVM_CLONE_BLESS").is_some() {
            fs::write(&path, story).unwrap();
        }
        let found = fs::read(&path).unwrap_or_default();
        assert!(
            found == story,
            "{} is missing or old, see KVM_CLONE_BLESS",
            path.display()
        );
    }
}

#[test]
fn frames_hold_what_the_fuzzer_claims() {
    check("frame", fuzzing::frame, 5000);
}

/// Fewer, as some of them are 64 KiB long.
#[test]
fn preambles_hold_what_the_fuzzer_claims() {
    check("preamble", fuzzing::preamble, 500);
}

#[test]
fn messages_hold_what_the_fuzzer_claims() {
    check("message", fuzzing::message, 5000);
}

#[test]
fn sessions_hold_what_the_fuzzer_claims() {
    check("operations", fuzzing::operations, 3000);
}
