//! How old the newest points are, against what was promised.

use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::keep::newest;
use super::policy::Policy;
use super::run::{Found, find};
use crate::error::Result;
use crate::libvirt::Hypervisor;
use crate::transfer::Context;
use crate::vm::point::Point;
use crate::vm::{failover, replica};

/// Whether a promise is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The newest point is younger than that.
    Kept,
    /// It is older.
    Late,
    /// There is none.
    None,
    /// The source does not have the VM any more.
    Gone,
    /// The VM runs from the replica.
    Live,
}

impl State {
    /// Whether nobody has to do anything.
    pub fn is_well(self) -> bool {
        matches!(self, Self::Kept | Self::Live)
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Late => "late",
            Self::None => "none",
            Self::Gone => "gone",
            Self::Live => "live",
        }
    }
}

/// One VM.
#[derive(Debug, Serialize)]
pub struct VmStatus {
    /// The policy.
    pub policy: String,
    /// The VM.
    pub vm: String,
    /// Whether the promise is kept.
    pub state: State,
    /// From the instant of the newest point until now, in seconds.
    pub age_seconds: Option<i64>,
    /// How old that may be.
    pub rpo_seconds: i64,
    /// Its points, from the oldest on.
    pub points: Vec<Point>,
}

/// Looks at all VMs of a policy.
///
/// # Errors
/// When the destination cannot be asked. A source that cannot be is a warning: its replicas are
/// told of all the same.
pub async fn status(
    context: &Context,
    connect: &str,
    policy: &Policy,
    warnings: &mut Vec<String>,
) -> Result<Vec<VmStatus>> {
    let source = Hypervisor::new(context.host(&policy.source), connect);
    let destination = context.host(&policy.destination);
    destination.share().await?;
    let found = match find(&source, &destination, policy).await {
        Ok(found) => found,
        Err(error) => {
            warnings.push(format!(
                "{}: which VMs there are on {} is not known: {}",
                policy.name,
                policy.source,
                error.one_line()
            ));
            Found {
                vms: replica::names(&destination, &policy.place()).await?,
                gone: Vec::new(),
            }
        }
    };
    let on = Hypervisor::new(destination.clone(), connect);
    let mut all = Vec::new();
    let vms = found.vms.iter().map(|vm| (vm, false));
    for (vm, is_gone) in vms.chain(found.gone.iter().map(|vm| (vm, true))) {
        let listed = replica::points(&destination, &policy.directory_of(vm)).await?;
        let now = Timestamp::now();
        let role = failover::role(&on, &policy.directory_of(vm)).await?;
        let age = newest(listed.instants(), now).map(|instant| now.duration_since(instant));
        warnings.extend(listed.strange);
        all.push(VmStatus {
            policy: policy.name.clone(),
            vm: vm.to_owned(),
            state: match role {
                Some(_) => State::Live,
                None => state(age, policy.rpo, is_gone),
            },
            age_seconds: age.map(|age| age.as_secs()),
            rpo_seconds: policy.rpo.as_secs(),
            points: listed.points,
        });
    }
    Ok(all)
}

fn state(age: Option<SignedDuration>, rpo: SignedDuration, is_gone: bool) -> State {
    match age {
        _ if is_gone => State::Gone,
        None => State::None,
        Some(age) if age <= rpo => State::Kept,
        Some(_) => State::Late,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_kept_up_to_its_last_second() {
        let seconds = SignedDuration::from_secs;
        let of = |age: Option<i64>, is_gone| state(age.map(seconds), seconds(60), is_gone);
        assert_eq!(of(Some(60), false), State::Kept);
        assert_eq!(of(Some(61), false), State::Late);
        assert_eq!(of(None, false), State::None);
        assert_eq!(of(Some(1), true), State::Gone);
    }
}
