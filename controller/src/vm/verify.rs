//! `verify`: whether a VM on another hypervisor holds what its source holds, and is defined alike.

use std::num::NonZeroUsize;
use std::time::Instant;

use super::lineage;
use super::live::{self, Hold, Reading};
use super::obstacle::{Obstacles, to_error};
use super::pairs::{self, Subject};
use super::result::VmResult;
use super::survey::Survey;
use super::transfers::{Move, Moves};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;
use crate::transfer::{Context, LiveRead, Operation, Options, TransferResult};

/// How many differences of two definitions an error names.
const MOST_SHOWN: usize = 5;

/// What is compared, and how.
#[derive(Debug, Clone)]
pub struct VerifyRequest {
    /// The host that has the VM.
    pub source: HostSpec,
    /// The host that has the other.
    pub destination: HostSpec,
    /// Name or UUID of the VM.
    pub vm: String,
    /// Name of the other; without it, the same.
    pub target_name: Option<String>,
    /// Disks that are left out, by target.
    pub exclude_disks: Vec<String>,
    /// How many disks are compared at once.
    pub parallel: NonZeroUsize,
    /// How they are compared.
    pub options: Options,
}

/// Compares two VMs. A failure, a difference among them, is part of the result.
pub async fn run(context: &Context, connect: &str, request: &VerifyRequest) -> VmResult {
    let started = Instant::now();
    let (source, destination) = (request.source.to_string(), request.destination.to_string());
    let mut result = VmResult::new("verify", source, destination);
    result.vm.clone_from(&request.vm);
    result.target_vm = request
        .target_name
        .clone()
        .unwrap_or_else(|| request.vm.clone());
    let done = verify(context, connect, request, &mut result).await;
    result.ended(started, done)
}

async fn verify(
    context: &Context,
    connect: &str,
    request: &VerifyRequest,
    result: &mut VmResult,
) -> Result<()> {
    let from = Hypervisor::new(context.host(&request.source), connect);
    let to = Hypervisor::new(context.host(&request.destination), connect);
    tokio::try_join!(from.host().share(), to.host().share())?;
    let mut obstacles = Obstacles::default();
    let source = Survey::of(&from, &request.vm, &request.exclude_disks, &mut obstacles).await?;
    let name = request
        .target_name
        .as_deref()
        .unwrap_or_else(|| source.name());
    let mut target = Survey::of(&to, name, &[], &mut obstacles).await?;
    target
        .disks
        .retain(|disk| !request.exclude_disks.contains(&disk.target));
    for survey in [&source, &target]
        .into_iter()
        .filter(|survey| !survey.domain.state.is_off())
    {
        let (vm, host, state) = (survey.name(), survey.on.host(), survey.domain.state);
        result.warnings.push(format!(
            "{vm} on {host} is {state}: what it writes meanwhile may count as a difference"
        ));
    }
    let holds = lineage::holds(&source, &target).await?;
    let subject = Subject::between(&source, &target, holds.contents);
    let mut moves = pairs::pair(&source, &target, subject, &mut obstacles);
    let readings = [&source, &target].map(|survey| Reading::to_look_at(survey, subject));
    let found = obstacles.into_found();
    let what = format!(
        "cannot compare {} with {name} on {}",
        source.name(),
        to.host()
    );
    if let Some(error) = to_error(&found, &what) {
        result.obstacles = found;
        return Err(error);
    }
    let differences = source
        .domain
        .definition
        .differences(&target.domain.definition);
    let mut options = request.options.clone();
    if !source.domain.state.is_off() {
        options.live = LiveRead::Torn;
    }
    let ours = Hold::begin(&source, readings[0], None, &mut result.warnings).await?;
    if let Some(ours) = &ours {
        ours.redirect(&mut moves, &mut options);
    }
    let theirs = match Hold::begin(&target, readings[1], None, &mut result.warnings).await {
        Ok(theirs) => theirs,
        Err(error) => return live::let_end(ours, Err(error)).await,
    };
    if let Some(theirs) = &theirs {
        theirs.redirect_destination(&mut moves);
    }
    let compared = compare(context, request, &moves, options, result);
    let disks = Box::pin(compared).await;
    let disks = live::let_end(theirs, disks).await;
    let disks = live::let_end(ours, disks).await;
    let alike = differences.is_empty();
    let shown = shown(&differences);
    result.definition_differences = Some(differences);
    disks?;
    if alike {
        return Ok(());
    }
    let message = format!(
        "the disks are equal, and the definitions of {} and {name} differ: {shown}",
        source.name()
    );
    Err(Error::new(ErrorCode::Mismatch, message))
}

/// Differences in a sentence, which the last of many do not become.
fn shown(differences: &[String]) -> String {
    let rest = differences.len().saturating_sub(MOST_SHOWN);
    let mut shown = differences[..differences.len() - rest].join("; ");
    if rest > 0 {
        shown += &format!("; and {rest} more, which `-o json` lists");
    }
    shown
}

/// Compares all disks. The first difference is the error.
async fn compare(
    context: &Context,
    request: &VerifyRequest,
    files: &[Move],
    options: Options,
    result: &mut VmResult,
) -> Result<()> {
    let moves = Moves {
        operation: Operation::Verify,
        from: request.source.clone(),
        to: request.destination.clone(),
        options,
        dry_run: false,
        parallel: request.parallel,
    };
    let nothing = Box::pin(async { Ok(()) });
    let (mut disks, mut done) = moves.run(context, files, nothing).await;
    let mut forgiven = Vec::new();
    for (disk, file) in disks.iter_mut().zip(files) {
        if file.own_reference && differs_in_header_only(&disk.transfer) {
            disk.transfer.error = None;
            disk.transfer.success = true;
            forgiven.push(format!(
                "{}: the block that holds the path of the image below it was not compared",
                file.destination
            ));
        }
    }
    if !forgiven.is_empty() && disks.iter().all(|disk| disk.transfer.success) {
        done = Ok(());
    }
    result.take_disks(disks);
    result.warnings.extend(forgiven);
    done
}

/// Whether the only difference is in the block with the header, where an image holds the path of
/// the one below it.
fn differs_in_header_only(transfer: &TransferResult) -> bool {
    let blocks = transfer.blocks_changed.zip(transfer.blocks_zeroed);
    transfer.first_difference == Some(0) && blocks == Some((1, 0))
}
