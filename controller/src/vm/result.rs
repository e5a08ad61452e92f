//! The result of an operation on a whole VM: the fields of a transfer, summed over its disks, and
//! each disk's own.

use std::time::Instant;

use serde::Serialize;
use uuid::Uuid;

use super::obstacle::Obstacle;
use super::plan::Plan;
use crate::endpoint::HostSpec;
use crate::error::{Error, Result};
use crate::transfer::{Consistency, Route, TransferResult};

/// What an operation did with a VM. A figure that is not known of every disk is `None`.
#[derive(Debug, Serialize)]
pub struct VmResult {
    /// `clone`, `sync` or `verify`.
    pub operation: &'static str,
    /// Names this run in logs and in the history.
    pub operation_id: Uuid,
    /// Whether it did what was asked.
    pub success: bool,
    /// How the disks were transferred; `None` when none was, or not all alike.
    pub method: Option<&'static str>,
    /// Why that method, where `auto` chose it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method_reason: Option<String>,
    /// Which way they went, if all went the same.
    pub route: Option<Route>,
    /// The host that has the VM, as given.
    pub source: String,
    /// The other host, as given.
    pub destination: String,
    /// The VM.
    pub vm: String,
    /// Its name on the destination.
    pub target_vm: String,
    /// Sums over the disks, each as in a transfer.
    #[serde(flatten)]
    pub totals: Totals,
    /// What the copies are, where the VM ran.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// How changes reached the disks of the destination.
    pub apply: Option<&'static str>,
    /// An interrupted run was taken up.
    pub resumed: bool,
    /// What is claimed of the contents of every disk.
    pub verified: &'static str,
    /// From the start of the run to its end.
    pub duration_seconds: f64,
    /// What the user ought to know.
    pub warnings: Vec<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
    /// Nothing was changed.
    pub dry_run: bool,
    /// All that was in the way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub obstacles: Vec<Obstacle>,
    /// What a clone does, or would do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// The earlier states of the destination's disks that were kept, by `sync --checkpoint`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checkpoints: Vec<String>,
    /// How the definitions differ beyond names, addresses and paths, by `verify`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub definition_differences: Option<Vec<String>>,
    /// Each disk, or each image of one.
    pub disks: Vec<DiskResult>,
}

/// How much of a disk of a VM that runs was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scan {
    /// All of its data.
    Full,
    /// What the guest has written since the last sync, as libvirt noted it.
    Changes,
}

/// One disk's transfer.
#[derive(Debug, Serialize)]
pub struct DiskResult {
    /// `vda`, `sda`, …
    pub target: String,
    /// How much was read, where the VM ran on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scan: Option<Scan>,
    /// What was done.
    #[serde(flatten)]
    pub transfer: TransferResult,
}

/// The figures of a transfer that can be added up.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
#[expect(
    missing_docs,
    reason = "each is the field of the same name of a transfer"
)]
pub struct Totals {
    pub bytes_total: Option<u64>,
    pub bytes_data: Option<u64>,
    pub bytes_read_source: Option<u64>,
    pub bytes_read_destination: Option<u64>,
    pub bytes_trusted_source: Option<u64>,
    pub bytes_trusted_destination: Option<u64>,
    pub bytes_changed: Option<u64>,
    pub bytes_wire: Option<u64>,
    pub blocks_total: Option<u64>,
    pub blocks_changed: Option<u64>,
    pub blocks_zeroed: Option<u64>,
    pub blocks_unchanged: Option<u64>,
}

impl VmResult {
    /// Nothing known yet.
    pub(super) fn new(operation: &'static str, source: String, destination: String) -> Self {
        Self {
            operation,
            operation_id: Uuid::new_v4(),
            success: false,
            method: None,
            method_reason: None,
            route: None,
            source,
            destination,
            vm: String::new(),
            target_vm: String::new(),
            totals: Totals::default(),
            consistency: None,
            apply: None,
            resumed: false,
            verified: "none",
            duration_seconds: 0.0,
            warnings: Vec::new(),
            error: None,
            dry_run: false,
            obstacles: Vec::new(),
            plan: None,
            checkpoints: Vec::new(),
            definition_differences: None,
            disks: Vec::new(),
        }
    }

    /// It failed before anything was known but the VM's name, if that.
    pub fn failed(
        operation: &'static str,
        source: &HostSpec,
        destination: &HostSpec,
        vm: &str,
        error: Error,
    ) -> Self {
        let mut result = Self::new(operation, source.to_string(), destination.to_string());
        vm.clone_into(&mut result.vm);
        vm.clone_into(&mut result.target_vm);
        result.error = Some(error);
        result
    }

    /// The operation that began at `started` has ended.
    pub(super) fn ended(mut self, started: Instant, done: Result<()>) -> Self {
        self.success = done.is_ok();
        self.error = done.err();
        self.duration_seconds = started.elapsed().as_secs_f64();
        self
    }

    /// Takes over what the transfers of the disks did, each warning once.
    pub(super) fn take_disks(&mut self, disks: Vec<DiskResult>) {
        let transfers = || disks.iter().map(|disk| &disk.transfer);
        self.totals = Totals::of(&disks);
        self.method = common(transfers().map(|transfer| transfer.method));
        self.method_reason = transfers().find_map(|transfer| transfer.method_reason.clone());
        self.route = common(transfers().map(|transfer| transfer.route)).flatten();
        self.apply = common(transfers().map(|transfer| transfer.apply));
        self.verified = common(transfers().map(|transfer| transfer.verified)).unwrap_or("none");
        self.resumed |= transfers().any(|transfer| transfer.resumed);
        for warning in transfers().flat_map(|transfer| &transfer.warnings) {
            if !self.warnings.contains(warning) {
                self.warnings.push(warning.clone());
            }
        }
        self.disks = disks;
    }
}

impl Totals {
    pub(super) fn of(disks: &[DiskResult]) -> Self {
        let sum = |figure: fn(&TransferResult) -> Option<u64>| {
            disks
                .iter()
                .map(|disk| figure(&disk.transfer))
                .try_fold(0_u64, |sum, figure| Some(sum.saturating_add(figure?)))
        };
        Self {
            bytes_total: sum(|disk| disk.bytes_total),
            bytes_data: sum(|disk| disk.bytes_data),
            bytes_read_source: sum(|disk| disk.bytes_read_source),
            bytes_read_destination: sum(|disk| disk.bytes_read_destination),
            bytes_trusted_source: sum(|disk| disk.bytes_trusted_source),
            bytes_trusted_destination: sum(|disk| disk.bytes_trusted_destination),
            bytes_changed: sum(|disk| disk.bytes_changed),
            bytes_wire: sum(|disk| disk.bytes_wire),
            blocks_total: sum(|disk| disk.blocks_total),
            blocks_changed: sum(|disk| disk.blocks_changed),
            blocks_zeroed: sum(|disk| disk.blocks_zeroed),
            blocks_unchanged: sum(|disk| disk.blocks_unchanged),
        }
    }
}

/// What all have in common; `None` when they do not, or there is none.
fn common<T: PartialEq>(mut each: impl Iterator<Item = T>) -> Option<T> {
    let first = each.next()?;
    each.all(|other| other == first).then_some(first)
}
