//! All disks of a VM count together, or none: the agent of the destination is killed at moments
//! spread over the last part of a sync, and both disks are looked at, then and after the end of it.
//!
//! ```text
//!  story   sync onto OLD ─ all has arrived ─ kill ─ look ─┬─ recover ─ look ─┬─ sync ─ NEW
//!                                                         └──────────────────┘
//! ```
//!
//! `KVM_CLONE_VM_KILLS` is the number of kills of each test, instead of a few.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvm_clone_tests::controller::Running;
use kvm_clone_tests::hypervisor::{Hypervisor, MARK_BYTES, Site, Vm, set_mark};
use kvm_clone_tests::image::{self, MIB, Piece, digest};
use kvm_clone_tests::process::{arguments, kill};

/// Bytes that change from version to version, at the start of each disk: enough for applying them
/// to take a while.
const CHANGED: u64 = 6 * MIB;

/// How often the destination is looked at while a moment is waited for.
const POLL: Duration = Duration::from_micros(500);

fn kills() -> u32 {
    std::env::var("KVM_CLONE_VM_KILLS").map_or(3, |kills| kills.parse().unwrap())
}

/// What is under the name of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    Old,
    New,
    Absent,
}

/// A disk of the VM `pair`, at its source and at its destination.
struct Disk {
    source: PathBuf,
    destination: PathBuf,
    /// The digests of both versions.
    old: String,
    new: String,
}

impl Disk {
    fn new(source: PathBuf, destination: PathBuf) -> Self {
        let new = digest(&source);
        Self {
            source,
            destination,
            old: String::new(),
            new,
        }
    }

    /// What the source holds becomes the old version, and it gets another.
    fn turn_over(&mut self, version: u32) {
        image::overwrite(&self.source, &[Piece::Random(version.into(), CHANGED)]);
        set_mark(&self.source, &format!("version {version}"));
        self.old = std::mem::replace(&mut self.new, digest(&self.source));
    }

    /// Whether the last block of the new version lies beside the destination.
    fn has_arrived(&self) -> bool {
        let mark = |path: &Path| -> Option<Vec<u8>> {
            let file = fs::File::open(path).ok()?;
            let mut bytes = vec![0; usize::try_from(MARK_BYTES).unwrap()];
            let size = self.source.metadata().unwrap().len();
            file.read_exact_at(&mut bytes, size - MARK_BYTES).ok()?;
            Some(bytes)
        };
        let new = mark(&self.source);
        ["kc-stage", "kc-clone"]
            .iter()
            .any(|suffix| mark(&self.beside(suffix)) == new)
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let name = self.destination.file_name().unwrap().to_str().unwrap();
        self.destination.with_file_name(format!(".{name}.{suffix}"))
    }

    /// Whether nothing of a run lies beside the destination.
    fn is_alone(&self) -> bool {
        let suffixes = [
            "kc-stage",
            "kc-clone",
            "kc-journal",
            "kc-applying",
            "kc-new",
        ];
        suffixes.iter().all(|suffix| !self.beside(suffix).exists())
    }

    fn look(&self) -> Seen {
        if !self.destination.exists() {
            return Seen::Absent;
        }
        let digest = digest(&self.destination);
        if digest == self.old {
            Seen::Old
        } else if digest == self.new {
            Seen::New
        } else {
            panic!("{} is a mixture", self.destination.display())
        }
    }
}

/// Both disks of a VM that follows another.
struct Pair<'a> {
    site: &'a Site,
    from: &'a Hypervisor,
    to: &'a Hypervisor,
    disks: [Disk; 2],
    version: u32,
}

impl<'a> Pair<'a> {
    fn new(site: &'a Site, from: &'a Hypervisor, to: &'a Hypervisor) -> Self {
        let vm = Vm::new("pair").disks(&[("vda", "raw"), ("vdb", "raw")]);
        site.define(from, &vm);
        let words = ["clone", from.name(), to.name(), "pair"];
        let words = words.iter().chain(&["--method", "blocksync"]);
        site.controller.run(words).expect_code(0);
        let disk = |target| {
            let name = vm.file(target);
            Disk::new(from.image(&name), to.image(&name))
        };
        Self {
            site,
            from,
            to,
            disks: [disk("vda"), disk("vdb")],
            version: 0,
        }
    }

    /// Moves the destination's `vdb` to /var/tmp, which is on another file system.
    fn move_vdb(&mut self) {
        self.to.run(&[
            "sh",
            "-c",
            "mv /var/lib/libvirt/images/pair-vdb.raw /var/tmp; virsh dumpxml pair >/tmp/pair.xml; \
             sed -i s,/var/lib/libvirt/images/pair-vdb,/var/tmp/pair-vdb, /tmp/pair.xml; \
             virsh define /tmp/pair.xml",
        ]);
        self.disks[1].destination = self.to.var_tmp("pair-vdb.raw");
        self.sync(&["--overwrite"]).wait().expect_code(0);
    }

    fn sync(&self, options: &[&str]) -> Running {
        let words = ["sync", self.from.name(), self.to.name(), "pair"];
        let words = words.iter().chain(&["--method", "blocksync"]);
        self.site.controller.start(words.chain(options))
    }

    fn turn_over(&mut self) {
        self.version += 1;
        for disk in &mut self.disks {
            disk.turn_over(self.version);
        }
    }

    fn look(&self) -> [Seen; 2] {
        [self.disks[0].look(), self.disks[1].look()]
    }

    fn have_arrived(&self) -> bool {
        self.disks.iter().all(Disk::has_arrived)
    }

    fn is_quiet(&self) -> bool {
        self.disks.iter().all(Disk::is_alone)
    }

