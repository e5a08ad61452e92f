//! Method `libvirt`: scp straight from host to host, the plain copy that administrators make by
//! hand. It cannot resume, and fills holes, which are punched again at the destination.

use std::num::NonZeroUsize;
use std::time::Duration;

use super::copy::{self, BLOCKSYNC_CAN, Ground, Holes, cannot};
use super::request::{Request, RouteChoice};
use super::result::{Route, TransferResult};
use super::{At as _, BeforeChange, Context, Job, Method, Working};
use crate::endpoint::{HostSpec, SshTarget};
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Errand, FileKind, Host, SshOptions};
use crate::output;
use crate::progress::Progress;

/// As results name it.
pub(super) const NAME: &str = "libvirt";

/// How often the destination is looked at, since scp itself tells nothing without a terminal.
const LOOK: Duration = Duration::from_secs(1);

/// Room that a file system may take for its own maps of a file; what is filled beyond it was a
/// hole.
const MAPS_BYTES: u64 = 1 << 20;

/// scp, at work on the source host.
#[derive(Debug, Default)]
pub(super) struct Scp;

impl Method for Scp {
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
    let ground = copy::survey(context, request, NAME, Holes::Filled, result).await?;
    if ground.source_facts.kind == FileKind::Device {
        return Err(cannot(NAME, "read a block device")
            .caused_by(format!("{} is one", request.source))
            .hint("--method rsync and --method blocksync can"));
    }
    for path in [&ground.source, &ground.written] {
        check_path(path)?;
    }
    // It begins anew, whatever was there.
    result.resumed = false;
    let route = route(&ground, request.options.route).await?;
    result.route = Some(route);
    for host in [&ground.from, &ground.to] {
        host.require("scp").await?;
    }
    if ground.existing.is_none() {
        // Nobody else may read it while it arrives; scp keeps the mode of what is there.
        let words = ["install", "-m", "0600", "/dev/null", &ground.written];
        ground.to.tool_output(&words, b"").await?;
    }
    let (runner, words, known_hosts) = command(&ground, route, context, request).await?;
    let mut errand = runner.errand(&words, &known_hosts).await?;
    let mut progress = Progress::new(ground.source_facts.size_bytes, &context.progress);
    let watched = watch(&ground, &mut errand, &mut progress).await;
    progress.finish();
    watched?;
    let (status, stderr) = errand.end().await?;
    if !status.success() {
        return Err(explain(&ground, &stderr));
    }
    ground.check_unchanged(request).await?;
    finish(&ground, result).await
}

/// Paths that every version of scp takes for what they are: older ones hand them to a shell.
fn check_path(path: &str) -> Result<()> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._+@%=,-_".contains(byte);
    if path.as_bytes().iter().all(plain) {
        return Ok(());
    }
    Err(cannot(NAME, "take a path with such characters")
        .caused_by(path.to_owned())
        .hint("--method rsync and --method blocksync can"))
}

/// The route: as the user wants it, else straight if the source host can log in, else through
/// this machine.
async fn route(ground: &Ground, choice: RouteChoice) -> Result<Route> {
    let involves_us = ground.from.is_local() || ground.to.is_local();
    match choice {
        RouteChoice::Relay => Ok(Route::Relay),
        _ if ground.is_one_host() => Ok(Route::Local),
        RouteChoice::Direct => Ok(Route::Direct),
        RouteChoice::Auto if involves_us => Ok(Route::Direct),
        RouteChoice::Auto => match ground.to.reachable_from(&ground.from).await {
            Ok(()) => Ok(Route::Direct),
            Err(error) => {
                tracing::info!("no direct route: {}", error.one_line());
                Ok(Route::Relay)
            }
        },
    }
}

/// The host that scp runs on, its words, and the host keys that it needs there.
async fn command(
    ground: &Ground,
    route: Route,
    context: &Context,
    request: &Request,
) -> Result<(Host, Vec<String>, Vec<u8>)> {
    let mut words = vec!["scp".to_owned(), "-q".to_owned()];
    if let Some(limit) = request.options.bandwidth_limit {
        // scp counts in units of 1024 bits a second, and takes no more of them than these.
        words.extend([
            "-l".to_owned(),
            (limit / 128).clamp(1, 100 * 1024 * 1024).to_string(),
        ]);
    }
    let here = |path: &str| path.to_owned();
    match route {
        Route::Local => {
            words.extend(["--".to_owned(), here(&ground.source), here(&ground.written)]);
            Ok((ground.from.clone(), words, Vec::new()))
        }
        Route::Relay => {
            words.push("-3".to_owned());
            words.extend(user_words(&context.ssh)?);
            words.push("--".to_owned());
            words.push(remote(request.source.host.clone(), &ground.source));
            words.push(remote(request.destination.host.clone(), &ground.written));
            Ok((context.host(&HostSpec::Local), words, Vec::new()))
        }
        Route::Direct => {
            let fetches = ground.to.is_local();
            let (runner, other) = if fetches {
                (&ground.to, &ground.from)
            } else {
                (&ground.from, &ground.to)
            };
            let way = other.way_from(runner).await?;
            words.extend(way.scp_words());
            words.push("--".to_owned());
            words.extend(if fetches {
                [
                    format!("{}:{}", way.name, ground.source),
                    here(&ground.written),
                ]
            } else {
                [
                    here(&ground.source),
                    format!("{}:{}", way.name, ground.written),
                ]
            });
            Ok((runner.clone(), words, way.known_hosts))
        }
    }
}

