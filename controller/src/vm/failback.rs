//! Failback: a VM that runs from its replica goes back to its source, with what it wrote. Only what
//! differs is shipped, most of it while the VM still runs.
//!
//! ```text
//!  obstacles? ─ source's disks kept as a point ─ sync while it runs ─ shut down ─ sync of the rest
//!                                                  └ UEFI variables, TPM ─ start ─ end of the role
//! ```
//!
//! Whatever fails before the VM runs at its source leaves it running, or starts it again, where it
//! is; and the source's disks are whole at every instant, old or new.

use std::num::NonZeroUsize;
use std::time::Instant;

use serde::Serialize;

use super::failover::{Role, Stop, role, shut_down, take_back};
use super::obstacle::{Obstacles, to_error};
use super::outcome::Outcome;
use super::replica::{self, ReplicaRequest};
use super::survey::Survey;
use super::sync::{self, SyncRequest};
use super::{naming, result::VmResult};
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::{Domain, Hypervisor};
use crate::transfer::{Context, Options};

/// How many disks are transferred at once.
const PARALLEL: NonZeroUsize = NonZeroUsize::new(4).expect("four is not zero");

/// Which VM goes back, and how.
#[derive(Debug, Clone)]
pub struct FailbackRequest {
    /// How its replica is made, when it follows.
    pub replica: ReplicaRequest,
    /// How it is shut down where it runs.
    pub stop: Stop,
    /// What is on the source's disks is given up; otherwise it is kept as a point first.
    pub discards: bool,
}

/// What became of one VM.
#[derive(Debug, Serialize)]
pub struct FailbackResult {
    /// Whether it runs at its source, and what else there is to say.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The point that holds what was on the source's disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
    /// Bytes of the blocks that differed.
    pub bytes_changed: u64,
    /// Bytes carried between the agents on the way back.
    pub bytes_wire: u64,
    /// From the moment that it was asked to shut down until it was started, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_seconds: Option<f64>,
}

/// A VM on its way.
struct Way<'a> {
    context: &'a Context,
    connect: &'a str,
    request: &'a FailbackRequest,
    /// Where it runs.
    from: Hypervisor,
    /// Its source.
    home: Hypervisor,
    role: Role,
    at_home: Domain,
}

/// Brings a VM back to its source. A failure is part of the result.
pub async fn failback(
    context: &Context,
    connect: &str,
    request: &FailbackRequest,
) -> FailbackResult {
    let started = Instant::now();
    let mut result = FailbackResult {
        outcome: Outcome::of(&request.replica.vm),
        kept: None,
        bytes_changed: 0,
        bytes_wire: 0,
        down_seconds: None,
    };
    let done = Box::pin(go(context, connect, request, &mut result)).await;
    result.outcome.end(started, done);
    result
}

async fn go(
    context: &Context,
    connect: &str,
    request: &FailbackRequest,
    result: &mut FailbackResult,
) -> Result<()> {
    let directory = &request.replica.directory;
    let Some(mut way) = prepare(context, connect, request, result).await? else {
        return Ok(());
    };
    way.keep(result).await?;
    let lock = replica::lock(way.from.host(), directory).await?;
    let uuid = way.uuid();
    let ran = !way.from.state(&uuid).await?.is_off();
    if ran {
        Box::pin(way.sync(result)).await?;
    }
    let down = Instant::now();
    if let Err(error) = Box::pin(way.go_down_and_up(ran, result)).await {
        return Err(way.start_again(ran, error).await);
    }
    result.down_seconds = ran.then(|| down.elapsed().as_secs_f64());
    if way.role.autostart {
        let again = way.home.virsh(&["autostart", &uuid]).await;
        let (vm, host) = (&way.role.vm, way.home.host());
        result.outcome.warnings.extend(again.err().map(|why| {
            format!(
                "{vm} does not yet start with {host}, as it did: {}",
                why.one_line()
            )
        }));
    }
    way.end().await?;
    lock.end().await
}

