//! The file systems of a point, shown on its host, for as long as somebody looks: a file that a guest
//! has lost is copied from there.

use serde::Serialize;

use super::failover::choose;
use super::replica::Replica;
use super::state;
use crate::endpoint::HostSpec;
use crate::error::Result;
use crate::host::{Export, FileSystem};
use crate::libvirt::Hypervisor;
use crate::transfer::Context;

/// Below it each point that is shown has a directory: it goes with a restart of the host.
const PLACE: &str = "/run/kvm-clone/points";

/// Which point is shown.
#[derive(Debug, Clone)]
pub struct MountRequest {
    /// The host that has the replica, and shows it.
    pub on: HostSpec,
    /// The directory of the replica.
    pub directory: String,
    /// The newest point that is not newer than this one; without it, the newest.
    pub point: Option<String>,
}

/// What is shown.
#[derive(Debug, Clone, Serialize)]
pub struct Mounted {
    /// The VM.
    pub vm: String,
    /// The point.
    pub point: String,
    /// The directory on the host, with each disk as `TARGET.raw`.
    pub directory: String,
    /// What is inside of them.
    pub file_systems: Vec<FileSystem>,
}

/// Shows a point, has `tell` say what there is to be seen, and takes it away when the user wants to
/// stop. A point that stands on others keeps runs away meanwhile; another one may be removed, and is
/// shown all the same.
///
/// # Errors
/// Not found, where there is no such point; busy, when a run is at the replica; refused, when somebody
/// else has it mounted; when the host cannot be reached, or cannot show it.
pub async fn mount(
    context: &Context,
    connect: &str,
    request: &MountRequest,
    tell: impl FnOnce(Mounted) -> Result<()>,
) -> Result<()> {
    let on = Hypervisor::new(context.host(&request.on), connect);
    on.host().share().await?;
    let directory = &request.directory;
    let point = choose(&on, directory, request.point.as_deref()).await?;
    let name = state::file_name(&point.manifest.vm);
    let place = format!("{PLACE}/{name}-{}", point.name);
    let disks = point.manifest.disks.iter();
    let images: Vec<Export> = disks.map(|disk| point.export(disk)).collect();
    let lock = Replica::new(&on, directory).hold(&point).await?;
    let (guard, file_systems) = on.host().mount(&place, &images).await?;
    let told = tell(Mounted {
        vm: point.manifest.vm.clone(),
        point: point.name.clone(),
        directory: place,
        file_systems,
    });
    if told.is_ok() {
        context.cancelled.cancelled().await;
    }
    let ended = guard.end().await;
    if let Some(lock) = lock {
        lock.end().await?;
    }
    told.and(ended)
}
