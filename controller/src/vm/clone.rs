//! `clone`: a new VM on another hypervisor, made from one that is there.
//!
//! ```text
//!  survey ─ obstacles? ─ plan ─ record ─ transfers ─ chains ─ small files ─ define ─ forget record
//!                        └ dry run ends   └ from here on a failure removes what was made
//! ```

use std::num::NonZeroUsize;
use std::str::FromStr;
use std::time::Instant;

use super::checks::{self, Destination};
use super::container::{self, Containers};
use super::lineage::{self, Lineage};
use super::live::{self, Hold, LiveChoice, Quiesce, Reading, Versions};
use super::naming;
use super::network::NetworkConfig;
use super::obstacle::{Obstacles, to_error};
use super::pairs::{self, Subject};
use super::plan::{Plan, Planner};
use super::record::Replaced;
use super::result::VmResult;
use super::state::{self, Kind};
use super::survey::{Survey, SurveyedDisk};
use super::transfers::{Move, Moves};
use crate::cli::options::BadValue;
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;
use crate::transfer::{Context, Operation, Options};

/// What is cloned, and how.
#[derive(Debug, Clone)]
pub struct CloneRequest {
    /// The host that has the VM.
    pub source: HostSpec,
    /// The host that gets the clone.
    pub destination: HostSpec,
    /// Name or UUID of the VM.
    pub vm: String,
    /// The clone's name; without it, the VM's.
    pub new_name: Option<String>,
    /// Replace a VM of that name that is shut off.
    pub force: bool,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Start the clone.
    pub start: bool,
    /// Keep the MAC addresses.
    pub preserve_mac: bool,
    /// How its interfaces are connected.
    pub network: NetworkConfig,
    /// Where its disks go; without both, where the source has them.
    pub dest_dir: Option<String>,
    /// The pool that its disks go to.
    pub dest_pool: Option<String>,
    /// Disks that are left out, by target.
    pub exclude_disks: Vec<String>,
    /// Turn each chain of images into one.
    pub flatten: bool,
    /// Carry kernel, initrd, firmware and media that the destination lacks.
    pub with_boot_files: bool,
    /// Leave what was made when it fails.
    pub keep_partial: bool,
    /// The format of its disks.
    pub dest_format: DestFormat,
    /// What is done about a VM that runs.
    pub live: LiveChoice,
    /// Whether its file systems are frozen for that.
    pub quiesce: Quiesce,
    /// How many files are transferred at once.
    pub parallel: NonZeroUsize,
    /// How each is transferred.
    pub options: Options,
}

/// The format of a clone's disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DestFormat {
    /// That of the source's.
    #[default]
    Same,
    /// The bytes that the guest sees.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl DestFormat {
    /// The format for the copy of a disk whose guest writes to an image of that one.
    pub(super) fn of(self, format: &str) -> &str {
        match self {
            Self::Same => format,
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl FromStr for DestFormat {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "same" => Ok(Self::Same),
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(BadValue::new("expected raw, qcow2 or same")),
        }
    }
}

impl CloneRequest {
    /// What of a VM that is off is copied: the bytes of its images, unless they are to have another
    /// format.
    fn subject(&self, survey: &Survey) -> Subject {
        let differs = |disk: &SurveyedDisk| {
            let format = &disk.images[0].format;
            self.dest_format.of(format) != format
        };
        match survey.disks.iter().any(differs) {
            true => Subject::Contents,
            false => Subject::Images,
        }
    }

    pub(super) fn new_name<'a>(&'a self, survey: &'a Survey) -> &'a str {
        self.new_name.as_deref().unwrap_or_else(|| survey.name())
    }

    pub(super) fn is_one_host(&self) -> bool {
        self.source == self.destination
    }
}

/// A VM that was found fit to be cloned, and how.
struct Fit {
    survey: Survey,
    destination: Destination,
    plan: Plan,
    subject: Subject,
    reading: Reading,
    versions: Versions,
    options: Options,
}

