//! File systems and block devices on files: loop devices, always taken down again.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::process::tool;
use crate::skip::find_tool;

/// How long a file system may stay in use after its last user has ended: whoever lists loop devices
/// keeps them, and what their images lie on, for a moment.
const BUSY: Duration = Duration::from_secs(10);

/// How often it is tried meanwhile.
const POLL: Duration = Duration::from_millis(10);

/// A file as a block device.
#[derive(Debug)]
pub struct LoopDevice {
    device: PathBuf,
    backing: PathBuf,
}

impl LoopDevice {
    /// Makes a device of this size; its backing file is sparse.
    ///
    /// # Panics
    /// When the machine has no loop devices.
    #[must_use]
    pub fn new(backing: &Path, size: u64) -> Self {
        let file = std::fs::File::create(backing).expect("the laboratory's directory is writable");
        file.set_len(size).expect("a sparse file takes no room");
        let args = ["--find".as_ref(), "--show".as_ref(), backing.as_os_str()];
        let device = Self {
            device: tool("losetup", args).into(),
            backing: backing.to_owned(),
        };
        // A test that failed may have left this device read-only for whoever gets it next.
        tool("blockdev", ["--setrw".as_ref(), device.path()]);
        device
    }

    /// The device's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The file that holds its bytes.
    #[must_use]
    pub fn backing(&self) -> &Path {
        &self.backing
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        tear_down("losetup", &["--detach".as_ref(), self.device.as_path()]);
    }
}

/// The file systems that the product is tested on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
    Tmpfs,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ext4, Self::Xfs, Self::Btrfs, Self::Tmpfs];

    fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Tmpfs => "tmpfs",
        }
    }

    fn mkfs(self) -> Option<(&'static str, &'static [&'static str])> {
        match self {
            // Without reserved blocks, so that a full file system is full for root as well.
            Self::Ext4 => Some(("mkfs.ext4", &["-q", "-F", "-m", "0"])),
            Self::Xfs => Some(("mkfs.xfs", &["-q", "-f"])),
            Self::Btrfs => Some(("mkfs.btrfs", &["-q", "-f"])),
            Self::Tmpfs => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A mounted file system.
#[derive(Debug)]
pub struct FileSystem {
    directory: PathBuf,
    device: Option<LoopDevice>,
}

impl FileSystem {
    /// Makes and mounts a file system of this size on `directory`.
    ///
    /// # Panics
    /// When it cannot be made; xfs and btrfs want 300 MiB or more.
    #[must_use]
    pub fn mount(kind: Kind, size: u64, directory: &Path) -> Self {
        std::fs::create_dir_all(directory).expect("the laboratory's directory is writable");
        let device = kind.mkfs().map(|(mkfs, args)| {
            let device = LoopDevice::new(&directory.with_extension("backing"), size);
            let args = args
                .iter()
                .map(AsRef::as_ref)
                .chain([device.path().as_os_str()]);
            tool(mkfs, args);
            device
        });
        let options = format!("size={size}");
        match &device {
            Some(device) => tool("mount", [device.path(), directory]),
            None => tool(
                "mount",
                [
                    "-t".as_ref(),
                    "tmpfs".as_ref(),
                    "-o".as_ref(),
                    options.as_ref(),
                    "none".as_ref(),
                    directory,
                ],
            ),
        };
        Self {
            directory: directory.to_owned(),
            device,
        }
    }

    /// The same on an image, whose loop device goes with the mount, however that ends.
    ///
    /// # Panics
    /// When it cannot be made, or has no image.
    #[must_use]
    pub fn on_image(kind: Kind, size: u64, image: &Path, directory: &Path) -> Self {
        let file = std::fs::File::create(image).expect("the laboratory's directory is writable");
        file.set_len(size).expect("a sparse file takes no room");
        let (mkfs, args) = kind.mkfs().expect("a file system on an image");
        let args = args.iter().map(AsRef::as_ref);
        tool(mkfs, args.chain([image.as_os_str()]));
        Self::of_image(image, "rw", directory)
    }

    /// Mounts the file system that an image holds, on a loop device that goes with the mount,
    /// however that ends.
    ///
    /// # Panics
    /// When it does not mount.
    #[must_use]
    pub fn of_image(image: &Path, options: &str, directory: &Path) -> Self {
        std::fs::create_dir_all(directory).expect("the laboratory's directory is writable");
        let options = format!("loop,{options}");
        let args = ["-o".as_ref(), options.as_ref(), image, directory];
        tool("mount", args);
        Self {
            directory: directory.to_owned(),
            device: None,
        }
    }

    /// Shows a directory at another one as well.
    ///
    /// # Panics
    /// When one of them is not there.
    #[must_use]
    pub fn bind(from: &Path, directory: &Path) -> Self {
        tool("mount", ["--bind".as_ref(), from, directory]);
        Self {
            directory: directory.to_owned(),
            device: None,
        }
    }

    /// Makes it read-only from here on, for hosts that start later.
    ///
    /// # Panics
    /// When it is in use.
    pub fn set_read_only(&self) {
        let args = [
            "-o".as_ref(),
            "remount,ro".as_ref(),
            self.directory.as_os_str(),
        ];
        tool("mount", args);
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// A path in it.
    #[must_use]
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.join(name)
    }

    /// Whether it lies on a loop device.
    #[must_use]
    pub fn is_on_loop(&self) -> bool {
        self.device.is_some()
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let unmount = || umount2(&self.directory, MntFlags::empty());
        let deadline = Instant::now() + BUSY;
        let mut unmounted = unmount();
        while unmounted == Err(Errno::EBUSY) && Instant::now() < deadline {
            std::thread::sleep(POLL);
            unmounted = unmount();
        }
        if let Err(error) = unmounted {
            let left = self.directory.display();
            let _ = writeln!(std::io::stderr(), "left behind: {left}: {error}");
        }
        // The device is a field, so it is detached after this.
    }
}

/// Runs a tool, and says so when that leaves something behind. No panic: a test that fails already
/// must not abort on a second one, and `tests/run` fails on what is still there at its end.
pub fn tear_down(name: &str, args: &[&Path]) {
    let program = find_tool(name).unwrap_or_else(|| name.into());
    let ended = Command::new(program).args(args).status();
    if !ended.is_ok_and(|status| status.success()) {
        let _ = writeln!(std::io::stderr(), "left behind: {name} {args:?} failed");
    }
}
