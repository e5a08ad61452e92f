//! The result of a transfer: the one object that scripts read.

use kvm_clone_protocol::message::{ApplyChoice, Counters};
use serde::Serialize;
use uuid::Uuid;

use super::request::{MethodChoice, Request};
use super::summary::Summary;
use crate::error::Error;
use crate::host::AgentBuild;

/// How frames travelled between the agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// Both agents on this machine, or on one host.
    Local,
    /// From host to host.
    Direct,
    /// Through the controller.
    Relay,
}

/// What the copies of disks that a VM wrote to are to its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// One instant of all disks, at which the guest agent held the file systems still.
    Application,
    /// One instant of all disks, as after a power cut: the guest replays its journals.
    Crash,
    /// Several instants: a file system on them may be broken.
    Torn,
}

impl Consistency {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Application => "application",
            Self::Crash => "crash",
            Self::Torn => "torn",
        }
    }
}

impl std::fmt::Display for Consistency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Application => "as the guest's file systems stood still",
            Self::Crash => "as after a power cut",
            Self::Torn => "torn: of several instants",
        })
    }
}

/// What a transfer did. A figure that is not known is `None`, never invented.
#[derive(Debug, Serialize)]
pub struct TransferResult {
    /// `disk-sync`, `disk-diff` or `disk-verify`.
    pub operation: &'static str,
    /// Names this run in logs.
    pub operation_id: Uuid,
    /// Whether it did what was asked.
    pub success: bool,
    /// What was used: `blocksync`, `rsync` or `libvirt`.
    pub method: &'static str,
    /// Why, where `auto` chose it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method_reason: Option<String>,
    /// Known once the agents are connected.
    pub route: Option<Route>,
    /// As given.
    pub source: String,
    /// As given.
    pub destination: String,
    /// Virtual size of the source.
    pub bytes_total: Option<u64>,
    /// Bytes of the source that are not holes.
    pub bytes_data: Option<u64>,
    /// Bytes read from the source.
    pub bytes_read_source: Option<u64>,
    /// Bytes read from the destination.
    pub bytes_read_destination: Option<u64>,
    /// Bytes of the source that were not read, because digests of them were kept.
    pub bytes_trusted_source: Option<u64>,
    /// Bytes of the destination that were not read, because digests of them were kept.
    pub bytes_trusted_destination: Option<u64>,
    /// Bytes of the blocks that differed.
    pub bytes_changed: Option<u64>,
    /// Bytes carried between the agents, both directions, framing and digests included.
    pub bytes_wire: Option<u64>,
    /// Blocks of the source.
    pub blocks_total: Option<u64>,
    /// Blocks whose data was shipped, or would be.
    pub blocks_changed: Option<u64>,
    /// Blocks that became zero at the destination, or would.
    pub blocks_zeroed: Option<u64>,
    /// Blocks that were equal.
    pub blocks_unchanged: Option<u64>,
    /// What the copy is, where a VM wrote to the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consistency: Option<Consistency>,
    /// How changes reached the destination.
    pub apply: &'static str,
    /// An interrupted run was taken up.
    pub resumed: bool,
    /// What is claimed of the destination's contents.
    pub verified: &'static str,
    /// From the start of the run to its end.
    pub duration_seconds: f64,
    /// What the user ought to know.
    pub warnings: Vec<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
    /// Nothing was written: the figures say what would have been.
    pub dry_run: bool,
    /// Byte of the first block that differs, where the two were only compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<u64>,
    /// Version of the protocol between the agents.
    pub protocol_version: Option<u16>,
    /// Which agent read the source.
    pub agent_source: Option<AgentBuild>,
    /// Which agent wrote the destination.
    pub agent_destination: Option<AgentBuild>,
    /// The contents, where both ends agreed on them.
    #[serde(skip)]
    pub summary: Option<Summary>,
}

impl TransferResult {
    /// It came to nothing before it began.
    pub(crate) fn failed(request: &Request, error: Error) -> Self {
        Self {
            error: Some(error),
            ..Self::new(request)
        }
    }

    /// Nothing known yet.
    pub(super) fn new(request: &Request) -> Self {
        Self {
            operation: request.operation.name(),
            operation_id: Uuid::new_v4(),
            success: false,
            method: request.options.method.name(),
            method_reason: None,
            route: None,
            source: request.source.to_string(),
            destination: request.destination.to_string(),
            bytes_total: None,
            bytes_data: None,
            bytes_read_source: None,
            bytes_read_destination: None,
            bytes_trusted_source: None,
            bytes_trusted_destination: None,
            bytes_changed: None,
            bytes_wire: None,
            blocks_total: None,
            blocks_changed: None,
            blocks_zeroed: None,
            blocks_unchanged: None,
            consistency: None,
            apply: intended(request),
            resumed: false,
            verified: "none",
            duration_seconds: 0.0,
            warnings: Vec::new(),
            error: None,
            dry_run: request.dry_run,
            first_difference: None,
            protocol_version: None,
            agent_source: None,
            agent_destination: None,
            summary: None,
        }
    }

    /// Takes over what the sender counted.
    pub(super) fn count_sender(&mut self, counters: &Counters) {
        self.bytes_data = Some(counters.bytes_data);
        self.bytes_read_source = Some(counters.bytes_read);
        self.bytes_trusted_source = Some(counters.bytes_trusted);
        self.bytes_changed = Some(counters.bytes_changed);
        self.blocks_changed = Some(counters.blocks_changed);
        self.blocks_zeroed = Some(counters.blocks_zeroed);
        self.blocks_unchanged = counters
            .blocks_settled
            .checked_sub(counters.blocks_changed)
            .and_then(|rest| rest.checked_sub(counters.blocks_zeroed));
    }

    /// Takes over what the receiver counted. While a run goes on, its bytes on the wire are those
    /// that arrived: the sender also counts what waits in its memory.
    pub(super) fn count_receiver(&mut self, counters: &Counters) {
        self.bytes_read_destination = Some(counters.bytes_read);
        self.bytes_trusted_destination = Some(counters.bytes_trusted);
        self.bytes_wire = Some(counters.bytes_wire);
    }
}

/// How changes are to reach the destination, until the method says what it does.
fn intended(request: &Request) -> &'static str {
    match (request.options.method, request.options.apply) {
        (MethodChoice::Rsync | MethodChoice::Libvirt, _) | (_, ApplyChoice::Inplace) => "inplace",
        (_, ApplyChoice::Reflink) => "reflink",
        (_, ApplyChoice::Staged | ApplyChoice::Auto) => "staged",
    }
}
