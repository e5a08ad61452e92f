//! Builds of different ages: agents and controllers that speak protocol version 2 alone, with those of
//! today.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use kvm_clone_tests::controller::Controller;
use kvm_clone_tests::hypervisor::{Vm, set_mark};
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::{Journey, on};
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::older;
use kvm_clone_tests::process::wait_for;
use kvm_clone_tests::replication::Replication;

/// Has a host start the older agent for every login.
fn install_older(lab: &Lab, host: &str) {
    // Under a name by which processes are known as agents.
    let agent = lab.path("kvm-clone/agent-of-version-2");
    fs::create_dir_all(agent.parent().unwrap()).unwrap();
    fs::copy(older::agent(), &agent).unwrap();
    let (host, other) = match host {
        "hvA" => (&lab.a, "hvB"),
        _ => (&lab.b, "hvA"),
    };
    host.force("controller", &format!("{} serve --dial", agent.display()));
    host.force(other, &format!("{} attach", agent.display()));
}

#[test]
fn an_older_agent_and_one_of_today_speak_the_older_version() {
    for older in ["hvA", "hvB"] {
        let Some(lab) = Lab::start() else { return };
        install_older(&lab, older);
        let status = lab.controller.run(["agent", "status", older]).expect_json();
        let agent = &status["hosts"][0];
        assert_eq!(
            (&agent["protocol_min"], &agent["protocol_max"]),
            (&2.into(), &2.into())
        );
        assert_eq!(agent["digest_matches"], false);

        let source = lab.path("source");
        image::write(
            &source,
            &[
                Piece::Random(1, 20 * BLOCK),
                Piece::Hole(MIB),
                Piece::Random(2, 5),
            ],
        );
        for by in [Journey::Direct, Journey::Relay] {
            let copy = lab.path(format!("copy-{by:?}"));
            let first = lab.sync(by, &source, &copy, &[]);
            assert_eq!(first.json["protocol_version"], 2, "{}", first.run);
            let builds = [
                &first.json["agent_source"],
                &first.json["agent_destination"],
            ];
            assert_ne!(builds[0]["digest"], builds[1]["digest"], "{}", first.run);
            image::overwrite(&copy, &[Piece::Random(3, BLOCK)]);
            lab.disk("verify", by, &source, &copy, &[]).expect_code(7);
            let again = lab.sync(by, &source, &copy, &["--verify", "reread"]);
            assert_eq!(again.number("blocks_changed"), 1, "{}", again.run);
        }
    }
}

/// A controller of before, at home elsewhere.
fn older_controller(lab: &Lab) -> Controller {
    let config = lab.controller.ssh_config().to_owned();
    Controller::new(lab.path("older"), config).program(older::controller())
}

#[test]
fn controllers_of_both_versions_work_on_the_same_hosts_in_turn() {
    let Some(lab) = Lab::start() else { return };
    let older = older_controller(&lab);
    let version = older.run_plain(["--version"]).text();
    assert!(version.contains("\nprotocol 2\n"), "{version}");
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 40 * BLOCK)]);
    let mut agents = Vec::new();
    for (turn, (controller, protocol)) in [(&older, 2), (&lab.controller, 3)]
        .repeat(2)
        .into_iter()
        .enumerate()
    {
        let seed = 10 + u64::try_from(turn).unwrap();
        image::overwrite(&source, &[Piece::Random(seed, BLOCK)]);
        let words = [
            "disk".into(),
            "sync".into(),
            on("hvA", &source),
            on("hvB", &copy),
        ];
        let run = controller.run(words);
        let result = run.expect_json();
        image::assert_equal(&source, &copy);
        assert_eq!(result["protocol_version"], protocol, "{run}");
        let changed = if turn == 0 { 40 } else { 1 };
        assert_eq!(result["blocks_changed"], changed, "{run}");
        agents.push(result["agent_destination"]["digest"].clone());
    }
    assert_eq!(agents[0], agents[2], "each finds its own again");
    assert_eq!(agents[1], agents[3], "each finds its own again");
    assert_ne!(agents[0], agents[1]);
    let cache = lab.b.home().join(".cache/kvm-clone");
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 2);
    let removed = lab.controller.run(["agent", "remove", "--old", "hvB"]);
    let _ = removed.expect_json();
    let left: Vec<_> = fs::read_dir(&cache)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        left.len() == 1
            && left[0]
                .to_str()
                .unwrap()
                .ends_with(agents[1].as_str().unwrap()),
        "{left:?}"
    );
}

#[test]
fn what_one_version_began_the_other_takes_up() {
    let Some(lab) = Lab::start() else { return };
    let older = older_controller(&lab);
    let source = lab.path("source");
    image::write(&source, &[Piece::Random(1, 32 * MIB)]);
    for (name, began, ends) in [
        ("forward", &older, &lab.controller),
        ("back", &lab.controller, &older),
    ] {
        let directory = lab.path(name);
        fs::create_dir(&directory).unwrap();
        let copy = directory.join("copy");
        image::write(&copy, &[Piece::Random(2, 32 * MIB)]);
        let words = |more: &[&str]| {
            let fixed = [
                "disk".into(),
                "sync".into(),
                on("hvA", &source),
                on("hvB", &copy),
            ];
            let more = more.iter().map(Into::into).collect();
            [fixed.to_vec(), more].concat()
        };
        let running = began.start(words(&["--apply", "staged", "--bandwidth-limit", "8M"]));
        wait_for("half of it", Duration::from_secs(60), || {
            (staged(&directory) >= 16 * MIB).then_some(())
        });
        running.signal(nix::sys::signal::Signal::SIGKILL);
        assert_ne!(running.wait().code(), Some(0));
        lab.wait_until_quiet();
        let run = ends.run(words(&["--apply", "staged"]));
        let result = run.expect_json();
        assert_eq!(result["resumed"], true, "{run}");
        assert!(result["bytes_wire"].as_u64().unwrap() < 24 * MIB, "{run}");
        image::assert_equal(&source, &copy);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "{name}");
    }
}

/// Bytes that lie beside a disk.
fn staged(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let ours = entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"."));
    let sizes = ours.map(|entry| image::data_bytes(&entry.path()));
    sizes.max().unwrap_or(0)
}

#[test]
fn what_an_older_agent_cannot_do_is_told_before_anything_changes() {
    let policy = "vms = [\"web\"]\nevery = \"1h\"\nrpo = \"2h\"\n";
    let Some(shop) = Replication::start([Kind::Ext4, Kind::Ext4], policy) else {
        return;
    };
    shop.site
        .define(&shop.site.a, &Vm::new("web").disks(&[("vda", "raw")]));
    assert_eq!(shop.run_vm()["success"], true);
    let disk = shop.site.a.image("web-vda.raw");
    set_mark(&disk, "two");
    let agent = shop.site.controller.home().join("agent-of-version-2");
    fs::copy(older::agent(), &agent).unwrap();
    let agent = agent.to_str().unwrap();
    // A point that stands on another, and a digest of one: version 3 has messages for them.
    for words in [["run", "shop"], ["verify", "shop"]] {
        let before = (shop.points("web"), shop.site.b.image_names());
        let run = shop.run(&[&words[..], &["--agent-path", agent]].concat());
        run.expect_code(8);
        assert!(
            run.text()
                .contains("speaks protocol version 2; this takes version 3"),
            "{run}"
        );
        assert_eq!((shop.points("web"), shop.site.b.image_names()), before);
    }
    assert_eq!(shop.run_vm()["success"], true);
    assert_eq!(shop.points("web").len(), 2);
}
