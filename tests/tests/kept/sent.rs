//! `--keep-sent`: of a source that did change, what a reflink copy proves to be what it was is not
//! read.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use kvm_clone_tests::image::{self, BLOCK, MIB};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::outcome::Outcome;
use kvm_clone_tests::process::tool;

use crate::pair::{Pair, assert_changed, read, rest, trusted};
use crate::tricks::{TRICKS, overwrite, set_modified};

const KEEP: &[&str] = &["--keep-sent=0"];

/// The file systems whose files can share blocks.
const SHARING: [Kind; 2] = [Kind::Xfs, Kind::Btrfs];

fn on(kind: Kind) -> Option<Lab> {
    Some(LabSpec::new()?.mount(kind, 500 * MIB).start())
}

/// A pair of which a copy is kept.
fn kept<'a>(lab: &'a Lab, name: &str) -> Pair<'a> {
    let pair = Pair::new(lab, Journey::Direct, name, KEEP);
    pair.is_proven();
    assert_eq!(copies(&pair).len(), 1);
    pair
}

/// Copies that are kept beside a source.
fn copies(pair: &Pair<'_>) -> Vec<PathBuf> {
    let entries = fs::read_dir(pair.from.parent().unwrap()).unwrap();
    let name = pair.from.file_name().unwrap().to_str().unwrap();
    let start = format!(".{name}.kc-sent-");
    let is_copy = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with(&start)
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(is_copy).collect()
}

/// A sync after something was done to the source.
fn sync_after(pair: &Pair<'_>, change: impl FnOnce(&Path)) -> Outcome {
    change(&pair.from);
    rest(&pair.from);
    pair.sync()
}

/// Claims that of the source no more than so many bytes were read.
fn assert_read_at_most(outcome: &Outcome, bytes: u64, what: &str) {
    assert!(read(outcome)[0] <= bytes, "{what}: {}", outcome.run);
}

/// Claims that all of the source's data was read.
fn assert_all_read(outcome: &Outcome, pair: &Pair<'_>, what: &str) {
    let data = image::data_bytes(&pair.from);
    assert!(read(outcome)[0] >= data, "{what}: {}", outcome.run);
    assert_eq!(trusted(outcome)[0], 0, "{what}: {}", outcome.run);
}

#[test]
fn only_what_was_written_since_is_read() {
    for kind in SHARING {
        let Some(lab) = on(kind) else { return };
        let pair = kept(&lab, "disk");
        for turn in 0..3 {
            let outcome = sync_after(&pair, |disk| {
                image::change_blocks(disk, 20, 8 + turn);
            });
            let changed = outcome.number("blocks_changed");
            assert!(changed > 0);
            assert_eq!(read(&outcome), [changed * BLOCK, 0], "{}", outcome.run);
            let data = image::data_bytes(&pair.from);
            let all = read(&outcome)[0] + trusted(&outcome)[0];
            assert!(all >= data, "{} of {data}: {}", all, outcome.run);
            assert_eq!(copies(&pair).len(), 1);
        }
        pair.is_proven();

        // One byte, zeros where there was data, data where there was a hole, holes, space that is
        // only reserved, and written after that.
        let file = File::options().write(true).open(&pair.from).unwrap();
        let outcome = sync_after(&pair, |disk| {
            file.write_all_at(b"x", BLOCK * 20 + 7).unwrap();
            file.write_all_at(&vec![0; 3 * 65_536], BLOCK * 7).unwrap();
            file.write_all_at(&[7; 100], 10 * MIB).unwrap();
            fallocate(disk, &["-p", "-o", "1048576", "-l", "200000"]);
            fallocate(disk, &["-o", "11534336", "-l", "300000"]);
        });
        assert_read_at_most(&outcome, 15 * BLOCK, "holes and data");
        let outcome = sync_after(&pair, |_| {
            file.write_all_at(&[8; 70_000], 11_534_336 + 8192).unwrap();
        });
        assert_read_at_most(&outcome, 6 * BLOCK, "into what was reserved");
        pair.is_proven();

        // Another length, with a part of a block at its end. What is only reserved proves nothing,
        // and may be read again.
        for len in [17 * MIB + 9, 15 * MIB + 9, 15 * MIB + 11, 18 * MIB] {
            let outcome = sync_after(&pair, |_| file.set_len(len).unwrap());
            assert_read_at_most(&outcome, 8 * BLOCK, "another length");
        }
        pair.is_proven();
    }
}

