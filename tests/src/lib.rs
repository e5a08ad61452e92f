//! The ground that the end-to-end tests stand on: hosts that are real sshd processes, disks with
//! known contents, file systems on loop devices, and the controller as a user runs it.
//!
//! ```text
//!   Lab ─┬─ Controller   kvm-clone-ctl with a home and an ssh configuration of its own
//!        ├─ Host hvA     sshd in a mount namespace: own /root, /var/lib/kvm-clone, /tmp, …
//!        ├─ Host hvB     the same
//!        └─ directory    disks and mount points; the same path here and on both hosts
//! ```
//!
//! For whole VMs there is [`hypervisor::Site`]: two hosts with libvirt, in networks of their own, and
//! [`replication`] with a policy from the one to the other.
//! [`desk`] is where the commands of the [`pages`] for people are typed.
//! For power cuts there is [`recorded`]: a disk that remembers its writes.
//! [`campaign`] kills processes of a run, over and over.
//!
//! Nothing here knows how the product works: it starts binaries, and looks at files, processes
//! and JSON. Only [`hostile`] and [`wire`] speak the protocol, to play those who break its rules. What
//! fails in here, and not in the product, panics and names the thing, since a broken laboratory is a
//! failed test.

#![forbid(unsafe_code)]

pub mod campaign;
pub mod confined;
pub mod controller;
pub mod desk;
pub mod host;
pub mod hostile;
pub mod hypervisor;
pub mod image;
pub mod journey;
pub mod lab;
pub mod mount;
pub mod namespace;
pub mod nbd;
pub mod network;
pub mod older;
pub mod outcome;
pub mod pages;
pub mod process;
pub mod recorded;
pub mod replication;
pub mod skip;
pub mod wire;
