//! A disk that remembers every write, and what a power cut may leave of it.
//!
//! ```text
//!   file system               what is tried runs on it
//!     loop device
//!       file                  of a FUSE file system that this process serves; no write waits in it
//!         image ──► log       each write, discard and flush, in order
//!
//!   image of before + log ──► Platter ──► image of after the cut ──► mount, look, recover, look
//! ```
//!
//! A disk has a cache that a power cut empties. What was written before the last flush that ended
//! is there; of what was written since, any sectors are, in any order. `Platter` is that model,
//! a [`Campaign`] tries it at many cuts, and a [`Subject`] is what has to stand it.
//!
//! Sectors of 4 KiB are not torn; what is longer is.
//! The kernel's file system recovers by its journal, so one that does not mount is a fault in here.

mod campaign;
mod fuse;
mod ground;
mod image;
mod log;
mod neighbour;
mod platter;
mod record;
mod recorder;
mod story;
mod subject;
mod tally;

pub use campaign::{Campaign, KEPT};
pub use subject::{Product, Script, Subject};
pub use tally::{Counts, Tally};
