//! A destination: what is there, what lies beside it, and how changes begin to get into it.
//! `commit.rs` has how they come to count.
//!
//! ```text
//!              begin                       prepare             forward
//!  new         .NAME.kc-new                fsync               rename, which replaces nothing
//!  reflink     .NAME.kc-clone shares       attributes, fsync   rename over NAME
//!              all blocks with NAME
//!  staged      .NAME.kc-stage, journal     fsync, reserve      NAME away, apply, fsync, NAME back
//!  inplace     journal says "torn"         fsync               journal gone
//! ```

use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use kvm_clone_protocol::message::{
    Access, Apply, ApplyChoice, DiskKind, FailureCode, Keeps, Opened,
};
use kvm_clone_protocol::units::Geometry;
use nix::unistd::geteuid;

use super::confinement::{self, reach};
use super::file::DiskFile;
use super::image::{Image, Version};
use super::journal::{Base, Header, Journal, State, Sum, Way};
use super::kept::Kept;
use super::names::{Names, remove};
use super::overlay::{Overlay, check_reservable};
use super::run::Run;
use super::stamp::Stamp;
use super::{Disk, describe, found, metadata, open_image, recover, reflink};
use crate::failure::Failure;

/// A destination that this process holds.
#[derive(Debug)]
pub(crate) struct Destination {
    pub(super) names: Names,
    /// The old version, locked for as long as this lives.
    pub(super) base: Option<Arc<Image>>,
    /// What that was when it was opened.
    pub(super) version: Option<Version>,
    /// What a run has made. `None` before it begins, and when no change came of it.
    pub(super) work: Option<Work>,
}

/// What a run has made for a destination.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) apply: Apply,
    /// What the session runs on.
    pub(super) disk: Arc<Disk>,
    /// What that reads, and but for what waits in a stage, writes.
    pub(super) image: Arc<Image>,
    /// None for a new destination, and for one that could not be marked.
    pub(super) journal: Option<Arc<Journal>>,
    /// An earlier run has brought changes.
    pub(super) resumed: bool,
}

impl Work {
    /// Whether what has arrived may be nowhere, since it could not be made durable.
    pub(super) fn is_doubtful(&self) -> bool {
        let stage = self.disk.overlay.as_ref().map(Overlay::stage);
        let journal = self.journal.as_ref();
        self.image.file.is_doubtful()
            || stage.is_some_and(|stage| stage.file.is_doubtful())
            || journal.is_some_and(|journal| journal.is_doubtful())
    }
}

/// How a run has begun on a destination.
#[derive(Debug)]
pub(crate) struct Begun {
    /// What the session runs on.
    pub(crate) disk: Arc<Disk>,
    pub(crate) apply: Apply,
    /// What an earlier run has brought is taken up.
    pub(crate) resumed: bool,
    pub(crate) warnings: Vec<String>,
}

/// What an earlier run has left beside a destination that exists.
#[derive(Debug, Default)]
struct Before {
    journal: Option<Journal>,
    torn: bool,
    /// It is gone: what lies there now is this run's.
    cleared: bool,
    warnings: Vec<String>,
}

