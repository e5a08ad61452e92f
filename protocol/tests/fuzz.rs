//! What the fuzz targets claim, on the stable toolchain: of the corpus that is checked in, and of
//! some thousand inputs made from it. `fuzz/run` goes on from there.

#![cfg(test)]

use std::fs;
use std::path::Path;

use kvm_clone_protocol::fuzzing;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

/// Inputs made for each target.
const MUTANTS: u32 = 3000;

/// Mutants are cut to this length.
const MAX_LEN: usize = 2048;

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

fn check(name: &str, target: fn(&[u8])) {
    let seeds = corpus(name);
    for (path, data) in &seeds {
        run(target, path, data);
    }
    let mut rng = SmallRng::seed_from_u64(1);
    for _ in 0..MUTANTS {
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
fn frames_hold_what_the_fuzzer_claims() {
    check("frame", fuzzing::frame);
}

#[test]
fn preambles_hold_what_the_fuzzer_claims() {
    check("preamble", fuzzing::preamble);
}

#[test]
fn messages_hold_what_the_fuzzer_claims() {
    check("message", fuzzing::message);
}

#[test]
fn sessions_hold_what_the_fuzzer_claims() {
    check("operations", fuzzing::operations);
}
