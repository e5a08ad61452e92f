//! The state of a VM's disks before a sync, kept beside them.

use super::naming;
use super::obstacle::Obstacles;
use super::survey::Survey;
use crate::error::{ErrorCode, Result};
use crate::output;

/// Between the name of an image and the time of a checkpoint.
const MARK: &str = ".kc-checkpoint-";

/// One file to be kept, and how.
#[derive(Debug, Clone)]
struct Keep {
    path: String,
    copy: String,
    reflink: bool,
}

/// What will be kept, found possible.
#[derive(Debug, Clone, Default)]
pub(super) struct Checkpoint {
    files: Vec<Keep>,
    /// Earlier checkpoints that go after the sync.
    surplus: Vec<String>,
}

impl Checkpoint {
    /// Finds out how the disks of `target` can be kept. `time` names the checkpoint; of all
    /// checkpoints the newest `keep` stay, this one included.
    ///
    /// # Errors
    /// When the host cannot be asked.
    pub(super) async fn plan(
        target: &Survey,
        time: &str,
        keep: usize,
        obstacles: &mut Obstacles,
    ) -> Result<Self> {
        let mut plan = Self::default();
        for image in target.disks.iter().flat_map(|disk| &disk.images) {
            let (directory, name) = naming::split(&image.path);
            if image.is_device() {
                obstacles.refused(
                    format!(
                        "{} is a block device, whose state cannot be kept",
                        image.path
                    ),
                    "sync without --checkpoint, and take a snapshot of the volume yourself",
                );
                continue;
            }
            let host = target.on.host();
            let reflink = can_reflink(target, directory, name).await?;
            let space = host.space(directory).await?;
            if !reflink && space.free_bytes < image.facts.allocated_bytes {
                let (free, needed) = (
                    output::iec(space.free_bytes),
                    output::iec(image.facts.allocated_bytes),
                );
                obstacles.add(
                    ErrorCode::NoSpace,
                    format!("a checkpoint of {} takes {needed}, and {directory} on {host} has {free} free", image.path),
                    "make room, or sync without --checkpoint",
                );
            }
            let names = host.names_in(directory).await?.unwrap_or_default();
            plan.surplus.extend(
                surplus(&names, name, keep)
                    .into_iter()
                    .map(|old| naming::join(directory, &old)),
            );
            plan.files.push(Keep {
                path: image.path.clone(),
                copy: format!("{}{MARK}{time}", image.path),
                reflink,
            });
        }
        Ok(plan)
    }

    /// Makes the checkpoint: the paths of what is kept. What was made is removed when a part of it
    /// fails.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub(super) async fn take(&self, target: &Survey) -> Result<Vec<String>> {
        let mut made = Vec::new();
        for file in &self.files {
            made.push(file.copy.clone());
            let reflink = if file.reflink {
                "--reflink=always"
            } else {
                "--reflink=never"
            };
            let words = [
                "cp",
                "--preserve=all",
                "--sparse=always",
                reflink,
                "--",
                &file.path,
                &file.copy,
            ];
            // A reflink copy has its source's holes, and cp takes no --sparse beside it.
            let words: Vec<&str> = words
                .into_iter()
                .filter(|word| !(file.reflink && word.starts_with("--sparse")))
                .collect();
            if let Err(error) = target.on.host().tool_output(&words, b"").await {
                target.on.host().remove(&made).await?;
                return Err(error.context(format!("a checkpoint of {} cannot be made", file.path)));
            }
        }
        let sync: Vec<&str> = std::iter::once("sync")
            .chain(made.iter().map(String::as_str))
            .collect();
        target.on.host().tool_output(&sync, b"").await?;
        Ok(made)
    }

    /// Removes the checkpoints that are more than the user wants to keep.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub(super) async fn prune(&self, target: &Survey) -> Result<()> {
        target.on.host().remove(&self.surplus).await
    }
}

/// Whether a file can be copied by sharing its blocks: tried, since nothing else tells.
async fn can_reflink(target: &Survey, directory: &str, name: &str) -> Result<bool> {
    let (path, trial) = (
        naming::join(directory, name),
        naming::join(directory, &format!(".{name}.kc-trial")),
    );
    let words = ["cp", "--reflink=always", "--", &path, &trial];
    let works = target.on.host().tool(&words, b"").await?.status.success();
    target.on.host().remove(&[trial]).await?;
    Ok(works)
}

/// The checkpoints of an image that are too many once there is one more. Their names end in
/// their time, so the order of the names is that of their age.
fn surplus(names: &[String], image: &str, keep: usize) -> Vec<String> {
    let mark = format!("{image}{MARK}");
    let mut old: Vec<String> = names
        .iter()
        .filter(|name| name.starts_with(&mark))
        .cloned()
        .collect();
    old.sort();
    old.truncate((old.len() + 1).saturating_sub(keep));
    old
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_and_the_new_one_counts() {
        let names: Vec<String> = [
            "a",
            "a.kc-checkpoint-3",
            "a.kc-checkpoint-1",
            "a.kc-checkpoint-2",
            "b.kc-checkpoint-0",
        ]
        .map(str::to_owned)
        .into();
        assert_eq!(
            surplus(&names, "a", 2),
            ["a.kc-checkpoint-1", "a.kc-checkpoint-2"]
        );
        assert_eq!(surplus(&names, "a", 4), Vec::<String>::new());
        assert_eq!(surplus(&names, "a", 1).len(), 3);
    }
}