/// Looks at both ends; or gives all that is in the way as one error. `None`, when an earlier run has
/// brought the VM back, and broke off then: what that has left is ended.
async fn prepare<'a>(
    context: &'a Context,
    connect: &'a str,
    request: &'a FailbackRequest,
    result: &mut FailbackResult,
) -> Result<Option<Way<'a>>> {
    let replica = &request.replica;
    let from = Hypervisor::new(context.host(&replica.destination), connect);
    let home = Hypervisor::new(context.host(&replica.source), connect);
    tokio::try_join!(from.host().share(), home.host().share())?;
    let (vm, there, host) = (&replica.vm, from.host(), home.host());
    let Some(role) = role(&from, &replica.directory).await? else {
        let message =
            format!("the replica of {vm} on {there} is not live: there is no way back to go");
        return Err(Error::new(ErrorCode::Refused, message)
            .hint("\"kvm-clone-ctl replicate status\" shows what is live"));
    };
    let uuid = role.uuid.to_string();
    let (live, at_home) = tokio::try_join!(from.find_domain(&uuid), home.find_domain(&uuid))?;
    let is_off = |domain: &Option<Domain>| domain.as_ref().is_none_or(|at| at.state.is_off());
    let mut obstacles = Obstacles::default();
    if live.is_none() {
        obstacles.add(
            ErrorCode::NotFound,
            format!(
                "{there} has no VM {vm}, which is live there by {}",
                replica.directory
            ),
            "\"kvm-clone-ctl replicate undo\" ends that",
        );
    }
    match &at_home {
        Some(_) if role.returning && is_off(&live) && !is_off(&at_home) => {
            result.kept.clone_from(&role.kept);
            take_back(&from, &replica.directory, &role).await?;
            return Ok(None);
        }
        Some(domain) if domain.state.is_off() => {}
        Some(domain) => obstacles.refused(
            format!(
                "split brain: {vm} is live on {there}, and on {host} it is {}",
                domain.state
            ),
            "switch one of the two off; nothing is overwritten on either side",
        ),
        None => obstacles.add(
            ErrorCode::NotFound,
            format!("{host} has no VM {vm} with UUID {uuid}"),
            "define it there again, with disks of the same sizes",
        ),
    }
    let found = obstacles.into_found();
    let error = to_error(&found, &format!("cannot bring {vm} back to {host}"));
    let at_home = match (at_home, error) {
        (Some(domain), None) => domain,
        (_, error) => {
            result.outcome.obstacles = found;
            let gone = || Error::new(ErrorCode::Internal, "a VM that is in nobody's way is gone");
            return Err(error.unwrap_or_else(gone));
        }
    };
    Ok(Some(Way {
        context,
        connect,
        request,
        from,
        home,
        role,
        at_home,
    }))
}

