//! Replication: points of VMs on another host, as a policy wants them.

use std::path::PathBuf;
use std::time::Duration;

use kvm_clone_tests::hypervisor::{Firmware, Vm, alone, mark, records, set_mark};
use kvm_clone_tests::image::{Piece, digest, overwrite};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::process::{tool, wait_for};
use kvm_clone_tests::replication::{PLACE, Replication};
use nix::sys::signal::Signal;

const PATIENCE: Duration = Duration::from_secs(60);

const EVERY_MINUTE: &str = "every = \"1m\"\nrpo = \"5m\"\n";

#[test]
fn a_vm_that_writes_gets_points_of_one_instant_each_of_which_starts_it_by_its_runbook() {
    let _alone = alone();
    let policy = format!("vms = [\"busy\"]\nkeep = {{ last = 2 }}\n{EVERY_MINUTE}");
    let Some(shop) = Replication::that_writes(Kind::Xfs, &policy) else {
        return;
    };
    let (a, b) = (&shop.site.a, &shop.site.b);
    let mut last = 0;
    let mut points = Vec::new();
    for (scan, removed) in [("full", 0), ("changes", 0), ("changes", 1)] {
        let run = shop.run_vm();
        assert_eq!(run["disks"][2]["scan"], scan, "{run}");
        assert_eq!(run["consistency"], "application", "{run}");
        assert_eq!(run["removed"].as_array().map_or(0, Vec::len), removed);
        points = shop.points("busy");
        let newest = points.last().unwrap();
        let records = shop.records(newest);
        assert!(records > last, "{records} after {last}");
        last = records;
    }
    assert_eq!(points.len(), 2);
    assert!(shop.records(&points[0]) < last);
    // What is pinned stays, until it is not.
    let first = points[0].rsplit('/').next().unwrap().to_owned();
    let pin = |options: &[&str]| {
        let words = [&["pin", "shop", "busy", &first], options].concat();
        shop.run(&words).expect_code(0);
    };
    pin(&[]);
    assert!(shop.run_vm()["removed"].is_null());
    assert_eq!(shop.points("busy").len(), 3);
    pin(&["--off"]);
    assert_eq!(shop.run_vm()["removed"].as_array().map(Vec::len), Some(2));
    // All is read when that is long ago, and what is written since after it.
    let note = b.image("kvm-clone/shop/busy/replica.json");
    let text = std::fs::read_to_string(&note).unwrap();
    let mut head: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(head["scanned"].is_string(), "{head}");
    head["scanned"] = "2026-01-01T00:00:00Z".into();
    std::fs::write(&note, head.to_string()).unwrap();
    let run = shop.run_vm();
    assert_eq!(run["disks"][2]["scan"], "full", "{run}");
    assert_eq!(run["warnings"], serde_json::json!([]), "{run}");
    assert_eq!(shop.run_vm()["disks"][2]["scan"], "changes");
    let points = shop.points("busy");
    let unknown = shop.run(&["pin", "shop", "busy", &first]);
    unknown.expect_code(4);
    // Of the VM nothing is known there, until somebody follows the runbook of a point.
    assert_eq!(b.virsh(&["list", "--all", "--name"]), "");
    let status = shop.run(&["status", "--exit-code"]);
    assert_eq!(status.expect_json()["vms"][0]["state"], "kept", "{status}");
    a.virsh(&["destroy", "busy"]);
    let runbook = std::fs::read_to_string(shop.file(&points[0], "RUNBOOK.txt")).unwrap();
    assert!(runbook.contains("busy as it was on hvA"), "{runbook}");
    let steps = runbook.lines().filter_map(|line| line.strip_prefix("  "));
    let steps: Vec<&str> = steps.collect();
    b.run(&["sh", "-c", &steps.join(" && ")]);
    b.wait_for_writing("busy");
    b.virsh(&["destroy", "busy"]);
    // It went on in a copy: the point is what it was.
    let live = |file: &str| b.image(&format!("kvm-clone/shop/busy/live/{file}"));
    let gone_on = records(&live("vdb.raw"), "raw").unwrap();
    assert!(gone_on > shop.records(&points[0]));
    a.assert_tidy();
    b.assert_tidy();
}

#[test]
fn a_run_that_is_killed_leaves_no_point_that_is_torn_and_loses_none() {
    let _alone = alone();
    let policy = format!("vms = [\"busy\"]\nkeep = {{ last = 50 }}\n{EVERY_MINUTE}");
    let Some(shop) = Replication::that_writes(Kind::Xfs, &policy) else {
        return;
    };
    shop.kill_runs();
}

