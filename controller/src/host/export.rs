//! Images that a host exports through `qemu-nbd`, for as long as a guard stands there.

use super::script::nbd as script;
use super::{Guard, Host};
use crate::error::Result;

/// What a guest would see of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// What it is called: letters and digits.
    pub name: String,
    /// Path of the image on its host.
    pub path: String,
    /// `raw`, `qcow2`, …
    pub format: String,
    /// It lies on a block device.
    pub is_device: bool,
    /// It may be written to.
    pub is_writable: bool,
}

impl Export {
    /// The image as QEMU's options have it.
    pub(super) fn image_options(&self) -> String {
        let path = self.path.replace(',', ",,");
        let Self { format, .. } = self;
        let file = if self.is_device {
            "host_device"
        } else {
            "file"
        };
        format!("driver={format},file.driver={file},file.filename={path}")
    }
}

/// The path of the socket of an export.
pub fn export_socket(directory: &str, name: &str) -> String {
    format!("{directory}/{name}.sock")
}

impl Host {
    /// Exports images through sockets in a directory of their own, until the guard ends, or this
    /// program or the connection does. What was written is in the images once the guard has ended. `forget` is
    /// as for [`guard`](Self::guard).
    ///
    /// # Errors
    /// When the host cannot be reached; io, when an image cannot be exported, or somebody has it
    /// open who writes.
    pub async fn export(
        &self,
        directory: &str,
        exports: &[Export],
        forget: &[&str],
    ) -> Result<Guard> {
        let (begin, end) = (script::export(), script::end_export());
        let images: Vec<[String; 3]> = exports
            .iter()
            .map(|export| {
                let mode = if export.is_writable { "w" } else { "r" };
                [export.name.clone(), mode.to_owned(), export.image_options()]
            })
            .collect();
        let words = images.iter().flatten().map(String::as_str);
        let begin: Vec<&str> = ["sh", "-c", &begin, directory]
            .into_iter()
            .chain(words)
            .collect();
        self.guard(&begin, &["sh", "-c", &end, directory], forget)
            .await
    }

    /// Ends what [`export`](Self::export) began, where its guard is gone.
    ///
    /// # Errors
    /// Io, when a server does not end.
    pub async fn end_export(&self, directory: &str) -> Result<()> {
        let end = script::end_export();
        self.tool_output(&["sh", "-c", &end, directory], b"")
            .await
            .map(drop)
    }
}
