//! `sync`, `verify`, `list` and `history`: a VM that is kept in step on another hypervisor.

use std::os::unix::fs::FileExt as _;

use kvm_clone_tests::hypervisor::{Site, SiteSpec, Vm, mark, set_mark};
use kvm_clone_tests::image::{MIB, assert_equal};
use kvm_clone_tests::process::wait_for;

/// How long anything may take on a machine that does other things as well.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// Writes other bytes into one block of 64 KiB of every hundred, of the data of a disk of 64 MiB.
fn change_one_percent(disk: &std::path::Path) -> u64 {
    let file = std::fs::File::options()
        .write(true)
        .open(disk)
        .expect("the disk is there");
    let blocks = 32 * MIB / 65536;
    for block in (0..blocks).step_by(100) {
        file.write_all_at(&[0x5a; 4096], block * 65536 + 8192)
            .expect("the disk is writable");
    }
    blocks.div_ceil(100)
}

#[test]
fn a_sync_ships_what_changed_and_the_vm_boots_with_it() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::new("web").disks(&[("vda", "raw"), ("vdb", "raw")]);
    site.define(&site.a, &vm);
    let controller = &site.controller;
    controller
        .run([
            "clone",
            "hvA",
            "hvB",
            "web",
            "--new-name",
            "copy",
            "--method",
            "blocksync",
        ])
        .expect_code(0);
    let changed = change_one_percent(&site.a.image("web-vdb.raw"));
    set_mark(&site.a.image("web-vdb.raw"), "fresh");
    let sync = |options: &[&str]| {
        let words = [
            "sync",
            "hvA",
            "hvB",
            "web",
            "--target-name",
            "copy",
            "--method",
            "blocksync",
        ];
        controller.run(words.iter().chain(options))
    };
    let dry = sync(&["--dry-run"]).expect_json();
    let run = sync(&["--checkpoint"]);
    let result = run.expect_json();
    // One block more for the mark.
    assert_eq!(result["blocks_changed"], changed + 1, "{run}");
    assert_eq!(dry["blocks_changed"], result["blocks_changed"]);
    let wire = result["bytes_wire"].as_u64().unwrap();
    assert!(wire < (changed + 1) * 65536 + MIB, "{wire} in {run}");
    for target in ["vda", "vdb"] {
        assert_equal(
            &site.a.image(&format!("web-{target}.raw")),
            &site.b.image(&format!("copy-{target}.raw")),
        );
    }
    let kept = |host: &kvm_clone_tests::hypervisor::Hypervisor| {
        host.image_names()
            .into_iter()
            .filter(|name| name.contains(".kc-checkpoint-"))
            .count()
    };
    assert_eq!(kept(&site.b), 2);
    sync(&["--checkpoint"]).expect_code(0);
    assert_eq!(kept(&site.b), 2, "one state of each disk is kept");
    let equal = controller.run(["verify", "hvA", "hvB", "web", "--target-name", "copy"]);
    assert_eq!(
        equal.expect_json()["definition_differences"]
            .as_array()
            .map(Vec::len),
        Some(0),
        "{equal}"
    );
    let console = site.b.boots_with_console("copy", "web");
    assert!(console.contains(&mark("vdb", "fresh")), "{console}");
    site.a.assert_tidy();
    site.b.assert_tidy();
}

