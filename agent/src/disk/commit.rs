//! How changes come to count, or are let go.
//!
//! Everything that `forward` needs is on the disk by then, so that a later process can do it as
//! well: it reopens the destination from its [`Names`] and goes on wherever the other one stopped.
//! The price is that each step looks whether it was done already.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_clone_protocol::digest::{Digest, Digester};
use kvm_clone_protocol::message::{Access, Apply, FailureCode, Fate};
use kvm_clone_protocol::units::Geometry;

use super::confinement::reach;
use super::destination::{Destination, Work};
use super::image::Image;
use super::journal::{Header, Journal, State, Sum, Way};
use super::names::{Names, remove, rename_new, rename_over};
use super::overlay::{Overlay, unreserve};
use super::{Disk, attributes, metadata, open_image};
use crate::failure::Failure;

impl Destination {
    /// Makes the changes durable, and checks once more that nothing was changed by others.
    /// Gives back the root of what was read again, if a digester is given.
    ///
    /// # Errors
    /// [`Failure`]: then the destination stays what it was.
    pub(crate) fn prepare(
        &mut self,
        geometry: Geometry,
        reread: Option<&Digester>,
    ) -> Result<Option<Digest>, Failure> {
        let Some(work) = &self.work else {
            let message = format!("nothing was begun on {}", self.names.path.display());
            return Err(Failure::new(FailureCode::Protocol, message));
        };
        self.check_untouched(work)?;
        let (disk, image) = (Arc::clone(&work.disk), Arc::clone(&work.image));
        let again = || reread.map(|digester| disk.reread(&image, geometry, digester));
        if self.is_idle(work, geometry)? {
            let root = again().transpose()?;
            self.end()?;
            self.work = None;
            return Ok(root);
        }
        let sum = self.settle_changes(work, geometry)?;
        let root = again().transpose()?;
        if let Some(journal) = &work.journal {
            let prepared = |header: &mut Header| {
                header.state = State::Prepared;
                header.size = geometry.size();
                header.reread = reread.is_some();
                header.sum = sum;
            };
            journal
                .update(prepared)
                .map_err(|error| self.journal_failed(&error))?;
        }
        self.sync_names()?;
        Ok(root)
    }

    /// The old version must be what was compared, or the new one would be a mixture.
    fn check_untouched(&self, work: &Work) -> Result<(), Failure> {
        match (&self.base, &self.version, work.apply) {
            (Some(base), Some(version), Apply::Staged | Apply::Reflink) => {
                base.check_unchanged(version)
            }
            _ => Ok(()),
        }
    }

    /// Whether no change has come, now or earlier: then the old version stays, with all that it
    /// is.
    fn is_idle(&self, work: &Work, geometry: Geometry) -> Result<bool, Failure> {
        let (Some(base), Apply::Staged | Apply::Reflink) = (&self.base, work.apply) else {
            return Ok(false);
        };
        let resizes = !base.is_device && base.size()? != geometry.size();
        Ok(!resizes && !work.resumed && !work.disk.is_changed())
    }

    /// Makes all changes durable where they are.
    fn settle_changes(&self, work: &Work, geometry: Geometry) -> Result<Sum, Failure> {
        let disk = &work.disk;
        if let (Some(overlay), Some(base)) = (&disk.overlay, &self.base) {
            let sum = overlay.sync()?;
            overlay
                .journal
                .update(|header| {
                    header.size = geometry.size();
                    header.reserved = true;
                })
                .map_err(|error| self.journal_failed(&error))?;
            overlay.reserve(base, geometry)?;
            return Ok(sum);
        }
        if let (Apply::Reflink, Some(base)) = (work.apply, &self.base) {
            attributes::copy(&base.file, &work.image.file)
                .map_err(|error| base.failed("taking over the attributes of", &error))?;
        }
        work.image.finish(geometry)?;
        Ok(Sum::default())
    }

