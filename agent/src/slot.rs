//! A disk under its number: what a controller may ask of it, and in which order.
//!
//! ```text
//!  open ─ start ─ session … ended ─ prepare ─ commit
//! ```
//!
//! Everything here may block, and is called on threads that may.

use std::ffi::OsStr;
use std::fmt::Display;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_clone_protocol::digest::Digester;
use kvm_clone_protocol::message::{
    Access, Compression, FailureCode, Keeps, Location, Open, Opened, Prepare, Prepared, Preserve,
    Preserved, Role, SessionParams, Start, Started, Summarize, Summary,
};
use kvm_clone_protocol::sync::{DATA_AHEAD, Machine, Receiver, Sender};
use kvm_clone_protocol::units::Geometry;

use crate::disk::{
    self, Described, Destination, Disk, Exported, Image, Kept, Run, Sent, Stamp, Target, Version,
};
use crate::failure::Failure;
use crate::session::Session;

/// An open disk.
#[derive(Debug)]
pub(crate) struct Slot {
    access: Access,
    target: Target,
    /// What a source was when it was opened.
    version: Option<Version>,
    /// Of the session that has been started.
    params: Option<SessionParams>,
    is_prepared: bool,
    progress: Arc<Milestones>,
    /// Digests of a destination.
    kept: Option<Arc<Kept>>,
}

/// How far the session of a disk has come. A destination is prepared only after one that ended
/// well, whatever the controller asks.
#[derive(Debug, Default)]
pub(crate) struct Milestones {
    ended: AtomicBool,
    failed: OnceLock<FailureCode>,
}

impl Milestones {
    /// The session has ended well, and its changes count.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Remembers why it went no further. The first failure is the one that counts.
    pub(crate) fn fail(&self, code: FailureCode) {
        let _ = self.failed.set(code);
    }
}

/// A session that can run, and what the controller is told of it.
pub(crate) struct Ready {
    pub(crate) session: Session,
    pub(crate) started: Started,
    pub(crate) warnings: Vec<String>,
    pub(crate) progress: Arc<Milestones>,
    pub(crate) watch: Option<Watch>,
    /// Digests of a source.
    pub(crate) keeping: Option<Keeping>,
}

/// Digests of a source that count once it has been read, and is what it was.
pub(crate) struct Keeping {
    kept: Arc<Kept>,
    of: Source,
}

/// What tells which version of a source was read.
enum Source {
    Image {
        image: Arc<Image>,
        stamp: Stamp,
        /// What the next run may find beside digests.
        sent: Box<Sent>,
    },
    Export(Arc<Exported>),
}

impl Keeping {
    /// The session has ended well.
    pub(crate) fn record(&self) {
        self.kept.record(match &self.of {
            // What was copied ahead of all reading was read, if it has been the same throughout.
            Source::Image { image, stamp, sent } => {
                let now = image.stamp().filter(|now| now == stamp);
                now.map(|stamp| Described::File {
                    stamp,
                    sent: sent.keep(),
                })
            }
            Source::Export(exported) => exported.version(),
        });
    }
}

/// A source that should not change while it is read.
pub(crate) struct Watch {
    image: Arc<Image>,
    version: Version,
    /// The user knows that it may.
    is_live: bool,
}

impl Watch {
    /// Gives back what the user ought to know.
    ///
    /// # Errors
    /// [`Failure`] when the source has changed, and must not.
    pub(crate) fn look(&self) -> Result<Option<String>, Failure> {
        match self.image.check_unchanged(&self.version) {
            Ok(()) => Ok(None),
            Err(failure) if self.is_live => {
                Ok(Some(format!("{failure}: the copy is probably torn")))
            }
            Err(failure) => Err(failure),
        }
    }
}

fn no_copy(disk: &dyn Display, why: &dyn Display) -> String {
    format!("no copy of {disk} is kept for the next run: {why}")
}

impl Slot {
    /// Opens a disk. Also gives back what the user ought to know.
    ///
    /// # Errors
    /// As [`disk::open`].
    pub(crate) fn open(open: &Open) -> Result<(Self, Opened, Vec<String>), Failure> {
        disk::permit(&open.location, open.access)?;
        let warnings = match (&open.location, open.access) {
            (Location::Path(path), Access::Destination) => {
                disk::settle(Path::new(OsStr::from_bytes(path)))?
            }
            _ => Vec::new(),
        };
        let target = disk::open(&open.location, open.access)?;
        let (opened, version) = match &target {
            Target::Readable(image) => (disk::describe(image, open.disk)?, Some(image.version()?)),
            Target::Destination(destination) => (destination.describe(open.disk)?, None),
            Target::Exported(exported) => (exported.describe(open.disk), None),
        };
        let slot = Self {
            access: open.access,
            target,
            version,
            params: None,
            is_prepared: false,
            progress: Arc::default(),
            kept: None,
        };
        Ok((slot, opened, warnings))
    }

