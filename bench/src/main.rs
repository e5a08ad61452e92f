//! Measures blocksync against rsync, scp, blocksync-fast, bdsync, diskrsync and the limits of the
//! machine, in one run, over a real ssh of its own, and prints a table in Markdown.
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
mod image;
mod janitor;
mod lab;
mod limits;
mod machine;
mod measure;
mod process;
mod relay;
mod report;
mod size;
mod sshd;
mod tool;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

use crate::case::Case;
use crate::image::Layout;
use crate::lab::Lab;
use crate::report::Report;
use crate::size::Size;
use crate::tool::Tool;

/// Measures blocksync against other tools and the limits of this machine.
#[derive(Debug, Parser)]
#[command(name = "kvm-clone-bench", version)]
struct Args {
    /// Size of the disk image
    #[arg(long, default_value = "4G")]
    size: Size,
    /// How much of the image is data; the rest is holes
    #[arg(long, default_value_t = 0.5, value_parser = share)]
    data_share: f64,
    /// Runs of each measurement; the table shows medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Drop the page cache before each run, instead of filling it (needs root)
    #[arg(long)]
    cold: bool,
    /// Where the images are made, in a directory of their own that is removed at the end
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// What to measure beside the limits [default: all that this machine has]
    #[arg(long, value_enum, value_delimiter = ',')]
    tools: Vec<Tool>,
    /// Which cases: first, or the percentage of blocks that changed
    #[arg(long, value_delimiter = ',', default_value = "first,0,1,10,50")]
    cases: Vec<Case>,
    /// Also write the figures of every single run to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Use this controller instead of building it
    #[arg(long, value_name = "PATH")]
    controller: Option<PathBuf>,
    /// Tiny and quick, for CI: shows that everything runs and is right; its times mean nothing
    #[arg(long, conflicts_with_all = ["size", "runs"])]
    smoke: bool,
    #[command(subcommand)]
    limit: Option<Limit>,
}

/// Limits that run as a process of their own, so that they are measured like any tool.
#[derive(Debug, Subcommand)]
enum Limit {
    /// Reads and digests the data of all files at once, a thread each
    #[command(hide = true)]
    Scan {
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}

fn main() -> ExitCode {
    match carry_out(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn carry_out(args: &Args) -> Result<ExitCode> {
    if let Some(Limit::Scan { files }) = &args.limit {
        limits::scan(files)?;
        return Ok(ExitCode::SUCCESS);
    }
    let report = run(args)?;
    write!(std::io::stdout(), "{report}").context("writing the table")?;
    Ok(if report.all_valid() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run(args: &Args) -> Result<Report> {
    let (size, runs) = if args.smoke {
        (Size::MIB * 32, 1)
    } else {
        (args.size, args.runs)
    };
    ensure!(
        !args.cold || nix::unistd::geteuid().is_root(),
        "--cold needs root"
    );
    let (tools, absent) = tool::select(&args.tools)?;
    let controller = match &args.controller {
        Some(path) => path.clone(),
        None => tool::build_controller()?,
    };
    let layout = Layout::new(size, args.data_share)?;
    let lab = Lab::new(&args.dir, layout, controller, args.cold)?;
    let mut report = Report::new(machine::describe(lab.path()), layout, runs, args.cold);
    for tool in absent {
        report.note(format!("{tool} was not measured: it is not on PATH"));
    }
    for &case in &args.cases {
        lab.prepare(case)?;
        let contenders = limits::of(case).into_iter().chain(tools.iter().copied());
        for contender in contenders.filter(|contender| contender.has_part_in(case)) {
            for run in 1..=runs {
                say(&format!("{case}: {contender}, run {run} of {runs}"));
                report.add(case, contender, run, lab.measure(case, contender));
            }
        }
    }
    if let Some(path) = &args.csv {
        std::fs::write(path, report.csv())
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(report)
}

/// Tells people what happens. The table alone goes to standard output.
fn say(message: &str) {
    // A closed standard error is no reason to stop measuring.
    let _ = writeln!(std::io::stderr(), "{message}");
}
