//! Disks that are told by their stamps.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use kvm_clone_tests::host::Host;
use kvm_clone_tests::image::{self, BLOCK, MIB};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;

use crate::pair::{Pair, assert_changed, read, rest, trusted};
use crate::tricks::TRICKS;

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

#[test]
fn a_source_that_changed_in_secret_is_read() {
    let Some(lab) = Lab::start() else { return };
    let pair = Pair::new(&lab, Journey::Direct, "disk", &[]);
    for (what, trick) in TRICKS {
        pair.is_proven();
        trick(&pair.from);
        let outcome = pair.sync();
        assert_changed(&outcome, what);
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
        assert_changed(&outcome, what);
    }
}

#[test]
fn a_full_scan_believes_nothing() {
    let Some(lab) = Lab::start() else { return };
    let pair = Pair::new(&lab, Journey::Direct, "disk", &[]);
    let full = pair.with(&["--full-scan"]);
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
        pair.break_off();
        let outcome = pair.sync();
        assert_eq!(outcome.json["resumed"], true, "{}", outcome.run);
        pair.is_proven();
    }
}
