//! A server for tests, which answers as it is told: for what no real one does on demand.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use tempfile::TempDir;

use super::Address;

/// A request as the server reads it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

/// A server that is there until it is dropped.
#[derive(Debug)]
pub(super) struct Fake {
    directory: TempDir,
}

impl Fake {
    /// Serves one export of this size to every connection. `answer` gets as many requests as came
    /// together, and gives what is sent for them.
    pub(super) fn start(size: u64, answer: impl Fn(&[Asked]) -> Vec<u8> + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that goes away is no fault of the server.
                let _ = serve(stream.unwrap(), size, &answer);
            }
        });
        Self { directory }
    }

    pub(super) fn address(&self) -> Address {
        Address::Unix(self.directory.path().join("socket"))
    }
}

fn serve(
    mut stream: UnixStream,
    size: u64,
    answer: &impl Fn(&[Asked]) -> Vec<u8>,
) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let mut data = vec![0; u32::from_be_bytes(head[12..].try_into().unwrap()) as usize];
        stream.read_exact(&mut data)?;
        match option {
            7 => {
                let info = [&[0, 0], &size.to_be_bytes()[..], &[0, 1 << 6 | 1 << 2 | 1]].concat();
                stream.write_all(&option_reply(option, 3, &info))?;
                stream.write_all(&option_reply(option, 1, &[]))?;
                break;
            }
            10 => {
                let context = [&[0, 0, 0, 9], &b"base:allocation"[..]].concat();
                stream.write_all(&option_reply(option, 4, &context))?;
                stream.write_all(&option_reply(option, 1, &[]))?;
            }
            _ => stream.write_all(&option_reply(option, 1, &[]))?,
        }
    }
    loop {
        // Requests that were written together arrive together.
        let mut bytes = vec![0; 28 * 64];
        let read = stream.read(&mut bytes)?;
        if read == 0 {
            return Ok(());
        }
        let asked: Vec<Asked> = bytes[..read].chunks_exact(28).map(asked).collect();
        stream.write_all(&answer(&asked))?;
    }
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    [
        &0x0003_e889_0455_65a9u64.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &u32::try_from(data.len()).unwrap().to_be_bytes(),
        data,
    ]
    .concat()
}

fn asked(bytes: &[u8]) -> Asked {
    assert_eq!(bytes[..4], 0x2560_9513u32.to_be_bytes());
    Asked {
        cookie: u64::from_be_bytes(bytes[8..16].try_into().unwrap()),
        offset: u64::from_be_bytes(bytes[16..24].try_into().unwrap()),
        len: u32::from_be_bytes(bytes[24..].try_into().unwrap()),
    }
}

/// A part of a structured reply.
pub(super) fn chunk(cookie: u64, flags: u16, kind: u16, data: &[u8]) -> Vec<u8> {
    [
        &0x668e_33efu32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &u32::try_from(data.len()).unwrap().to_be_bytes(),
        data,
    ]
    .concat()
}

/// Bytes from an offset.
pub(super) fn data(cookie: u64, flags: u16, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(
        cookie,
        flags,
        1,
        &[&offset.to_be_bytes()[..], bytes].concat(),
    )
}

/// Zeros from an offset.
pub(super) fn hole(cookie: u64, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    chunk(
        cookie,
        flags,
        2,
        &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat(),
    )
}

/// An error that names a byte.
pub(super) fn error(cookie: u64, number: u32, offset: u64) -> Vec<u8> {
    let said = [
        &number.to_be_bytes()[..],
        &[0, 2],
        b"no",
        &offset.to_be_bytes(),
    ]
    .concat();
    chunk(cookie, 1, 0x8002, &said)
}

/// Extents of the context that the server has.
pub(super) fn status(cookie: u64, flags: u16, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut said = vec![0, 0, 0, 9];
    for (len, state) in extents {
        said.extend(len.to_be_bytes());
        said.extend(state.to_be_bytes());
    }
    chunk(cookie, flags, 5, &said)
}

/// A reply that is not structured.
pub(super) fn simple(cookie: u64, error: u32) -> Vec<u8> {
    [
        &0x6744_6698u32.to_be_bytes()[..],
        &error.to_be_bytes(),
        &cookie.to_be_bytes(),
    ]
    .concat()
}
