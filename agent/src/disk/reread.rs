//! Disks read from the storage itself, past the page cache, and made into a root: what a destination
//! holds, or will hold, once more (`--verify reread`), or what is there by itself.

use std::sync::Arc;

use kvm_clone_protocol::digest::{Digest, Digester, RangeHasher, disk_root};
use kvm_clone_protocol::sync::RunKind;
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};

use super::Disk;
use super::blocks::Blocks as _;
use super::direct::Aligned;
use super::exported::Exported;
use super::image::Image;
use super::journal::Entry;
use super::overlay::Overlay;
use super::read::Missing;
use super::throttle::admit;
use crate::failure::Failure;

/// Blocks of whose entries the journal is asked at once.
const WINDOW: u64 = 32;

impl Disk {
    /// The root of the contents, which are those of `image` with what waits for them, as the
    /// storage has them. All of it must have been synced.
    ///
    /// # Errors
    /// [`Failure`] when something cannot be read.
    pub(super) fn reread(
        &self,
        image: &Image,
        geometry: Geometry,
        digester: &Digester,
    ) -> Result<Digest, Failure> {
        let direct = Direct::of(image);
        let stage = self
            .overlay
            .as_ref()
            .map(|overlay| (overlay, Direct::of(overlay.stage())));
        let mut hasher = RangeHasher::new(digester, 0);
        let mut buffer = Aligned::new(BLOCK_LEN);
        let mut at = 0;
        while at < geometry.block_count() {
            let mut map = image.map(at, geometry)?;
            if let Some((overlay, _)) = &stage {
                map = overlay.add_all_to(map, at)?;
            }
            for run in map.runs {
                let end = at + run.count;
                if run.kind == RunKind::Hole {
                    hasher.zeros(run.count);
                    at = end;
                }
                while at < end {
                    let window = BlockRun {
                        first: at,
                        count: WINDOW.min(end - at),
                    };
                    let entries = match &stage {
                        Some((overlay, _)) => overlay.entries(window)?,
                        None => Vec::new(),
                    };
                    for index in window.first..window.end() {
                        let entry = entries.get(usize::try_from(index - at).expect("a window"));
                        if entry == Some(&Entry::Zero) {
                            hasher.zeros(1);
                            continue;
                        }
                        admit(1);
                        let block = match (entry, &stage) {
                            (Some(Entry::Data(_)), Some((_, stage))) => {
                                stage.read(index, geometry, &mut buffer)?
                            }
                            _ => direct.read(index, geometry, &mut buffer)?,
                        };
                        hasher.content(&digester.content(block));
                    }
                    at = window.end();
                }
            }
        }
        Ok(disk_root(digester, geometry, &[hasher.finish()]))
    }
}

impl Image {
    /// The root of its contents, as the storage has them.
    ///
    /// # Errors
    /// [`Failure`] when something cannot be read.
    pub(crate) fn root(
        self: &Arc<Self>,
        geometry: Geometry,
        digester: &Digester,
    ) -> Result<Digest, Failure> {
        Disk::of(Arc::clone(self)).reread(self, geometry, digester)
    }
}

impl Exported {
    /// The root of what the server shows.
    ///
    /// # Errors
    /// [`Failure`] when something cannot be read.
    pub(crate) fn root(&self, geometry: Geometry, digester: &Digester) -> Result<Digest, Failure> {
        let mut hasher = RangeHasher::new(digester, 0);
        let mut block = vec![0; BLOCK_LEN];
        let mut at = 0;
        while at < geometry.block_count() {
            for run in self.map(at, geometry)?.runs {
                let end = at + run.count;
                if run.kind == RunKind::Hole {
                    hasher.zeros(run.count);
                    at = end;
                }
                for index in at..end {
                    admit(1);
                    let block = &mut block[..geometry.block_len(index)];
                    self.read_block(block, index * BLOCK_SIZE, Missing::Zeros)?;
                    hasher.content(&digester.content(block));
                }
                at = end;
            }
        }
        Ok(disk_root(digester, geometry, &[hasher.finish()]))
    }
}

impl Overlay {
    /// Reads what was applied to `base` once more, and compares it with what was noted.
    ///
    /// # Errors
    /// [`Failure`] when something cannot be read, or is not what was written.
    pub(super) fn reread_applied(&self, base: &Image, geometry: Geometry) -> Result<(), Failure> {
        let direct = Direct::of(base);
        let mut buffer = Aligned::new(BLOCK_LEN);
        self.journal.for_each(|index, entry| {
            let block = direct.read(index, geometry, &mut buffer)?;
            let holds = match entry {
                Entry::Zero => kvm_clone_protocol::digest::is_zero(block),
                entry => Entry::of(block) == entry,
            };
            if holds {
                return Ok(());
            }
            let code = kvm_clone_protocol::message::FailureCode::Mismatch;
            let message = format!("{} does not hold what was written", base.path.display());
            Err(Failure {
                offset: Some(index * BLOCK_SIZE),
                ..Failure::new(code, message)
            })
        })
    }
}

/// An image that is read past the page cache; where that cannot be had, its pages are dropped
/// before they are read.
struct Direct<'a>(&'a Image);

impl<'a> Direct<'a> {
    fn of(image: &'a Image) -> Self {
        // Whatever is still in the cache is clean by now, and must not answer for the storage.
        image.drop_cache();
        Self(image)
    }

    /// A block; what lies past the end of the file reads as zeros.
    fn read<'b>(
        &self,
        index: u64,
        geometry: Geometry,
        buffer: &'b mut Aligned,
    ) -> Result<&'b [u8], Failure> {
        let (offset, len) = (index * BLOCK_SIZE, geometry.block_len(index));
        let read = match self.0.read_direct(offset, len, buffer) {
            Some(read) => read,
            None => {
                let bytes = &mut buffer.bytes()[..len];
                let read = self.0.file.read_full_at(bytes, offset);
                let read = read.map_err(|error| self.0.failed_at("reading", offset, &error))?;
                self.0.drop_cache();
                read
            }
        };
        let block = &mut buffer.bytes()[..len];
        block[read..].fill(0);
        Ok(block)
    }
}
