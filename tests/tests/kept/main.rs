//! Digests that are kept from one run to the next: what did not change is not read again, and
//! nothing that did change is taken for what it was.
//!
//! Every sync here is checked against the disks: what it counts as changed is what differed before
//! it, and afterwards both are equal (`Lab::sync`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod digests;
mod pair;
mod sent;
mod tricks;
