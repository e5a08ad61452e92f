//! The methods that run another program: rsync, and scp by the name of libvirt. What they can, by
//! every way; and what they cannot, refused before anything is changed.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use Piece::{Hole, Random, Zeros};
use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::outcome::assert_sparse;
use nix::sys::signal::Signal;

const METHODS: [&str; 2] = ["rsync", "libvirt"];

/// Data, zeros and holes; the end is in the middle of a block.
fn source(path: &Path) {
    image::write(
        path,
        &[
            Random(3, 3 * MIB),
            Hole(6 * MIB),
            Zeros(MIB),
            Random(4, MIB),
            Hole(2 * MIB),
            Random(5, 5),
        ],
    );
}

#[test]
fn a_first_copy_arrives_whole_and_sparse_by_every_way() {
    let Some(lab) = Lab::start() else { return };
    let from = lab.path("source");
    source(&from);
    for method in METHODS {
        for by in [
            Journey::Direct,
            Journey::Push,
            Journey::Pull,
            Journey::Local,
            Journey::Relay,
        ] {
            let to = lab.path(format!("{method}-{by:?}"));
            let run = lab.disk("sync", by, &from, &to, &["--method", method]);
            if method == "rsync" && by == Journey::Relay {
                run.expect_failure(8, &["missing_requirement"], "rsync");
                assert!(run.stderr.contains("blocksync") && !to.exists(), "{run}");
                continue;
            }
            let result = run.expect_json();
            assert_eq!(
                (&result["method"], &result["verified"]),
                (&method.into(), &"none".into()),
                "{run}"
            );
            assert!(
                by.routes().contains(&result["route"].as_str().unwrap()),
                "{run}"
            );
            assert_eq!(result["bytes_total"], image::length(&from), "{run}");
            assert_eq!(
                result["blocks_changed"],
                serde_json::Value::Null,
                "not known, not invented: {run}"
            );
            image::assert_equal(&from, &to);
            assert_sparse(&from, &to);
            assert!(!lab.path(format!(".{method}-{by:?}.kc-new")).exists());
        }
    }
    lab.wait_until_quiet();
}

#[test]
fn an_existing_destination_is_made_equal_even_where_size_and_time_agree() {
    let Some(lab) = Lab::start() else { return };
    let from = lab.path("source");
    source(&from);
    for method in METHODS {
        let to = lab.path(method);
        fs::copy(&from, &to).unwrap();
        image::overwrite(&to, &[Hole(MIB), Random(9, 4096)]);
        let time = fs::metadata(&from).unwrap().modified().unwrap();
        fs::File::options()
            .write(true)
            .open(&to)
            .unwrap()
            .set_modified(time)
            .unwrap();
        let run = lab.disk("sync", Journey::Direct, &from, &to, &["--method", method]);
        let warnings = run.expect_json()["warnings"].to_string();
        assert!(
            warnings.contains("torn") && warnings.contains("--method blocksync"),
            "{run}"
        );
        image::assert_equal(&from, &to);
        image::write(&to, &[Random(1, 20 * MIB)]);
        lab.disk("sync", Journey::Direct, &from, &to, &["--method", method])
            .expect_code(0);
        image::assert_equal(&from, &to);
    }
}

#[test]
fn rsync_is_taken_up_after_a_kill_and_by_blocksync_as_well() {
    let Some(lab) = Lab::start() else { return };
    let from = lab.path("source");
    image::write(&from, &[Random(3, 24 * MIB)]);
    for second in ["rsync", "blocksync"] {
        let to = lab.path(second);
        let partial = lab.path(format!(".{second}.kc-new"));
        let slow = ["--method", "rsync", "--bandwidth-limit", "4M"];
        let running = lab.start_disk("sync", Journey::Direct, &from, &to, &slow);
        kvm_clone_tests::process::wait_for(
            "data on the way",
            std::time::Duration::from_secs(30),
            || (partial.exists() && image::allocated(&partial) > 4 * MIB).then_some(()),
        );
        running.signal(Signal::SIGKILL);
        drop(running);
        assert!(!to.exists(), "nothing under the final name");
        let run = lab.disk("sync", Journey::Direct, &from, &to, &["--method", second]);
        let result = run.expect_json();
        assert_eq!(result["resumed"], true, "{run}");
        assert!(
            result["bytes_changed"].as_u64().unwrap() < 22 * MIB,
            "what arrived is not shipped again: {run}"
        );
        image::assert_equal(&from, &to);
    }
    lab.wait_until_quiet();
}

