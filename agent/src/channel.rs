//! Pipes and sockets as asynchronous streams of frames, in both directions.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use kvm_clone_protocol::codec::{FrameDecoder, ReadError};
use kvm_clone_protocol::frame::{self, Frame};
use kvm_clone_protocol::preamble::{self, Preamble, Versions};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::time::Instant;
use tokio_util::codec::Decoder;
use tokio_util::io::poll_read_buf;

use crate::failure::Failure;

/// How much is read at once: a full pipe, and some frames.
const READ_SIZE: usize = 256 * 1024;

/// What a pipe is asked to hold, so that each side wakes less often.
const PIPE_SIZE: i32 = 1024 * 1024;

/// How often something is said where there is nothing else to say.
pub(crate) const BEAT: Duration = Duration::from_secs(5);

/// Whoever has given no sign of life for this long is taken for dead: four beats, so that one may be
/// late, and well below the 30 seconds within which a run must end.
pub(crate) const SILENCE: Duration = Duration::from_secs(20);

/// Within a frame, so many bytes are a sign of life. Fewer may be the beats of a peer that has
/// nothing to say, swallowed by a frame whose length is wrong: four of them are 32 bytes. The price
/// is that a connection has to carry 50 bytes a second, or a whole frame in [`SILENCE`].
const SIGN_OF_LIFE: usize = 1024;

/// Frames written with one system call.
const WRITE_SLICES: usize = 32;

/// A descriptor that may be waited for.
#[derive(Debug)]
struct Pollable(AsyncFd<OwnedFd>);

impl Pollable {
    /// Regular files and the like cannot be waited for; a thread then carries their bytes through
    /// a pipe (`outward`: from the pipe to the file).
    fn new(fd: OwnedFd, outward: bool) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
        fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // A socket has no pipe size, and an unprivileged user a limit: then it stays as it is.
        let _ = fcntl(fd.as_fd(), FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        let interest = if outward {
            Interest::WRITABLE
        } else {
            Interest::READABLE
        };
        // SAFETY: the descriptor is owned, and nothing replaces or closes it while it is registered.
        match unsafe { AsyncFd::register_with_interest(fd, interest) } {
            Ok(fd) => Ok(Self(fd)),
            Err(error) => {
                let (fd, error) = error.into_parts();
                if error.kind() != io::ErrorKind::PermissionDenied {
                    return Err(error);
                }
                Self::new(carried(fd, outward)?, outward)
            }
        }
    }
}

/// A pipe whose other end a thread connects with `fd`.
fn carried(fd: OwnedFd, outward: bool) -> io::Result<OwnedFd> {
    let (reader, writer) = io::pipe()?;
    let file = std::fs::File::from(fd);
    let (ours, mut from, mut to): (OwnedFd, Box<dyn io::Read + Send>, Box<dyn io::Write + Send>) =
        if outward {
            (writer.into(), Box::new(reader), Box::new(file))
        } else {
            (reader.into(), Box::new(file), Box::new(writer))
        };
    // An error here is the end of the stream for the other end, which is what it must act on.
    std::thread::spawn(move || io::copy(&mut from, &mut to));
    Ok(ours)
}