/// What the user says to ssh, without what belongs to one host.
fn user_words(ssh: &SshOptions) -> Result<Vec<String>> {
    let utf8 = |path: &std::path::Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| Error::usage(format!("not UTF-8: {}", path.display())))
    };
    let mut words = Vec::new();
    if let Some(config) = &ssh.config {
        words.extend(["-F".to_owned(), utf8(config)?]);
    }
    if let Some(key) = &ssh.key {
        words.extend(["-i".to_owned(), utf8(key)?]);
    }
    for option in &ssh.options {
        words.extend(["-o".to_owned(), option.clone()]);
    }
    Ok(words)
}

/// A file on a host as scp on this machine names it; a URI, since each has its own port.
fn remote(host: HostSpec, path: &str) -> String {
    match host {
        HostSpec::Local => path.to_owned(),
        HostSpec::Ssh(SshTarget { user, name, port }) => {
            let user = user.map(|user| user + "@").unwrap_or_default();
            let name = if name.contains(':') {
                format!("[{name}]")
            } else {
                name
            };
            match port {
                // The path of a URI begins after its slash.
                Some(port) => format!("scp://{user}{name}:{port}/{}", path.replace('%', "%25")),
                None => format!("{user}{name}:{path}"),
            }
        }
    }
}

/// Shows how much has arrived, until scp has ended.
async fn watch(ground: &Ground, errand: &mut Errand, progress: &mut Progress) -> Result<()> {
    loop {
        tokio::select! {
            more = errand.output() => if more?.is_empty() { return Ok(()) },
            () = tokio::time::sleep(LOOK) => {
                let arrived = ground.to.file_facts(&ground.written).await?;
                let bytes = arrived.map_or(0, |facts| facts.size_bytes);
                progress.update(bytes, bytes, bytes);
            }
        }
    }
}

/// The holes, the length, the name.
async fn finish(ground: &Ground, result: &mut TransferResult) -> Result<()> {
    let size = ground.source_facts.size_bytes.to_string();
    ground
        .to
        .tool_output(&["truncate", "-s", &size, "--", &ground.written], b"")
        .await?;
    let facts = ground.to.file_facts(&ground.written).await?;
    let filled = facts
        .map_or(0, |facts| facts.allocated_bytes)
        .saturating_sub(ground.data_bytes());
    if filled > MAPS_BYTES {
        let words = ["fallocate", "--dig-holes", "--", &ground.written];
        let punched = ground
            .to
            .tool(&words, b"")
            .await
            .is_ok_and(|output| output.status.success());
        let filled = output::iec(filled);
        result.warnings.push(if punched {
            format!("scp filled {filled} of holes at the destination; they were punched again")
        } else {
            format!("scp filled {filled} of holes at the destination, and fallocate could not punch them")
        });
    }
    ground.place().await
}

/// What scp's complaint means: it exits with 1 or 255 whatever happened.
fn explain(ground: &Ground, stderr: &str) -> Error {
    let what = format!("scp from {} to {} failed", ground.from, ground.to);
    if stderr.contains("No space left") {
        return Error::new(ErrorCode::NoSpace, what)
            .caused_by(stderr.to_owned())
            .hint("make room, or choose another place");
    }
    if let Some(error) = ground.no_login(stderr) {
        return error.hint("let the source host log in there (--forward-agent, or a key of its own), or use --route relay");
    }
    if stderr.contains("onnection") {
        return Error::new(ErrorCode::Interrupted, what)
            .caused_by(stderr.to_owned())
            .hint(format!(
                "the same command begins anew; to resume, {BLOCKSYNC_CAN}"
            ));
    }
    Error::new(ErrorCode::Io, what).caused_by(stderr.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_file_is_named_with_its_own_port() {
        for (host, name) in [
            ("hv1", "hv1:/a/b"),
            ("root@hv1", "root@hv1:/a/b"),
            ("root@hv1:2222", "scp://root@hv1:2222//a/b"),
            ("local", "/a/b"),
        ] {
            assert_eq!(remote(host.parse().unwrap(), "/a/b"), name);
        }
    }

    #[test]
    fn odd_paths_are_refused_and_others_named() {
        check_path("/var/lib/libvirt/images/.web-1_a.qcow2.kc-new").unwrap();
        for path in ["/a b", "/a'b", "/$(x)", "/a*", "/a\nb"] {
            let error = check_path(path).unwrap_err();
            assert_eq!(error.exit_code(), 8);
            assert!(error.hint_text().unwrap().contains("blocksync"));
        }
    }
}
