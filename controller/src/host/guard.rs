//! Something on a host that must be undone whatever happens here, a lock among them: done by a
//! shell there that waits for its standard input to end, and that undoes it then, be it because
//! this program says so or because it is gone.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin};
use tokio::task::JoinHandle;

use super::tool::NOT_FOUND;
use super::{Host, MAX_STDERR, SSH_FAILED, drain, find, script, ssh};
use crate::error::{Error, ErrorCode, Result};

/// How long undoing may take: a minute more than libvirt may need to end a backup job.
const END_TIMEOUT: Duration = Duration::from_secs(180);

/// What was done, and is undone at the end.
#[derive(Debug)]
pub struct Guard {
    process: Child,
    stdin: ChildStdin,
    /// What was written when it was done, after what a login may write.
    said: Vec<u8>,
    /// What is written from then on.
    heard: JoinHandle<Vec<u8>>,
}

/// What a guard does, each a command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) begin: &'a [&'a str],
    /// Runs from then on, and ends by itself when all is undone.
    pub(super) watch: &'a [&'a str],
    pub(super) undo: &'a [&'a str],
    /// Follows an end in order.
    pub(super) forget: &'a [&'a str],
}

/// What came of a script that was to stay.
pub(super) enum Stay {
    Begun(Box<Guard>),
    Ended { code: i32, complaint: String },
}

impl Host {
    /// Runs `begin`; when the guard ends, or this program or the connection does, the host runs
    /// `undo`. Only an end in order is followed by `forget`, so what that removes tells later of
    /// an end that was none.
    ///
    /// # Errors
    /// When the host cannot be reached, or `begin` fails.
    pub async fn guard(&self, begin: &[&str], undo: &[&str], forget: &[&str]) -> Result<Guard> {
        let task = Task {
            begin,
            watch: &["true"],
            undo,
            forget,
        };
        match self.stand_guard(&task).await? {
            Stay::Begun(guard) => Ok(*guard),
            Stay::Ended { complaint, .. } => Err(self.not_begun(&complaint)),
        }
    }

    /// As [`guard`](Self::guard), for what is to be watched meanwhile, and for a beginning whose
    /// failures differ.
    pub(super) async fn stand_guard(&self, task: &Task<'_>) -> Result<Stay> {
        let [begin, watch, undo, forget] =
            [task.begin, task.watch, task.undo, task.forget].map(|words| self.tool_words(words));
        self.stay(&script::guard(&begin?, &watch?, &undo?, &forget?))
            .await
    }

    /// The error for what ended before it had begun.
    pub(super) fn not_begun(&self, complaint: &str) -> Error {
        let message = format!("it could not be begun on {self}");
        Error::new(ErrorCode::Io, message).caused_by(complaint.to_owned())
    }

    /// Takes a lock that falls when the guard ends, or this program or the connection does.
    /// `None` when somebody else has it. Its file is there only meanwhile.
    ///
    /// # Errors
    /// When the host cannot be reached, or the file cannot be made; missing requirement, where
    /// there is no `flock`.
    pub async fn lock(&self, path: &str) -> Result<Option<Guard>> {
        let text = self.tool_words(&["sh", "-c", &script::lock(), path])?;
        let (code, complaint) = match self.stay(&text).await? {
            Stay::Begun(guard) => return Ok(Some(*guard)),
            Stay::Ended { code, complaint } => (code, complaint),
        };
        match code {
            script::HELD => Ok(None),
            NOT_FOUND => Err(self.lacks("flock").caused_by(complaint)),
            _ => {
                let message = format!("cannot lock {path} on {self}");
                Err(Error::new(ErrorCode::Io, message).caused_by(complaint))
            }
        }
    }

