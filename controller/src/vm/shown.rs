//! A point as a guest would see its disks: the files of one that stands on nothing, and servers for one
//! that stands on others, which no run changes meanwhile.

use uuid::Uuid;

use super::live::export_directory;
use super::point::{Point, PointDisk, PointFormat};
use super::replica::Replica;
use crate::endpoint::{DiskLocation, NbdUri};
use crate::error::Result;
use crate::host::{Export, Guard, export_socket};
use crate::libvirt::Hypervisor;

/// A point, for as long as it is shown.
#[derive(Debug)]
pub(super) struct Shown {
    point: Point,
    directory: String,
    /// The servers, and what keeps runs away.
    held: Option<[Guard; 2]>,
}

impl Shown {
    /// Shows a point of the replica in a directory.
    ///
    /// # Errors
    /// Busy, when a run is at the replica; when the host cannot be reached, or has no `qemu-nbd`.
    pub(super) async fn open(on: &Hypervisor, directory: &str, point: &Point) -> Result<Self> {
        let mut shown = Self {
            point: point.clone(),
            directory: export_directory(&Uuid::new_v4().to_string()),
            held: None,
        };
        if let Some(lock) = Replica::new(on, directory).hold(point).await? {
            let disks = point.manifest.disks.iter();
            let deltas = disks.filter(|disk| disk.format == PointFormat::Delta);
            let images: Vec<Export> = deltas.map(|disk| point.export(disk)).collect();
            let nothing = ["true"];
            let servers = on.host().export(&shown.directory, &images, &nothing);
            shown.held = Some([servers.await?, lock]);
        }
        Ok(shown)
    }

    /// Where a disk is shown in place of its file; `None` where that is what a guest sees.
    pub(super) fn server_of(&self, disk: &PointDisk) -> Option<DiskLocation> {
        let socket = export_socket(&self.directory, &disk.target);
        let uri = NbdUri::of_socket(&socket, &disk.target);
        (disk.format == PointFormat::Delta).then_some(DiskLocation::Nbd(uri))
    }

    /// Where a disk is to be read.
    pub(super) fn location(&self, disk: &PointDisk) -> DiskLocation {
        let server = self.server_of(disk);
        server.unwrap_or_else(|| DiskLocation::Path(self.point.file(disk).into()))
    }

    /// Ends that.
    ///
    /// # Errors
    /// When the host cannot be reached, or a server does not end.
    pub(super) async fn end(self) -> Result<()> {
        for guard in self.held.into_iter().flatten() {
            guard.end().await?;
        }
        Ok(())
    }
}
