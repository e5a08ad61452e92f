//! The connection that all work on a host shares: opened once, so that each further command is a
//! channel of it and costs a hundredth of a second instead of a login.
//!
//! It holds no agent and does nothing but wait for its end, which comes with this program's.
//! A login that authorized_keys lets start an agent and nothing else gives none.

use std::process::Stdio;

use kvm_clone_protocol::preamble::MAGIC;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStdin};

use super::session::LOGIN_TIMEOUT;
use super::{Host, MAX_STDERR, Output, drain, find, script, ssh};
use crate::error::{Error, ErrorCode, Result};

/// How much a login shell may print by itself.
const MAX_NOISE: usize = 64 * 1024;

/// The ssh process that owns the connection; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct SharedConnection {
    _process: Child,
    _stdin: ChildStdin,
}

impl Host {
    /// Opens the shared connection, unless it is open or the host is this machine. Whatever runs
    /// on the host from then on is a channel of it, agents included.
    ///
    /// # Errors
    /// When the host cannot be reached, its key is not known, or it refuses the login; missing
    /// requirement, when the login runs no commands.
    pub async fn share(&self) -> Result<()> {
        if self.runs_commands().await? {
            Ok(())
        } else {
            Err(self.only_starts_an_agent())
        }
    }

    /// Whether the login runs what it is asked for: the shared connection is open then.
    ///
    /// # Errors
    /// When the host cannot be reached, its key is not known, or it refuses the login.
    pub async fn runs_commands(&self) -> Result<bool> {
        if self.is_local() {
            return Ok(true);
        }
        let open = || async {
            tokio::time::timeout(LOGIN_TIMEOUT, self.open_shared())
                .await
                .unwrap_or_else(|_| Err(self.silent()))
        };
        let shared = self.inner.shared.get_or_try_init(open).await?;
        Ok(shared.is_some())
    }

    async fn open_shared(&self) -> Result<Option<SharedConnection>> {
        let mut command = self.control_command(script::STAY).await?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = command.spawn().map_err(ssh::cannot_run_ssh)?;
        let (stdin, stderr) = (process.stdin.take(), process.stderr.take());
        let mut stdout = process.stdout.take();
        let mut said = Vec::new();
        while find(&said, script::DONE).is_none() {
            if find(&said, &MAGIC).is_some() {
                return Ok(None);
            }
            let read = match &mut stdout {
                Some(stdout) if said.len() <= MAX_NOISE => stdout.read_buf(&mut said).await,
                _ => Ok(0),
            };
            if read.map_err(|error| Error::io("reading from ssh", error))? == 0 {
                let _ = process.start_kill();
                let stderr = drain(stderr, MAX_STDERR).await;
                return Err(self.classify(&String::from_utf8_lossy(&stderr)));
            }
        }
        // What ssh says later is read so that it never blocks on a full pipe, and is of no use.
        tokio::spawn(drain(stderr, 0));
        let stdin = stdin
            .ok_or_else(|| Error::new(ErrorCode::Internal, "a child process without pipes"))?;
        Ok(Some(SharedConnection {
            _process: process,
            _stdin: stdin,
        }))
    }

    /// The error for a login that did not do what a script says.
    pub(super) fn runs_no_script(&self, output: &Output) -> Error {
        let came = &output.stdout[..output.stdout.len().min(MAX_NOISE)];
        if find(came, &MAGIC).is_some() {
            return self.only_starts_an_agent();
        }
        let came = came[..came.len().min(64)].escape_ascii();
        let message = format!(
            "{self} does not run a shell script ({}; got \"{came}\")",
            output.status
        );
        Error::new(ErrorCode::MissingRequirement, message)
            .caused_by(output.stderr.trim().to_owned())
            .hint("the login shell there must run commands given with \"ssh HOST COMMAND\"")
    }

    fn only_starts_an_agent(&self) -> Error {
        let message = format!("the login on {self} starts an agent and runs no commands");
        Error::new(ErrorCode::MissingRequirement, message).hint(
            "authorized_keys there forces that: \"disk\" with --method blocksync needs no more, \
             anything else another key",
        )
    }

    /// The error for a login that neither succeeds nor fails.
    pub(super) fn silent(&self) -> Error {
        let seconds = LOGIN_TIMEOUT.as_secs();
        let message = format!("{self} did not answer within {seconds} s");
        Error::new(ErrorCode::HostUnreachable, message)
            .hint("does its login shell wait for something?")
    }
}
