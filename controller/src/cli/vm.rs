//! `clone`, `sync` and `verify`: whole VMs.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::App;
use super::history::Recording;
use super::options::{CompareArgs, OutputFormat, TransferArgs};
use crate::endpoint::HostSpec;
use crate::error::Result;
use crate::history::Begun;
use crate::output;
use crate::transfer::MethodChoice;
use crate::vm::clone::{self, CloneRequest, DestFormat};
use crate::vm::network::NetworkConfig;
use crate::vm::sync::{self, SyncRequest};
use crate::vm::verify::{self, VerifyRequest};
use crate::vm::{LiveChoice, Quiesce, VmResult};

/// How many disks are moved at once, unless the user says otherwise: with the connections that go
/// with them they stay below the ten sessions that sshd allows on one connection.
const PARALLEL: NonZeroUsize = NonZeroUsize::new(4).expect("four is not zero");

/// The VM of a command, and the two hosts.
#[derive(Debug, Args)]
struct Hosts {
    /// Host that has the VM: [USER@]NAME[:PORT], an alias of the ssh configuration, or "local"
    #[arg(value_name = "SRC_HOST")]
    source: HostSpec,
    /// The other host
    #[arg(value_name = "DST_HOST")]
    destination: HostSpec,
    /// Name or UUID of the VM
    #[arg(value_name = "VM")]
    vm: String,
}

/// What `clone` and `sync` have in common.
#[derive(Debug, Args)]
struct Moving {
    /// What to do about a VM that runs: snapshot (QEMU shows its disks as they are at one instant,
    /// and it runs on), refuse, pause (suspend it while its disks are read, on XFS and btrfs only
    /// while they are copied) or torn (read them as they are) [default: auto, which is snapshot]
    #[arg(long, value_name = "auto|refuse|pause|snapshot|torn")]
    live: Option<LiveChoice>,
    /// Whether the guest's file systems are frozen at the instant of a snapshot: auto (if the guest
    /// agent answers), require or off [default: auto]
    #[arg(long, value_name = "auto|require|off")]
    quiesce: Option<Quiesce>,
    #[command(flatten)]
    disks: Disks,
    #[command(flatten)]
    transfer: TransferArgs,
}

/// Which disks, and how many at once.
#[derive(Debug, Args)]
struct Disks {
    /// Leave a disk out, by its target such as vdb; may be repeated
    #[arg(long = "exclude-disk", value_name = "TARGET")]
    exclude: Vec<String>,
    /// Disks at once [default: 4]
    #[arg(long, value_name = "N")]
    parallel: Option<NonZeroUsize>,
}

#[derive(Debug, Args)]
pub(super) struct Clone {
    #[command(flatten)]
    hosts: Hosts,
    /// Name of the clone [default: the VM's own]
    #[arg(long, value_name = "NAME")]
    new_name: Option<String>,
    /// Replace a VM of that name that is shut off
    #[arg(long)]
    force: bool,
    /// Start the clone
    #[arg(long)]
    start: bool,
    /// Keep the MAC addresses
    #[arg(long)]
    preserve_mac: bool,
    /// YAML or TOML file that says how the clone's interfaces are connected
    #[arg(long, value_name = "FILE")]
    network_config: Option<PathBuf>,
    /// Connect interfaces of network or bridge OLD to NEW; may be repeated
    #[arg(long, value_name = "OLD=NEW")]
    network_map: Vec<String>,
    /// Directory for the disks [default: where the source has them]
    #[arg(long, value_name = "DIR", conflicts_with = "dest_pool")]
    dest_dir: Option<String>,
    /// Storage pool for the disks
    #[arg(long, value_name = "POOL")]
    dest_pool: Option<String>,
    /// Format of the disks; what the guest sees is copied then [default: same]
    #[arg(long, value_name = "raw|qcow2|same")]
    dest_format: Option<DestFormat>,
    /// Turn each chain of images into one image
    #[arg(long)]
    flatten: bool,
    /// Carry kernel, initrd, firmware and media that the destination lacks
    #[arg(long)]
    with_boot_files: bool,
    /// When it fails, leave what was copied, to be taken up by the same command
    #[arg(long)]
    keep_partial: bool,
    #[command(flatten)]
    moving: Moving,
}