fn fallocate(disk: &Path, args: &[&str]) {
    let args = args.iter().map(AsRef::as_ref);
    tool("fallocate", args.chain([disk.as_os_str()]));
}

#[test]
fn a_source_that_changed_in_secret_is_read_where_it_did() {
    for kind in SHARING {
        let Some(lab) = on(kind) else { return };
        let pair = kept(&lab, "disk");
        for (what, trick) in TRICKS {
            let outcome = sync_after(&pair, trick);
            assert_changed(&outcome, what);
            pair.is_proven();
        }
    }
}

/// What is at another place of the storage, or seems to be at the same one, is read.
#[test]
fn what_the_file_system_moves_or_packs_is_read() {
    let Some(lab) = on(Kind::Btrfs) else { return };
    let pair = kept(&lab, "disk");
    let outcome = sync_after(&pair, |disk| {
        tool(
            "btrfs",
            [
                "filesystem".as_ref(),
                "defragment".as_ref(),
                "-f".as_ref(),
                disk.as_os_str(),
            ],
        );
        overwrite(disk);
    });
    assert_eq!(outcome.number("blocks_changed"), 1, "{}", outcome.run);

    // Compressed extents have one address for all that is in them.
    let packed = |disk: &Path, byte: u8| {
        let file = File::options().write(true).open(disk).unwrap();
        for place in 0..32_u8 {
            let at = MIB + u64::from(place) * 70_000;
            file.write_all_at(&[byte.wrapping_add(place); 9_000], at)
                .unwrap();
            file.sync_all().unwrap();
        }
    };
    tool(
        "btrfs",
        [
            "property".as_ref(),
            "set".as_ref(),
            pair.from.as_os_str(),
            "compression".as_ref(),
            "zstd".as_ref(),
        ],
    );
    for byte in 1..4 {
        let outcome = sync_after(&pair, |disk| packed(disk, byte));
        assert!(outcome.number("blocks_changed") >= 32, "{}", outcome.run);
    }
    let outcome = sync_after(&pair, overwrite);
    assert_eq!(outcome.number("blocks_changed"), 1, "{}", outcome.run);
    assert!(read(&outcome)[0] >= 32 * BLOCK, "{}", outcome.run);
}