impl Way<'_> {
    fn uuid(&self) -> String {
        self.role.uuid.to_string()
    }

    /// Keeps what is on the source's disks, once: after a sync they hold something else.
    async fn keep(&mut self, result: &mut FailbackResult) -> Result<()> {
        if self.request.discards {
            return Ok(());
        }
        if self.role.kept.is_none() {
            let request = &self.request.replica;
            let warnings = &mut result.outcome.warnings;
            let kept = replica::keep_source(self.context, self.connect, request, warnings).await;
            let kept = kept.map_err(|error| {
                let what = "keeping what is on the source's disks as a point";
                error.context(what)
            })?;
            self.role.kept = Some(kept.name);
            self.role.write(&self.from, &request.directory).await?;
        }
        result.kept.clone_from(&self.role.kept);
        Ok(())
    }

    /// Makes the source's disks hold what those of the live VM do.
    async fn sync(&self, result: &mut FailbackResult) -> Result<()> {
        let replica = &self.request.replica;
        let request = SyncRequest {
            source: replica.destination.clone(),
            destination: replica.source.clone(),
            vm: self.uuid(),
            target_name: Some(self.at_home.definition.name().to_owned()),
            checkpoint: None,
            dry_run: false,
            // They were kept, or are given up.
            overwrite: true,
            exclude_disks: Vec::new(),
            live: replica.live,
            quiesce: replica.quiesce,
            parallel: PARALLEL,
            options: Options {
                bandwidth_limit: replica.bandwidth_limit,
                ..Options::default()
            },
        };
        let VmResult {
            totals,
            warnings,
            obstacles,
            error,
            ..
        } = Box::pin(sync::run(self.context, self.connect, &request)).await;
        result.bytes_changed += totals.bytes_changed.unwrap_or(0);
        result.bytes_wire += totals.bytes_wire.unwrap_or(0);
        result.outcome.warnings.extend(warnings);
        result.outcome.obstacles = obstacles;
        error.map_or(Ok(()), Err)
    }

    /// Shuts the VM down where it is, ships what is left, and starts it at its source.
    async fn go_down_and_up(&mut self, ran: bool, result: &mut FailbackResult) -> Result<()> {
        let uuid = self.uuid();
        if ran {
            let (vm, stop) = (&self.role.vm, self.request.stop);
            shut_down(self.context, &self.from, &uuid, vm, stop).await?;
        }
        Box::pin(self.sync(result)).await?;
        self.carry_small_files().await?;
        // Who comes after a crash knows by this that the VM at its source is the one that counts.
        self.role.returning = true;
        self.role
            .write(&self.from, &self.request.replica.directory)
            .await?;
        self.home.virsh(&["start", &uuid]).await.map(drop)
    }

    /// UEFI variables and the state of the TPM go along.
    async fn carry_small_files(&self) -> Result<()> {
        let mut obstacles = Obstacles::default();
        let source = Survey::of(&self.from, &self.uuid(), &[], &mut obstacles).await?;
        let definition = &self.at_home.definition;
        let nvram = Hypervisor::nvram_path(definition, definition.name());
        let tpm = Hypervisor::tpm_directory(self.role.uuid);
        for (name, contents) in replica::small_files(&source).await? {
            let path = match name.strip_prefix("tpm/") {
                Some(file) => naming::join(&tpm, file),
                None => match &nvram {
                    Some(path) => path.clone(),
                    // The VM has no such firmware there.
                    None => continue,
                },
            };
            let (directory, _) = naming::split(&path);
            self.home.host().make_directory(directory, "0711").await?;
            self.home.host().write_file(&path, &contents).await?;
        }
        Ok(())
    }

    /// The replica follows again.
    async fn end(&self) -> Result<()> {
        let directory = &self.request.replica.directory;
        let ended = take_back(&self.from, directory, &self.role).await;
        ended.map_err(|error| {
            let (vm, host, there) = (&self.role.vm, self.home.host(), self.from.host());
            error
                .context(format!(
                    "{vm} runs on {host}; what is left of it on {there} was not removed"
                ))
                .hint("the same command once more does that")
        })
    }

    /// Where it is sure that the VM does not run at its source, it runs on where it was.
    async fn start_again(&mut self, ran: bool, error: Error) -> Error {
        let (uuid, vm) = (self.uuid(), self.role.vm.clone());
        let there = self.from.host().clone();
        let started = async {
            if !ran || !self.from.state(&uuid).await?.is_off() {
                return Ok(false);
            }
            match self.home.find_domain(&uuid).await? {
                Some(domain) if !domain.state.is_off() => Ok(false),
                _ => {
                    self.role.returning = false;
                    let directory = &self.request.replica.directory;
                    self.role.write(&self.from, directory).await?;
                    self.from.virsh(&["start", &uuid]).await.map(|_| true)
                }
            }
        };
        match started.await {
            Ok(true) => error.with_note(format!("{vm} was started again on {there}")),
            Ok(false) => error,
            Err(why) => error.with_note(format!(
                "{vm} is off on {there}, and could not be started again: {}",
                why.one_line()
            )),
        }
    }
}
