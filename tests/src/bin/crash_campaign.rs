//! Cuts the power of a disk while a file on it is replaced, as often as asked for:
//!
//! ```console
//! # cargo build --bin kvm-clone-ctl
//! # cargo run -p kvm-clone-tests --bin crash_campaign -- --points 2000 --kind xfs --apply staged
//! ```
//!
//! | option | what |
//! | --- | --- |
//! | `--apply NAME` | what replaces the file: `staged`, `reflink`, `inplace`, `new` where there is none (`staged`); or a script: `careful`, `careless`, `script-inplace`, `script-staged` |
//! | `--kind NAME` | the file system: `ext4`, `xfs`, `btrfs` (`ext4`) |
//! | `--points N` | how many power cuts (2000); a run is recorded for every 100 of them |
//! | `--seed N` | another campaign (1) |
//! | `--again N` | after one in N cuts the run is done once more (10) |
//! | `--keep DIR` | where a run is kept in which a failure was found (`/var/tmp/kvm-clone-crash`) |
//! | `--replay DIR --cut SEED` | tries one cut of a kept run again; the image of it is left there as `cut` |
//!
//! It ends with 1 when something was found that must not be.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "the tally is what this program is for")]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::recorded::{Campaign, KEPT, Product, Script, Subject, Tally};
use lexopt::prelude::*;

/// A run has some hundred places for a cut; what survives makes more of each.
const POINTS_OF_A_RUN: usize = 100;

struct Args {
    apply: String,
    subject: Box<dyn Subject>,
    kind: Kind,
    points: usize,
    seed: u64,
    again_every: usize,
    keep: PathBuf,
    replay: Option<PathBuf>,
    cut: Option<u64>,
}

fn main() -> Result<ExitCode, lexopt::Error> {
    let args = parse()?;
    let Some(campaign) = Campaign::new(&*args.subject, args.kind) else {
        return Ok(ExitCode::SUCCESS);
    };
    let campaign = Campaign {
        seed: args.seed,
        again_every: args.again_every,
        keep: Some(args.keep),
        ..campaign
    };
    let since = Instant::now();
    let tally = match (&args.replay, args.cut) {
        (Some(directory), Some(cut)) => campaign.replay(directory, cut),
        (Some(_), None) => return Err("--replay wants --cut".into()),
        (None, _) => all(&campaign, args.points),
    };
    let minutes = since.elapsed().as_secs_f64() / 60.0;
    println!("{} on {}: {tally}", args.apply, args.kind);
    println!("  {minutes:.1} minutes");
    Ok(if tally.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn all(campaign: &Campaign<'_>, points: usize) -> Tally {
    let mut tally = Tally::default();
    let mut round = 0;
    while tally.cuts < points {
        tally += campaign.round(round, POINTS_OF_A_RUN.min(points - tally.cuts));
        round += 1;
        let (cuts, failures) = (tally.cuts, tally.failures.len());
        println!("{cuts} of {points}, failures: {failures}");
    }
    tally
}

fn parse() -> Result<Args, lexopt::Error> {
    let mut args = Args {
        apply: Product::Staged.to_string(),
        subject: Box::new(Product::Staged),
        kind: Kind::Ext4,
        points: 2000,
        seed: 1,
        again_every: 10,
        keep: KEPT.into(),
        replay: None,
        cut: None,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("apply") => {
                args.apply = parser.value()?.string()?;
                args.subject = subject(&args.apply)?;
            }
            Long("kind") => args.kind = parser.value()?.parse_with(kind)?,
            Long("points") => args.points = parser.value()?.parse()?,
            Long("seed") => args.seed = parser.value()?.parse()?,
            Long("again") => args.again_every = parser.value()?.parse()?,
            Long("keep") => args.keep = parser.value()?.into(),
            Long("replay") => args.replay = Some(parser.value()?.into()),
            Long("cut") => args.cut = Some(parser.value()?.parse()?),
            _ => return Err(arg.unexpected()),
        }
    }
    Ok(args)
}

fn subject(name: &str) -> Result<Box<dyn Subject>, String> {
    let script = match name {
        "careful" => Script::CAREFUL,
        "careless" => Script::CARELESS,
        "script-inplace" => Script::IN_PLACE,
        "script-staged" => Script::STAGED,
        _ => {
            let mut ways = Product::ALL.into_iter();
            let way = ways.find(|way| way.to_string() == name);
            return Ok(Box::new(
                way.ok_or_else(|| format!("{name:?} replaces nothing"))?,
            ));
        }
    };
    Ok(Box::new(script))
}

fn kind(name: &str) -> Result<Kind, String> {
    let found = Kind::ALL.into_iter().find(|kind| kind.to_string() == name);
    let on_disk = found.filter(|kind| *kind != Kind::Tmpfs);
    on_disk.ok_or_else(|| format!("{name:?} is no file system on a disk"))
}
