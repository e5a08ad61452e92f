//! References: the path that an image holds of the one that it stands on. A copy has that of its
//! source, and gets its own back.

use serde::{Deserialize, Serialize};

use super::survey::Survey;
use crate::error::Result;
use crate::libvirt::Hypervisor;

/// What an image of a destination must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Reference {
    pub(super) path: String,
    pub(super) format: String,
    /// Word for word.
    pub(super) backing: String,
    pub(super) backing_format: String,
}

impl Reference {
    /// Those of `target` that a sync from `source` replaces.
    pub(super) fn replaced(source: &Survey, target: &Survey) -> Vec<Self> {
        let mut replaced = Vec::new();
        for disk in &target.disks {
            let mut all = source.disks.iter();
            let ours = all.find(|ours| ours.target == disk.target);
            for (at, image) in disk.images.iter().enumerate() {
                let had = ours.and_then(|ours| ours.images.get(at)?.backing.as_ref());
                let (Some(backing), Some(below)) = (&image.backing, disk.images.get(at + 1)) else {
                    continue;
                };
                if had != Some(backing) {
                    replaced.push(Self {
                        path: image.path.clone(),
                        format: image.format.clone(),
                        backing: backing.clone(),
                        backing_format: below.format.clone(),
                    });
                }
            }
        }
        replaced
    }

    /// Writes it into its image.
    ///
    /// # Errors
    /// When the image cannot be written.
    pub(super) async fn write(&self, on: &Hypervisor) -> Result<()> {
        let image = [self.path.as_str(), &self.format];
        on.set_reference(image, [&self.backing, &self.backing_format])
            .await
    }

    /// Whether its image holds another one.
    ///
    /// # Errors
    /// When the image cannot be read.
    pub(super) async fn is_lost(&self, on: &Hypervisor) -> Result<bool> {
        let held = on.reference(&self.path, &self.format).await?;
        Ok(held.as_ref() != Some(&self.backing))
    }
}
