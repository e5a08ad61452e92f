//! What broken runs leave on a hypervisor besides disks, and what ends it: the next run, or
//! `recover`.

use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use kvm_clone_tests::controller::{Run, Running};
use kvm_clone_tests::hypervisor::{Hypervisor, Site, SiteSpec, Vm, set_mark};
use kvm_clone_tests::process::wait_for;
use nix::sys::signal::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// What `recover` found on the one host that it was asked about.
fn found(run: &Run) -> Vec<Value> {
    let found = &run.json()["hosts"][0]["found"];
    found.as_array().unwrap_or_else(|| panic!("{run}")).clone()
}

/// Claims that this, and nothing else, was found of VMs and clones.
fn expect_found(run: &Run, kind: &str, name: &str, state: &str) {
    let mut found = found(run);
    found.retain(|found| found["kind"] != "disk");
    assert_eq!(found.len(), 1, "{run}");
    for (field, value) in [("kind", kind), ("name", name), ("state", state)] {
        assert_eq!(found[0][field], value, "{field} in {run}");
    }
}

/// Has a program of the host stop, when its words are such.
fn stop(on: &Hypervisor, program: &str, words: &str) {
    let does = "touch /tmp/stopped; exec sleep 61234";
    on.instead(program, words, does);
}

fn wait_for_stop(on: &Hypervisor) {
    let stopped = || on.exec(&["test", "-e", "/tmp/stopped"]).status.success();
    wait_for("the program that stops", PATIENCE, || {
        stopped().then_some(())
    });
}

/// The end of that, and of the one that stopped.
fn go_on(on: &Hypervisor, program: &str) {
    on.as_ever(program);
    on.run(&["rm", "/tmp/stopped"]);
    let _ = on.exec(&["pkill", "-9", "-f", "[s]leep 61234"]);
}

fn killed(running: Running) {
    running.signal(Signal::SIGKILL);
    drop(running);
}

/// A VM on hvA whose disk stands on another image, and its clone on hvB, under other names.
fn site_with_an_overlay() -> Option<Site> {
    let site = Site::start()?;
    site.define(&site.a, &Vm::new("lay").disks(&[("vda", "qcow2")]));
    site.a.run(&[
        "sh",
        "-c",
        "cd /var/lib/libvirt/images; mv lay-vda.qcow2 lay-base.qcow2; \
         qemu-img create -q -f qcow2 -F qcow2 -b /var/lib/libvirt/images/lay-base.qcow2 lay-vda.qcow2",
    ]);
    let words = ["clone", "hvA", "hvB", "lay", "--new-name", "l2"];
    let words = words.iter().chain(&["--method", "blocksync"]);
    site.controller.run(words).expect_code(0);
    Some(site)
}

#[test]
fn a_sync_that_breaks_off_before_a_reference_is_restored_is_ended_by_recover_or_the_next() {
    let Some(site) = site_with_an_overlay() else {
        return;
    };
    let sync = |method: &str| {
        let words = ["sync", "hvA", "hvB", "lay", "--target-name", "l2"];
        let options = ["--method", method];
        site.controller.start(words.iter().chain(&options))
    };
    let top = "/var/lib/libvirt/images/l2-vda.qcow2";
    let info = |options: &str| {
        let words = format!("qemu-img info {options} {top}");
        site.b.run(&["sh", "-c", &words])
    };
    let write = |pattern: &str| {
        let command = format!("write -q -P {pattern} 1M 64k");
        let image = "/var/lib/libvirt/images/lay-vda.qcow2";
        site.a.run(&["qemu-io", "-c", &command, image]);
    };
    for (pattern, method, by_recover) in [
        ("1", "blocksync", false),
        ("2", "blocksync", true),
        ("3", "rsync", false),
        ("4", "rsync", true),
    ] {
        write(pattern);
        stop(&site.b, "qemu-img", "rebase*");
        let running = sync(method);
        wait_for_stop(&site.b);
        killed(running);
        go_on(&site.b, "qemu-img");
        assert!(info("").contains("/lay-base.qcow2"), "{}", info(""));
        if by_recover {
            let dry = site.controller.run(["recover", "hvB", "--dry-run"]);
            expect_found(dry.expect_code(0), "vm", "l2", "waiting");
            assert!(info("").contains("/lay-base.qcow2"), "{dry}");
            let run = site.controller.run(["recover", "hvB"]);
            // What rsync writes in place may be a mixture.
            let state = if method == "rsync" {
                "waiting"
            } else {
                "finished"
            };
            expect_found(run.expect_code(0), "vm", "l2", state);
            assert!(found(&run)[0]["note"].to_string().contains(top), "{run}");
            assert!(info("--backing-chain").contains("/l2-base.qcow2"), "{run}");
        }
        if (method, by_recover) == ("blocksync", true) {
            let before = std::fs::metadata(site.b.image("l2-vda.qcow2")).unwrap();
            site.b.run(&["touch", top]);
            sync(method)
                .wait()
                .expect_failure(5, &["refused"], "written since");
            let mut writing = std::fs::File::options();
            let file = writing.write(true).open(site.b.image("l2-vda.qcow2"));
            let file = file.unwrap();
            file.set_modified(before.modified().unwrap()).unwrap();
            drop(file);
        }
        let next = sync(method).wait();
        let told = next.expect_json()["warnings"].to_string();
        assert_eq!(told.contains("its own again"), !by_recover, "{next}");
        assert!(info("--backing-chain").contains("/l2-base.qcow2"), "{next}");
        let words = ["verify", "hvA", "hvB", "lay", "--target-name", "l2"];
        site.controller.run(words).expect_code(0);
        assert!(found(&site.controller.run(["recover", "hvB"])).is_empty());
    }
    site.b.assert_tidy();
}

