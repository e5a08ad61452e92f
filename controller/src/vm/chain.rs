//! Points where files share no blocks: of each disk a point has what it has lost in the next newer one,
//! in a qcow2 image that stands on that one's, and the newest stands on the head.
//!
//! ```text
//!  deltas/1-vda.qcow2 ── deltas/2-vda.qcow2 ── deltas/3-vda.qcow2 ── head/vda.raw
//!
//!  commit of a run    the agent puts what the head loses into 3, just before    (agent: disk/delta.rs)
//!  a new point        4 stands on the head, and has nothing; then 3 stands on 4
//!  2 goes             what 1 lacks of it is put into 1, which then stands on 3
//! ```
//!
//! They lie in one directory, since QEMU puts the names of a chain behind each other where they lead
//! from one to another. So each shows its version wherever something breaks off. What stands on the
//! head although there is a newer point is put right by the next run, before it changes the head
//! ([`link`]).

use std::collections::{BTreeMap, BTreeSet};

use super::naming;
use super::point::{Listed, Point, PointDisk, PointFormat, file_of};
use crate::error::{Error, ErrorCode, Result};
use crate::host::Host;

/// Points that may stand on each other: a process may have 1024 files open, as a rule.
pub(super) const MOST: usize = 500;

/// An image of a point.
#[derive(Debug)]
struct Image<'a> {
    point: &'a Point,
    disk: &'a PointDisk,
}

/// The images of each disk, in the order in which they were made, whatever the clock said then.
fn images(points: &[Point]) -> BTreeMap<&str, Vec<Image<'_>>> {
    let mut all: BTreeMap<&str, Vec<Image<'_>>> = BTreeMap::new();
    let mut points: Vec<&Point> = points.iter().collect();
    points.sort_by_key(|point| (point.manifest.sequence, point.manifest.instant));
    for point in points {
        for disk in &point.manifest.disks {
            let images = all.entry(&disk.target).or_default();
            images.push(Image { point, disk });
        }
    }
    all
}

impl Image<'_> {
    fn path(&self) -> String {
        self.point.file(self.disk)
    }

    fn is_delta(&self) -> bool {
        self.disk.format == PointFormat::Delta
    }

    /// Has it stand on another one, or on the head, by this way of doing it.
    async fn stand(&self, on: &Host, next: Option<&Self>, way: &[&str]) -> Result<()> {
        let (below, format) = match next {
            None => (head_of(&self.disk.target), PointFormat::Raw),
            Some(next) => (
                match next.disk.format {
                    PointFormat::Delta => next.disk.file.clone(),
                    PointFormat::Raw => format!("../points/{}/{}", next.point.name, next.disk.file),
                },
                next.disk.format,
            ),
        };
        let path = self.path();
        let words = ["-f", "qcow2", "-F", format.of_qemu(), "-b", &below, &path];
        let words = [&["qemu-img", "rebase"], way, &words].concat();
        on.tool_output(&words, b"").await?;
        on.tool_output(&["sync", "--", &path], b"").await.map(drop)
    }
}

/// The head of a disk, from the directory of the images.
fn head_of(target: &str) -> String {
    format!("../head/{}", file_of(target))
}

/// Whether a point shows nothing without what it stands on.
pub(super) fn stands(point: &Point) -> bool {
    let mut disks = point.manifest.disks.iter();
    disks.any(|disk| disk.format == PointFormat::Delta)
}

/// The disks whose heads points stand on, and the image of each that gets what its head loses.
pub(super) fn ends(points: &[Point]) -> BTreeMap<String, String> {
    let newest = |(target, images): (&str, Vec<Image<'_>>)| {
        let last = images.last().filter(|image| image.is_delta())?;
        Some((target.to_owned(), last.path()))
    };
    images(points).into_iter().filter_map(newest).collect()
}

/// Refuses more points than can stand on each other.
pub(super) fn check_count(points: &[Point]) -> Result<()> {
    let n = points.iter().filter(|point| stands(point)).count();
    if n <= MOST {
        return Ok(());
    }
    let message = format!("{n} points stand on each other, and QEMU opens all of them at once");
    Err(Error::new(ErrorCode::Refused, message).hint(
        "let go of some that are pinned (\"pin --off\"), or choose a \"directory\" on XFS or btrfs",
    ))
}

/// Refuses what would spoil points: one that cannot be read may stand between two others.
pub(super) fn check(listed: &Listed) -> Result<()> {
    match listed.strange.first() {
        Some(strange) if listed.points.iter().any(stands) => {
            let message = format!("points here stand on each other, and {strange}");
            Err(Error::new(ErrorCode::Refused, message)
                .hint("put that manifest.json right, or move the replica away"))
        }
        _ => Ok(()),
    }
}

/// Makes the images of a new point in their directory: they have nothing, and stand on the head.
pub(super) async fn make(on: &Host, directory: &str, disks: &[PointDisk]) -> Result<()> {
    on.make_directory(directory, "0700").await?;
    for disk in disks {
        let path = naming::join(directory, &disk.file);
        let size = disk.size_bytes.to_string();
        let head = head_of(&disk.target);
        let how = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
        let words = [&how[..], &[&head, &path, &size]].concat();
        on.make_file(&path).await?;
        on.tool_output(&words, b"").await?;
        on.tool_output(&["sync", "--", &path], b"").await?;
    }
    Ok(())
}

/// Has each point stand on the next newer one: the one before `newest`, or, after a run that broke
/// off, all.
///
/// # Errors
/// When the host cannot be reached, or an image cannot be written: to do it again does no harm.
pub(super) async fn link(on: &Host, points: &[Point], newest: Option<&Point>) -> Result<()> {
    for images in images(points).values() {
        for pair in images.windows(2) {
            let [older, newer] = pair else { continue };
            let is_wanted = newest.is_none_or(|newest| newest.name == newer.point.name);
            if is_wanted && older.is_delta() {
                older.stand(on, Some(newer), &["-u"]).await?;
            }
        }
    }
    Ok(())
}

/// Has those stay whole that stand on points which are about to go.
///
/// # Errors
/// Refused, for what [`check`] finds; when the host cannot be reached, or there is no room: then all
/// points are what they were.
pub(super) async fn part(on: &Host, all: &Listed, leaving: &BTreeSet<&str>) -> Result<()> {
    check(all)?;
    for images in images(&all.points).values() {
        let stays = |image: &Image<'_>| !leaving.contains(image.point.name.as_str());
        for (at, image) in images.iter().enumerate() {
            let newer = &images[at + 1..];
            let between = newer.iter().position(stays).unwrap_or(newer.len());
            if !image.is_delta() || !stays(image) || between == 0 {
                continue;
            }
            let size = image.disk.size_bytes;
            let between_it = newer[..between].iter();
            let shorter = between_it.filter(|each| each.is_delta() && each.disk.size_bytes < size);
            for shorter in shorter {
                // It goes; QEMU before 8.2 does not get past the end of a shorter image below.
                let (path, size) = (shorter.path(), size.to_string());
                let words = ["qemu-img", "resize", "-q", "-f", "qcow2", &path, &size];
                on.tool_output(&words, b"").await?;
            }
            image.stand(on, newer.get(between), &[]).await?;
        }
    }
    Ok(())
}
