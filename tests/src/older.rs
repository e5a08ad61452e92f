//! Builds that speak protocol version 2 alone, as all did before there was version 3: the same
//! programs, built with the feature `version-2`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use crate::controller::binary;
use crate::pages::root;
use crate::process::tool;

const AGENT: &str = "kvm-clone-agent-of-version-2";
const CONTROLLER: &str = "kvm-clone-ctl-of-version-2";

/// The agent, for this machine.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn agent() -> &'static Path {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(|| {
        let built = build(AGENT, "kvm-clone-agent/version-2", None);
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
    static BUILT: LazyLock<PathBuf> =
        LazyLock::new(|| build(CONTROLLER, "kvm-clone-ctl/version-2", Some(agent())));
    &BUILT
}

/// Builds it beside the plain one, with the same dependencies, so that only what is ours is compiled
/// once more.
fn build(name: &str, feature: &str, carries: Option<&Path>) -> PathBuf {
    let directory = binary();
    let directory = directory.parent().expect("a program is in a directory");
    let target = directory.parent().expect("target/PROFILE");
    let profile = match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(root())
        .args(["build", "--quiet", "--workspace", "--locked"])
        .args(["--features", feature, "--bin", name])
        .args(["--profile", profile, "--target-dir"])
        .arg(target);
    // It has no other agent than this one.
    cargo.env_remove("KVM_CLONE_AGENT_AARCH64");
    if let Some(agent) = carries {
        let machine = std::env::consts::ARCH.to_uppercase();
        cargo.env(format!("KVM_CLONE_AGENT_{machine}"), agent);
    }
    let status = cargo.status().expect("cargo runs this test");
    assert!(status.success(), "{cargo:?} failed");
    directory.join(name)
}
