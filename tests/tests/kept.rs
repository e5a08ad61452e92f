//! Digests that are kept from one run to the next: what did not change is not read again, and
//! nothing that did change is taken for what it was.
//!
//! Every sync here is checked against the disks: what it counts as changed is what differed before
//! it, and afterwards both are equal (`Lab::sync`).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_clone_tests::host::Host;
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::outcome::Outcome;
use kvm_clone_tests::process::{tool, wait_for};
use nix::sys::signal::Signal;

/// A source is believed to be what it was once it has been left alone for so long.
const AGE: Duration = Duration::from_secs(2);

/// A disk on hvA and its copy on hvB.
struct Pair<'a> {
    lab: &'a Lab,
    by: Journey,
    from: PathBuf,
    to: PathBuf,
    options: &'a [&'a str],
}

impl<'a> Pair<'a> {
    /// Synced once, so that both hosts keep digests.
    fn new(lab: &'a Lab, by: Journey, name: &str, options: &'a [&'a str]) -> Self {
        let directory = match lab.mounts().first() {
            Some(mount) => mount.path().to_owned(),
            None => lab.path(""),
        };
        let pair = Self {
            lab,
            by,
            from: directory.join(format!("{name}-source")),
            to: directory.join(format!("{name}-copy")),
            options,
        };
        let data = [
            Piece::Random(3, 9 * MIB),
            Piece::Hole(5 * MIB),
            Piece::Random(4, 2 * MIB + 5),
        ];
        image::write(&pair.from, &data);
        rest(&pair.from);
        lab.sync(by, &pair.from, &pair.to, &[]);
        pair
    }

    fn sync(&self) -> Outcome {
        self.lab.sync(self.by, &self.from, &self.to, self.options)
    }

    /// A sync that reads neither disk.
    fn is_proven(&self) {
        let outcome = self.sync();
        assert_eq!(read(&outcome), [0, 0], "{}", outcome.run);
        let data = [&self.from, &self.to].map(|disk| image::data_bytes(disk));
        let whole = trusted(&outcome)
            .iter()
            .zip(data)
            .all(|(bytes, data)| *bytes >= data);
        assert!(whole, "{data:?} {}", outcome.run);
    }
}

/// Bytes read from both disks.
fn read(outcome: &Outcome) -> [u64; 2] {
    ["bytes_read_source", "bytes_read_destination"].map(|field| outcome.number(field))
}

/// Bytes of both disks that were not read.
fn trusted(outcome: &Outcome) -> [u64; 2] {
    ["bytes_trusted_source", "bytes_trusted_destination"].map(|field| outcome.number(field))
}

/// Waits until a file has been left alone for long enough.
fn rest(path: &Path) {
    wait_for("an old change time", Duration::from_secs(30), || {
        let found = fs::metadata(path).unwrap();
        let changed = Duration::new(found.ctime().try_into().unwrap(), 0);
        let age = SystemTime::now()
            .duration_since(UNIX_EPOCH + changed)
            .ok()?;
        (age > AGE + Duration::from_secs(1)).then_some(())
    });
}

fn what_did_not_change_is_not_read(kind: Kind, by: Journey, options: &[&str]) {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.mount(kind, 400 * MIB).start();
    let pair = Pair::new(&lab, by, "disk", options);
    pair.is_proven();

    // The source is read again, since nothing tells which of its blocks changed; what the
    // destination became by that is known.
    image::change_blocks(&pair.from, 20, 8);
    rest(&pair.from);
    let outcome = pair.sync();
    assert!(
        read(&outcome)[0] >= image::data_bytes(&pair.from),
        "{}",
        outcome.run
    );
    assert_eq!(read(&outcome)[1], 0, "{}", outcome.run);
    assert_eq!(trusted(&outcome)[0], 0, "{}", outcome.run);
    pair.is_proven();

    // Zeros where there was data, data where there was a hole, another length.
    let file = File::options().write(true).open(&pair.from).unwrap();
    file.write_all_at(&vec![0; 3 * 65_536], BLOCK * 7).unwrap();
    file.write_all_at(&[7; 100], 10 * MIB).unwrap();
    file.set_len(15 * MIB + 9).unwrap();
    drop(file);
    rest(&pair.from);
    let outcome = pair.sync();
    // Of another length only the short block at the end.
    assert_eq!(read(&outcome)[1], 9, "{}", outcome.run);
    let outcome = pair.sync();
    assert_eq!(read(&outcome), [0, 0], "{}", outcome.run);
}

#[test]
fn what_did_not_change_is_not_read_when_it_is_staged() {
    what_did_not_change_is_not_read(Kind::Ext4, Journey::Direct, &["--apply", "staged"]);
}

#[test]
fn what_did_not_change_is_not_read_when_it_is_reflinked() {
    what_did_not_change_is_not_read(Kind::Xfs, Journey::Relay, &["--apply", "reflink"]);
}

#[test]
fn what_did_not_change_is_not_read_when_it_is_written_in_place() {
    what_did_not_change_is_not_read(Kind::Btrfs, Journey::Direct, &["--apply", "inplace"]);
}

/// Changes a block of a disk in a way that is not seen by size and time of modification.
type Trick = (&'static str, fn(&Path));

/// Changes a byte in the middle of a file.
fn overwrite(path: &Path) {
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

fn set_modified(path: &Path, modified: SystemTime) {
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

const TRICKS: [Trick; 6] = [
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

#[test]
fn a_source_that_changed_in_secret_is_read() {
    let Some(lab) = Lab::start() else { return };
    let pair = Pair::new(&lab, Journey::Direct, "disk", &[]);
    for (what, trick) in TRICKS {
        pair.is_proven();
        trick(&pair.from);
        let outcome = pair.sync();
        assert!(
            outcome.number("blocks_changed") > 0,
            "{what}: {}",
            outcome.run
        );
        rest(&pair.from);
        pair.sync();
    }
}

#[test]
fn a_destination_that_changed_in_secret_is_read() {
    let Some(lab) = Lab::start() else { return };
    let pair = Pair::new(&lab, Journey::Relay, "disk", &[]);
    for (what, trick) in TRICKS {
        pair.is_proven();
        trick(&pair.to);
        let outcome = pair.sync();
        assert!(
            outcome.number("blocks_changed") > 0,
            "{what}: {}",
            outcome.run
        );
    }
}

#[test]
fn a_full_scan_believes_nothing() {
    let Some(lab) = Lab::start() else { return };
    let pair = Pair::new(&lab, Journey::Direct, "disk", &[]);
    let full = Pair {
        options: &["--full-scan"],
        from: pair.from.clone(),
        to: pair.to.clone(),
        ..pair
    };
    let data = image::data_bytes(&full.from);
    let outcome = full.sync();
    let whole = read(&outcome).map(|bytes| bytes >= data);
    assert_eq!(whole, [true, true], "{}", outcome.run);
    assert_eq!(trusted(&outcome), [0, 0], "{}", outcome.run);
    // What it found is kept in turn.
    pair.is_proven();
}

/// The one file of digests on a host.
fn digests(host: &Host) -> PathBuf {
    let directory = fs::read_dir(host.state().join("digests")).unwrap();
    let mut files: Vec<_> = directory.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

#[test]
fn digests_that_are_damaged_are_not_believed() {
    let Some(lab) = Lab::start() else { return };
    let pair = Pair::new(&lab, Journey::Direct, "disk", &[]);
    let other = {
        let Some(other) = Lab::start() else { return };
        Pair::new(&other, Journey::Direct, "other", &[]);
        fs::read(digests(&other.b)).unwrap()
    };
    for host in [&lab.a, &lab.b] {
        pair.is_proven();
        let path = digests(host);
        let whole = fs::read(&path).unwrap();
        let mut records = whole.clone();
        for place in (32_768..records.len()).step_by(528) {
            records[place + 40] ^= 1;
        }
        let mut header = whole.clone();
        header[30] ^= 1;
        header[16_384 + 30] ^= 1;
        let damaged = [
            records,
            header,
            whole[..whole.len() / 2].to_vec(),
            whole[..100].to_vec(),
            other.clone(),
            Vec::new(),
        ];
        for bytes in damaged {
            fs::write(&path, &bytes).unwrap();
            let outcome = pair.sync();
            let (read, trusted) = (read(&outcome), trusted(&outcome));
            let place = usize::from(host.name() == "hvB");
            assert!(read[place] > 0, "{} bytes: {}", bytes.len(), outcome.run);
            let data = image::data_bytes(&pair.from);
            assert!(read[place] + trusted[place] >= data, "{}", outcome.run);
            // Some of them were of the pair that the destination's host remembered.
            pair.sync();
        }
    }
}

/// What a run that broke off had noted is not taken for what the disks hold.
#[test]
fn a_run_that_broke_off_leaves_no_digests() {
    let Some(lab) = Lab::start() else { return };
    let pair = Pair::new(&lab, Journey::Direct, "disk", &[]);
    for turn in 0..3 {
        pair.is_proven();
        image::change_blocks(&pair.from, 2, 10 + turn);
        rest(&pair.from);
        let options = ["--bandwidth-limit", "1M"];
        let running = lab.start_disk("sync", pair.by, &pair.from, &pair.to, &options);
        wait_for("a part of the run", Duration::from_secs(30), || {
            (running.elapsed() > Duration::from_secs(2)).then_some(())
        });
        running.signal(Signal::SIGKILL);
        assert!(running.wait().code() != Some(0));
        lab.wait_until_quiet();
        let outcome = pair.sync();
        assert_eq!(outcome.json["resumed"], true, "{}", outcome.run);
        pair.is_proven();
    }
}
