//! Runs of two real agents in which something breaks: a disk that fails, a process that dies, a
//! connection that is cut, stalls or dribbles.
//!
//! ```text
//!   test ──► agent of the source ──► attach ──► agent of the destination ──► kernel calls,
//!     └──────────────── control ───────────────────────┘                     one of which fails
//! ```
//!
//! `FAULT_STRIDE=1` tries every place at which something can break; the default is what a
//! developer waits for.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not see as such"
)]

mod agent;
mod deaths;
mod errors;
mod ground;
mod links;
mod program;
mod relay;
mod run;
mod trial;

/// Of so many places at which something can break, one is tried.
fn stride(default: usize) -> usize {
    let chosen = std::env::var("FAULT_STRIDE").ok();
    chosen.map_or(default, |chosen| chosen.parse().unwrap())
}
