//! What the kernel tells of devices, mounts and open files, in /proc and /sys.
//!
//! Nothing is decided here. What cannot be read is absent: a process that has just ended, one of
//! another user, a list that an older kernel does not have.

use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::mem::MaybeUninit;
use std::ops::RangeInclusive;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::stat::{major, minor};

/// Where the kernel's lists are: a test may have its own.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    pub(super) proc: PathBuf,
    pub(super) sys: PathBuf,
}

/// The number of a device, which is `MAJOR:MINOR` in the kernel's lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number {
    major: u64,
    minor: u64,
}

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) device: Number,
    pub(super) directory: PathBuf,
    pub(super) kind: OsString,
    pub(super) source: OsString,
}

/// What a file is, by numbers alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node {
    /// Of the file system that the name lies in.
    pub(super) device: Number,
    pub(super) inode: u64,
    /// The device that it stands for, if it is a block device.
    pub(super) stands_for: Option<Number>,
}

/// An open file of another process.
#[derive(Debug, Clone)]
pub(super) struct OpenFile {
    pub(super) pid: u32,
    pub(super) node: Node,
    pub(super) writes: bool,
    /// The bytes on which it holds locks.
    pub(super) locks: Vec<RangeInclusive<i64>>,
}

impl Kernel {
    /// The one that runs.
    pub(super) fn running() -> Self {
        Self {
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }

    /// What is mounted in this mount namespace.
    pub(super) fn mounts(&self) -> Vec<Mount> {
        let list = fs::read(self.proc.join("self/mountinfo")).unwrap_or_default();
        list.split(|byte| *byte == b'\n')
            .filter_map(Mount::parse)
            .collect()
    }

    /// The directory in which a block device is described.
    pub(super) fn described(&self, device: Number) -> PathBuf {
        self.sys.join(format!("dev/block/{device}"))
    }

    /// The open files of all other processes that satisfy `wanted`.
    pub(super) fn open_files(&self, wanted: impl Fn(&Node) -> bool) -> Vec<OpenFile> {
        let own = std::process::id();
        let mut found = Vec::new();
        for process in entries(&self.proc) {
            let pid = process.file_name().and_then(OsStr::to_str);
            let Some(pid) = pid.and_then(|name| name.parse().ok()) else {
                continue;
            };
            if pid == own {
                continue;
            }
            for link in entries(&process.join("fd")) {
                // Most are sockets and pipes, which have no path; reading the link costs less.
                let target = fs::read_link(&link).unwrap_or_default();
                if !target.has_root() {
                    continue;
                }
                let Some(node) = Node::at(&link).ok().filter(&wanted) else {
                    continue;
                };
                let info = process
                    .join("fdinfo")
                    .join(link.file_name().unwrap_or_default());
                if let Some((writes, locks)) = read_info(&info) {
                    found.push(OpenFile {
                        pid,
                        node,
                        writes,
                        locks,
                    });
                }
            }
        }
        found
    }

    /// The name of the program that a process runs, shortened by the kernel to 15 bytes; `self` is
    /// ours.
    pub(super) fn program(&self, process: &str) -> Option<String> {
        let name = fs::read(self.proc.join(process).join("comm")).ok()?;
        Some(String::from_utf8_lossy(name.trim_ascii_end()).into_owned())
    }
}

/// What is in a directory; nothing, if it cannot be read.
pub(super) fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(directory).ok().into_iter().flatten();
    entries.filter_map(|entry| entry.ok().map(|entry| entry.path()))
}

/// A file of one line, as they are in /sys.
pub(super) fn line(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Some(bytes)
}

impl Number {
    pub(super) fn of(device: u64) -> Self {
        Self {
            major: major(device),
            minor: minor(device),
        }
    }

    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let (major, minor) = str::from_utf8(text).ok()?.split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl Mount {
    /// Reads a line such as `36 35 98:0 /root /mount/point rw shared:1 - ext4 /dev/vda rw`.
    fn parse(line: &[u8]) -> Option<Self> {
        let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let separator = words.iter().skip(6).position(|word| *word == b"-")? + 6;
        Some(Self {
            device: Number::parse(words[2])?,
            directory: unescape(words[4]).into(),
            kind: unescape(words.get(separator + 1)?),
            source: unescape(words.get(separator + 2)?),
        })
    }
}

/// Spaces, tabs, newlines and backslashes are written as a backslash and three octal digits.
fn unescape(word: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| *first == b'\\');
        let code = code.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        plain.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(plain)
}

