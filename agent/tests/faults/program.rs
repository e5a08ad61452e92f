//! The agent with faults: the same program, built with the feature `fault-injection`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

const NAME: &str = "kvm-clone-agent-with-faults";

/// Built beside the plain one, with the same dependencies, so that only the agent itself is
/// compiled once more.
pub(crate) fn with_faults() -> &'static Path {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(build);
    &BUILT
}

fn build() -> PathBuf {
    let directory = Path::new(env!("CARGO_BIN_EXE_kvm-clone-agent"))
        .parent()
        .unwrap();
    let profile = match directory.file_name().unwrap().to_str().unwrap() {
        "debug" => "dev",
        profile => profile,
    };
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap())
        .args(["build", "--quiet", "--workspace", "--locked"])
        .args(["--features", "kvm-clone-agent/fault-injection"])
        .args(["--bin", NAME, "--profile", profile, "--target-dir"])
        .arg(directory.parent().unwrap());
    assert!(cargo.status().unwrap().success(), "{cargo:?} failed");
    directory.join(NAME)
}

#[test]
fn only_the_agent_with_faults_knows_the_variable() {
    let knows = |program: &Path| {
        let bytes = std::fs::read(program).unwrap();
        let name = b"KVM_CLONE_FAULTS";
        bytes.windows(name.len()).any(|found| found == name)
    };
    assert!(knows(with_faults()));
    assert!(!knows(Path::new(env!("CARGO_BIN_EXE_kvm-clone-agent"))));
}
