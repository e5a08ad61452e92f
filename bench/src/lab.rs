//! The place where runs happen: a directory with the images, an sshd, and the steps around a
//! measured command.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use crate::case::Case;
use crate::image::{self, Layout, Version};
use crate::janitor::Janitor;
use crate::link::Link;
use crate::measure::{self, Figures, Subject, measure};
use crate::size::Size;
use crate::sshd::{HOST, Sshd};
use crate::tool::{SyncResult, Tool, isolated, remote};
use crate::volume::Volume;

/// A source must have been left alone for two seconds to be told by its times.
pub(crate) const QUIET: Duration = Duration::from_millis(2500);

/// Where everything lies, for the tools' command lines.
#[derive(Debug)]
pub(crate) struct Paths {
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
    pub(crate) payload: PathBuf,
    pub(crate) outputs: PathBuf,
    pub(crate) ssh_config: PathBuf,
    old: PathBuf,
    controller: PathBuf,
}

impl Paths {
    fn new(dir: &Path, controller: PathBuf, ssh_config: PathBuf) -> Self {
        Self {
            source: dir.join("source.img"),
            old: dir.join("old.img"),
            payload: dir.join("payload"),
            destination: dir.join("destination/disk.img"),
            outputs: dir.to_owned(),
            ssh_config,
            controller,
        }
    }

    /// The controller with the options that every command of the bench needs.
    pub(crate) fn controller(&self) -> Command {
        let mut command = isolated(&self.controller, &self.outputs);
        command
            .arg("-F")
            .arg(&self.ssh_config)
            .args(["-o", "json", "--no-progress"]);
        command
    }

    /// The command that makes the destination what `source` is.
    pub(crate) fn sync(&self, source: &Path) -> Command {
        let mut command = self.controller();
        command.args(["disk", "sync", "--method", "blocksync"]);
        command.arg(source).arg(remote(&self.destination));
        command
    }

    pub(crate) fn config(&self) -> Result<&str> {
        self.ssh_config
            .to_str()
            .context("the path of the ssh configuration is not UTF-8")
    }
}

/// What a run showed.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) figures: Figures,
    /// Space that the result takes; `None` for limits.
    pub(crate) allocated_bytes: Option<u64>,
    /// What blocksync says of its run.
    pub(crate) sync: Option<SyncResult>,
}

/// The place, removed when dropped.
#[derive(Debug)]
pub(crate) struct Lab {
    sshd: Sshd,
    link: Link,
    paths: Paths,
    layout: Layout,
    cold: bool,
    dir: PathBuf,
    _janitor: Janitor,
    /// What it lies on, where that is the bench's own.
    _volume: Option<Volume>,
}

impl Lab {
    /// Makes the place and its source image, and shows blocksync the way.
    pub(crate) fn new(
        parent: &Path,
        layout: Layout,
        controller: PathBuf,
        link: Link,
    ) -> Result<Self> {
        set_child_subreaper(true).context("becoming a subreaper")?;
        let dir = TempDir::with_prefix_in("kvm-clone-bench-", parent)
            .with_context(|| format!("making a directory in {}", parent.display()))?
            .keep();
        let janitor = Janitor::hire(&dir)?;
        let sshd = link.at_destination(|| Sshd::start(&dir, link.address()))?;
        let paths = Paths::new(&dir, controller, sshd.config().to_owned());
        layout.write_source(&paths.source)?;
        let lab = Self {
            sshd,
            link,
            paths,
            layout,
            cold: false,
            dir,
            _janitor: janitor,
            _volume: None,
        };
        lab.deploy()?;
        Ok(lab)
    }

    /// The file system that it lies on goes with it.
    pub(crate) fn on(self, volume: Volume) -> Self {
        Self {
            _volume: Some(volume),
            ..self
        }
    }

