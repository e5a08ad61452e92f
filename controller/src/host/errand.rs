//! A program on a host that moves a disk by itself: rsync or scp. It lives no longer than the
//! connection that started it, and its output is followed while it works.

use std::process::{ExitStatus, Stdio};

use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::task::JoinHandle;

use super::dial::KNOWN_HOSTS;
use super::{Host, MAX_STDERR, SSH_FAILED, drain, quote, script, ssh};
use crate::endpoint::HostSpec;
use crate::error::{Error, Result};

/// A program at work.
#[derive(Debug)]
pub struct Errand {
    host: Host,
    process: Child,
    stdout: ChildStdout,
    stderr: JoinHandle<Vec<u8>>,
    _stdin: ChildStdin,
}

impl Host {
    /// Starts a program with these words on the host. Where a word holds the mark of
    /// [`Reach`](super::Reach), it finds the path of a file with `known_hosts` there.
    ///
    /// # Errors
    /// When the host cannot be reached, or a word cannot be quoted.
    pub async fn errand(&self, words: &[String], known_hosts: &[u8]) -> Result<Errand> {
        let quoted = words
            .iter()
            .map(|word| mark(word))
            .collect::<Result<Vec<_>>>()?;
        let command = format!("env LC_ALL=C {}", quoted.join(" "));
        let mut command = self
            .command(&script::errand(&command, known_hosts)?)
            .await?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = command.spawn().map_err(ssh::cannot_run_ssh)?;
        let (Some(stdin), Some(stdout)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(Error::new(
                crate::error::ErrorCode::Internal,
                "a child process without pipes",
            ));
        };
        let stderr = tokio::spawn(drain(process.stderr.take(), MAX_STDERR));
        Ok(Errand {
            host: self.clone(),
            process,
            stdout,
            stderr,
            _stdin: stdin,
        })
    }
}

/// A word for the shell, with the place of the known hosts filled in there.
fn mark(word: &str) -> Result<String> {
    let parts = word.split(KNOWN_HOSTS).map(|part| {
        if part.is_empty() && word.contains(KNOWN_HOSTS) {
            return Ok(String::new());
        }
        let quoted = quote::word(part.as_bytes())?;
        Ok(String::from_utf8_lossy(&quoted).into_owned())
    });
    Ok(parts.collect::<Result<Vec<_>>>()?.join("\"$k\""))
}

impl Errand {
    /// The exit status of a program whose ssh to the other host failed.
    pub const NO_LOGIN: i32 = script::NESTED_SSH_FAILED;

    /// More of what the program writes; empty at its end. Safe to cancel.
    ///
    /// # Errors
    /// When the pipe cannot be read.
    pub async fn output(&mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(8 * 1024);
        let read = self.stdout.read_buf(&mut bytes).await;
        read.map_err(|error| Error::io("reading what a program writes", error))?;
        Ok(bytes)
    }

    /// Waits for the end: how it ended, and the start of what it complained about. What ssh means
    /// with 255, a program that ran ssh tells with [`Errand::NO_LOGIN`].
    ///
    /// # Errors
    /// When the connection to the host broke.
    pub async fn end(mut self) -> Result<(ExitStatus, String)> {
        let status = self.process.wait().await;
        let status = status.map_err(|error| Error::io("waiting for a program", error))?;
        let stderr = self.stderr.await.unwrap_or_default();
        let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
        if matches!(self.host.spec(), HostSpec::Ssh(_)) && status.code() == Some(SSH_FAILED) {
            return Err(self.host.classify(&stderr));
        }
        Ok((status, stderr))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn here() -> Host {
        Host::new("local".parse().unwrap(), Arc::default())
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    async fn all_of(errand: &mut Errand) -> String {
        let mut all = Vec::new();
        loop {
            let more = errand.output().await.unwrap();
            if more.is_empty() {
                return String::from_utf8(all).unwrap();
            }
            all.extend(more);
        }
    }

    #[tokio::test]
    async fn it_finds_the_known_hosts_in_a_file_without_a_name() {
        let known = b"[h]:22 ssh-ed25519 AAAA it's \"x\"\n@revoked h2 k\n";
        let mut errand = here()
            .errand(&words(&["cat", "{known_hosts}"]), known)
            .await
            .unwrap();
        assert_eq!(all_of(&mut errand).await.as_bytes(), known);
        let (status, stderr) = errand.end().await.unwrap();
        assert!(status.success() && stderr.is_empty(), "{status} {stderr}");
    }

    #[tokio::test]
    async fn it_ends_with_its_standard_input_and_its_status_is_told() {
        let mut failing = here()
            .errand(&words(&["sh", "-c", "echo a; echo b >&2; exit 3"]), b"")
            .await
            .unwrap();
        assert_eq!(all_of(&mut failing).await, "a\n");
        let (status, stderr) = failing.end().await.unwrap();
        assert_eq!((status.code(), stderr.as_str()), (Some(3), "b"));
        let Errand {
            mut process,
            _stdin: stdin,
            ..
        } = here().errand(&words(&["sleep", "600"]), b"").await.unwrap();
        drop(stdin);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(20), process.wait()).await;
        assert!(!ended.unwrap().unwrap().success());
    }
}
