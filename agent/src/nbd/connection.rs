//! One connection to a server: the handshake, and requests of which several are under way at once.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::wire::{
    self, Chunk, ChunkKind, Command, Extent, Fields, Info, OptionKind, OptionReply,
    OptionReplyKind, Reply, Request,
};
use super::{Address, NbdError};

/// How long a server may say nothing while we wait for it, or take nothing from us.
const PATIENCE: Duration = Duration::from_secs(60);

/// What one request reads or writes at most, in bytes: a window of a session is sixteen of them, as
/// many as QEMU works on at once.
const REQUEST_LEN: u32 = 128 * 1024;

/// What a server must be asked for at least, in bytes, if it has a minimum: a block of a session.
const MAX_MINIMUM: u32 = 64 * 1024;

/// Parts that the answer to one request may have: more than the holes that QEMU tells apart in it.
const MAX_CHUNKS: usize = 512;

/// Bytes of the extents in one answer: twice what QEMU sends at most.
const MAX_STATUS_LEN: u32 = 2 << 20;

/// Bytes of an error with its text.
const MAX_ERROR_LEN: u32 = 8192;

/// The context that tells holes from data.
const ALLOCATION: &str = "base:allocation";

/// An open export.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    facts: Facts,
    is_structured: bool,
    contexts: Contexts,
    next_cookie: u64,
}

/// The numbers of the contexts that a server has.
#[derive(Debug, Clone, Copy, Default)]
struct Contexts {
    /// Tells holes from data.
    allocation: Option<u32>,
    /// Tells what was changed.
    changes: Option<u32>,
}

/// What a server says of its export.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Bytes.
    pub(super) size: u64,
    pub(super) is_read_only: bool,
    /// What is changed by one connection is seen, and flushed, by all.
    pub(super) takes_several: bool,
    pub(super) has_flush: bool,
    pub(super) has_write_zeroes: bool,
    /// Whether holes can be told from data.
    pub(super) has_allocation: bool,
    /// Whether it has the context of changes that was asked for.
    pub(super) has_changes: bool,
}

/// A part of an answer.
#[derive(Debug)]
struct Part {
    /// Which of the requests is answered.
    of: usize,
    is_last: bool,
    what: What,
}

#[derive(Debug)]
enum What {
    Nothing,
    /// The bytes come next.
    Data {
        offset: u64,
        len: u32,
    },
    Hole {
        offset: u64,
        len: u32,
    },
    Status {
        context: u32,
        extents: Vec<Extent>,
    },
    Error {
        offset: u64,
        error: io::Error,
    },
}

impl Connection {
    /// Opens an export, with the context that tells what was `changed`.
    ///
    /// # Errors
    /// There is no such server or export, or it cannot be spoken with.
    pub(super) fn open(
        address: &Address,
        export: &str,
        changed: Option<&str>,
    ) -> Result<Self, NbdError> {
        let mut stream = Stream::connect(address)?;
        stream.greet()?;
        let structured = stream.ask(OptionKind::StructuredReply, &[], |_, _| Ok(()));
        let is_structured = match structured {
            Ok(()) => true,
            Err(NbdError::Unfit(_)) => false,
            Err(error) => return Err(error),
        };
        let contexts = match is_structured {
            true => stream.contexts(export, changed)?,
            false => Contexts::default(),
        };
        let facts = Facts {
            has_allocation: contexts.allocation.is_some(),
            has_changes: contexts.changes.is_some(),
            ..stream.go(export)?
        };
        Ok(Self {
            stream,
            facts,
            is_structured,
            contexts,
            next_cookie: 1,
        })
    }

    pub(super) fn facts(&self) -> Facts {
        self.facts
    }

