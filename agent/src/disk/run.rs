//! A run: the destinations that one agent changes together, noted in a file of the agent's own
//! directory until all of them are finished.
//!
//! That file is the commit. While it does not say so, every destination is the old version and
//! what has arrived waits; once it does, all of them go forward, whoever ends that. Its lock is
//! held by the agent that is at it, and falls when that dies.

use std::io;
use std::path::{Path, PathBuf};

use kvm_clone_protocol::message::FailureCode;
use serde::{Deserialize, Serialize};

use super::file::DiskFile;
use super::names::{Names, remove, rename_over, sync_directory};
use super::slots::{Format, Slots, Unreadable};
use super::{found, state};
use crate::failure::Failure;

const FORMAT: Format = Format {
    magic: *b"kc-run\n\n",
    version: 1,
    // 256 disks with paths of 4 KiB; the file stays sparse.
    slot_len: 4 * 1024 * 1024,
};

const DIRECTORY: &str = "runs";
const SUFFIX: &str = "run";
/// While it is being made.
const NEW: &str = "new";

/// What is noted of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    committed: bool,
    destinations: Vec<Names>,
}

/// A run that this process is at.
#[derive(Debug)]
pub(crate) struct Run {
    path: PathBuf,
    file: DiskFile,
    slots: Slots,
    note: Note,
}

/// A run of which a file was found.
#[derive(Debug)]
pub(super) enum Found {
    /// Nobody is at it; now this process is.
    Left(Run),
    /// Another process is at it.
    Running(Vec<Names>),
    /// The file cannot be used.
    Unreadable(PathBuf, Unreadable),
}

impl Run {
    /// A run without destinations.
    ///
    /// # Errors
    /// [`Failure`] when it cannot be noted.
    pub(crate) fn begin() -> Result<Self, Failure> {
        let directory = state::directory(DIRECTORY)?;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| {
            let message = format!("the system gives no random numbers: {error}");
            Failure::new(FailureCode::Internal, message)
        })?;
        let path = directory.join(format!("{:016x}", u64::from_le_bytes(random)));
        let (new, path) = (path.with_extension(NEW), path.with_extension(SUFFIX));
        let failed = |error: io::Error| Failure::io("noting the run in", &path, &error);
        // Whoever finds it under its own name finds it whole, and locked. Not every file system
        // has files without a name.
        let nameless = DiskFile::create_nameless(&directory);
        let is_nameless = nameless.is_ok();
        let file = nameless
            .or_else(|_| DiskFile::create(&new))
            .map_err(failed)?;
        file.as_file()
            .try_lock()
            .map_err(|error| failed(error.into()))?;
        let note = Note::default();
        let slots = Slots::create(&file, FORMAT, &note).map_err(failed)?;
        if is_nameless {
            file.link(&path).map_err(failed)?;
        } else {
            rename_over(&new, &path).map_err(failed)?;
        }
        sync_directory(&directory)
            .inspect_err(|_| drop(remove(&path)))
            .map_err(failed)?;
        Ok(Self {
            path,
            file,
            slots,
            note,
        })
    }

    /// The runs that are noted on this host. Those that nobody is at are taken over.
    ///
    /// # Errors
    /// [`Failure`] when the directory cannot be read.
    pub(super) fn all() -> Result<Vec<Found>, Failure> {
        let Some(directory) = state::existing(DIRECTORY)? else {
            return Ok(Vec::new());
        };
        let entries = std::fs::read_dir(&directory)
            .map_err(|error| Failure::io("reading", &directory, &error))?;
        let mut runs = Vec::new();
        for entry in entries {
            let path = entry
                .map_err(|error| Failure::io("reading", &directory, &error))?
                .path();
            if path.extension().is_some_and(|suffix| suffix == SUFFIX) {
                runs.extend(Self::find(path)?);
            }
        }
        Ok(runs)
    }

    /// Removes what is left of runs that broke off while they were being noted.
    ///
    /// # Errors
    /// [`Failure`] when the directory cannot be read.
    pub(super) fn sweep() -> Result<(), Failure> {
        let Some(directory) = state::existing(DIRECTORY)? else {
            return Ok(());
        };
        let entries = std::fs::read_dir(&directory)
            .map_err(|error| Failure::io("reading", &directory, &error))?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        for path in paths.filter(|path| path.extension().is_some_and(|suffix| suffix == NEW)) {
            let held = DiskFile::open(&path).map(|file| file.as_file().try_lock());
            if matches!(held, Ok(Ok(()))) {
                remove(&path).map_err(|error| Failure::io("removing", &path, &error))?;
            }
        }
        Ok(())
    }

    fn find(path: PathBuf) -> Result<Option<Found>, Failure> {
        let Some(file) = found(DiskFile::open(&path), "opening", &path)? else {
            return Ok(None);
        };
        let held = match file.as_file().try_lock() {
            Ok(()) => false,
            Err(std::fs::TryLockError::WouldBlock) => true,
            Err(std::fs::TryLockError::Error(error)) => {
                return Err(Failure::io("locking", &path, &error));
            }
        };
        // It may have ended between opening and locking.
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(match Slots::open::<Note>(&file, FORMAT) {
            Ok((_, note)) if held => Found::Running(note.destinations),
            Err(_) if held => Found::Running(Vec::new()),
            Ok((slots, note)) => Found::Left(Self {
                path,
                file,
                slots,
                note,
            }),
            Err(why) => Found::Unreadable(path, why),
        }))
    }

    pub(super) fn destinations(&self) -> &[Names] {
        &self.note.destinations
    }

    /// How many destinations are noted.
    pub(crate) fn len(&self) -> usize {
        self.note.destinations.len()
    }

    pub(super) fn names(&self, path: &Path) -> bool {
        self.note.destinations.iter().any(|each| each.path == path)
    }

    pub(super) fn is_committed(&self) -> bool {
        self.note.committed
    }

    /// Notes that a destination is about to be changed, before anything is made for it.
    ///
    /// # Errors
    /// [`Failure`] when it cannot be noted.
    pub(super) fn add(&mut self, names: &Names) -> Result<(), Failure> {
        let mut note = self.note.clone();
        note.destinations.push(names.clone());
        self.write(note)
    }

    /// A destination is no matter of this run any more. The last one ends it.
    ///
    /// # Errors
    /// [`Failure`] when that cannot be noted.
    pub(super) fn drop_destination(mut self, path: &Path) -> Result<(), Failure> {
        let mut note = self.note.clone();
        note.destinations.retain(|each| each.path != path);
        if note.destinations.is_empty() {
            return self.end();
        }
        self.write(note)
    }

    /// From here on all destinations go forward. Whoever finds that noted notes it once more: it
    /// may have been read from memory, and be nowhere else.
    ///
    /// # Errors
    /// [`Failure`] when it cannot be noted: then nothing has happened.
    pub(crate) fn commit(&mut self) -> Result<(), Failure> {
        let note = Note {
            committed: true,
            ..self.note.clone()
        };
        self.write(note)
    }

    /// Nothing is left to be done.
    ///
    /// # Errors
    /// [`Failure`] when the file cannot be removed.
    pub(crate) fn end(self) -> Result<(), Failure> {
        remove(&self.path)
            .map(drop)
            .map_err(|error| Failure::io("removing", &self.path, &error))
    }

    fn write(&mut self, note: Note) -> Result<(), Failure> {
        self.slots
            .write(&self.file, &note)
            .map_err(|error| Failure::io("noting the run in", &self.path, &error))?;
        self.note = note;
        Ok(())
    }
}
