//! A controller that does as it likes, and whoever may write in an allowed directory, against an
//! agent that `serve --allow` confines.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_clone_protocol::digest::{HashKind, Seed};
use kvm_clone_protocol::message::{
    Access, ApplyChoice, Compression, Control, Dial, DiskKind, FailureCode, IoChoice, Listen,
    Location, Open, Role, SessionParams, Start, Token,
};
use kvm_clone_protocol::preamble::SUPPORTED;
use kvm_clone_tests::confined::Confined;
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::on;
use kvm_clone_tests::wire::Caller;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn open(ground: &Confined, disk: u32, path: &str, access: Access) -> Open {
    Open {
        disk,
        location: Location::Path(ground.path(path).to_str().unwrap().into()),
        access,
    }
}

/// Begins a run on a new destination, as far as that goes without a source. False when it is
/// refused.
fn begin(ground: &Confined, caller: &mut Caller, disk: u32, path: &str) -> bool {
    let Control::Opened(opened) = caller.ask(&open(ground, disk, path, Access::Destination)) else {
        return false;
    };
    assert_eq!(opened.kind, DiskKind::Missing);
    let listening = caller.ask(&Listen {
        link: disk,
        version: SUPPORTED.max,
    });
    assert!(matches!(listening, Control::Listening(_)), "{listening:?}");
    let start = Start {
        disk,
        link: disk,
        links: 1,
        role: Role::Receiver,
        params: SessionParams {
            size: MIB,
            hash: HashKind::Xxh3,
            seed: Seed([0; 32]),
            compare: false,
            ship: true,
        },
        compression: Compression::Off,
        rate_limit: 0,
        apply: ApplyChoice::Auto,
        stage_dir: Vec::new(),
        full_scan: false,
        keep_sent: None,
        io: IoChoice::Auto,
        nice: false,
        read_limit: 0,
    };
    matches!(caller.ask(&start), Control::Started(_))
}

#[test]
fn a_confined_host_dials_no_other_one_unless_it_is_let() {
    let Some(ground) = Confined::start() else {
        return;
    };
    ground.force("--allow @from --read-only", "--allow @to --write-only");
    let direct = ["--route", "direct"];
    let sync = |options: &[&str]| {
        let (from, to) = (ground.path("from/disk"), ground.path("to/disk"));
        let args = [on("hvA", &from), on("hvB", &to)];
        let fixed = ["disk", "sync"].iter().chain(options).map(Into::into);
        ground.lab.controller.run(fixed.chain(args))
    };
    let run = sync(&direct);
    let message = run.expect_failure(5, &["refused"], "hvA");
    assert!(
        message.contains("--dial") && message.contains("--route relay"),
        "{run}"
    );
    assert_eq!(sync(&[]).expect_json()["route"], "relay");

    let touched = ground.path("touched");
    let dial = |command: &[&str]| Dial {
        link: 0,
        version: SUPPORTED.max,
        command: command.iter().map(|word| (*word).into()).collect(),
        known_hosts: Vec::new(),
        token: Token([0; 16]),
        name: "x".to_owned(),
    };
    let proxy = format!("ProxyCommand=touch {}", touched.display());
    let commands: [&[&str]; 3] = [
        &["touch", touched.to_str().unwrap()],
        &["sh", "-c", "exit"],
        &[
            "ssh", "-T", "-e", "none", "-o", &proxy, "-p", "22", "-l", "root", "--", "x", "exec",
        ],
    ];
    for options in ["--allow @to", "--allow @to --dial"] {
        ground.force("--allow @from", options);
        let mut caller = ground.caller();
        for command in commands {
            match caller.ask(&dial(command)) {
                Control::Failed(failed) => assert_eq!(failed.code, FailureCode::Refused),
                answer => panic!("{command:?}: {answer:?}"),
            }
        }
    }
    assert!(!touched.exists());
}

