//! Whether the destination has room for what is carried to it.

use std::collections::BTreeMap;

use super::naming;
use super::obstacle::Obstacles;
use super::plan::Carried;
use crate::error::{ErrorCode, Result};
use crate::host::Host;
use crate::output;

/// What a file system needs for its own maps of what is written to it, as a part of that: one in
/// so many.
const MAPS: u64 = 100;

/// Adds an obstacle for every file system that is too full. What an interrupted run has left in
/// the place of a file is room that it has already.
///
/// # Errors
/// When the host cannot be asked.
pub(super) async fn check(files: &[Carried], to: &Host, obstacles: &mut Obstacles) -> Result<()> {
    let mut needed: BTreeMap<String, (u64, u64, String)> = BTreeMap::new();
    for file in files {
        let (directory, name) = naming::split(&file.destination);
        let Some(directory) = existing(to, directory).await? else {
            continue;
        };
        let space = to.space(&directory).await?;
        let there = [name.to_owned(), naming::partial(name)];
        let mut has = 0;
        for name in there {
            let facts = to.file_facts(&naming::join(&directory, &name)).await?;
            has = has.max(facts.map_or(0, |facts| facts.allocated_bytes));
        }
        let more = file.bytes_data.saturating_sub(has);
        let entry = needed
            .entry(space.id)
            .or_insert((0, space.free_bytes, directory));
        entry.0 += more + more / MAPS;
    }
    for (bytes, free, directory) in needed.into_values() {
        if bytes > free {
            let (bytes, free) = (output::iec(bytes), output::iec(free));
            obstacles.add(
                ErrorCode::NoSpace,
                format!("{directory} on {to} has {free} free, and {bytes} are needed"),
                "make room, or choose another place with --dest-dir or --dest-pool",
            );
        }
    }
    Ok(())
}

/// The directory, or the nearest above it that is there.
pub(super) async fn existing(on: &Host, directory: &str) -> Result<Option<String>> {
    let mut directory = directory;
    loop {
        if on.file_facts(directory).await?.is_some() {
            return Ok(Some(directory.to_owned()));
        }
        if directory == "/" {
            return Ok(None);
        }
        directory = naming::split(directory).0;
    }
}