#[test]
fn only_what_is_due_runs_and_a_vm_that_is_gone_or_replaced_keeps_its_replica() {
    let policy = format!("vms = [\"web*\"]\nexclude = [\"*-test\"]\n{EVERY_MINUTE}");
    let Some(shop) = Replication::start([Kind::Xfs, Kind::Xfs], &policy) else {
        return;
    };
    let a = &shop.site.a;
    for vm in ["web-1", "web-2", "web-test", "mail"] {
        shop.site.define(a, &Vm::new(vm));
    }
    let status = shop.run(&["status", "--exit-code"]);
    status.expect_failure(1, &["partial"], "2 of 2 VMs");
    let checked = shop.run(&["check"]).expect_json();
    let vms = &checked["policies"][0]["vms"];
    assert_eq!(vms, &serde_json::json!(["web-1", "web-2"]), "{checked}");
    let due = shop.run(&["run", "--due"]).expect_json();
    assert_eq!(due["runs"].as_array().map(Vec::len), Some(2), "{due}");
    assert_eq!(due["runs"][0]["vm"], "web-1", "{due}");
    let again = shop.run(&["run", "--due"]).expect_json();
    assert_eq!(again["runs"].as_array().map(Vec::len), Some(0), "{again}");

    set_mark(&a.image("web-1-vda.raw"), "new");
    let run = shop.run(&["run", "--all"]).expect_json();
    assert_eq!(run["runs"].as_array().map(Vec::len), Some(2), "{run}");
    assert_eq!(run["runs"][0]["blocks_changed"], 1, "{run}");
    assert_eq!(run["runs"][1]["blocks_changed"], 0, "{run}");
    let points = shop.points("web-1");
    let newest = points.last().unwrap();
    kvm_clone_tests::image::assert_equal(&a.image("web-1-vda.raw"), &shop.file(newest, "vda.raw"));

    // What is no point of ours keeps nobody from making others, and is left alone.
    let strange = shop.file(newest, "../19700101T000000Z");
    std::fs::create_dir(&strange).unwrap();
    std::fs::write(strange.join("manifest.json"), "{}").unwrap();
    let run = shop.run(&["run", "shop"]);
    run.expect_code(0);
    assert!(run.stderr.contains("its point is left alone"), "{run}");
    assert!(strange.exists());
    std::fs::remove_dir_all(&strange).unwrap();
    let points = shop.points("web-1");

    // One is gone, and the other is another VM of the same name.
    a.virsh(&["undefine", "web-1"]);
    a.virsh(&["undefine", "web-2"]);
    shop.site.define(a, &Vm::new("web-2"));
    let run = shop.run(&["run", "shop"]);
    run.expect_failure(1, &["partial"], "2 of 2 VMs");
    let errors = run.json()["runs"].clone();
    let error = |at: usize| errors[at]["error"]["message"].as_str().unwrap().to_owned();
    assert!(error(0).contains("another VM"), "{run}");
    assert!(error(1).contains("web-1 is gone from hvA"), "{run}");
    assert_eq!(shop.points("web-1"), points);
    assert_eq!(shop.points("web-2").len(), 3);
    // What nobody misses goes when the user says so, and nothing that is followed.
    shop.run(&["remove", "shop", "web-test"]).expect_code(4);
    shop.run(&["remove", "shop", ""]).expect_code(2);
    let first = points[0].rsplit('/').next().unwrap();
    shop.run(&["pin", "shop", "web-1", first]).expect_code(0);
    let pinned = shop.run(&["remove", "shop", "web-1"]);
    pinned.expect_code(5);
    assert!(pinned.stderr.contains("are to stay"), "{pinned}");
    assert_eq!(shop.points("web-1"), points);
    let removed = shop
        .run(&["remove", "shop", "web-1", "--pinned"])
        .expect_json();
    assert_eq!(
        removed["points"].as_array().map(Vec::len),
        Some(points.len())
    );
    let left = shop.site.b.run(&["ls", "-A", PLACE]);
    assert_eq!(
        left.lines().collect::<Vec<_>>(),
        [".order.json", ".policy.toml", "web-2"]
    );
    let followed = shop.run(&["remove", "shop", "web-2"]);
    followed.expect_code(5);
    assert!(followed.stderr.contains("is about it"), "{followed}");
    // What is excluded is missed by nobody.
    shop.write(&format!(
        "vms = [\"web*\"]\nexclude = [\"web-1\", \"web-2\"]\n{EVERY_MINUTE}"
    ));
    let none = shop.run(&["run", "shop"]).expect_json();
    let runs = none["runs"].as_array().unwrap();
    let vms: Vec<&str> = runs.iter().map(|run| run["vm"].as_str().unwrap()).collect();
    assert_eq!(vms, ["web-test"], "{none}");
}

