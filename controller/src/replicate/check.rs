//! `replicate check`: whether the hosts of a policy have what it takes. Nothing is changed.

use serde::Serialize;

use super::policy::Policy;
use super::run::find;
use crate::error::Result;
use crate::libvirt::Hypervisor;
use crate::transfer::Context;
use crate::vm::{Obstacle, replica};

/// What a policy comes to on its hosts.
#[derive(Debug, Serialize)]
pub struct Checked {
    /// The policy.
    pub policy: String,
    /// The VMs that it is about.
    pub vms: Vec<String>,
    /// What stands in its way.
    pub obstacles: Vec<Obstacle>,
}

/// Looks at the hosts of a policy.
///
/// # Errors
/// When one cannot be asked.
pub async fn check(context: &Context, connect: &str, policy: &Policy) -> Result<Checked> {
    let source = Hypervisor::new(context.host(&policy.source), connect);
    let destination = context.host(&policy.destination);
    let found = find(&source, &destination, policy).await?;
    let place = policy.place();
    let obstacles = replica::check_place(
        &destination,
        &place,
        policy.min_free,
        policy.keep.most(),
        &found.gone,
    )
    .await?;
    Ok(Checked {
        policy: policy.name.clone(),
        vms: found.vms,
        obstacles,
    })
}