#[test]
fn devices_and_links_are_what_they_lead_to() {
    let Some(lab) = Lab::start() else { return };
    let device = lab.device("device", 4 * MIB);
    image::overwrite(device.backing(), &[Random(1, 2 * MIB)]);
    let copy = lab.path("copy");
    lab.disk(
        "sync",
        Journey::Direct,
        device.path(),
        &copy,
        &["--method", "rsync"],
    )
    .expect_code(0);
    assert!(
        fs::symlink_metadata(&copy).unwrap().is_file(),
        "a file, not a device node"
    );
    image::assert_equal(device.backing(), &copy);
    let (from, link) = (lab.path("source"), lab.path("link"));
    source(&from);
    std::os::unix::fs::symlink(&from, &link).unwrap();
    for method in METHODS {
        let to = lab.path(format!("of-link-{method}"));
        lab.disk("sync", Journey::Direct, &link, &to, &["--method", method])
            .expect_code(0);
        assert!(
            fs::symlink_metadata(&to).unwrap().is_file(),
            "a file, not a link"
        );
        image::assert_equal(&from, &to);
        let run = lab.disk(
            "sync",
            Journey::Direct,
            &from,
            device.path(),
            &["--method", method],
        );
        run.expect_failure(8, &["missing_requirement"], method);
        assert!(run.stderr.contains("blocksync"), "{run}");
        let same = lab.disk("sync", Journey::Direct, &from, &link, &["--method", method]);
        same.expect_failure(5, &["refused"], "one and the same");
        let missing = lab.disk(
            "sync",
            Journey::Direct,
            &lab.path("none"),
            &to,
            &["--method", method],
        );
        missing.expect_failure(4, &["not_found"], "none");
    }
    let run = lab.disk(
        "sync",
        Journey::Direct,
        device.path(),
        &lab.path("x"),
        &["--method", "libvirt"],
    );
    run.expect_failure(8, &["missing_requirement"], "libvirt");
}

#[test]
fn a_disk_that_qemu_holds_is_refused_by_every_method_and_read_torn_on_request() {
    let Some(lab) = Lab::start() else { return };
    let from = lab.path("source");
    source(&from);
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&from)
        .unwrap();
    let lock = nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_RDLCK).unwrap(),
        l_whence: 0,
        l_start: 101,
        l_len: 1,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    assert!(file.as_raw_fd() > 0);
    for method in ["rsync", "libvirt", "blocksync"] {
        let to = lab.path(format!("held-{method}"));
        let run = lab.disk("sync", Journey::Direct, &from, &to, &["--method", method]);
        run.expect_failure(5, &["busy"], "source");
        assert!(!to.exists());
        let torn = lab.disk(
            "sync",
            Journey::Direct,
            &from,
            &to,
            &["--method", method, "--live", "torn"],
        );
        assert!(
            torn.expect_json()["warnings"].to_string().contains("torn"),
            "{torn}"
        );
        image::assert_equal(&from, &to);
    }
    let paused = lab.disk(
        "sync",
        Journey::Direct,
        &from,
        &lab.path("x"),
        &["--live", "pause"],
    );
    // There is no libvirt that could know whose disk it is.
    paused.expect_failure(8, &["missing_requirement"], "libvirt");
}

#[test]
fn auto_says_what_it_took_and_why_and_doctor_foretells_it() {
    let Some(lab) = Lab::start() else { return };
    let (from, to) = (lab.path("source"), lab.path("copy"));
    source(&from);
    for reason in ["fastest for a first copy", "older copy"] {
        let result = lab
            .disk("sync", Journey::Direct, &from, &to, &["--method", "auto"])
            .expect_json();
        assert_eq!(result["method"], "blocksync");
        assert!(
            result["method_reason"].as_str().unwrap().contains(reason),
            "{result}"
        );
    }
    let report = lab.controller.run(["doctor", "hvA", "hvB"]).expect_json();
    assert_eq!(report["method"]["method"], "blocksync", "{report}");
    let text = lab
        .controller
        .run_plain([
            "-F".as_ref(),
            lab.controller.ssh_config().as_os_str(),
            "doctor".as_ref(),
            "hvA".as_ref(),
            "hvB".as_ref(),
        ])
        .text();
    assert!(text.lines().last().unwrap().starts_with("method"), "{text}");
}

#[test]
fn odd_names_go_by_rsync_and_scp_refuses_them() {
    let Some(lab) = Lab::start() else { return };
    let from = lab.path("it's a $(touch x) \"disk\" -n");
    source(&from);
    let to = lab.path("to: *new?");
    lab.disk("sync", Journey::Direct, &from, &to, &["--method", "rsync"])
        .expect_code(0);
    image::assert_equal(&from, &to);
    let run = lab.disk(
        "sync",
        Journey::Direct,
        &from,
        &lab.path("y"),
        &["--method", "libvirt"],
    );
    run.expect_failure(8, &["missing_requirement"], "libvirt");
}

