//! How the agent gets to a host: once, whole, and only into a place that nobody else can write to.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use kvm_clone_tests::controller::Run;
use kvm_clone_tests::host::Host;
use kvm_clone_tests::image::{self, BLOCK, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;

/// The agents that lie in a cache directory.
fn agents_in(cache: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(cache.join("kvm-clone")) else {
        return Vec::new();
    };
    let path = entries.map(|entry| entry.unwrap().path());
    path.filter(|path| {
        path.file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("agent-")
    })
    .collect()
}

/// The one agent that was deployed to a host.
fn deployed(host: &Host) -> PathBuf {
    let agents = agents_in(&host.home().join(".cache"));
    assert_eq!(agents.len(), 1, "agents on {}: {agents:?}", host.name());
    agents[0].clone()
}

/// What tells one copy of the agent from another that was put in its place.
fn identity(path: &Path) -> (u64, i64, i64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.ino(), metadata.mtime_nsec(), metadata.ctime_nsec())
}

/// Claims that a sync between the hosts works.
fn sync(lab: &Lab) {
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 3 * BLOCK + 5)]);
    lab.sync(Journey::Relay, &source, &copy, &[]);
    fs::remove_file(copy).unwrap();
}

fn agent(lab: &Lab, verb: &str) -> Run {
    lab.controller.run(["agent", verb, "hvA"])
}

#[test]
fn the_agent_is_copied_once_and_found_the_next_time() {
    let Some(lab) = Lab::start() else { return };
    sync(&lab);
    let (on_a, on_b) = (deployed(&lab.a), deployed(&lab.b));
    let name = on_a.file_name().unwrap().to_str().unwrap().to_owned();
    assert_eq!(on_b.file_name().unwrap(), name.as_str());
    let (version, digest) = name
        .strip_prefix("agent-")
        .unwrap()
        .rsplit_once('-')
        .unwrap();
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
    assert!(
        digest.len() == 16 && digest.chars().all(|c| c.is_ascii_hexdigit()),
        "{name}"
    );
    for (path, mode) in [(on_a.as_path(), 0o700), (on_a.parent().unwrap(), 0o700)] {
        assert_eq!(
            fs::metadata(path).unwrap().permissions().mode() & 0o777,
            mode,
            "{path:?}"
        );
    }

    let before = [identity(&on_a), identity(&on_b)];
    sync(&lab);
    assert_eq!(
        [identity(&deployed(&lab.a)), identity(&deployed(&lab.b))],
        before
    );
}

#[test]
fn the_agent_is_deployed_shown_and_removed_on_request() {
    let Some(lab) = Lab::start() else { return };
    let status = || agent(&lab, "status").expect_json().to_string();
    let absent = status();
    let _ = agent(&lab, "deploy").expect_json();
    let path = deployed(&lab.a);
    let name = path.file_name().unwrap().to_str().unwrap();
    let present = status();
    assert!(present.contains(name), "{name} in {present}");
    assert!(!absent.contains(name) || absent != present, "{absent}");

    let before = identity(&path);
    let _ = agent(&lab, "deploy").expect_json();
    assert_eq!(
        identity(&path),
        before,
        "deployed again though it was there"
    );

    let _ = agent(&lab, "remove").expect_json();
    assert_eq!(
        agents_in(&lab.a.home().join(".cache")),
        Vec::<PathBuf>::new()
    );
    assert_eq!(status(), absent);
    agent(&lab, "remove").expect_code(0);
}

#[test]
fn an_agent_of_the_users_own_is_used_and_nothing_is_deployed() {
    let Some(lab) = Lab::start() else { return };
    sync(&lab);
    let own = lab.path("own-agent");
    fs::copy(deployed(&lab.a), &own).unwrap();
    agent(&lab, "remove").expect_code(0);
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    let options = ["--agent-path", own.to_str().unwrap()];
    lab.sync(Journey::Direct, &source, &copy, &options);
    assert_eq!(
        agents_in(&lab.a.home().join(".cache")),
        Vec::<PathBuf>::new()
    );
}

#[test]
fn with_sudo_only_an_agent_that_nobody_but_root_can_have_put_there_is_run() {
    let Some(lab) = Lab::start() else { return };
    let path = lab.path("installed-agent");
    let path = path.to_str().unwrap();
    for host in ["hvA", "hvB"] {
        lab.controller
            .run(["agent", "install", host, "--path", path])
            .expect_code(0);
    }
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 3 * BLOCK)]);
    lab.sync(
        Journey::Relay,
        &source,
        &copy,
        &["--sudo", "--agent-path", path],
    );

    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    let run = lab.disk(
        "sync",
        Journey::Relay,
        &source,
        &copy,
        &["--sudo", "--agent-path", path],
    );
    assert_ne!(run.code(), Some(0), "{run}");
    assert!(
        run.stderr.contains(path) && run.stderr.contains("written by others"),
        "{run}"
    );
}