    /// Reads all of `bytes`, in several requests at once.
    ///
    /// # Errors
    /// [`NbdError::Request`] names the first byte that is known not to be readable.
    pub(super) fn read(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), NbdError> {
        let requests = self.requests(Command::Read, offset, bytes.len() as u64);
        let heads: Vec<u8> = requests.iter().flat_map(Request::encode).collect();
        self.stream.write_all(&heads)?;
        let mut arrived: Vec<Arrived> = requests.iter().map(|_| Arrived::default()).collect();
        self.collect(&requests, |stream, of, what| {
            let (What::Data { offset: at, len } | What::Hole { offset: at, len }) = what else {
                return Err(NbdError::Misbehaved(
                    "a read is answered with something else",
                ));
            };
            let request = &requests[of];
            let start = at.checked_sub(request.offset);
            let start = start.and_then(|start| u32::try_from(start).ok());
            let start =
                start.filter(|start| start.checked_add(len).is_some_and(|end| end <= request.len));
            let start = start.ok_or(NbdError::Misbehaved("bytes come that were not asked for"))?;
            arrived[of].add(start, len)?;
            let start = usize::try_from(at - offset).expect("within the bytes to be read");
            let place = &mut bytes[start..start + len as usize];
            match what {
                What::Data { .. } => stream.read_exact(place)?,
                _ => place.fill(0),
            }
            Ok(())
        })?;
        let whole = |(request, arrived): (&Request, &Arrived)| arrived.len == request.len;
        if requests.iter().zip(&arrived).all(whole) {
            return Ok(());
        }
        Err(NbdError::Misbehaved("some bytes of a read did not come"))
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) -> Result<(), NbdError> {
        let requests = self.requests(Command::Write, offset, bytes.len() as u64);
        for (request, bytes) in requests.iter().zip(bytes.chunks(REQUEST_LEN as usize)) {
            self.stream.write_all(&request.encode())?;
            self.stream.write_all(bytes)?;
        }
        self.collect(&requests, nothing_else)
    }

