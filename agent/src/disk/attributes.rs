//! What a file is beside its contents: the new version of a destination takes over from the old
//! one who may use it and how it is labelled.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::errno::Errno;
use nix::libc;

use super::file::DiskFile;

/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS` of linux/fs.h.
const GET_FLAGS: libc::c_ulong = 0x8008_6601;
const SET_FLAGS: libc::c_ulong = 0x4008_6602;

/// `FS_NOCOW_FL`: btrfs writes the file's blocks in place.
const NOCOW: libc::c_long = 0x0080_0000;

/// Gives an empty file the flag without which btrfs lets no blocks be shared with one that has it.
pub(super) fn copy_nocow(from: &DiskFile, to: &DiskFile) -> io::Result<()> {
    let mut flags: libc::c_long = 0;
    // SAFETY: the descriptor is open, and `flags` has room for the word that the kernel writes.
    if unsafe { libc::ioctl(from.as_raw_fd(), GET_FLAGS, &raw mut flags) } == -1 {
        // A file system without such flags.
        return Ok(());
    }
    if flags & NOCOW == 0 {
        return Ok(());
    }
    // SAFETY: as above; the kernel reads the word.
    if unsafe { libc::ioctl(to.as_raw_fd(), SET_FLAGS, &raw const flags) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes owner, mode, access lists, label and all other extended attributes of `to` those of
/// `from`.
pub(super) fn copy(from: &DiskFile, to: &DiskFile) -> io::Result<()> {
    let (was, is) = (from.metadata()?, to.metadata()?);
    if (was.uid(), was.gid()) != (is.uid(), is.gid()) {
        std::os::unix::fs::fchown(to.as_file(), Some(was.uid()), Some(was.gid()))?;
    }
    let mode = std::fs::Permissions::from_mode(was.mode() & 0o7777);
    to.as_file().set_permissions(mode)?;
    let names = list(from)?;
    for name in list(to)?.iter().filter(|name| !names.contains(name)) {
        remove(to, name)?;
    }
    for name in &names {
        let Some(value) = get(from, name)? else {
            continue;
        };
        if get(to, name)?.as_ref() != Some(&value) {
            set(to, name, &value)?;
        }
    }
    Ok(())
}

/// The names of all extended attributes that this user may see.
fn list(file: &DiskFile) -> io::Result<Vec<CString>> {
    let fill = |bytes: &mut [u8]| {
        // SAFETY: the descriptor is open, and the kernel writes at most the length it is given.
        unsafe { libc::flistxattr(file.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) }
    };
    let names = read(fill)?.unwrap_or_default();
    Ok(names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .filter_map(|name| CString::new(name).ok())
        .collect())
}

fn get(file: &DiskFile, name: &CString) -> io::Result<Option<Vec<u8>>> {
    read(|bytes| {
        let (fd, value) = (file.as_raw_fd(), bytes.as_mut_ptr().cast());
        // SAFETY: the descriptor is open, the name ends with a zero byte, and the kernel writes
        // at most the length it is given.
        unsafe { libc::fgetxattr(fd, name.as_ptr(), value, bytes.len()) }
    })
}

fn set(file: &DiskFile, name: &CString, value: &[u8]) -> io::Result<()> {
    let (fd, len) = (file.as_raw_fd(), value.len());
    // SAFETY: the descriptor is open, the name ends with a zero byte, and the kernel reads `len`
    // bytes of the value.
    let result = unsafe { libc::fsetxattr(fd, name.as_ptr(), value.as_ptr().cast(), len, 0) };
    if result == -1 {
        return Err(about(name));
    }
    Ok(())
}

fn remove(file: &DiskFile, name: &CString) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the name ends with a zero byte.
    if unsafe { libc::fremovexattr(file.as_raw_fd(), name.as_ptr()) } == -1 {
        return Err(about(name));
    }
    Ok(())
}

/// The last error, which names the attribute.
fn about(name: &CString) -> io::Error {
    let error = io::Error::last_os_error();
    let name = OsStr::from_bytes(name.as_bytes()).display().to_string();
    io::Error::new(error.kind(), format!("extended attribute {name}: {error}"))
}

/// Asks for the length, then for the value; `None` where there is none, or the file system has no
/// such thing.
fn read(fill: impl Fn(&mut [u8]) -> isize) -> io::Result<Option<Vec<u8>>> {
    loop {
        let Some(len) = length(fill(&mut []))? else {
            return Ok(None);
        };
        let mut bytes = vec![0; len];
        if len == 0 {
            return Ok(Some(bytes));
        }
        match length(fill(&mut bytes)) {
            Ok(Some(len)) => {
                bytes.truncate(len);
                return Ok(Some(bytes));
            }
            Ok(None) => return Ok(None),
            // It grew meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ERANGE) => {}
            Err(error) => return Err(error),
        }
    }
}

fn length(result: isize) -> io::Result<Option<usize>> {
    match usize::try_from(result) {
        Ok(len) => Ok(Some(len)),
        Err(_) => match Errno::last() {
            Errno::ENODATA | Errno::EOPNOTSUPP => Ok(None),
            error => Err(error.into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mode_and_attributes_are_taken_over() {
        // The directory for temporary files may be without them.
        let here = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let file = |name: &str| DiskFile::create(&directory.path().join(name)).unwrap();
        let (old, new) = (file("old"), file("new"));
        let mode = std::fs::Permissions::from_mode(0o640);
        old.as_file().set_permissions(mode).unwrap();
        let (kept, gone) = (c"user.kept".to_owned(), c"user.gone".to_owned());
        set(&old, &kept, b"value").unwrap();
        set(&new, &gone, b"x").unwrap();
        copy(&old, &new).unwrap();
        assert_eq!(new.metadata().unwrap().mode() & 0o7777, 0o640);
        assert_eq!(get(&new, &kept).unwrap().unwrap(), b"value");
        assert_eq!(get(&new, &gone).unwrap(), None);
    }
}
