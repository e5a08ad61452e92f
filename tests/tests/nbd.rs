//! What NBD servers export, as source and as destination: by `qemu-nbd`, and by `nbdkit` for what
//! QEMU does not do on demand.

use std::fs;
use std::path::Path;
use std::time::Duration;

use Piece::{Hole, Random};
use kvm_clone_tests::controller::Run;
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::nbd::NbdServer;
use kvm_clone_tests::process::{tool, wait_for};

/// A disk with holes, of which one begins and one ends inside of a block.
fn disk() -> Vec<Piece> {
    vec![
        Random(1, 5 * MIB + 4096),
        Hole(6 * MIB),
        Random(2, MIB - 8192),
        Hole(20 * MIB + 4096),
    ]
}

const SIZE: u64 = 32 * MIB;

fn convert(from: (&str, &Path), to: (&str, &Path)) {
    let words = ["convert", "-q", "-f", from.0, "-O", to.0];
    let paths = [from.1.as_os_str(), to.1.as_os_str()];
    tool("qemu-img", words.iter().map(AsRef::as_ref).chain(paths));
}

fn sync(lab: &Lab, from: &str, to: &str, options: &[&str]) -> Run {
    let words = ["disk", "sync", from, to];
    lab.controller.run(words.iter().chain(options))
}

fn at(host: &str, path: &Path) -> String {
    format!("{host}:{}", path.display())
}

#[test]
fn the_contents_of_a_qcow2_become_a_sparse_raw_disk_and_later_only_what_changed() {
    let Some(lab) = Lab::start() else { return };
    let (raw, qcow2) = (lab.path("raw"), lab.path("disk.qcow2"));
    image::write(&raw, &disk());
    convert(("raw", &raw), ("qcow2", &qcow2));
    let socket = lab.path("nbd.sock");
    for (route, host) in [("direct", "hvA:"), ("relay", "hvA:"), ("auto", "")] {
        let server = NbdServer::qemu(&socket, "qcow2", &qcow2, &["--read-only"]);
        let from = format!("{host}{}", server.uri("vda"));
        let copy = lab.path(format!("copy-{route}"));
        let to = match host {
            "" => copy.display().to_string(),
            _ => at("hvB", &copy),
        };
        let run = sync(&lab, &from, &to, &["--route", route]);
        let result = run.expect_json();
        image::assert_equal(&raw, &copy);
        let needed = image::nonzero_bytes(&raw);
        let taken = image::allocated(&copy);
        assert!(
            taken <= needed + needed / 100 + BLOCK,
            "{taken} for {needed}"
        );
        // Holes are not read.
        let read = result["bytes_read_source"].as_u64().unwrap();
        assert!(read <= needed + 2 * BLOCK, "{read} for {needed} in {run}");
        assert_eq!(result["source"], from);

        let again = sync(&lab, &from, &to, &["--route", route]).expect_json();
        assert_eq!(again["blocks_changed"], 0);
        drop(server);
        tool(
            "qemu-io",
            [
                "-f",
                "qcow2",
                "-c",
                "write -P 7 1M 64k",
                "-c",
                "discard 2M 1M",
            ]
            .map(AsRef::as_ref)
            .into_iter()
            .chain([qcow2.as_os_str()]),
        );
        convert(("qcow2", &qcow2), ("raw", &raw));
        let server = NbdServer::qemu(&socket, "qcow2", &qcow2, &["--read-only"]);
        let run = sync(&lab, &from, &to, &["--route", route]);
        let result = run.expect_json();
        image::assert_equal(&raw, &copy);
        let changed = [&result["blocks_changed"], &result["blocks_zeroed"]];
        assert!(
            changed.map(|n| n.as_u64().unwrap()).iter().sum::<u64>() <= 17,
            "{run}"
        );
        drop(server);
    }
    lab.wait_until_quiet();
}

