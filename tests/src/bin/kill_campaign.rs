//! Kills processes of `disk sync` at all moments of it, looks at what must hold, and prints a
//! table:
//!
//! ```console
//! # cargo build -p kvm-clone-ctl
//! # cargo run -p kvm-clone-tests --bin kill_campaign -- --kills 300 --apply staged --on ext4
//! ```
//!
//! `--seed N` decides the moments. The exit code is 1 when something was as it must not be, and 2
//! for a wrong command line.

#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the table is what this program is for"
)]

use std::process::ExitCode;

use kvm_clone_tests::campaign::{self, Apply, Plan};
use kvm_clone_tests::mount::Kind;

const USAGE: &str =
    "usage: kill_campaign [--kills N] [--apply staged|reflink] [--on ext4|xfs|btrfs] [--seed N]";

fn main() -> ExitCode {
    let Some(plan) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let Some(report) = campaign::run(&plan, |story| eprintln!("{story}")) else {
        return ExitCode::FAILURE;
    };
    println!("{report}");
    if report.violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Option<Plan> {
    let mut plan = Plan {
        kills: 40,
        apply: Apply::Staged,
        on: Kind::Ext4,
        seed: u64::from(std::process::id()),
    };
    while let Some(word) = words.next() {
        let value = words.next()?;
        match word.as_str() {
            "--kills" => plan.kills = value.parse().ok()?,
            "--seed" => plan.seed = value.parse().ok()?,
            "--apply" => {
                let all = [Apply::Staged, Apply::Reflink];
                plan.apply = all.into_iter().find(|apply| apply.name() == value)?;
            }
            "--on" => {
                let all = Kind::ALL;
                plan.on = all.into_iter().find(|kind| kind.to_string() == value)?;
            }
            _ => return None,
        }
    }
    Some(plan)
}
