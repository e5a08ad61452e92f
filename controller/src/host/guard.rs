//! Something on a host that must be undone whatever happens here: done by a shell there that
//! waits for its standard input to end, and that undoes it then, be it because this program says
//! so or because it is gone.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin};

use super::{Host, MAX_STDERR, drain, find, script, ssh};
use crate::error::{Error, ErrorCode, Result};

/// How long undoing may take.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// What was done, and is undone at the end.
#[derive(Debug)]
pub struct Guard {
    process: Child,
    stdin: ChildStdin,
}

impl Host {
    /// Runs `begin`; when the guard ends, or this program or the connection does, the host runs
    /// `undo`. Only an end in order is followed by `forget`, so what that removes tells later of
    /// an end that was none.
    ///
    /// # Errors
    /// When the host cannot be reached, or `begin` fails.
    pub async fn guard(&self, begin: &[String], undo: &[String], forget: &[&str]) -> Result<Guard> {
        let owned = |words: &[String]| {
            self.tool_words(&words.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let text = script::guard(&owned(begin)?, &owned(undo)?, &self.tool_words(forget)?);
        let mut command = self.command(&text).await?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = command.spawn().map_err(ssh::cannot_run_ssh)?;
        let (stdin, stdout, stderr) = (
            process.stdin.take(),
            process.stdout.take(),
            process.stderr.take(),
        );
        let (Some(stdin), Some(mut stdout)) = (stdin, stdout) else {
            return Err(Error::new(
                ErrorCode::Internal,
                "a child process without pipes",
            ));
        };
        let mut said = Vec::new();
        while find(&said, script::DONE).is_none() {
            let read = stdout.read_buf(&mut said).await;
            if read.map_err(|error| Error::io("reading from ssh", error))? == 0 {
                let stderr = drain(stderr, MAX_STDERR).await;
                let complaint = String::from_utf8_lossy(&stderr).trim().to_owned();
                return Err(Error::new(
                    ErrorCode::Io,
                    format!("\"{}\" failed on {self}", begin.join(" ")),
                )
                .caused_by(complaint));
            }
        }
        tokio::spawn(drain(stderr, 0));
        tokio::spawn(drain(Some(stdout), 0));
        Ok(Guard { process, stdin })
    }
}

impl Guard {
    /// Undoes it, and waits until that is done.
    ///
    /// # Errors
    /// When it could not be undone, or nobody knows.
    pub async fn end(mut self) -> Result<()> {
        let told = self.stdin.write_all(b"done\n").await;
        drop(self.stdin);
        let ended = tokio::time::timeout(END_TIMEOUT, self.process.wait()).await;
        match (told, ended) {
            (Ok(()), Ok(Ok(status))) if status.success() => Ok(()),
            (_, Ok(Ok(status))) => Err(Error::new(
                ErrorCode::Io,
                format!("undoing it ended with {status}"),
            )),
            _ => Err(Error::new(ErrorCode::Interrupted, "the connection broke")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    async fn wait_for(path: &std::path::Path) {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn it_is_undone_in_order_and_when_nobody_is_left_to_say_so() {
        let host = Host::new("local".parse().unwrap(), Arc::default());
        for in_order in [true, false] {
            let directory = tempfile::tempdir().unwrap();
            let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
            let (begun, undone, note) = (path("begun"), path("undone"), path("note"));
            std::fs::write(&note, "").unwrap();
            let (begin, undo) = (words(&["touch", &begun]), words(&["touch", &undone]));
            let guard = host.guard(&begin, &undo, &["rm", &note]).await.unwrap();
            assert!(
                std::path::Path::new(&begun).exists() && !std::path::Path::new(&undone).exists()
            );
            if in_order {
                guard.end().await.unwrap();
            } else {
                // As after SIGKILL: the pipe ends, and the child is nobody's.
                drop(guard.stdin);
                tokio::time::timeout(END_TIMEOUT, wait_for(std::path::Path::new(&undone)))
                    .await
                    .unwrap();
            }
            assert!(std::path::Path::new(&undone).exists());
            assert_eq!(std::path::Path::new(&note).exists(), !in_order);
        }
    }

    #[tokio::test]
    async fn what_cannot_be_begun_is_an_error() {
        let host = Host::new("local".parse().unwrap(), Arc::default());
        let error = host
            .guard(&words(&["false"]), &words(&["true"]), &["true"])
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::Io);
    }
}
