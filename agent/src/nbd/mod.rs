//! A client of NBD, the network block device, for what an NBD server on this host exports: a disk
//! of a running VM at one instant, or the contents of an image whatever its format.
//!
//! ```text
//!  Export       what is exported, by as many connections as are of use
//!  Connection   handshake, then requests, several under way at once
//!  wire         the numbers, and what is made of and read from bytes
//! ```
//!
//! All numbers are from the protocol's document, `doc/proto.md` of the NBD project. Of its parts
//! this speaks the fixed newstyle handshake, structured replies, the context that tells holes from
//! data, and simple replies where a server has no structured ones. It speaks no TLS: an [`Address`] is a socket on
//! this host.

mod connection;
mod export;
#[cfg(test)]
mod server;
mod wire;

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

pub(crate) use export::Export;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of this host's loopback.
    Loopback(u16),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Loopback(port) => write!(f, "port {port} of the loopback"),
        }
    }
}

/// What keeps an export from being used.
#[derive(Debug, Error)]
pub(crate) enum NbdError {
    /// The connection could not be made, or broke.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The server does not keep to the protocol. The connection is of no use any more.
    #[error("the NBD server broke the protocol: {0}")]
    Misbehaved(&'static str),
    /// The server has nothing of that name.
    #[error("{0}")]
    Unknown(String),
    /// The server does not do what is needed, or not in a way that we speak.
    #[error("the NBD server cannot be used: {0}")]
    Unfit(String),
    /// A request failed. Others may succeed.
    #[error("{error}")]
    Request {
        /// The first byte that is known to be concerned.
        offset: u64,
        /// What the server says of it.
        error: io::Error,
    },
}

impl NbdError {
    /// Whether the connection that it happened on can be used further.
    fn spares_the_connection(&self) -> bool {
        matches!(self, Self::Request { .. })
    }
}
