//! Options of a transfer, and the demo.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::time::Duration;

use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;

/// A disk whose blocks are not zero and give way to compression: one byte in every page.
fn compressible() -> Vec<Piece> {
    (0..2048)
        .flat_map(|_| [Piece::Byte(7), Piece::Zeros(4095)])
        .collect()
}

#[test]
fn blake3_in_place_of_xxh3_finds_the_same_differences() {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 5 * MIB + 3), Piece::Hole(MIB)]);
    image::write(
        &copy,
        &[Piece::Random(1, 4 * MIB), Piece::Random(2, 2 * MIB)],
    );
    for by in [Journey::Direct, Journey::Relay] {
        lab.sync(by, &source, &copy, &["--hash", "blake3"]);
        lab.sync(by, &source, &copy, &["--hash", "blake3"])
            .assert_only_digests(&source);
        lab.sync(by, &source, &copy, &["--hash", "xxh3"])
            .assert_only_digests(&source);
        image::change_blocks(&source, 10, 3);
    }
}

#[test]
fn compression_saves_bytes_on_the_wire_and_off_saves_none() {
    let Some(lab) = Lab::start() else { return };
    let source = lab.path("source");
    image::write(&source, &compressible());
    let wire = |compress: &str| {
        let copy = lab.path(format!("copy-{compress}"));
        let options = ["--compress", compress];
        lab.sync(Journey::Relay, &source, &copy, &options)
            .number("bytes_wire")
    };
    let size = image::length(&source);
    assert!(wire("off") >= size);
    assert!(wire("3") < size / 10);
    assert!(wire("19") < size / 10);
    wire("auto");
}

#[test]
fn data_that_does_not_compress_costs_no_more_for_trying() {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 8 * MIB)]);
    let outcome = lab.sync(Journey::Relay, &source, &copy, &["--compress", "3"]);
    assert!(
        outcome.number("bytes_wire") <= 8 * MIB + 128 * (BLOCK / 1024),
        "{}",
        outcome.run
    );
}

#[test]
fn results_come_as_yaml_and_as_text_too() {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 2 * BLOCK)]);
    let run = |format: &str| {
        let disks = [source.to_str().unwrap(), copy.to_str().unwrap()];
        let run = lab
            .controller
            .run_plain(["-o", format, "disk", "sync", disks[0], disks[1]]);
        run.expect_code(0).text()
    };
    let yaml = run("yaml");
    for line in [
        "operation: disk-sync",
        "success: true",
        "blocks_total: 2",
        "blocks_changed: 2",
    ] {
        assert!(
            yaml.lines().any(|found| found == line),
            "no line {line:?} in {yaml}"
        );
    }
    let text = run("text");
    assert!(
        serde_json::from_str::<serde_json::Value>(&text).is_err(),
        "{text}"
    );
    assert!(
        !text.contains('\u{1b}'),
        "colours without a terminal: {text:?}"
    );
}

#[test]
fn a_result_is_all_that_standard_output_holds() {
    let Some(lab) = Lab::start() else { return };
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 2 * BLOCK)]);
    // `json()` fails on anything beside the one object.
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &["-v", "-v"]);
    assert!(run.expect_json().is_object());
    let quiet = lab.disk("sync", Journey::Relay, &source, &copy, &["-q"]);
    assert!(quiet.expect_json().is_object());
    assert_eq!(quiet.stderr, "", "{quiet}");
}

#[test]
fn the_demo_shows_itself_in_time_and_leaves_nothing() {
    let Some(lab) = Lab::start() else { return };
    let before = entries(&lab);
    let config = lab.controller.ssh_config().to_str().unwrap().to_owned();
    for host in [&[][..], &["--host", "hvA"]] {
        let run = lab
            .controller
            .run_plain(["-F", &config, "demo"].iter().chain(host));
        run.expect_code(0);
        assert!(run.elapsed < Duration::from_secs(20), "{run}");
        assert!(!run.stdout.is_empty());
    }
    assert_eq!(entries(&lab), before);
    lab.wait_until_quiet();
}

/// What a demo could have left: everything in the homes and temporary directories but the agents'
/// cache, ssh's own files and the runs' output.
fn entries(lab: &Lab) -> Vec<String> {
    let places = [
        "controller",
        "hvA/root",
        "hvA/tmp",
        "hvA/var-tmp",
        "hvA/shm",
    ];
    let mut found = Vec::new();
    for place in places {
        for entry in fs::read_dir(lab.path(place)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let expected = [".cache", ".config", ".local", ".ssh"].contains(&name.as_str());
            found.extend((!expected).then(|| format!("{place}/{name}")));
        }
    }
    found.sort();
    found
}

#[test]
fn the_doctor_finds_a_good_host_well_and_a_bad_one_ill() {
    let Some(lab) = Lab::start() else { return };
    let run = lab.controller.run(["doctor", "hvA"]);
    run.expect_code(0);
    assert!(run.text().contains("hvA"), "{run}");

    let known = lab.controller.home().join(".ssh/known_hosts");
    fs::write(&known, lab.a.known_hosts_line()).unwrap();
    let run = lab.controller.run(["doctor", "hvA", "hvB"]);
    assert_ne!(run.code(), Some(0), "{run}");
    assert!(
        run.text().contains("hvB") && run.text().contains("key"),
        "{run}"
    );
}
