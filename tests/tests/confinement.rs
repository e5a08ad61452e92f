//! What `serve --allow` in authorized_keys keeps a controller from: real keys on real hosts, and the
//! program as a user runs it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use kvm_clone_tests::confined::Confined;
use kvm_clone_tests::controller::Run;
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::Journey;

/// hvA reads what is in `from`, and hvB writes to `to`.
fn start() -> Option<Confined> {
    let confined = Confined::start()?;
    confined.force("--allow @from --read-only", "--allow @to --write-only");
    Some(confined)
}

fn run(ground: &Confined, verb: &str, by: Journey, from: &str, to: &str) -> Run {
    let (from, to) = (ground.path(from), ground.path(to));
    ground.lab.disk(verb, by, &from, &to, &[])
}

/// A sync that is refused, with a message that names the path and says why.
fn refused(ground: &Confined, from: &str, to: &str, names: &str, why: &str) {
    let run = run(ground, "sync", Journey::Relay, from, to);
    let message = run.expect_failure(5, &["refused"], names);
    assert!(message.contains(why), "{run}");
}

fn link(ground: &Confined, target: impl AsRef<Path>, name: &str) {
    symlink(target, ground.path(name)).unwrap();
}

#[test]
fn what_is_allowed_is_synced_by_every_route() {
    let Some(ground) = Confined::start() else {
        return;
    };
    ground.force(
        "--allow @from --read-only --dial",
        "--allow @to --write-only",
    );
    ground
        .lab
        .b
        .force("hvA", &format!("{} attach", ground.agent));
    let from = ground.path("from/disk");
    for by in [Journey::Direct, Journey::Relay] {
        let to = ground.path(&format!("to/{by:?}"));
        ground.lab.sync(by, &from, &to, &[]);
        image::change_blocks(&to, 20, 7);
        for options in [&["--dry-run"][..], &["--apply", "inplace"]] {
            let run = ground.lab.disk("sync", by, &from, &to, options);
            let _ = run.expect_json();
        }
        image::assert_equal(&from, &to);
    }
    // Only the host that dials needs to be let.
    ground.force("--allow @from", "--allow @to/disk --allow @from/disk");
    ground
        .lab
        .sync(Journey::Pull, &from, &ground.path("pulled"), &[]);
    let to = ground.path("to/disk");
    for options in [&[][..], &["--apply", "staged", "--verify", "reread"]] {
        let run = ground.lab.disk("sync", Journey::Push, &from, &to, options);
        let _ = run.expect_json();
        image::assert_equal(&from, &to);
        image::change_blocks(&to, 20, 8);
    }
    let auto = run(&ground, "sync", Journey::Push, "from/disk", "to/disk");
    let _ = auto.expect_json();
    let verify = run(&ground, "verify", Journey::Relay, "from/disk", "to/disk");
    assert_eq!(verify.expect_json()["route"], "relay");
    assert_eq!(ground.names("to"), ["Direct", "Relay", "disk"]);
    ground.lab.wait_until_quiet();
}

#[test]
fn what_lies_outside_is_refused_by_name() {
    let Some(ground) = start() else {
        return;
    };
    fs::create_dir(ground.path("from2")).unwrap();
    image::write(&ground.path("from2/disk"), &[Piece::Byte(7)]);
    let outside = "outside of what this agent is allowed";
    for from in [
        "out/disk",
        "from2/disk",
        "from/../out/disk",
        "from/../from/../out/disk",
        "no/such/disk",
    ] {
        refused(&ground, from, "to/new", from, outside);
    }
    for to in [
        "out/new",
        "out/disk",
        "to/../out/new",
        "to/../../new",
        "to2",
    ] {
        refused(&ground, "from/disk", to, to, outside);
    }
    let allowed = ground.path("to").display().to_string();
    refused(&ground, "from/disk", "out/new", "out/new", &allowed);
    refused(&ground, "from/disk", "to", "to", "a directory");
    assert_eq!(ground.names("out"), ["disk"]);
    assert_eq!(ground.names("to"), [""; 0]);
}

#[test]
fn a_link_is_followed_as_far_as_it_stays_inside() {
    let Some(ground) = start() else {
        return;
    };
    let outside = "outside of what this agent is allowed";
    for directory in ["from", "to"] {
        fs::create_dir(ground.path(directory).join("sub")).unwrap();
        link(&ground, "../out/disk", &format!("{directory}/relative"));
        link(
            &ground,
            ground.path("out/disk"),
            &format!("{directory}/absolute"),
        );
        link(&ground, "../out", &format!("{directory}/directory"));
        link(&ground, "/proc/self/root", &format!("{directory}/magic"));
    }
    let magic = ground.path("out/disk");
    let magic = format!("magic{}", magic.display());
    for name in ["relative", "absolute", "directory/disk", &magic] {
        let (from, to) = (format!("from/{name}"), format!("to/{name}"));
        refused(&ground, &from, "to/new", name, outside);
        refused(&ground, "from/disk", &to, name, outside);
    }
    refused(
        &ground,
        "from/disk",
        "to/directory/new",
        "directory/new",
        outside,
    );
    assert_eq!(ground.names("out"), ["disk"]);

    link(&ground, "../disk", "from/sub/link");
    link(&ground, "sub", "to/inner");
    link(&ground, "../copy", "to/sub/link");
    image::write(&ground.path("to/copy"), &[Piece::Hole(BLOCK)]);
    for (from, to) in [
        ("from/sub/link", "to/inner/new"),
        ("from/sub/../disk", "to/inner/link"),
    ] {
        let run = run(&ground, "sync", Journey::Relay, from, to);
        let _ = run.expect_json();
        image::assert_equal(&ground.path("from/disk"), &ground.path(to));
    }
    assert!(ground.path("to/sub/link").is_symlink());
    assert_eq!(ground.names("to/sub"), ["link", "new"]);
}

