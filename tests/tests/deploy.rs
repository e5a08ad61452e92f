//! How the agent gets to a host: once, whole, and only into a place that nobody else can write to.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvm_clone_tests::controller::Run;
use kvm_clone_tests::host::Host;
use kvm_clone_tests::image::{self, BLOCK, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::process::wait_for;

/// Another user of the host.
const MALLORY: u32 = 65_534;

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

/// The names in a directory, sorted.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Makes a directory of another user's.
fn plant(directory: &Path, mode: u32) {
    fs::create_dir_all(directory).unwrap();
    chown(directory, Some(MALLORY), Some(MALLORY)).unwrap();
    fs::set_permissions(directory, fs::Permissions::from_mode(mode)).unwrap();
}

/// Claims that a directory of another user's is as it was planted.
fn assert_untouched(directory: &Path, mode: u32) {
    let metadata = fs::metadata(directory).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, mode);
    assert_eq!(metadata.uid(), MALLORY);
    assert_eq!(names_in(directory), [""; 0]);
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
fn an_altered_agent_that_runs_is_told_by_its_digest_and_replaced() {
    let Some(lab) = Lab::start() else { return };
    let copied = agent(&lab, "deploy").expect_json();
    assert_eq!(copied["hosts"][0]["state"], "copied");
    let path = deployed(&lab.a);
    let good = fs::read(&path).unwrap();
    // One letter of a text that it never says.
    let text = b"what to do is missing";
    let at = good.windows(text.len()).position(|bytes| bytes == text);
    let mut bytes = good.clone();
    bytes[at.unwrap()] ^= 1;
    fs::write(&path, bytes).unwrap();

    let status = agent(&lab, "status");
    let error = "is not the one that this program carries";
    assert_eq!(status.code(), Some(9), "{status}");
    assert!(status.stderr.contains(error), "{status}");
    let deploy = agent(&lab, "deploy");
    assert_eq!(deploy.expect_json()["hosts"][0]["state"], "copied");
    assert!(deploy.stderr.contains(error), "{deploy}");
    assert!(fs::read(deployed(&lab.a)).unwrap() == good);
    let found = agent(&lab, "deploy").expect_json();
    assert_eq!(found["hosts"][0]["state"], "found");
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
    a_spoilt_agent_is_replaced(|path| put_in_its_place(path, "exit 0"));
}

/// ssh ends with the same as for a host that it does not reach.
#[test]
fn what_a_signal_ends_in_its_place_is_replaced() {
    a_spoilt_agent_is_replaced(|path| put_in_its_place(path, "kill -SEGV $$"));
}

fn put_in_its_place(path: &Path, command: &str) {
    let size = usize::try_from(fs::metadata(path).unwrap().len()).unwrap();
    let mut script = format!("#!/bin/sh\n{command}\n").into_bytes();
    script.resize(size, b'#');
    fs::write(path, script).unwrap();
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
fn a_cache_directory_of_another_users_is_left_alone_and_the_next_taken() {
    for mode in [0o700, 0o777] {
        let Some(lab) = Lab::start() else { return };
        let planted = lab.a.home().join(".cache/kvm-clone");
        plant(&planted, mode);
        let deploy = agent(&lab, "deploy").expect_json();
        let path = deploy["hosts"][0]["path"].as_str().unwrap();
        assert!(path.starts_with("/var/tmp/kvm-clone-0/kvm-clone/agent-"));
        assert_untouched(&planted, mode);
        sync(&lab);
        assert_untouched(&planted, mode);
        assert_eq!(agents_in(&lab.a.var_tmp().join("kvm-clone-0")).len(), 1);
        let removed = agent(&lab, "remove").expect_json();
        assert_eq!(removed["hosts"][0]["kept"][0], "/root/.cache/kvm-clone");
        assert_untouched(&planted, mode);
        assert!(!lab.a.var_tmp().join("kvm-clone-0").exists());
    }
}

#[test]
fn where_others_can_put_another_directory_in_its_place_the_agent_is_not_used() {
    let Some(lab) = Lab::start() else { return };
    sync(&lab);
    let path = deployed(&lab.a);
    let cache = lab.a.home().join(".cache");
    let spoils: [&dyn Fn(); 3] = [
        &|| fs::set_permissions(&cache, fs::Permissions::from_mode(0o770)).unwrap(),
        &|| fs::set_permissions(&cache, fs::Permissions::from_mode(0o707)).unwrap(),
        &|| chown(&cache, Some(MALLORY), None).unwrap(),
    ];
    for spoil in spoils {
        chown(&cache, Some(0), None).unwrap();
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o700)).unwrap();
        let found = agent(&lab, "status").expect_json();
        assert_eq!(found["hosts"][0]["state"], "found");
        spoil();
        let deploy = agent(&lab, "deploy").expect_json();
        assert_eq!(deploy["hosts"][0]["state"], "copied", "{deploy}");
        let taken = deploy["hosts"][0]["path"].as_str().unwrap();
        assert!(taken.starts_with("/var/tmp/"), "{taken}");
        fs::remove_dir_all(lab.a.var_tmp().join("kvm-clone-0")).unwrap();
    }
    assert!(path.exists());
}

