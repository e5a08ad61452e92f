//! What the small benches are made of: pieces of the protocol crate that take the processor's time
//! in a run, one at a time and without any I/O.
//!
//! ```text
//!   benches/micro.rs ─ criterion: nanoseconds ──────┐
//!                                                   ├─ operation ─ session
//!   kvm-clone-bench count ─ valgrind: instructions ─┘
//! ```

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod operation;
mod session;