    /// Makes ready for a session, one of so many for which disks are open; a destination that is to
    /// be changed is noted in the run.
    ///
    /// # Errors
    /// [`Failure`] of protocol, or as [`Destination::begin`].
    pub(crate) fn start(
        &mut self,
        start: &Start,
        disks: u64,
        run: &mut Option<Run>,
    ) -> Result<Ready, Failure> {
        let refused = |what: &str| Failure::new(FailureCode::Protocol, format!("start: {what}"));
        let params = start.params;
        let geometry = Geometry::new(params.size).ok_or_else(|| refused("the size is absurd"))?;
        if self.params.is_some() || (start.role == Role::Sender) != self.access.is_source() {
            return Err(refused("this disk is open for something else"));
        }
        if params.ship && self.access == Access::Compare {
            return Err(refused("this disk is open for comparing only"));
        }
        if let Compression::Level(level) = start.compression
            && !(1..=19).contains(&level)
        {
            return Err(refused("there is no such level of compression"));
        }
        let mut started = Started {
            disk: start.disk,
            apply: None,
            resumed: false,
        };
        let mut warnings = Vec::new();
        let keeps = Keeps {
            hash: params.hash,
            seed: params.seed,
        };
        let keeping = self.keeping(start, keeps, geometry, &mut warnings);
        let disk = match &mut self.target {
            Target::Readable(image) => Some(Arc::new(Disk::of(Arc::clone(image)))),
            Target::Destination(destination) if params.ship => {
                let run = match run {
                    Some(run) => run,
                    none => none.insert(Run::begin()?),
                };
                let stage_dir = Some(Path::new(OsStr::from_bytes(&start.stage_dir)))
                    .filter(|path| !path.as_os_str().is_empty());
                let exists = destination.base().is_some();
                // As it was compared, before anything is made larger.
                let was = destination.base().and_then(|base| base.stamp());
                let begun = destination.begin(geometry, start.apply, stage_dir, run)?;
                // What is there would be taken for zeros: its own, or what another run has left
                // since the controller asked.
                if !params.compare && (exists || begun.resumed) {
                    return Err(refused("what this disk holds must be compared"));
                }
                let believed = was.filter(|_| !start.full_scan && !begun.resumed);
                self.kept = destination.keep(keeps, geometry, believed).map(Arc::new);
                started.apply = Some(begun.apply);
                started.resumed = begun.resumed;
                warnings.extend(begun.warnings);
                Some(begun.disk)
            }
            Target::Destination(destination) => destination
                .base()
                .map(|base| Arc::new(Disk::of(Arc::clone(base)))),
            Target::Exported(exported) => {
                exported.check(geometry)?;
                if self.access == Access::Destination && params.ship {
                    let (apply, warning) = exported.begin(start.apply)?;
                    started.apply = Some(apply);
                    warnings.push(warning);
                    let kept = exported.keep(keeps, geometry, false, !start.full_scan);
                    self.kept = kept.map(Arc::new);
                }
                Some(Arc::new(Disk::exported(Arc::clone(exported))))
            }
        };
        self.params = Some(params);
        let kept = keeping.as_ref().map(|keeping| Arc::clone(&keeping.kept));
        let kept = kept.or_else(|| self.kept.clone());
        let machine: Box<dyn Machine> = match start.role {
            // What is under way waits in the memory of one agent, whichever session it belongs to.
            Role::Sender => {
                Box::new(Sender::new(params, geometry).ahead(DATA_AHEAD / disks.max(1)))
            }
            Role::Receiver => Box::new(Receiver::new(params, geometry)),
        };
        Ok(Ready {
            session: Session {
                machine,
                disk,
                geometry,
                params,
                compression: start.compression,
                kept,
                io: start.io,
            },
            started,
            warnings,
            progress: Arc::clone(&self.progress),
            watch: self.watch(),
            keeping,
        })
    }

    /// Nothing is kept of a source that others may write to, or that is only looked at.
    fn keeping(
        &self,
        start: &Start,
        keeps: Keeps,
        geometry: Geometry,
        warnings: &mut Vec<String>,
    ) -> Option<Keeping> {
        let image = match (&self.target, start.params.ship) {
            (Target::Readable(image), true) => image,
            (Target::Exported(exported), true) if self.access.is_source() => {
                if start.keep_sent.is_some() {
                    warnings.push(no_copy(exported, &"files alone have copies"));
                }
                let kept = exported.keep(keeps, geometry, true, !start.full_scan)?;
                return Some(Keeping {
                    kept: Arc::new(kept),
                    of: Source::Export(Arc::clone(exported)),
                });
            }
            _ => return None,
        };
        let mut without = |why: &dyn Display| {
            if start.keep_sent.is_some() {
                warnings.push(no_copy(&image.path().display(), why));
            }
        };
        if self.access != Access::Source {
            without(&"it is in use");
            return None;
        }
        let Some((kept, stamp)) = image.keep(keeps, geometry, !start.full_scan) else {
            without(&"it was written to in the last seconds, or nothing tells its versions apart");
            return None;
        };
        let sent = kept
            .leave(image, start.keep_sent)
            .unwrap_or_else(|failure| {
                without(&failure);
                Sent::None
            });
        Some(Keeping {
            kept: Arc::new(kept),
            of: Source::Image {
                image: Arc::clone(image),
                stamp,
                sent: Box::new(sent),
            },
        })
    }