#[test]
fn a_replica_begins_with_a_seed_is_paused_has_hooks_and_loses_no_points_to_a_disk_that_is_another()
{
    let of_web = format!("vms = [\"web\"]\n{EVERY_MINUTE}");
    let Some(shop) = Replication::start([Kind::Ext4, Kind::Xfs], &of_web) else {
        return;
    };
    let a = &shop.site.a;
    shop.site.define(a, &Vm::new("web"));
    // An image that was brought by hand: what differs from it is one block.
    let [disk, seed] = [a.image("web-vda.raw"), shop.site.b.image("seed.qcow2")];
    let words = ["convert", "-O", "qcow2"].map(AsRef::as_ref);
    tool(
        "qemu-img",
        words
            .into_iter()
            .chain([disk.as_os_str(), seed.as_os_str()]),
    );
    set_mark(&disk, "since");
    let adopt = [
        "adopt",
        "shop",
        "web",
        "vda=qcow2:/var/lib/libvirt/images/seed.qcow2",
    ];
    // A format that is not said is raw, whatever the image looks like: these are other bytes.
    let unsaid = [
        "adopt",
        "shop",
        "web",
        "vda=/var/lib/libvirt/images/seed.qcow2",
    ];
    shop.run(&unsaid).expect_code(0);
    let head = shop.site.b.image("kvm-clone/shop/web/head/vda.raw");
    assert_eq!(digest(&head), digest(&seed));
    shop.run(&["remove", "shop", "web"]).expect_code(5);
    shop.site.b.run(&["rm", "-r", &format!("{PLACE}/web")]);
    shop.run(&adopt).expect_code(0);
    shop.run(&adopt).expect_code(5);
    let nothing = shop.run(&["adopt", "shop", "web", "vda=/seed.qcow2"]);
    nothing.expect_code(4);
    shop.run(&["pause"]).expect_code(0);
    let due = shop.run(&["run", "--due"]).expect_json();
    assert_eq!(due["runs"].as_array().map(Vec::len), Some(0), "{due}");
    let paused = shop.run(&["run", "shop"]);
    paused.expect_failure(5, &["refused"], "is paused since");
    let resumed = shop.run(&["resume"]).expect_json();
    assert_eq!(resumed["paused"][0]["policy"], "shop", "{resumed}");
    // Hooks: one that fails keeps the run from beginning, and the other hears what came of it.
    let heard = shop.site.controller.home().join("heard");
    let hooks = |before: &str| {
        let after = format!("echo $POLICY $VM $RESULT $POINT >> {}", heard.display());
        shop.write(&format!("before = '{before}'\nafter = '{after}'\n{of_web}"));
        shop.run(&["run", "shop"])
    };
    let kept_back = hooks("echo not now >&2; exit 3");
    kept_back.expect_failure(1, &["io"], "\"before\" of shop failed");
    assert!(kept_back.stderr.contains("not now"), "{kept_back}");
    assert!(!heard.exists() && shop.points("web").is_empty());
    let run = hooks("test $VM = web");
    assert_eq!(run.expect_json()["runs"][0]["blocks_changed"], 1, "{run}");
    let point = shop.points("web").remove(0);
    let point = point.rsplit('/').next().unwrap();
    let said = std::fs::read_to_string(&heard).unwrap();
    assert_eq!(said, format!("shop web made {point}\n"));
    shop.write(&of_web);
    shop.run_vm();

    // Somebody has encrypted a disk: no older point goes until somebody has looked.
    let len = std::fs::metadata(&disk).unwrap().len();
    overwrite(&disk, &[Piece::Random(9, len)]);
    shop.write(&format!("keep = {{ last = 1 }}\n{of_web}"));
    for _ in 0..2 {
        let run = shop.run_vm();
        let why = run["doubt"]["why"].as_str().unwrap();
        assert!(why.contains("have changed at once"), "{run}");
        assert_eq!(run["removed"], serde_json::Value::Null, "{run}");
        expect_state(&shop, "doubtful");
    }
    let nagios = || {
        let run = shop.run(&["status", "--nagios"]);
        (run.code().unwrap(), run.text())
    };
    let (code, line) = nagios();
    assert!(
        line.starts_with("REPLICATION WARNING - 0 of 1 as promised; shop/web doubtful"),
        "{line}"
    );
    assert_eq!(code, 1);
    let accepted = shop.run(&["accept", "shop", "web"]).expect_json();
    let doubts = accepted["doubts"].as_array().map(Vec::len);
    assert_eq!(doubts, Some(1), "{accepted}");
    let run = shop.run_vm();
    assert_eq!(run["removed"].as_array().map(Vec::len), Some(4), "{run}");
    expect_state(&shop, "kept");
    let well = "REPLICATION OK - 1 of 1 as promised | kept=1;;;0;1\n";
    assert_eq!(nagios(), (0, well.to_owned()));
    a.virsh(&["undefine", "web"]);
    let (code, line) = nagios();
    assert!(
        line.starts_with("REPLICATION CRITICAL - 0 of 1 as promised; shop/web gone"),
        "{line}"
    );
    assert_eq!(code, 2);
    shop.site.b.run(&["ip", "link", "set", "eth0", "down"]);
    let (code, line) = nagios();
    assert!(line.starts_with("REPLICATION UNKNOWN - "), "{line}");
    assert_eq!(code, 3);
}

