//! Skipping, loudly: a machine that lacks what a test needs, such as root, is not a reason to
//! fail on a laptop, and never a reason to pass unseen.
//!
//! Every skip is one line on standard error, which libtest does not capture, and one line in the
//! file that `KVM_CLONE_TEST_SKIPS` names; `tests/run` prints that file last. Under `CI=true` a
//! skip is a failure.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;

/// What the laboratory runs; `tests/run` installs the packages that hold them.
const TOOLS: [&str; 12] = [
    "sshd",
    "ssh",
    "ssh-keygen",
    "unshare",
    "setpriv",
    "mount",
    "umount",
    "losetup",
    "mkfs.ext4",
    "mkfs.xfs",
    "mkfs.btrfs",
    "dash",
];

/// Why no end-to-end test can run here, if so.
#[must_use]
pub fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("mounts, namespaces and loop devices need root".to_owned());
    }
    TOOLS
        .iter()
        .find(|tool| find_tool(tool).is_none())
        .map(|tool| format!("{tool} is not installed"))
}

/// What the hypervisors run besides; `tests/run` installs the packages that hold them.
const VM_TOOLS: [&str; 14] = [
    "ip",
    "nsenter",
    "virsh",
    "libvirtd",
    "virtlogd",
    "qemu-img",
    "qemu-io",
    "qemu-system-x86_64",
    "swtpm",
    "syslinux",
    "mcopy",
    "mkfs.vfat",
    "objcopy",
    "busybox",
];

/// Why no test with VMs can run here, if so.
#[must_use]
pub fn vm_obstacle() -> Option<String> {
    let missing = || VM_TOOLS.iter().find(|tool| find_tool(tool).is_none());
    obstacle().or_else(|| missing().map(|tool| format!("{tool} is not installed")))
}

/// Why no host can be an aarch64 machine here, if so.
#[must_use]
pub fn emulation_obstacle() -> Option<String> {
    let kernel = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let missing = || {
        if find_tool("qemu-aarch64-static").is_none() {
            return Some("qemu-aarch64-static is not installed");
        }
        (!kernel.contains("binfmt_misc")).then_some("this kernel has no binfmt_misc")
    };
    obstacle().or_else(|| missing().map(str::to_owned))
}

/// Why no disk can be recorded here, if so.
#[must_use]
pub fn recording_obstacle() -> Option<String> {
    let fuse = Path::new("/dev/fuse");
    let without = || (!fuse.exists()).then(|| "this machine has no /dev/fuse".to_owned());
    obstacle().or_else(without)
}

/// Says that the running test is skipped, and why.
///
/// # Panics
/// Under `CI=true`.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("SKIPPED {test}: {reason}\n");
    // Past libtest's capture, which only knows the print macros.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(list) = std::env::var_os("KVM_CLONE_TEST_SKIPS") {
        let file = OpenOptions::new().create(true).append(true).open(&list);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        written.unwrap_or_else(|error| panic!("cannot list a skip in {}: {error}", list.display()));
    }
    let in_ci = std::env::var_os("CI").is_some_and(|value| value == "true");
    assert!(!in_ci, "{test} was skipped in CI: {reason}");
}

/// Where a tool is: on PATH, or in one of the directories that only root's PATH holds.
#[must_use]
pub fn find_tool(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_is_found_by_name_and_a_missing_one_is_not() {
        assert!(find_tool("sh").is_some());
        assert_eq!(find_tool("no-such-tool-anywhere"), None);
    }
}