    /// Makes a range read as zeros, as holes where the server can.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn write_zeroes(&mut self, offset: u64, len: u32) -> Result<(), NbdError> {
        self.single(Command::WriteZeroes, offset, len, nothing_else)
    }

    /// Has the server make durable what was written.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn flush(&mut self) -> Result<(), NbdError> {
        self.single(Command::Flush, 0, 0, nothing_else)
    }

    /// Which of a range is zeros: extents from `offset` on, at least one. They may end before the
    /// range does, or behind it.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn allocation(&mut self, offset: u64, len: u32) -> Result<Vec<Extent>, NbdError> {
        self.status(self.contexts.allocation, offset, len)
    }

    /// Which of a range was changed, as [`allocation`](Self::allocation) tells of zeros.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn changes(&mut self, offset: u64, len: u32) -> Result<Vec<Extent>, NbdError> {
        self.status(self.contexts.changes, offset, len)
    }

    fn status(
        &mut self,
        wanted: Option<u32>,
        offset: u64,
        len: u32,
    ) -> Result<Vec<Extent>, NbdError> {
        let mut found = Vec::new();
        self.single(Command::BlockStatus, offset, len, |_, _, what| match what {
            What::Status { context, extents } => {
                if Some(context) == wanted {
                    found = extents;
                }
                Ok(())
            }
            _ => Err(NbdError::Misbehaved(
                "a question is answered with something else",
            )),
        })?;
        match found[..] {
            [] => Err(NbdError::Misbehaved("a context does not answer")),
            _ => Ok(found),
        }
    }

    fn single(
        &mut self,
        command: Command,
        offset: u64,
        len: u32,
        take: impl FnMut(&mut Stream, usize, What) -> Result<(), NbdError>,
    ) -> Result<(), NbdError> {
        let request = Request {
            command,
            cookie: self.cookie(),
            offset,
            len,
        };
        self.stream.write_all(&request.encode())?;
        self.collect(&[request], take)
    }

    /// The requests for a range, with cookies one after the other.
    fn requests(&mut self, command: Command, offset: u64, len: u64) -> Vec<Request> {
        let mut requests = Vec::new();
        let mut done = 0;
        while done < len {
            let part = (len - done).min(REQUEST_LEN.into());
            requests.push(Request {
                command,
                cookie: self.cookie(),
                offset: offset + done,
                len: u32::try_from(part).expect("at most REQUEST_LEN"),
            });
            done += part;
        }
        requests
    }

    fn cookie(&mut self) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        cookie
    }

    /// Takes the answers to all requests. Of several that failed the one that begins first is told.
    fn collect(
        &mut self,
        requests: &[Request],
        mut take: impl FnMut(&mut Stream, usize, What) -> Result<(), NbdError>,
    ) -> Result<(), NbdError> {
        let mut left = vec![MAX_CHUNKS; requests.len()];
        let mut failed: Option<(u64, io::Error)> = None;
        let mut open = requests.len();
        while open > 0 {
            let part = self.next_part(requests)?;
            left[part.of] = left[part.of]
                .checked_sub(1)
                .ok_or(NbdError::Misbehaved("an answer has no end, or two"))?;
            match part.what {
                What::Nothing => {}
                What::Error { offset, error } => {
                    if failed.as_ref().is_none_or(|(first, _)| offset < *first) {
                        failed = Some((offset, error));
                    }
                }
                what => take(&mut self.stream, part.of, what)?,
            }
            if part.is_last {
                left[part.of] = 0;
                open -= 1;
            }
        }
        match failed {
            None => Ok(()),
            Some((offset, error)) => Err(NbdError::Request { offset, error }),
        }
    }

    fn next_part(&mut self, requests: &[Request]) -> Result<Part, NbdError> {
        let head = self.stream.read_array()?;
        match Reply::parse(&head, || self.stream.read_array())? {
            Reply::Simple { cookie, error } => {
                let of = answered(requests, cookie)?;
                let Request {
                    command,
                    offset,
                    len,
                    ..
                } = requests[of];
                if self.is_structured && matches!(command, Command::Read | Command::BlockStatus) {
                    return Err(NbdError::Misbehaved("a reply is not structured"));
                }
                let what = match (error, command) {
                    (0, Command::Read) => What::Data { offset, len },
                    (0, _) => What::Nothing,
                    (error, _) => What::Error {
                        offset,
                        error: wire::request_error(error),
                    },
                };
                Ok(Part {
                    of,
                    is_last: true,
                    what,
                })
            }
            Reply::Chunk(chunk) => {
                let of = answered(requests, chunk.cookie)?;
                let what = self.chunk(&requests[of], chunk)?;
                let is_last = chunk.is_last;
                Ok(Part { of, is_last, what })
            }
        }
    }

    /// Reads what a chunk says, up to its data.
    fn chunk(&mut self, request: &Request, chunk: Chunk) -> Result<What, NbdError> {
        if !self.is_structured {
            return Err(NbdError::Misbehaved(
                "a reply is structured, and must not be",
            ));
        }
        let stream = &mut self.stream;
        match chunk.kind {
            ChunkKind::None if chunk.len == 0 && chunk.is_last => Ok(What::Nothing),
            ChunkKind::OffsetData if chunk.len > 8 => Ok(What::Data {
                offset: u64::from_be_bytes(stream.read_array()?),
                len: chunk.len - 8,
            }),
            ChunkKind::OffsetHole if chunk.len == 12 => Ok(What::Hole {
                offset: u64::from_be_bytes(stream.read_array()?),
                len: u32::from_be_bytes(stream.read_array()?),
            }),
            ChunkKind::BlockStatus if (5..=MAX_STATUS_LEN).contains(&chunk.len) => {
                let context = u32::from_be_bytes(stream.read_array()?);
                let extents = stream.read_vec(chunk.len - 4)?;
                let extents = Extent::parse_all(&extents)?;
                Ok(What::Status { context, extents })
            }
            ChunkKind::Error | ChunkKind::ErrorOffset
                if (6..=MAX_ERROR_LEN).contains(&chunk.len) =>
            {
                let said = stream.read_vec(chunk.len)?;
                let (number, offset) = wire::chunk_error(chunk.kind, &said)?;
                // A server may name a byte that has nothing to do with the request.
                let range = request.offset..request.offset + u64::from(request.len);
                Ok(What::Error {
                    offset: offset
                        .filter(|at| range.contains(at))
                        .unwrap_or(request.offset),
                    error: wire::request_error(number),
                })
            }
            _ => Err(NbdError::Misbehaved(
                "a part of a reply has an impossible length",
            )),
        }
    }
}

impl Drop for Connection {
    /// Says goodbye, so that a server need not take it for a fault.
    fn drop(&mut self) {
        let request = Request {
            command: Command::Disconnect,
            cookie: self.cookie(),
            offset: 0,
            len: 0,
        };
        let _ = self.stream.write_all(&request.encode());
    }
}