#[test]
fn recover_sees_to_what_is_inside_and_to_nothing_else() {
    let Some(ground) = Confined::start() else {
        return;
    };
    ground.force("", "");
    // Three runs whose agents are killed.
    for paths in [
        &["to/inside"][..],
        &["out/outside"],
        &["to/both", "out/both"],
    ] {
        let mut caller = ground.caller();
        for (disk, path) in (0..).zip(paths) {
            assert!(begin(&ground, &mut caller, disk, path), "{path}");
        }
        for agent in ground.lab.b.agents() {
            let pid = agent.file_name().unwrap().to_str().unwrap();
            kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).unwrap();
        }
    }
    let outside = ground.names("out");
    assert_eq!(outside, [".both.kc-new", ".outside.kc-new", "disk"]);
    let recover = |args: &[&str]| {
        ground
            .lab
            .controller
            .run([&["recover", "hvB"], args].concat())
    };

    ground.force("--allow @from", "--allow @to");
    let listed = recover(&["--dry-run"]).expect_json();
    let disks = listed["hosts"][0]["found"].as_array().unwrap();
    let mut found: Vec<_> = disks
        .iter()
        .map(|disk| {
            (
                disk["name"].as_str().unwrap(),
                disk["state"].as_str().unwrap(),
            )
        })
        .collect();
    found.sort_unstable();
    let (both, inside) = (ground.path("to/both"), ground.path("to/inside"));
    let expected = [(&both, "stuck"), (&inside, "waiting")];
    let expected = expected.map(|(path, state)| (path.to_str().unwrap(), state));
    assert_eq!(found, expected, "{listed}");
    assert!(!listed.to_string().contains("/out/"), "{listed}");

    let run = recover(&[]);
    assert_eq!(run.code(), Some(1), "{run}");
    assert!(
        run.stderr.contains("to/both was changed together with"),
        "{run}"
    );
    assert_eq!(ground.names("to"), [".both.kc-new"]);
    assert_eq!(ground.names("out"), outside);
    ground.force("", "");
    let _ = recover(&[]).expect_json();
    assert_eq!(ground.names("to"), [""; 0]);
    assert_eq!(ground.names("out"), ["disk"]);
}

/// Exchanges two names until it is told to stop.
fn exchange(one: &Path, other: &Path, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let flags = RenameFlags::RENAME_EXCHANGE;
        renameat2(AT_FDCWD, one, AT_FDCWD, other, flags).unwrap();
    }
}

/// Does something while two names of the laboratory are exchanged all the time.
fn while_exchanged(ground: &Confined, one: &str, other: &str, work: impl FnOnce()) {
    let (one, other) = (ground.path(one), ground.path(other));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| exchange(&one, &other, &stop));
        // It stops after a panic as well, which the scope waits for.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        done.unwrap();
    });
}

/// How often a race is tried.
const TRIES: u32 = 250;

#[test]
fn a_link_that_is_exchanged_meanwhile_is_no_way_out() {
    let Some(ground) = Confined::start() else {
        return;
    };
    ground.force("--allow @from", "--allow @to");
    let inside = BLOCK * 5 + 5;
    image::write(&ground.path("out/disk"), &[Piece::Random(3, inside + 1)]);
    fs::create_dir(ground.path("to/sub")).unwrap();
    fs::copy(ground.path("from/disk"), ground.path("to/disk")).unwrap();
    fs::copy(ground.path("from/disk"), ground.path("to/sub/disk")).unwrap();
    symlink("../out/disk", ground.path("to/link")).unwrap();
    symlink("../out", ground.path("to/other")).unwrap();
    for (one, other, path) in [
        ("to/disk", "to/link", "to/disk"),
        ("to/sub", "to/other", "to/sub/disk"),
    ] {
        let (mut opened, mut refused) = (0, 0);
        while_exchanged(&ground, one, other, || {
            let mut caller = ground.caller();
            for disk in 0..TRIES {
                let answer = caller.ask(&open(&ground, disk, path, Access::Compare));
                match answer {
                    Control::Opened(found) => {
                        assert_eq!(found.size, inside, "the disk inside, and no other");
                        opened += 1;
                    }
                    Control::Failed(failed) => {
                        let code = failed.code;
                        let expected = [FailureCode::Refused, FailureCode::Busy];
                        assert!(expected.contains(&code), "{failed:?}");
                        refused += 1;
                    }
                    answer => panic!("{answer:?}"),
                }
            }
        });
        assert!(
            opened > 0 && refused > 0,
            "{opened} opened, {refused} refused"
        );
    }
}

#[test]
fn nothing_is_made_outside_while_the_directory_is_exchanged() {
    let Some(ground) = Confined::start() else {
        return;
    };
    ground.force("--allow @from", "--allow @to");
    fs::create_dir(ground.path("to/sub")).unwrap();
    symlink("../out", ground.path("to/other")).unwrap();
    let mut begun = 0;
    while_exchanged(&ground, "to/sub", "to/other", || {
        let mut caller = ground.caller();
        for disk in 0..TRIES {
            let path = format!("to/sub/new{disk}");
            begun += u32::from(begin(&ground, &mut caller, disk, &path));
            assert_eq!(ground.names("out"), ["disk"]);
        }
    });
    assert!(begun > 0);
    assert_eq!(ground.names("out"), ["disk"]);
}