    /// The first half of going forward, for all destinations of a run before the second of any:
    /// from here on nothing can start a mixture of old and new ones.
    ///
    /// # Errors
    /// [`Failure`] when the old version is not what it was, or the file system fails.
    pub(crate) fn take_away(&self) -> Result<(), Failure> {
        let Some((base, journal)) = self.staged() else {
            return Ok(());
        };
        let header = journal.header();
        if header.state != State::Prepared || own_name(&self.names.applying()) {
            return Ok(());
        }
        self.check_base(base, &header)?;
        if base.is_device || base.is_mount_point()? {
            return journal
                .update(|header| header.state = State::Applying)
                .map_err(|error| self.journal_failed(&error));
        }
        rename_new(&self.names.path, &self.names.applying())
            .map_err(|error| self.name_failed(&error))?;
        self.sync_names()
    }

    /// The second half: the new version takes its place, and what lies beside it goes. To do it
    /// again does no harm.
    ///
    /// # Errors
    /// [`Failure`]: then it can be done again, when the cause is gone.
    pub(crate) fn forward(&self) -> Result<(), Failure> {
        match self.work.as_ref().map(|work| work.apply) {
            Some(Apply::New) => {
                rename_new(&self.names.new_file(), &self.names.path)
                    .map_err(|error| self.name_failed(&error))?;
                return self.sync_names();
            }
            Some(Apply::Reflink) => self.replace()?,
            Some(Apply::Staged) => self.apply()?,
            Some(Apply::Inplace) | None => {}
        }
        self.end()
    }

    /// Removes everything that lies beside a destination that is finished.
    fn end(&self) -> Result<(), Failure> {
        let journal = self.work.as_ref().and_then(|work| work.journal.as_deref());
        if let (Some(base), Some(journal)) = (&self.base, journal) {
            self.remove_own(&journal.header().stage)?;
            self.clear_away(base, None)?;
            self.end_journal(journal, false)?;
        }
        self.sync_names()
    }

    fn replace(&self) -> Result<(), Failure> {
        let journal = self.work.as_ref().and_then(|work| work.journal.as_ref());
        if let (Some(base), Some(journal)) = (&self.base, journal) {
            self.check_base(base, &journal.header())?;
        }
        rename_over(&self.names.clone_file(), &self.names.path)
            .map_err(|error| self.name_failed(&error))?;
        self.sync_names()
    }

    fn apply(&self) -> Result<(), Failure> {
        let overlay = self
            .work
            .as_ref()
            .and_then(|work| work.disk.overlay.as_ref());
        let (Some((base, journal)), Some(overlay)) = (self.staged(), overlay) else {
            return Ok(());
        };
        let header = journal.header();
        if header.state != State::Applied {
            let geometry = Geometry::new(header.size).ok_or_else(|| {
                let message = format!("the journal of {} is absurd", base.path.display());
                Failure::new(FailureCode::Io, message)
            })?;
            overlay.apply(base, geometry)?;
            if header.reread {
                overlay.reread_applied(base, geometry)?;
            }
            journal
                .update(|header| header.state = State::Applied)
                .map_err(|error| self.journal_failed(&error))?;
        }
        if own_name(&self.names.applying()) {
            rename_new(&self.names.applying(), &self.names.path)
                .map_err(|error| self.name_failed(&error))?;
            self.sync_names()?;
        }
        Ok(())
    }

    /// The old version must be what the changes were made for: after a crash somebody may have
    /// used it.
    fn check_base(&self, base: &Image, header: &Header) -> Result<(), Failure> {
        if self.base_of(base)? == header.base {
            return Ok(());
        }
        let message = format!(
            "{} was written, or replaced, after a run onto it was committed: what waits is for \
             what was there before",
            self.names.path.display()
        );
        Err(Failure::new(FailureCode::Refused, message))
    }

    /// Keeps what the next run can take up; removes what is nothing, what may be nowhere on the
    /// disk, and what occupies the space that was missing.
    ///
    /// Tells whether anything is left.
    pub(crate) fn abandon(&self, code: FailureCode) -> bool {
        let Some(work) = &self.work else {
            return false;
        };
        let arrived = work.resumed || work.disk.is_changed();
        if arrived && code != FailureCode::NoSpace && !work.is_doubtful() {
            return true;
        }
        // What cannot be removed is found, and taken up, by the next run.
        self.roll_back().is_err() || self.fate(Fate::RolledBack) == Fate::Torn
    }

