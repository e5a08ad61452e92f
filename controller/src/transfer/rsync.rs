//! Method `rsync`: rsync on the source host, tuned for VM images: sparse, resumable, with no
//! compression, and with no trust in sizes and times.

use std::num::NonZeroUsize;

use super::copy::{self, Ground, Holes, cannot};
use super::request::{Request, RouteChoice};
use super::result::TransferResult;
use super::{At as _, BeforeChange, Context, Job, Method, Working};
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Errand, FileKind, Host};
use crate::progress::Progress;

/// As results name it.
pub(super) const NAME: &str = "rsync";

/// What rsync is always told. Each of the later ones keeps it from a mistake that it makes with
/// disks: taking equal sizes and times for equal contents, and splitting paths at spaces.
const ALWAYS: [&str; 8] = [
    "-avS",
    "--partial",
    "--inplace",
    "--progress",
    "--info=progress2",
    "--stats",
    "--ignore-times",
    "-s",
];

/// Ahead of the words of rsync, on either host, with `--nice`.
const NICE: [&str; 6] = ["nice", "-n", "19", "ionice", "-c", "3"];

/// rsync, at work on the source host.
#[derive(Debug, Default)]
pub(super) struct Rsync;

impl Method for Rsync {
    fn name(&self) -> &'static str {
        NAME
    }

    fn transfer<'a>(
        &'a mut self,
        context: &'a Context,
        jobs: &'a mut [Job<'_>],
        _parallel: NonZeroUsize,
        before: BeforeChange<'a>,
    ) -> Working<'a> {
        Box::pin(async move {
            before.await?;
            for (at, job) in jobs.iter_mut().enumerate() {
                transfer(context, job.request, &mut job.result)
                    .await
                    .at(at)?;
            }
            Ok(())
        })
    }
}

async fn transfer(context: &Context, request: &Request, result: &mut TransferResult) -> Result<()> {
    if request.options.route == RouteChoice::Relay {
        return Err(cannot(NAME, "pass its data through this machine")
            .hint("--method blocksync and --method libvirt can; or let the source host log in at the destination"));
    }
    let ground = copy::survey(context, request, NAME, Holes::Kept, result).await?;
    for host in [&ground.from, &ground.to] {
        host.require("rsync").await?;
        if request.options.nice {
            host.require("ionice").await?;
        }
    }
    result.route = Some(ground.route());
    let (runner, words, known_hosts) = command(&ground, request).await?;
    let mut errand = runner.errand(&words, &known_hosts).await?;
    let mut progress = Progress::new(ground.source_facts.size_bytes, &context.progress);
    let said = follow(&mut errand, &mut progress).await;
    progress.finish();
    let said = said?;
    let (status, stderr) = errand.end().await?;
    if !status.success() {
        return Err(explain(&ground, status.code(), &stderr));
    }
    count(&said, result);
    ground.check_unchanged(request).await?;
    ground.place().await
}

/// The host that rsync runs on, its words, and the host keys that it needs there.
async fn command(ground: &Ground, request: &Request) -> Result<(Host, Vec<String>, Vec<u8>)> {
    let nice = if request.options.nice { &NICE[..] } else { &[] };
    let words = nice.iter().chain(&["rsync"]).chain(&ALWAYS);
    let mut words: Vec<String> = words.map(|word| (*word).to_owned()).collect();
    if request.options.nice {
        words.push(format!("--rsync-path={} rsync", NICE.join(" ")));
    }
    if let Some(limit) = request.options.bandwidth_limit {
        // rsync counts in KiB a second, and takes 0 for no limit.
        words.push(format!("--bwlimit={}", limit.div_ceil(1024).max(1)));
    }
    if ground.source_facts.kind == FileKind::Device {
        words.push("--copy-devices".to_owned());
    }
    if ground.is_one_host() {
        words.extend(["--no-whole-file".to_owned(), "--".to_owned()]);
        words.extend([ground.source.clone(), ground.written.clone()]);
        return Ok((ground.from.clone(), words, Vec::new()));
    }
    // This machine has no name that the source host could reach it by, so it fetches.
    let (runner, other) = if ground.to.is_local() {
        (&ground.to, &ground.from)
    } else {
        (&ground.from, &ground.to)
    };
    let way = other.way_from(runner).await?;
    words.extend(["-e".to_owned(), way.shell(), "--".to_owned()]);
    if ground.to.is_local() {
        words.extend([
            format!("{}:{}", way.name, ground.source),
            ground.written.clone(),
        ]);
    } else {
        words.extend([
            ground.source.clone(),
            format!("{}:{}", way.name, ground.written),
        ]);
    }
    Ok((runner.clone(), words, way.known_hosts))
}

