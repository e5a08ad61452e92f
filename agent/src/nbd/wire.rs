//! What NBD says in bytes. Everything is big-endian.

use std::io;

use nix::errno::Errno;

use super::NbdError;

/// What a server says first: `NBDMAGIC`, then `IHAVEOPT`.
pub(super) const GREETING: [u8; 16] = *b"NBDMAGICIHAVEOPT";

/// Ahead of an option.
const OPTION_MAGIC: [u8; 8] = *b"IHAVEOPT";

/// Ahead of the answer to one.
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Flags of the handshake, which a client gives back: the server speaks the fixed newstyle, and
/// leaves out 124 zeros.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

/// The longest answer to an option that is read, in bytes. Names and descriptions may have 4096.
pub(super) const MAX_OPTION_REPLY: u32 = 8192;

/// Bytes of the head of an option's answer.
pub(super) const OPTION_REPLY_LEN: usize = 20;

/// The options that a client may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum OptionKind {
    Go = 7,
    StructuredReply = 8,
    SetMetaContext = 10,
}

/// An option with its data.
pub(super) fn option(kind: OptionKind, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("names are short");
    [
        &OPTION_MAGIC[..],
        &(kind as u32).to_be_bytes(),
        &len.to_be_bytes(),
        data,
    ]
    .concat()
}

/// A text behind its length.
pub(super) fn text(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("names are short");
    [&len.to_be_bytes()[..], text.as_bytes()].concat()
}

/// The head of an answer to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OptionReply {
    pub(super) kind: OptionReplyKind,
    pub(super) len: u32,
}

/// What the answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OptionReplyKind {
    /// That was all.
    Ack,
    Info,
    MetaContext,
    /// With the number of the error.
    Error(u32),
    /// Something that was not asked for.
    Other,
}

impl OptionReply {
    /// Reads the head of the answer to an option.
    pub(super) fn parse(bytes: &[u8; OPTION_REPLY_LEN], of: OptionKind) -> Result<Self, NbdError> {
        let mut fields = Fields(bytes);
        let (magic, option) = (fields.u64()?, fields.u32()?);
        if magic != OPTION_REPLY_MAGIC || option != of as u32 {
            return Err(NbdError::Misbehaved("that is no answer to an option"));
        }
        let kind = match fields.u32()? {
            1 => OptionReplyKind::Ack,
            3 => OptionReplyKind::Info,
            4 => OptionReplyKind::MetaContext,
            kind if kind >> 31 == 1 => OptionReplyKind::Error(kind & 0x7fff_ffff),
            _ => OptionReplyKind::Other,
        };
        let len = fields.u32()?;
        if len > MAX_OPTION_REPLY {
            return Err(NbdError::Misbehaved("an answer to an option is too long"));
        }
        Ok(Self { kind, len })
    }
}

/// The error of an option that says so.
const UNKNOWN_EXPORT: u32 = 6;

/// What an error of an option means, by its number without the highest bit.
pub(super) fn option_error(number: u32, said: &[u8]) -> NbdError {
    let meaning = match number {
        1 => "it does not know an option",
        2 => "its policy forbids it",
        5 => "it wants TLS, which is not spoken here",
        UNKNOWN_EXPORT => "there is no such export",
        8 => "it wants to be asked for its block size",
        _ => "it gives no reason",
    };
    let said = String::from_utf8_lossy(said);
    let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
    let why = match &said[..] {
        "" => meaning.to_owned(),
        said => format!("{meaning} ({said})"),
    };
    match number {
        UNKNOWN_EXPORT => NbdError::Unknown(why),
        _ => NbdError::Unfit(why),
    }
}

/// Flags of an export.
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;

/// What a piece of information about an export says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Info {
    Export { size: u64, flags: u16 },
    BlockSize { minimum: u32, maximum: u32 },
    Other,
}

impl Info {
    /// The kind of [`Info::BlockSize`], to ask for it.
    pub(super) const BLOCK_SIZE: u16 = 3;

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, NbdError> {
        let mut fields = Fields(bytes);
        Ok(match fields.u16()? {
            0 => Self::Export {
                size: fields.u64()?,
                flags: fields.u16()?,
            },
            Self::BLOCK_SIZE => {
                let (minimum, _preferred) = (fields.u32()?, fields.u32()?);
                let maximum = fields.u32()?;
                Self::BlockSize { minimum, maximum }
            }
            _ => Self::Other,
        })
    }
}

/// What is asked for, once the handshake is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    WriteZeroes = 6,
    BlockStatus = 7,
}

/// A request, without the data of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Request {
    const MAGIC: u32 = 0x2560_9513;

    /// Its bytes. No request of ours has a flag: zeros may always become holes.
    pub(super) fn encode(&self) -> [u8; 28] {
        let mut bytes = [0; 28];
        bytes[..4].copy_from_slice(&Self::MAGIC.to_be_bytes());
        bytes[6..8].copy_from_slice(&(self.command as u16).to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// The head of a reply, or of a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// All of it; the data of a read that succeeded comes behind.
    Simple { cookie: u64, error: u32 },
    /// A part of a structured one.
    Chunk(Chunk),
}

/// A part of a structured reply: `len` bytes come behind its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) cookie: u64,
    pub(super) kind: ChunkKind,
    /// The last of its reply.
    pub(super) is_last: bool,
    pub(super) len: u32,
}