#[test]
fn without_a_login_between_the_hosts_rsync_says_so_and_scp_goes_through_here() {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.start();
    // The key with which hvA's root logs in at hvB.
    fs::remove_file(lab.a.home().join(".ssh/id_ed25519")).unwrap();
    let from = lab.path("source");
    source(&from);
    let run = lab.disk(
        "sync",
        Journey::Push,
        &from,
        &lab.path("pushed"),
        &["--method", "rsync"],
    );
    run.expect_code(0);
    let words = |method: &'static str, to: &str| {
        let (from, to) = (
            Journey::Direct.source(&from),
            Journey::Direct.destination(&lab.path(to)),
        );
        lab.controller.run([
            "disk".into(),
            "sync".into(),
            from,
            to,
            "--method".into(),
            method.into(),
        ])
    };
    let refused = words("rsync", "a");
    refused.expect_failure(3, &["auth"], "hvB");
    assert!(refused.stderr.contains("--forward-agent"), "{refused}");
    let relayed = words("libvirt", "b").expect_json();
    assert_eq!(relayed["route"], "relay");
    image::assert_equal(&from, &lab.path("b"));
    assert_eq!(
        words("auto", "c").expect_json()["method_reason"],
        "the source host has no direct way to the destination host"
    );
}

#[test]
fn what_lies_under_the_temporary_name_is_taken_up_only_if_a_run_has_left_it() {
    let Some(lab) = Lab::start() else { return };
    let (from, victim) = (lab.path("source"), lab.path("victim"));
    source(&from);
    fs::write(&victim, b"somebody's").unwrap();
    for method in METHODS {
        let sync = |to: &Path| lab.disk("sync", Journey::Direct, &from, to, &["--method", method]);
        let partial = |name: &str| lab.path(format!(".{name}-{method}.kc-new"));
        let to = |name: &str| lab.path(format!("{name}-{method}"));
        std::os::unix::fs::symlink(&victim, partial("link")).unwrap();
        fs::hard_link(&victim, partial("second-name")).unwrap();
        for name in ["link", "second-name"] {
            sync(&to(name)).expect_failure(5, &["refused"], "kc-new");
            assert!(!to(name).exists());
        }
        fs::write(partial("held"), b"").unwrap();
        let held = fs::File::options()
            .read(true)
            .write(true)
            .open(partial("held"))
            .unwrap();
        let lock = nix::libc::flock {
            l_type: i16::try_from(nix::libc::F_WRLCK).unwrap(),
            l_whence: 0,
            l_start: 201,
            l_len: 1,
            l_pid: 0,
        };
        nix::fcntl::fcntl(&held, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        sync(&to("held")).expect_failure(5, &["busy"], "held");
        drop(held);
        sync(&to("held")).expect_code(0);
    }
    assert_eq!(fs::read(&victim).unwrap(), b"somebody's");
    // A harmless name that leads to one that an old scp would hand to a shell.
    let odd = lab.path("$(touch pwned)");
    fs::create_dir(&odd).unwrap();
    fs::copy(&from, odd.join("disk")).unwrap();
    std::os::unix::fs::symlink(odd.join("disk"), lab.path("plain")).unwrap();
    let run = lab.disk(
        "sync",
        Journey::Direct,
        &lab.path("plain"),
        &lab.path("copy"),
        &["--method", "libvirt"],
    );
    run.expect_failure(8, &["missing_requirement"], "libvirt");
}

#[test]
fn a_source_that_changes_while_it_is_read_is_no_success() {
    let Some(lab) = Lab::start() else { return };
    let from = lab.path("source");
    image::write(&from, &[Random(3, 12 * MIB)]);
    for method in METHODS {
        let (to, partial) = (lab.path(method), lab.path(format!(".{method}.kc-new")));
        let slow = ["--method", method, "--bandwidth-limit", "4M"];
        let running = lab.start_disk("sync", Journey::Direct, &from, &to, &slow);
        kvm_clone_tests::process::wait_for(
            "data on the way",
            std::time::Duration::from_secs(30),
            || (partial.exists() && image::allocated(&partial) > MIB).then_some(()),
        );
        image::overwrite(&from, &[Piece::Byte(1)]);
        running.wait().expect_failure(1, &["io"], "source");
        assert!(!to.exists(), "nothing under the final name");
    }
}
