//! The disks of one VM beside those of another: which belongs to which, and whether one may be
//! compared with, or made equal to, the other.

use super::obstacle::Obstacles;
use super::survey::{Survey, SurveyedDisk};
use super::transfers::Move;

/// Pairs the disks by target device, image by image. Whatever has no counterpart, or one of
/// another kind, is an obstacle by its name: nothing is done by half.
pub(super) fn pair(source: &Survey, target: &Survey, obstacles: &mut Obstacles) -> Vec<Move> {
    let mut moves = Vec::new();
    for disk in &source.disks {
        match target
            .disks
            .iter()
            .find(|theirs| theirs.target == disk.target)
        {
            Some(theirs) => moves.extend(pair_images(disk, theirs, obstacles)),
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

fn pair_images(disk: &SurveyedDisk, theirs: &SurveyedDisk, obstacles: &mut Obstacles) -> Vec<Move> {
    let target = &disk.target;
    let formats = |disk: &SurveyedDisk| {
        let formats: Vec<&str> = disk
            .images
            .iter()
            .map(|image| image.format.as_str())
            .collect();
        formats.join(" on ")
    };
    let (here, there) = (formats(disk), formats(theirs));
    if here != there {
        obstacles.refused(
            format!("disk {target} is {here} at the source and {there} at the destination"),
            "disks are copied as the files that they are; clone the VM anew, or convert one of them",
        );
        return Vec::new();
    }
    disk.images
        .iter()
        .zip(&theirs.images)
        .map(|(from, to)| Move {
            target: target.clone(),
            source: from.path.clone(),
            destination: to.path.clone(),
            read_from: None,
            own_reference: from.backing != to.backing,
        })
        .collect()
}