    /// Starts a script that says when it has begun, and stays until its standard input ends.
    async fn stay(&self, text: &str) -> Result<Stay> {
        let mut command = self.command(text).await?;
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
                let status = process.wait().await;
                let status = status.map_err(|error| Error::io("waiting for ssh", error))?;
                let complaint = String::from_utf8_lossy(&stderr).trim().to_owned();
                let Some(code) = status.code().filter(|code| *code != SSH_FAILED) else {
                    let message = format!("the connection to {self} broke");
                    return Err(Error::new(ErrorCode::Interrupted, message).caused_by(complaint));
                };
                return Ok(Stay::Ended { code, complaint });
            }
        }
        tokio::spawn(drain(stderr, 0));
        Ok(Stay::Begun(Box::new(Guard {
            process,
            stdin,
            said,
            heard: tokio::spawn(drain(Some(stdout), MAX_STDERR)),
        })))
    }
}

impl Guard {
    /// Undoes it, and waits until that is done.
    ///
    /// # Errors
    /// When it could not be undone, or nobody knows.
    pub async fn end(self) -> Result<()> {
        self.finish().await.1
    }

    /// Whether it wrote this when it was done.
    pub(super) fn has_said(&self, marker: &[u8]) -> bool {
        find(&self.said, marker).is_some()
    }

    /// As [`end`](Self::end), and what was written since it was done.
    pub(super) async fn finish(mut self) -> (Vec<u8>, Result<()>) {
        let told = self.stdin.write_all(b"done\n").await;
        drop(self.stdin);
        let deadline = tokio::time::Instant::now() + END_TIMEOUT;
        let ended = tokio::time::timeout_at(deadline, self.process.wait()).await;
        let result = match (told, ended) {
            (Ok(()), Ok(Ok(status))) if status.success() => Ok(()),
            (_, Ok(Ok(status))) if status.code() != Some(SSH_FAILED) => Err(Error::new(
                ErrorCode::Io,
                format!("undoing it ended with {status}"),
            )),
            _ => Err(Error::new(ErrorCode::Interrupted, "the connection broke")),
        };
        // What watched may hold the pipe for a moment longer.
        let heard = tokio::time::timeout_at(deadline, self.heard).await;
        (
            heard.map(Result::unwrap_or_default).unwrap_or_default(),
            result,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

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
            let (begin, undo) = (["touch", &begun], ["touch", &undone]);
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
    async fn a_lock_is_held_by_one_and_falls_with_its_guard() {
        let host = Host::new("local".parse().unwrap(), Arc::default());
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("it's a lock");
        let lock = async || host.lock(path.to_str().unwrap()).await.unwrap();
        let held = lock().await.unwrap();
        assert!(lock().await.is_none() && path.exists());
        held.end().await.unwrap();
        assert!(!path.exists());
        // As after SIGKILL: the pipe ends, and the child is nobody's.
        drop(lock().await.unwrap().stdin);
        let gone = async {
            while path.exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(END_TIMEOUT, gone).await.unwrap();
        assert!(lock().await.is_some());
        let nowhere = host.lock("/nowhere/lock").await.unwrap_err();
        assert_eq!(nowhere.code(), ErrorCode::Io);
    }

    #[tokio::test]
    async fn what_cannot_be_undone_is_an_error_at_once_although_it_is_watched() {
        let host = Host::new("local".parse().unwrap(), Arc::default());
        let task = Task {
            begin: &["true"],
            watch: &["sleep", "30"],
            undo: &["false"],
            forget: &["true"],
        };
        let Stay::Begun(guard) = host.stand_guard(&task).await.unwrap() else {
            panic!("it has begun");
        };
        let ended = tokio::time::timeout(Duration::from_secs(10), guard.end()).await;
        assert_eq!(ended.unwrap().unwrap_err().code(), ErrorCode::Io);
    }

    #[tokio::test]
    async fn what_cannot_be_begun_is_an_error() {
        let host = Host::new("local".parse().unwrap(), Arc::default());
        let error = host
            .guard(&["false"], &["true"], &["true"])
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::Io);
    }
}