/// What a request is answered with that has nothing to tell.
fn nothing_else(_: &mut Stream, _: usize, _: What) -> Result<(), NbdError> {
    Err(NbdError::Misbehaved(
        "a request is answered with something else",
    ))
}

/// Which request a reply belongs to.
fn answered(requests: &[Request], cookie: u64) -> Result<usize, NbdError> {
    let of = requests.iter().position(|request| request.cookie == cookie);
    of.ok_or(NbdError::Misbehaved("a reply belongs to no request"))
}

/// Which bytes of a read have come: none twice.
#[derive(Debug, Default)]
struct Arrived {
    /// Starts and ends, in order.
    parts: Vec<(u32, u32)>,
    len: u32,
}

impl Arrived {
    fn add(&mut self, start: u32, len: u32) -> Result<(), NbdError> {
        let end = start + len;
        let at = self.parts.partition_point(|part| part.0 < start);
        let before = at.checked_sub(1).map(|before| self.parts[before]);
        let after = self.parts.get(at);
        let collides = before.is_some_and(|(_, end)| end > start)
            || after.is_some_and(|(start, _)| *start < end);
        if collides || len == 0 {
            return Err(NbdError::Misbehaved("bytes of a read come twice"));
        }
        self.parts.insert(at, (start, end));
        self.len += len;
        Ok(())
    }
}

