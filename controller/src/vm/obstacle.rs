//! What stands in the way of an operation. All of it is found before anything is changed, and
//! told at once: nobody wants to learn of the second obstacle after the first one is gone.

use std::fmt::Write as _;

use serde::Serialize;

use crate::error::{Error, ErrorCode};

/// One thing that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// The code that it would have as the only one.
    pub code: ErrorCode,
    /// What it is, naming the thing.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

/// All that was found.
#[derive(Debug, Clone, Default)]
pub(super) struct Obstacles {
    found: Vec<Obstacle>,
}

impl Obstacles {
    /// Something that the user has to decide about, or somebody else is at.
    pub(super) fn refused(&mut self, message: impl Into<String>, hint: impl Into<String>) {
        self.add(ErrorCode::Refused, message, hint);
    }

    /// Something that a host lacks.
    pub(super) fn missing(&mut self, message: impl Into<String>, hint: impl Into<String>) {
        self.add(ErrorCode::MissingRequirement, message, hint);
    }

    pub(super) fn add(
        &mut self,
        code: ErrorCode,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.found.push(Obstacle {
            code,
            message: message.into(),
            hint: hint.into(),
        });
    }

    /// An error of which others may stand beside it. One that ends the run by itself, such as a
    /// host that went away, is given back.
    pub(super) fn take(&mut self, error: Error) -> Result<(), Error> {
        use ErrorCode::{Busy, MissingRequirement, NoSpace, NotFound, Refused};
        if !matches!(
            error.code(),
            Busy | MissingRequirement | NoSpace | NotFound | Refused
        ) {
            return Err(error);
        }
        let hint = error.hint_text().unwrap_or_default().to_owned();
        self.add(error.code(), error.one_line(), hint);
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub(super) fn into_found(self) -> Vec<Obstacle> {
        self.found
    }
}

/// The one error for all obstacles: `what` could not be done.
pub(super) fn to_error(found: &[Obstacle], what: &str) -> Option<Error> {
    let first = found.first()?;
    if let [only] = found {
        let error = Error::new(only.code, format!("{what}: {}", only.message));
        return Some(if only.hint.is_empty() {
            error
        } else {
            error.hint(&only.hint)
        });
    }
    let mut each = String::new();
    for (number, obstacle) in found.iter().enumerate() {
        // Writing to a string does not fail.
        let _ = write!(each, "\n  {}. {}", number + 1, obstacle.message);
        if !obstacle.hint.is_empty() {
            let _ = write!(each, "\n     -> {}", obstacle.hint);
        }
    }
    let message = format!("{what}: {} obstacles, and nothing was changed", found.len());
    Some(Error::new(common_code(found, first.code), message).caused_by(each))
}

/// The code that all have, or the one that stands for them: what a host lacks is exit 8 only when
/// nothing has to be decided as well.
fn common_code(found: &[Obstacle], first: ErrorCode) -> ErrorCode {
    use ErrorCode::{MissingRequirement, NoSpace, Refused};
    if found.iter().all(|obstacle| obstacle.code == first) {
        first
    } else if found
        .iter()
        .all(|obstacle| matches!(obstacle.code, MissingRequirement | NoSpace))
    {
        MissingRequirement
    } else {
        Refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_obstacle_is_its_own_error_and_several_are_one_report() {
        let mut obstacles = Obstacles::default();
        assert!(to_error(&obstacles.clone().into_found(), "x").is_none());
        obstacles.add(ErrorCode::NoSpace, "no room", "make room");
        let one = to_error(&obstacles.clone().into_found(), "cannot clone web").unwrap();
        assert_eq!(
            (one.code(), one.hint_text()),
            (ErrorCode::NoSpace, Some("make room"))
        );
        obstacles.missing("no bridge br0", "map it");
        let both = to_error(&obstacles.clone().into_found(), "cannot clone web").unwrap();
        assert_eq!(both.code(), ErrorCode::MissingRequirement);
        obstacles.refused("web runs", "shut it down");
        let all = to_error(&obstacles.into_found(), "cannot clone web").unwrap();
        assert_eq!(all.code(), ErrorCode::Refused);
        let text = all.for_people();
        for part in ["3 obstacles", "no room", "-> make room", "br0", "web runs"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_host_that_is_gone_is_no_obstacle() {
        let mut obstacles = Obstacles::default();
        let gone = Error::new(ErrorCode::HostUnreachable, "gone");
        assert!(obstacles.take(gone).is_err());
        obstacles.take(Error::new(ErrorCode::Busy, "held")).unwrap();
        assert_eq!(obstacles.into_found().len(), 1);
    }
}