impl Reply {
    /// Bytes that every head has; a chunk's has [`MORE`](Self::MORE) besides.
    pub(super) const LEN: usize = 16;
    pub(super) const MORE: usize = 4;

    const SIMPLE: u32 = 0x6744_6698;
    const STRUCTURED: u32 = 0x668e_33ef;

    /// Reads a head, of which `more` brings the end where it has one.
    pub(super) fn parse(
        bytes: &[u8; Self::LEN],
        more: impl FnOnce() -> Result<[u8; Self::MORE], NbdError>,
    ) -> Result<Self, NbdError> {
        let mut fields = Fields(bytes);
        match fields.u32()? {
            Self::SIMPLE => {
                let error = fields.u32()?;
                let cookie = fields.u64()?;
                Ok(Self::Simple { cookie, error })
            }
            Self::STRUCTURED => {
                let (flags, kind) = (fields.u16()?, ChunkKind::of(fields.u16()?)?);
                Ok(Self::Chunk(Chunk {
                    cookie: fields.u64()?,
                    kind,
                    is_last: flags & 1 == 1,
                    len: u32::from_be_bytes(more()?),
                }))
            }
            _ => Err(NbdError::Misbehaved("that is no reply")),
        }
    }
}

/// What a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkKind {
    None,
    OffsetData,
    OffsetHole,
    BlockStatus,
    Error,
    ErrorOffset,
}

impl ChunkKind {
    fn of(number: u16) -> Result<Self, NbdError> {
        match number {
            0 => Ok(Self::None),
            1 => Ok(Self::OffsetData),
            2 => Ok(Self::OffsetHole),
            5 => Ok(Self::BlockStatus),
            0x8002 => Ok(Self::ErrorOffset),
            // Of an error that a client does not know it may read what all have in common.
            error if error >> 15 == 1 => Ok(Self::Error),
            _ => Err(NbdError::Misbehaved(
                "a reply has a part of an unknown kind",
            )),
        }
    }
}

/// An extent of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Bytes.
    pub(crate) len: u32,
    pub(super) flags: u32,
}

impl Extent {
    /// Bytes of an extent on the wire.
    pub(super) const LEN: usize = 8;

    /// Of `base:allocation`: it reads as zeros.
    pub(crate) fn is_zero(self) -> bool {
        self.flags & 2 != 0
    }

    /// Of a dirty bitmap: something was written to it.
    pub(crate) fn is_dirty(self) -> bool {
        self.flags & 1 != 0
    }

    /// Those of a chunk, behind the number of its context.
    pub(super) fn parse_all(bytes: &[u8]) -> Result<Vec<Self>, NbdError> {
        if bytes.is_empty() || !bytes.len().is_multiple_of(Self::LEN) {
            return Err(NbdError::Misbehaved("extents are cut in two"));
        }
        let parse = |bytes| {
            let mut fields = Fields(bytes);
            let (len, flags) = (fields.u32()?, fields.u32()?);
            match len {
                0 => Err(NbdError::Misbehaved("an extent has no bytes")),
                _ => Ok(Self { len, flags }),
            }
        };
        bytes.chunks(Self::LEN).map(parse).collect()
    }
}

/// Number and place, where it is told, of what a chunk of an error says.
pub(super) fn chunk_error(kind: ChunkKind, said: &[u8]) -> Result<(u32, Option<u64>), NbdError> {
    let mut fields = Fields(said);
    let (number, text_len) = (fields.u32()?, fields.u16()?);
    let rest = fields
        .0
        .get(usize::from(text_len)..)
        .ok_or(NbdError::Misbehaved("the text of an error is cut"))?;
    let offset = match kind {
        ChunkKind::ErrorOffset => Some(Fields(rest).u64()?),
        _ => None,
    };
    Ok((number, offset))
}

/// The operating system's name for an error that a server sent. The numbers are Linux's, and those
/// that the protocol does not name count as `EINVAL`.
pub(super) fn request_error(number: u32) -> io::Error {
    let known = [
        Errno::EPERM,
        Errno::EIO,
        Errno::ENOMEM,
        Errno::EINVAL,
        Errno::ENOSPC,
        Errno::EOVERFLOW,
        Errno::EOPNOTSUPP,
        Errno::ESHUTDOWN,
    ];
    let named = known.into_iter().find(|errno| *errno as u32 == number);
    named.unwrap_or(Errno::EINVAL).into()
}

/// Numbers read one after the other.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let (first, rest) = self
            .0
            .split_first_chunk()
            .ok_or(NbdError::Misbehaved("a message is too short"))?;
        self.0 = rest;
        Ok(*first)
    }

    pub(super) fn u16(&mut self) -> Result<u16, NbdError> {
        self.take().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, NbdError> {
        self.take().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, NbdError> {
        self.take().map(u64::from_be_bytes)
    }
}
