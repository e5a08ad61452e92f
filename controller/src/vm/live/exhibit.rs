//! Images of a VM that is off, exported through `qemu-nbd` on their host.

use super::record::{HeldVm, Means, forget_unless_begun, remember};
use crate::error::Result;
use crate::host::{Export, Guard};
use crate::libvirt::Hypervisor;
use crate::vm::state::Kind;

/// What is to be exported.
#[derive(Debug)]
pub(in crate::vm) struct Exhibit<'a> {
    pub(in crate::vm) on: &'a Hypervisor,
    pub(in crate::vm) vm: &'a str,
    pub(in crate::vm) uuid: &'a str,
    pub(in crate::vm) images: Vec<Export>,
    /// Those among them that are removed unless the run goes on to its end.
    pub(in crate::vm) overlays: Vec<String>,
}

/// Where the sockets of what is exported of the VM `uuid` are.
pub(in crate::vm) fn export_directory(uuid: &str) -> String {
    format!("/var/lib/kvm-clone/nbd/{uuid}")
}

impl Exhibit<'_> {
    /// Exports the images once `made` has made them. The servers end with the first guard, and
    /// the VM is remembered as long as they are there; the second keeps others from taking it for
    /// one that was left behind.
    ///
    /// # Errors
    /// Busy, when another run is at the VM; when something cannot be made or exported: then nothing
    /// is left of it.
    pub(in crate::vm) async fn open(
        &self,
        made: impl Future<Output = Result<()>>,
    ) -> Result<(Guard, Guard)> {
        let (on, directory) = (self.on, export_directory(self.uuid));
        let means = Means::Export {
            directory: directory.clone(),
            overlays: self.overlays.clone(),
        };
        let lock = remember(on, self.uuid, &HeldVm::new(self.vm, means)).await?;
        // Servers that were left behind may have what is made now.
        let ready = match on.host().end_export(&directory).await {
            Ok(()) => made.await,
            Err(error) => Err(error),
        };
        let opened = match ready {
            Ok(()) => {
                let note = Kind::Held.path(self.uuid);
                let forget = ["rm", "-f", "--", &note];
                on.host().export(&directory, &self.images, &forget).await
            }
            Err(error) => Err(error),
        };
        match opened {
            Ok(servers) => Ok((servers, lock)),
            Err(error) => {
                // Those that were made; a server that broke off has none of them open any more.
                on.host().remove(&self.overlays).await?;
                forget_unless_begun(on, self.uuid, &error).await?;
                let (vm, host) = (self.vm, on.host());
                Err(error.context(format!("what {vm} on {host} holds cannot be exported")))
            }
        }
    }
}