#[test]
fn a_disk_becomes_the_contents_of_a_qcow2_and_what_is_equal_is_not_written() {
    let Some(lab) = Lab::start() else { return };
    let (raw, qcow2) = (lab.path("raw"), lab.path("disk.qcow2"));
    image::write(&raw, &disk());
    let size = SIZE.to_string();
    let create = ["create", "-q", "-f", "qcow2"].map(AsRef::as_ref);
    tool(
        "qemu-img",
        create.into_iter().chain([qcow2.as_os_str(), size.as_ref()]),
    );
    let socket = lab.path("nbd.sock");
    let server = NbdServer::qemu(&socket, "qcow2", &qcow2, &[]);
    let (from, to) = (at("hvA", &raw), format!("hvB:{}", server.uri("vda")));
    let run = sync(&lab, &from, &to, &[]);
    let result = run.expect_json();
    assert_eq!(result["apply"], "inplace");
    assert!(result["warnings"].to_string().contains("torn"), "{run}");
    let equal = lab.controller.run(["disk", "verify", &from, &to]);
    equal.expect_code(0);
    let taken = image::allocated(&qcow2);
    let needed = image::nonzero_bytes(&raw);
    assert!(taken <= needed + MIB, "{taken} for {needed}");

    // Data, and a block that becomes zeros.
    let other = image::change_blocks(&raw, 40, 5);
    let punch = ["--punch-hole", "--offset", "1048576", "--length", "65536"].map(AsRef::as_ref);
    tool("fallocate", punch.into_iter().chain([raw.as_os_str()]));
    let run = sync(&lab, &from, &to, &["--route", "relay"]);
    let result = run.expect_json();
    let blocks = [&result["blocks_changed"], &result["blocks_zeroed"]];
    let blocks: u64 = blocks.map(|count| count.as_u64().unwrap()).iter().sum();
    assert!((1..=other + 1).contains(&blocks), "{run}");
    assert_eq!(
        sync(&lab, &from, &to, &[]).expect_json()["blocks_changed"],
        0
    );
    server.stop();
    let compare = ["compare", "-f", "raw", "-F", "qcow2"].map(AsRef::as_ref);
    tool(
        "qemu-img",
        compare
            .into_iter()
            .chain([raw.as_os_str(), qcow2.as_os_str()]),
    );
    tool(
        "qemu-img",
        ["check".as_ref(), "-q".as_ref(), qcow2.as_os_str()],
    );
}

#[test]
fn servers_that_can_less_are_read_all_the_same() {
    let Some(lab) = Lab::start() else { return };
    let raw = lab.path("raw");
    image::write(&raw, &disk());
    let socket = lab.path("nbd.sock");
    let file = format!("file={}", raw.display());
    let servers: [&[&str]; 4] = [
        // Simple replies, and so no holes.
        &["--no-sr", "file", &file],
        // One connection at a time.
        &[
            "--filter=multi-conn",
            "file",
            &file,
            "multi-conn-mode=disable",
        ],
        // Answers in whichever order, and late.
        &["--filter=delay", "file", &file, "rdelay=3ms"],
        &["--filter=nozero", "--filter=noextents", "file", &file],
    ];
    for words in servers {
        let Some(server) = NbdServer::nbdkit(&socket, words) else {
            return;
        };
        let copy = lab.path("copy");
        let from = format!("hvA:{}", server.uri(""));
        sync(&lab, &from, &at("hvB", &copy), &[]).expect_code(0);
        image::assert_equal(&raw, &copy);
        fs::remove_file(&copy).unwrap();
        drop(server);
        // And written: over other data, with zeros that must be sent.
        let (target, written) = (lab.path("target"), lab.path("written"));
        image::write(&target, &[Random(9, SIZE)]);
        let words: Vec<String> = words
            .iter()
            .map(|word| word.replace(&file, &format!("file={}", target.display())))
            .collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let Some(server) = NbdServer::nbdkit(&socket, &words) else {
            return;
        };
        let to = format!("hvB:{}", server.uri(""));
        sync(&lab, &at("hvA", &raw), &to, &[]).expect_code(0);
        drop(server);
        fs::rename(&target, &written).unwrap();
        image::assert_equal(&raw, &written);
    }
}

#[test]
fn a_loopback_port_is_that_of_the_host() {
    let Some(lab) = Lab::start() else { return };
    let raw = lab.path("raw");
    image::write(&raw, &disk());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = port.local_addr().unwrap().port().to_string();
    drop(port);
    let file = format!("file={}", raw.display());
    let words = ["--ipaddr=127.0.0.1", "--port", &number, "--pidfile"];
    let started = lab.path("pid");
    let words = words
        .iter()
        .copied()
        .chain([started.to_str().unwrap(), "file", &file]);
    let mut server = std::process::Command::new("nbdkit");
    let server = server
        .args(["--foreground", "--exit-with-parent"])
        .args(words);
    let Ok(mut server) = server.spawn() else {
        return kvm_clone_tests::skip::skip("nbdkit is not installed");
    };
    wait_for("nbdkit", Duration::from_secs(20), || {
        started.exists().then_some(())
    });
    let copy = lab.path("copy");
    let run = sync(
        &lab,
        &format!("hvA:nbd://localhost:{number}/"),
        &at("hvB", &copy),
        &[],
    );
    server.kill().unwrap();
    server.wait().unwrap();
    run.expect_code(0);
    image::assert_equal(&raw, &copy);
}

