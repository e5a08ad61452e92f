//! Rehearsal of a failover: a copy of a point boots as a VM of its own, which nobody can reach, and
//! goes again once it has shown a sign of life. The replica, its points and its source are not
//! touched.
//!
//! ```text
//!  sweep ─ obstacles? ─ test.json ─ point copied to DIR/test ─ create ─ sign of life? ─ sweep
//! ```

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::checks::{self, Destination};
use super::failover::{choose, connected, definition_of, with_manifest};
use super::network::{self, NetworkConfig};
use super::obstacle::{Obstacles, to_error};
use super::outcome::Outcome;
use super::point::{Point, moved};
use super::replica::{self, Replica};
use super::{naming, state};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::Guard;
use crate::libvirt::Hypervisor;
use crate::libvirt::definition::{Definition, Edit};
use crate::transfer::Context;

/// The version of the format of `test.json`.
const FORMAT: u32 = 1;

/// How often a guest is asked whether it lives.
const LOOK: Duration = Duration::from_secs(1);

/// How long one runs that has no agent to ask.
const RUNS: Duration = Duration::from_secs(30);

/// What is rehearsed.
#[derive(Debug, Clone)]
pub struct RehearsalRequest {
    /// The host that has the replica.
    pub destination: HostSpec,
    /// The directory of the replica.
    pub directory: String,
    /// The newest point that is not newer than this one; without it, the newest.
    pub point: Option<String>,
    /// How the VM would be connected there.
    pub networks: NetworkConfig,
    /// The network that it is connected to in place of that; without one, its cables are unplugged.
    pub isolated: Option<String>,
    /// What the guest says on its console when it is up, as `grep -E` has it; without it, the guest
    /// agent is asked.
    pub says: Option<String>,
    /// How long the guest has to show a sign of life.
    pub limit: Duration,
}

/// What a guest has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sign {
    /// Its agent answered.
    Agent,
    /// It said on its console what it was to say.
    Console,
    /// It ran for a while: it has no agent to ask.
    Running,
}

impl Sign {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Console => "console",
            Self::Running => "running",
        }
    }
}

/// What became of one VM.
#[derive(Debug, Serialize)]
pub struct RehearsalResult {
    /// Whether it lives, and what else there is to say.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The point that was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// The age of its data when the rehearsal began, in seconds: what a failover would have lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rpo_seconds: Option<f64>,
    /// From then to the sign of life, in seconds: how long a failover would have taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rto_seconds: Option<f64>,
    /// What that was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sign: Option<Sign>,
}

/// What is remembered of a rehearsal under way: all that has to go again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    format: u32,
    uuid: Uuid,
    made: Vec<String>,
}

/// Where a rehearsal takes place.
struct Stage<'a> {
    on: Hypervisor,
    directory: &'a str,
}

/// Rehearses the failover of a VM. A failure is part of the result.
pub async fn rehearse(
    context: &Context,
    connect: &str,
    vm: &str,
    request: &RehearsalRequest,
) -> RehearsalResult {
    let started = Instant::now();
    let mut result = RehearsalResult {
        outcome: Outcome::of(vm),
        point: None,
        rpo_seconds: None,
        rto_seconds: None,
        sign: None,
    };
    let stage = Stage {
        on: Hypervisor::new(context.host(&request.destination), connect),
        directory: &request.directory,
    };
    let done = Box::pin(stage.rehearse(context, request, &mut result)).await;
    result.outcome.end(started, done);
    result
}

/// Where what a VM says on its console is written: where libvirt writes such things, and may.
fn console_log(vm: &str) -> String {
    format!("/var/log/libvirt/{}-console.log", state::file_name(vm))
}