impl AsyncRead for Pollable {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let spare = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), spare)?)) {
                Ok(Ok(n)) => {
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

/// Frames that come in.
#[derive(Debug)]
pub(crate) struct FrameReader {
    fd: Pollable,
    /// When the last sign of life came: a frame, or a good part of one.
    heard: Instant,
    /// Bytes that came since.
    unheard: usize,
    buffer: BytesMut,
    decoder: FrameDecoder,
}

impl FrameReader {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            fd: Pollable::new(fd, false)?,
            heard: Instant::now(),
            unheard: 0,
            buffer: BytesMut::with_capacity(READ_SIZE),
            decoder: FrameDecoder::default(),
        })
    }

    /// The other end's preamble, which comes before any frame.
    ///
    /// # Errors
    /// [`Failure`] when something else comes, or no version is shared with `ours`.
    pub(crate) async fn preamble(&mut self, ours: Versions) -> Result<(Preamble, u16), Failure> {
        loop {
            if let Some((theirs, _noise)) = preamble::find(&mut self.buffer)? {
                let version = ours.negotiate(theirs.versions)?;
                return Ok((theirs, version));
            }
            if self.fill().await? == 0 {
                return Err(preamble::not_found(&self.buffer).into());
            }
        }
    }

    /// The next frame, or `None` at the end of the stream. May be dropped and called again.
    ///
    /// # Errors
    /// [`ReadError`] when the stream breaks, ends within a frame, or is not frames.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, ReadError> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(Some(frame));
            }
            if self.fill().await? == 0 {
                return self.check_end().map(|()| None);
            }
        }
    }

    /// Whether the stream, which is at its end, ends after a frame.
    ///
    /// # Errors
    /// [`ReadError`] when it does not.
    pub(crate) fn check_end(&self) -> Result<(), ReadError> {
        match self.buffer.is_empty() {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        }
    }

    /// When the last sign of life came.
    pub(crate) fn heard(&self) -> Instant {
        self.heard
    }

    /// From now on signs of life are expected.
    pub(crate) fn expect_life(&mut self) {
        self.heard = Instant::now();
        self.unheard = 0;
    }

    /// A frame that is here already.
    pub(crate) fn buffered(&mut self) -> Result<Option<Frame>, ReadError> {
        let frame = self.decoder.decode(&mut self.buffer)?;
        if frame.is_some() {
            self.expect_life();
        }
        Ok(frame)
    }

    async fn fill(&mut self) -> io::Result<usize> {
        poll_fn(|context| self.poll_fill(context)).await
    }

    /// Reads more, for [`buffered`](Self::buffered) to look at; nothing at the end of the stream.
    ///
    /// # Errors
    /// The stream broke.
    pub(crate) fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.buffer.capacity() - self.buffer.len() < READ_SIZE / 4 {
            self.buffer.reserve(READ_SIZE);
        }
        let read = ready!(poll_read_buf(
            Pin::new(&mut self.fd),
            context,
            &mut self.buffer
        ))?;
        self.unheard += read;
        if self.unheard >= SIGN_OF_LIFE {
            self.expect_life();
        }
        Poll::Ready(Ok(read))
    }
}

/// Frames that go out, in order.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    fd: Pollable,
    queue: VecDeque<Bytes>,
}

impl FrameWriter {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            fd: Pollable::new(fd, true)?,
            queue: VecDeque::new(),
        })
    }

    /// Takes a frame for writing, whatever waits already.
    pub(crate) fn push(&mut self, frame: &Frame) {
        let mut head = BytesMut::with_capacity(frame::HEAD_LEN + frame.meta.len());
        frame.encode_head(&mut head);
        self.queue.push_back(head.freeze());
        if !frame.payload.is_empty() {
            self.queue.push_back(frame.payload.clone());
        }
    }

    pub(crate) fn push_bytes(&mut self, bytes: Bytes) {
        self.queue.push_back(bytes);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Frames, or parts of them, that wait.
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Writes a part of what was taken; for ever pending when there is nothing. May be dropped
    /// and called again.
    ///
    /// # Errors
    /// The other end is gone.
    pub(crate) async fn write_some(&mut self) -> io::Result<()> {
        poll_fn(|context| self.poll_write(context, usize::MAX))
            .await
            .map(drop)
    }

    /// Writes a part of what was taken, as many bytes as are `allowed` at the most; pending when
    /// there is nothing.
    ///
    /// # Errors
    /// The other end is gone.
    pub(crate) fn poll_write(
        &mut self,
        context: &mut Context<'_>,
        allowed: usize,
    ) -> Poll<io::Result<usize>> {
        if self.queue.is_empty() {
            return Poll::Pending;
        }
        let written = loop {
            let mut guard = ready!(self.fd.0.poll_write_ready(context))?;
            let slices = slices(&self.queue, allowed);
            match guard.try_io(|fd| write_vectored(fd.get_ref(), &slices)) {
                Ok(Ok(written)) => break written,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        };
        self.advance(written);
        Poll::Ready(Ok(written))
    }

    /// Writes everything that was taken.
    ///
    /// # Errors
    /// The other end is gone.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        while !self.is_empty() {
            self.write_some().await?;
        }
        Ok(())
    }

    fn advance(&mut self, mut written: usize) {
        while written > 0
            && let Some(front) = self.queue.front_mut()
        {
            let part = written.min(front.len());
            front.advance(part);
            written -= part;
            if front.is_empty() {
                self.queue.pop_front();
            }
        }
    }
}

/// The front of the queue, as much of it as may be written.
fn slices(queue: &VecDeque<Bytes>, allowed: usize) -> Vec<IoSlice<'_>> {
    let mut left = allowed;
    queue
        .iter()
        .take(WRITE_SLICES)
        .map_while(|bytes| {
            let part = bytes.len().min(left);
            left -= part;
            (part > 0).then(|| IoSlice::new(&bytes[..part]))
        })
        .collect()
}

fn write_vectored(fd: &OwnedFd, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    Ok(nix::sys::uio::writev(fd, slices)?)
}