    /// Runs start with an empty page cache, or with a full one.
    pub(crate) fn with_cold_cache(mut self, cold: bool) -> Self {
        self.cold = cold;
        self
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// How far away the sshd is from now on.
    pub(crate) fn set_round_trip_ms(&self, round_trip_ms: u64) {
        self.sshd.relay().set_round_trip_ms(round_trip_ms);
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// The agent is copied to a host once, ahead of all measurements.
    fn deploy(&self) -> Result<()> {
        self.link.at_source(|| {
            self.sshd.try_login()?;
            let mut command = self.paths.controller();
            measure::run(command.args(["agent", "deploy", HOST]), &self.paths.outputs)
        })
    }

    /// Makes the images of a case.
    pub(crate) fn prepare(&self, case: Case) -> Result<()> {
        if case != Case::First {
            self.layout.write_old(&self.paths.old, case)?;
        }
        image::write_payload(&self.paths.payload, self.layout.bytes_to_ship(case))
    }

    /// One run, from the state that the case asks for, checked at the end.
    pub(crate) fn measure(&self, case: Case, tool: Tool) -> Result<Outcome> {
        // A limit of the wire has nothing to overwrite: emptying a file would count as its time.
        self.restore(if tool.is_wire_limit() {
            Case::First
        } else {
            case
        })?;
        match tool {
            Tool::BlocksyncKept => self.leave_digests(case)?,
            Tool::BlocksyncSent => self.leave_copy(case, tool)?,
            _ => {}
        }
        let subject = Subject {
            command: tool.command(case, &self.paths)?,
            result: tool
                .has_result()
                .then_some(self.paths.destination.as_path()),
            is_worker: tool.is_worker(),
            outputs: &self.paths.outputs,
        };
        let relay = self.sshd.relay();
        let figures = self.link.at_source(|| measure(subject, relay))?;
        let sync = match tool {
            _ if tool.is_blocksync() => Some(SyncResult::parse(&fs::read(
                self.paths.outputs.join("stdout"),
            )?)?),
            _ => None,
        };
        let allocated_bytes = match tool {
            _ if tool.has_result() => self.check(tool)?,
            _ => None,
        };
        Ok(Outcome {
            figures,
            allocated_bytes,
            sync,
        })
    }

    /// Has both ends keep digests of what the destination holds: the source's too, where that is
    /// the source.
    fn leave_digests(&self, case: Case) -> Result<()> {
        let from = match case {
            Case::First => return Ok(()),
            Case::Changed(0) => &self.paths.source,
            Case::Changed(_) => &self.paths.old,
        };
        let mut sync = self.paths.sync(from);
        self.link
            .at_source(|| measure::run(&mut sync, &self.paths.outputs))
    }

    /// Has the source sent as it was, and then become what it is.
    fn leave_copy(&self, case: Case, tool: Tool) -> Result<()> {
        let source = &self.paths.source;
        let make = |version| {
            self.layout.change(source, case, version)?;
            thread::sleep(QUIET);
            Ok::<_, anyhow::Error>(())
        };
        make(Version::Old)?;
        let mut sync = tool.command(case, &self.paths)?;
        self.link
            .at_source(|| measure::run(&mut sync, &self.paths.outputs))?;
        make(Version::New)?;
        if self.cold {
            drop_caches()
        } else {
            warm(&[source])
        }
    }

    /// Compares the result with what it should be; gives the space that a copied image takes.
    fn check(&self, tool: Tool) -> Result<Option<u64>> {
        use std::os::unix::fs::MetadataExt;

        let expected = if tool.is_wire_limit() {
            &self.paths.payload
        } else {
            &self.paths.source
        };
        let equal = image::equal(expected, &self.paths.destination)?;
        ensure!(equal, "the result differs from its source");
        let blocks = self.paths.destination.metadata()?.blocks();
        Ok((!tool.is_wire_limit()).then_some(blocks * 512))
    }

    /// Puts the destination back to what it was before the first run.
    fn restore(&self, case: Case) -> Result<()> {
        let Paths {
            source,
            old,
            destination,
            payload,
            ..
        } = &self.paths;
        let home = destination
            .parent()
            .context("the destination has no directory")?;
        if home.exists() {
            fs::remove_dir_all(home)?;
        }
        fs::create_dir(home)?;
        let mut files = vec![source, payload];
        if case != Case::First {
            copy(old, destination, &self.paths.outputs)?;
            files.push(destination);
        }
        if self.cold {
            drop_caches()
        } else {
            warm(&files)
        }
    }
}

/// A copy that shares nothing: writing into a reflink would cost every tool more than writing
/// into a file of its own.
fn copy(from: &Path, to: &Path, outputs: &Path) -> Result<()> {
    let mut cp = Command::new("cp");
    measure::run(
        cp.args(["--reflink=never", "--sparse=auto"])
            .arg(from)
            .arg(to),
        outputs,
    )?;
    Ok(File::open(to)?.sync_all()?)
}

fn warm(files: &[&PathBuf]) -> Result<()> {
    files
        .iter()
        .try_for_each(|file| image::for_each_data(file, |_| ()))
}

fn drop_caches() -> Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("dropping the page cache")
}

/// Source, old image and payload hold the data; the destination takes up to `result_bytes`.
pub(crate) fn check_space(dir: &Path, layout: Layout, result_bytes: u64) -> Result<()> {
    let stat = statvfs(dir).with_context(|| format!("looking at {}", dir.display()))?;
    let free = stat.blocks_available() * stat.fragment_size();
    let needed = 3 * layout.data_bytes() + result_bytes + 64 * Size::MIB.0;
    ensure!(
        free >= needed,
        "{} has {} MiB free, the bench needs {}: choose another place with --dir, or a smaller --size",
        dir.display(),
        free >> 20,
        needed >> 20,
    );
    Ok(())
}