#[test]
fn a_place_that_will_not_do_is_refused_and_nothing_is_made_of_a_mistake() {
    let policy = format!("vms = [\"web\"]\n{EVERY_MINUTE}");
    let Some(shop) = Replication::start([Kind::Xfs, Kind::Xfs], &policy) else {
        return;
    };
    shop.site.define(&shop.site.a, &Vm::new("web"));
    let unknown = shop.run(&["run", "mail"]);
    unknown.expect_code(4);
    assert!(unknown.stderr.contains("no policy \"mail\""), "{unknown}");
    shop.write(&format!(
        "vms = [\"web\"]\nmin-free = \"1TB\"\n{EVERY_MINUTE}"
    ));
    let full = shop.run(&["check"]);
    assert_eq!(
        full.json()["policies"][0]["obstacles"][0]["code"],
        "no_space",
        "{full}"
    );
    shop.write("vms = [\"web\"]\nevery = \"soon\"\nrpo = \"5m\"\n");
    let mistake = shop.run(&["check"]);
    mistake.expect_code(2);
    assert!(mistake.stderr.contains("policies.toml:5: "), "{mistake}");
    let made = shop.site.b.exec(&["ls", PLACE]);
    assert!(!made.status.success(), "nothing was made there");
}

/// The replica of a VM that has been started is told of by `status`.
fn expect_state(shop: &Replication, state: &str) {
    let status = shop.run(&["status"]).expect_json();
    assert_eq!(status["vms"][0]["state"], state, "{status}");
}