#[test]
fn a_device_has_to_be_named_and_so_has_the_directory_for_its_changes() {
    let Some(ground) = Confined::start() else {
        return;
    };
    let device = ground.lab.device("device", MIB);
    let node = device.path().to_str().unwrap().to_owned();
    ground.force("--allow @from", "--allow /dev --allow @to");
    let sync = |options: &[&str]| {
        let from = ground.path("from/disk");
        ground
            .lab
            .disk("sync", Journey::Relay, &from, device.path(), options)
    };
    let message = sync(&[]).expect_failure(5, &["refused"], &node);
    assert!(message.contains("--allow has to name itself"), "{message}");
    ground.force("--allow @from", &format!("--allow {node} --allow @to"));
    let out = ground.path("out").display().to_string();
    let options = ["--apply", "staged", "--stage-dir", &out];
    let message = sync(&options).expect_failure(5, &["refused"], &out);
    assert!(message.contains("outside of what"), "{message}");
    let to = ground.path("to").display().to_string();
    for options in [&["--apply", "staged", "--stage-dir", &to][..], &[]] {
        let _ = sync(options).expect_json();
        image::change_blocks(device.path(), 20, 7);
    }
    assert_eq!(ground.names("out"), ["disk"]);
    assert_eq!(ground.names("to"), [""; 0]);
}

#[test]
fn who_only_reads_does_not_write_and_who_only_writes_does_not_read() {
    let Some(ground) = Confined::start() else {
        return;
    };
    image::write(&ground.path("to/disk"), &[Piece::Random(2, BLOCK)]);
    let before = fs::read(ground.path("to/disk")).unwrap();
    ground.force("--write-only --allow @from", "--allow @to --read-only");
    let sync = |by| run(&ground, "sync", by, "from/disk", "to/disk");
    let refused = |run: Run, name: &str, why: &str| {
        let message = run.expect_failure(5, &["refused"], name);
        assert!(message.contains(why), "{message}");
    };
    refused(sync(Journey::Relay), "from/disk", "only writes");
    refused(sync(Journey::Pull), "from/disk", "only writes");
    refused(sync(Journey::Push), "to/disk", "only reads");
    let recover = |args: &[&str]| {
        let args = [&["recover", "hvB"], args].concat();
        ground.lab.controller.run(args)
    };
    let recovered = recover(&[]);
    assert_eq!(recovered.code(), Some(5), "{recovered}");
    assert!(recovered.stderr.contains("only reads"), "{recovered}");
    let _ = recover(&["--dry-run"]).expect_json();

    ground.force("--allow @from --read-only", "--allow @to --write-only");
    let verify = || run(&ground, "verify", Journey::Relay, "from/disk", "to/disk");
    refused(verify(), "to/disk", "only writes");
    // A direction alone leaves all paths.
    ground.force("--read-only", "--read-only");
    verify().expect_code(7);
    refused(sync(Journey::Relay), "to/disk", "only reads");
    assert_eq!(fs::read(ground.path("to/disk")).unwrap(), before);
    assert_eq!(ground.names("to"), ["disk"]);
}

#[test]
fn nothing_else_runs_for_a_key_that_is_forced() {
    let Some(ground) = start() else {
        return;
    };
    ground
        .lab
        .b
        .force("hvA", &format!("{} attach", ground.agent));
    let touched = ground.path("touched");
    let (config, port) = (ground.lab.controller.ssh_config(), ground.lab.b.port());
    let by_controller = || {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(config);
        ssh
    };
    let by_source = || {
        let mut ssh = Command::new("ssh");
        let key = ground.lab.a.home().join(".ssh/id_ed25519");
        ssh.args(["-F", "none", "-o", "StrictHostKeyChecking=no", "-o"]);
        ssh.args(["UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"]);
        ssh.arg("-i").arg(key).args(["-p", &port.to_string()]);
        ssh
    };
    let touch = format!("touch {0} || attach; touch {0}", touched.display());
    let forward = ["-W", "127.0.0.1:1"];
    for (ssh, host) in [
        (&by_controller as &dyn Fn() -> Command, "hvB"),
        (&by_source, "root@127.0.0.1"),
    ] {
        for args in [
            &[host, &touch][..],
            &["-tt", host, &touch],
            &["-s", host, "sftp"],
            &[host],
            &[forward[0], forward[1], host],
        ] {
            let run = ssh().args(args).output().unwrap();
            let stdout = String::from_utf8_lossy(&run.stdout);
            // An agent that hears no controller, an attach that hears no name, or nothing.
            let is_preamble = run.stdout.starts_with(b"\x89KVC");
            assert!(is_preamble || stdout.is_empty(), "{args:?}: {run:?}");
        }
    }
    // A key that only brings data gets no agent that serves.
    let run = by_source().args(["root@127.0.0.1", "agent serve"]).output();
    let run = run.unwrap();
    assert!(run.stdout.is_empty() && !run.status.success(), "{run:?}");
    assert!(!touched.exists());
    assert_eq!(ground.names("to"), [""; 0]);
}
