//! Reading blocks, and comparing them with what the receiver has.

use bytes::Bytes;
use kvm_clone_protocol::digest::Content;
use kvm_clone_protocol::message::{Encoding, FailureCode, IoChoice};
use kvm_clone_protocol::sync::{Compared, Expected, WINDOW};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun};

use super::SessionContext;
use super::blocks::{Blocks, Each};
use super::cache::Cached;
use super::direct::Aligned;
use super::image::Image;
use super::kept::{Piece, pieces};
use super::throttle::admit;
use crate::failure::Failure;

/// Memory of one worker, used again for every block so that it stays in the processor's cache.
pub(crate) struct Scratch {
    pub(super) block: Box<[u8; BLOCK_LEN]>,
    /// A window of a disk that is not in the page cache.
    window: Option<Aligned>,
    pub(crate) decompressor: Option<zstd::bulk::Decompressor<'static>>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            block: Box::new([0; BLOCK_LEN]),
            window: None,
            decompressor: None,
        }
    }

    pub(super) fn window(&mut self) -> &mut Aligned {
        let blocks = usize::try_from(WINDOW).expect("a small number");
        self.window
            .get_or_insert_with(|| Aligned::new(blocks * BLOCK_LEN))
    }
}

/// Reads each block once, and keeps those that differ: what is shipped is what was digested.
///
/// # Errors
/// As [`Blocks::read_blocks`].
pub(super) fn compare(
    disk: &dyn Blocks,
    run: BlockRun,
    expected: &Expected,
    ship: bool,
    context: &SessionContext<'_>,
    scratch: &mut Scratch,
) -> Result<Vec<Compared>, Failure> {
    let expected =
        |index: u64| expected.at(usize::try_from(index - run.first).expect("at most a window"));
    let mut blocks = Vec::new();
    // A block that is to be shipped must be read.
    let is_settled = |index, content| content == expected(index) || content == Content::Zero;
    for piece in pieces(context.kept, run, is_settled) {
        match piece {
            Piece::Known(index, content) => {
                context.trust(index);
                blocks.push(match content {
                    content if content == expected(index) => Compared::Equal(content),
                    _ => Compared::Zeroed,
                });
            }
            Piece::Unknown(unknown) => {
                let mut contents = Vec::new();
                let mut compare = |index: u64, block: &mut [u8]| {
                    let content = context.digester.content(block);
                    contents.push(content);
                    blocks.push(compared(content, expected(index), ship, context, block));
                    Ok(())
                };
                disk.read_blocks(unknown, context, scratch, Missing::Error, &mut compare)?;
                context.note(unknown.first, &contents);
            }
        }
    }
    Ok(blocks)
}

impl Image {
    /// Reads the blocks of a run and gives them out one after the other; as many at once as the
    /// limit allows. What is in the page cache is read block by block into a buffer that stays in
    /// the processor's; of what is not, a whole window comes from the storage at once.
    ///
    /// # Errors
    /// [`Failure`], which names the byte; or that of `each`.
    pub(super) fn read_blocks(
        &self,
        run: BlockRun,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
        missing: Missing,
        each: Each<'_>,
    ) -> Result<(), Failure> {
        if context.io == IoChoice::Direct && !self.has_direct() {
            let message = format!(
                "{} cannot be read past the page cache (--io auto reads it as it can be)",
                self.path.display()
            );
            return Err(Failure::new(FailureCode::MissingRequirement, message));
        }
        let geometry = context.geometry;
        let mut first = run.first;
        while first < run.end() {
            let count = admit(run.end() - first);
            let part = BlockRun { first, count };
            let range = geometry.byte_range(part);
            let cached = self.cached(range);
            let is_direct = match context.io {
                IoChoice::Auto => matches!(cached, Cached::None),
                IoChoice::Direct => true,
                IoChoice::Buffered => false,
            };
            let read = is_direct.then(|| self.read_window(range, scratch.window(), missing));
            if let Some(Some(window)) = read {
                for (index, block) in (first..).zip(window.chunks_mut(BLOCK_LEN)) {
                    each(index, block)?;
                }
            } else {
                self.warm_up(range, &cached);
                for index in first..part.end() {
                    let block = &mut scratch.block[..geometry.block_len(index)];
                    self.read_block(block, index * BLOCK_SIZE, missing)?;
                    each(index, block)?;
                }
            }
            self.cool_down(range, &cached);
            first = part.end();
        }
        Ok(())
    }

    /// Reads a range past the page cache, all of it. `None` where that cannot be done: whoever reads
    /// block by block then finds out why.
    fn read_window<'b>(
        &self,
        (offset, len): (u64, u64),
        memory: &'b mut Aligned,
        missing: Missing,
    ) -> Option<&'b mut [u8]> {
        let len = usize::try_from(len).ok()?;
        let read = self.read_direct(offset, len, memory)?;
        if read < len && missing == Missing::Error {
            return None;
        }
        let bytes = &mut memory.bytes()[..len];
        bytes[read..].fill(0);
        Some(bytes)
    }

    pub(super) fn read_block(
        &self,
        block: &mut [u8],
        offset: u64,
        missing: Missing,
    ) -> Result<(), Failure> {
        let mut filled = 0;
        while filled < block.len() {
            let at = offset + filled as u64;
            match self.file.read_at(&mut block[filled..], at) {
                Ok(0) if missing == Missing::Zeros => {
                    block[filled..].fill(0);
                    return Ok(());
                }
                Ok(0) => {
                    let message = format!(
                        "{} ends too early: it was cut meanwhile",
                        self.path.display()
                    );
                    let code = FailureCode::Io;
                    return Err(Failure {
                        code,
                        offset: Some(at),
                        message,
                    });
                }
                Ok(n) => filled += n,
                Err(error) => return Err(self.failed_at("reading", at, &error)),
            }
        }
        Ok(())
    }
}

/// How a block that was read stands to what the receiver has. One that differs is kept, if it is
/// to be shipped.
fn compared(
    content: Content,
    expected: Content,
    ship: bool,
    context: &SessionContext<'_>,
    block: &[u8],
) -> Compared {
    match content {
        content if content == expected => Compared::Equal(content),
        Content::Zero => Compared::Zeroed,
        Content::Digest(digest) if ship => {
            let (encoding, payload) = context.compressor.encode(block);
            Compared::Changed {
                digest,
                encoding,
                payload,
            }
        }
        Content::Digest(digest) => Compared::Changed {
            digest,
            encoding: Encoding::Raw,
            payload: Bytes::new(),
        },
    }
}

/// What the end of a file means inside a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// A source must have every byte.
    Error,
    /// A destination that is shorter reads as zeros.
    Zeros,
}
