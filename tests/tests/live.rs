//! A VM that runs and writes all the time: its copy is one instant of all of its disks, and the next
//! one reads only what the guest has written since.

use std::time::Duration;

use kvm_clone_tests::controller::Run;
use kvm_clone_tests::hypervisor::{Firmware, Hypervisor, Site, SiteSpec, Vm, records};
use kvm_clone_tests::image::MIB;
use kvm_clone_tests::process::wait_for;
use nix::sys::signal::Signal;

/// How long anything may take on a machine that does other things as well.
const PATIENCE: Duration = Duration::from_secs(60);

/// Milliseconds for which a guest may be kept from writing by a snapshot.
const PAUSE: u64 = 500;

/// How often something is done that is done more often in a campaign.
fn count(name: &str, small: usize) -> usize {
    std::env::var(name).map_or(small, |count| count.parse().expect("a count"))
}

/// A VM that writes on one of two hypervisors, and its copy on the other.
struct Pair<'a> {
    site: &'a Site,
    vm: Vm,
    /// Formats of the copy's second and third disk.
    formats: [&'static str; 2],
}

impl<'a> Pair<'a> {
    /// A VM that runs on the first.
    fn start(site: &'a Site, formats: [&'static str; 3]) -> Self {
        let vm = Vm::that_writes("busy", formats);
        site.define(&site.a, &vm);
        site.a.start_writing("busy");
        let formats = [formats[1], formats[2]];
        Self { site, vm, formats }
    }

    fn run(&self, operation: &str, options: &[&str]) -> Run {
        let words = [operation, "hvA", "hvB", "busy"];
        self.site.controller.run(words.iter().chain(options))
    }

    fn clone(&self, options: &[&str]) -> u64 {
        self.run("clone", options).expect_code(0);
        self.instant().unwrap()
    }

    /// A sync, and how many records its copy has.
    fn sync(&self) -> (serde_json::Value, u64) {
        let run = self.run("sync", &[]);
        let result = run.expect_json();
        let records = self
            .instant()
            .unwrap_or_else(|wrong| panic!("{wrong}: {run}"));
        (result, records)
    }

    /// Records of a copy that is one instant of both disks: all that was written to the second is on
    /// the first, and at most one record more. Else what is wrong with it.
    fn instant(&self) -> Result<u64, String> {
        let copy = |target: &str, format: &str| {
            let file = self.vm.file(target);
            let stem = file.rsplit_once('.').unwrap().0;
            records(&self.site.b.image(&format!("{stem}.{format}")), format)
        };
        let (a, b) = (copy("vdb", self.formats[0])?, copy("vdc", self.formats[1])?);
        match a == b || a == b + 1 {
            true => Ok(a),
            false => Err(format!("{a} records on the first disk, {b} on the second")),
        }
    }

    /// Claims that the guest goes on, and that nothing of ours is left on either host.
    fn assert_untouched(&self) {
        let a = &self.site.a;
        let so_far = a.console("busy").len();
        wait_for("a guest that writes", PATIENCE, || {
            (!a.pauses("busy", so_far).is_empty()).then_some(())
        });
        a.assert_tidy();
        self.site.b.assert_tidy();
    }
}

/// How each disk of a result was read.
fn scans(result: &serde_json::Value) -> Vec<String> {
    let disks = result["disks"].as_array().unwrap();
    disks
        .iter()
        .map(|disk| disk["scan"].as_str().unwrap_or("none").to_owned())
        .collect()
}

