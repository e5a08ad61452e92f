//! Programs of a hypervisor, one at a time: virsh, qemu-img, stat and their like. A program gets
//! its arguments as words, never as shell text.

use std::time::Duration;

use super::{Host, Output, quote};
use crate::error::{Error, ErrorCode, Result};

/// How much output of a program is kept: the definitions of a few thousand VMs.
const MAX_OUTPUT: usize = 64 * 1024 * 1024;

/// With which a shell, and `env`, say that a program is not there.
pub(super) const NOT_FOUND: i32 = 127;

impl Host {
    /// Runs a program with `words` as its name and arguments, through `sudo -n` with `--sudo`, in
    /// the locale C, and waits for its end. How it ended is in the output.
    ///
    /// # Errors
    /// When the host cannot be reached; missing requirement, when it has no such program or sudo
    /// refuses it.
    pub async fn tool(&self, words: &[&str], input: &[u8]) -> Result<Output> {
        let script = format!("exec {}", self.tool_words(words)?);
        // Many callers wait for several of these, and would be large for it.
        let run = Box::pin(self.run(&script, input, MAX_OUTPUT));
        let output = run.await?;
        let name = words.first().copied().unwrap_or_default();
        if output.status.code() == Some(NOT_FOUND) {
            return Err(self.lacks(name).caused_by(output.stderr.trim().to_owned()));
        }
        if self.options().sudo && output.stderr.starts_with("sudo:") {
            let message = format!("sudo on {self} does not run {name}");
            return Err(Error::new(ErrorCode::MissingRequirement, message)
                .caused_by(output.stderr.trim().to_owned())
                .hint("let sudoers allow it without a password, or log in as root"));
        }
        Ok(output)
    }

    /// As [`Host::tool`], for a program whose failure is an error: what it wrote.
    ///
    /// # Errors
    /// As [`Host::tool`], and io with what the program complained about.
    pub async fn tool_output(&self, words: &[&str], input: &[u8]) -> Result<String> {
        let output = self.tool(words, input).await?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let message = format!("\"{}\" failed on {self}", words.join(" "));
        Err(Error::new(ErrorCode::Io, message).caused_by(output.stderr.trim().to_owned()))
    }

    /// Runs a command that the user has written for a shell, with these variables, as the login itself,
    /// and waits for its end, not longer than `limit`.
    ///
    /// # Errors
    /// When the host cannot be reached; timeout; io, with what the command complained about, when it
    /// fails.
    pub async fn user_command(
        &self,
        command: &str,
        variables: &[(&str, &str)],
        input: &[u8],
        limit: Duration,
    ) -> Result<()> {
        let variables = variables
            .iter()
            .map(|(name, value)| format!("{name}={value}"));
        let variables: Vec<String> = variables.collect();
        let mut words = vec!["env"];
        words.extend(variables.iter().map(String::as_str));
        words.extend(["sh", "-c", command]);
        let quoted = quote::command(words.iter().map(|word| word.as_bytes()))?;
        let script = format!("exec {}", quoted.to_string_lossy());
        let run = Box::pin(self.run(&script, input, MAX_OUTPUT));
        let Ok(output) = tokio::time::timeout(limit, run).await else {
            let limit = humantime::format_duration(limit);
            return Err(Error::new(
                ErrorCode::Timeout,
                format!("it took more than {limit}"),
            ));
        };
        let output = output?;
        match output.status.success() {
            true => Ok(()),
            false => Err(Error::new(ErrorCode::Io, output.status.to_string())
                .caused_by(output.stderr.trim().to_owned())),
        }
    }

    /// The words as shell text.
    pub(super) fn tool_words(&self, words: &[&str]) -> Result<String> {
        let sudo: &[&str] = if self.options().sudo {
            &["sudo", "-n"]
        } else {
            &[]
        };
        let all = sudo.iter().chain(&["env", "LC_ALL=C"]).chain(words);
        let quoted = quote::command(all.map(|word| word.as_bytes()))?;
        quoted
            .into_string()
            .map_err(|text| Error::usage(format!("not UTF-8: {}", text.to_string_lossy())))
    }

    /// The error for a program that is not installed.
    pub(super) fn lacks(&self, program: &str) -> Error {
        let package = match program {
            "virsh" => "libvirt-clients (Debian) or libvirt-client (RHEL)",
            "qemu-img" => "qemu-utils (Debian) or qemu-img (RHEL)",
            "flock" => "util-linux",
            other => other,
        };
        Error::new(
            ErrorCode::MissingRequirement,
            format!("{self} has no {program}"),
        )
        .hint(format!("install {package} there"))
    }
}
