//! The agent with faults: the same program, built with the feature `fault-injection`.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use kvm_clone_tests::process::built_with;

const NAME: &str = "kvm-clone-agent-with-faults";

/// It, built once.
pub(crate) fn with_faults() -> &'static Path {
    static BUILT: LazyLock<PathBuf> = LazyLock::new(|| {
        let plain = Path::new(env!("CARGO_BIN_EXE_kvm-clone-agent"));
        built_with(plain, NAME, "kvm-clone-agent/fault-injection", |_| {})
    });
    &BUILT
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
