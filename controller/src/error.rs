//! The one error of the controller: who has to act, what happened to what, and what to do.
//!
//! Every error that a user sees carries an [`ErrorCode`] of the command line's contract, and the
//! exit status follows from it in one place. `Display` is the message alone; the causes and the
//! hint are printed once, by `output`.

use std::fmt::Write as _;

use kvm_clone_protocol::frame::FrameError;
use kvm_clone_protocol::message::{Failed, FailureCode, MessageError};
use serde::ser::{Serialize, SerializeStruct as _, Serializer};

/// What scripts can tell failures apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// A disk could not be read or written, or a local file.
    Io,
    /// Some of several hosts or disks failed.
    Partial,
    /// A bug.
    Internal,
    /// The command line or the configuration is wrong.
    Usage,
    /// A host cannot be reached.
    HostUnreachable,
    /// A host's key is unknown or has changed.
    HostKey,
    /// A host refuses the login.
    Auth,
    /// A disk does not exist.
    NotFound,
    /// Refused for safety; nothing was changed.
    Refused,
    /// Somebody else is at it.
    Busy,
    /// A connection broke; the same command takes the run up again.
    Interrupted,
    /// The time that the user gave is over.
    Timeout,
    /// Source and destination differ.
    Mismatch,
    /// A host lacks what the method needs.
    MissingRequirement,
    /// No room.
    NoSpace,
    /// The agents have no protocol version in common, or one of them broke the protocol.
    Protocol,
    /// Stopped by the user.
    Cancelled,
}

impl ErrorCode {
    /// The code as scripts see it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::Partial => "partial",
            Self::Internal => "internal",
            Self::Usage => "usage",
            Self::HostUnreachable => "host_unreachable",
            Self::HostKey => "host_key",
            Self::Auth => "auth",
            Self::NotFound => "not_found",
            Self::Refused => "refused",
            Self::Busy => "busy",
            Self::Interrupted => "interrupted",
            Self::Timeout => "timeout",
            Self::Mismatch => "mismatch",
            Self::MissingRequirement => "missing_requirement",
            Self::NoSpace => "no_space",
            Self::Protocol => "protocol",
            Self::Cancelled => "cancelled",
        }
    }

    /// The exit status of a run that ended with this code.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Io | Self::Partial | Self::Internal => 1,
            Self::Usage => 2,
            Self::HostUnreachable | Self::HostKey | Self::Auth => 3,
            Self::NotFound => 4,
            Self::Refused | Self::Busy => 5,
            Self::Interrupted | Self::Timeout => 6,
            Self::Mismatch => 7,
            Self::MissingRequirement | Self::NoSpace => 8,
            Self::Protocol => 9,
            Self::Cancelled => 130,
        }
    }
}

