//! What goes wrong in an agent, in the form that the controller is told.

use std::fmt::Display;
use std::io;
use std::path::Path;

use kvm_clone_protocol::codec::ReadError;
use kvm_clone_protocol::message::{Failed, FailureCode, MessageError};
use kvm_clone_protocol::preamble::PreambleError;
use kvm_clone_protocol::sync::SyncError;
use thiserror::Error;

use crate::disk::Forbidden;

/// The longest message, in bytes: one that names the longest path. A request may hold far longer
/// ones, and what is said of it must fit a frame.
const MAX_MESSAGE: usize = 4096 + 256;

/// A failure: who has to act, and a message that names the thing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub(crate) struct Failure {
    pub(crate) code: FailureCode,
    /// The byte of the disk, where it is about one.
    pub(crate) offset: Option<u64>,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self {
            code,
            offset: None,
            message: message.into(),
        }
    }

    /// An operating system's error about a path: `doing` reads as in "reading /a/b".
    pub(crate) fn io(doing: &str, path: &Path, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::Other if is_forbidden(error) => FailureCode::Refused,
            io::ErrorKind::NotFound => FailureCode::NotFound,
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => FailureCode::NoSpace,
            io::ErrorKind::ResourceBusy => FailureCode::Busy,
            _ => FailureCode::Io,
        };
        Self::new(code, format!("{doing} {}: {error}", path.display()))
    }

    /// The same, about one byte of the disk, which the controller adds to the message.
    pub(crate) fn io_at(doing: &str, path: &Path, offset: u64, error: &io::Error) -> Self {
        Self {
            offset: Some(offset),
            ..Self::io(doing, path, error)
        }
    }

    /// A data connection that could not be made, or broke.
    pub(crate) fn link(message: impl Display) -> Self {
        Self::new(FailureCode::LinkLost, message.to_string())
    }

    /// The frame that tells the controller.
    pub(crate) fn message(self, disk: Option<u32>) -> Failed {
        Failed {
            code: self.code,
            disk,
            offset: self.offset,
            message: short(self.message),
        }
    }
}

fn is_forbidden(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Forbidden>())
}

/// A text that fits a frame: its end is left out where it is too long.
pub(crate) fn short(mut text: String) -> String {
    if text.len() > MAX_MESSAGE {
        text.truncate(text.floor_char_boundary(MAX_MESSAGE));
        text.push('…');
    }
    text
}

impl From<SyncError> for Failure {
    fn from(error: SyncError) -> Self {
        let code = match error {
            SyncError::Message(_) | SyncError::PeerMisbehaved(_) => FailureCode::Protocol,
            SyncError::RootMismatch => FailureCode::Mismatch,
        };
        Self::new(code, error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::link(format!("the connection to the peer broke: {error}"))
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io(error) => error.into(),
            ReadError::Frame(error) => Self::new(FailureCode::Protocol, error.to_string()),
        }
    }
}

impl From<MessageError> for Failure {
    fn from(error: MessageError) -> Self {
        Self::new(FailureCode::Protocol, error.to_string())
    }
}

impl From<PreambleError> for Failure {
    fn from(error: PreambleError) -> Self {
        let code = match error {
            PreambleError::NotFound { .. } => FailureCode::LinkLost,
            PreambleError::BadRange { .. } | PreambleError::NoCommonVersion { .. } => {
                FailureCode::Protocol
            }
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_fits_a_frame_whatever_it_names() {
        let message = |text: &str| Failure::new(FailureCode::Io, text).message(None).message;
        assert_eq!(message("as it is"), "as it is");
        // Three bytes each, and none is cut in two.
        let long = message(&"…".repeat(40_000));
        assert!(long.len() <= MAX_MESSAGE + 3);
        assert!(long.chars().all(|c| c == '…'));
    }
}
