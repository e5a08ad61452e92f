//! Block devices, as source and as destination.

use Piece::{Hole, Random};
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::process::tool;

/// As much of an image as a test of a device takes.
fn disk() -> Vec<Piece> {
    vec![
        Random(1, 5 * MIB),
        Hole(6 * MIB),
        Random(2, MIB - 512),
        Hole(512),
    ]
}

const SIZE: u64 = 12 * MIB;

#[test]
fn a_device_becomes_a_sparse_file() {
    let Some(lab) = Lab::start() else { return };
    let device = lab.device("backing", SIZE);
    image::overwrite(device.path(), &disk());
    for by in [Journey::Direct, Journey::Relay, Journey::Local] {
        let copy = lab.path(format!("copy-{by:?}"));
        lab.sync(by, device.path(), &copy, &[]);
        image::assert_equal(device.path(), &copy);
        let (taken, needed) = (image::allocated(&copy), image::nonzero_bytes(device.path()));
        assert!(
            taken <= needed + needed / 100 + BLOCK,
            "{taken} bytes for {needed}"
        );
        lab.sync(by, device.path(), &copy, &[])
            .assert_only_digests(device.path());
    }
}

#[test]
fn a_file_fills_a_device_of_its_size() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    image::write(&source, &disk());
    for by in [Journey::Direct, Journey::Relay, Journey::Local] {
        let device = lab.device(&format!("backing-{by:?}"), SIZE);
        // A device is never assumed to hold zeros.
        image::overwrite(device.path(), &[Random(77, SIZE)]);
        let outcome = lab.sync(by, &source, device.path(), &[]);
        assert_eq!(outcome.warnings(), "[]");
        image::assert_equal(&source, device.path());
        lab.sync(by, &source, device.path(), &[])
            .assert_only_digests(&source);
        // Zeros are punched, and the loop device gives what is punched back to its file.
        let (taken, needed) = (
            image::allocated(device.backing()),
            image::nonzero_bytes(&source),
        );
        assert!(
            taken <= needed + needed / 100 + BLOCK,
            "{taken} bytes for {needed}"
        );
    }
}

#[test]
fn a_device_fills_another_device() {
    let Some(lab) = Lab::start() else { return };
    let [from, to] = ["from", "to"].map(|name| lab.device(name, SIZE));
    image::overwrite(from.path(), &disk());
    lab.sync(Journey::Relay, from.path(), to.path(), &[]);
    image::assert_equal(from.path(), to.path());
}

#[test]
fn a_larger_device_keeps_its_tail_and_the_result_warns() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    // The end of the source is in the middle of a block, the rest of which is the device's own.
    let size = 3 * MIB + 4096 + 512;
    image::write(&source, &[Random(1, size)]);
    let device = lab.device("backing", SIZE);
    let before = lab.path("before");
    image::overwrite(device.path(), &[Random(9, SIZE)]);
    image::write(&before, &[Random(9, SIZE)]);
    let outcome = lab.sync(Journey::Direct, &source, device.path(), &[]);
    assert!(outcome.warnings().contains("larger"), "{}", outcome.run);
    let tail = |path| {
        std::fs::read(path)
            .unwrap()
            .split_off(usize::try_from(size).unwrap())
    };
    assert!(
        tail(device.path()) == tail(&before),
        "the device's tail was written"
    );
    lab.sync(Journey::Direct, &source, device.path(), &[])
        .assert_only_digests(&source);
}

#[test]
fn a_device_that_is_too_small_is_refused_untouched() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    image::write(&source, &[Random(1, 2 * MIB + 1)]);
    let device = lab.device("backing", 2 * MIB);
    let before = lab.path("before");
    image::overwrite(device.path(), &[Random(9, 2 * MIB)]);
    image::write(&before, &[Random(9, 2 * MIB)]);
    for by in [Journey::Direct, Journey::Relay, Journey::Local] {
        let run = lab.disk("sync", by, &source, device.path(), &[]);
        run.expect_failure(8, &["no_space"], device.path().to_str().unwrap());
        image::assert_equal(&before, device.path());
    }
}

#[test]
fn a_mounted_device_is_refused_as_destination() {
    let Some(lab) = Lab::start() else { return };
    let device = lab.device("backing", 16 * MIB);
    tool("mkfs.ext4", ["-q".as_ref(), device.path().as_os_str()]);
    let directory = lab.path("mounted");
    std::fs::create_dir(&directory).unwrap();
    let _mounted = Mounted::new(device.path(), &directory);
    let source = lab.path("source");
    image::write(&source, &[Random(1, MIB)]);
    let run = lab.disk("sync", Journey::Local, &source, device.path(), &[]);
    run.expect_failure(5, &["busy", "refused"], device.path().to_str().unwrap());
}

/// A device that is mounted until the end of the test.
struct Mounted<'a>(&'a std::path::Path);

impl<'a> Mounted<'a> {
    fn new(device: &std::path::Path, directory: &'a std::path::Path) -> Self {
        tool("mount", [device, directory]);
        Self(directory)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        kvm_clone_tests::mount::tear_down("umount", &[self.0]);
    }
}