impl Serialize for ErrorCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl From<FailureCode> for ErrorCode {
    fn from(code: FailureCode) -> Self {
        match code {
            FailureCode::NotFound => Self::NotFound,
            FailureCode::Refused => Self::Refused,
            FailureCode::Busy => Self::Busy,
            FailureCode::Io => Self::Io,
            FailureCode::NoSpace => Self::NoSpace,
            FailureCode::MissingRequirement => Self::MissingRequirement,
            FailureCode::LinkLost => Self::Interrupted,
            FailureCode::Protocol => Self::Protocol,
            FailureCode::Mismatch => Self::Mismatch,
            FailureCode::Cancelled => Self::Cancelled,
            FailureCode::Internal => Self::Internal,
        }
    }
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A failure, for people and for scripts.
#[derive(Debug)]
pub struct Error {
    code: ErrorCode,
    message: String,
    hint: Option<String>,
    cause: Option<Cause>,
    /// Instead of that of the code, for who starts us by another contract.
    exit: Option<u8>,
}

/// What nearly everything here returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure: `message` is a lower-case fragment that names the thing.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
            cause: None,
            exit: None,
        }
    }

    /// Wrong usage.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Usage, message)
    }

    /// A failure of this machine's operating system.
    pub fn io(message: impl Into<String>, cause: std::io::Error) -> Self {
        Self::new(ErrorCode::Io, message).caused_by(cause)
    }

    /// Says what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause underneath. A program that failed without a word is no cause.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Into<Cause>) -> Self {
        self.cause = Some(cause.into()).filter(|cause| !cause.to_string().is_empty());
        self
    }

    /// The same failure seen from further out: `message` goes on top, code and hint stay.
    #[must_use]
    pub fn context(mut self, message: impl Into<String>) -> Self {
        let (code, hint) = (self.code, self.hint.take());
        Self {
            code,
            message: message.into(),
            hint,
            exit: self.exit,
            cause: Some(Box::new(self)),
        }
    }

    /// Says more behind the message.
    #[must_use]
    pub fn with_note(mut self, note: impl AsRef<str>) -> Self {
        self.message = format!("{}; {}", self.message, note.as_ref());
        self
    }

    /// The same failure without its causes' types, for another owner: the message and the causes
    /// on one line, with code and hint.
    #[must_use]
    pub fn like(&self) -> Self {
        Self {
            code: self.code,
            message: self.one_line(),
            hint: self.hint.clone(),
            cause: None,
            exit: self.exit,
        }
    }

    /// Who has to act.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The exit status of a run that ended with this error.
    pub fn exit_code(&self) -> u8 {
        self.exit.unwrap_or_else(|| self.code.exit_code())
    }

    /// The same, with another exit status than that of its code.
    #[must_use]
    pub fn exiting_with(self, status: u8) -> Self {
        Self {
            exit: Some(status),
            ..self
        }
    }

    /// What to do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The causes, the nearest first.
    pub fn causes(&self) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
        std::iter::successors(std::error::Error::source(self), |cause| cause.source())
    }

    /// The message and its causes on one line.
    pub fn one_line(&self) -> String {
        let mut line = self.message.clone();
        for cause in self.causes() {
            // Writing to a string does not fail.
            let _ = write!(line, ": {cause}");
        }
        line
    }

    /// The form for a terminal: `error:`, every `caused by:`, and the hint behind an empty line.
    pub fn for_people(&self) -> String {
        let mut text = format!("error: {self}\n");
        for cause in self.causes() {
            let _ = writeln!(text, "caused by: {cause}");
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(text, "\nhint: {hint}");
        }
        text
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|cause| &**cause as _)
    }
}

/// `{code, message, hint}`, as results carry it.
impl Serialize for Error {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Error", 3)?;
        fields.serialize_field("code", &self.code)?;
        fields.serialize_field("message", &self.one_line())?;
        fields.serialize_field("hint", &self.hint)?;
        fields.end()
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Self {
        let message = match failed.offset {
            Some(offset) => format!("{} (at byte {offset})", failed.message),
            None => failed.message,
        };
        Self::new(failed.code.into(), message)
    }
}

impl From<MessageError> for Error {
    fn from(error: MessageError) -> Self {
        Self::new(ErrorCode::Protocol, error.to_string())
    }
}

impl From<FrameError> for Error {
    fn from(error: FrameError) -> Self {
        Self::new(ErrorCode::Protocol, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_failure_keeps_its_code_and_its_offset() {
        let failed = Failed {
            code: FailureCode::NoSpace,
            disk: Some(1),
            offset: Some(65_536),
            message: "writing /img/a".to_owned(),
        };
        let error = Error::from(failed);
        assert_eq!(error.code(), ErrorCode::NoSpace);
        assert_eq!(error.exit_code(), 8);
        assert_eq!(error.to_string(), "writing /img/a (at byte 65536)");
    }

    #[test]
    fn the_terminal_form_has_message_causes_and_hint_once_each() {
        let error = Error::io("reading /x", std::io::Error::other("bad sector"))
            .hint("look at dmesg")
            .context("opening the source");
        assert_eq!(
            error.for_people(),
            "error: opening the source\ncaused by: reading /x\ncaused by: bad sector\n\n\
             hint: look at dmesg\n"
        );
    }

    #[test]
    fn scripts_see_code_message_and_hint() {
        let error = Error::new(ErrorCode::HostKey, "no key").caused_by("ssh said so");
        let json = serde_json::to_string(&error).unwrap();
        assert_eq!(
            json,
            r#"{"code":"host_key","message":"no key: ssh said so","hint":null}"#
        );
    }
}
