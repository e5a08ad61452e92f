//! Ending what broken runs have left on this host: what was committed goes forward, what was not
//! waits for the next run or is let go.

use std::path::{Path, PathBuf};

use kvm_clone_protocol::message::{FailureCode, Fate, Recovery};

use super::commit::own_name;
use super::confinement;
use super::destination::Destination;
use super::names::Names;
use super::run::{Found, Run};
use crate::failure::Failure;

/// What became of one destination.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) path: PathBuf,
    pub(crate) fate: Fate,
    /// Why, where that is not plain.
    pub(crate) message: String,
}

impl Recovered {
    fn new(path: &Path, fate: Fate) -> Self {
        Self {
            path: path.to_owned(),
            fate,
            message: String::new(),
        }
    }

    fn failed(path: &Path, failure: Failure) -> Self {
        let fate = match failure.code {
            FailureCode::Busy => Fate::Running,
            _ => Fate::Stuck,
        };
        Self {
            message: failure.message,
            ..Self::new(path, fate)
        }
    }
}

/// Takes all destinations of a committed run forward.
///
/// # Errors
/// [`Failure`] of the first that does not get there: then the run stays committed.
pub(crate) fn forward(destinations: &[&Destination]) -> Result<(), Failure> {
    for destination in destinations {
        destination.take_away()?;
    }
    for destination in destinations {
        destination.forward()?;
    }
    Ok(())
}

/// Sees to what an earlier run may have left of the destination at `path`, before it is opened.
/// Gives back what the user ought to know.
///
/// # Errors
/// [`Failure`] when another process is at it, or it cannot be finished.
pub(crate) fn settle(path: &Path) -> Result<Vec<String>, Failure> {
    let path = behind_links(path);
    let mut warnings = Vec::new();
    for found in Run::all()? {
        match found {
            Found::Left(mut run) if run.is_committed() && run.names(&path) => {
                if !is_covered(run.destinations()) {
                    return Err(not_all_covered(&path));
                }
                finish(&mut run)?;
                run.end()?;
                warnings.push(finished(&path));
            }
            Found::Running(names) if names.iter().any(|each| each.path == path) => {
                let message = format!("another sync of {} is under way", path.display());
                return Err(Failure::new(FailureCode::Busy, message));
            }
            // It may have been about this disk.
            Found::Unreadable(note, why) => warnings.push(format!(
                "the note of another run, {}, cannot be used: {why} (\"kvm-clone-ctl recover\" lists \
                 it)",
                note.display()
            )),
            Found::Left(_) | Found::Running(_) => {}
        }
    }
    // Another user's run, whose note is not for our eyes.
    if let Some(names) = Names::of_file(&path).filter(|names| own_name(&names.applying()))
        && let Some(destination) = Destination::reopen(&names)?
    {
        forward(&[&destination])?;
        warnings.push(finished(&path));
    }
    Ok(warnings)
}

fn finished(path: &Path) -> String {
    format!(
        "an earlier run onto {} was committed and had not finished: it has now",
        path.display()
    )
}

/// A run on this destination begins: earlier ones that broke off have no say in it any more.
///
/// # Errors
/// [`Failure`] when that cannot be noted.
pub(super) fn take_over(names: &Names) -> Result<(), Failure> {
    for found in Run::all()? {
        if let Found::Left(run) = found
            && !run.is_committed()
            // One without destinations had not come that far.
            && (run.names(&names.path) || run.destinations().is_empty())
        {
            run.drop_destination(&names.path)?;
        }
    }
    Ok(())
}

