//! A disk and its copy, synced again and again.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::outcome::Outcome;
use kvm_clone_tests::process::wait_for;
use nix::sys::signal::Signal;

/// A source is believed to be what it was once it has been left alone for so long.
const AGE: Duration = Duration::from_secs(2);

/// A disk on hvA and its copy on hvB.
pub(crate) struct Pair<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) by: Journey,
    pub(crate) from: PathBuf,
    pub(crate) to: PathBuf,
    pub(crate) options: &'a [&'a str],
}

impl<'a> Pair<'a> {
    /// Synced once, so that both hosts keep digests.
    pub(crate) fn new(lab: &'a Lab, by: Journey, name: &str, options: &'a [&'a str]) -> Self {
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

    /// The same with other options.
    pub(crate) fn with<'b>(&'b self, options: &'b [&'b str]) -> Pair<'b> {
        let (from, to) = (self.from.clone(), self.to.clone());
        Pair {
            options,
            from,
            to,
            ..*self
        }
    }

    /// A sync that leaves neither disk in the page cache: what is only reserved is data to XFS where
    /// a read ahead has brought it there, so that the next run would read it.
    pub(crate) fn sync(&self) -> Outcome {
        let outcome = self.lab.sync(self.by, &self.from, &self.to, self.options);
        image::evict(&self.from);
        image::evict(&self.to);
        outcome
    }

    /// A sync that is killed when a part of it has been done.
    pub(crate) fn break_off(&self) {
        let slow = [self.options, &["--bandwidth-limit", "1M"]].concat();
        let running = self
            .lab
            .start_disk("sync", self.by, &self.from, &self.to, &slow);
        let mut begun = None;
        wait_for("a part of the run", Duration::from_secs(60), || {
            if begun.is_none() && self.is_changing() {
                begun = Some(running.elapsed());
            }
            begun.filter(|begun| running.elapsed() > *begun + Duration::from_secs(2))
        });
        running.signal(Signal::SIGKILL);
        assert!(running.wait().code() != Some(0));
        self.lab.wait_until_quiet();
    }

    /// Whether something lies beside the destination that changes go into.
    fn is_changing(&self) -> bool {
        let name = self.to.file_name().expect("a disk has a name");
        let start = format!(".{}.kc-", name.to_string_lossy());
        let entries = fs::read_dir(self.to.parent().expect("it is in a directory"));
        let names = entries.expect("that can be read").flatten();
        names
            .map(|entry| entry.file_name())
            .any(|name| name.to_string_lossy().starts_with(&start))
    }

    /// A sync that reads neither disk.
    pub(crate) fn is_proven(&self) {
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
pub(crate) fn read(outcome: &Outcome) -> [u64; 2] {
    ["bytes_read_source", "bytes_read_destination"].map(|field| outcome.number(field))
}

/// Bytes of both disks that were not read.
pub(crate) fn trusted(outcome: &Outcome) -> [u64; 2] {
    ["bytes_trusted_source", "bytes_trusted_destination"].map(|field| outcome.number(field))
}

/// Waits until a file has been left alone for long enough.
pub(crate) fn rest(path: &Path) {
    wait_for("an old change time", Duration::from_secs(30), || {
        let found = fs::metadata(path).unwrap();
        let changed = Duration::new(found.ctime().try_into().unwrap(), 0);
        let age = SystemTime::now()
            .duration_since(UNIX_EPOCH + changed)
            .ok()?;
        (age > AGE + Duration::from_secs(1)).then_some(())
    });
}

/// Claims that a change was seen.
pub(crate) fn assert_changed(outcome: &Outcome, what: &str) {
    let changed = outcome.number("blocks_changed");
    assert!(changed > 0, "{what}: {}", outcome.run);
}
