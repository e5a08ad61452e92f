//! Reading blocks: to compare them with what the receiver has, or to digest what is there.

use std::io;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use kvm_clone_protocol::digest::{Content, DIGEST_LEN};
use kvm_clone_protocol::message::{Encoding, FailureCode};
use kvm_clone_protocol::sync::{Compared, Expected, push_content};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};

use super::{Disk, SessionContext};
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

impl Disk {
    /// Reads each block once, and keeps those that differ: what is shipped is what was digested.
    pub(super) fn compare(
        &self,
        run: BlockRun,
        expected: &Expected,
        ship: bool,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
    ) -> Result<Vec<Compared>, Failure> {
        let mut blocks = Vec::new();
        self.read_blocks(
            run,
            context.geometry,
            &mut scratch.block,
            Missing::Error,
            |block| {
                let expected = expected.at(blocks.len());
                blocks.push(match context.digester.content(block) {
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
                });
            },
        )?;
        Ok(blocks)
    }

    pub(super) fn digest(
        &self,
        run: BlockRun,
        context: &SessionContext<'_>,
        scratch: &mut Scratch,
    ) -> Result<Bytes, Failure> {
        let blocks = usize::try_from(run.count).expect("at most a window");
        let mut digests = Vec::with_capacity(blocks * DIGEST_LEN);
        self.read_blocks(
            run,
            context.geometry,
            &mut scratch.block,
            Missing::Zeros,
            |block| {
                push_content(&mut digests, &context.digester.content(block));
            },
        )?;
        Ok(digests.into())
    }

    /// Reads the blocks of a run one after the other into `buffer`, which stays in the cache.
    fn read_blocks(
        &self,
        run: BlockRun,
        geometry: Geometry,
        buffer: &mut [u8; BLOCK_LEN],
        missing: Missing,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Failure> {
        let (offset, len) = geometry.byte_range(run);
        let cold = self.warm_up(offset, len);
        for index in run.first..run.end() {
            let block = &mut buffer[..geometry.block_len(index)];
            self.read_block(block, index * BLOCK_SIZE, missing)?;
            each(block);
        }
        self.cool_down(cold);
        Ok(())
    }

    fn read_block(&self, block: &mut [u8], offset: u64, missing: Missing) -> Result<(), Failure> {
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
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed_at("reading", at, &error)),
            }
        }
        Ok(())
    }
}

/// What the end of a file means inside a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// A source must have every byte.
    Error,
    /// A destination that is shorter reads as zeros.
    Zeros,
}