impl Destination {
    /// Finds out what is at `path`, and holds it.
    ///
    /// # Errors
    /// [`Failure`]: it is no disk, is held by somebody else, or cannot be opened or made.
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        match metadata(path) {
            Ok(metadata) => {
                let image = open_image(path, &metadata, Access::Destination)?;
                Ok(Self {
                    names: Names::of(path, &metadata)?,
                    version: Some(image.version()?.uncounted()),
                    base: Some(Arc::new(image)),
                    work: None,
                })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self {
                names: missing(path)?,
                version: None,
                base: None,
                work: None,
            }),
            Err(error) => Err(Failure::io("opening", path, &error)),
        }
    }

    /// The old version, to be compared with.
    pub(crate) fn base(&self) -> Option<&Arc<Image>> {
        self.base.as_ref()
    }

    /// Digests of it that are kept from run to run. They are believed if they describe what it
    /// is `now`.
    pub(crate) fn keep(
        &self,
        keeps: Keeps,
        geometry: Geometry,
        now: Option<Stamp>,
    ) -> Option<Kept> {
        if self.is_device() {
            return None;
        }
        Kept::open(&self.names.path, keeps, geometry, now, None)
    }

    fn is_device(&self) -> bool {
        self.base.as_ref().is_some_and(|base| base.is_device)
    }

    /// What it is once it is committed.
    pub(crate) fn committed(&self) -> Option<Stamp> {
        let image = match &self.work {
            Some(work) if matches!(work.apply, Apply::New | Apply::Reflink) => &work.image,
            _ => self.base.as_deref()?,
        };
        image.own_stamp()
    }

    /// The answer to the controller.
    ///
    /// # Errors
    /// [`Failure`] when it cannot be examined, or something is in the way of what will be made.
    pub(crate) fn describe(&self, disk: u32) -> Result<Opened, Failure> {
        if let Some(base) = &self.base {
            let keeps = match self.is_device() {
                false => Kept::seed(&self.names.path),
                true => None,
            };
            return Ok(Opened {
                keeps,
                ..describe(base, disk)?
            });
        }
        let left = self.own(&self.names.new_file())?;
        Ok(Opened {
            disk,
            kind: DiskKind::Missing,
            size: left.as_ref().map_or(0, Metadata::len),
            identity: None,
            resumed: left.is_some(),
            storage: Vec::new(),
            keeps: None,
        })
    }

    /// Makes what the changes go into.
    ///
    /// # Errors
    /// [`Failure`]: it cannot be made, or not in the way that was asked for. Nothing has changed
    /// then but that an earlier run's leavings may be gone.
    pub(crate) fn begin(
        &mut self,
        geometry: Geometry,
        choice: ApplyChoice,
        stage_dir: Option<&Path>,
        run: &mut Run,
    ) -> Result<Begun, Failure> {
        self.names.make_room()?;
        run.add(&self.names)?;
        recover::take_over(&self.names)?;
        let mut before = Before::default();
        let work = match self.base.clone() {
            None => self.begin_new(geometry)?,
            Some(base) => {
                before = self.before(&base)?;
                self.begin_on(&base, geometry, choice, stage_dir, &mut before)
                    .inspect_err(|_| self.let_go(&base, &before))?
            }
        };
        let begun = Begun {
            disk: Arc::clone(&work.disk),
            apply: work.apply,
            resumed: work.resumed,
            warnings: before.warnings,
        };
        self.work = Some(work);
        Ok(begun)
    }

    fn begin_on(
        &self,
        base: &Arc<Image>,
        geometry: Geometry,
        choice: ApplyChoice,
        stage_dir: Option<&Path>,
        before: &mut Before,
    ) -> Result<Work, Failure> {
        match choice {
            ApplyChoice::Inplace => self.begin_inplace(base, geometry, before),
            ApplyChoice::Staged => self.begin_staged(base, stage_dir, before),
            ApplyChoice::Reflink => self.begin_reflink(base, before),
            ApplyChoice::Auto => match self.begin_reflink(base, before) {
                Err(failure) if failure.code == FailureCode::MissingRequirement => {
                    self.begin_staged(base, stage_dir, before)
                }
                result => result,
            },
        }
    }

    fn begin_new(&self, geometry: Geometry) -> Result<Work, Failure> {
        // What was beside a destination that somebody has removed.
        let names = &self.names;
        self.remove_beginnings()?;
        self.remove_own(&names.journal())?;
        let path = names.new_file();
        let left = self.own(&path)?.is_some();
        let file = if left {
            DiskFile::open(&path)
        } else {
            DiskFile::create(&path)
        };
        let file = file.map_err(|error| self.create_failed(&path, &error))?;
        let image = self.hold(file, !left)?;
        image.grow(geometry).inspect_err(|_| {
            if !left {
                let _ = self.remove_own(&path);
            }
        })?;
        let image = Arc::new(image);
        Ok(Work {
            apply: Apply::New,
            disk: Arc::new(Disk::of(Arc::clone(&image))),
            image,
            journal: None,
            resumed: left,
        })
    }

    fn begin_inplace(
        &self,
        base: &Arc<Image>,
        geometry: Geometry,
        before: &mut Before,
    ) -> Result<Work, Failure> {
        self.start_over(base, before)?;
        let header = Header {
            torn: before.torn,
            ..self.header(base, Way::Inplace, PathBuf::new())?
        };
        let journal = match Journal::create(&self.names, header) {
            Ok(journal) => Some(Arc::new(journal)),
            // Who may write the disk need not be able to make anything beside it.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                before.warnings.push(format!(
                    "{} cannot be marked as torn while it is written: {error}",
                    self.names.path.display()
                ));
                None
            }
            Err(error) => return Err(self.journal_failed(&error)),
        };
        base.grow(geometry)?;
        Ok(Work {
            apply: Apply::Inplace,
            disk: Arc::new(Disk::of(Arc::clone(base))),
            image: Arc::clone(base),
            journal,
            resumed: before.torn,
        })
    }

    fn begin_reflink(&self, base: &Arc<Image>, before: &mut Before) -> Result<Work, Failure> {
        if !base.has_one_name()? {
            let message = format!(
                "{} has more than one name, or is a mount point: a copy cannot take its place \
                 (--apply staged does without)",
                base.path.display()
            );
            return Err(Failure::new(FailureCode::MissingRequirement, message));
        }
        let path = self.names.clone_file();
        let left = match before.take(Way::Reflink) {
            Some(journal) => self.open_own(&path)?.map(|file| (file, journal)),
            None => None,
        };
        let resumed = left.is_some();
        let (file, journal) = match left {
            Some(left) => left,
            None => {
                // Where none can be made, what waits from an earlier run is of use.
                let file =
                    reflink::copy(base, self.names.directory(), "--apply staged does without")?;
                self.start_over(base, before)?;
                let header = Header {
                    torn: before.torn,
                    ..self.header(base, Way::Reflink, PathBuf::new())?
                };
                // It gets its name only when the journal says whose it is.
                let journal = Journal::create(&self.names, header)
                    .map_err(|error| self.journal_failed(&error))?;
                file.link(&path)
                    .map_err(|error| self.create_failed(&path, &error))?;
                (file, journal)
            }
        };
        let image = Arc::new(self.hold(file, false)?);
        let disk = match resumed {
            true => Disk::of(Arc::clone(&image)),
            false => Disk::copy_of(Arc::clone(base), Arc::clone(&image)),
        };
        Ok(Work {
            apply: Apply::Reflink,
            disk: Arc::new(disk),
            image,
            journal: Some(Arc::new(journal)),
            resumed,
        })
    }

    fn begin_staged(
        &self,
        base: &Arc<Image>,
        stage_dir: Option<&Path>,
        before: &mut Before,
    ) -> Result<Work, Failure> {
        check_reservable(base)?;
        let left = match before.take(Way::Staged) {
            Some(journal) => self
                .open_own(&journal.header().stage)?
                .map(|file| (file, journal)),
            None => None,
        };
        let resumed = left.is_some();
        let (file, journal) = match left {
            Some((file, journal)) => {
                let reopened = journal.update(|header| header.state = State::Open);
                reopened.map_err(|error| self.journal_failed(&error))?;
                (file, journal)
            }
            None => {
                self.start_over(base, before)?;
                let path = self.stage_path(base, stage_dir)?;
                let header = Header {
                    torn: before.torn,
                    ..self.header(base, Way::Staged, path.clone())?
                };
                // The journal names the stage, so that it comes first.
                let journal = Journal::create(&self.names, header)
                    .map_err(|error| self.journal_failed(&error))?;
                let file = DiskFile::create(&path);
                (
                    file.map_err(|error| self.create_failed(&path, &error))?,
                    journal,
                )
            }
        };
        let journal = Arc::new(journal);
        let stage = self.image(file, !resumed);
        let overlay = Overlay::new(stage, Arc::clone(&journal), resumed);
        Ok(Work {
            apply: Apply::Staged,
            disk: Arc::new(Disk::with_overlay(Arc::clone(base), overlay)),
            image: Arc::clone(base),
            journal: Some(journal),
            resumed,
        })
    }

    /// Beside a file; of a device, where the user says, or where its journal is.
    fn stage_path(&self, base: &Image, stage_dir: Option<&Path>) -> Result<PathBuf, Failure> {
        let own = self.names.stage();
        let Some(directory) = stage_dir.filter(|_| base.is_device) else {
            return Ok(own);
        };
        confinement::permit_directory(directory)?;
        match confinement::directory(directory).and_then(|at| at.metadata()) {
            Ok(metadata) if metadata.is_dir() && directory.is_absolute() => {}
            Ok(_) => {
                let message = format!("{} is not a directory", directory.display());
                return Err(Failure::new(FailureCode::Refused, message));
            }
            Err(error) => return Err(Failure::io("opening", directory, &error)),
        }
        Ok(directory.join(own.file_name().expect("a name with a suffix")))
    }

    /// What an earlier run has left is of no use.
    fn start_over(&self, base: &Image, before: &mut Before) -> Result<(), Failure> {
        before.cleared = true;
        self.clear_away(base, before.journal.take().as_ref())
    }

    /// Nothing came of this run: as far as that is possible, nothing is left of it.
    fn let_go(&self, base: &Image, before: &Before) {
        if before.cleared
            && self.clear_away(base, None).is_ok()
            && let Ok(Some(journal)) = Journal::open(&self.names.journal())
        {
            let _ = self.end_journal(&journal, before.torn);
        }
    }

    /// Looks at what an earlier run has left beside the old version.
    fn before(&self, base: &Image) -> Result<Before, Failure> {
        let path = self.names.journal();
        let mut before = Before::default();
        let ignored =
            |why: &str| format!("{}, of an earlier run, is ignored: {why}", path.display());
        let journal = match Journal::open(&path) {
            Ok(None) => return Ok(before),
            Ok(Some(journal)) if !journal.stages_for(&self.names) => {
                before.torn = journal.header().torn;
                before.warnings.push(ignored("it is about another disk"));
                self.clear_away(base, None)?;
                self.end_journal(&journal, before.torn)?;
                return Ok(before);
            }
            Ok(Some(journal)) => journal,
            Err(why) => {
                before.warnings.push(ignored(&why.to_string()));
                self.clear_away(base, None)?;
                remove(&path).map_err(|error| Failure::io("removing", &path, &error))?;
                return Ok(before);
            }
        };
        let header = journal.header();
        before.torn = header.torn || header.way == Way::Inplace;
        if header.way != Way::Inplace && header.base != self.base_of(base)? {
            let why = "the destination was written, or replaced, since";
            before.warnings.push(ignored(why));
            self.clear_away(base, Some(&journal))?;
            self.end_journal(&journal, before.torn)?;
            return Ok(before);
        }
        before.journal = Some(journal);
        Ok(before)
    }

    fn header(&self, base: &Image, way: Way, stage: PathBuf) -> Result<Header, Failure> {
        Ok(Header {
            way,
            state: State::Open,
            base: self.base_of(base)?,
            size: 0,
            reserved: false,
            reread: false,
            sum: Sum::default(),
            torn: false,
            stage,
        })
    }

    pub(super) fn base_of(&self, base: &Image) -> Result<Base, Failure> {
        Base::of(&base.file, base.is_device, base.size()?)
            .map_err(|error| base.failed("examining", &error))
    }

    /// A file of ours that becomes the destination.
    fn hold(&self, file: DiskFile, is_fresh: bool) -> Result<Image, Failure> {
        let image = self.image(file, is_fresh);
        image.lock()?;
        image.read_in_windows();
        Ok(image)
    }

    /// A file of ours; messages name the destination.
    pub(super) fn image(&self, file: DiskFile, is_fresh: bool) -> Image {
        Image {
            file,
            path: self.names.path.clone(),
            is_device: false,
            is_fresh,
            direct: OnceLock::new(),
        }
    }

    /// What lies under a name of ours, if it is what an earlier run has left.
    ///
    /// # Errors
    /// [`Failure`] when it is something else.
    pub(super) fn own(&self, path: &Path) -> Result<Option<Metadata>, Failure> {
        let looked = reach(path).and_then(|at| at.symlink_metadata());
        let found = found(looked, "examining", path)?;
        found.map(|found| self.check_own(path, found)).transpose()
    }

    /// The same, opened.
    pub(super) fn open_own(&self, path: &Path) -> Result<Option<DiskFile>, Failure> {
        if self.own(path)?.is_none() {
            return Ok(None);
        }
        let file = DiskFile::open(path).map_err(|error| Failure::io("opening", path, &error))?;
        let opened = file
            .metadata()
            .map_err(|error| Failure::io("examining", path, &error))?;
        self.check_own(path, opened)?;
        Ok(Some(file))
    }

    /// A file of ours has one name, and belongs to us, or already to the old version's owner, who
    /// may change that as well. Anybody else could still hold what we would take for the disk.
    fn check_own(&self, path: &Path, found: Metadata) -> Result<Metadata, Failure> {
        let mut owners = vec![geteuid().as_raw()];
        if let Some(base) = &self.base {
            owners.push(base.metadata()?.uid());
        }
        if found.is_file() && found.nlink() == 1 && owners.contains(&found.uid()) {
            return Ok(found);
        }
        let path = path.display();
        let message = format!("{path} is in the way, and not what an earlier run left");
        Err(Failure::new(FailureCode::Refused, message))
    }

    pub(super) fn journal_failed(&self, error: &io::Error) -> Failure {
        Failure::io("writing", &self.names.journal(), error)
    }

    fn create_failed(&self, path: &Path, error: &io::Error) -> Failure {
        let destination = self.names.path.display();
        if error.kind() == io::ErrorKind::AlreadyExists {
            let message = format!("another sync of {destination} has just begun");
            return Failure::new(FailureCode::Busy, message);
        }
        let failure = Failure::io("creating", &self.names.path, error);
        Failure {
            message: format!("{} (as {})", failure.message, path.display()),
            ..failure
        }
    }
}

