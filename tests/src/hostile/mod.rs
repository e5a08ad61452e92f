//! Peers that break the rules of the protocol, against the programs as they are shipped.
//!
//! ```text
//!   a test ── control ──► kvm-clone-agent serve     Trial, Agent: a hostile controller,
//!     └────── attach ───►        │                  Link: a hostile sender or receiver
//!                              a disk               Ground: what must stay as it is
//!
//!   kvm-clone-ctl ──────► hostile_agent ──────► kvm-clone-agent
//!                         Mask: passes everything on, but for what its story changes
//!
//!   agent ◄── attach ──► Wire ◄── attach ──► agent     one bit is flipped on the way
//! ```
//!
//! What is claimed of each story is the same: it ends in time, with the failure that its rule
//! names; nothing panics; memory stays below [`MEMORY`]; nothing is written outside of the
//! session's blocks; nothing is committed.

pub mod agent;
pub mod connection;
pub mod frames;
pub mod ground;
pub mod lies;
pub mod link;
pub mod mask;
mod said;
pub mod trial;
pub mod watch;
pub mod wire;

use std::time::Duration;

/// What an agent may have resident, whatever its peer does.
pub const MEMORY: u64 = 64 << 20;

/// A story takes milliseconds, or, where silence is noticed, 20 s and a little; the rest is for a
/// loaded machine. What has not ended by then hangs.
pub const DEADLINE: Duration = Duration::from_secs(90);