#[test]
fn a_planned_failover_loses_nothing_and_from_then_on_nothing_is_overwritten() {
    let _alone = alone();
    let networks = "networks = { br0 = \"nowhere\" }";
    let policy = format!("vms = [\"busy\"]\n{networks}\n{EVERY_MINUTE}");
    let Some(shop) = Replication::that_writes(Kind::Xfs, &policy) else {
        return;
    };
    let (a, b) = (&shop.site.a, &shop.site.b);
    a.virsh(&["autostart", "busy"]);
    shop.run_vm();

    // As long as the source runs there is no second one.
    let runs = shop.run(&["failover", "shop"]);
    runs.expect_failure(5, &["refused"], "busy on hvA is running");
    // There is no such network: for that nothing is shut down.
    let planned = ["failover", "shop", "--planned", "--shutdown-timeout", "3s"];
    let unconnected = shop.run(&planned);
    unconnected.expect_failure(8, &["missing_requirement"], "no network or bridge nowhere");
    // Its guest does not listen to the power button, and goes on.
    let mapped = [&planned[..], &["--network-map", "br0=br0"]].concat();
    let patient = shop.run(&mapped);
    patient.expect_failure(6, &["timeout"], "runs after 3s");
    assert_eq!(a.virsh(&["domstate", "busy"]).trim(), "running");
    // The last run finds no room: the source is started again.
    let forced = [&mapped[..], &["--force-stop"]].concat();
    shop.write(&format!("{policy}min-free = \"1TB\"\n"));
    let full = shop.run(&forced);
    full.expect_failure(8, &["no_space"], "was started again on hvA");
    assert_eq!(b.virsh(&["list", "--all", "--name"]), "");
    a.wait_for_writing("busy");
    shop.write(&policy);
    // It does not start there: all that was made for it is taken back.
    b.instead("virsh", "*start*", "echo no luck >&2; exit 1");
    let luckless = shop.run(&forced);
    b.as_ever("virsh");
    luckless.expect_failure(1, &["io"], "was started again on hvA");
    assert!(luckless.stderr.contains("no luck"), "{luckless}");
    assert_eq!(b.virsh(&["list", "--all", "--name"]), "");
    expect_state(&shop, "kept");
    a.wait_for_writing("busy");
    // Somebody was there by hand, and what they have made is not ours to remove.
    let live = b.image("kvm-clone/shop/busy/live");
    std::fs::create_dir(&live).unwrap();
    let by_hand = shop.run(&forced);
    by_hand.expect_failure(5, &["refused"], "no failover has made it");
    assert_eq!(a.virsh(&["domstate", "busy"]).trim(), "running");
    std::fs::remove_dir(&live).unwrap();

    let run = shop.run(&forced);
    let result = run.expect_json()["vms"][0].clone();
    assert!(
        result["warnings"].to_string().contains("no longer starts"),
        "{run}"
    );
    assert_eq!(a.virsh(&["domstate", "busy"]).trim(), "shut off");
    let info = a.virsh(&["dominfo", "busy"]);
    assert!(
        info.lines()
            .any(|line| line.starts_with("Autostart:") && line.ends_with("disable"))
    );
    b.wait_for_writing("busy");
    expect_state(&shop, "live");

    // What a schedule runs leaves it alone; who asks for it is told why; two that run are an alarm.
    let due = shop.run(&["run", "--due"]).expect_json();
    assert_eq!(due["runs"].as_array().map(Vec::len), Some(0), "{due}");
    let live = shop.run(&["run", "shop"]);
    live.expect_failure(5, &["refused"], "would be overwritten");
    a.virsh(&["start", "busy"]);
    let brain = shop.run(&["run", "--due"]);
    brain.expect_failure(5, &["refused"], "split brain");
    // The daemon tells somebody, and overwrites neither.
    let notices = shop.site.controller.home().join("notices");
    shop.write(&format!(
        "{policy}[notify]\ncommand = \"cat >> {}\"\n",
        notices.display()
    ));
    let daemon = shop.start_run(&["daemon"]);
    let told = wait_for("an alarm", PATIENCE, || {
        std::fs::read_to_string(&notices).ok()
    });
    daemon.signal(Signal::SIGTERM);
    daemon.wait().expect_code(0);
    assert!(told.contains("\"kind\":\"split-brain\""), "{told}");
    shop.write(&policy);
    a.virsh(&["destroy", "busy"]);
    let twice = shop.run(&["failover", "shop"]);
    twice.expect_failure(5, &["refused"], "live since");

    // Nothing was lost: all that the source had is there, and the guest went on from it.
    let running = shop.run(&["undo", "shop"]);
    running.expect_code(5);
    assert!(running.stderr.contains("is running"), "{running}");
    b.virsh(&["destroy", "busy"]);
    let count = |file: PathBuf| records(&file, "raw").unwrap();
    let live = count(b.image("kvm-clone/shop/busy/live/vdb.raw"));
    let newest = shop.points("busy").pop().unwrap();
    let last = shop.records(&newest);
    assert!(live > last, "{live} after {last}");
    shop.run(&["undo", "shop"]).expect_code(0);
    assert_eq!(b.virsh(&["list", "--all", "--name"]), "");
    assert!(!b.image("kvm-clone/shop/busy/live").exists());
    shop.run(&["run", "shop"]).expect_code(0);
    expect_state(&shop, "kept");
    a.assert_tidy();
    b.assert_tidy();
}

/// The last record of which a guest has said that it is written.
fn wrote(console: &str) -> Option<u64> {
    console.lines().rev().find_map(|line| {
        let number = line.strip_prefix("GUEST wrote ")?;
        number.split_once(' ')?.0.parse().ok()
    })
}

