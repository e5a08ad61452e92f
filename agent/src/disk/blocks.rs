//! What the blocks of a session are read from and written to: an image, or what a server exports.

use std::fmt;

use kvm_clone_protocol::sync::WriteBlock;
use kvm_clone_protocol::units::{BlockRun, Geometry};

use super::SessionContext;
use super::image::Image;
use super::map::Map;
use super::read::{Missing, Scratch};
use crate::failure::Failure;

/// Is given each block that was read, under its index.
pub(super) type Each<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> Result<(), Failure>;

/// Blocks, for several threads at once.
pub(super) trait Blocks: fmt::Debug + Send + Sync {
    /// The runs of holes and data from block `from` on, as many as fit a map.
    ///
    /// # Errors
    /// [`Failure`], which names the byte.
    fn map(&self, from: u64, geometry: Geometry) -> Result<Map, Failure>;

    /// Reads the blocks of a run and gives them out one after the other; as many at once as the
    /// limit allows.
    ///
    /// # Errors
    /// [`Failure`], which names the byte; or that of `each`.
    fn read_blocks(
        &self,
        run: BlockRun,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
        missing: Missing,
        each: Each<'_>,
    ) -> Result<(), Failure>;

    /// Reads one block.
    ///
    /// # Errors
    /// [`Failure`], which names the byte.
    fn read_block(&self, block: &mut [u8], offset: u64, missing: Missing) -> Result<(), Failure>;

    /// Writes a block, with its zeros as holes where these can be had.
    ///
    /// # Errors
    /// [`Failure`], which names the byte.
    fn write_block(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure>;

    /// Makes blocks read as zeros.
    ///
    /// # Errors
    /// [`Failure`], which names the byte.
    fn zero(&self, run: BlockRun, geometry: Geometry) -> Result<(), Failure>;

    /// Gives back the space of blocks that read as zeros already, where that is of use.
    fn trim(&self, run: BlockRun, geometry: Geometry);

    /// Has blocks that were written brought to the disk now, so that little is left for the end.
    fn start_writeback(&self, blocks: &[WriteBlock]);
}

impl Blocks for Image {
    fn map(&self, from: u64, geometry: Geometry) -> Result<Map, Failure> {
        self.map(from, geometry)
    }

    fn read_blocks(
        &self,
        run: BlockRun,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
        missing: Missing,
        each: Each<'_>,
    ) -> Result<(), Failure> {
        self.read_blocks(run, context, scratch, missing, each)
    }

    fn read_block(&self, block: &mut [u8], offset: u64, missing: Missing) -> Result<(), Failure> {
        self.read_block(block, offset, missing)
    }

    fn write_block(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.write_block(offset, bytes)
    }

    fn zero(&self, run: BlockRun, geometry: Geometry) -> Result<(), Failure> {
        self.zero(run, geometry)
    }

    fn trim(&self, run: BlockRun, geometry: Geometry) {
        self.trim(run, geometry);
    }

    fn start_writeback(&self, blocks: &[WriteBlock]) {
        self.start_writeback(blocks);
    }
}