impl Node {
    pub(super) fn of(metadata: &Metadata) -> Self {
        let is_device = metadata.file_type().is_block_device();
        Self {
            device: Number::of(metadata.dev()),
            inode: metadata.ino(),
            stands_for: is_device.then(|| Number::of(metadata.rdev())),
        }
    }

    /// What a path leads to. A server that has gone away is not waited for: its files are what was
    /// known of them last.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut facts = MaybeUninit::<libc::statx>::uninit();
        // SAFETY: `path` ends with a zero byte and lives until after the call, and `facts` has
        // room for the structure that the kernel writes.
        let result = unsafe {
            libc::statx(
                libc::AT_FDCWD,
                path.as_ptr(),
                libc::AT_STATX_DONT_SYNC,
                libc::STATX_TYPE | libc::STATX_INO,
                facts.as_mut_ptr(),
            )
        };
        if result == -1 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so the kernel has filled the structure.
        let facts = unsafe { facts.assume_init() };
        let number = |major: u32, minor: u32| Number {
            major: major.into(),
            minor: minor.into(),
        };
        let is_device = u32::from(facts.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
        Ok(Self {
            device: number(facts.stx_dev_major, facts.stx_dev_minor),
            inode: facts.stx_ino,
            stands_for: is_device.then(|| number(facts.stx_rdev_major, facts.stx_rdev_minor)),
        })
    }
}

/// Whether an open file may be written to, and its locks; `None` when it is but a handle to a path.
fn read_info(path: &Path) -> Option<(bool, Vec<RangeInclusive<i64>>)> {
    let info = fs::read_to_string(path).ok()?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    let flags = libc::c_int::from_str_radix(flags.trim(), 8).ok()?;
    if flags & libc::O_PATH != 0 {
        return None;
    }
    let writes = [libc::O_WRONLY, libc::O_RDWR].contains(&(flags & libc::O_ACCMODE));
    Some((writes, info.lines().filter_map(locked).collect()))
}

/// The bytes of a line such as `lock: 1: OFDLCK ADVISORY READ -1 fe:00:1234 100 101`, of which
/// the last may be `EOF`.
fn locked(line: &str) -> Option<RangeInclusive<i64>> {
    let mut words = line.strip_prefix("lock:")?.split_ascii_whitespace().rev();
    let (last, first) = (words.next()?, words.next()?);
    Some(first.parse().ok()?..=last.parse().unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_odd_names_and_optional_fields() {
        let mount = |line: &str| Mount::parse(line.as_bytes());
        let odd =
            mount(r"36 35 98:0 /mnt1 /a\040b\134c rw master:1 shared:2 - nfs4 srv:/x\011y rw");
        assert_eq!(
            odd,
            Some(Mount {
                device: Number {
                    major: 98,
                    minor: 0
                },
                directory: "/a b\\c".into(),
                kind: "nfs4".into(),
                source: "srv:/x\ty".into(),
            })
        );
        // A directory that is named like the separator, and a source that is empty.
        let minus = mount("36 35 0:44 / - rw - tmpfs  rw").unwrap();
        assert_eq!(
            (minus.directory.to_str(), minus.source.to_str()),
            (Some("-"), Some(""))
        );
        for broken in [
            "",
            "1 2 3",
            "36 35 98 / /a rw - ext4 /dev/a rw",
            "36 35 98:0 / /a rw -",
        ] {
            assert_eq!(mount(broken), None);
        }
    }

    #[test]
    fn this_machine_tells_what_is_mounted() {
        let mounts = Kernel::running().mounts();
        let proc = mounts.iter().find(|mount| mount.kind == "proc").unwrap();
        assert_eq!(Node::at(&proc.directory).unwrap().device, proc.device);
    }

    #[test]
    fn locks_are_read_from_what_the_kernel_says_of_an_open_file() {
        let read = |text: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(file.path(), text).unwrap();
            read_info(file.path())
        };
        let [reads, writes, path] = [0, libc::O_RDWR, libc::O_PATH]
            .map(|flags| format!("pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t27\n"));
        assert_eq!(read(&reads), Some((false, vec![])));
        let locks = "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:10699 100 101\n\
                     lock:\t2: POSIX  ADVISORY  WRITE 77 fe:00:10699 0 EOF\n";
        assert_eq!(
            read(&(writes + locks)),
            Some((true, vec![100..=101, 0..=i64::MAX]))
        );
        assert_eq!(read(&path), None);
        assert_eq!(read("flags:\tx\n"), None);
    }

    #[test]
    fn both_ways_to_look_at_a_file_agree() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = file.as_file().metadata().unwrap();
        assert_eq!(Node::at(file.path()).unwrap(), Node::of(&metadata));
        assert_eq!(
            Node::at(Path::new("/no such file")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