#[test]
fn what_went_its_own_way_is_overwritten_on_request_only_and_all_is_in_the_history() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::new("web").disks(&[("vda", "raw"), ("vdb", "raw")]);
    site.define(&site.a, &vm);
    let controller = &site.controller;
    controller
        .run([
            "clone",
            "hvA",
            "hvB",
            "web",
            "--new-name",
            "copy",
            "--method",
            "blocksync",
        ])
        .expect_code(0);
    let sync = |options: &[&str]| {
        let words = ["sync", "hvA", "hvB", "web", "--target-name", "copy"];
        controller.run(words.iter().chain(options))
    };
    set_mark(&site.b.image("copy-vdb.raw"), "its own way");
    let differs = controller.run(["verify", "hvA", "hvB", "web", "--target-name", "copy"]);
    differs.expect_failure(7, &["mismatch"], "vdb");
    sync(&[]).expect_failure(5, &["refused"], "written since");
    sync(&["--overwrite", "--method", "blocksync"]).expect_code(0);
    for method in ["rsync", "libvirt"] {
        set_mark(&site.a.image("web-vdb.raw"), method);
        let run = sync(&["--method", method]);
        assert!(
            run.expect_json()["warnings"].to_string().contains("torn"),
            "{run}"
        );
        assert_equal(&site.a.image("web-vdb.raw"), &site.b.image("copy-vdb.raw"));
    }

    let history = controller.run(["history", "--vm", "web"]).expect_json();
    let runs = history["runs"].as_array().unwrap();
    let operations: Vec<&str> = runs
        .iter()
        .map(|run| run["operation"].as_str().unwrap())
        .collect();
    assert_eq!(
        operations.iter().filter(|name| **name == "sync").count(),
        4,
        "{operations:?}"
    );
    assert_eq!(
        controller.run(["history", "--failed"]).expect_json()["runs"]
            .as_array()
            .map(Vec::len),
        Some(2)
    );
}

#[test]
fn swapped_arguments_and_running_targets_overwrite_nothing() {
    let Some(site) = Site::start() else { return };
    site.define(&site.a, &Vm::new("prod"));
    site.define(&site.b, &Vm::new("stranger").disks(&[("vda", "raw")]));
    let controller = &site.controller;
    controller
        .run([
            "clone",
            "hvA",
            "hvB",
            "prod",
            "--new-name",
            "copy",
            "--method",
            "blocksync",
        ])
        .expect_code(0);
    let (here, there) = (site.a.state(), site.b.state());
    let swapped = controller.run(["sync", "hvB", "hvA", "copy", "--target-name", "prod"]);
    swapped.expect_failure(5, &["refused"], "not made by this program");
    let foreign = controller.run(["sync", "hvA", "hvB", "prod", "--target-name", "stranger"]);
    foreign.expect_failure(5, &["refused"], "stranger");
    controller
        .run(["sync", "hvA", "hvB", "prod"])
        .expect_failure(4, &["not_found"], "prod");
    controller
        .run(["sync", "hvA", "hvB", "nobody"])
        .expect_failure(4, &["not_found"], "nobody");
    assert_eq!((site.a.state(), site.b.state()), (here, there));
    site.b.virsh(&["start", "copy"]);
    let running = controller.run(["sync", "hvA", "hvB", "prod", "--target-name", "copy"]);
    running.expect_failure(5, &["refused"], "running");
    site.b.virsh(&["destroy", "copy"]);
    site.b.run(&[
        "sh",
        "-c",
        "virsh dumpxml copy >/tmp/c; sed -i 's/vda/vdz/' /tmp/c; virsh define /tmp/c",
    ]);
    let unlike = controller.run(["sync", "hvA", "hvB", "prod", "--target-name", "copy"]);
    let message = unlike.expect_failure(5, &["refused"], "vda");
    assert!(message.contains("vdz"), "{message}");
}