/// Clones a VM. A failure is part of the result.
pub async fn run(context: &Context, connect: &str, request: &CloneRequest) -> VmResult {
    let started = Instant::now();
    let (source, destination) = (request.source.to_string(), request.destination.to_string());
    let mut result = VmResult::new("clone", source, destination);
    result.vm.clone_from(&request.vm);
    result.target_vm = request
        .new_name
        .clone()
        .unwrap_or_else(|| request.vm.clone());
    result.dry_run = request.dry_run;
    let done = clone(context, connect, request, &mut result).await;
    result.ended(started, done)
}

async fn clone(
    context: &Context,
    connect: &str,
    request: &CloneRequest,
    result: &mut VmResult,
) -> Result<()> {
    check_name(request.new_name.as_deref())?;
    let from = Hypervisor::new(context.host(&request.source), connect);
    let to = Hypervisor::new(context.host(&request.destination), connect);
    tokio::try_join!(from.host().share(), to.host().share())?;
    let fit = prepare(&from, &to, request, result).await?;
    let plan = &fit.plan;
    result.plan = Some(plan.clone());
    result.resumed = plan.resumed;
    if request.dry_run {
        return Ok(());
    }
    let lock = state::lock(&to, Kind::Clones, &plan.name).await?;
    let _lock = lock.ok_or_else(|| {
        let message = format!(
            "another clone to {} on {} is under way",
            plan.name,
            to.host()
        );
        Error::new(ErrorCode::Busy, message)
    })?;
    let making = Making {
        context,
        request,
        fit: &fit,
        survey: &fit.survey,
        to: &to,
        plan,
    };
    if fit.destination.with_uuid(plan.uuid).is_some() {
        // It was interrupted after the clone was defined.
        return making.finish(result).await;
    }
    if !plan.abandoned.is_empty() {
        to.host().remove(&plan.abandoned).await?;
        let warning = format!(
            "what an interrupted clone to {} had left was removed",
            plan.name
        );
        result.warnings.push(warning);
    }
    plan.record.write(&to).await?;
    let made = match making.make(result).await {
        Ok(()) => making.define().await,
        Err(error) => Err(error),
    };
    match made {
        Ok(()) => making.finish(result).await,
        Err(error) => Err(making.undo(error).await),
    }
}

/// Looks at everything, and makes the plan; or gives all obstacles as one error.
async fn prepare(
    from: &Hypervisor,
    to: &Hypervisor,
    request: &CloneRequest,
    result: &mut VmResult,
) -> Result<Fit> {
    let mut obstacles = Obstacles::default();
    let mut survey = Survey::of(from, &request.vm, &request.exclude_disks, &mut obstacles).await?;
    result.vm = survey.name().to_owned();
    result.target_vm = request.new_name(&survey).to_owned();
    live::mend(from, &mut survey, &mut result.warnings).await?;
    lineage::check_source(&survey, &mut obstacles).await?;
    let destination = Destination::survey(to).await?;
    let mut options = request.options.clone();
    let mut reading = request
        .live
        .reading(request.quiesce, &survey, &mut obstacles);
    let subject = match reading {
        Reading::Snapshot(_) => Subject::Contents,
        _ => request.subject(&survey),
    };
    if subject == Subject::Contents {
        reading = reading.of_contents(&survey, &mut obstacles);
        pairs::for_agents(&mut options, &mut obstacles);
    }
    options.live = reading.live_read();
    let leave_out = |disk: &str| format!("leave it out with --exclude-disk {disk}");
    checks::portable(&survey, &request.exclude_disks, leave_out, &mut obstacles);
    if !request.is_one_host() {
        checks::not_shared(&survey, &mut obstacles).await?;
    }
    let definition = &survey.domain.definition;
    checks::equipment(
        definition,
        &destination,
        request.start,
        &mut obstacles,
        &mut result.warnings,
    )
    .await?;
    let planner = Planner::new(
        request,
        subject,
        &survey,
        &destination,
        &mut obstacles,
        &mut result.warnings,
    );
    let plan = planner.plan().await?;
    let found = obstacles.into_found();
    let what = format!("cannot clone {} to {}", survey.name(), to.host());
    if let Some(error) = to_error(&found, &what) {
        result.obstacles = found;
        return Err(error);
    }
    let versions = Versions::after(None, None, &survey).await?;
    Ok(Fit {
        survey,
        destination,
        plan,
        subject,
        reading,
        versions,
        options,
    })
}

