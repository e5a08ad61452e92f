//! A VM with several disks on one hypervisor, and its copy on another: two real ones, each with
//! libvirt and an sshd of its own, as the tests have them.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use kvm_clone_tests::hypervisor::{Hypervisor, Site, SiteSpec, Vm};
use nix::sys::prctl::set_child_subreaper;

use crate::case::Case;
use crate::image::{self, Layout, Version};
use crate::lab::{Outcome, QUIET};
use crate::measure::{self, Meter, Subject, measure};
use crate::tool::{SyncResult, Tool};

/// What the disks are called.
const TARGETS: [&str; 8] = ["vda", "vdb", "vdc", "vdd", "vde", "vdf", "vdg", "vdh"];

/// The VM, and its copy on the other hypervisor.
const VM: &str = "web";
const COPY: &str = "copy";

/// The place: a VM on hvA, its copy on hvB.
#[derive(Debug)]
pub(crate) struct VmLab {
    site: Site,
    vm: Vm,
    targets: &'static [&'static str],
    layout: Layout,
    /// What the source's blocks that change are now.
    version: Cell<Version>,
    controller: PathBuf,
    outputs: PathBuf,
}

impl VmLab {
    /// Defines a VM with so many disks; `None`, and a line that says so, where no hypervisors can
    /// be.
    pub(crate) fn new(controller: &Path, layout: Layout, disks: u8) -> Result<Option<Self>> {
        let targets = TARGETS
            .get(..disks.into())
            .with_context(|| format!("{disks} disks: there are names for {}", TARGETS.len()))?;
        // The hosts wait for the end of their first processes, which nobody would reap here. What is
        // measured stays among their children, or the controller's.
        set_child_subreaper(false).context("being no subreaper")?;
        let spec = SiteSpec {
            images_bytes: 4 * layout.size() * u64::from(disks) + (1 << 30),
            ..SiteSpec::default()
        };
        let Some(site) = Site::with(&spec) else {
            return Ok(None);
        };
        let formats: Vec<_> = targets.iter().map(|target| (*target, "raw")).collect();
        let vm = Vm::new(VM).disks(&formats);
        for target in targets {
            layout.write_source(&site.a.image(&vm.file(target)))?;
        }
        site.a.define(&vm.xml());
        let outputs = site.controller.home().join("outputs");
        fs::create_dir_all(&outputs)?;
        let lab = Self {
            site,
            vm,
            targets,
            layout,
            version: Cell::new(Version::New),
            controller: controller.to_owned(),
            outputs,
        };
        let deploy = lab.command(&["agent", "deploy", "hvA", "hvB"]);
        lab.run(deploy)?;
        Ok(Some(lab))
    }

    /// One run, from the state that the case asks for, checked at the end.
    pub(crate) fn measure(&self, case: Case, tool: Tool) -> Result<Outcome> {
        let command = match case {
            Case::First => {
                self.remove_copy()?;
                self.command(&["clone", "hvA", "hvB", VM, "--new-name", COPY])
            }
            Case::Changed(percent) => {
                if percent > 0 {
                    self.change(case)?;
                } else {
                    self.run(self.sync(tool))?;
                }
                self.sync(tool)
            }
        };
        let subject = Subject {
            command,
            // blocksync says that it is done when the disks have it.
            result: None,
            is_worker: tool.is_worker(),
            outputs: &self.outputs,
        };
        let figures = measure(subject, &Interface(&self.site.b))?;
        let sync = SyncResult::parse(&fs::read(self.outputs.join("stdout"))?)?;
        self.check()?;
        Ok(Outcome {
            figures,
            allocated_bytes: None,
            sync: Some(sync),
        })
    }

    /// Has the blocks of a case hold something else on the source, long enough ago to be told by
    /// its times.
    fn change(&self, case: Case) -> Result<()> {
        let version = match self.version.get() {
            Version::Old => Version::New,
            Version::New => Version::Old,
        };
        for target in self.targets {
            self.layout.change(&self.source(target), case, version)?;
        }
        self.version.set(version);
        thread::sleep(QUIET);
        Ok(())
    }

    fn remove_copy(&self) -> Result<()> {
        let host = &self.site.b;
        if host
            .exec(&["virsh", "-q", "domuuid", COPY])
            .status
            .success()
        {
            host.virsh(&["undefine", COPY]);
        }
        for target in self.targets {
            let copy = self.copy(target);
            if copy.exists() {
                fs::remove_file(copy)?;
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        for target in self.targets {
            let equal = image::equal(&self.source(target), &self.copy(target))?;
            ensure!(equal, "the copy of {target} differs from its source");
        }
        Ok(())
    }

    fn source(&self, target: &str) -> PathBuf {
        self.site.a.image(&self.vm.file(target))
    }

    /// A clone has its own name for its disks, in the same manner.
    fn copy(&self, target: &str) -> PathBuf {
        let name = self.vm.file(target).replacen(VM, COPY, 1);
        self.site.b.image(&name)
    }

    fn sync(&self, tool: Tool) -> Command {
        let mut command = self.command(&["sync", "hvA", "hvB", VM, "--target-name", COPY]);
        if tool == Tool::Blocksync {
            command.arg("--full-scan");
        }
        command
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.site.controller.command(&self.controller);
        let fixed = ["-o", "json", "--no-progress", "-F"];
        command.args(fixed).arg(self.site.controller.ssh_config());
        command.args(words);
        if words[0] != "agent" {
            command.args(["--method", "blocksync"]);
        }
        command
    }

    fn run(&self, mut command: Command) -> Result<()> {
        measure::run(&mut command, &self.outputs)
    }
}

/// The network card of a host, which counts packets with their heads.
struct Interface<'a>(&'a Hypervisor);

impl Meter for Interface<'_> {
    fn bytes(&self) -> Result<u64> {
        let table = self.0.run(&["cat", "/proc/net/dev"]);
        counted(&table).context("/proc/net/dev has no eth0")
    }

    fn is_idle(&self) -> bool {
        true
    }
}

/// Bytes received and sent by eth0, of a table as proc_net(5) describes it.
fn counted(table: &str) -> Option<u64> {
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix("eth0:"))?;
    let fields: Vec<u64> = line
        .split_whitespace()
        .map(|field| field.parse().ok())
        .collect::<Option<_>>()?;
    Some(fields.first()? + fields.get(8)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_of_a_card_are_counted() {
        let table = "Inter-|   Receive\n face |bytes\n    lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\n  \
                     eth0:    1000 7 0 0 0 0 0 0 300 5 0 0 0 0 0 0\n";
        assert_eq!(counted(table), Some(1300));
        assert_eq!(counted("eth1: 1 1"), None);
    }
}