#[test]
fn a_failback_brings_what_was_written_home_and_keeps_what_was_there() {
    let _alone = alone();
    let policy = format!("vms = [\"busy\"]\n{EVERY_MINUTE}");
    let kind = match std::env::var_os("KVM_CLONE_REPLICAS_ON") {
        Some(kind) if kind == "ext4" => Kind::Ext4,
        _ => Kind::Xfs,
    };
    let Some(shop) = Replication::that_writes(kind, &policy) else {
        return;
    };
    let (a, b) = (&shop.site.a, &shop.site.b);
    a.virsh(&["autostart", "busy"]);
    shop.run_vm();
    let follows = shop.run(&["failback", "shop"]);
    follows.expect_failure(5, &["refused"], "is not live");
    // A rehearsal beside its source that runs: nobody is told of the copy, and nothing is left of it.
    let point = shop.points("busy").remove(0);
    let digests = || ["vda", "vdb", "vdc"].map(|disk| shop.digest(&point, disk));
    let before = digests();
    let test = shop.run(&["test", "shop"]);
    let tested = test.expect_json()["vms"][0].clone();
    assert_eq!(tested["sign"], "agent", "{test}");
    assert!(tested["rto_seconds"].as_f64() > Some(1.0), "{test}");
    assert!(tested["rpo_seconds"].as_f64() > Some(1.0), "{test}");
    assert_eq!(digests(), before);
    assert_eq!(b.virsh(&["list", "--all", "--name"]), "");
    let names = b.run(&["ls", &format!("{PLACE}/busy")]);
    assert!(
        !names
            .lines()
            .any(|name| name == "test" || name == "test.json"),
        "{names}"
    );
    let networkless = "networks = { br0 = \"nowhere\" }\n";
    shop.write(&format!("{policy}{networkless}"));
    let refused = shop.run(&["test", "shop"]);
    refused.expect_failure(8, &["missing_requirement"], "no network or bridge nowhere");
    shop.write(&policy);
    let at_once = ["--shutdown-timeout", "1s", "--force-stop"];
    let planned = [&["failover", "shop", "--planned"], &at_once[..]].concat();
    shop.run(&planned).expect_code(0);
    let at_failover = shop.records(shop.points("busy").last().unwrap());
    b.wait_for_writing("busy");

    // Somebody starts the old one: nothing is brought onto it. What it wrote is kept.
    a.start_writing("busy");
    let back = [&["failback", "shop"], &at_once[..]].concat();
    let brain = shop.run(&back);
    brain.expect_failure(5, &["refused"], "split brain");
    a.virsh(&["destroy", "busy"]);
    // The source does not start: the replica runs on.
    a.instead("virsh", "*start*", "echo no luck >&2; exit 1");
    let luckless = shop.run(&back);
    a.as_ever("virsh");
    luckless.expect_failure(1, &["io"], "was started again on hvB");
    b.wait_for_writing("busy");
    let kept = shop.points("busy").pop().unwrap();
    assert!(shop.records(&kept) > at_failover);

    let before = wrote(&b.console("busy")).unwrap();
    let run = shop.run(&back);
    let result = run.expect_json()["vms"][0].clone();
    assert!(kept.ends_with(result["kept"].as_str().unwrap()), "{run}");
    // Most of it had been brought by the run before.
    let shipped = result["bytes_wire"].as_u64().unwrap();
    assert!(shipped < 32 * 1024 * 1024, "{run}");
    a.wait_for_writing("busy");
    assert_eq!(b.virsh(&["list", "--all", "--name"]), "");
    assert!(!b.image("kvm-clone/shop/busy/live").exists());
    let info = a.virsh(&["dominfo", "busy"]);
    let autostart = info.lines().find(|line| line.starts_with("Autostart:"));
    assert!(autostart.unwrap().ends_with("enable"), "{info}");

    // The policy runs as before, and the newest point has all that was written, without a gap.
    let run = shop.run_vm();
    assert_eq!(run["success"], true, "{run}");
    let after = shop.records(shop.points("busy").last().unwrap());
    assert!(
        after > before && before > at_failover,
        "{at_failover}, {before}, {after}"
    );
    expect_state(&shop, "kept");
    let vms = shop.run(&["points"]).expect_json()["vms"].clone();
    let points = vms[0]["points"].as_array().unwrap();
    let pinned = points.iter().filter(|point| point["pinned"] == true);
    let pinned: Vec<&str> = pinned
        .map(|point| point["path"].as_str().unwrap())
        .collect();
    assert_eq!(pinned, [kept.as_str()]);
    a.assert_tidy();
    b.assert_tidy();
}