fn checkpoints(on: &Hypervisor) -> Vec<String> {
    let listed = on.virsh(&["checkpoint-list", "--name", "busy"]);
    listed.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn every_copy_of_a_vm_that_writes_is_one_instant_and_the_guest_is_not_stopped() {
    let Some(site) = Site::start() else { return };
    let pair = Pair::start(&site, ["qcow2", "raw", "qcow2"]);
    let began = site.a.console("busy").lines().count();
    let mut last = pair.clone(&[]);
    for _ in 0..count("KVM_CLONE_LIVE_SYNCS", 3) {
        let (result, records) = pair.sync();
        assert!(records > last, "{records} after {last}");
        last = records;
        assert_eq!(result["consistency"], "application", "{result}");
        assert_eq!(scans(&result), ["changes", "full", "changes"], "{result}");
        assert_eq!(
            result["warnings"].as_array().map(Vec::len),
            Some(0),
            "{result}"
        );
        assert_eq!(checkpoints(&site.a).len(), 1);
    }
    // From the second line on: the guest has begun before.
    let console = site.a.console("busy");
    let since: usize = console
        .lines()
        .take(began + 1)
        .map(|line| line.len() + 1)
        .sum();
    let pauses = site.a.pauses("busy", since);
    let longest = pauses.iter().max().copied().unwrap_or_default();
    println!("{last} records; longest pause {longest} ms");
    assert!(longest <= PAUSE, "{pauses:?}");
    // What was written since is a difference, and the first disk has none.
    let verify = pair.run("verify", &[]).expect_code(7).json();
    assert_eq!(verify["disks"][0]["blocks_changed"], 0, "{verify}");
    pair.assert_untouched();
}

#[test]
fn a_torn_copy_is_noticed_by_this_test() {
    let Some(site) = Site::start() else { return };
    let pair = Pair::start(&site, ["raw", "raw", "raw"]);
    pair.clone(&[]);
    let torn = |_| {
        let options = [
            "--live",
            "torn",
            "--parallel",
            "1",
            "--method",
            "blocksync",
            "--read-limit",
            "4M",
        ];
        let run = pair.run("sync", &options);
        assert!(
            run.expect_json()["warnings"].to_string().contains("torn"),
            "{run}"
        );
        pair.instant().err()
    };
    let wrong = (0..5).find_map(torn);
    println!("torn: {}", wrong.expect("one of five copies is torn"));
}

/// Has the guest write so much to a file of its own on the second disk.
fn fill(on: &Hypervisor, mebibytes: u64) {
    let command = format!(
        r#"{{"execute":"guest-exec","arguments":{{"path":"/bin/sh","arg":["-c","dd if=/dev/urandom of=/a/fill bs=1M count={mebibytes} && sync && echo GUEST filled >/dev/ttyS0"]}}}}"#
    );
    let before = on.console("busy").matches("GUEST filled").count();
    on.virsh(&["qemu-agent-command", "busy", &command]);
    wait_for("what the guest fills", PATIENCE, || {
        (on.console("busy").matches("GUEST filled").count() > before).then_some(())
    });
}

#[test]
fn of_a_large_disk_only_what_was_written_is_read_and_shipped() {
    const DISK: u64 = 4096 * MIB;
    let images_bytes = 12 * 1024 * MIB;
    let spec = SiteSpec {
        images_bytes,
        ..SiteSpec::default()
    };
    let Some(site) = Site::with(&spec) else {
        return;
    };
    let vm = Vm::that_writes("busy", ["qcow2", "qcow2", "qcow2"]).data_bytes(DISK);
    site.define(&site.a, &vm);
    site.a.start_writing("busy");
    let formats = ["qcow2", "qcow2"];
    let pair = Pair {
        site: &site,
        vm,
        formats,
    };
    fill(&site.a, 100);
    pair.clone(&[]);
    fill(&site.a, 40);
    let (result, _) = pair.sync();
    assert_eq!(scans(&result), ["changes"; 3], "{result}");
    let number = |field: &str| result[field].as_u64().unwrap() / MIB;
    let [read, shipped, total] = ["bytes_read_source", "bytes_wire", "bytes_total"].map(number);
    println!("of {total} MiB {read} were read and {shipped} shipped");
    assert!(
        total >= 2 * DISK / MIB && read <= 100 && shipped <= 60,
        "{result}"
    );
    assert!(shipped >= 40, "{result}");
    pair.assert_untouched();
}

#[test]
fn whatever_happens_to_the_vm_the_next_copy_is_right_and_says_how_it_was_read() {
    let Some(site) = Site::start() else { return };
    let pair = Pair::start(&site, ["qcow2", "qcow2", "qcow2"]);
    let a = &site.a;
    pair.clone(&[]);
    let image = "/var/lib/libvirt/images/busy-vdb.qcow2";
    let off_and_on = |meanwhile: &[&str]| {
        a.virsh(&["destroy", "busy"]);
        if !meanwhile.is_empty() {
            a.run(&[&["qemu-img"], meanwhile].concat());
        }
        a.start_writing("busy");
    };
    let name = || checkpoints(a).pop().expect("one was kept");
    let snapshot = |options: &[&str]| {
        let words = ["snapshot-create-as", "busy"];
        a.exec(&[&["virsh", "-q"], &words[..], options].concat())
    };
    let events: [(&str, &str, Box<dyn Fn() + '_>); 11] = [
        ("nothing", "changes", Box::new(|| {})),
        (
            "the guest is reset",
            "changes",
            Box::new(|| {
                a.virsh(&["reset", "busy"]);
            }),
        ),
        (
            "libvirtd is started anew",
            "changes",
            Box::new(|| a.restart_libvirtd()),
        ),
        (
            "the checkpoint is deleted",
            "full",
            Box::new(|| {
                a.virsh(&["checkpoint-delete", "busy", &name()]);
            }),
        ),
        (
            "the disk is resized",
            "changes",
            Box::new(|| {
                a.virsh(&["blockresize", "busy", "vdb", "80M"]);
            }),
        ),
        (
            "the VM is started anew",
            "full",
            Box::new(|| off_and_on(&[])),
        ),
        (
            "the bitmap is removed",
            "full",
            Box::new(|| {
                off_and_on(&["bitmap", "--remove", image, &name()]);
            }),
        ),
        (
            "the bitmap is emptied",
            "full",
            Box::new(|| {
                off_and_on(&["bitmap", "--clear", image, &name()]);
            }),
        ),
        (
            "QEMU is killed",
            "full",
            Box::new(|| {
                a.run(&["pkill", "-KILL", "-f", "guest=busy"]);
                wait_for("its end", PATIENCE, || {
                    (a.virsh(&["domstate", "busy"]).trim() == "shut off").then_some(())
                });
                a.start_writing("busy");
            }),
        ),
        (
            "an internal snapshot is taken",
            "changes",
            Box::new(|| {
                let taken = snapshot(&["inside"]);
                println!(
                    "an internal snapshot: {}",
                    String::from_utf8_lossy(&taken.stderr)
                );
            }),
        ),
        (
            "an external snapshot is taken",
            "full",
            Box::new(|| {
                let others = ["vda", "vdc"].map(|disk| format!("{disk},snapshot=no"));
                let taken = snapshot(&[
                    "outside",
                    "--disk-only",
                    "--atomic",
                    "--diskspec",
                    &others[0],
                    "--diskspec",
                    &others[1],
                ]);
                assert!(
                    taken.status.success(),
                    "{}",
                    String::from_utf8_lossy(&taken.stderr)
                );
            }),
        ),
    ];
    for (what, scan, event) in events {
        event();
        let (result, records) = pair.sync();
        println!(
            "{what}: {:?} {}, {records} records",
            scans(&result),
            result["warnings"]
        );
        assert_eq!(scans(&result)[1], scan, "{what}: {result}");
        let warned = result["warnings"].as_array().map(Vec::len) != Some(0);
        assert_eq!(warned, scan == "full", "{what}: {result}");
        let (result, _) = pair.sync();
        assert_eq!(scans(&result)[1], "changes", "after it, {what}: {result}");
    }
    // Of one that does not go on the copy is equal, to the byte.
    a.virsh(&["suspend", "busy"]);
    let (result, _) = pair.sync();
    assert_eq!(result["consistency"], "crash", "{result}");
    pair.run("verify", &[]).expect_code(0);
    a.virsh(&["resume", "busy"]);
    pair.assert_untouched();
}

#[test]
fn a_run_that_is_killed_leaves_a_guest_that_writes_and_nothing_else() {
    let Some(site) = Site::start() else { return };
    let pair = Pair::start(&site, ["qcow2", "raw", "qcow2"]);
    pair.clone(&[]);
    let took = pair.run("sync", &[]).elapsed;
    let kills = count("KVM_CLONE_LIVE_KILLS", 4);
    for kill in 0..kills {
        let words = ["sync", "hvA", "hvB", "busy", "--read-limit", "20M"];
        let running = site.controller.start(words);
        let moment = took.mul_f64((kill as f64 + 0.5) / kills as f64 * 1.2);
        std::thread::sleep(moment);
        let victims = [
            "the controller",
            "agents of hvA",
            "agents of hvB",
            "sshd of hvA",
        ];
        match kill % victims.len() {
            0 => running.signal(Signal::SIGKILL),
            1 => drop(site.a.exec(&["pkill", "-KILL", "-f", "kvm-clone/agent-"])),
            2 => drop(site.b.exec(&["pkill", "-KILL", "-f", "kvm-clone/agent-"])),
            _ => drop(site.a.exec(&["pkill", "-KILL", "-f", "sshd: root"])),
        }
        let run = running.wait();
        println!(
            "{} at {moment:?}: exit {:?}",
            victims[kill % victims.len()],
            run.code()
        );
        // The copy is an old instant or a new one, or a run that recovers makes it one.
        site.controller.run(["recover", "hvB"]).expect_code(0);
        site.controller.run(["recover", "hvA"]).expect_code(0);
        pair.instant().unwrap();
        pair.assert_untouched();
        assert_eq!(site.a.virsh(&["domstate", "busy"]).trim(), "running");
    }
    let (result, _) = pair.sync();
    println!("{:?} {}", scans(&result), result["warnings"]);
}

#[test]
fn a_clone_of_a_uefi_vm_that_runs_boots_and_goes_on_where_it_was() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::that_writes("busy", ["raw", "qcow2", "qcow2"]).firmware(Firmware::Uefi);
    site.define(&site.a, &vm);
    site.a.start_writing("busy");
    let formats = ["raw", "raw"];
    let pair = Pair {
        site: &site,
        vm,
        formats,
    };
    let records = pair.clone(&["--dest-format", "raw", "--quiesce", "off"]);
    site.b.start_writing("busy");
    let console = site.b.console("busy");
    assert!(console.contains("GUEST firmware uefi"), "{console}");
    let first = console.lines().find_map(|line| {
        let number = line.strip_prefix("GUEST wrote ")?;
        number.split_once(' ')?.0.parse::<u64>().ok()
    });
    assert!(
        first > Some(records),
        "{first:?} after {records}: {console}"
    );
    site.b.virsh(&["destroy", "busy"]);
    assert!(pair.instant().unwrap() > records);
    pair.assert_untouched();
}
