//! Replication to a file system whose files share no blocks: points are what was overwritten since.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvm_clone_tests::hypervisor::{Vm, alone, mark, set_mark};
use kvm_clone_tests::image::{Piece, assert_equal, digest, overwrite};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::process::{tool, wait_for};
use kvm_clone_tests::replication::{PLACE, Replication};

const EVERY_MINUTE: &str = "every = \"1m\"\nrpo = \"5m\"\n";

const PATIENCE: Duration = Duration::from_secs(120);

const MIB: u64 = 1 << 20;

/// Runs of a VM that is off, and what the points showed when they were made.
struct Told {
    shop: Replication,
    shown: BTreeMap<String, BTreeMap<String, String>>,
}

impl Told {
    fn start(keep: &str) -> Option<Self> {
        let policy = format!("vms = [\"web\"]\n{keep}\n{EVERY_MINUTE}");
        let shop = Replication::start([Kind::Ext4, Kind::Ext4], &policy)?;
        let web = Vm::new("web").disks(&[("vda", "raw"), ("vdb", "qcow2"), ("vdc", "raw")]);
        shop.site.define(&shop.site.a, &web);
        let data = shop.site.a.image("web-vdc.raw");
        set_len(&data, 12 * MIB);
        overwrite(&data, &[Piece::Random(1, 8 * MIB)]);
        Some(Self {
            shop,
            shown: BTreeMap::new(),
        })
    }

