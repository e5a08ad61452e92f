//! The guest: a disk that boots by BIOS and UEFI and says what it finds. `tests/guest/build` makes
//! it, once on a machine.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::process::tool;

/// The mark of a disk is a line of text in so many last bytes.
pub const MARK_BYTES: u64 = 4096;

/// Where what was built is kept, unless `KVM_CLONE_TEST_CACHE` says otherwise.
const CACHE: &str = "/var/cache/kvm-clone-tests";

/// The files of the guest.
#[derive(Debug, Clone)]
pub struct Guest {
    directory: PathBuf,
}

impl Guest {
    /// The guest, built now unless an earlier run has built the same.
    pub(super) fn built() -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
        let cache =
            std::env::var_os("KVM_CLONE_TEST_CACHE").map_or_else(|| CACHE.into(), PathBuf::from);
        fs::create_dir_all(&cache).expect("root may make directories");
        let lock = File::create(cache.join("lock")).expect("the cache is writable");
        lock.lock().expect("local files can be locked");
        let directory = cache.join(format!("guest-{}", recipe(&source)));
        if !directory.join("boot.raw").exists() {
            fs::create_dir_all(&directory).expect("the cache is writable");
            tool(
                "bash",
                [source.join("build").as_os_str(), directory.as_os_str()],
            );
        }
        Self { directory }
    }

    /// The disk that boots.
    #[must_use]
    pub fn boot_disk(&self) -> PathBuf {
        self.directory.join("boot.raw")
    }

    /// The kernel, to be booted by path.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// What goes with the kernel.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.directory.join("initrd")
    }
}

/// Names what the guest is built from.
fn recipe(source: &Path) -> String {
    let files = ["build", "init", "writer.rs"].map(|name| source.join(name));
    let sums = tool("sha256sum", files);
    sums.lines()
        .map(|line| &line[..8])
        .collect::<Vec<_>>()
        .join("-")
}

/// Writes the mark of a raw disk.
///
/// # Panics
/// When it is longer than [`MARK_BYTES`], or the disk cannot be written.
pub fn set_mark(disk: &Path, text: &str) {
    let file = File::options()
        .write(true)
        .open(disk)
        .expect("the disk is there");
    let size = file.metadata().expect("an open file has a size").len();
    let mut bytes = format!("{text}\n").into_bytes();
    bytes.resize(usize::try_from(MARK_BYTES).expect("four thousand"), 0);
    file.write_all_at(&bytes, size - MARK_BYTES)
        .expect("the disk is writable");
}

/// What the guest says of a disk with this mark.
#[must_use]
pub fn mark(disk: &str, text: &str) -> String {
    format!("GUEST disk {disk} size {} mark {text}", 64 * 1024 * 1024)
}
