//! Names that a shell, an ssh or a terminal would like to take for something else.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use kvm_clone_tests::image::{self, BLOCK, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;

const NAMES: [&[u8]; 16] = [
    b"two words",
    b"  spaces around  ",
    b"it's",
    b"double \"quotes\"",
    b"both '\" of them",
    b"two\nlines",
    b"\n",
    b"$(touch injected)",
    b"`touch injected`",
    b"; touch injected; #",
    b"${HOME} $HOME ~ * ? [a]",
    b"-leading-dash",
    b"--help",
    b"back\\slash\\",
    b"co:lon@and {known_hosts} %h",
    b"not \xff\xfe utf-8 \x80",
];

fn every_name_is_taken_as_it_is(by: Journey) {
    let Some(lab) = Lab::start() else { return };
    for (seed, name) in (0..).zip(NAMES) {
        let directory = lab.path("disks");
        std::fs::create_dir(&directory).unwrap();
        let inner = directory.join(OsStr::from_bytes(name));
        std::fs::create_dir(&inner).unwrap();
        let source = inner.join(OsStr::from_bytes(name));
        let copy = inner.join(with_suffix(name));
        image::write(&source, &[Piece::Random(seed, 2 * BLOCK + 1)]);

        lab.sync(by, &source, &copy, &[]);
        lab.sync(by, &source, &copy, &[])
            .assert_only_digests(&source);
        assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 2, "{inner:?}");
        assert_eq!(
            std::fs::read_dir(&directory).unwrap().count(),
            1,
            "{inner:?}"
        );
        std::fs::remove_dir_all(&directory).unwrap();
    }
    for home in [lab.a.home(), lab.b.home(), lab.controller.home().to_owned()] {
        assert!(
            !home.join("injected").exists(),
            "a name was executed in {}",
            home.display()
        );
    }
    assert!(!Path::new("injected").exists());
}

fn with_suffix(name: &[u8]) -> OsString {
    let mut copy = OsStr::from_bytes(name).to_owned();
    copy.push(" copy");
    copy
}

#[test]
fn every_name_is_taken_as_it_is_directly() {
    every_name_is_taken_as_it_is(Journey::Direct);
}

#[test]
fn every_name_is_taken_as_it_is_by_relay() {
    every_name_is_taken_as_it_is(Journey::Relay);
}

#[test]
fn every_name_is_taken_as_it_is_locally() {
    every_name_is_taken_as_it_is(Journey::Local);
}

#[test]
fn a_name_as_long_as_the_file_system_allows_can_be_a_destination() {
    let Some(lab) = Lab::start() else { return };
    // A temporary name made by adding to the name would be too long.
    let (source, copy) = (lab.path("s".repeat(255)), lab.path("d".repeat(255)));
    image::write(&source, &[Piece::Random(1, BLOCK)]);
    lab.sync(Journey::Relay, &source, &copy, &[]);
}

#[test]
fn a_symbolic_link_is_followed_on_both_sides() {
    let Some(lab) = Lab::start() else { return };
    let [source, copy] = ["source", "copy"].map(|name| lab.path(name));
    image::write(&source, &[Piece::Random(1, BLOCK)]);
    image::write(&copy, &[Piece::Random(2, BLOCK)]);
    let [from, to] = ["from", "to"].map(|name| lab.path(name));
    std::os::unix::fs::symlink(&source, &from).unwrap();
    std::os::unix::fs::symlink(&copy, &to).unwrap();

    lab.sync(Journey::Direct, &from, &to, &[]);
    assert!(std::fs::symlink_metadata(&to).unwrap().is_symlink());
    image::assert_equal(&source, &copy);
}
