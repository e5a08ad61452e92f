//! What this program knows of libvirt: domains and their definitions, disk images, pools and
//! networks, asked of the `virsh` and `qemu-img` on each hypervisor. No libvirt library is needed
//! here.

mod backup;
mod capabilities;
pub mod definition;
mod domain;
mod hypervisor;
mod image;
mod inventory;

pub use backup::{BackupDisk, backup_job, changes_context, checkpoint};
pub use capabilities::{DomainCapabilities, Memory, Pool};
pub use domain::Domain;
pub use hypervisor::{DomainState, Hypervisor};
pub use image::Image;
pub use inventory::{DiskSummary, VmSummary};