impl Before {
    /// The journal, if it is of this way.
    fn take(&mut self, way: Way) -> Option<Journal> {
        let left = self.journal.take()?;
        let header = left.header();
        if header.way == way && matches!(header.state, State::Open | State::Prepared) {
            return Some(left);
        }
        self.journal = Some(left);
        None
    }
}

/// The names for a path at which nothing is.
fn missing(path: &Path) -> Result<Names, Failure> {
    let refused = |what: &str| {
        let message = format!("{} {what}", path.display());
        Err(Failure::new(FailureCode::Refused, message))
    };
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return refused("names no file");
    };
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return refused("names a directory");
    }
    if reach(path).and_then(|at| at.symlink_metadata()).is_ok() {
        return refused("is a symbolic link to nothing");
    }
    if path.starts_with("/dev") && !path.starts_with("/dev/shm") {
        let message = format!(
            "there is no device {}, and none can be made",
            path.display()
        );
        return Err(Failure::new(FailureCode::NotFound, message));
    }
    let failed = |error: io::Error| Failure::io("opening the directory", directory, &error);
    let found = confinement::directory(directory).map_err(failed)?;
    if !found.metadata().map_err(failed)?.is_dir() {
        return refused("lies in what is no directory");
    }
    let directory = found
        .canonical()
        .map_err(|error| Failure::io("following", directory, &error))?;
    Ok(Names::of_file(&directory.join(name)).expect("a directory and a name"))
}