#[test]
fn a_running_source_is_refused_paused_or_read_torn() {
    let Some(site) = Site::with(&SiteSpec::without_reflinks()) else {
        return;
    };
    site.define(&site.a, &Vm::new("live"));
    site.a.virsh(&["start", "live"]);
    let state = || site.a.virsh(&["domstate", "live"]).trim().to_owned();
    let clone = |name: &str, options: &[&str]| {
        let words = [
            "clone",
            "hvA",
            "hvB",
            "live",
            "--new-name",
            name,
            "--method",
            "blocksync",
        ];
        site.controller.start(words.iter().chain(options))
    };
    clone("l1", &["--live", "refuse"])
        .wait()
        .expect_failure(5, &["refused"], "running");
    let torn = clone("l2", &["--live", "torn"]).wait();
    assert!(
        torn.expect_json()["warnings"].to_string().contains("torn"),
        "{torn}"
    );
    clone("l3", &["--live", "pause"]).wait().expect_code(0);
    assert_eq!(state(), "running");
    let wait_until = |wanted: &str| {
        wait_for(wanted, PATIENCE, || (state() == wanted).then_some(()));
    };
    let killed = clone("l4", &["--live", "pause", "--bandwidth-limit", "1M"]);
    wait_until("paused");
    killed.signal(nix::sys::signal::Signal::SIGKILL);
    drop(killed);
    wait_until("running");
    let next = clone("l4", &["--live", "pause"]).wait();
    assert!(
        next.expect_json()["warnings"]
            .to_string()
            .contains("broke off"),
        "{next}"
    );
    assert_eq!(state(), "running");
    // libvirt knows nothing of this one, and QEMU's lock tells.
    site.a.virsh(&["destroy", "live"]);
    let held =
        "qemu-io -c 'sleep 60000' /var/lib/libvirt/images/live-vda.raw >/dev/null 2>&1 & sleep 1";
    site.a.run(&["sh", "-c", held]);
    for method in ["blocksync", "rsync", "libvirt"] {
        let run = site.controller.run([
            "clone",
            "hvA",
            "hvB",
            "live",
            "--new-name",
            "l5",
            "--method",
            method,
        ]);
        run.expect_failure(5, &["busy"], "live-vda.raw");
    }
    site.a.run(&["pkill", "qemu-io"]);
    site.a.assert_tidy();
    site.b.assert_tidy();
}

#[test]
fn vms_of_several_hosts_are_listed_and_a_host_that_is_gone_is_a_row() {
    let Some(site) = Site::start() else { return };
    site.define(
        &site.a,
        &Vm::new("one").disks(&[("vda", "raw"), ("vdb", "qcow2")]),
    );
    site.a.virsh(&["autostart", "one"]);
    let both = site.controller.run(["list", "hvA", "hvB"]).expect_json();
    let one = &both["hosts"][0]["vms"][0];
    for (field, value) in [
        ("name", "one".into()),
        ("state", "stopped".into()),
        ("vcpus", 1.into()),
        ("memory_bytes", (256 * MIB).into()),
        ("autostart", true.into()),
        ("networks", serde_json::json!(["br0"])),
    ] {
        assert_eq!(one[field], value, "{field} in {one}");
    }
    assert_eq!(one["disks"][1]["bytes_total"], 64 * MIB, "{one}");
    assert!(
        one["disks"][1]["bytes_allocated"].as_u64().unwrap() > MIB,
        "{one}"
    );
    assert_eq!(both["hosts"][1]["vms"].as_array().map(Vec::len), Some(0));
    let sparse = &one["disks"][0];
    assert!(
        sparse["bytes_allocated"].as_u64() < sparse["bytes_total"].as_u64(),
        "{one}"
    );
    let running = site
        .controller
        .run(["list", "hvA", "--status", "running"])
        .expect_json();
    assert_eq!(running["hosts"][0]["vms"].as_array().map(Vec::len), Some(0));
    let gone = site.controller.run([
        "list",
        "hvA",
        "root@10.99.7.99:22",
        "--ssh-option",
        "ConnectTimeout=2",
    ]);
    let result = gone.expect_code(1).json();
    assert_eq!(result["hosts"][0]["vms"][0]["name"], "one");
    assert_eq!(result["hosts"][1]["error"]["code"], "host_unreachable");
}