/// libvirt's own rule, and that a name must be a part of a file's name.
fn check_name(name: Option<&str>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    let is_bad = |c: char| c == '/' || c.is_control();
    if name.trim().is_empty() || name.len() > 200 || name.starts_with('.') || name.contains(is_bad)
    {
        let message = format!("\"{}\" cannot be the name of a VM", name.escape_debug());
        return Err(Error::usage(message).hint(
            "a name has 1 to 200 bytes, no slash, no control character, and no dot in front",
        ));
    }
    Ok(())
}

/// A clone that is being made.
struct Making<'a> {
    context: &'a Context,
    request: &'a CloneRequest,
    fit: &'a Fit,
    survey: &'a Survey,
    to: &'a Hypervisor,
    plan: &'a Plan,
}

impl Making<'_> {
    /// Everything that the new VM consists of, but not its definition.
    async fn make(&self, result: &mut VmResult) -> Result<()> {
        let (reading, versions) = (self.fit.reading, &self.fit.versions);
        let warnings = &mut result.warnings;
        let hold = Hold::begin(self.survey, reading, Some(versions), warnings).await?;
        result.consistency = live::consistency(reading, hold.as_ref());
        let copied = Box::pin(self.copy(hold.as_ref(), result)).await;
        if let Some(hold) = &hold {
            let options = &self.fit.options;
            hold.name_results(options, &mut result.disks, &mut result.warnings);
        }
        live::let_end(hold, copied).await?;
        for overlay in self.plan.overlays.iter().filter(|each| !each.is_right) {
            overlay.reference.write(self.to).await?;
        }
        if self.request.flatten {
            self.flatten().await?;
        }
        Ok(())
    }

    async fn copy(&self, hold: Option<&Hold>, result: &mut VmResult) -> Result<()> {
        for (from, to) in &self.plan.small_files {
            self.copy_small(from, to).await?;
        }
        for file in self.plan.files.iter().filter(|file| file.public) {
            let (directory, _) = naming::split(&file.destination);
            self.to.host().make_directory(directory, "0755").await?;
        }
        let mut options = self.fit.options.clone();
        let files = self.plan.files.iter();
        let mut files: Vec<Move> = files
            .map(|file| {
                let (source, destination) = (file.source.clone(), file.destination.clone());
                Move {
                    is_of_guest: !file.public,
                    ..Move::of_guest(&file.target, source, destination)
                }
            })
            .collect();
        if let Some(hold) = hold {
            hold.redirect(&mut files, &mut options);
        }
        let (name, uuid) = (&self.plan.name, self.plan.uuid.to_string());
        let containers =
            Containers::open(self.to, name, &uuid, self.plan.containers.clone()).await?;
        if let Some(containers) = &containers {
            containers.redirect(&mut files, &self.fit.versions);
        }
        let moves = Moves {
            operation: Operation::Sync,
            from: self.request.source.clone(),
            to: self.request.destination.clone(),
            options,
            dry_run: false,
            parallel: self.request.parallel,
        };
        let nothing = Box::pin(async { Ok(()) });
        let (mut disks, done) = moves.run(self.context, &files, nothing).await;
        container::name_results(&mut disks, &files);
        result.take_disks(disks);
        match containers {
            Some(containers) => {
                let (written, ended) = containers.end().await;
                done.and(ended)?;
                written.name().await?;
            }
            None => done?,
        }
        for file in self.plan.files.iter().filter(|file| file.public) {
            self.to
                .host()
                .tool_output(&["chmod", "0644", "--", &file.destination], b"")
                .await?;
        }
        Ok(())
    }

    /// Copies a file of some kilobytes through this program, for its new owner's eyes only:
    /// libvirt gives it to QEMU, or to swtpm, when the VM starts.
    async fn copy_small(&self, from: &str, to: &str) -> Result<()> {
        let contents = self
            .survey
            .on
            .host()
            .read_file(from)
            .await?
            .ok_or_else(|| {
                Error::new(
                    ErrorCode::NotFound,
                    format!("{from} on {} is gone", self.survey.on.host()),
                )
            })?;
        let (directory, _) = naming::split(to);
        if self.to.host().file_facts(directory).await?.is_none() {
            self.to.host().make_directory(directory, "0711").await?;
        }
        self.to.host().write_file(to, &contents).await
    }

    /// Takes everything from below into the images on top, and removes what is below.
    async fn flatten(&self) -> Result<()> {
        let below: Vec<String> = self
            .plan
            .overlays
            .iter()
            .map(|overlay| overlay.below.clone())
            .collect();
        for overlay in self
            .plan
            .overlays
            .iter()
            .filter(|overlay| !below.contains(&overlay.reference.path))
        {
            let words = [
                "qemu-img",
                "rebase",
                "-f",
                &overlay.reference.format,
                "-b",
                "",
                &overlay.reference.path,
            ];
            self.to.host().tool_output(&words, b"").await?;
        }
        self.to.host().remove(&below).await
    }

    /// Makes a VM of it, in the place of the one that gives way.
    async fn define(&self) -> Result<()> {
        let replaced = self.plan.record.replaced.as_ref();
        if let Some(replaced) = replaced {
            self.undefine(replaced).await?;
        }
        let text = self.plan.definition.text().as_bytes();
        let defined = self.to.virsh_with(&["define", "/dev/stdin"], text).await;
        match (defined, replaced) {
            (Ok(_), _) => Ok(()),
            (Err(error), None) => Err(error),
            (Err(error), Some(replaced)) => {
                replaced.restore(self.to).await?;
                Err(error)
            }
        }
    }

    async fn undefine(&self, replaced: &Replaced) -> Result<()> {
        let uuid = replaced.uuid.to_string();
        if self.to.find_domain(&uuid).await?.is_none() {
            return Ok(());
        }
        self.to.undefine(&uuid).await
    }

    /// What comes after the clone is a VM.
    async fn finish(&self, result: &mut VmResult) -> Result<()> {
        let uuid = self.plan.uuid;
        self.refresh_pool(result).await;
        let paths: Vec<String> = self
            .plan
            .files
            .iter()
            .map(|file| file.destination.clone())
            .collect();
        let version = Some(self.fit.versions.becomes.clone());
        let version = version.filter(|_| self.fit.subject == Subject::Contents);
        let (pair, subject) = (&self.fit.versions.pair, self.fit.subject);
        Lineage::begun(self.survey, pair, subject, false, Vec::new())
            .end(self.to, uuid, &paths, version)
            .await?;
        if let Some(replaced) = &self.plan.record.replaced {
            self.to.host().remove(&replaced.files).await?;
        }
        self.plan.record.forget(self.to).await?;
        if self.request.start {
            self.to
                .virsh(&["start", &uuid.to_string()])
                .await
                .map_err(|error| {
                    error.context(format!("{} was cloned, and does not start", self.plan.name))
                })?;
        }
        Ok(())
    }

    /// Lets the pool see its new volumes. One that cannot is no failure of the clone.
    async fn refresh_pool(&self, result: &mut VmResult) {
        let Some(pool) = &self.request.dest_pool else {
            return;
        };
        if let Err(error) = self.to.virsh(&["pool-refresh", "--pool", pool]).await {
            result.warnings.push(error.one_line());
        }
    }

    /// Removes what was made, unless the user wants to keep it; gives back the error that led
    /// here, and what came on top of it.
    async fn undo(&self, error: Error) -> Error {
        let host = self.to.host();
        if self.request.keep_partial {
            return error.with_note(format!(
                "what was copied is kept on {host}: the same command takes it up again"
            ));
        }
        let removed = self.plan.record.roll_back(self.to).await;
        match removed {
            Ok(()) => error,
            Err(failed) => error.with_note(format!(
                "what was copied could not be removed ({}); the same command takes it up again",
                failed.one_line()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_libvirt_or_a_file_cannot_have_are_wrong_usage() {
        for name in ["", " ", "a/b", "a\nb", ".hidden", &"x".repeat(201)] {
            assert_eq!(
                check_name(Some(name)).unwrap_err().code(),
                ErrorCode::Usage,
                "{name:?}"
            );
        }
        for name in [None, Some("web-test"), Some("Zürich 1"), Some("a b")] {
            check_name(name).unwrap();
        }
    }
}
