//! Where a hypervisor keeps what this program has to remember there: clones under way, where a
//! VM's disks came from, VMs that it holds. Small JSON files, each written whole or not
//! at all; no program of ours runs to look after them.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorCode, Result};
use crate::host::{Guard, UNFINISHED};
use crate::libvirt::Hypervisor;

/// Below it is everything; root owns it.
const ROOT: &str = "/var/lib/kvm-clone";

/// Ends the name of what is remembered.
const SUFFIX: &str = ".json";

/// The kinds of things to be remembered, each a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Clones that are under way, or were interrupted. Named by the new VM's name.
    Clones,
    /// Where the disks of a VM came from. Named by its UUID.
    Lineage,
    /// VMs that are held while they are read. Named by their UUID.
    Held,
}

impl Kind {
    fn directory(self) -> String {
        let name = match self {
            Self::Clones => "clones",
            Self::Lineage => "lineage",
            Self::Held => "held",
        };
        format!("{ROOT}/{name}")
    }

    /// The file for `name`, which may hold anything a VM's name may.
    pub(super) fn path(self, name: &str) -> String {
        format!("{}/{}{SUFFIX}", self.directory(), file_name(name))
    }
}

/// The names under which something is remembered. What another user keeps is not ours to see.
///
/// # Errors
/// When the host cannot be reached.
pub(super) async fn names(on: &Hypervisor, kind: Kind) -> Result<Vec<String>> {
    let files = files(on, kind).await?;
    let named = files.iter().filter_map(|file| file.strip_suffix(SUFFIX));
    Ok(named.filter_map(name_of).collect())
}

/// Removes what a run has left that broke off while it wrote something to be remembered.
///
/// # Errors
/// When the host cannot be reached, or a file cannot be removed.
pub(super) async fn sweep(on: &Hypervisor, kind: Kind) -> Result<()> {
    for file in files(on, kind).await? {
        let name = file.strip_suffix(UNFINISHED);
        let name = name.and_then(|file| name_of(file.strip_suffix(SUFFIX)?));
        let Some(name) = name else { continue };
        if let Some(lock) = lock(on, kind, &name).await? {
            let path = format!("{}{UNFINISHED}", kind.path(&name));
            on.host().remove(&[path]).await?;
            lock.end().await?;
        }
    }
    Ok(())
}

async fn files(on: &Hypervisor, kind: Kind) -> Result<Vec<String>> {
    let files = match on.host().names_in(&kind.directory()).await {
        Ok(files) => files.unwrap_or_default(),
        Err(error) if error.one_line().contains("Permission denied") => Vec::new(),
        Err(error) => return Err(error),
    };
    Ok(files)
}

/// Keeps other runs away from what is remembered under a name, until what is given back ends or
/// this program is gone. `None` when another run does so.
///
/// # Errors
/// When the host cannot be reached, or nothing can be locked there.
pub(super) async fn lock(on: &Hypervisor, kind: Kind, name: &str) -> Result<Option<Guard>> {
    make_room(on, kind).await?;
    let path = format!("{}/{}.lock", kind.directory(), file_name(name));
    on.host().lock(&path).await
}

/// What is remembered under a name; `None` when nothing is.
///
/// # Errors
/// When the host cannot be reached; io, for a file that is not ours.
pub(super) async fn read<T: DeserializeOwned>(
    on: &Hypervisor,
    kind: Kind,
    name: &str,
) -> Result<Option<T>> {
    read_from(on, &kind.path(name)).await
}

/// The same for a file of another place.
///
/// # Errors
/// As [`read`].
pub(super) async fn read_from<T: DeserializeOwned>(
    on: &Hypervisor,
    path: &str,
) -> Result<Option<T>> {
    let Some(contents) = on.host().read_file(path).await? else {
        return Ok(None);
    };
    serde_json::from_slice(&contents).map(Some).map_err(|error| {
        let message = format!("{path} on {} is not what this program writes there", on.host());
        Error::new(ErrorCode::Io, message)
            .caused_by(error)
            .hint("a newer version may have written it; use that one, or look at the file and remove it")
    })
}

/// Remembers something, in place of what was there.
///
/// # Errors
/// When the host cannot be reached, or the file cannot be written.
pub(super) async fn write(
    on: &Hypervisor,
    kind: Kind,
    name: &str,
    what: &impl Serialize,
) -> Result<()> {
    make_room(on, kind).await?;
    write_to(on, &kind.path(name), what).await
}

/// The same for a file of another place, whose directory is there.
///
/// # Errors
/// As [`write()`].
pub(super) async fn write_to(on: &Hypervisor, path: &str, what: &impl Serialize) -> Result<()> {
    let contents = serde_json::to_vec_pretty(what).map_err(|error| {
        Error::new(ErrorCode::Internal, "a record that is no JSON").caused_by(error)
    })?;
    on.host().write_file(path, &contents).await
}

/// Makes the directory of a kind.
///
/// # Errors
/// When the host cannot be reached, or the directory cannot be made.
pub(super) async fn make_room(on: &Hypervisor, kind: Kind) -> Result<()> {
    on.host().make_directory(&kind.directory(), "0700").await
}

/// Forgets it.
///
/// # Errors
/// When the host cannot be reached, or the file cannot be removed.
pub(super) async fn forget(on: &Hypervisor, kind: Kind, name: &str) -> Result<()> {
    on.host().remove(&[kind.path(name)]).await
}

/// A file name that stands for any text: letters, digits, `-` and `_` as they are, the other
/// bytes in hexadecimal.
pub(super) fn file_name(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let mut file = String::new();
    for byte in name.bytes() {
        if plain(byte) {
            file.push(char::from(byte));
        } else {
            file.push_str(&format!("%{byte:02x}"));
        }
    }
    file
}

/// The text that a file name stands for.
pub(super) fn name_of(file: &str) -> Option<String> {
    let mut name = Vec::new();
    let mut rest = file;
    while let Some(first) = rest.chars().next() {
        let len = if first == '%' { 3 } else { first.len_utf8() };
        let (part, after) = rest.split_at_checked(len)?;
        match part.strip_prefix('%') {
            Some(digits) => name.push(u8::from_str_radix(digits, 16).ok()?),
            None => name.extend_from_slice(part.as_bytes()),
        }
        rest = after;
    }
    String::from_utf8(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_is_a_file_of_its_own() {
        for (name, file) in [
            ("web-1_a", "web-1_a"),
            ("../a b", "%2e%2e%2fa%20b"),
            ("%2e", "%252e"),
            ("Zürich", "Z%c3%bcrich"),
        ] {
            assert_eq!(file_name(name), file);
            assert_eq!(name_of(file).as_deref(), Some(name));
        }
        assert_eq!((name_of("%2"), name_of("%zz")), (None, None));
        assert_eq!(Kind::Lineage.path("x"), "/var/lib/kvm-clone/lineage/x.json");
    }
}
