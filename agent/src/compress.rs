//! Compressing blocks before they are shipped.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use bytes::Bytes;
use kvm_clone_protocol::message::{Compression, Encoding};

/// The level of `auto`: the fastest that is still worth its name.
const AUTO_LEVEL: i32 = 1;

/// `auto` keeps compressing while blocks shrink below this share of their size, in percent.
const WORTH_PERCENT: u32 = 80;

/// After a stretch of incompressible data `auto` tries one block in this many.
const PROBE_EVERY: u32 = 16;

/// Decides for a session, and is shared by its workers.
#[derive(Debug)]
pub(crate) struct Compressor {
    mode: Compression,
    /// The driver says that the wire is the slower part.
    wire_bound: AtomicBool,
    /// Moving average of compressed size, in percent.
    percent: AtomicU32,
    blocks: AtomicU32,
}

/// What a worker keeps from block to block.
struct Context {
    level: i32,
    compressor: zstd::bulk::Compressor<'static>,
    out: Vec<u8>,
}

thread_local! {
    /// A zstd context is large to make and has to be kept; one a worker is enough, since all
    /// sessions of an agent's life have the same level.
    static CONTEXT: RefCell<Option<Context>> = const { RefCell::new(None) };
}

impl Compressor {
    pub(crate) fn new(mode: Compression) -> Self {
        Self {
            mode,
            wire_bound: AtomicBool::new(false),
            percent: AtomicU32::new(0),
            blocks: AtomicU32::new(0),
        }
    }

    /// What the driver sees of the wire.
    pub(crate) fn set_wire_bound(&self, bound: bool) {
        self.wire_bound.store(bound, Ordering::Relaxed);
    }

    /// The block for the wire: compressed where that was asked for and made it smaller.
    pub(crate) fn encode(&self, block: &[u8]) -> (Encoding, Bytes) {
        let level = match self.mode {
            Compression::Off => None,
            Compression::Level(level) => Some(i32::from(level)),
            Compression::Auto => self.is_worth_it().then_some(AUTO_LEVEL),
        };
        let compressed = level.and_then(|level| compress(block, level));
        if level.is_some() {
            self.learn(
                compressed.as_ref().map_or(block.len(), Bytes::len),
                block.len(),
            );
        }
        match compressed {
            Some(payload) => (Encoding::Zstd, payload),
            None => (Encoding::Raw, Bytes::copy_from_slice(block)),
        }
    }

    fn is_worth_it(&self) -> bool {
        let gives_way = self.percent.load(Ordering::Relaxed) < WORTH_PERCENT;
        let probes = || {
            self.blocks
                .fetch_add(1, Ordering::Relaxed)
                .is_multiple_of(PROBE_EVERY)
        };
        self.wire_bound.load(Ordering::Relaxed) && (gives_way || probes())
    }

    /// Workers may lose each other's updates: the average is a hint, not a count.
    fn learn(&self, compressed: usize, len: usize) {
        let now = u32::try_from(compressed * 100 / len.max(1)).unwrap_or(100);
        let average = self.percent.load(Ordering::Relaxed);
        self.percent
            .store((average * 7 + now) / 8, Ordering::Relaxed);
    }
}

/// `None` when the block does not get smaller.
fn compress(block: &[u8], level: i32) -> Option<Bytes> {
    CONTEXT.with_borrow_mut(|context| {
        if context
            .as_ref()
            .is_none_or(|context| context.level != level)
        {
            let compressor = zstd::bulk::Compressor::new(level).ok()?;
            *context = Some(Context {
                level,
                compressor,
                out: Vec::new(),
            });
        }
        let Context {
            compressor, out, ..
        } = context.as_mut()?;
        // One byte less than the block: what does not fit is not worth shipping.
        out.resize(block.len().saturating_sub(1), 0);
        let len = compressor.compress_to_buffer(block, &mut out[..]).ok()?;
        // A copy of its own length: what waits for the wire holds no more than credit counts.
        (len > 0).then(|| Bytes::copy_from_slice(&out[..len]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .take(len)
        .collect()
    }

    #[test]
    fn a_level_compresses_what_gives_way_and_leaves_noise_alone() {
        let compressor = Compressor::new(Compression::Level(3));
        let (encoding, payload) = compressor.encode(&[b'a'; 65_536]);
        assert_eq!(encoding, Encoding::Zstd);
        assert!(payload.len() < 100);
        let noise = noise(65_536);
        assert_eq!(compressor.encode(&noise), (Encoding::Raw, noise.into()));
        assert_eq!(compressor.encode(&[1]).0, Encoding::Raw);
    }

    #[test]
    fn auto_compresses_only_when_the_wire_is_slower() {
        let compressor = Compressor::new(Compression::Auto);
        assert_eq!(compressor.encode(&[b'a'; 65_536]).0, Encoding::Raw);
        compressor.set_wire_bound(true);
        assert_eq!(compressor.encode(&[b'a'; 65_536]).0, Encoding::Zstd);
    }

    #[test]
    fn auto_gives_up_on_noise_and_notices_when_it_ends() {
        let compressor = Compressor::new(Compression::Auto);
        compressor.set_wire_bound(true);
        let noise = noise(65_536);
        for _ in 0..40 {
            compressor.encode(&noise);
        }
        assert!(compressor.percent.load(Ordering::Relaxed) >= WORTH_PERCENT);
        let tried = (0..2 * 16 * 40).filter(|_| compressor.encode(&[0; 4096]).0 == Encoding::Zstd);
        assert!(tried.count() > 500);
    }
}
