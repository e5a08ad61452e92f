//! Hosts whose authorized_keys start an agent for every login and let it run nothing else.

use std::ffi::OsString;

use kvm_clone_tests::image::{self, BLOCK, Piece};
use kvm_clone_tests::journey::{Journey, on};
use kvm_clone_tests::lab::Lab;

/// A laboratory, and the commands that its hosts can force: for who controls, and for who brings
/// data.
fn start() -> Option<(Lab, String, String)> {
    let lab = Lab::start()?;
    let agent = lab.install_agent();
    let serve = format!("{agent} serve --allow {} --dial", lab.path("").display());
    Some((lab, serve, format!("{agent} attach")))
}

/// Both hosts force an agent on everybody.
fn start_forced() -> Option<Lab> {
    let (lab, serve, attach) = start()?;
    for host in [&lab.a, &lab.b] {
        host.force("controller", &serve);
        host.force("hvA", &attach);
        host.force("hvB", &attach);
    }
    Some(lab)
}

#[test]
fn a_disk_is_synced_by_every_route_and_nothing_is_left_on_the_hosts() {
    let Some(lab) = start_forced() else { return };
    let source = lab.path("source");
    image::write(&source, &[Piece::Random(1, 20 * BLOCK + 5)]);
    for by in [
        Journey::Direct,
        Journey::Relay,
        Journey::Pull,
        Journey::Push,
    ] {
        let copy = lab.path(format!("copy-{by:?}"));
        lab.sync(by, &source, &copy, &[]);
        // Once more onto what is there, by a method that the program chooses.
        let auto = lab.disk("sync", by, &source, &copy, &["--method", "auto"]);
        let result = auto.expect_json();
        assert_eq!(result["method"], "blocksync", "{result}");
        let reason = result["method_reason"].as_str().unwrap();
        assert!(reason.contains("starts an agent"), "{reason}");
    }
    for host in [&lab.a, &lab.b] {
        assert!(!host.home().join(".cache/kvm-clone").exists());
    }
    lab.wait_until_quiet();
}

#[test]
fn where_only_one_key_is_forced_some_route_is_found() {
    // The source host's key alone: what it asks for by a path is what it gets.
    for (owner, route) in [("hvA", "direct"), ("controller", "relay")] {
        let Some((lab, serve, attach)) = start() else {
            return;
        };
        let command = if owner == "hvA" { attach } else { serve };
        let (source, copy) = (lab.path("source"), lab.path("copy"));
        image::write(&source, &[Piece::Random(1, 20 * BLOCK + 5)]);
        lab.b.force(owner, &command);
        let disks = [on("hvA", &source), on("hvB", &copy)];
        let args = ["disk", "sync"].map(OsString::from).into_iter();
        let result = lab.controller.run(args.chain(disks)).expect_json();
        assert_eq!(result["route"], route, "{result}");
        image::assert_equal(&source, &copy);
    }
}

#[test]
fn status_and_deploy_show_that_the_agent_is_forced() {
    let Some(lab) = start_forced() else { return };
    for verb in ["status", "deploy"] {
        let answer = lab.controller.run(["agent", verb, "hvA"]).expect_json();
        let agent = &answer["hosts"][0];
        assert_eq!(agent["state"], "forced", "{answer}");
        assert!(agent["path"].is_null() && agent["digest_matches"] == true);
    }
    assert!(!lab.a.home().join(".cache/kvm-clone").exists());
}

#[test]
fn what_needs_commands_says_that_there_are_none() {
    let Some(lab) = start_forced() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, BLOCK)]);
    let path = lab.path("installed");
    let runs = [
        lab.controller.run(["agent", "remove", "hvA"]),
        lab.controller.run(["agent", "remove", "--old", "hvA"]),
        lab.controller
            .run(["agent", "install", "hvA", "--path", path.to_str().unwrap()]),
        lab.controller.run(["doctor", "hvA"]),
        lab.controller.run(["list", "hvA"]),
        lab.controller.run(["clone", "hvA", "hvB", "web"]),
        lab.disk(
            "sync",
            Journey::Direct,
            &source,
            &copy,
            &["--method", "rsync"],
        ),
    ];
    for run in runs {
        assert_eq!(run.code(), Some(8), "{run}");
        for error in ["the login on hv", " starts an agent and runs no commands"] {
            assert!(run.stderr.contains(error), "{run}");
        }
        assert!(run.stderr.contains("authorized_keys"), "{run}");
    }
    assert!(!copy.exists());
}
