//! What an agent says, before anybody believes it or shows it: an agent is on a host that may be in
//! other hands. Texts are made short and harmless to a terminal; names that go into commands, or
//! are compared, must be what they say.

use kvm_clone_protocol::message::{Control, Leftover, Listening, Welcome};

use crate::error::{Error, ErrorCode, Result};
use crate::output::printable;

/// The longest text that an agent says to people, in bytes: one that names the longest path.
const MAX_TEXT: usize = 4096 + 256;

/// The longest path that Linux takes.
const MAX_PATH: usize = 4096;

/// The longest word about an agent or its host: a release, a machine, a boot id.
const MAX_WORD: usize = 128;

/// The same message, fit to be shown.
///
/// # Errors
/// Protocol, for what no agent of ours says.
pub(super) fn examine(message: Control) -> Result<Control> {
    match &message {
        Control::Welcome(welcome) => check_welcome(welcome)?,
        Control::Listening(Listening { name, .. }) => check_name(name)?,
        Control::Leftover(Leftover { path, .. }) if path.len() > MAX_PATH => {
            return Err(absurd("a path that is longer than any"));
        }
        _ => {}
    }
    Ok(match message {
        Control::Failed(mut failed) => {
            failed.message = text(&failed.message);
            Control::Failed(failed)
        }
        Control::Warning(mut warning) => {
            warning.message = text(&warning.message);
            Control::Warning(warning)
        }
        Control::Leftover(mut leftover) => {
            leftover.message = text(&leftover.message);
            Control::Leftover(leftover)
        }
        message => message,
    })
}

fn check_welcome(welcome: &Welcome) -> Result<()> {
    let Welcome {
        release,
        arch,
        boot_id,
        ..
    } = welcome;
    let is_word =
        |text: &String| text.len() <= MAX_WORD && text.bytes().all(|byte| byte.is_ascii_graphic());
    if [release, arch, boot_id].into_iter().all(is_word) {
        return Ok(());
    }
    Err(absurd("a welcome whose words are none"))
}

/// It goes into command lines.
fn check_name(name: &str) -> Result<()> {
    let is_name = |name: &str| {
        (1..=MAX_WORD).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    if is_name(name) {
        return Ok(());
    }
    Err(absurd("a name of a data connection that is none"))
}

fn absurd(what: &str) -> Error {
    Error::new(ErrorCode::Protocol, format!("an agent says {what}"))
}

/// A text for people, on one line, its end left out where it is too long.
fn text(said: &str) -> String {
    let short = &said[..said.floor_char_boundary(MAX_TEXT)];
    let more = if short.len() < said.len() { "…" } else { "" };
    printable(short) + more
}

#[cfg(test)]
mod tests {
    use kvm_clone_protocol::message::{Fate, Token, Warning};

    use super::*;

    #[test]
    fn texts_are_short_and_harmless() {
        let said = |message: &str| {
            let warning = Warning {
                disk: None,
                message: message.to_owned(),
            };
            match examine(Control::Warning(warning)) {
                Ok(Control::Warning(warning)) => warning.message,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(said("/a ü"), "/a ü");
        assert_eq!(said("\u{1b}[2J\u{9b}x\r\n"), "\\u{1b}[2J\\u{9b}x\\r\\n");
        assert_eq!(said(&"ü".repeat(60_000)).chars().count(), MAX_TEXT / 2 + 1);
    }

    #[test]
    fn names_and_paths_are_what_they_say() {
        let name = |name: &str| {
            examine(Control::Listening(Listening {
                link: 0,
                name: name.to_owned(),
                token: Token([0; 16]),
            }))
        };
        assert!(name("0aZ").is_ok());
        for bad in ["", "--version", "x; y", "ü", &"x".repeat(200)] {
            assert_eq!(name(bad).unwrap_err().code(), ErrorCode::Protocol, "{bad}");
        }
        let path = |len| {
            examine(Control::Leftover(Leftover {
                path: vec![b'x'; len],
                fate: Fate::Torn,
                message: String::new(),
            }))
        };
        assert!(path(4096).is_ok());
        assert!(path(4097).is_err());
    }
}
