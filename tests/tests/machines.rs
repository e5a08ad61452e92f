//! Pairs of machines of different kinds: an x86_64 and an aarch64, which is emulated.
//!
//! Every other test of a laboratory can be had with such a pair: with `KVM_CLONE_TEST_AARCH64=hvB`
//! that host is an aarch64, with `hvA` the other one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use kvm_clone_tests::controller::Controller;
use kvm_clone_tests::host::Machine;
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::older;
use kvm_clone_tests::skip::{emulation_obstacle, skip};

/// Bytes by which two runs of the same may differ: how often the receiver gives credit, and of how many
/// holes it speaks at once, goes by the time that things take.
const CREDIT: u64 = 256;

/// A pair of such machines, with a file system that shares blocks.
fn lab([a, b]: [Machine; 2]) -> Option<Lab> {
    if let Some(reason) = emulation_obstacle() {
        skip(&reason);
        return None;
    }
    let spec = LabSpec::new()?.mount(Kind::Xfs, 400 * MIB);
    let spec = spec
        .host_a(|spec| spec.machine(a))
        .host_b(|spec| spec.machine(b));
    let lab = spec.start();
    let version = lab.controller.run_plain(["--version"]).text();
    assert!(
        version.contains("aarch64 "),
        "built without an agent for aarch64 (tests/run builds it): {version}"
    );
    Some(lab)
}

/// What an agent says that it is built for.
fn architecture(lab: &Lab, host: &str) -> String {
    let deployed = lab.controller.run(["agent", "deploy", host]).expect_json();
    let agent = &deployed["hosts"][0];
    assert_eq!(agent["digest_matches"], true, "{deployed}");
    agent["architecture"].as_str().unwrap().to_owned()
}

/// Data, zeros and holes; the end is in the middle of a block.
fn disk() -> [Piece; 5] {
    use Piece::{Hole, Random, Zeros};
    [
        Random(1, 6 * MIB),
        Hole(2 * MIB),
        Zeros(MIB),
        Random(2, MIB),
        Random(3, 5),
    ]
}

/// Copies a disk, changes a few blocks and syncs again, each way. Gives what the routes carried.
fn synced(machines: [Machine; 2]) -> Option<Vec<u64>> {
    let lab = lab(machines)?;
    let names = machines.map(|machine| match machine {
        Machine::Own => std::env::consts::ARCH,
        Machine::Aarch64 => "aarch64",
    });
    assert_eq!(names, ["hvA", "hvB"].map(|host| architecture(&lab, host)));
    let directory = &lab.mounts()[0];
    let source = directory.join("source");
    image::write(&source, &disk());
    let mut carried = Vec::new();
    for (by, apply) in [
        (Journey::Direct, "staged"),
        (Journey::Relay, "reflink"),
        (Journey::Direct, "inplace"),
    ] {
        let copy = directory.join(format!("copy-{apply}"));
        for changed in [None, Some(2), Some(0)] {
            // There is one way for what is not there yet.
            let mut options = vec!["--verify", "reread"];
            if let Some(blocks) = changed {
                image::overwrite(&copy, &[Piece::Random(9, blocks * BLOCK)]);
                options.extend(["--apply", apply]);
            }
            let outcome = lab.sync(by, &source, &copy, &options);
            let builds = ["agent_source", "agent_destination"];
            assert_eq!(
                builds.map(|agent| outcome.json[agent]["architecture"].clone()),
                names,
                "{}",
                outcome.run
            );
            assert_eq!(
                outcome.number("blocks_changed"),
                changed.unwrap_or(113),
                "{}",
                outcome.run
            );
            carried.push(outcome.number("bytes_wire"));
        }
    }
    lab.wait_until_quiet();
    Some(carried)
}

#[test]
fn each_machine_gets_its_agent_and_the_same_travels_between_all_kinds() {
    use Machine::{Aarch64, Own};
    let Some(own) = synced([Own, Own]) else {
        return;
    };
    for machines in [[Own, Aarch64], [Aarch64, Own], [Aarch64, Aarch64]] {
        let carried = synced(machines).unwrap();
        let alike = |(one, other): (&u64, &u64)| one.abs_diff(*other) <= CREDIT;
        assert!(
            carried.iter().zip(&own).all(alike),
            "{machines:?}: {carried:?}, {own:?}"
        );
    }
}

#[test]
fn a_machine_whose_agent_is_not_carried_is_named_until_it_is_given() {
    if let Some(reason) = emulation_obstacle() {
        skip(&reason);
        return;
    }
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.host_b(|spec| spec.machine(Machine::Aarch64)).start();
    let config = lab.controller.ssh_config().to_owned();
    let single = Controller::new(lab.path("single"), config).program(older::controller());
    let run = single.run(["agent", "deploy", "hvB"]);
    run.expect_code(8);
    let error = &run.json()["hosts"][0]["error"];
    assert_eq!(error["code"], "missing_requirement", "{run}");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("hvB is of machine aarch64") && message.contains("x86_64 only"),
        "{run}"
    );
    assert!(error["hint"].as_str().unwrap().contains("--agent"), "{run}");

    let agents = lab.controller.run(["agent", "deploy", "hvB"]).expect_json();
    let path = agents["hosts"][0]["path"].as_str().unwrap();
    let given = lab.path("given");
    fs::copy(
        lab.b.home().join(path.strip_prefix("/root/").unwrap()),
        &given,
    )
    .unwrap();
    let run = single.run([
        "agent".as_ref(),
        "deploy".as_ref(),
        "hvB".as_ref(),
        "--agent".as_ref(),
        given.as_os_str(),
    ]);
    let agent = &run.expect_json()["hosts"][0];
    assert_eq!(
        (&agent["state"], &agent["digest_matches"]),
        (&"found".into(), &true.into()),
        "{run}"
    );

    for (file, says) in [
        ("/no-such-agent", "cannot be read"),
        ("/etc/passwd", "is no program for Linux"),
    ] {
        let run = single.run(["agent", "status", "hvA", "--agent", file]);
        run.expect_code(2);
        assert!(
            run.stderr.contains(&format!("--agent {file} {says}")),
            "{run}"
        );
    }
}