    fn targets(&self, point: &str) -> Vec<String> {
        let manifest = std::fs::read_to_string(self.shop.file(point, "manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        let disks = manifest["disks"].as_array().unwrap().iter();
        disks
            .map(|disk| disk["target"].as_str().unwrap().to_owned())
            .collect()
    }

    /// What a point shows now.
    fn look(&self, point: &str) -> BTreeMap<String, String> {
        // The disk vdb is never written.
        let targets = self
            .targets(point)
            .into_iter()
            .filter(|target| target != "vdb");
        targets
            .map(|target| {
                let shown = self.shop.digest(point, &target);
                (target, shown)
            })
            .collect()
    }

    /// A run; the new point shows what the VM has, and the others what they showed.
    fn run(&mut self) -> String {
        let run = self.shop.run_vm();
        assert_eq!(run["warnings"], serde_json::json!([]), "{run}");
        self.take(&run)
    }

    /// One whose point is so unlike the one before that somebody has to look.
    fn run_in_doubt(&mut self) -> String {
        let run = self.shop.run_vm();
        self.shop.run(&["accept", "shop", "web"]).expect_code(0);
        self.take(&run)
    }

    fn take(&mut self, run: &serde_json::Value) -> String {
        assert_eq!(run["success"], true, "{run}");
        let newest = format!("{PLACE}/web/points/{}", run["point"].as_str().unwrap());
        let raw = self.shop.site.a.image("web-vda.raw");
        assert_eq!(self.shop.digest(&newest, "vda"), digest(&raw));
        let shown = self.look(&newest);
        self.shown.insert(newest.clone(), shown);
        self.check();
        newest
    }

    fn check(&self) {
        for point in self.shop.points("web") {
            assert_eq!(self.look(&point), self.shown[&point], "{point}");
        }
    }

    fn data(&self) -> PathBuf {
        self.shop.site.a.image("web-vdc.raw")
    }
}

/// The last part of a path.
fn name(point: &str) -> &str {
    point.rsplit('/').next().unwrap()
}

fn set_len(path: &Path, len: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

#[test]
fn a_point_shows_the_same_whatever_becomes_of_the_disks_and_of_other_points() {
    let policy = format!("vms = [\"web\"]\nkeep = {{ last = 4 }}\n{EVERY_MINUTE}");
    let Some(mut told) = Told::start("keep = { last = 4 }") else {
        return;
    };
    let (data, disk) = (told.data(), told.shop.site.a.image("web-vda.raw"));
    told.run();
    set_mark(&disk, "two");
    overwrite(&data, &[Piece::Hole(MIB), Piece::Random(2, 3 * MIB)]);
    told.run();
    // Nothing has changed.
    told.run();
    // It grows; what was data is zero; what was a hole is data.
    set_len(&data, 20 * MIB);
    overwrite(
        &data,
        &[
            Piece::Zeros(2 * MIB),
            Piece::Hole(15 * MIB),
            Piece::Random(3, MIB),
        ],
    );
    let grown = told.run();
    told.shop
        .run(&["pin", "shop", "web", name(&grown)])
        .expect_code(0);
    set_len(&data, 3 * MIB + 512);
    told.shop.write(&format!("{policy}max-change = \"100%\"\n"));
    told.run_in_doubt();
    set_len(&data, 24 * MIB);
    overwrite(&data, &[Piece::Random(4, 24 * MIB)]);
    told.run();
    // The disk is another one, is gone, and comes back.
    let a = &told.shop.site.a;
    a.virsh(&["detach-disk", "web", "vdc", "--config"]);
    let gone = told.run_in_doubt();
    assert_eq!(told.targets(&gone), ["vda", "vdb"]);
    overwrite(&data, &[Piece::Random(5, 5 * MIB)]);
    let back = [
        "attach-disk",
        "web",
        "/var/lib/libvirt/images/web-vdc.raw",
        "vdc",
    ];
    let options = ["--config", "--driver", "qemu", "--subdriver", "raw"];
    told.shop.site.a.virsh(&[&back[..], &options].concat());
    for turn in 0..5 {
        set_mark(&disk, &format!("turn {turn}"));
        overwrite(
            &data,
            &[Piece::Hole(turn * MIB), Piece::Random(turn, 2 * MIB)],
        );
        told.run();
    }
    let points = told.shop.points("web");
    assert_eq!((points.len(), &points[0]), (5, &grown));
    told.shop
        .run(&["pin", "shop", "web", name(&grown), "--off"])
        .expect_code(0);
    set_mark(&disk, "the last");
    told.run();
    assert_eq!(told.shop.points("web").len(), 4);
    // Each image holds what was overwritten, and no more.
    for point in &points[2..4] {
        let (image, format) = told.shop.disk(point, "vdc");
        assert_eq!(format, "qcow2");
        let size = std::fs::metadata(&image).unwrap().len();
        assert!((2 * MIB..6 * MIB).contains(&size), "{point}: {size}");
        tool(
            "qemu-img",
            ["check".as_ref(), "-q".as_ref(), image.as_os_str()],
        );
    }
    told.shop.site.b.assert_tidy();
}

#[test]
fn an_older_point_is_restored_rehearsed_and_started_and_the_others_are_what_they_were() {
    let Some(mut told) = Told::start("keep = { last = 9 }\nsign-of-life = \"GUEST ready\"") else {
        return;
    };
    let disk = told.shop.site.a.image("web-vda.raw");
    let copy = told.shop.site.a.image("as-it-was");
    for mark in ["one", "two", "three"] {
        set_mark(&disk, mark);
        if mark == "two" {
            std::fs::copy(&disk, &copy).unwrap();
        }
        overwrite(&told.data(), &[Piece::Random(mark.len() as u64, 2 * MIB)]);
        told.run();
    }
    let (shop, points) = (&told.shop, told.shop.points("web"));
    let (a, b) = (&shop.site.a, &shop.site.b);
    let verified = shop.run(&["verify", "shop", "--all"]).expect_json();
    let read = verified["vms"][0]["points"].as_array().map(Vec::len);
    assert_eq!(read, Some(3), "{verified}");
    let second = name(&points[1]);
    let to = "hvA:/var/lib/libvirt/images/back";
    let restore = ["restore", "shop", "web", to, "--point", second];
    shop.run(&restore).expect_code(0);
    assert_equal(&a.image("back/vda.raw"), &copy);
    for target in ["vdb", "vdc"] {
        let back = a.image(&format!("back/{target}.raw"));
        assert_eq!(digest(&back), shop.digest(&points[1], target));
    }
    shop.run(&restore)
        .expect_failure(5, &["refused"], "is there already");
    told.check();
    let test = shop.run(&["test", "shop", "--point", second]);
    let tested = test.expect_json()["vms"][0].clone();
    assert_eq!(
        (&tested["sign"], &tested["point"]),
        (&"console".into(), &second.into()),
        "{test}"
    );
    told.check();
    // A run that was killed when it had committed, and had made no point of it yet.
    let note = b.image("kvm-clone/shop/web/replica.json");
    let text = std::fs::read_to_string(&note).unwrap();
    let mut head: serde_json::Value = serde_json::from_str(&text).unwrap();
    head["unfinished"] = true.into();
    std::fs::write(&note, head.to_string()).unwrap();
    set_mark(&disk, "four");
    told.run();
    let (shop, b) = (&told.shop, &told.shop.site.b);
    let failover = shop.run(&["failover", "shop", "--point", second]);
    assert_eq!(
        failover.expect_json()["vms"][0]["point"],
        second,
        "{failover}"
    );
    let said = wait_for("its boot", PATIENCE, || {
        let said = b.console("web");
        said.contains("GUEST ready").then_some(said)
    });
    assert!(said.contains(&mark("vda", "two")), "{said}");
    told.check();
    b.virsh(&["destroy", "web"]);
    shop.run(&["undo", "shop"]).expect_code(0);
    told.check();
    // By the runbook of the oldest one.
    let runbook = std::fs::read_to_string(shop.file(&points[0], "RUNBOOK.txt")).unwrap();
    let steps: Vec<&str> = runbook
        .lines()
        .filter_map(|line| line.strip_prefix("  "))
        .collect();
    b.run(&["sh", "-c", &steps.join(" && ")]);
    wait_for("its boot", PATIENCE, || {
        let said = b.console("web");
        let is_up = said.contains("GUEST ready") && said.contains(&mark("vda", "one"));
        is_up.then_some(())
    });
    b.virsh(&["destroy", "web"]);
    b.virsh(&["undefine", "web"]);
    b.run(&["rm", "-r", &format!("{PLACE}/web/live")]);
    // Newer points go with a failover that is final, and what is left stands on the head.
    shop.run(&["failover", "shop", "--point", second])
        .expect_code(0);
    shop.run(&["commit", "shop"]).expect_code(0);
    b.virsh(&["destroy", "web"]);
    assert_eq!(shop.points("web"), points[..2]);
    told.check();
}

#[test]
fn a_head_that_others_have_written_and_a_point_that_cannot_be_read_stop_runs_and_pruning() {
    let Some(mut told) = Told::start("keep = { last = 2 }") else {
        return;
    };
    told.run();
    told.run();
    let (shop, first) = (&told.shop, told.shop.points("web").remove(0));
    let manifest = shop.file(&first, "manifest.json");
    let good = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, "{}").unwrap();
    shop.run(&["run", "shop"])
        .expect_failure(5, &["refused"], "stand on each other");
    std::fs::write(&manifest, good).unwrap();
    let newest = told.run();
    // The clock is put back: what was made last stands on the head, whatever its instant.
    let manifest = told.shop.file(&newest, "manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let mut ahead: serde_json::Value = serde_json::from_str(&text).unwrap();
    ahead["instant"] = "2199-01-01T00:00:00Z".into();
    let ahead = serde_json::to_string_pretty(&ahead).unwrap();
    std::fs::write(&manifest, ahead).unwrap();
    for mark in ["three", "four"] {
        set_mark(&told.shop.site.a.image("web-vda.raw"), mark);
        let run = told.shop.run_vm();
        let warning = run["warnings"][0].as_str().unwrap();
        assert!(warning.contains("has not come"), "{run}");
        told.take(&run);
    }
    std::fs::write(&manifest, text).unwrap();
    told.run();
    let head = told.shop.site.b.image("kvm-clone/shop/web/head/vda.raw");
    set_mark(&head, "others");
    let refused = told.shop.run(&["run", "shop"]);
    refused.expect_failure(5, &["refused"], "not what the last run left");
    let differ = told.shop.run(&["verify", "shop", "--all"]);
    differ.expect_code(7);
    let points = differ.json()["vms"][0]["points"].clone();
    for point in points.as_array().unwrap() {
        assert_eq!(point["differ"], serde_json::json!(["vda"]), "{differ}");
    }
    let words = ["mv", &format!("{PLACE}/web"), &format!("{PLACE}/.spoilt")];
    told.shop.site.b.run(&words);
    told.shown.clear();
    told.run();
    let many = format!("vms = [\"web\"]\nkeep = {{ last = 499, daily = 2 }}\n{EVERY_MINUTE}");
    told.shop.write(&many);
    let check = told.shop.run(&["check"]);
    check.expect_failure(5, &["refused"], "there can be 500");
}

#[test]
fn a_run_that_is_killed_spoils_no_point() {
    let _alone = alone();
    let policy = format!("vms = [\"busy\"]\nkeep = {{ last = 50 }}\n{EVERY_MINUTE}");
    if let Some(shop) = Replication::that_writes(Kind::Ext4, &policy) {
        shop.kill_runs();
    }
}

/// As on XFS; here each point stands on the next one, so that those which go have something that
/// others need.
#[test]
fn of_400_days_those_points_stay_that_were_promised_each_byte_for_byte() {
    let Some(mut told) = Told::start("keep = { daily = 7, monthly = 6 }") else {
        return;
    };
    let first = told.run();
    let shop = &told.shop;
    let month = |name: &str| name[..6].to_owned();
    // Seven days with today, and the last day of each of the five months before this one.
    let (mut months, mut stays) = (vec![month(name(&first))], Vec::new());
    let mut newer = name(&first).to_owned();
    for day in 1..=400_u64 {
        let ago = format!("{day} days ago");
        let instant = tool("date", ["-u", "-d", &ago, "+%Y-%m-%dT12:00:00Z"]);
        let point = instant.trim().replace(['-', ':'], "");
        let path = format!("{PLACE}/web/points/{point}");
        let directory = shop.file(&path, "");
        let from = shop.file(&first, "");
        tool(
            "cp",
            ["-rT".as_ref(), from.as_os_str(), directory.as_os_str()],
        );
        let manifest = directory.join("manifest.json");
        let text = std::fs::read_to_string(&manifest).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json["instant"] = instant.trim().into();
        for disk in json["disks"].as_array_mut().unwrap() {
            disk["file"] = format!("{point}-{}.qcow2", disk["target"].as_str().unwrap()).into();
        }
        std::fs::write(&manifest, serde_json::to_string_pretty(&json).unwrap()).unwrap();
        for target in ["vda", "vdb", "vdc"] {
            let (image, _) = shop.disk(&path, target);
            tool(
                "cp",
                [shop.disk(&first, target).0.as_os_str(), image.as_os_str()],
            );
            let below = format!("{newer}-{target}.qcow2");
            let words = format!("rebase -u -f qcow2 -F qcow2 -b {below} {}", image.display());
            tool("qemu-img", words.split(' '));
        }
        // A block that is this day's, and one that the next eight days show as well.
        let at = [(day % 40) * 65_536, (50 + day / 8) * 65_536];
        let writes = at.map(|at| format!("write -P {} {at} 65536", 1 + day % 250));
        let image = shop.disk(&path, "vdc").0;
        let image = image.to_str().unwrap();
        tool(
            "qemu-io",
            ["-f", "qcow2", "-c", &writes[0], "-c", &writes[1], image],
        );
        newer.clone_from(&point);
        let is_last = !months.contains(&month(&point)) && months.len() < 6;
        if is_last {
            months.push(month(&point));
        }
        if day <= 6 || is_last {
            let shown = shop.digest(&path, "vdc");
            stays.push((path, shown));
        }
    }
    stays.reverse();
    let run = shop.run_vm();
    assert_eq!(run["warnings"], serde_json::json!([]), "{run}");
    let newest = format!("{PLACE}/web/points/{}", run["point"].as_str().unwrap());
    let mut paths: Vec<String> = stays.iter().map(|(path, _)| path.clone()).collect();
    paths.push(newest);
    assert_eq!(shop.points("web"), paths);
    assert_eq!(
        run["removed"].as_array().map(Vec::len),
        Some(402 - paths.len())
    );
    for (path, was) in &stays {
        assert_eq!(shop.digest(path, "vdc"), *was, "{path}");
    }
    let oldest = name(&paths[0]);
    let to = "hvA:/var/lib/libvirt/images/back";
    shop.run(&["restore", "shop", "web", to, "--point", oldest])
        .expect_code(0);
    let back = shop.site.a.image("back/vdc.raw");
    assert_eq!(digest(&back), stays[0].1);
}