#[test]
fn where_files_share_blocks_a_vm_is_suspended_only_while_its_disks_are_copied() {
    let Some(site) = Site::start() else { return };
    let disks = [("vda", "raw"), ("vdb", "qcow2")];
    let disk = |name: &str| site.a.image(&format!("live-{name}"));
    site.define(&site.a, &Vm::new("live").disks(&disks));
    site.a.virsh(&["start", "live"]);
    let state = || site.a.virsh(&["domstate", "live"]).trim().to_owned();
    let start = |name: &'static str| {
        let words = ["clone", "hvA", "hvB", "live", "--new-name", name];
        let options = ["--method", "blocksync", "--live", "pause"];
        let slowly = ["--bandwidth-limit", "4M"];
        site.controller
            .start(words.iter().chain(&options).chain(&slowly))
    };
    let copy = disk(".kc").with_file_name(".live-vdb.qcow2.kc-paused");
    let wait_for_copies = || {
        wait_for("copies of a VM that runs", PATIENCE, || {
            (copy.exists() && state() == "running").then_some(())
        });
    };
    let before = std::fs::read(disk("vdb.qcow2")).unwrap();
    let running = start("l1");
    wait_for_copies();
    // What comes after that instant is no part of the clone. Nobody writes there but this test.
    let later = std::fs::File::options()
        .write(true)
        .open(disk("vdb.qcow2"))
        .unwrap();
    later
        .write_all_at(&[0x5a; 4096], before.len() as u64 - 8192)
        .unwrap();
    let run = running.wait();
    let result = run.expect_json();
    assert_eq!(std::fs::read(site.b.image("l1-vdb.qcow2")).unwrap(), before);
    let sources: Vec<&str> = result["disks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|disk| disk["source"].as_str().unwrap())
        .collect();
    assert!(
        sources.iter().all(|source| !source.contains("kc-paused")),
        "{run}"
    );
    assert!(!copy.exists(), "{run}");

    // Its host removes the copies by itself.
    let killed = start("l2");
    wait_for_copies();
    killed.signal(nix::sys::signal::Signal::SIGKILL);
    drop(killed);
    wait_for("the end of the copies", PATIENCE, || {
        (!copy.exists()).then_some(())
    });
    assert_eq!(state(), "running");
    // And where that dies too, the next run does, or `recover`.
    let killed = start("l2");
    wait_for_copies();
    let _ = site.a.exec(&["pkill", "-9", "-f", "kvm-clone-done"]);
    killed.signal(nix::sys::signal::Signal::SIGKILL);
    drop(killed);
    assert!(copy.exists());
    // It is for the user to resume a VM that the user has suspended since, but nobody can tell.
    let recovered = wait_for("the end of the run", PATIENCE, || {
        let run = site.controller.run(["recover", "hvA"]);
        let found = run.json()["hosts"][0].to_string();
        (!found.contains("running\"")).then_some(run)
    });
    assert!(!copy.exists(), "{recovered}");
    assert_eq!(state(), "running");
    site.controller.run(["recover", "hvB"]).expect_code(0);
    site.a.assert_tidy();
    site.b.assert_tidy();
}