/// Does something to the copy that is kept of a source, which has changed.
type Trick = (&'static str, fn(copy: &Path, source: &Path));

const ON_COPIES: [Trick; 5] = [
    ("it is removed", |copy, _| fs::remove_file(copy).unwrap()),
    ("it becomes a copy of the changed source", |copy, source| {
        fs::remove_file(copy).unwrap();
        reflink(source, copy);
    }),
    (
        "all blocks of the changed source are put into it",
        |copy, source| {
            let modified = fs::metadata(copy).unwrap().modified().unwrap();
            reflink(source, copy);
            set_modified(copy, modified);
        },
    ),
    ("it is written to, and its time is set back", |copy, _| {
        let modified = fs::metadata(copy).unwrap().modified().unwrap();
        overwrite(copy);
        set_modified(copy, modified);
    }),
    ("a link has its name", |copy, source| {
        fs::remove_file(copy).unwrap();
        std::os::unix::fs::symlink(source, copy).unwrap();
    }),
];

fn reflink(from: &Path, to: &Path) {
    tool(
        "cp",
        [
            "--reflink=always".as_ref(),
            from.as_os_str(),
            to.as_os_str(),
        ],
    );
}

#[test]
fn a_copy_that_is_not_what_it_was_proves_nothing() {
    for kind in SHARING {
        let Some(lab) = on(kind) else { return };
        let pair = kept(&lab, "disk");
        for (what, trick) in ON_COPIES {
            let outcome = sync_after(&pair, |disk| {
                overwrite(disk);
                trick(&copies(&pair)[0], disk);
            });
            assert_eq!(outcome.number("blocks_changed"), 1, "{what}");
            assert_all_read(&outcome, &pair, what);
            assert_eq!(copies(&pair).len(), 1, "{what}");
            pair.is_proven();
        }
        let outcome = sync_after(&pair.with(&["--full-scan"]), overwrite);
        assert_all_read(&outcome, &pair, "--full-scan");
        assert_eq!(copies(&pair), Vec::<PathBuf>::new(), "nobody asked for one");
    }
}

/// What is not kept is said, and space that was taken is given back.
#[test]
fn a_copy_that_cannot_be_is_told_of() {
    let Some(lab) = on(Kind::Xfs) else { return };
    let pair = kept(&lab, "disk");
    let outcome = pair.with(&["--keep-sent"]).sync();
    let warnings = outcome.warnings();
    assert!(warnings.contains("no copy of"), "{warnings}");
    assert!(warnings.contains("bytes are free beside it"), "{warnings}");
    assert_eq!(copies(&pair), Vec::<PathBuf>::new());

    let outcome = pair.sync();
    assert_eq!(outcome.warnings(), "[]");
    assert_eq!(copies(&pair).len(), 1);
    let mode = fs::metadata(&copies(&pair)[0]).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);

    // Copies of several disks count together: here there is room for one.
    let free = tool(
        "stat",
        [
            "-f".as_ref(),
            "-c".as_ref(),
            "%a".as_ref(),
            pair.from.as_os_str(),
        ],
    );
    let free = free.trim().parse::<u64>().unwrap() * 4096;
    let min_free = format!(
        "--keep-sent={}",
        free - image::allocated(&pair.from) - 6 * MIB
    );
    let both = Pair::new(&lab, Journey::Direct, "another", &[]);
    let outcome = both.with(&[&min_free]).sync();
    let warnings = outcome.warnings();
    assert!(warnings.contains("more could go"), "{warnings}");

    // With the disk goes its copy, once a run looks for what is of use.
    fs::remove_file(&pair.from).unwrap();
    Pair::new(&lab, Journey::Direct, "third", &[]);
    assert_eq!(copies(&pair), Vec::<PathBuf>::new());

    let Some(lab) = on(Kind::Ext4) else { return };
    let pair = Pair::new(&lab, Journey::Direct, "disk", KEEP);
    let warnings = pair.sync().warnings();
    assert!(warnings.contains("makes no reflink copies"), "{warnings}");
    assert_eq!(copies(&pair), Vec::<PathBuf>::new());
    // Of a source that was just written to nothing is known.
    overwrite(&pair.from);
    let warnings = pair.sync().warnings();
    assert!(warnings.contains("in the last seconds"), "{warnings}");
}

#[test]
fn a_run_that_broke_off_leaves_no_further_copy_and_proves_nothing() {
    let Some(lab) = on(Kind::Xfs) else { return };
    let pair = kept(&lab, "disk");
    image::change_blocks(&pair.from, 2, 10);
    rest(&pair.from);
    pair.break_off();
    assert!(copies(&pair).len() <= 1);
    let outcome = pair.sync();
    assert_eq!(outcome.json["resumed"], true, "{}", outcome.run);
    assert_all_read(&outcome, &pair, "after a kill");
    assert_eq!(copies(&pair).len(), 1);
    let outcome = sync_after(&pair, overwrite);
    assert_eq!(read(&outcome)[0], BLOCK, "{}", outcome.run);
}