    /// Lets go of what has arrived: the destination stays what it is, torn if it was that.
    ///
    /// # Errors
    /// [`Failure`] when something cannot be removed.
    pub(super) fn roll_back(&self) -> Result<(), Failure> {
        let Some(work) = &self.work else {
            return Ok(());
        };
        match (&self.base, &work.journal) {
            (Some(base), Some(journal)) => {
                let header = journal.header();
                let in_place =
                    header.way == Way::Inplace && (work.resumed || work.disk.is_changed());
                self.clear_away(base, Some(journal))?;
                self.end_journal(journal, header.torn || in_place)?;
            }
            _ => self.remove_own(&self.names.new_file())?,
        }
        self.sync_names()
    }

    /// What becomes of it: `otherwise`, unless it is torn.
    pub(super) fn fate(&self, otherwise: Fate) -> Fate {
        let journal = self.work.as_ref().and_then(|work| work.journal.as_ref());
        let is_torn = journal.is_some_and(|journal| {
            let header = journal.header();
            header.torn || header.way == Way::Inplace
        });
        if is_torn { Fate::Torn } else { otherwise }
    }

    /// Removes what lies beside the destination but for the journal, and gives back the space
    /// that was reserved for it.
    pub(super) fn clear_away(
        &self,
        base: &Image,
        journal: Option<&Journal>,
    ) -> Result<(), Failure> {
        if let Some(journal) = journal {
            let header = journal.header();
            if header.reserved
                && let Some(geometry) = Geometry::new(header.size)
            {
                unreserve(journal, base, geometry)?;
            }
            self.remove_own(&header.stage)?;
        }
        self.remove_own(&self.names.new_file())?;
        self.remove_beginnings()
    }

    /// Removes what is nothing without a journal.
    pub(super) fn remove_beginnings(&self) -> Result<(), Failure> {
        let names = &self.names;
        for path in [names.clone_file(), names.stage(), names.new_journal()] {
            self.remove_own(&path)?;
        }
        Ok(())
    }

    /// Removes what a process that is gone had begun to make when it had no journal yet.
    ///
    /// # Errors
    /// [`Failure`], with code busy when another process is at it.
    pub(super) fn clear_beginnings(names: &Names) -> Result<(), Failure> {
        // It is held meanwhile, so that what is removed is not what another run has just begun.
        let destination = match Self::open(&names.path) {
            Err(failure) if failure.code == FailureCode::NotFound => return Ok(()),
            result => result?,
        };
        destination.remove_beginnings()?;
        destination.sync_names()
    }

    /// The journal goes, or says from now on only that the destination is torn.
    pub(super) fn end_journal(&self, journal: &Journal, torn: bool) -> Result<(), Failure> {
        if !torn {
            self.remove_own(&self.names.journal())?;
            return Ok(());
        }
        let marked = journal.update(|header| {
            header.way = Way::Inplace;
            header.state = State::Open;
            header.stage = PathBuf::new();
            header.torn = true;
        });
        marked.map_err(|error| self.journal_failed(&error))
    }

    pub(super) fn remove_own(&self, path: &Path) -> Result<(), Failure> {
        if path.as_os_str().is_empty() || self.own(path)?.is_none() {
            return Ok(());
        }
        remove(path)
            .map(drop)
            .map_err(|error| Failure::io("removing", path, &error))
    }

    fn sync_names(&self) -> Result<(), Failure> {
        self.names
            .sync()
            .map_err(|error| Failure::io("syncing the directory of", &self.names.path, &error))
    }

    fn name_failed(&self, error: &io::Error) -> Failure {
        let path = &self.names.path;
        if error.kind() == io::ErrorKind::AlreadyExists {
            let path = path.display();
            let message = format!("{path} came into being meanwhile; it was left alone");
            return Failure::new(FailureCode::Refused, message);
        }
        Failure::io("naming", path, error)
    }

    /// The old version and the journal, where changes wait.
    pub(super) fn staged(&self) -> Option<(&Image, &Journal)> {
        let work = self.work.as_ref()?;
        let is_staged = work.apply == Apply::Staged;
        is_staged.then_some((self.base.as_deref()?, work.journal.as_deref()?))
    }

