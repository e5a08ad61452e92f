//! The one place that quotes words for a shell.
//!
//! A remote shell sees a string, never an argument vector. Whatever goes into that string goes
//! through here; nothing else in this program builds shell text from data.
//!
//! Quoting keeps a word one word. It does not keep a program from taking a word with a leading
//! dash for an option: that is the caller's to prevent, by `--` or by an absolute path.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use crate::error::{Error, Result};

/// One word, quoted for any POSIX shell.
///
/// # Errors
/// Usage, for a word with a NUL byte: no program can be given one.
pub(super) fn word(word: &[u8]) -> Result<Vec<u8>> {
    match shlex::bytes::try_quote(word) {
        Ok(quoted) => Ok(quoted.into_owned()),
        Err(_) => Err(Error::usage(format!(
            "\"{}\" holds a NUL byte, which no command line can carry",
            word.escape_ascii()
        ))),
    }
}

/// A command of several words, quoted and joined by spaces.
///
/// # Errors
/// As [`word`].
pub(super) fn command<'a>(words: impl IntoIterator<Item = &'a [u8]>) -> Result<OsString> {
    let quoted = words.into_iter().map(word).collect::<Result<Vec<_>>>()?;
    Ok(OsString::from_vec(quoted.join(&b' ')))
}

/// A command for people, or for a file that they read.
///
/// # Errors
/// Usage, for a word with a NUL byte.
pub fn quoted(words: &[&str]) -> Result<String> {
    let command = command(words.iter().map(|word| word.as_bytes()))?;
    Ok(command.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const HOSTILE: [&[u8]; 14] = [
        b"plain",
        b"",
        b"two words",
        b"it's",
        b"\"double\"",
        b"$(touch /tmp/owned) `id` ${HOME}",
        b"new\nline\ttab",
        b"-rf",
        b"back\\slash\\",
        b"!bang ^caret",
        b"not utf-8 \xff\xfe",
        b"; rm -rf / #",
        b"*?[a]~",
        b"'\"'\"'",
    ];

    #[test]
    fn every_hostile_word_comes_out_of_a_real_shell_as_it_went_in() {
        for shell in ["dash", "bash"] {
            for input in HOSTILE {
                let mut script = OsString::from("printf %s ");
                script.push(command([input]).unwrap());
                let output = Command::new(shell).arg("-c").arg(script).output().unwrap();
                assert_eq!(output.stdout, input, "{shell}");
                assert!(output.stderr.is_empty());
            }
        }
    }

    #[test]
    fn quoting_twice_survives_two_shells() {
        for input in HOSTILE {
            let inner = command([&b"printf"[..], b"%s", input]).unwrap().into_vec();
            let outer = command([&b"sh"[..], b"-c", &inner]).unwrap();
            let output = Command::new("sh").arg("-c").arg(outer).output().unwrap();
            assert_eq!(output.stdout, input);
        }
    }

    #[test]
    fn nul_is_refused() {
        assert_eq!(
            word(b"a\0b").unwrap_err().code(),
            crate::error::ErrorCode::Usage
        );
    }
}