#[test]
fn a_read_error_and_a_server_that_dies_leave_the_destination_as_it_was() {
    let Some(lab) = Lab::start() else { return };
    let (raw, copy) = (lab.path("raw"), lab.path("copy"));
    image::write(&raw, &disk());
    image::write(&copy, &[Random(9, SIZE)]);
    let before = fs::read(&copy).unwrap();
    let socket = lab.path("nbd.sock");
    let file = format!("file={}", raw.display());
    // From its third megabyte on it cannot be read.
    let fails = [
        "eval",
        "get_size=echo 33554432",
        "pread=if [ $4 -ge 2097152 ]; then echo EIO broken >&2; exit 1; fi; head -c $3 /dev/zero",
    ];
    let Some(server) = NbdServer::nbdkit(&socket, &fails) else {
        return;
    };
    let from = format!("hvA:{}", server.uri(""));
    let run = sync(&lab, &from, &at("hvB", &copy), &[]);
    // Several ranges are read at once: it is told of the one that failed first.
    let told = run.expect_failure(1, &["io"], "(at byte ");
    let (_, byte) = told.trim_end_matches(')').rsplit_once(' ').unwrap();
    let byte: u64 = byte.parse().unwrap();
    assert!((2 * MIB..SIZE).contains(&byte), "{told}");
    assert_eq!(fs::read(&copy).unwrap(), before);
    drop(server);

    let slow = ["--filter=delay", "file", &file, "rdelay=3000ms"];
    let Some(mut server) = NbdServer::nbdkit(&socket, &slow) else {
        return;
    };
    let running = lab
        .controller
        .start(["disk", "sync", &from, &at("hvB", &copy)]);
    server.wait_for_client();
    server.kill();
    running.wait().expect_failure(1, &["io"], "NBD export");
    assert_eq!(fs::read(&copy).unwrap(), before);
    lab.wait_until_quiet();
}

#[test]
fn what_cannot_be_done_with_an_export_is_refused_before_anything_changes() {
    let Some(lab) = Lab::start() else { return };
    let (raw, small) = (lab.path("raw"), lab.path("small"));
    image::write(&raw, &disk());
    image::write(&small, &[Random(3, MIB)]);
    let tiny = at("hvA", &lab.path("tiny"));
    image::write(&lab.path("tiny"), &[Random(4, MIB)]);
    let [socket, other] = ["nbd.sock", "other.sock"].map(|name| lab.path(name));
    let server = NbdServer::qemu(&socket, "raw", &raw, &["--read-only"]);
    let target = NbdServer::qemu(&other, "raw", &small, &[]);
    let source = format!("hvA:{}", server.uri("vda"));
    let export = format!("hvB:{}", target.uri("vda"));
    let raw_disk = at("hvA", &raw);
    let copy = at("hvB", &lab.path("copy"));
    let before = fs::read(&small).unwrap();
    let refused = |from: &str, to: &str, options: &[&str], code, name, text| {
        sync(&lab, from, to, options).expect_failure(code, &[name], text);
    };
    let same = export.replace("hvB", "hvA");
    refused(&raw_disk, &source, &[], 5, "refused", "only be read");
    refused(&same, &export, &[], 5, "refused", "one and the same");
    refused(&source, &export, &[], 8, "no_space", "1048576 bytes");
    refused(
        &tiny,
        &export,
        &["--apply", "staged"],
        8,
        "missing_requirement",
        "inplace",
    );
    refused(
        &tiny,
        &export,
        &["--verify", "reread"],
        8,
        "missing_requirement",
        "caches",
    );
    refused(
        &source,
        &copy,
        &["--io", "direct"],
        8,
        "missing_requirement",
        "--io",
    );
    for method in ["rsync", "libvirt"] {
        let options = ["--method", method];
        refused(&source, &copy, &options, 8, "missing_requirement", "NBD");
        refused(
            &raw_disk,
            &export,
            &options,
            8,
            "missing_requirement",
            "NBD",
        );
    }
    let unknown = format!("hvA:{}", server.uri("vdz"));
    refused(&unknown, &copy, &[], 4, "not_found", "vdz");
    let nobody = "hvA:nbd+unix:///vda?socket=/run/nobody.sock";
    refused(nobody, &copy, &[], 4, "not_found", "/run/nobody.sock");
    let far = sync(&lab, "hvA:nbd://10.0.0.1/vda", &copy, &[]);
    far.expect_code(2);
    assert!(far.to_string().contains("not encrypted"), "{far}");
    // A disk that a server may write to is somebody else's.
    refused(&raw_disk, &at("hvB", &small), &[], 5, "busy", "small");
    assert_eq!(fs::read(&small).unwrap(), before);
    assert!(!lab.path("copy").exists());
}
