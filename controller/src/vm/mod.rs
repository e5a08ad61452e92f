//! Whole VMs: cloned to another hypervisor, kept in step there, compared. The contents of disks
//! are a [`transfer`](crate::transfer)'s business, and what libvirt says is `libvirt`'s; here is
//! what makes a VM of them, and what must not be done to one.
//!
//! ```text
//!  clone   survey both hosts ─ obstacles? ─ plan ─ record ─ transfers ─ define ─ forget the record
//!  sync    survey both hosts ─ obstacles? ─ checkpoint ─ transfers ─ lineage
//!                                                         └ lineage: unfinished, ahead of the commit
//!  verify  survey both hosts ─ compare disks and definitions
//!
//!  transfers   hold the source at an instant (live) ─ serve images of other formats (container) ─
//!              ship ─ end the servers ─ put overlays into their images ─ let the source go
//!                  └ raw disks count, and with them the overlays
//! ```

pub mod audit;
mod chain;
mod checkpoint;
mod checks;
pub mod clone;
mod container;
pub mod disk;
pub mod doubt;
pub mod failback;
pub mod failover;
mod lineage;
mod live;
pub mod mount;
mod naming;
pub mod network;
mod obstacle;
pub mod order;
pub mod outcome;
mod overlays;
mod pairs;
pub mod pause;
mod plan;
pub mod point;
mod record;
pub mod recover;
mod reference;
pub mod rehearsal;
pub mod replica;
pub mod restore;
pub mod result;
pub mod seed;
mod shown;
mod space;
mod state;
mod survey;
pub mod sync;
mod transfers;
pub mod verify;

pub use live::{LiveChoice, Probe, Quiesce, probe};
pub use obstacle::Obstacle;
pub use result::{Scan, VmResult};