#[test]
fn what_others_planted_under_shared_directories_is_refused_by_name() {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec
        .host_a(|host| host.setup("chmod 1777 /var/tmp /dev/shm"))
        .start();
    // No cache at home.
    fs::write(lab.a.home().join(".cache"), b"").unwrap();
    let elsewhere = lab.a.home().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o700)).unwrap();
    let link = lab.a.var_tmp().join("kvm-clone-0");
    symlink("/root/elsewhere", &link).unwrap();
    lchown(&link, Some(MALLORY), Some(MALLORY)).unwrap();
    let planted = lab.a.shm().join("kvm-clone-0");
    plant(&planted, 0o777);

    let deploy = agent(&lab, "deploy");
    assert_eq!(deploy.code(), Some(8), "{deploy}");
    for named in [
        "no directory on hvA takes the agent",
        "/root/.cache: cannot be made",
        "/var/tmp/kvm-clone-0: is not safe from other users",
        "/dev/shm/kvm-clone-0: is not safe from other users",
    ] {
        assert!(deploy.stderr.contains(named), "{named} in {deploy}");
    }
    assert_eq!(names_in(&elsewhere), [""; 0]);
    assert_untouched(&planted, 0o777);

    // A link of the login's own is not followed there either: its name is everybody's to guess.
    lchown(&link, Some(0), Some(0)).unwrap();
    fs::remove_dir(&planted).unwrap();
    let deploy = agent(&lab, "deploy").expect_json();
    let path = deploy["hosts"][0]["path"].as_str().unwrap();
    assert!(path.starts_with("/dev/shm/kvm-clone-0/kvm-clone/agent-"));
    assert_eq!(names_in(&elsewhere), [""; 0]);
}