    /// What a process that is gone has made; `None` when nothing is left of it.
    ///
    /// # Errors
    /// [`Failure`], with code busy when another process is at it.
    pub(super) fn reopen(names: &Names) -> Result<Option<Self>, Failure> {
        let path = names.journal();
        let journal = Journal::open(&path).map_err(|why| {
            let message = format!("{}: {why}", path.display());
            Failure::new(FailureCode::Io, message)
        })?;
        let mut destination = Self {
            names: names.clone(),
            base: None,
            version: None,
            work: None,
        };
        match journal {
            Some(journal) if !journal.stages_for(names) => {
                let message = format!("{} is not what a run left", path.display());
                return Err(Failure::new(FailureCode::Io, message));
            }
            Some(journal) => destination.reopen_base(Arc::new(journal))?,
            None => {
                let Some(file) = destination.open_own(&names.new_file())? else {
                    return Ok(None);
                };
                let image = destination.image(file, false);
                image.lock()?;
                let image = Arc::new(image);
                destination.work = Some(Work {
                    apply: Apply::New,
                    disk: Arc::new(Disk::of(Arc::clone(&image))),
                    image,
                    journal: None,
                    resumed: true,
                });
            }
        }
        Ok(Some(destination))
    }

    fn reopen_base(&mut self, journal: Arc<Journal>) -> Result<(), Failure> {
        let header = journal.header();
        let applying = self.names.applying();
        let at = match own_name(&applying) {
            true => &applying,
            false => &self.names.path,
        };
        let metadata = metadata(at).map_err(|error| Failure::io("opening", at, &error))?;
        let base = Arc::new(open_image(at, &metadata, Access::Destination)?);
        self.base = Some(Arc::clone(&base));
        let mut image = Arc::clone(&base);
        let (apply, disk) = match header.way {
            Way::Inplace => (Apply::Inplace, Disk::of(base)),
            Way::Reflink => match self.open_own(&self.names.clone_file())? {
                Some(clone) => {
                    image = Arc::new(self.image(clone, false));
                    image.lock()?;
                    (Apply::Reflink, Disk::of(Arc::clone(&image)))
                }
                // It has its name already.
                None => (Apply::Inplace, Disk::of(base)),
            },
            Way::Staged => match self.open_own(&header.stage)? {
                Some(stage) => {
                    let overlay =
                        Overlay::new(self.image(stage, false), Arc::clone(&journal), true);
                    (Apply::Staged, Disk::with_overlay(base, overlay))
                }
                // It was let go, and the journal is what is left.
                None => (Apply::Inplace, Disk::of(base)),
            },
        };
        self.work = Some(Work {
            apply,
            disk: Arc::new(disk),
            image,
            journal: Some(journal),
            resumed: true,
        });
        Ok(())
    }
}

/// Whether there is a file of this name.
pub(super) fn own_name(path: &Path) -> bool {
    let found = reach(path).and_then(|at| at.symlink_metadata());
    found.is_ok_and(|found| found.is_file())
}

/// Refuses a disk that an unfinished run has left as a mixture.
///
/// # Errors
/// [`Failure`], which says how that is ended.
pub(super) fn check_whole(path: &Path, access: Access) -> Result<(), Failure> {
    let names = match metadata(path) {
        Ok(metadata) => match Names::of(path, &metadata) {
            Ok(names) => names,
            // Without a place for notes there are none.
            Err(_) => return Ok(()),
        },
        Err(_) => {
            let file = std::path::absolute(path)
                .ok()
                .and_then(|path| Names::of_file(&path));
            let Some(names) = file.filter(|names| own_name(&names.applying())) else {
                return Ok(());
            };
            names
        }
    };
    let refused = |what: &str| {
        let message = format!("{} {what}", names.path.display());
        Err(Failure::new(FailureCode::Refused, message))
    };
    if own_name(&names.applying()) {
        return refused("is half changed: \"kvm-clone-ctl recover\" on its host ends that");
    }
    // A journal that cannot be read tells nothing; the next run onto this disk says so.
    let Ok(Some(journal)) = Journal::open(&names.journal()) else {
        return Ok(());
    };
    let header = journal.header();
    match header.state {
        State::Applying => {
            refused("is half changed: \"kvm-clone-ctl recover\" on its host ends that")
        }
        _ if header.torn || header.way == Way::Inplace => {
            if access == Access::Source {
                refused("is torn, or being written: a sync onto it has not finished")
            } else {
                Ok(())
            }
        }
        _ => Ok(()),
    }
}
