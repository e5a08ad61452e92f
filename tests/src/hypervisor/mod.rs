//! Two hypervisors on one machine, with VMs that really boot.
//!
//! ```text
//!   Site ─┬─ Controller      in a network namespace of its own, with the bridge 10.99.7.0/24
//!         ├─ Hypervisor hvA  own network, mounts, processes: sshd, libvirtd, images on xfs
//!         └─ Hypervisor hvB  the same, images on ext4
//! ```
//!
//! Both hosts see the machine's programs, and nothing of each other: /var/lib/libvirt,
//! /etc/libvirt, /var/lib/kvm-clone, /root, /run and the temporary directories are their own.

mod guest;
mod records;
mod site;
mod vm;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use guest::{Guest, MARK_BYTES, mark, set_mark};
pub use records::records;
pub use site::{Hypervisor, Site, SiteSpec};
pub use vm::{Firmware, Vm};

/// Keeps other tests of this kind waiting: an emulated guest that writes all the time takes a
/// processor, and two of them leave none to the hosts.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
