//! Replication between two hypervisors, by one policy.

#![expect(
    clippy::unwrap_used,
    reason = "a laboratory that is broken is a failed test"
)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::controller::{Run, Running};
use crate::hypervisor::{Site, SiteSpec, Vm, records};
use crate::image::digest;
use crate::mount::Kind;
use crate::process::{tool, wait_for};

/// Where replicas are on hvB.
pub const PLACE: &str = "/var/lib/libvirt/images/kvm-clone/shop";

const PATIENCE: Duration = Duration::from_secs(60);

/// Two hypervisors, and a policy from the one to the other.
#[derive(Debug)]
pub struct Replication {
    /// The hosts.
    pub site: Site,
    /// The file of policies.
    pub policies: PathBuf,
}

impl Replication {
    /// With these file systems; `None` where a part is missing.
    pub fn start(kinds: [Kind; 2], policy: &str) -> Option<Self> {
        let spec = SiteSpec {
            kinds,
            ..SiteSpec::default()
        };
        let site = Site::with(&spec)?;
        let policies = site.controller.home().join("policies.toml");
        let replication = Self { site, policies };
        replication.write(policy);
        Some(replication)
    }

    /// With a VM, busy, that writes on hvA, and this file system for its replica.
    pub fn that_writes(kind: Kind, policy: &str) -> Option<Self> {
        let shop = Self::start([Kind::Ext4, kind], policy)?;
        let busy = Vm::that_writes("busy", ["qcow2", "raw", "qcow2"]);
        shop.site.define(&shop.site.a, &busy);
        shop.site.a.start_writing("busy");
        Some(shop)
    }

    /// Makes this the rest of the only policy.
    ///
    /// # Panics
    /// When the file cannot be written.
    pub fn write(&self, policy: &str) {
        let both = "[policy.shop]\nsource = \"hvA\"\ndestination = \"hvB\"\n";
        std::fs::write(&self.policies, format!("{both}{policy}")).unwrap();
    }

    /// The words of a command of `replicate` by that file.
    ///
    /// # Panics
    /// When its path is not UTF-8.
    #[must_use]
    pub fn words(&self, words: &[&str]) -> Vec<String> {
        let file = self.policies.to_str().unwrap();
        let all = [&["replicate"], words, &["--policies", file]].concat();
        all.into_iter().map(str::to_owned).collect()
    }

    /// Starts a command of `replicate`.
    #[must_use]
    pub fn start_run(&self, words: &[&str]) -> Running {
        self.site.controller.start(self.words(words))
    }

    /// Runs one to its end.
    #[must_use]
    pub fn run(&self, words: &[&str]) -> Run {
        self.start_run(words).wait()
    }

    /// A run of the policy, and what it did with its only VM.
    ///
    /// # Panics
    /// When that cannot be had.
    pub fn run_vm(&self) -> Value {
        let run = self.run(&["run", "shop"]);
        let runs = run.expect_json()["runs"].clone();
        assert_eq!(runs.as_array().map(Vec::len), Some(1), "{run}");
        runs[0].clone()
    }

    /// The directories of the points of a VM, as its host has them, from the oldest on.
    ///
    /// # Panics
    /// When that cannot be had.
    #[must_use]
    pub fn points(&self, vm: &str) -> Vec<String> {
        let run = self.run(&["points"]);
        let vms = run.expect_json()["vms"].clone();
        let of = |name: &str| vms.as_array()?.iter().find(|vm| vm["vm"] == name).cloned();
        let points = of(vm).unwrap_or_default()["points"].clone();
        let points = points.as_array().into_iter().flatten();
        points
            .map(|point| point["path"].as_str().unwrap().to_owned())
            .collect()
    }

    /// A file of a point, as the test sees it.
    ///
    /// # Panics
    /// When that cannot be had.
    #[must_use]
    pub fn file(&self, point: &str, file: &str) -> PathBuf {
        let below = point.strip_prefix("/var/lib/libvirt/images/").unwrap();
        self.site.b.image(below).join(file)
    }

    /// A disk of a point, and the format of that file.
    ///
    /// # Panics
    /// Never: a path has a last part.
    #[must_use]
    pub fn disk(&self, point: &str, target: &str) -> (PathBuf, &'static str) {
        let raw = self.file(point, &format!("{target}.raw"));
        match raw.exists() {
            true => (raw, "raw"),
            false => {
                let name = point.rsplit('/').next().unwrap();
                let file = format!("../../deltas/{name}-{target}.qcow2");
                (self.file(point, &file), "qcow2")
            }
        }
    }

    /// The digest of what a guest would see of a disk of a point.
    ///
    /// # Panics
    /// When that cannot be had.
    #[must_use]
    pub fn digest(&self, point: &str, target: &str) -> String {
        let (file, format) = self.disk(point, target);
        if format == "raw" {
            return digest(&file);
        }
        let raw = self.site.controller.home().join("digested.raw");
        let words = ["convert", "-q", "-f", format, "-O", "raw"].map(AsRef::as_ref);
        let paths = [file.as_os_str(), raw.as_os_str()];
        tool("qemu-img", words.into_iter().chain(paths));
        digest(&raw)
    }

    /// Claims that a point is one instant, and gives its records.
    ///
    /// # Panics
    /// When that cannot be had.
    pub fn records(&self, point: &str) -> u64 {
        let count = |target: &str| {
            let (file, format) = self.disk(point, target);
            records(&file, format).unwrap()
        };
        let (a, b) = (count("vdb"), count("vdc"));
        assert!(a == b || a == b + 1, "{point}: {a} and {b} records");
        a
    }

    /// Kills runs that make points of the VM that writes, at as many times: no point is torn or lost,
    /// or shows anything else from then on, and what the run had is let go.
    ///
    /// # Panics
    /// When that cannot be said.
    pub fn kill_runs(&self) {
        let kills = std::env::var("KVM_CLONE_REPLICATION_KILLS");
        let kills: u32 = kills.map_or(2, |count| count.parse().expect("a count"));
        self.run_vm();
        let began = Instant::now();
        self.run_vm();
        let took = began.elapsed();
        for kill in 0..kills {
            let before = self.points("busy");
            let digests: Vec<String> = before
                .iter()
                .map(|point| self.digest(point, "vdb"))
                .collect();
            let running = self.start_run(&["run", "shop"]);
            std::thread::sleep(took.mul_f64((f64::from(kill) + 0.5) / f64::from(kills)));
            running.signal(Signal::SIGKILL);
            drop(running);
            let after = self.points("busy");
            assert_eq!(after[..before.len()], before, "no point is lost");
            for point in &after[before.len()..] {
                self.records(point);
            }
            // Its host lets go of what that run had; then all is as ever.
            let again = || {
                let run = self.run(&["run", "shop"]);
                let is_busy = run.json()["runs"][0]["error"]["code"] == "busy";
                (!is_busy).then_some(run)
            };
            wait_for("the end of that run", PATIENCE, again).expect_code(0);
            let newest = self.points("busy");
            self.records(newest.last().unwrap());
            for (point, was) in before.iter().zip(&digests) {
                assert_eq!(self.digest(point, "vdb"), *was, "{point}");
            }
            let listed = self.site.a.virsh(&["checkpoint-list", "--name", "busy"]);
            assert_eq!(listed.split_whitespace().count(), 1, "{listed}");
            self.site.a.assert_tidy();
            self.site.b.assert_tidy();
        }
    }
}