/// Leaves an image `$0` as a sync does that breaks off when its overlay is whole.
const BREAK_OFF: &str = r#"
    o=${0%/*}/.${0##*/}.kc-overlay;
    qemu-img create -q -f qcow2 -F qcow2 -b "$0" "$o" && qemu-io -f qcow2 -c "write -P 0x77 1M 64k" "$o" &&
    left=$(stat -c '{"size_bytes": %s, "modified": "%.9Y", "inode": %i}' "$0") &&
    sed -i -e 's|"unfinished": false|"unfinished": true, "overlays": {"images": {"'"$0"'": '"$left"'}, "beside": {}}|' /var/lib/kvm-clone/lineage/*.json
"#;

#[test]
fn disks_in_another_format_hold_what_the_guest_sees_and_a_broken_last_step_is_done_by_the_next() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::new("web").disks(&[("vda", "qcow2"), ("vdb", "raw")]);
    site.define(&site.a, &vm);
    let run = |operation: &str, options: &[&str]| {
        let words = [operation, "hvA", "hvB", "web"];
        site.controller.run(words.iter().chain(options))
    };
    run("clone", &["--dest-format", "qcow2"]).expect_code(0);
    let format = |name: &str| {
        let path = format!("/var/lib/libvirt/images/{name}");
        let said = site.b.run(&["qemu-img", "info", "--output=json", &path]);
        let info: serde_json::Value = serde_json::from_str(&said).unwrap();
        info["format"].as_str().unwrap().to_owned()
    };
    for disk in ["web-vda.qcow2", "web-vdb.qcow2"] {
        assert_eq!(format(disk), "qcow2");
    }
    run("verify", &[]).expect_code(7);
    let definition = site.b.virsh(&["dumpxml", "--inactive", "web"]);
    assert_eq!(
        definition.matches("type='qcow2'").count(),
        2,
        "{definition}"
    );

    let changed = change_one_percent(&site.a.image("web-vdb.raw"));
    set_mark(&site.a.image("web-vdb.raw"), "fresh");
    let dry = run("sync", &["--dry-run"]).expect_json();
    assert_eq!(dry["blocks_changed"], changed + 1, "{dry}");
    let sync = run("sync", &[]);
    let result = sync.expect_json();
    assert_eq!(result["blocks_changed"], changed + 1, "{sync}");
    assert_eq!(result["bytes_read_destination"], 0, "{sync}");
    assert_eq!(result["apply"], "staged", "{sync}");
    // The disks are equal; the format in the definitions is not.
    let verify = run("verify", &[]);
    verify.expect_failure(7, &["mismatch"], "definitions");
    assert_eq!(verify.json()["blocks_changed"], 0, "{verify}");
    let rsync = run("sync", &["--method", "rsync"]);
    rsync.expect_failure(5, &["refused"], "rsync");

    // What somebody has written to the copy is no longer what digests of it tell.
    let image = "/var/lib/libvirt/images/web-vdb.qcow2";
    site.b.run(&[
        "qemu-io",
        "-f",
        "qcow2",
        "-c",
        "write -P 0x66 2M 64k",
        image,
    ]);
    run("sync", &[]).expect_failure(5, &["refused"], image);
    let sync = run("sync", &["--overwrite"]);
    assert_eq!(sync.expect_json()["blocks_changed"], 1, "{sync}");
    assert_eq!(run("verify", &[]).json()["blocks_changed"], 0);

    // A sync that was killed when its overlay was whole, and not yet in its place; in the middle of
    // that; and one after which somebody has used the image.
    for (next, meanwhile, changed) in [
        ("recover", "true", true),
        ("recover", "mv $0 ${0%/*}/.${0##*/}.kc-applying", true),
        ("sync", "true", true),
        (
            "recover",
            "qemu-io -f qcow2 -c \"write -P 0x66 2M 64k\" $0",
            false,
        ),
    ] {
        site.b.run(&[
            "sh",
            "-c",
            &format!("set -e; {BREAK_OFF}{meanwhile}"),
            image,
        ]);
        match next {
            "recover" => site.controller.run(["recover", "hvB"]),
            _ => run("sync", &[]),
        }
        .expect_code(0);
        let left = site.b.run(&["sh", "-c", "ls -A /var/lib/libvirt/images"]);
        assert!(!left.contains("kc-"), "{next} {meanwhile}: {left}");
        if next == "recover" {
            let read = ["qemu-io", "-f", "qcow2", "-c", "read -P 0x77 1M 64k", image];
            let read = site.b.exec(&read);
            assert_eq!(read.status.success(), changed, "{meanwhile}");
        }
        run("sync", &[]).expect_code(0);
    }
    assert_eq!(run("verify", &[]).json()["blocks_changed"], 0);
    let console = site.b.boots("web");
    assert!(console.contains(&mark("vdb", "fresh")), "{console}");
    site.a.assert_tidy();
    site.b.assert_tidy();
}