    /// From the moment at which everything has arrived until nothing lies beside the disks.
    fn measure(&mut self) -> Duration {
        self.turn_over();
        let mut running = self.sync(&[]);
        let mut arrived = None;
        let mut length = None;
        while running.is_alive() {
            if arrived.is_none() && self.have_arrived() {
                arrived = Some(Instant::now());
            }
            if arrived.is_some() && length.is_none() && self.is_quiet() {
                length = arrived.map(|since| since.elapsed());
            }
            std::thread::sleep(POLL);
        }
        running.wait().expect_code(0);
        assert_eq!(self.look(), [Seen::New; 2]);
        length.expect("the end of a run is seen")
    }

    /// Kills the destination's agent so long after everything has arrived, and waits for the end
    /// of the run.
    fn kill_after(&mut self, delay: Duration) {
        self.turn_over();
        let mut running = self.sync(&[]);
        let mut due = None;
        while running.is_alive() {
            if due.is_none() && self.have_arrived() {
                due = Some(Instant::now() + delay);
            }
            if due.is_some_and(|due| Instant::now() >= due) {
                self.kill_agent();
                break;
            }
            std::thread::sleep(POLL);
        }
        let _ = running.wait();
    }

    fn kill_agent(&self) {
        for agent in self.to.agents() {
            if arguments(&agent).iter().any(|word| word == b"serve") {
                kill(&agent);
            }
        }
    }

    fn recover(&self) {
        let run = self.site.controller.run(["recover", self.to.name()]);
        let found = run.expect_json();
        let states = found["hosts"][0]["found"].as_array().unwrap();
        for found in states.iter().filter(|found| found["kind"] == "disk") {
            let state = found["state"].as_str().unwrap();
            assert!(["finished", "rolled_back"].contains(&state), "{run}");
        }
        assert!(self.is_quiet(), "{run}");
    }
}

/// Kills again and again. `may_be` says what is allowed to be seen at once of the two disks.
fn both_disks_are_of_one_version(pair: &mut Pair<'_>, may_be: impl Fn([Seen; 2]) -> bool) {
    let length = pair.measure();
    let n_kills = kills();
    let mut tally: BTreeMap<[Seen; 2], u32> = BTreeMap::new();
    for number in 0..n_kills {
        // Into each part of the time once, the later ones beyond its end.
        let share = (f64::from(number) + 0.5) / f64::from(n_kills) * 1.1;
        pair.kill_after(length.mul_f64(share));
        let seen = pair.look();
        *tally.entry(seen).or_default() += 1;
        assert!(may_be(seen), "{seen:?} at {share}");
        if number.is_multiple_of(2) {
            pair.recover();
            let whole = pair.look();
            let was_committed = seen != [Seen::Old; 2];
            let expected: &[[Seen; 2]] = if was_committed {
                &[[Seen::New; 2]]
            } else {
                &[[Seen::Old; 2], [Seen::New; 2]]
            };
            assert!(expected.contains(&whole), "{seen:?}, then {whole:?}");
        }
        let next = pair.sync(&[]).wait();
        next.expect_code(0);
        assert_eq!(pair.look(), [Seen::New; 2], "{next}");
        assert!(pair.is_quiet(), "{next}");
    }
    // Past libtest's capture: what a campaign has met is of interest.
    let line = format!(
        "{} to {}: {n_kills} kills within {length:.0?}, seen: {tally:?}\n",
        pair.from.name(),
        pair.to.name()
    );
    let _ = std::io::stderr().write_all(line.as_bytes());
    pair.to.assert_tidy();
}

/// Under `staged` all names are taken away before the first comes back.
fn never_one_old_and_one_new(seen: [Seen; 2]) -> bool {
    !(seen.contains(&Seen::Old) && seen.contains(&Seen::New))
}

#[test]
fn two_staged_disks_count_together() {
    let Some(site) = Site::start() else { return };
    let mut pair = Pair::new(&site, &site.a, &site.b);
    both_disks_are_of_one_version(&mut pair, never_one_old_and_one_new);
}

#[test]
fn two_reflinked_disks_count_together() {
    let Some(site) = Site::start() else { return };
    let mut pair = Pair::new(&site, &site.b, &site.a);
    // Between two renames one is new already, and neither is ever without its name.
    both_disks_are_of_one_version(&mut pair, |seen| !seen.contains(&Seen::Absent));
}

#[test]
fn disks_on_two_file_systems_count_together_and_none_is_changed_where_one_cannot_be() {
    let Some(site) = Site::start() else { return };
    let mut pair = Pair::new(&site, &site.b, &site.a);
    pair.move_vdb();
    pair.turn_over();
    let facts = |disk: &Disk| {
        let metadata = fs::metadata(&disk.destination).unwrap();
        (metadata.ino(), metadata.modified().unwrap())
    };
    let before = pair.disks.each_ref().map(facts);
    let refused = pair.sync(&["--apply", "reflink"]).wait();
    refused.expect_failure(8, &["missing_requirement"], "pair-vdb.raw");
    assert_eq!(pair.disks.each_ref().map(facts), before, "{refused}");
    assert_eq!(pair.look(), [Seen::Old; 2], "{refused}");
    let run = pair.sync(&[]).wait();
    let result = run.expect_json();
    let applied = [&result["disks"][0]["apply"], &result["disks"][1]["apply"]];
    assert_eq!(applied, ["reflink", "staged"], "{run}");
    assert_eq!(pair.look(), [Seen::New; 2], "{run}");
    // What is staged has lost its name before what is reflinked is replaced.
    both_disks_are_of_one_version(&mut pair, never_one_old_and_one_new);
}