impl Stage<'_> {
    async fn rehearse(
        &self,
        context: &Context,
        request: &RehearsalRequest,
        result: &mut RehearsalResult,
    ) -> Result<()> {
        let (began, now) = (Instant::now(), Timestamp::now());
        self.on.host().share().await?;
        let point = choose(&self.on, self.directory, request.point.as_deref()).await?;
        result.outcome.vm.clone_from(&point.manifest.vm);
        result.rpo_seconds = Some(now.duration_since(point.manifest.instant).as_secs_f64());
        result.point = Some(point.name.clone());
        let lock = self.lock().await?;
        self.sweep().await?;
        let (point, definition) = self.prepare(request, point, result).await?;
        let done = async {
            self.bring_up(&point, &definition).await?;
            self.wait_for_life(context, &point, &definition, request)
                .await
        };
        let done = done.await;
        let took = began.elapsed();
        let swept = self.sweep().await;
        let sign = done?;
        if sign == Sign::Running {
            let vm = &result.outcome.vm;
            result.outcome.warnings.push(format!(
                "{vm} has no guest agent: it ran, and no more is known"
            ));
        }
        result.sign = Some(sign);
        result.rto_seconds = Some(match sign {
            Sign::Agent | Sign::Console => took.as_secs_f64(),
            Sign::Running => took.saturating_sub(RUNS).as_secs_f64(),
        });
        swept?;
        lock.end().await
    }

    fn note(&self) -> String {
        naming::join(self.directory, "test.json")
    }

    fn disks(&self) -> String {
        naming::join(self.directory, "test")
    }

    /// Keeps other rehearsals away; runs may go on.
    async fn lock(&self) -> Result<Guard> {
        let path = naming::join(self.directory, "test.lock");
        self.on.host().lock(&path).await?.ok_or_else(|| {
            let message = format!(
                "another test is at {} on {}",
                self.directory,
                self.on.host()
            );
            Error::new(ErrorCode::Busy, message).hint("wait until it has ended")
        })
    }

    /// Removes all that a rehearsal has made.
    async fn sweep(&self) -> Result<()> {
        let Some(note) = state::read_from::<Note>(&self.on, &self.note()).await? else {
            return Ok(());
        };
        let uuid = note.uuid.to_string();
        if let Some(domain) = self.on.find_domain(&uuid).await?
            && !domain.state.is_off()
        {
            self.on.virsh(&["destroy", &uuid]).await?;
        }
        let all = note.made.into_iter().chain([self.disks(), self.note()]);
        self.on.host().remove(&all.collect::<Vec<_>>()).await
    }

    /// The point as one of another VM, and its definition; or all that is in the way as one error.
    async fn prepare(
        &self,
        request: &RehearsalRequest,
        point: Point,
        result: &mut RehearsalResult,
    ) -> Result<(Point, Definition)> {
        let vm = point.manifest.vm.clone();
        let name = format!("{vm}-test");
        let (host, directory) = (self.on.host(), self.directory);
        let mut obstacles = Obstacles::default();
        let destination = Destination::survey(&self.on).await?;
        if destination.named(&name).is_some() {
            obstacles.refused(
                format!("{host} has a VM {name} already"),
                "a test would take that name: rename it, or undefine it",
            );
        }
        if host.file_facts(&self.disks()).await?.is_some() {
            obstacles.refused(
                format!(
                    "{} on {host} is there, and no test has made it",
                    self.disks()
                ),
                "move it away",
            );
        }
        let definition = definition_of(&self.on, &point).await?;
        if let Some(says) = &request.says {
            self.check_sign(says, &definition, &mut obstacles).await?;
        }
        let warnings = &mut result.outcome.warnings;
        checks::equipment(&definition, &destination, true, &mut obstacles, warnings).await?;
        let mut networks = with_manifest(&request.networks, &point);
        if let Some(isolated) = &request.isolated {
            let interfaces = definition.interfaces().iter();
            let names = interfaces.filter_map(|interface| network::name_of(&interface.source));
            networks.map = names
                .map(|name| (name.to_owned(), isolated.clone()))
                .collect();
        }
        let mut edits = connected(
            &definition,
            &destination,
            &networks,
            &vm,
            &mut obstacles,
            warnings,
        );
        let found = obstacles.into_found();
        if let Some(error) = to_error(&found, &format!("cannot test {vm} on {host}")) {
            result.outcome.obstacles = found;
            return Err(error);
        }
        if request.isolated.is_none() {
            let interfaces = 0..definition.interfaces().len();
            edits.extend(interfaces.map(|interface| Edit::LinkDown { interface }));
        }
        let uuid = Uuid::new_v4();
        edits.extend([Edit::Uuid(uuid), Edit::Name(name.clone())]);
        edits.extend(moved(&definition, &replica::live(directory), &self.disks()));
        if definition
            .firmware()
            .nvram
            .as_ref()
            .is_some_and(|path| !path.is_empty())
        {
            edits.push(Edit::Nvram(Hypervisor::default_nvram_path(&name)));
        }
        if request.says.is_some() {
            edits.push(Edit::ConsoleLog(console_log(&name)));
        }
        let mut point = point;
        point.manifest.vm = name;
        point.manifest.uuid = uuid;
        Ok((point, definition.edited(&edits)?))
    }

    /// What a guest is to say must be something that it can say, and `grep` can find.
    async fn check_sign(
        &self,
        says: &str,
        definition: &Definition,
        obstacles: &mut Obstacles,
    ) -> Result<()> {
        if !definition.has_serial() {
            obstacles.refused(
                format!(
                    "{} has no serial port to say {says:?} on",
                    definition.name()
                ),
                "give it one, or leave \"sign-of-life\" out",
            );
        }
        let grep = ["grep", "-E", "-e", says, "--", "/dev/null"];
        let found = self.on.host().tool(&grep, b"").await?;
        if found.status.code() != Some(1) {
            let why = found.stderr.trim();
            obstacles.add(
                ErrorCode::Usage,
                format!("sign-of-life = {says:?} is no expression of grep -E: {why}"),
                "take a part of what is said, such as \"login:\"",
            );
        }
        Ok(())
    }

    /// Copies the point, and starts what nobody defines: it goes with its end.
    async fn bring_up(&self, point: &Point, definition: &Definition) -> Result<()> {
        let note = Note {
            format: FORMAT,
            uuid: point.manifest.uuid,
            made: [
                point.made(definition),
                vec![console_log(&point.manifest.vm)],
            ]
            .concat(),
        };
        state::write_to(&self.on, &self.note(), &note).await?;
        let replica = Replica::new(&self.on, self.directory);
        // Of a point that stands on nothing runs go on meanwhile: one that removes just this point makes
        // the copy fail, and no worse.
        let lock = replica.hold(point).await?;
        for words in point.copying(definition, &self.disks()) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            self.on.host().tool_output(&words, b"").await?;
        }
        if let Some(lock) = lock {
            lock.end().await?;
        }
        let text = definition.text().as_bytes();
        self.on
            .virsh_with(&["create", "/dev/stdin"], text)
            .await
            .map(drop)
    }

    async fn wait_for_life(
        &self,
        context: &Context,
        point: &Point,
        definition: &Definition,
        request: &RehearsalRequest,
    ) -> Result<Sign> {
        let (limit, log) = (request.limit, console_log(&point.manifest.vm));
        let uuid = point.manifest.uuid.to_string();
        let began = Instant::now();
        let ping = [
            "qemu-agent-command",
            "--timeout",
            "5",
            &uuid,
            r#"{"execute":"guest-ping"}"#,
        ];
        loop {
            let domain = self.on.find_domain(&uuid).await?;
            if domain.is_none_or(|domain| domain.state.is_off()) {
                let message = format!("{} has started, and ended by itself", point.manifest.vm);
                return Err(Error::new(ErrorCode::Io, message)
                    .hint("its log is in /var/log/libvirt/qemu on that host"));
            }
            if let Some(says) = &request.says {
                let grep = ["grep", "-q", "-a", "-E", "-e", says, "--", &log];
                if self.on.host().tool(&grep, b"").await?.status.success() {
                    return Ok(Sign::Console);
                }
            } else if definition.has_guest_agent() {
                if self.on.virsh(&ping).await.is_ok() {
                    return Ok(Sign::Agent);
                }
            } else if began.elapsed() >= RUNS {
                return Ok(Sign::Running);
            }
            if began.elapsed() >= limit {
                let limit = humantime::format_duration(limit);
                let message = format!(
                    "{} has shown no sign of life within {limit}",
                    point.manifest.vm
                );
                return Err(
                    Error::new(ErrorCode::Timeout, message).hint("give it more time with --limit")
                );
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = context.cancelled.cancelled() => {
                    return Err(Error::new(ErrorCode::Cancelled, "stopped by the user"));
                }
            }
        }
    }
}
