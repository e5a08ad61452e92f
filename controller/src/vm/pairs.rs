//! The disks of one VM beside those of another: which belongs to which, and whether one may be
//! compared with, or made equal to, the other.

use super::obstacle::Obstacles;
use super::survey::{Survey, SurveyedDisk};
use super::transfers::Move;
use crate::transfer::{MethodChoice, Options};

/// What of a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    /// The bytes of its images.
    Images,
    /// What the guest sees.
    Contents,
}

impl Subject {
    /// What of a VM that is off is copied to `target`: the bytes of its images, unless that has
    /// disks in another format, or `holds_contents` already.
    pub(super) fn between(source: &Survey, target: &Survey, holds_contents: bool) -> Self {
        let differ = |disk: &SurveyedDisk| {
            let mut all = target.disks.iter();
            let theirs = all.find(|theirs| theirs.target == disk.target);
            theirs.is_some_and(|theirs| formats(disk) != formats(theirs))
        };
        let mut all = source.disks.iter().chain(&target.disks);
        if all.all(SurveyedDisk::is_plain) {
            // The two are the same, and every method has the one.
            Self::Images
        } else if holds_contents || source.disks.iter().any(differ) {
            Self::Contents
        } else {
            Self::Images
        }
    }
}

/// Leaves disks of which the guest's view is read or written to the agents: a default method gives
/// way, and one that the user named is an obstacle.
pub(super) fn for_agents(options: &mut Options, obstacles: &mut Obstacles) {
    if options.method_is_given
        && matches!(options.method, MethodChoice::Rsync | MethodChoice::Libvirt)
    {
        let name = options.method.name();
        obstacles.refused(
            format!("what a guest sees of its disks is not copied by {name}, which copies files"),
            "leave out --method, or give --method blocksync",
        );
    }
    options.method = MethodChoice::Blocksync;
}

/// Pairs the disks by target device, image by image or by what the guest sees. Whatever has no
/// counterpart, or one of another kind, is an obstacle by its name: nothing is done by half.
pub(super) fn pair(
    source: &Survey,
    target: &Survey,
    subject: Subject,
    obstacles: &mut Obstacles,
) -> Vec<Move> {
    let mut moves = Vec::new();
    for disk in &source.disks {
        match target
            .disks
            .iter()
            .find(|theirs| theirs.target == disk.target)
        {
            Some(theirs) if subject == Subject::Images => {
                moves.extend(pair_images(disk, theirs, obstacles));
            }
            Some(theirs) => moves.extend(pair_contents(disk, theirs, target, obstacles)),
            None => lonely(disk, source, target, obstacles),
        }
    }
    for disk in &target.disks {
        if source.disks.iter().all(|ours| ours.target != disk.target) {
            lonely(disk, target, source, obstacles);
        }
    }
    moves
}

fn lonely(disk: &SurveyedDisk, has: &Survey, lacks: &Survey, obstacles: &mut Obstacles) {
    let target = &disk.target;
    obstacles.refused(
        format!(
            "disk {target} of {} on {} has no counterpart: {} on {} has no {target}",
            has.name(),
            has.on.host(),
            lacks.name(),
            lacks.on.host()
        ),
        format!(
            "attach one there (virsh attach-disk), or leave it out with --exclude-disk {target}"
        ),
    );
}

fn pair_contents(
    disk: &SurveyedDisk,
    theirs: &SurveyedDisk,
    target: &Survey,
    obstacles: &mut Obstacles,
) -> Option<Move> {
    let (name, there) = (&disk.target, &theirs.images[0]);
    let what = format!("disk {name} of {} on {}", target.name(), target.on.host());
    if !matches!(there.format.as_str(), "raw" | "qcow2") {
        let format = &there.format;
        obstacles.refused(
            format!("{what} is {format}, which what a guest sees is not written into"),
            "clone the VM anew with --dest-format qcow2 or raw",
        );
        return None;
    }
    let (ours, size) = (disk.size_bytes(), theirs.size_bytes());
    if !theirs.is_plain() && size > ours {
        obstacles.refused(
            format!(
                "{what} has {size} bytes, and at the source {ours}: {} does not shrink",
                there.format
            ),
            "clone the VM anew",
        );
        return None;
    }
    let (source, destination) = (disk.images[0].path.clone(), there.path.clone());
    Some(Move::of_guest(name, source, destination))
}

/// The formats of a disk's images, for people.
fn formats(disk: &SurveyedDisk) -> String {
    let images = disk.images.iter();
    let formats: Vec<&str> = images.map(|image| image.format.as_str()).collect();
    formats.join(" on ")
}

fn pair_images(disk: &SurveyedDisk, theirs: &SurveyedDisk, obstacles: &mut Obstacles) -> Vec<Move> {
    let target = &disk.target;
    let (here, there) = (formats(disk), formats(theirs));
    if here != there {
        obstacles.refused(
            format!("disk {target} is {here} at the source and {there} at the destination"),
            "clone the VM anew, or make one of them like the other",
        );
        return Vec::new();
    }
    disk.images
        .iter()
        .zip(&theirs.images)
        .enumerate()
        .map(|(at, (from, to))| Move {
            is_of_guest: at == 0,
            own_reference: from.backing != to.backing,
            ..Move::of_guest(target, from.path.clone(), to.path.clone())
        })
        .collect()
}
