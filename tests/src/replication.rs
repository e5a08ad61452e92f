//! Replication between two hypervisors, by one policy.

#![expect(
    clippy::unwrap_used,
    reason = "a laboratory that is broken is a failed test"
)]

use std::path::PathBuf;

use serde_json::Value;

use crate::controller::{Run, Running};
use crate::hypervisor::{Site, SiteSpec, Vm, records};
use crate::mount::Kind;

/// Where replicas are on hvB.
pub const PLACE: &str = "/var/lib/libvirt/images/kvm-clone/shop";

/// Two hypervisors, the second with XFS, and a policy from the one to the other.
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

    /// With a VM, busy, that writes on hvA.
    pub fn that_writes(policy: &str) -> Option<Self> {
        let shop = Self::start([Kind::Ext4, Kind::Xfs], policy)?;
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

    /// Claims that a point is one instant, and gives its records.
    ///
    /// # Panics
    /// When that cannot be had.
    pub fn records(&self, point: &str) -> u64 {
        let count = |file: &str| records(&self.file(point, file), "raw").unwrap();
        let (a, b) = (count("vdb.raw"), count("vdc.raw"));
        assert!(a == b || a == b + 1, "{point}: {a} and {b} records");
        a
    }
}