#[test]
fn of_400_days_those_points_stay_that_were_promised_each_byte_for_byte() {
    let keep = "keep = { daily = 7, monthly = 6 }\n";
    let policy = format!("vms = [\"web\"]\n{keep}{EVERY_MINUTE}");
    let Some(shop) = Replication::start([Kind::Ext4, Kind::Xfs], &policy) else {
        return;
    };
    shop.site.define(&shop.site.a, &Vm::new("web"));
    shop.run_vm();
    let first = shop.points("web").remove(0);
    let month = |name: &str| name[..6].to_owned();
    // Seven days with today, and the last day of each of the five months before this one.
    let today = first.rsplit('/').next().unwrap();
    let (mut months, mut stays) = (vec![month(today)], Vec::new());
    for day in 1..=400 {
        let ago = format!("{day} days ago");
        let instant = tool("date", ["-u", "-d", &ago, "+%Y-%m-%dT12:00:00Z"]);
        let name = instant.trim().replace(['-', ':'], "");
        let path = format!("{PLACE}/web/points/{name}");
        let (from, to) = (
            shop.file(&first, ""),
            shop.file(&first, &format!("../{name}")),
        );
        let [from, to] = [from.as_os_str(), to.as_os_str()];
        tool(
            "cp",
            ["-rT".as_ref(), "--reflink=always".as_ref(), from, to],
        );
        let manifest = shop.file(&path, "manifest.json");
        let text = std::fs::read_to_string(&manifest).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json["instant"] = instant.trim().into();
        // As it is written: a field a line.
        std::fs::write(&manifest, serde_json::to_string_pretty(&json).unwrap()).unwrap();
        let disk = shop.file(&path, "vda.raw");
        set_mark(&disk, &name);
        let is_last = !months.contains(&month(&name)) && months.len() < 6;
        if is_last {
            months.push(month(&name));
        }
        if day <= 6 || is_last {
            stays.push((path, digest(&disk)));
        }
    }
    stays.reverse();
    let run = shop.run_vm();
    let newest = format!("{PLACE}/web/points/{}", run["point"].as_str().unwrap());
    let mut paths: Vec<String> = stays.iter().map(|(path, _)| path.clone()).collect();
    paths.push(newest);
    assert_eq!(shop.points("web"), paths);
    let removed = run["removed"].as_array().map(Vec::len);
    assert_eq!(removed, Some(402 - paths.len()));
    for (path, was) in &stays {
        assert_eq!(digest(&shop.file(path, "vda.raw")), *was, "{path}");
    }
}

#[test]
fn a_group_is_started_in_its_order_also_when_its_policy_is_gone() {
    let policy = "vms = [\"*\"]\norder = [\"db\"]\ndelay = \"3s\"\n";
    let policy = format!("{policy}{EVERY_MINUTE}");
    let Some(shop) = Replication::start([Kind::Ext4, Kind::Xfs], &policy) else {
        return;
    };
    for vm in ["app", "db"] {
        shop.site.define(&shop.site.a, &Vm::new(vm));
    }
    shop.run(&["run", "shop"]).expect_code(0);
    std::fs::remove_file(&shop.policies).unwrap();
    let from = format!("hvB:{PLACE}");
    let run = shop.run(&["failover", "--from", &from]);
    let vms = run.expect_json()["vms"].clone();
    let started = [&vms[0]["vm"], &vms[1]["vm"]];
    assert_eq!(started, ["db", "app"], "{run}");
    assert!(run.elapsed >= Duration::from_secs(3), "{run}");
    for vm in ["app", "db"] {
        shop.site.b.virsh(&["destroy", vm]);
    }
}

/// Claims that points are what they were made until somebody writes there, and that the first one goes
/// anywhere.
fn check_points(shop: &Replication, points: &[String]) {
    let a = &shop.site.a;
    let first = points[0].rsplit('/').next().unwrap_or_default();
    let verify = |options: &[&str]| shop.run(&[&["verify", "shop"], options].concat());
    verify(&["--all"]).expect_code(0);
    let newest = shop.file(&points[1], "vdb.raw");
    overwrite(&newest, &[Piece::Hole(1 << 20), Piece::Byte(7)]);
    let differs = verify(&[]);
    differs.expect_failure(7, &["mismatch"], "(disk vdb)");
    verify(&["--point", first]).expect_code(0);
    let restore = [
        "restore",
        "shop",
        "web",
        "hvA:/var/lib/libvirt/images/back",
        "--point",
        first,
    ];
    let restored = shop.run(&restore).expect_json();
    assert_eq!(restored["vms"][0]["point"], first, "{restored}");
    for disk in ["vda.raw", "vdb.raw"] {
        let back = a.image("back").join(disk);
        kvm_clone_tests::image::assert_equal(&shop.file(&points[0], disk), &back);
    }
    let nvram = a.run(&[
        "cmp",
        "/var/lib/libvirt/images/back/nvram",
        "/var/lib/libvirt/qemu/nvram/web_VARS.fd",
    ]);
    assert_eq!(nvram, "");
    let xml = a.run(&["cat", "/var/lib/libvirt/images/back/domain.xml"]);
    assert!(
        xml.contains("file='/var/lib/libvirt/images/back/vdb.raw'"),
        "{xml}"
    );
    shop.run(&restore)
        .expect_failure(5, &["refused"], "is there already");
    let vms = shop.run(&["points"]).expect_json()["vms"].clone();
    assert_eq!(vms[0]["points"][0]["pinned"], false, "{vms}");
}

