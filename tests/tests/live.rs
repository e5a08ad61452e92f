//! A VM that runs and writes all the time: its copy is one instant of all of its disks, and the next
//! one reads only what the guest has written since.

use std::time::Duration;

use kvm_clone_tests::controller::Run;
use kvm_clone_tests::hypervisor::{Firmware, Hypervisor, Site, SiteSpec, Vm, alone, records};
use kvm_clone_tests::image::MIB;
use kvm_clone_tests::process::wait_for;
use nix::sys::signal::Signal;

/// How long anything may take on a machine that does other things as well.
const PATIENCE: Duration = Duration::from_secs(60);

/// Milliseconds for which a guest may be kept from writing by a snapshot. It is promised half a second,
/// and gets it on a machine that does nothing else: the figure is printed. Here tests run side by side.
const PAUSE: u64 = 3000;

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
        self.instant().unwrap_or_else(|wrong| panic!("{wrong}"))
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
            let (stem, _) = file.rsplit_once('.').expect("its format is its end");
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
    let disks = result["disks"].as_array().into_iter().flatten();
    disks
        .map(|disk| disk["scan"].as_str().unwrap_or("none").to_owned())
        .collect()
}

fn checkpoints(on: &Hypervisor) -> Vec<String> {
    let listed = on.virsh(&["checkpoint-list", "--name", "busy"]);
    listed.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn every_copy_of_a_vm_that_writes_is_one_instant_and_the_guest_is_not_stopped() {
    let _alone = alone();
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
    let mut pauses = site.a.pauses("busy", since);
    pauses.sort_unstable_by(|a, b| b.cmp(a));
    pauses.truncate(count("KVM_CLONE_LIVE_SYNCS", 3));
    println!("{last} records; longest pauses {pauses:?} ms");
    assert!(pauses[0] <= PAUSE, "{pauses:?}");
    // What was written since is a difference, and the first disk has none.
    let verify = pair.run("verify", &[]).expect_code(7).json();
    assert_eq!(verify["disks"][0]["blocks_changed"], 0, "{verify}");
    pair.assert_untouched();
}

#[test]
fn a_torn_copy_is_noticed_by_this_test() {
    let _alone = alone();
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
    let _alone = alone();
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

/// What may happen to a VM between two syncs.
#[derive(Debug, Clone, Copy)]
enum Event {
    Nothing,
    GuestReset,
    LibvirtdStartedAnew,
    CheckpointDeleted,
    DiskResized,
    VmStartedAnew,
    BitmapRemoved,
    BitmapEmptied,
    QemuKilled,
    InternalSnapshot,
    ExternalSnapshot,
}

/// Each with how the second disk must be read then.
const EVENTS: [(Event, &str); 11] = [
    (Event::LibvirtdStartedAnew, "changes"),
    (Event::CheckpointDeleted, "full"),
    (Event::VmStartedAnew, "full"),
    (Event::BitmapEmptied, "full"),
    (Event::QemuKilled, "full"),
    (Event::Nothing, "changes"),
    (Event::GuestReset, "changes"),
    (Event::DiskResized, "changes"),
    (Event::BitmapRemoved, "full"),
    (Event::InternalSnapshot, "changes"),
    (Event::ExternalSnapshot, "full"),
];

impl Event {
    fn happen(self, on: &Hypervisor) {
        let checkpoint = || checkpoints(on).pop().expect("one was kept");
        let off_and_on = |meanwhile: &[&str]| {
            on.virsh(&["destroy", "busy"]);
            if !meanwhile.is_empty() {
                let image = "/var/lib/libvirt/images/busy-vdb.qcow2";
                let words = ["qemu-img", "bitmap"];
                on.run(&[&words[..], meanwhile, &[image, &checkpoint()]].concat());
            }
            on.start_writing("busy");
        };
        match self {
            Self::Nothing => {}
            Self::GuestReset => drop(on.virsh(&["reset", "busy"])),
            Self::LibvirtdStartedAnew => on.restart_libvirtd(),
            Self::CheckpointDeleted => {
                on.virsh(&["checkpoint-delete", "busy", &checkpoint()]);
            }
            Self::DiskResized => drop(on.virsh(&["blockresize", "busy", "vdb", "80M"])),
            Self::VmStartedAnew => off_and_on(&[]),
            Self::BitmapRemoved => off_and_on(&["--remove"]),
            Self::BitmapEmptied => off_and_on(&["--clear"]),
            Self::QemuKilled => {
                on.run(&["pkill", "-KILL", "-f", "guest=busy"]);
                wait_for("its end", PATIENCE, || {
                    (on.virsh(&["domstate", "busy"]).trim() == "shut off").then_some(())
                });
                on.start_writing("busy");
            }
            Self::InternalSnapshot => drop(on.virsh(&["snapshot-create-as", "busy", "inside"])),
            Self::ExternalSnapshot => {
                let options = ["outside", "--disk-only", "--atomic", "--diskspec"];
                let others = ["vda,snapshot=no", "--diskspec", "vdc,snapshot=no"];
                on.virsh(&[&["snapshot-create-as", "busy"], &options[..], &others].concat());
            }
        }
    }
}

#[test]
fn whatever_happens_to_the_vm_the_next_copy_is_right_and_says_how_it_was_read() {
    let _alone = alone();
    let Some(site) = Site::start() else { return };
    let pair = Pair::start(&site, ["qcow2", "qcow2", "qcow2"]);
    pair.clone(&[]);
    for (event, scan) in EVENTS {
        event.happen(&site.a);
        let (result, records) = pair.sync();
        let warnings = &result["warnings"];
        println!(
            "{event:?}: {:?} {warnings}, {records} records",
            scans(&result)
        );
        assert_eq!(scans(&result)[1], scan, "{event:?}: {result}");
        let warned = warnings.as_array().map(Vec::len) != Some(0);
        assert_eq!(warned, scan == "full", "{event:?}: {result}");
        let (result, _) = pair.sync();
        assert_eq!(scans(&result)[1], "changes", "after {event:?}: {result}");
    }
    // Of one that does not go on the copy is equal, to the byte.
    site.a.virsh(&["suspend", "busy"]);
    let (result, _) = pair.sync();
    assert_eq!(result["consistency"], "crash", "{result}");
    let verify = pair.run("verify", &[]);
    assert_eq!(verify.json()["blocks_changed"], 0, "{verify}");
    site.a.virsh(&["resume", "busy"]);
    pair.assert_untouched();
}

#[test]
fn a_run_that_is_killed_leaves_a_guest_that_writes_and_nothing_else() {
    let _alone = alone();
    let Some(site) = Site::start() else { return };
    let pair = Pair::start(&site, ["qcow2", "raw", "qcow2"]);
    pair.clone(&[]);
    let took = pair.run("sync", &[]).elapsed;
    let kills = count("KVM_CLONE_LIVE_KILLS", 4);
    for kill in 0..kills {
        let slowly = ["--method", "blocksync", "--read-limit", "20M"];
        let words = ["sync", "hvA", "hvB", "busy"];
        let running = site.controller.start(words.iter().chain(&slowly));
        let part = (kill as f64 + 0.5) / kills as f64;
        let victims = [
            ("the controller", None),
            ("agents of hvA", Some(&site.a)),
            ("agents of hvB", Some(&site.b)),
            ("sshd of hvA", None),
        ];
        let (victim, agents_of) = victims[kill % victims.len()];
        // Agents live for some seconds only, the others for the whole run.
        let moment = match agents_of {
            None => took.mul_f64(part),
            Some(host) => {
                wait_for("an agent", PATIENCE, || {
                    (!host.agents().is_empty()).then_some(())
                });
                Duration::from_secs(2).mul_f64(part)
            }
        };
        std::thread::sleep(moment);
        match (victim, agents_of) {
            (_, Some(host)) => drop(host.exec(&["pkill", "-KILL", "-f", "kvm-clone/agent-"])),
            ("the controller", _) => running.signal(Signal::SIGKILL),
            _ => drop(site.a.exec(&["pkill", "-KILL", "-f", "sshd: root"])),
        }
        let run = running.wait();
        // Killed, too late, or a connection that broke or was refused.
        assert!(matches!(run.code(), None | Some(0 | 3 | 6)), "{run}");
        let error = match run.code() {
            None | Some(0) => serde_json::Value::Null,
            Some(_) => run.json()["error"]["message"].clone(),
        };
        println!("{victim} after {moment:?}: exit {:?} {error}", run.code());
        // The copy is an old instant or a new one, or a run that recovers makes it one.
        site.controller.run(["recover", "hvB"]).expect_code(0);
        site.controller.run(["recover", "hvA"]).expect_code(0);
        pair.instant().unwrap();
        pair.assert_untouched();
        assert_eq!(site.a.virsh(&["domstate", "busy"]).trim(), "running");
    }
    let (result, _) = pair.sync();
    println!("{:?} {}", scans(&result), result["warnings"]);
    assert_eq!(checkpoints(&site.a).len(), 1, "{result}");
}

#[test]
fn a_clone_of_a_uefi_vm_that_runs_boots_and_goes_on_where_it_was() {
    let _alone = alone();
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

#[test]
fn where_space_runs_out_the_copy_fails_and_the_guest_goes_on() {
    let _alone = alone();
    let Some(site) = Site::start() else { return };
    let pair = Pair::start(&site, ["qcow2", "raw", "qcow2"]);
    pair.clone(&[]);
    let slowly = ["--method", "blocksync", "--full-scan", "--read-limit", "1M"];
    let sync = || {
        let words = ["sync", "hvA", "hvB", "busy"];
        site.controller.start(words.iter().chain(&slowly))
    };
    let running = sync();
    wait_for("a backup job", PATIENCE, || {
        let words = ["virsh", "-q", "backup-dumpxml", "busy"];
        site.a.exec(&words).status.success().then_some(())
    });
    // Another guest fills the file system: 512 MiB are to be left.
    let filler = site.a.image("filler");
    let free = "df --output=avail -B1 /var/lib/libvirt/images | tail -n 1";
    let free: u64 = site.a.run(&["sh", "-c", free]).trim().parse().unwrap();
    let file = std::fs::File::create(&filler).unwrap();
    let len = i64::try_from(free - 400 * MIB).unwrap();
    nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, len).unwrap();
    running.wait().expect_failure(8, &["no_space"], "busy");
    pair.assert_untouched();
    // So it is refused at once.
    sync()
        .wait()
        .expect_failure(8, &["no_space"], "524288 are to be left");
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    // Of a run that failed nothing is built upon, and nothing is in the way of the next.
    pair.sync();
    assert_eq!(checkpoints(&site.a).len(), 1);
    pair.assert_untouched();
}

/// A disk by itself, of a VM that writes to it.
fn one_disk(pair: &Pair<'_>) {
    let images = "/var/lib/libvirt/images";
    let sync = |disk: &str, copy: &str, options: &[&str]| {
        let (from, to) = (
            format!("hvA:{images}/{disk}"),
            format!("hvB:{images}/{copy}"),
        );
        let words = ["disk", "sync", &from, &to].map(str::to_owned);
        let options = options.iter().map(|option| (*option).to_owned());
        pair.site.controller.run(words.into_iter().chain(options))
    };
    for (disk, copy, live, consistency) in [
        ("busy-vdb.qcow2", "one", "auto", "application"),
        ("busy-vdb.qcow2", "one", "snapshot", "application"),
        ("busy-vdc.raw", "two", "pause", "crash"),
    ] {
        let run = sync(disk, copy, &["--live", live]);
        let result = run.expect_json();
        assert_eq!(result["consistency"], consistency, "{run}");
        assert!(result["source"].to_string().contains(disk), "{run}");
        let is_raw = result["warnings"].to_string().contains("is a raw disk");
        assert_eq!(is_raw, disk.ends_with("qcow2"), "{run}");
        let records = records(&pair.site.b.image(copy), "raw");
        assert!(
            records.as_ref().is_ok_and(|records| *records > 0),
            "{records:?}"
        );
        pair.assert_untouched();
    }
    sync("busy-vdb.qcow2", "one", &["--live", "refuse"]).expect_failure(5, &["busy"], "busy-vdb");
    let nobodys = sync(".busy", "one", &["--live", "snapshot"]);
    nobodys.expect_failure(4, &["not_found"], "no VM has");
}

#[test]
fn a_guest_without_its_agent_is_copied_as_after_a_power_cut_or_not_at_all() {
    let _alone = alone();
    let Some(site) = Site::start() else { return };
    let pair = Pair::start(&site, ["raw", "qcow2", "raw"]);
    let doctor = site.controller.run(["doctor", "hvA"]);
    let checks = doctor.expect_json()["hosts"][0]["checks"].clone();
    let checks = checks.as_array().into_iter().flatten();
    let snapshot = checks
        .clone()
        .find(|check| check["name"] == "snapshot of a running VM");
    let detail = snapshot.map(|check| check["detail"].clone());
    assert_eq!(
        detail,
        Some("works, nothing confines QEMU".into()),
        "{doctor}"
    );
    pair.clone(&["--quiesce", "require"]);
    one_disk(&pair);
    let end = r#"{"execute":"guest-exec","arguments":{"path":"/bin/sh","arg":["-c","sleep 1; kill -9 $(pidof qemu-ga)"]}}"#;
    site.a.virsh(&["qemu-agent-command", "busy", end]);
    wait_for("the end of the agent", PATIENCE, || {
        let ping = r#"{"execute":"guest-ping"}"#;
        let words = [
            "virsh",
            "-q",
            "qemu-agent-command",
            "--timeout",
            "1",
            "busy",
            ping,
        ];
        (!site.a.exec(&words).status.success()).then_some(())
    });
    let run = pair.run("sync", &["--quiesce", "require"]);
    run.expect_failure(8, &["missing_requirement"], "freeze");
    let (result, _) = pair.sync();
    assert_eq!(result["consistency"], "crash", "{result}");
    // What another tool has done is left to it.
    site.a
        .virsh(&["checkpoint-create-as", "busy", "other", "--diskspec", "vdb"]);
    pair.sync();
    assert!(checkpoints(&site.a).contains(&"other".to_owned()));
    pair.assert_untouched();
}

/// For how long a VM was suspended by something that is done, in milliseconds, by libvirt's clock.
fn suspended(on: &Hypervisor, done: impl FnOnce()) -> Vec<f64> {
    let log = "/var/log/libvirt/events";
    let watch = format!(
        "virsh qemu-monitor-event busy --loop --timeout 120 --regex --event '^(STOP|RESUME)$' >{log} 2>&1 & echo $! >{log}.pid; sleep 1"
    );
    on.run(&["sh", "-c", &watch]);
    done();
    let read = format!("kill -INT $(cat {log}.pid); sleep 1; cat {log}");
    let said = on.run(&["sh", "-c", &read]);
    let times: Vec<f64> = said
        .lines()
        .filter_map(|line| {
            line.strip_prefix("event ")?
                .split_once("at ")?
                .1
                .split(' ')
                .next()?
                .parse()
                .ok()
        })
        .collect();
    assert!(times.len().is_multiple_of(2), "{said}");
    times
        .chunks(2)
        .map(|pair| (pair[1] - pair[0]) * 1000.0)
        .collect()
}

#[test]
fn a_vm_is_suspended_for_as_short_as_its_file_system_lets_it() {
    let _alone = alone();
    // The other takes a minute more, and proves nothing but its figure.
    let sites = [SiteSpec::default(), SiteSpec::without_reflinks()];
    for spec in &sites[..count("KVM_CLONE_LIVE_PAUSES", 1)] {
        let Some(site) = Site::with(spec) else { return };
        let pair = Pair::start(&site, ["raw", "raw", "raw"]);
        let stops = suspended(&site.a, || {
            let run = pair.run("clone", &["--live", "pause"]);
            assert_eq!(run.expect_json()["consistency"], "crash", "{run}");
        });
        println!("suspended on {:?}: {stops:?} ms", spec.kinds[0]);
        assert_eq!(stops.len(), 1);
        pair.assert_untouched();
    }
}
