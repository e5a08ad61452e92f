//! Where a campaign takes place: a laboratory, the two versions, and the destination with all that
//! may be left of a run.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::moment::Rhythm;
use super::versions::{self, Found, Image, Version};
use super::{Apply, Plan};
use crate::controller::{Run, Running};
use crate::host::Host;
use crate::image::MIB;
use crate::journey::Journey;
use crate::lab::{Lab, LabSpec};
use crate::process::{arguments, kill, processes_in, ssh_clients_of};

/// xfs takes no less than some 300 MiB; the backing file is sparse.
const FILE_SYSTEM_BYTES: u64 = 400 * MIB;

/// So that bytes are under way for about as long as everything else takes. Of some 6 MiB that
/// are shipped a part goes ahead of it.
const LIMIT: &str = "12M";

const POLL: Duration = Duration::from_millis(5);

pub(super) struct Site {
    pub(super) lab: Lab,
    apply: Apply,
    destination: PathBuf,
    old: Image,
    new: Image,
    /// The processes and files that are there without a run.
    processes: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    direct: Option<Rhythm>,
    relay: Option<Rhythm>,
}

impl Site {
    pub(super) fn new(spec: LabSpec, plan: &Plan) -> Self {
        let lab = spec.mount(plan.on, FILE_SYSTEM_BYTES).start();
        let directory = lab.mounts()[0].join("disks");
        fs::create_dir(&directory).expect("a fresh file system is writable");
        let mut site = Self {
            apply: plan.apply,
            destination: directory.join("disk"),
            old: Image::make(lab.path("one"), 0),
            new: Image::make(lab.path("other"), 1),
            processes: BTreeSet::new(),
            files: BTreeSet::new(),
            direct: None,
            relay: None,
            lab,
        };
        site.processes = site.processes().collect();
        site.start_afresh();
        // Agents get to their hosts.
        site.run_undisturbed(Journey::Direct);
        site.files = site.files();
        site
    }

    /// The destination becomes the old version, and nothing else is there.
    pub(super) fn start_afresh(&self) {
        for process in self.running() {
            kill(&process);
        }
        let directory = self.destination.parent().expect("it lies in a directory");
        for path in [directory, &self.lab.b.state(), &self.lab.a.state()] {
            for entry in fs::read_dir(path).expect("it is there").flatten() {
                let path = entry.path();
                let removed = match path.is_dir() {
                    true => fs::remove_dir_all(&path),
                    false => fs::remove_file(&path),
                };
                removed.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            }
        }
        fs::copy(&self.old.path, &self.destination).expect("there is room");
    }

    /// Starts a run that makes the destination new.
    pub(super) fn start_sync(&self, by: Journey) -> Running {
        let options = ["--apply", self.apply.name(), "--bandwidth-limit", LIMIT];
        let (from, to) = (&self.new.path, &self.destination);
        self.lab.start_disk("sync", by, from, to, &options)
    }

    pub(super) fn recover(&self) -> Run {
        self.lab.controller.run(["recover", "hvB"])
    }

    /// What the destination is, through its name.
    pub(super) fn look(&self) -> Found {
        versions::look(&self.destination, &self.old, &self.new)
    }

    /// Whether it may be that after a kill.
    pub(super) fn may_be(&self, found: Found) -> bool {
        match found {
            Found::Is(_) => true,
            Found::Absent => self.apply == Apply::Staged,
            Found::Torn(_) => false,
        }
    }

    /// The new version is the old one from here on.
    pub(super) fn turn_over(&mut self) {
        std::mem::swap(&mut self.old, &mut self.new);
    }

    /// What lies beside the destination.
    pub(super) fn beside(&self) -> Vec<String> {
        let directory = self.destination.parent().expect("it lies in a directory");
        let mut found = files_in(directory);
        found.remove(&self.destination);
        names(&found)
    }

    /// What is noted of runs on the destination's host.
    pub(super) fn runs(&self) -> Vec<String> {
        names(&notes(&self.lab.b))
    }