    fn watch(&self) -> Option<Watch> {
        let (Target::Readable(image), Some(version)) = (&self.target, self.version) else {
            return None;
        };
        self.access.is_source().then(|| Watch {
            image: Arc::clone(image),
            version,
            is_live: self.access == Access::LiveSource,
        })
    }

    /// Makes the changes durable, so that a commit cannot fail for want of anything.
    ///
    /// # Errors
    /// [`Failure`] of protocol, or as [`Destination::prepare`].
    pub(crate) fn prepare(&mut self, prepare: &Prepare) -> Result<Prepared, Failure> {
        let number = prepare.disk;
        let ready = self.params.filter(|params| {
            params.ship && self.progress.ended.load(Ordering::Acquire) && !self.is_prepared
        });
        let nothing = || {
            let message = format!("prepare: disk {number} has nothing to prepare");
            Failure::new(FailureCode::Protocol, message)
        };
        let params = ready.ok_or_else(nothing)?;
        let geometry = Geometry::new(params.size).expect("checked when the session was started");
        let digester = Digester::new(params.hash, params.seed);
        let root = match &mut self.target {
            Target::Destination(destination) => destination
                .prepare(geometry, prepare.reread.then_some(&digester))
                .inspect_err(|failure| self.progress.fail(failure.code))?,
            Target::Exported(exported) if self.access == Access::Destination => {
                exported.prepare(prepare.reread)?;
                None
            }
            Target::Readable(_) | Target::Exported(_) => return Err(nothing()),
        };
        self.is_prepared = true;
        Ok(Prepared { disk: number, root })
    }

    /// Puts what the commit will overwrite into another image.
    ///
    /// # Errors
    /// [`Failure`] of protocol, or as [`Destination::preserve`].
    pub(crate) fn preserve(&self, preserve: &Preserve) -> Result<Preserved, Failure> {
        let disk = preserve.disk;
        let destination = self.destination().filter(|_| self.is_prepared);
        let destination = destination.ok_or_else(|| {
            let message = format!("preserve: disk {disk} has nothing to preserve");
            Failure::new(FailureCode::Protocol, message)
        })?;
        disk::permit(&Location::Path(preserve.path.clone()), Access::Destination)?;
        destination
            .preserve(Path::new(OsStr::from_bytes(&preserve.path)))
            .inspect_err(|failure| self.progress.fail(failure.code))?;
        Ok(Preserved { disk })
    }

    /// The root of a disk that is not to be changed, as its storage has it.
    ///
    /// # Errors
    /// [`Failure`] of protocol; or when something cannot be read.
    pub(crate) fn summarize(&self, wanted: &Summarize) -> Result<Summary, Failure> {
        let disk = wanted.disk;
        let senseless = || {
            let message =
                format!("summarize: disk {disk} is to be changed, or no disk is so large");
            Failure::new(FailureCode::Protocol, message)
        };
        let geometry = Geometry::new(wanted.size).ok_or_else(senseless)?;
        let digester = Digester::new(wanted.hash, wanted.seed);
        let root = match &self.target {
            Target::Readable(image) => image.root(geometry, &digester)?,
            Target::Exported(exported) if self.access != Access::Destination => {
                exported.root(geometry, &digester)?
            }
            Target::Destination(_) | Target::Exported(_) => return Err(senseless()),
        };
        Ok(Summary { disk, root })
    }

    /// Whether all that has arrived is durable, and can count.
    pub(crate) fn is_prepared(&self) -> bool {
        self.is_prepared
    }

    /// A destination that changes with others.
    pub(crate) fn destination(&self) -> Option<&Destination> {
        match &self.target {
            Target::Destination(destination) => Some(destination),
            Target::Readable(_) | Target::Exported(_) => None,
        }
    }

    /// The new version counts, and so do its digests.
    pub(crate) fn committed(&self) {
        let Some(kept) = &self.kept else { return };
        kept.record(match &self.target {
            Target::Destination(destination) => destination
                .committed()
                .map(|stamp| Described::File { stamp, sent: None }),
            Target::Exported(exported) => exported.version(),
            Target::Readable(_) => None,
        });
    }

    /// The run ends here: keeps what the next one can take up. Tells whether anything is left.
    pub(crate) fn abandon(&self) -> bool {
        let code = self.progress.failed.get().copied();
        match &self.target {
            Target::Destination(destination) => {
                destination.abandon(code.unwrap_or(FailureCode::Cancelled))
            }
            Target::Readable(_) | Target::Exported(_) => false,
        }
    }
}
