//! How a disk changes in secret.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kvm_clone_tests::image::MIB;
use kvm_clone_tests::process::tool;

/// Changes a block of a disk in a way that is not seen by size and time of modification.
pub(crate) type Trick = (&'static str, fn(&Path));

/// Changes a byte in the middle of a file.
pub(crate) fn overwrite(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 3 * MIB + 77).unwrap();
    file.write_all_at(&[byte[0].wrapping_add(1)], 3 * MIB + 77)
        .unwrap();
}

/// A changed copy, with the times of the original.
fn changed_copy(path: &Path) -> PathBuf {
    let copy = path.with_extension("another");
    fs::copy(path, &copy).unwrap();
    overwrite(&copy);
    set_modified(&copy, fs::metadata(path).unwrap().modified().unwrap());
    copy
}

pub(crate) fn set_modified(path: &Path, modified: SystemTime) {
    let times = FileTimes::new()
        .set_modified(modified)
        .set_accessed(modified);
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_times(times)
        .unwrap();
}

pub(crate) const TRICKS: [Trick; 6] = [
    ("the time is set back", |path| {
        let modified = fs::metadata(path).unwrap().modified().unwrap();
        overwrite(path);
        set_modified(path, modified);
    }),
    ("another file takes the name", |path| {
        fs::rename(changed_copy(path), path).unwrap();
    }),
    ("it is restored in place, with its times", |path| {
        let copy = changed_copy(path);
        tool(
            "cp",
            [
                "--preserve=all".as_ref(),
                copy.as_os_str(),
                path.as_os_str(),
            ],
        );
        fs::remove_file(copy).unwrap();
    }),
    ("it is written under another name", |path| {
        let modified = fs::metadata(path).unwrap().modified().unwrap();
        let name = path.with_extension("name");
        fs::hard_link(path, &name).unwrap();
        overwrite(&name);
        fs::remove_file(&name).unwrap();
        set_modified(path, modified);
    }),
    ("it is written through a memory map", |path| {
        let modified = fs::metadata(path).unwrap().modified().unwrap();
        let script = "import mmap,sys; f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0); \
                      m[3<<20]^=1; m.flush()";
        tool(
            "python3",
            ["-c".as_ref(), script.as_ref(), path.as_os_str()],
        );
        set_modified(path, modified);
    }),
    ("it is made anew, and has the same inode", |path| {
        let modified = fs::metadata(path).unwrap().modified().unwrap();
        let mut contents = fs::read(path).unwrap();
        contents[5 << 20] ^= 1;
        fs::remove_file(path).unwrap();
        fs::write(path, contents).unwrap();
        set_modified(path, modified);
    }),
];