/// Deploys, spoils the agent, and claims that the next run mends it.
fn a_spoilt_agent_is_replaced(spoil: impl Fn(&Path)) {
    let Some(lab) = Lab::start() else { return };
    sync(&lab);
    let path = deployed(&lab.a);
    let good = fs::read(&path).unwrap();
    spoil(&path);
    sync(&lab);
    assert_eq!(deployed(&lab.a), path);
    assert!(
        fs::read(&path).unwrap() == good,
        "the agent's bytes on the host are still wrong"
    );
}

#[test]
fn an_agent_whose_bytes_were_altered_is_replaced() {
    a_spoilt_agent_is_replaced(|path| {
        let mut bytes = fs::read(path).unwrap();
        // In the middle, and still executable more often than not: the size says nothing.
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        fs::write(path, bytes).unwrap();
    });
}

#[test]
fn an_agent_that_was_cut_short_is_replaced() {
    a_spoilt_agent_is_replaced(|path| {
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(fs::metadata(path).unwrap().len() / 2).unwrap();
    });
}

#[test]
fn a_script_of_the_agents_size_in_its_place_is_replaced() {
    a_spoilt_agent_is_replaced(|path| {
        let size = usize::try_from(fs::metadata(path).unwrap().len()).unwrap();
        let mut script = b"#!/bin/sh\nexit 0\n".to_vec();
        script.resize(size, b'#');
        fs::write(path, script).unwrap();
    });
}

#[test]
fn an_agent_that_others_may_write_to_is_replaced() {
    a_spoilt_agent_is_replaced(|path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    });
}

#[test]
fn a_cache_directory_that_others_may_write_to_is_not_used() {
    let Some(lab) = Lab::start() else { return };
    let planted = lab.a.home().join(".cache/kvm-clone");
    fs::create_dir_all(&planted).unwrap();
    fs::set_permissions(&planted, fs::Permissions::from_mode(0o777)).unwrap();
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, BLOCK)]);
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &[]);
    // Either another candidate is taken, or the run says what is wrong; an agent in a directory
    // that is open to all is neither.
    let mode = fs::metadata(&planted).unwrap().permissions().mode() & 0o777;
    assert!(
        agents_in(&lab.a.home().join(".cache")).is_empty() || mode == 0o700,
        "{run}"
    );
    if run.code() == Some(0) {
        image::assert_equal(&source, &copy);
    } else {
        assert!(run.stderr.contains("kvm-clone"), "{run}");
        assert!(!copy.exists());
    }
}

#[test]
fn a_symbolic_link_in_place_of_the_cache_directory_is_not_followed() {
    let Some(lab) = Lab::start() else { return };
    let elsewhere = lab.a.home().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o700)).unwrap();
    fs::create_dir_all(lab.a.home().join(".cache")).unwrap();
    // Relative, since the host's /root has another path here.
    symlink("../elsewhere", lab.a.home().join(".cache/kvm-clone")).unwrap();
    sync(&lab);
    assert_eq!(
        fs::read_dir(&elsewhere).unwrap().count(),
        0,
        "the link was followed"
    );
}

#[test]
fn a_symbolic_link_in_place_of_the_agent_is_not_executed() {
    let Some(lab) = Lab::start() else { return };
    sync(&lab);
    let path = deployed(&lab.a);
    let witness = lab.a.home().join("witness");
    let script = lab.a.home().join("script");
    fs::write(&script, "#!/bin/sh\n: >/root/witness\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_file(&path).unwrap();
    symlink("/root/script", &path).unwrap();
    sync(&lab);
    assert!(!witness.exists(), "the planted link was executed");
    assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());
    assert_eq!(fs::read(&script).unwrap(), b"#!/bin/sh\n: >/root/witness\n");
}

#[test]
fn two_controllers_at_once_both_succeed() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    image::write(&source, &[Piece::Random(1, 20 * BLOCK)]);
    let copies = ["one", "two", "three"].map(|name| lab.path(name));
    let start = |copy: &PathBuf| lab.start_disk("sync", Journey::Relay, &source, copy, &[]);
    let running: Vec<_> = copies.iter().map(start).collect();
    for (run, copy) in running.into_iter().zip(&copies) {
        run.wait().expect_code(0);
        image::assert_equal(&source, copy);
    }
    let cache = deployed(&lab.a);
    let rest = fs::read_dir(cache.parent().unwrap()).unwrap().count();
    assert_eq!(
        rest,
        1,
        "temporary files were left beside {}",
        cache.display()
    );
}