/// Sees to all runs that broke off.
///
/// A controller that may not have all disks is told of those that it may have.
///
/// # Errors
/// [`Failure`] when the notes of runs cannot be read at all, or nothing may be changed.
pub(crate) fn recover(recovery: Recovery) -> Result<Vec<Recovered>, Failure> {
    if confinement::only_reads() && recovery != Recovery::List {
        let message = "nothing is recovered here: this agent only reads (--read-only)";
        return Err(Failure::new(FailureCode::Refused, message));
    }
    if recovery != Recovery::List {
        Run::sweep()?;
    }
    let mut all = Vec::new();
    for found in Run::all()? {
        match found {
            Found::Running(names) => {
                all.extend(covered(&names).map(|names| Recovered::new(&names.path, Fate::Running)));
            }
            Found::Unreadable(path, why) => all.push(Recovered {
                message: format!("{why}; look at what lies beside your disks, and remove it"),
                ..Recovered::new(&path, Fate::Stuck)
            }),
            Found::Left(run) if !is_covered(run.destinations()) => {
                all.extend(
                    covered(run.destinations())
                        .map(|names| Recovered::failed(&names.path, not_all_covered(&names.path))),
                );
            }
            Found::Left(run) if run.is_committed() => all.extend(recover_committed(run, recovery)),
            Found::Left(run) => all.extend(recover_open(run, recovery)),
        }
    }
    Ok(all)
}

fn recover_committed(mut run: Run, recovery: Recovery) -> Vec<Recovered> {
    let each = |run: &Run, fate| -> Vec<Recovered> {
        let names = run.destinations().iter();
        names
            .map(|names| Recovered::new(&names.path, fate))
            .collect()
    };
    if recovery == Recovery::List {
        return each(&run, Fate::Unfinished);
    }
    match finish(&mut run) {
        Ok(()) => {
            let done = each(&run, Fate::Finished);
            match run.end() {
                Ok(()) => done,
                Err(failure) => vec![Recovered::failed(Path::new("/"), failure)],
            }
        }
        Err(failure) => run
            .destinations()
            .iter()
            .map(|names| Recovered::failed(&names.path, failure.clone()))
            .collect(),
    }
}

/// Those of which a controller may know.
fn covered(all: &[Names]) -> impl Iterator<Item = &Names> {
    all.iter().filter(|names| confinement::covers(&names.path))
}

fn is_covered(all: &[Names]) -> bool {
    covered(all).count() == all.len()
}

fn not_all_covered(path: &Path) -> Failure {
    let message = format!(
        "{} was changed together with disks that this agent is not allowed: \"kvm-clone-ctl \
         recover\" by a login that may have all of them ends that",
        path.display()
    );
    Failure::new(FailureCode::Refused, message)
}

/// Takes a committed run forward from wherever it stopped.
fn finish(run: &mut Run) -> Result<(), Failure> {
    run.commit()?;
    let mut destinations = Vec::new();
    for names in run.destinations() {
        destinations.extend(Destination::reopen(names)?);
    }
    forward(&destinations.iter().collect::<Vec<_>>())
}

fn recover_open(run: Run, recovery: Recovery) -> Vec<Recovered> {
    let mut all = Vec::new();
    let mut left = false;
    for names in run.destinations() {
        let path = &names.path;
        let fate = match Destination::reopen(names) {
            Ok(None) if recovery == Recovery::List => continue,
            Ok(None) => match Destination::clear_beginnings(names) {
                Ok(()) => continue,
                Err(failure) => Err(failure),
            },
            Ok(Some(destination)) if recovery == Recovery::RollBack => destination
                .roll_back()
                .map(|()| destination.fate(Fate::RolledBack)),
            Ok(Some(destination)) => Ok(destination.fate(Fate::Waiting)),
            Err(failure) => Err(failure),
        };
        let recovered = match fate {
            Ok(fate) => Recovered::new(path, fate),
            Err(failure) => Recovered::failed(path, failure),
        };
        left |= recovered.fate != Fate::RolledBack;
        all.push(recovered);
    }
    // A note that cannot be removed is found again, and does no harm.
    if !left && recovery != Recovery::List {
        let _ = run.end();
    }
    all
}

/// Where a path leads; of what does not exist, where its directory leads.
fn behind_links(path: &Path) -> PathBuf {
    let follow = |path| confinement::follow(path).and_then(|found| found.canonical());
    if let Ok(path) = follow(path) {
        return path;
    }
    let directory = |path| confinement::directory(path).and_then(|found| found.canonical());
    let parent = path.parent().and_then(|parent| directory(parent).ok());
    match (parent, path.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}
