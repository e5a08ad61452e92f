//! The connection that all work on a host shares: opened once, so that each further command is a
//! channel of it and costs a hundredth of a second instead of a login.
//!
//! It holds no agent and does nothing but wait for its end, which comes with this program's.

use std::process::Stdio;

use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStdin};

use super::session::LOGIN_TIMEOUT;
use super::{Host, MAX_STDERR, drain, find, script, ssh};
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
    /// When the host cannot be reached, its key is not known, or it refuses the login.
    pub async fn share(&self) -> Result<()> {
        if self.is_local() {
            return Ok(());
        }
        let open = || async {
            tokio::time::timeout(LOGIN_TIMEOUT, self.open_shared())
                .await
                .unwrap_or_else(|_| Err(self.silent()))
        };
        self.inner.shared.get_or_try_init(open).await.map(drop)
    }

    async fn open_shared(&self) -> Result<SharedConnection> {
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
        Ok(SharedConnection {
            _process: process,
            _stdin: stdin,
        })
    }

    /// The error for a login that neither succeeds nor fails.
    pub(super) fn silent(&self) -> Error {
        let seconds = LOGIN_TIMEOUT.as_secs();
        let message = format!("{self} did not answer within {seconds} s");
        Error::new(ErrorCode::HostUnreachable, message)
            .hint("does its login shell wait for something?")
    }
}