    /// When that was written last.
    pub(super) fn noted(&self) -> Option<SystemTime> {
        notes(&self.lab.b)
            .into_iter()
            .filter_map(|file| file.metadata().ok()?.modified().ok())
            .max()
    }

    /// What is new on the hosts, and where the controller keeps things while it runs.
    pub(super) fn elsewhere(&self) -> Vec<String> {
        let now = self.files();
        names(&now.difference(&self.files).cloned().collect())
    }

    fn files(&self) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        for host in self.hosts() {
            for directory in [host.home(), host.var_tmp(), host.shm()] {
                found.append(&mut files_in(&directory));
            }
        }
        found.append(&mut notes(&self.lab.a));
        found.append(&mut files_in(&self.lab.controller.home().join(".cache")));
        found
    }

    /// Waits until nothing of a run is left running. Gives what still is at the deadline.
    pub(super) fn wait_until_quiet(&self, deadline: Instant) -> Vec<String> {
        loop {
            let running = self.running();
            if running.is_empty() || Instant::now() >= deadline {
                return running.iter().map(|process| describe(process)).collect();
            }
            std::thread::sleep(POLL);
        }
    }

    /// Everything on the hosts that was not there before, and the controller's ssh.
    fn running(&self) -> Vec<PathBuf> {
        let mut running = ssh_clients_of(self.lab.controller.ssh_config());
        running.extend(self.processes().filter(|it| !self.processes.contains(it)));
        running
    }

    fn processes(&self) -> impl Iterator<Item = PathBuf> {
        let of_host = |host: &Host| processes_in(&host.mount_namespace());
        self.hosts().into_iter().flat_map(of_host)
    }

    fn hosts(&self) -> [&Host; 2] {
        [&self.lab.a, &self.lab.b]
    }

    /// Measures an undisturbed run by each route, so that the destination is what it was after
    /// both.
    pub(super) fn measure(&mut self) {
        self.direct = Some(self.run_undisturbed(Journey::Direct));
        self.relay = Some(self.run_undisturbed(Journey::Relay));
    }

    fn run_undisturbed(&mut self, by: Journey) -> Rhythm {
        let mut running = self.start_sync(by);
        let rhythm = Rhythm::watch(&mut running, self);
        running.wait().expect_code(0);
        assert_eq!(self.look(), Found::Is(Version::New));
        self.turn_over();
        rhythm
    }

    /// How an undisturbed run by this route goes.
    pub(super) fn rhythm(&mut self, by: Journey) -> &mut Rhythm {
        let rhythm = if by == Journey::Direct {
            &mut self.direct
        } else {
            &mut self.relay
        };
        rhythm.as_mut().expect("measured before the first kill")
    }

    /// The last measurements, for people.
    pub(super) fn measured(&self) -> String {
        let (direct, relay) = (&self.direct, &self.relay);
        match (direct, relay) {
            (Some(direct), Some(relay)) => format!("direct: {direct}; relay: {relay}"),
            _ => String::new(),
        }
    }
}

/// The files below a directory.
fn files_in(directory: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.append(&mut files_in(&path));
        } else {
            found.insert(path);
        }
    }
    found
}

/// What a host notes of runs; the digests that it keeps are not of one.
fn notes(host: &Host) -> BTreeSet<PathBuf> {
    let kept = host.state().join("digests");
    let mut found = files_in(&host.state());
    found.retain(|path| !path.starts_with(&kept));
    found
}

fn names(paths: &BTreeSet<PathBuf>) -> Vec<String> {
    let paths = paths.iter();
    paths.map(|path| path.display().to_string()).collect()
}

/// A process for people.
fn describe(process: &Path) -> String {
    let words = arguments(process);
    let words: Vec<_> = words
        .iter()
        .map(|word| String::from_utf8_lossy(word))
        .collect();
    format!("{}: {}", process.display(), words.join(" "))
}
