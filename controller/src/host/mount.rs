//! File systems inside images, shown on their host for as long as a guard stands there.

use serde::Serialize;

use super::script::mount as script;
use super::{Export, Guard, Host};
use crate::error::{Error, ErrorCode, Result};

/// Something that looks like a file system, inside an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileSystem {
    /// The disk, and the number of the partition.
    pub name: String,
    /// `ext4`, `xfs`, `LVM2_member`, …
    pub kind: String,
    /// Where it is shown; `None` where the host cannot.
    pub path: Option<String>,
}

impl Host {
    /// Shows the file systems of images below a directory, read-only, until the guard ends, or this
    /// program or the connection does; each image is there as `NAME.raw`, too. The journals of file
    /// systems are not replayed.
    ///
    /// # Errors
    /// When the host cannot be reached; refused, where the directory is there already; io, when an
    /// image cannot be shown.
    pub async fn mount(
        &self,
        directory: &str,
        images: &[Export],
    ) -> Result<(Guard, Vec<FileSystem>)> {
        if self.file_facts(directory).await?.is_some() {
            let message = format!("{directory} on {self} is there already");
            return Err(Error::new(ErrorCode::Refused, message)
                .hint("somebody has it mounted: look there, or wait"));
        }
        let words: Vec<[String; 3]> = images
            .iter()
            .map(|image| {
                let options = match image.format.as_str() {
                    "raw" => String::new(),
                    _ => image.image_options(),
                };
                [image.name.clone(), options, image.path.clone()]
            })
            .collect();
        let (begin, end) = (script::mount(), script::end_mount());
        let words = words.iter().flatten().map(String::as_str);
        let begin: Vec<&str> = ["sh", "-c", &begin, directory]
            .into_iter()
            .chain(words)
            .collect();
        let guard = self
            .guard(&begin, &["sh", "-c", &end, directory], &["true"])
            .await?;
        let list = self.read_file(&format!("{directory}/list")).await?;
        let list = String::from_utf8_lossy(&list.unwrap_or_default()).into_owned();
        let found = list.lines().filter_map(|line| {
            let [name, kind, shown] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
            Some(FileSystem {
                name: name.to_owned(),
                kind: kind.to_owned(),
                path: (shown == "shown").then(|| format!("{directory}/{name}")),
            })
        });
        Ok((guard, found.collect()))
    }
}