#[test]
fn a_link_that_another_user_planted_on_the_way_to_the_cache_is_not_followed() {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec
        .host_a(|host| {
            host.bashrc("export XDG_CACHE_HOME=/var/tmp/way/cache\n")
                .setup("chmod 1777 /var/tmp")
        })
        .start();
    let elsewhere = lab.a.home().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let link = lab.a.var_tmp().join("way");
    symlink("/root/elsewhere", &link).unwrap();
    lchown(&link, Some(MALLORY), Some(MALLORY)).unwrap();
    sync(&lab);
    assert_eq!(names_in(&elsewhere), [""; 0]);
    let _ = deployed(&lab.a);

    // One of the login's own is.
    lchown(&link, Some(0), Some(0)).unwrap();
    agent(&lab, "remove").expect_code(0);
    let deploy = agent(&lab, "deploy").expect_json();
    let path = deploy["hosts"][0]["path"].as_str().unwrap();
    assert!(path.starts_with("/root/elsewhere/cache/kvm-clone/agent-"));
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

#[test]
fn controllers_that_deploy_to_a_fresh_host_at_once_all_succeed() {
    const ROUNDS: usize = 6;
    let Some(lab) = Lab::start() else { return };
    for round in 0..ROUNDS {
        let deploy = || lab.controller.start(["agent", "deploy", "hvA"]);
        let running = [deploy(), deploy(), deploy()];
        for run in running {
            let answer = run.wait().expect_json();
            let host = &answer["hosts"][0];
            assert_eq!(host["digest_matches"], true, "round {round}: {answer}");
        }
        let directory = deployed(&lab.a).parent().unwrap().to_owned();
        assert_eq!(names_in(&directory).len(), 1, "round {round}");
        agent(&lab, "remove").expect_code(0);
        assert!(!directory.exists());
    }
}

#[test]
fn removing_old_agents_keeps_the_one_in_use_and_uploads_under_way() {
    let Some(lab) = Lab::start() else { return };
    agent(&lab, "deploy").expect_code(0);
    let path = deployed(&lab.a);
    let before = identity(&path);
    let current = path.file_name().unwrap().to_str().unwrap();
    let directory = path.parent().unwrap();
    let other_digest = format!("{}g", &current[..current.len() - 1]);
    let longer = format!("{current}0");
    let old_ones = [
        ".agent.0123456789abcdef0123456789abcdef",
        ".agent.1700000000.0123456789abcdef0123456789abcdef",
        "agent-0.0.9-0123456789abcdef",
        &other_digest,
        &longer,
    ];
    for name in old_ones {
        fs::copy(&path, directory.join(name)).unwrap();
    }
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let young = format!(".agent.{}.0f", now - 60);
    for name in [young.as_str(), "mine"] {
        fs::write(directory.join(name), b"").unwrap();
    }
    // Elsewhere too, as when the home has been full for a while.
    let other = lab.a.var_tmp().join("kvm-clone-0/kvm-clone");
    fs::create_dir_all(&other).unwrap();
    for directory in [other.parent().unwrap(), &other] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::write(other.join("agent-0.0.8-0123456789abcdef"), b"").unwrap();

    let remove = || lab.controller.run(["agent", "remove", "--old", "hvA"]);
    let answer = remove().expect_json();
    assert_eq!(answer["operation"], "agent-remove");
    let removed = answer["hosts"][0]["removed"].as_array().unwrap();
    assert_eq!(removed.len(), old_ones.len() + 1, "{answer}");
    assert_eq!(answer["hosts"][0]["kept"].as_array().unwrap().len(), 0);
    assert_eq!(names_in(directory), [young.as_str(), current, "mine"]);
    assert_eq!(names_in(&other), [""; 0]);

    let again = remove().expect_json();
    assert_eq!(again["hosts"][0]["removed"].as_array().unwrap().len(), 0);
    assert_eq!(identity(&path), before);
    let found = agent(&lab, "deploy").expect_json();
    assert_eq!(found["hosts"][0]["state"], "found");
}

#[test]
fn an_agent_that_runs_does_not_miss_its_file() {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 64 * BLOCK)]);
    // Ten seconds, in the middle of which the agents are removed.
    let limit = ["--bandwidth-limit", "400K"];
    let mut run = lab.start_disk("sync", Journey::Relay, &source, &copy, &limit);
    let partial = lab.path(".copy.kc-new");
    wait_for("data at the destination", Duration::from_secs(30), || {
        let metadata = fs::metadata(&partial).ok()?;
        (metadata.blocks() > 0).then_some(())
    });
    for host in ["hvA", "hvB"] {
        let removed = lab.controller.run(["agent", "remove", host]).expect_json();
        assert_eq!(removed["hosts"][0]["removed"].as_array().unwrap().len(), 1);
    }
    assert!(run.is_alive(), "it ended before the agents were removed");
    run.wait().expect_code(0);
    image::assert_equal(&source, &copy);
}
