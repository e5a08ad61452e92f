//! Instructions for each operation, counted by valgrind: the same on a busy machine as on an idle
//! one, so that a small regression shows.
//!
//! Each operation is repeated in a process of its own, N times and then 2 N times. The difference,
//! divided by N, is what one takes; whatever starting and preparing take falls out. The counts are
//! compared with those on record, if they were made by the same compiler for the same kind of
//! processor.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use kvm_clone_bench::operation::Operation;
use serde::{Deserialize, Serialize};

use crate::machine;
use crate::report::Table;
use crate::samples::cell;

/// What is on record, beside the sources.
const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.toml");

/// How much more than on record is a regression, in percent. Counts of one build differed by up to
/// 1.2 where the environment put its memory elsewhere; another libc, which brings its own memcpy,
/// may make some more.
const TOLERANCE: f64 = 5.0;

/// How many blocks are gone through, and how many operations done, at least: enough that the few
/// thousand instructions by which one process differs from another are lost.
const BLOCKS: u64 = 200;
const OPERATIONS: u64 = 5;

/// What is to be done with the counts.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Put them on record instead of comparing them
    #[arg(long)]
    record: bool,
}

/// The file of counts.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// What the counts depend on beside the sources.
    made_with: String,
    /// Of each operation, for one block.
    instructions: BTreeMap<String, u64>,
}

/// Counts all; the table, and whether nothing takes more than on record.
pub(crate) fn run(options: &Options) -> Result<(Table, bool)> {
    let mut counted = Record {
        made_with: made_with(),
        instructions: BTreeMap::new(),
    };
    for operation in Operation::ALL {
        counted
            .instructions
            .insert(operation.name().to_owned(), per_block(operation)?);
    }
    if options.record {
        std::fs::write(RECORD, toml::to_string(&counted)?).context("writing the record")?;
    }
    let known = Record::read(Path::new(RECORD))?;
    Ok(compare(&counted, &known))
}

/// Does an operation so many times, for valgrind to watch.
pub(crate) fn repeat(operation: Operation, times: u64) {
    let mut once = operation.prepare();
    (0..times).for_each(|_| once());
}

impl Record {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path);
        let text = text.with_context(|| format!("reading {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("reading {}", path.display()))
    }
}

/// BLAKE3 and memcpy take wider steps with AVX2. Of more than that valgrind tells nobody.
fn made_with() -> String {
    let wide = if machine::has("avx2") { ", avx2" } else { "" };
    let (compiler, kind) = (machine::compiler(), std::env::consts::ARCH);
    format!("{compiler}, {kind}{wide}")
}

fn per_block(operation: Operation) -> Result<u64> {
    let times = (BLOCKS / operation.blocks()).max(OPERATIONS);
    let [once, twice] = [count(operation, times)?, count(operation, 2 * times)?];
    Ok((twice - once) / (times * operation.blocks()))
}

fn count(operation: Operation, times: u64) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["repeat", operation.name(), &times.to_string()])
        .output()
        .context("running valgrind: install valgrind")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split_once("Collected :"));
    match collected.and_then(|(_, count)| count.trim().parse().ok()) {
        Some(count) if output.status.success() => Ok(count),
        _ => bail!("valgrind ended with {}: {}", output.status, said.trim()),
    }
}

/// Whether an operation may be compared, and has not become more than the tolerance allows.
fn compare(counted: &Record, known: &Record) -> (Table, bool) {
    let alike = counted.made_with == known.made_with;
    let caption = if alike {
        format!("Instructions for a block, {}.", counted.made_with)
    } else {
        format!(
            "Instructions for a block, {}. NOT COMPARED: those on record are of {}.",
            counted.made_with, known.made_with
        )
    };
    let numbers = ["instructions", "on record", "more, %"];
    let mut table = Table::new(caption, &["operation"], &numbers);
    let mut valid = true;
    for (name, &now) in &counted.instructions {
        let before = known.instructions.get(name).copied();
        let more = before.map(|before| (now as f64 / before as f64 - 1.0) * 100.0);
        valid &= !alike || more.is_some_and(|more| more <= TOLERANCE);
        let before = before.map_or_else(|| "–".to_owned(), |before| before.to_string());
        table.push(vec![name.clone(), now.to_string(), before, cell(more, 1)]);
    }
    (table, valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(made_with: &str, instructions: u64) -> Record {
        Record {
            made_with: made_with.to_owned(),
            instructions: BTreeMap::from([("digest".to_owned(), instructions)]),
        }
    }

    #[test]
    fn only_more_by_the_same_compiler_is_a_regression() {
        let known = record("rustc 1", 1000);
        for (now, valid) in [(900, true), (1049, true), (1051, false)] {
            assert_eq!(compare(&record("rustc 1", now), &known).1, valid, "{now}");
            let (table, other) = compare(&record("rustc 2", now), &known);
            assert!(other && table.to_string().contains("NOT COMPARED"));
        }
    }

    #[test]
    fn an_operation_that_is_not_on_record_is_said() {
        let mut known = record("rustc 1", 1000);
        known.instructions.clear();
        assert!(!compare(&record("rustc 1", 1), &known).1);
    }

    #[test]
    fn the_record_has_every_operation() {
        let known = Record::read(Path::new(RECORD)).unwrap();
        let names: Vec<_> = known.instructions.keys().map(String::as_str).collect();
        let mut expected = Operation::ALL.map(Operation::name);
        expected.sort_unstable();
        assert_eq!(names, expected);
    }
}
