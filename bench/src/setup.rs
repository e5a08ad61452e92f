//! What every measurement needs to be told: how often, where, and of which controller.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::image::Layout;
use crate::lab::Lab;
use crate::link::Link;
use crate::size::Size;
use crate::tool;
use crate::volume::Volume;

/// Room for the images; what is not used takes none.
const VOLUME_SIZE: Size = Size(64 << 30);

/// The options that all measurements share.
#[derive(Debug, Clone, Args)]
pub(crate) struct Setup {
    /// Runs of each measurement; the tables show medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,
    /// Where the images are made, in a directory of their own that is removed at the end
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub(crate) dir: PathBuf,
    /// Make them on an XFS of the bench's own, whose files can share blocks (needs root)
    #[arg(long)]
    pub(crate) xfs: bool,
    /// Also write the figures of every single run to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    /// Use this controller instead of building it
    #[arg(long, value_name = "PATH")]
    controller: Option<PathBuf>,
}

impl Setup {
    /// One run of each.
    pub(crate) fn for_smoke(&self) -> Result<Self> {
        Ok(Self {
            runs: 1,
            ..self.with_controller()?
        })
    }

    /// The controller is there, and not built again for each place.
    pub(crate) fn with_controller(&self) -> Result<Self> {
        Ok(Self {
            controller: Some(self.controller()?),
            ..self.clone()
        })
    }

    /// A place for images of this layout.
    pub(crate) fn lab(&self, layout: Layout, link: Link) -> Result<Lab> {
        if !self.xfs {
            return self.lab_in(&self.dir, layout, link);
        }
        let volume = Volume::new(&self.dir, VOLUME_SIZE)?;
        let lab = self.lab_in(volume.path(), layout, link)?;
        Ok(lab.on(volume))
    }

    /// The same in another directory than the usual one.
    pub(crate) fn lab_in(&self, dir: &Path, layout: Layout, link: Link) -> Result<Lab> {
        Lab::new(dir, layout, self.controller()?, link)
    }

    /// The controller to measure.
    pub(crate) fn controller(&self) -> Result<PathBuf> {
        self.controller
            .clone()
            .map_or_else(tool::build_controller, Ok)
    }
}