/// Either kind of socket.
#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Ok(Self::Unix(stream))
            }
            Address::Loopback(port) => {
                let hosts = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                let addresses = hosts.map(|host| SocketAddr::new(host, *port));
                let stream = TcpStream::connect(&addresses[..])?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }
        }
    }

    fn greet(&mut self) -> Result<(), NbdError> {
        if self.read_array()? != wire::GREETING {
            let why = "nobody there speaks NBD in its newstyle".to_owned();
            return Err(NbdError::Unfit(why));
        }
        let flags = u16::from_be_bytes(self.read_array()?);
        if flags & wire::FIXED_NEWSTYLE == 0 {
            let why = "the server is too old: it has no fixed newstyle".to_owned();
            return Err(NbdError::Unfit(why));
        }
        let flags = flags & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES);
        self.write_all(&u32::from(flags).to_be_bytes())?;
        Ok(())
    }

    /// Asks for an option, and gives out what comes ahead of the end of the answer.
    fn ask(
        &mut self,
        option: OptionKind,
        data: &[u8],
        mut each: impl FnMut(OptionReplyKind, &[u8]) -> Result<(), NbdError>,
    ) -> Result<(), NbdError> {
        self.write_all(&wire::option(option, data))?;
        for _ in 0..MAX_CHUNKS {
            let OptionReply { kind, len } = OptionReply::parse(&self.read_array()?, option)?;
            let said = self.read_vec(len)?;
            match kind {
                OptionReplyKind::Ack => return Ok(()),
                OptionReplyKind::Error(number) => return Err(wire::option_error(number, &said)),
                kind => each(kind, &said)?,
            }
        }
        Err(NbdError::Misbehaved("the answer to an option has no end"))
    }

    /// Agrees on contexts, as far as the server has them. Asking again would replace them.
    fn contexts(&mut self, export: &str, changed: Option<&str>) -> Result<Contexts, NbdError> {
        let count = 1 + u32::from(changed.is_some());
        let mut data = wire::text(export);
        data.extend(count.to_be_bytes());
        for name in std::iter::once(ALLOCATION).chain(changed) {
            data.extend(wire::text(name));
        }
        let mut contexts = Contexts::default();
        let asked = self.ask(OptionKind::SetMetaContext, &data, |kind, said| {
            let mut fields = Fields(said);
            if kind == OptionReplyKind::MetaContext {
                let given = fields.u32()?;
                if fields.0 == ALLOCATION.as_bytes() {
                    contexts.allocation = Some(given);
                } else if changed.is_some_and(|name| fields.0 == name.as_bytes()) {
                    contexts.changes = Some(given);
                }
            }
            Ok(())
        });
        match asked {
            // A server that knows no contexts still has data.
            Err(NbdError::Unfit(_)) => Ok(Contexts::default()),
            asked => asked.map(|()| contexts),
        }
    }

    /// Opens the export: requests may follow.
    fn go(&mut self, export: &str) -> Result<Facts, NbdError> {
        let mut data = wire::text(export);
        data.extend([1u16, Info::BLOCK_SIZE].map(u16::to_be_bytes).concat());
        let mut facts = None;
        let mut sizes = (1, REQUEST_LEN);
        self.ask(OptionKind::Go, &data, |kind, said| {
            if kind == OptionReplyKind::Info {
                match Info::parse(said)? {
                    Info::Export { size, flags } => facts = Some((size, flags)),
                    Info::BlockSize { minimum, maximum } => sizes = (minimum, maximum),
                    Info::Other => {}
                }
            }
            Ok(())
        })?;
        let (size, flags) = facts.ok_or(NbdError::Misbehaved("an export has no size"))?;
        let (minimum, maximum) = sizes;
        let fits = size.is_multiple_of(u64::from(minimum.max(1)));
        if minimum > MAX_MINIMUM || maximum < REQUEST_LEN || !fits {
            let why = format!(
                "it takes requests of {minimum} to {maximum} bytes for {size} bytes: between \
                 64 KiB and 128 KiB must be possible, and reach all of them"
            );
            return Err(NbdError::Unfit(why));
        }
        let has = |flag| flags & flag != 0;
        Ok(Facts {
            size,
            is_read_only: has(wire::READ_ONLY),
            takes_several: has(wire::CAN_MULTI_CONN),
            has_flush: has(wire::SEND_FLUSH),
            has_write_zeroes: has(wire::SEND_WRITE_ZEROES),
            has_allocation: false,
            has_changes: false,
        })
    }

    fn read_array<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// The caller has compared the length with a limit.
    fn read_vec(&mut self, len: u32) -> Result<Vec<u8>, NbdError> {
        let mut bytes = vec![0; len as usize];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        };
        read.map_err(in_words)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        };
        written.map_err(in_words)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a socket calls "try again" when its time is up.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => {
            let seconds = PATIENCE.as_secs();
            let why = format!("the NBD server has not answered for {seconds} s");
            io::Error::new(io::ErrorKind::TimedOut, why)
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::super::server::{Asked, Fake, chunk, data, error, hole, simple, status};
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn open(answer: impl Fn(&[Asked]) -> Vec<u8> + Send + 'static) -> (Fake, Connection) {
        let server = Fake::start(SIZE, answer);
        let connection = Connection::open(&server.address(), "disk", None).unwrap();
        assert_eq!(connection.facts().size, SIZE);
        (server, connection)
    }

    #[test]
    fn a_read_is_put_together_from_parts_in_any_order() {
        let (_server, mut connection) = open(|asked| {
            // The last request first, and of each the second half first.
            let answer = |asked: &Asked| {
                let half = asked.len / 2;
                let bytes = vec![u8::try_from(asked.offset >> 17).unwrap(); half as usize];
                let second = data(asked.cookie, 0, asked.offset + u64::from(half), &bytes);
                [second, hole(asked.cookie, 1, asked.offset, half)].concat()
            };
            asked.iter().rev().flat_map(answer).collect()
        });
        let mut bytes = vec![0xee; 512 << 10];
        connection.read(&mut bytes, 256 << 10).unwrap();
        for (piece, number) in bytes.chunks(128 << 10).zip(2..) {
            let (zeros, filled) = piece.split_at(64 << 10);
            assert!(zeros.iter().all(|byte| *byte == 0));
            assert!(filled.iter().all(|byte| *byte == number), "{number}");
        }
    }

    #[test]
    fn a_read_that_fails_names_the_first_byte_and_spares_the_connection() {
        let (_server, mut connection) = open(|asked| {
            let fails = |asked: &Asked| match asked.offset {
                0x2_0000 => error(asked.cookie, 5, 0x2_1000),
                // A byte that was not asked for.
                0x4_0000 => error(asked.cookie, 5, 0),
                _ => hole(asked.cookie, 1, asked.offset, asked.len),
            };
            asked.iter().rev().flat_map(fails).collect()
        });
        let mut bytes = vec![0xee; 1 << 20];
        let failed = |connection: &mut Connection, bytes: &mut [u8], from| match connection
            .read(bytes, from)
            .unwrap_err()
        {
            NbdError::Request { offset, error } => (offset, error.raw_os_error()),
            other => panic!("{other}"),
        };
        assert_eq!(failed(&mut connection, &mut bytes, 0), (0x2_1000, Some(5)));
        let from = 0x4_0000;
        assert_eq!(
            failed(&mut connection, &mut bytes[..4096], from),
            (from, Some(5))
        );
        connection.read(&mut bytes[..4096], 0).unwrap();
        assert_eq!(bytes[..4096], [0; 4096]);
    }

    #[test]
    fn an_answer_that_breaks_the_protocol_is_an_error_whatever_it_is() {
        let with = |answer: fn(&Asked) -> Vec<u8>, why: &str| {
            let (_server, mut connection) = open(move |asked| {
                let mut said = answer(&asked[0]);
                // Whoever would wait for more gets something that is no reply.
                said.extend([0xff; 64]);
                said
            });
            let failed = connection.read(&mut [0; 4096], 8192).unwrap_err();
            assert!(failed.to_string().contains(why), "{failed}, not {why}");
            assert!(!failed.spares_the_connection());
        };
        with(|_| Vec::new(), "no reply");
        with(|asked| hole(asked.cookie + 1, 1, 8192, 4096), "no request");
        with(
            |asked| data(asked.cookie, 1, 8192, &[1; 4095]),
            "did not come",
        );
        with(
            |asked| data(asked.cookie, 1, 8192, &[1; 4097]),
            "not asked for",
        );
        with(
            |asked| data(asked.cookie, 1, 8191, &[1; 8]),
            "not asked for",
        );
        with(
            |asked| hole(asked.cookie, 1, u64::MAX, 4096),
            "not asked for",
        );
        with(
            |asked| hole(asked.cookie, 1, 8192, u32::MAX),
            "not asked for",
        );
        with(|asked| hole(asked.cookie, 1, 8192, 0), "twice");
        with(
            |asked| {
                let first = data(asked.cookie, 0, 8192, &[1; 2048]);
                [first, data(asked.cookie, 1, 8192 + 2047, &[1; 2048])].concat()
            },
            "twice",
        );
        with(|asked| simple(asked.cookie, 0), "not structured");
        with(
            |asked| status(asked.cookie, 1, &[(4096, 0)]),
            "something else",
        );
        with(
            |asked| chunk(asked.cookie, 1, 1, &[0; 8]),
            "impossible length",
        );
        with(
            |asked| chunk(asked.cookie, 1, 2, &[0; 13]),
            "impossible length",
        );
        with(|asked| chunk(asked.cookie, 0, 0, &[]), "impossible length");
        with(|asked| chunk(asked.cookie, 1, 7, &[]), "unknown kind");
        with(
            |asked| chunk(asked.cookie, 1, 0x8001, &[0, 0, 0, 5, 0, 9]),
            "is cut",
        );
        with(
            |asked| {
                let parts = (0..4096).map(|at| data(asked.cookie, 0, 8192 + at, &[1]));
                parts.flatten().collect()
            },
            "no end",
        );
    }

    #[test]
    fn extents_are_those_of_the_context_that_was_asked_for() {
        let answer = |asked: &[Asked]| {
            let cookie = asked[0].cookie;
            let other = chunk(cookie, 0, 5, &[0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0]);
            let ours = match asked[0].offset {
                0 => status(cookie, 1, &[(65536, 0), (1 << 20, 3)]),
                1 => chunk(cookie, 1, 0, &[]),
                2 => status(cookie, 1, &[(0, 0)]),
                _ => chunk(cookie, 1, 5, &[0, 0, 0, 9, 0, 0, 0, 8]),
            };
            [other, ours].concat()
        };
        let (_server, mut connection) = open(answer);
        let extents = connection.allocation(0, 4096).unwrap();
        let all: Vec<_> = extents.iter().map(|e| (e.len, e.is_zero())).collect();
        assert_eq!(all, [(65536, false), (1 << 20, true)]);
        for (offset, why) in [(1, "does not answer"), (2, "no bytes"), (3, "cut in two")] {
            let (_server, mut connection) = open(answer);
            let failed = connection.allocation(offset, 4096);
            let failed = failed.unwrap_err().to_string();
            assert!(failed.contains(why), "{failed}, not {why}");
        }
    }
}