#[test]
fn a_sync_that_breaks_off_before_its_commit_has_changed_nothing_and_what_others_write_is_seen() {
    let Some(site) = Site::start() else { return };
    site.define(
        &site.a,
        &Vm::new("web").disks(&[("vda", "raw"), ("vdb", "raw")]),
    );
    let run = |words: &[&str]| site.controller.run(words);
    run(&["clone", "hvA", "hvB", "web", "--method", "blocksync"]).expect_code(0);
    let sync = ["sync", "hvA", "hvB", "web", "--method", "blocksync"];
    kvm_clone_tests::image::change_blocks(&site.a.image("web-vdb.raw"), 2, 9);
    let before = site.b.state();
    let slow = ["--bandwidth-limit", "1M"];
    let running = site.controller.start(sync.iter().chain(&slow));
    let stage = site.b.image(".web-vdb.raw.kc-stage");
    wait_for("data on the way", PATIENCE, || {
        (stage.metadata().ok()?.blocks() > 1024).then_some(())
    });
    let second = run(&sync);
    second.expect_failure(5, &["busy"], "web");
    killed(running);
    wait_for("the end of the agent", PATIENCE, || {
        site.b.agents().is_empty().then_some(())
    });
    let disks = |state: String| -> Vec<String> {
        let others = [".web-", "kvm-clone/runs"];
        let lines = state
            .lines()
            .filter(|line| others.iter().all(|other| !line.contains(other)));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(disks(site.b.state()), disks(before));
    set_mark(&site.b.image("web-vdb.raw"), "its own way");
    run(&sync).expect_failure(5, &["refused"], "written since");
    let overwrite = run(&[&sync[..], &["--overwrite", "--checkpoint"]].concat());
    assert_eq!(
        overwrite.expect_json()["checkpoints"]
            .as_array()
            .map(Vec::len),
        Some(2)
    );
    run(&["verify", "hvA", "hvB", "web"]).expect_code(0);
    site.b.assert_tidy();
}

#[test]
fn checkpoints_and_lineage_follow_disks_that_are_replaced_by_reflink_copies() {
    let Some(site) = Site::start() else { return };
    site.define(
        &site.b,
        &Vm::new("web").disks(&[("vda", "raw"), ("vdb", "raw")]),
    );
    let run = |words: &[&str]| site.controller.run(words);
    run(&["clone", "hvB", "hvA", "web", "--method", "blocksync"]).expect_code(0);
    let source = site.b.image("web-vdb.raw");
    let copy = site.a.image("web-vdb.raw");
    let mut held = Vec::new();
    for mark in ["one", "two", "three"] {
        held.push(std::fs::read(&copy).unwrap());
        set_mark(&source, mark);
        let inode = copy.metadata().unwrap().ino();
        let words = ["sync", "hvB", "hvA", "web", "--method", "blocksync"];
        let result = run(&[&words[..], &["--checkpoint", "--keep", "2"]].concat());
        assert_eq!(
            result.expect_json()["disks"][1]["apply"],
            "reflink",
            "{result}"
        );
        assert_ne!(copy.metadata().unwrap().ino(), inode, "{result}");
        kvm_clone_tests::image::assert_equal(&source, &copy);
    }
    let mut kept = site.a.image_names();
    kept.retain(|name| name.starts_with("web-vdb.raw.kc-checkpoint-"));
    kept.sort();
    let kept: Vec<_> = kept
        .iter()
        .map(|name| std::fs::read(site.a.image(name)).unwrap())
        .collect();
    assert!(kept == held[1..], "the two newest states are kept");
    site.a.assert_tidy();
}

#[test]
fn a_clone_that_was_killed_is_kept_or_removed_by_recover_and_left_alone_while_it_runs() {
    let Some(site) = Site::start() else { return };
    site.define(
        &site.a,
        &Vm::new("big").disks(&[("vda", "raw"), ("vdb", "raw")]),
    );
    let recover = |options: &[&str]| {
        let words = ["recover", "hvB"];
        site.controller.run(words.iter().chain(options))
    };
    for method in ["blocksync", "rsync"] {
        let words = ["clone", "hvA", "hvB", "big", "--new-name", "b2"];
        let options = ["--method", method, "--bandwidth-limit", "4M"];
        let running = site.controller.start(words.iter().chain(&options));
        let partial = site.b.image(".b2-vdb.raw.kc-new");
        wait_for("data on the way", PATIENCE, || {
            (partial.metadata().ok()?.blocks() > 2048).then_some(())
        });
        expect_found(recover(&[]).expect_code(0), "clone", "b2", "running");
        assert!(partial.exists());
        killed(running);
        // The programs on the hosts take a moment to see that they are alone.
        let is_left = || {
            let run = recover(&["--keep"]);
            let mut found = found(&run);
            found.retain(|found| found["state"] == "running");
            found.is_empty().then_some(run)
        };
        let kept = wait_for("the end of the run", PATIENCE, is_left);
        expect_found(kept.expect_code(0), "clone", "b2", "waiting");
        assert!(partial.exists(), "{kept}");
        let doctor = site.controller.run(["doctor", "hvB"]);
        assert!(
            doctor.text().contains("kvm-clone-ctl recover hvB"),
            "{doctor}"
        );
        let removed = recover(&[]);
        expect_found(removed.expect_code(0), "clone", "b2", "rolled_back");
        assert_eq!(site.b.image_names(), [""; 0], "{removed}");
        assert!(found(&recover(&[])).is_empty());
        site.b.assert_tidy();
    }
}

#[test]
fn a_vm_that_was_left_suspended_is_resumed_by_recover_and_by_nobody_while_it_is_read() {
    let Some(site) = Site::with(&SiteSpec::without_reflinks()) else {
        return;
    };
    site.define(&site.a, &Vm::new("live"));
    site.a.virsh(&["start", "live"]);
    let state = || site.a.virsh(&["domstate", "live"]).trim().to_owned();
    let words = ["clone", "hvA", "hvB", "live", "--new-name", "l2"];
    let words = words
        .iter()
        .chain(&["--method", "blocksync", "--live", "pause"]);
    let running = site
        .controller
        .start(words.clone().chain(&["--bandwidth-limit", "1M"]));
    wait_for("the suspension", PATIENCE, || {
        (state() == "paused").then_some(())
    });
    let recover = |options: &[&str]| {
        let words = ["recover", "hvA"];
        site.controller.run(words.iter().chain(options))
    };
    expect_found(recover(&[]).expect_code(0), "vm", "live", "running");
    let other = [
        "clone",
        "hvA",
        "hvB",
        "live",
        "--new-name",
        "l3",
        "--live",
        "pause",
    ];
    let other = site.controller.run(other);
    other.expect_failure(5, &["busy"], "live");
    assert_eq!(state(), "paused", "{other}");

    // What would have resumed it dies too, as it does with its host.
    let _ = site.a.exec(&["pkill", "-9", "-f", "kvm-clone-done"]);
    killed(running);
    assert_eq!(state(), "paused");
    expect_found(
        recover(&["--dry-run"]).expect_code(0),
        "vm",
        "live",
        "unfinished",
    );
    assert_eq!(state(), "paused");
    let run = recover(&[]);
    expect_found(run.expect_code(0), "vm", "live", "finished");
    assert_eq!(state(), "running", "{run}");
    assert!(found(&recover(&[])).is_empty());
    site.a.assert_tidy();
}

/// A VM with two raw disks on hvA, and one on hvB that follows it, whose second disk is qcow2.
struct Mixed {
    site: Site,
}

impl Mixed {
    fn start(spec: &SiteSpec) -> Option<Self> {
        let site = Site::with(spec)?;
        let vm = Vm::new("web");
        site.define(
            &site.a,
            &vm.clone().disks(&[("vda", "raw"), ("vdb", "raw")]),
        );
        site.define(&site.b, &vm.disks(&[("vda", "raw"), ("vdb", "qcow2")]));
        let mixed = Self { site };
        mixed.write(0);
        mixed.sync().wait().expect_code(5);
        mixed.start_sync(&["--overwrite"]).wait().expect_code(0);
        Some(mixed)
    }

    fn start_sync(&self, options: &[&str]) -> Running {
        let words = ["sync", "hvA", "hvB", "web", "--method", "blocksync"];
        self.site.controller.start(words.iter().chain(options))
    }

    fn sync(&self) -> Running {
        self.start_sync(&[])
    }

    /// Both disks of the source become this version.
    fn write(&self, version: u8) {
        for image in ["web-vda.raw", "web-vdb.raw"] {
            let command = format!("write -q -P {version} 1M 1M");
            let path = format!("/var/lib/libvirt/images/{image}");
            let words = ["qemu-io", "-f", "raw", "-c", &command, &path];
            self.site.a.run(&words);
        }
    }

    /// Claims that both disks of the copy are this version.
    fn expect(&self, version: u8, why: &str) {
        for (format, image) in [("raw", "web-vda.raw"), ("qcow2", "web-vdb.qcow2")] {
            let command = format!("read -P {version} 1M 1M");
            let path = format!("/var/lib/libvirt/images/{image}");
            let words = ["qemu-io", "-r", "-f", format, "-c", &command, &path];
            let read = self.site.b.run(&words);
            assert!(!read.contains("failed"), "{why}: {image}: {read}");
        }
    }
}

/// The one has its raw disk replaced, the other has it changed.
fn both_kinds_of_file_systems() -> [SiteSpec; 2] {
    [SiteSpec::default(), SiteSpec::without_reflinks()]
}

#[test]
fn raw_disks_and_overlays_beside_them_come_to_count_together_wherever_a_run_is_killed() {
    for spec in both_kinds_of_file_systems() {
        let Some(mixed) = Mixed::start(&spec) else {
            return;
        };
        let site = &mixed.site;
        let mut version = 0;
        // The overlays are named, and the agents have committed nothing yet.
        let named = ("sync", "*/kvm-clone/lineage", false);
        // They have, and no image is changed yet.
        let committed = ("mv", "*.kc-applying", true);
        let applying = ("qemu-img", "commit*", true);
        let recover = &["recover", "hvB"][..];
        for ((program, words, counts), by) in [
            (named, recover),
            (named, &["recover", "hvB", "--keep"]),
            (named, &[]),
            (committed, recover),
            (committed, &[]),
            (applying, recover),
        ] {
            mixed.write(version + 1);
            stop(&site.b, program, words);
            let running = mixed.sync();
            wait_for_stop(&site.b);
            killed(running);
            go_on(&site.b, program);
            let why = format!("{program}, then {by:?}");
            wait_for("the end of the agent", PATIENCE, || {
                site.b.agents().is_empty().then_some(())
            });
            if !by.is_empty() {
                if program == "mv" {
                    // Its disks are of two versions, so it is not read.
                    let clone = ["clone", "hvB", "hvA", "web", "--new-name", "w2"];
                    let run = site.controller.run(clone);
                    run.expect_failure(5, &["refused"], "a sync onto web on hvB broke off");
                }
                let run = site.controller.run(by);
                for found in found(run.expect_code(0)) {
                    let is_open = found["kind"] != "disk" && found["state"] != "finished";
                    assert!(!is_open, "{why}: {run}");
                }
                mixed.expect(version + u8::from(counts), &why);
                site.b.run(&["test", "!", "-e", OVERLAY]);
            }
            let next = mixed.sync().wait();
            let told = next.expect_json()["warnings"].to_string();
            let is_ended = told.contains("web-vdb.qcow2 was committed");
            assert_eq!(is_ended, by.is_empty() && counts, "{why}: {next}");
            version += 1;
            mixed.expect(version, &why);
        }
        site.b.assert_tidy();
    }
}

const OVERLAY: &str = "/var/lib/libvirt/images/.web-vdb.qcow2.kc-overlay";

#[test]
fn where_an_overlay_has_no_room_to_be_applied_the_raw_disks_beside_it_stay_too() {
    let Some(mixed) = Mixed::start(&SiteSpec::without_reflinks()) else {
        return;
    };
    let site = &mixed.site;
    mixed.write(7);
    site.b.instead("stat", "-f*", "echo 0 4096 1 ext4; exit");
    let run = mixed.sync().wait();
    site.b.as_ever("stat");
    run.expect_failure(8, &["no_space"], "web-vdb.qcow2");
    mixed.expect(0, "no room");
    site.b.run(&["test", "!", "-e", OVERLAY]);
    mixed.sync().wait().expect_code(0);
    mixed.expect(7, "room");
    site.b.assert_tidy();
}
