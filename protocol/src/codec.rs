//! [`frame`] as a tokio-util codec, for the two programs that move frames through
//! pipes and sockets.

use bytes::BytesMut;
use tokio_util::codec::Decoder;

use crate::frame::{self, Frame, FrameError};

/// Cuts a byte stream into frames. Writing needs no codec: [`Frame::encode_head`] and the
/// payload go out as they are.
#[derive(Debug, Default)]
pub struct FrameDecoder(());

/// A stream of frames that ended: broken off, or not frames.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The channel failed, or ended inside a frame.
    #[error("reading from the peer")]
    Io(#[from] std::io::Error),
    /// The bytes are not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl Decoder for FrameDecoder {
    type Item = Frame;
    type Error = ReadError;

    fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, ReadError> {
        Ok(frame::decode(input)?)
    }
}