/// Shows what rsync says of its progress, and keeps the rest.
async fn follow(errand: &mut Errand, progress: &mut Progress) -> Result<String> {
    let (mut said, mut line) = (String::new(), String::new());
    loop {
        let more = errand.output().await?;
        if more.is_empty() {
            return Ok(said + &line);
        }
        for c in String::from_utf8_lossy(&more).chars() {
            if !matches!(c, '\r' | '\n') {
                line.push(c);
                continue;
            }
            match progress_of(&line) {
                Some(bytes) => progress.update(bytes, bytes, bytes),
                None => {
                    said.push_str(&line);
                    said.push('\n');
                }
            }
            line.clear();
        }
    }
}

/// The bytes in a line of progress: `  1,234,567  12%  100.00MB/s    0:00:10`.
fn progress_of(line: &str) -> Option<u64> {
    let mut words = line.split_whitespace();
    let bytes = number(words.next()?)?;
    words.next()?.strip_suffix('%')?.parse::<u8>().ok()?;
    Some(bytes)
}

/// A number with a comma, or nothing, between its thousands.
fn number(text: &str) -> Option<u64> {
    let digits: String = text.chars().filter(|c| *c != ',').collect();
    digits.parse().ok()
}

/// Takes the figures out of rsync's statistics. What it had of the file already it read from the
/// destination; how much that was, it does not say.
fn count(said: &str, result: &mut TransferResult) {
    let figure = |name: &str| {
        let line = said.lines().find_map(|line| line.trim().strip_prefix(name));
        number(line?.split_whitespace().next()?)
    };
    result.bytes_changed = figure("Literal data:");
    result.bytes_wire = figure("Total bytes sent:")
        .zip(figure("Total bytes received:"))
        .map(|(sent, received)| sent + received);
}

/// What an end of rsync means; rsync(1) lists its statuses.
fn explain(ground: &Ground, status: Option<i32>, stderr: &str) -> Error {
    let what = format!("rsync from {} to {} failed", ground.from, ground.to);
    let again = "the same command takes the run up again";
    let full = stderr.contains("No space left") || stderr.contains("ENOSPC");
    // It ends with ssh's status, or with that of a connection that broke, as it happens.
    if let Some(error) = ground.no_login(stderr) {
        return error.hint("let the source host log in there (--forward-agent, or a key of its own), or use --method blocksync");
    }
    let (code, hint) = match status {
        _ if full => (
            ErrorCode::NoSpace,
            "make room, and run the same command again",
        ),
        Some(10 | 12 | 20 | 30 | 35 | Errand::NO_LOGIN) | None => (ErrorCode::Interrupted, again),
        Some(1 | 2 | 4) => (
            ErrorCode::MissingRequirement,
            "install rsync 3.1 or newer on both hosts, or use --method blocksync",
        ),
        _ => (ErrorCode::Io, again),
    };
    Error::new(code, what)
        .caused_by(stderr.to_owned())
        .hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_with_and_without_commas() {
        assert_eq!(
            progress_of("  1,234,567  12%  100.00MB/s    0:00:10"),
            Some(1_234_567)
        );
        assert_eq!(
            progress_of("0 0% 0.00kB/s 0:00:00 (xfr#0, to-chk=0/1)"),
            Some(0)
        );
        for line in ["", "disk.raw", "sent 12 bytes", "12 files"] {
            assert_eq!(progress_of(line), None, "{line}");
        }
    }
}
