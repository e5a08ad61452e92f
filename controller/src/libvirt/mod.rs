//! What this program knows of libvirt: domains and their definitions, pools and networks, asked
//! of the `virsh` on each hypervisor. No libvirt library is needed here.

mod hypervisor;

pub use hypervisor::{DomainState, Hypervisor};
