//! What both ends of a kvm-clone session agree on, without any I/O.
//!
//! No clock, no file, no socket, no process: bytes and events go in, bytes and actions come out.
//! The agent and the controller bring the pipes and the disks.
//!
//! ```text
//!   bytes ─ preamble::find ─ frame::decode ─ message::Stream::read ─ sync::{Sender, Receiver}
//!                                                                        │ poll_disk     ⇄ disk
//!   bytes ─────────────────── Frame::encode_head + payload ─────────── poll_transmit
//! ```
//!
//! `PROTOCOL.md` beside this crate is the specification of the wire.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

#[cfg(feature = "codec")]
pub mod codec;
pub mod digest;
pub mod frame;
#[doc(hidden)]
pub mod fuzzing;
pub mod message;
pub mod preamble;
pub mod sync;
pub mod units;

/// Ends the temporary name, `.NAME.kc-new`, under which a destination that did not exist is
/// written in its directory, and kept for the next run when this one is interrupted.
pub const PARTIAL_SUFFIX: &str = ".kc-new";
