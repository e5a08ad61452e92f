//! Every shape of image, to a destination that does not exist, and then again.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use Piece::{Byte, Hole, Random, Zeros};
use kvm_clone_tests::image::{self, BLOCK, GIB, KIB, MIB, PAGE, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::outcome::assert_sparse;

/// Disks as they are, and the sizes and zeros at which off-by-ones live.
fn shapes() -> Vec<(&'static str, Vec<Piece>)> {
    let pages = (0..512)
        .flat_map(|i| [Random(100 + i, PAGE), Zeros(PAGE)])
        .collect();
    let mixed = (0..40)
        .flat_map(|i| {
            [
                Random(i, 3 * KIB + i * 7919),
                Zeros(i * 5003),
                Hole(i * 13 * KIB),
            ]
        })
        .collect();
    vec![
        ("empty", vec![]),
        ("one-byte", vec![Byte(1)]),
        ("one-zero-byte", vec![Zeros(1)]),
        ("65535", vec![Random(1, 65535)]),
        ("65536", vec![Random(2, 65536)]),
        ("65537", vec![Random(3, 65537)]),
        ("zero-tail", vec![Random(4, BLOCK), Zeros(1)]),
        ("all-zero", vec![Zeros(8 * MIB)]),
        ("all-hole", vec![Hole(64 * MIB + 1)]),
        (
            "sparse",
            vec![
                Hole(8 * MIB),
                Random(5, MIB),
                Hole(16 * MIB),
                Random(6, BLOCK),
                Hole(5),
            ],
        ),
        ("dense", vec![Random(7, 48 * MIB)]),
        ("mixed", mixed),
        (
            "gibibyte-and-3",
            vec![
                Random(8, BLOCK),
                Hole(GIB - 2 * BLOCK),
                Random(9, BLOCK + 3),
            ],
        ),
        ("zero-pages", pages),
        (
            "last-byte",
            vec![
                Zeros(BLOCK - 1),
                Byte(1),
                Hole(BLOCK),
                Zeros(BLOCK - 1),
                Byte(255),
            ],
        ),
    ]
}

/// Copies every image and syncs it again, and checks what both runs say and leave.
fn every_image_arrives_and_is_then_only_compared(by: Journey) {
    let Some(lab) = Lab::start() else { return };
    for (name, pieces) in shapes() {
        let [source, copy] = ["source", "copy"].map(|kind| lab.path(format!("{name}.{kind}")));
        image::write(&source, &pieces);

        let first = lab.sync(by, &source, &copy, &[]);
        assert_eq!(first.json["resumed"], false, "{}", first.run);
        assert_sparse(&source, &copy);

        let second = lab.sync(by, &source, &copy, &[]);
        second.assert_only_digests(&source);
        assert_sparse(&source, &copy);
        for path in [source, copy] {
            std::fs::remove_file(path).unwrap();
        }
    }
    assert_eq!(leftovers(&lab), Vec::<PathBuf>::new());
    lab.wait_until_quiet();
}

/// What lies in the laboratory's directory besides its own directories.
fn leftovers(lab: &Lab) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(lab.path("")).unwrap();
    entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.is_dir())
        .collect()
}

#[test]
fn every_image_arrives_directly() {
    every_image_arrives_and_is_then_only_compared(Journey::Direct);
}

#[test]
fn every_image_arrives_by_relay() {
    every_image_arrives_and_is_then_only_compared(Journey::Relay);
}

#[test]
fn every_image_arrives_from_this_machine() {
    every_image_arrives_and_is_then_only_compared(Journey::Push);
}

#[test]
fn every_image_arrives_on_this_machine() {
    every_image_arrives_and_is_then_only_compared(Journey::Pull);
}

#[test]
fn every_image_arrives_within_this_machine() {
    every_image_arrives_and_is_then_only_compared(Journey::Local);
}

#[test]
fn without_a_route_two_hosts_talk_directly_where_they_can_and_through_the_controller_else() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    image::write(&source, &[Random(1, 40 * BLOCK)]);
    let route = |name: &str, options: &[&str]| {
        let args = ["disk", "sync"].iter().chain(options).map(Into::into);
        let from = Journey::Direct.source(&source);
        let to = Journey::Direct.destination(&lab.path(name));
        let run = lab.controller.run(args.chain([from, to]));
        let result = run.expect_json();
        image::assert_equal(&source, &lab.path(name));
        result["route"].as_str().map(str::to_owned)
    };
    assert_eq!(route("first", &[]).as_deref(), Some("direct"));

    // Without its key hvA cannot log in to hvB.
    std::fs::remove_file(lab.a.home().join(".ssh/id_ed25519")).unwrap();
    assert_eq!(route("second", &[]).as_deref(), Some("relay"));
    // Then an existing disk has been looked at already.
    let several = ["--streams", "3", "--full-scan"];
    for name in ["first", "second"] {
        image::change_blocks(&source, 2, 9);
        assert_eq!(route(name, &several).as_deref(), Some("relay"));
    }
}

#[test]
fn one_percent_changed_of_two_gibibytes_costs_little_more_than_the_changed_blocks() {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Random(1, 2 * GIB)]);
    image::write(&copy, &[Random(1, 2 * GIB)]);
    let changed = image::change_blocks(&source, 100, 5);

    let outcome = lab.sync(Journey::Direct, &source, &copy, &[]);
    assert_eq!(outcome.number("bytes_changed"), changed);
    let bound = changed + changed / 5 + 2 * MIB;
    assert!(
        outcome.number("bytes_wire") <= bound,
        "bytes_wire above {bound} in {}",
        outcome.run
    );
    // Less would mean that changed blocks, which do not compress, did not travel.
    assert!(outcome.number("bytes_wire") >= changed, "{}", outcome.run);
}

#[test]
fn zeros_become_holes_even_within_a_block_that_is_written() {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    let block = |i| {
        [
            Zeros(5 * PAGE),
            Random(i, PAGE),
            Zeros(9 * PAGE),
            Random(50 + i, PAGE),
        ]
    };
    image::write(&source, &(0..64).flat_map(block).collect::<Vec<_>>());
    assert!(image::allocated(&source) >= 64 * BLOCK);

    // Data everywhere at the destination, so that every hole has to be punched.
    image::write(&copy, &[Random(999, 64 * BLOCK)]);
    lab.sync(Journey::Relay, &source, &copy, &[]);
    assert_sparse(&source, &copy);
}
