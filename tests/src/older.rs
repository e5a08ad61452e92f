//! Builds that speak protocol version 2 alone, as all did before there was version 3: the same
//! programs, built with the feature `version-2`.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::controller::binary;
use crate::process::{built_with, tool};

const AGENT: &str = "kvm-clone-agent-of-version-2";
const CONTROLLER: &str = "kvm-clone-ctl-of-version-2";

/// The agent, for this machine.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn agent() -> &'static Path {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(|| {
        let built = built_with(&binary(), AGENT, "kvm-clone-agent/version-2", |_| {});
        // What it tells a debugger is ten times what it does, and travels with it.
        let stripped = built.with_extension("stripped");
        tool("strip", [Path::new("-o"), &stripped, &built]);
        stripped
    });
    &BUILT
}

/// The controller, which carries that agent.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn controller() -> &'static Path {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(|| {
        built_with(&binary(), CONTROLLER, "kvm-clone-ctl/version-2", |cargo| {
            // It has no other agent than this one.
            cargo.env_remove("KVM_CLONE_AGENT_AARCH64");
            let machine = std::env::consts::ARCH.to_uppercase();
            cargo.env(format!("KVM_CLONE_AGENT_{machine}"), agent());
        })
    });
    &BUILT
}
