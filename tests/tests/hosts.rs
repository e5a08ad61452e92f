//! Hosts that are not as one would like: other login shells, chatty ones, caches that execute
//! nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use kvm_clone_tests::host::HostSpec;
use kvm_clone_tests::image::{self, BLOCK, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};

/// Claims that syncs work, by either route, although both hosts are as `change` makes them.
fn works_with(change: impl Fn(HostSpec) -> HostSpec) -> Option<Lab> {
    let lab = LabSpec::new()?.host_a(&change).host_b(&change).start();
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 3 * BLOCK + 5)]);
    for by in [Journey::Relay, Journey::Direct] {
        lab.sync(by, &source, &copy, &[]);
        lab.sync(by, &source, &copy, &[])
            .assert_only_digests(&source);
        fs::remove_file(&copy).unwrap();
    }
    Some(lab)
}

const NOEXEC: &str = "mkdir -p -m 700 /root/.cache; mount -t tmpfs -o noexec,mode=700 none";

#[test]
fn a_cache_mounted_noexec_makes_the_agent_go_elsewhere() {
    let Some(lab) = works_with(|host| host.setup(&format!("{NOEXEC} /root/.cache"))) else {
        return;
    };
    let var_tmp = lab.path("hvA/var-tmp");
    let found = walk(&var_tmp)
        .iter()
        .any(|path| path.to_string_lossy().contains("agent-"));
    assert!(found, "no agent in /var/tmp: {:?}", walk(&var_tmp));
}

#[test]
fn a_host_on_which_nothing_can_be_executed_gets_a_clear_error() {
    let everywhere = ["/root/.cache", "/var/tmp", "/dev/shm", "/tmp"];
    let setup = everywhere
        .map(|directory| format!("{NOEXEC} {directory}"))
        .join("\n");
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.host_a(|host| host.setup(&setup)).start();
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, BLOCK)]);
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &[]);
    run.expect_failure(8, &["missing_requirement"], "hvA");
    assert!(run.stderr.contains("noexec"), "{run}");
    assert!(!copy.exists());
}

#[test]
fn a_login_shell_that_is_dash_works() {
    works_with(|host| host.shell("/bin/dash"));
}

#[test]
fn a_login_shell_that_prints_a_greeting_works() {
    works_with(|host| host.bashrc("echo 'Welcome to the machine'\nprintf 'no newline'\n"));
}

#[test]
fn a_login_shell_that_runs_no_commands_is_named_as_the_cause() {
    let Some(spec) = LabSpec::new() else { return };
    let greeting = "echo 'This account is only for tunnels'\nexit 0\n";
    let lab = spec.host_a(|host| host.bashrc(greeting)).start();
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, BLOCK)]);
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &[]);
    assert_ne!(run.code(), Some(0), "{run}");
    assert!(
        run.stderr.contains("only for tunnels") && run.stderr.contains("hvA"),
        "{run}"
    );
    assert!(!copy.exists());
}

/// Every path below a directory.
fn walk(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let each = |path: PathBuf| walk(&path).into_iter().chain([path]).collect::<Vec<_>>();
    entries
        .flat_map(|entry| each(entry.unwrap().path()))
        .collect()
}