#[test]
fn without_source_and_policy_a_replica_starts_from_its_directory_once_the_source_is_said_to_be_dead()
 {
    let policy = format!("vms = [\"*\"]\n{EVERY_MINUTE}");
    let Some(shop) = Replication::start([Kind::Ext4, Kind::Xfs], &policy) else {
        return;
    };
    let (a, b) = (&shop.site.a, &shop.site.b);
    let uefi = Vm::new("web").firmware(Firmware::Uefi);
    shop.site
        .define(a, &uefi.disks(&[("vda", "raw"), ("vdb", "qcow2")]));
    a.boots("web");
    for mark in ["one", "two"] {
        set_mark(&a.image("web-vda.raw"), mark);
        shop.run(&["run", "shop"]).expect_code(0);
    }
    let points = shop.points("web");
    let first = points[0].rsplit('/').next().unwrap();
    // A rehearsal has UEFI variables of its own.
    shop.write(&format!("{policy}sign-of-life = \"GUEST (ready|up)\"\n"));
    let test = shop.run(&["test", "shop", "--point", first]);
    let tested = test.expect_json()["vms"][0].clone();
    assert_eq!(tested["sign"], "console", "{test}");
    assert_eq!(
        b.run(&["find", "/var/log/libvirt", "-name", "*-test-*"]),
        ""
    );
    shop.write(&format!("{policy}sign-of-life = \"GUEST (\"\n"));
    let senseless = shop.run(&["test", "shop"]);
    senseless.expect_failure(2, &["usage"], "no expression of grep -E");
    shop.write(&policy);
    assert_eq!(tested["point"], first, "{test}");
    assert_eq!(b.run(&["sh", "-c", "ls /var/lib/libvirt/qemu/nvram"]), "");
    check_points(&shop, &points);
    a.run(&["ip", "link", "set", "eth0", "down"]);
    // A fence that fails makes nothing sure; one that does not, does.
    let with_fence = |fence: &str| {
        shop.write(&format!("{policy}fence = '{fence}'\n"));
        shop.run(&["failover", "shop"])
    };
    let unsure = with_fence("echo no power >&2; exit 1");
    unsure.expect_failure(5, &["refused"], "the fence failed");
    assert!(unsure.stderr.contains("no power"), "{unsure}");
    let fenced = with_fence("test $SOURCE = hvA -a $VM = web");
    fenced.expect_code(0);
    b.virsh(&["destroy", "web"]);
    shop.run(&["undo", "shop"]).expect_code(0);
    // What is beside the replicas is as good as the file.
    std::fs::copy(b.image("kvm-clone/shop/.policy.toml"), &shop.policies).unwrap();
    shop.run(&["status"]).expect_code(0);
    std::fs::remove_file(&shop.policies).unwrap();
    // As from another machine: nothing is known of what was done.
    let state = shop.site.controller.home().join(".local/state");
    std::fs::remove_dir_all(state).unwrap();
    let from = format!("hvB:{PLACE}");
    let failover = |options: &[&str]| {
        let words = [&["failover", "--from", &from], options].concat();
        shop.run(&words)
    };
    let unknown = failover(&[]);
    unknown.expect_failure(5, &["refused"], "whether web runs on hvA is not known");
    let nobody = failover(&["--vm", "mail"]);
    nobody.expect_code(4);
    let run = failover(&["--source-is-dead", "--point", first]);
    assert_eq!(run.expect_json()["vms"][0]["point"], first, "{run}");
    let said = wait_for("its boot", PATIENCE * 2, || {
        let said = b.console("web");
        said.contains("GUEST ready").then_some(said)
    });
    assert!(said.contains(&mark("vda", "one")), "{said}");
    b.virsh(&["destroy", "web"]);
    let one = format!("{from}/web");
    shop.run(&["undo", "--from", &one]).expect_code(0);
    assert_eq!(b.virsh(&["list", "--all", "--name"]), "");
    // What is newer than the one that was taken stays until that is final.
    failover(&["--source-is-dead", "--point", first]).expect_code(0);
    let committed = shop.run(&["commit", "--from", &one]).expect_json();
    let removed = committed["committed"][0]["removed"].clone();
    assert_eq!(removed.as_array().map(Vec::len), Some(1), "{committed}");
    b.virsh(&["destroy", "web"]);
    let undo = shop.run(&["undo", "--from", &one]);
    undo.expect_code(5);
    assert!(undo.stderr.contains("was committed"), "{undo}");
    assert_eq!(b.run(&["ls", &format!("{PLACE}/web/points")]).trim(), first);
}
