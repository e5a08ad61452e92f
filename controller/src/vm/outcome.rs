//! What became of an operation on one VM, whatever it was.

use std::time::Instant;

use serde::Serialize;

use super::audit::AuditResult;
use super::failback::FailbackResult;
use super::failover::FailoverResult;
use super::obstacle::Obstacle;
use super::rehearsal::RehearsalResult;
use crate::error::{Error, Result};

/// How an operation on a VM has ended.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The VM.
    pub vm: String,
    /// Whether it did what was asked.
    pub success: bool,
    /// From the start of the operation to its end.
    pub duration_seconds: f64,
    /// What the user ought to know.
    pub warnings: Vec<String>,
    /// All that was in the way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub obstacles: Vec<Obstacle>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Error>,
}

/// Results of which an outcome is a part.
macro_rules! with_outcome {
    ($($result:ty),* $(,)?) => {
        $(impl AsMut<Outcome> for $result {
            fn as_mut(&mut self) -> &mut Outcome {
                &mut self.outcome
            }
        })*
    };
}

with_outcome!(AuditResult, FailbackResult, FailoverResult, RehearsalResult);

impl Outcome {
    /// That of an operation that has just begun.
    pub(super) fn of(vm: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            success: false,
            duration_seconds: 0.0,
            warnings: Vec::new(),
            obstacles: Vec::new(),
            error: None,
        }
    }

    /// The operation has ended so.
    pub(super) fn end(&mut self, started: Instant, done: Result<()>) {
        self.error = done.err();
        self.success = self.error.is_none();
        self.duration_seconds = started.elapsed().as_secs_f64();
    }
}
