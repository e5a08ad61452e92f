//! Measures blocksync against rsync, scp, blocksync-fast, bdsync, diskrsync and the limits of the
//! machine, over a real ssh of its own, and prints tables in Markdown.
//!
//! ```text
//!   bench ─┬─ sshd (own keys, free port on loopback) ◄── counting relay ◄── ssh of every tool
//!          ├─ source image, old image ─ copied before each run ─► destination
//!          └─ one measured command at a time ─ fsync ─ compared with the source ─► a row
//! ```
//!
//! It knows the programs only as a user does, by their command lines.

#![forbid(unsafe_code)]

mod case;
mod compare;
mod count;
mod delay;
mod growth;
mod image;
mod janitor;
mod lab;
mod limits;
mod link;
mod links;
mod machine;
mod measure;
mod namespace;
mod plot;
mod process;
mod quiet;
mod rate;
mod relay;
mod report;
mod samples;
mod setup;
mod size;
mod sshd;
mod tool;
mod vm;
mod volume;

use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use kvm_clone_bench::operation::Operation;

use crate::report::Report;
use crate::setup::Setup;

/// Measures blocksync against other tools and the limits of this machine.
#[derive(Debug, Parser)]
#[command(
    name = "kvm-clone-bench",
    version,
    args_conflicts_with_subcommands = true
)]
struct Args {
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    compare: compare::Options,
    /// Everything, but tiny and quick, for CI: shows that all runs and is right; times mean nothing
    #[arg(long, conflicts_with_all = ["size", "runs", "csv"])]
    smoke: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measures over slow links and over far ones
    Links {
        #[command(flatten)]
        setup: Setup,
        #[command(flatten)]
        options: links::Options,
    },
    /// Measures how blocksync's time, memory and traffic grow with the disk
    Growth {
        #[command(flatten)]
        setup: Setup,
        #[command(flatten)]
        options: growth::Options,
    },
    /// Measures what a guest loses beside a scan (needs root and fio)
    Quiet(quiet::Quiet),
    /// Counts the instructions of the small benches, and compares them with those on record
    Count(count::Options),
    /// Does one of the small benches so many times
    #[command(hide = true)]
    Repeat { operation: Operation, times: u64 },
    /// A limit, as a process of its own, so that it is measured like any tool: reads and digests
    /// the data of all files at once, a thread each
    #[command(hide = true)]
    Scan {
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    match carry_out(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Does what is asked for; whether every run was valid.
fn carry_out(args: &Args) -> Result<bool> {
    match &args.command {
        Some(Command::Scan { files }) => limits::scan(files).map(|()| true),
        Some(Command::Links { setup, options }) => publish(setup, links::run(setup, options)?),
        Some(Command::Growth { setup, options }) => publish(setup, growth::run(setup, options)?),
        Some(Command::Quiet(quiet)) => quiet.run().map(|()| true),
        Some(Command::Count(options)) => {
            let (table, valid) = count::run(options)?;
            print(&table)?;
            Ok(valid)
        }
        Some(Command::Repeat { operation, times }) => {
            count::repeat(*operation, *times);
            Ok(true)
        }
        None if args.smoke => smoke(args),
        None => publish(&args.setup, compare::run(&args.setup, &args.compare)?),
    }
}

fn smoke(args: &Args) -> Result<bool> {
    let setup = args.setup.for_smoke()?;
    let compared = publish(&setup, compare::run(&setup, &args.compare.for_smoke())?)?;
    let linked = publish(&setup, links::run(&setup, &links::Options::for_smoke())?)?;
    let grown = publish(&setup, growth::run(&setup, &growth::Options::for_smoke())?)?;
    Ok(compared && linked && grown)
}

/// Prints a report, and keeps its single runs where that was asked for; whether all were valid.
fn publish(setup: &Setup, report: Report) -> Result<bool> {
    print(&report.text)?;
    if let Some(path) = &setup.csv {
        std::fs::write(path, report.csv).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(report.valid)
}

fn print(tables: impl Display) -> Result<()> {
    write!(std::io::stdout(), "{tables}").context("writing the tables")
}

/// Tells people what happens. The tables alone go to standard output.
fn say(message: &str) {
    // A closed standard error is no reason to stop measuring.
    let _ = writeln!(std::io::stderr(), "{message}");
}
