//! Reading blocks, and comparing them with what the receiver has.

use bytes::Bytes;
use kvm_clone_protocol::digest::Content;
use kvm_clone_protocol::message::{Encoding, FailureCode};
use kvm_clone_protocol::sync::{Compared, Expected};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};

use super::SessionContext;
use super::image::Image;
use super::kept::{Piece, pieces};
use super::throttle::admit;
use crate::failure::Failure;

/// Memory of one worker, used again for every block so that it stays in the processor's cache.
pub(crate) struct Scratch {
    pub(super) block: Box<[u8; BLOCK_LEN]>,
    pub(crate) decompressor: Option<zstd::bulk::Decompressor<'static>>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self {
            block: Box::new([0; BLOCK_LEN]),
            decompressor: None,
        }
    }
}

impl Image {
    /// Reads each block once, and keeps those that differ: what is shipped is what was digested.
    pub(super) fn compare(
        &self,
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
                    self.read_blocks(
                        unknown,
                        context.geometry,
                        &mut scratch.block,
                        Missing::Error,
                        |index, block| {
                            let content = context.digester.content(block);
                            contents.push(content);
                            blocks.push(compared(content, expected(index), ship, context, block));
                            Ok(())
                        },
                    )?;
                    context.note(unknown.first, &contents);
                }
            }
        }
        Ok(blocks)
    }

    /// Reads the blocks of a run one after the other into `buffer`, which stays in the cache; as
    /// many at once as the limit allows.
    pub(super) fn read_blocks(
        &self,
        run: BlockRun,
        geometry: Geometry,
        buffer: &mut [u8; BLOCK_LEN],
        missing: Missing,
        mut each: impl FnMut(u64, &mut [u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut first = run.first;
        while first < run.end() {
            let count = admit(run.end() - first);
            let part = BlockRun { first, count };
            let cold = self.warm_up(geometry.byte_range(part));
            for index in first..part.end() {
                let block = &mut buffer[..geometry.block_len(index)];
                self.read_block(block, index * BLOCK_SIZE, missing)?;
                each(index, block)?;
            }
            self.cool_down(cold);
            first = part.end();
        }
        Ok(())
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