#[derive(Debug, Args)]
pub(super) struct Sync {
    #[command(flatten)]
    hosts: Hosts,
    /// Name of the VM on the destination [default: the same]
    #[arg(long, value_name = "NAME")]
    target_name: Option<String>,
    /// Keep the state of the destination's disks before the sync, beside them
    #[arg(long)]
    checkpoint: bool,
    /// Keep so many such states, the new one included [default: 1]
    #[arg(long, value_name = "N", requires = "checkpoint")]
    keep: Option<NonZeroUsize>,
    /// Overwrite a VM that this source did not make, or that was written since
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    moving: Moving,
}

#[derive(Debug, Args)]
pub(super) struct Verify {
    #[command(flatten)]
    hosts: Hosts,
    /// Name of the VM on the destination [default: the same]
    #[arg(long, value_name = "NAME")]
    target_name: Option<String>,
    #[command(flatten)]
    disks: Disks,
    #[command(flatten)]
    compare: CompareArgs,
}

pub(super) async fn clone(app: &App, args: Clone) -> Result<()> {
    let mut network = match &args.network_config {
        Some(path) => NetworkConfig::load(path)?,
        None => NetworkConfig::default(),
    };
    for rule in &args.network_map {
        network.add(rule)?;
    }
    let moving = args.moving;
    let request = CloneRequest {
        source: args.hosts.source,
        destination: args.hosts.destination,
        vm: args.hosts.vm,
        new_name: args.new_name,
        force: args.force,
        dry_run: moving.transfer.dry_run,
        start: args.start,
        preserve_mac: args.preserve_mac,
        network,
        dest_dir: args.dest_dir,
        dest_pool: args.dest_pool,
        exclude_disks: moving.disks.exclude,
        flatten: args.flatten,
        with_boot_files: args.with_boot_files,
        keep_partial: args.keep_partial,
        dest_format: args.dest_format.unwrap_or_default(),
        live: moving.live.unwrap_or_default(),
        quiesce: moving.quiesce.unwrap_or_default(),
        parallel: moving.disks.parallel.unwrap_or(PARALLEL),
        options: moving.transfer.resolve(&app.config, MethodChoice::Rsync)?,
    };
    let recording = recording(
        app,
        "clone",
        &request.vm,
        &request.source,
        &request.destination,
    );
    let result = clone::run(&app.transfer_context(), app.connect(), &request).await;
    recording.end(app, &result);
    report(app, result)
}

pub(super) async fn sync(app: &App, args: Sync) -> Result<()> {
    let moving = args.moving;
    let one = NonZeroUsize::MIN;
    let request = SyncRequest {
        source: args.hosts.source,
        destination: args.hosts.destination,
        vm: args.hosts.vm,
        target_name: args.target_name,
        checkpoint: args.checkpoint.then(|| args.keep.unwrap_or(one)),
        dry_run: moving.transfer.dry_run,
        overwrite: args.overwrite,
        exclude_disks: moving.disks.exclude,
        live: moving.live.unwrap_or_default(),
        quiesce: moving.quiesce.unwrap_or_default(),
        parallel: moving.disks.parallel.unwrap_or(PARALLEL),
        options: moving.transfer.resolve(&app.config, MethodChoice::Rsync)?,
    };
    let recording = recording(
        app,
        "sync",
        &request.vm,
        &request.source,
        &request.destination,
    );
    let result = sync::run(&app.transfer_context(), app.connect(), &request).await;
    recording.end(app, &result);
    report(app, result)
}

pub(super) async fn verify(app: &App, args: Verify) -> Result<()> {
    let request = VerifyRequest {
        source: args.hosts.source,
        destination: args.hosts.destination,
        vm: args.hosts.vm,
        target_name: args.target_name,
        exclude_disks: args.disks.exclude,
        parallel: args.disks.parallel.unwrap_or(PARALLEL),
        options: args.compare.resolve(&app.config),
    };
    let recording = recording(
        app,
        "verify",
        &request.vm,
        &request.source,
        &request.destination,
    );
    let result = verify::run(&app.transfer_context(), app.connect(), &request).await;
    recording.end(app, &result);
    report(app, result)
}

fn recording(app: &App, operation: &str, vm: &str, from: &HostSpec, to: &HostSpec) -> Recording {
    let begun = Begun {
        operation,
        vm: Some(vm),
        source: from.to_string(),
        destination: to.to_string(),
    };
    Recording::begin(app, &begun)
}

/// Prints the result, also of a failure, to which the figures so far belong.
fn report(app: &App, mut result: VmResult) -> Result<()> {
    for warning in &result.warnings {
        app.warn(warning);
    }
    if result.success || app.format() != OutputFormat::Text {
        output::print(&result, app.format(), || output::vm_text(&result))?;
    }
    result.error.take().map_or(Ok(()), Err)
}
