//! What `serve --allow` in authorized_keys keeps a controller from: real keys on real hosts, the
//! program as a user runs it, and where that is too well-behaved, a controller that does as it
//! likes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_clone_protocol::digest::{HashKind, Seed};
use kvm_clone_protocol::message::{
    Access, ApplyChoice, Compression, Control, Dial, DiskKind, FailureCode, Listen, Open, Role,
    SessionParams, Start, Token,
};
use kvm_clone_protocol::preamble::SUPPORTED;
use kvm_clone_tests::controller::Run;
use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::wire::Caller;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// Hosts that let nobody in but to an agent: hvA reads what is in `from`, hvB writes to `to`.
struct Ground {
    lab: Lab,
    agent: String,
}

impl Ground {
    fn new() -> Option<Self> {
        // What runs leave there is the host's own.
        let state =
            "mkdir -p /var/lib/kvm-clone && mount -t tmpfs -o mode=0700 none /var/lib/kvm-clone";
        let spec = LabSpec::new()?.host_b(|host| host.setup(state));
        let lab = spec.start();
        let agent = lab.install_agent();
        for name in ["from", "to", "out"] {
            fs::create_dir(lab.path(name)).unwrap();
        }
        for name in ["from/disk", "out/disk"] {
            image::write(&lab.path(name), &[Piece::Random(1, 5 * BLOCK + 5)]);
        }
        Some(Self { lab, agent })
    }

    /// From now on hosts give the controller an agent with these options.
    fn force(&self, on_a: &str, on_b: &str) {
        let serve = |options: &str| {
            let options = options.replace('@', self.lab.path("").to_str().unwrap());
            format!("{} serve {options}", self.agent)
        };
        self.lab.a.force("controller", &serve(on_a));
        self.lab.b.force("controller", &serve(on_b));
    }

    /// As [`force`](Self::force), where there is nothing else to it.
    fn confined() -> Option<Self> {
        let ground = Self::new()?;
        ground.force("--allow @from --read-only", "--allow @to --write-only");
        Some(ground)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.lab.path(name)
    }

    fn run(&self, verb: &str, by: Journey, from: &str, to: &str, options: &[&str]) -> Run {
        let (from, to) = (self.path(from), self.path(to));
        self.lab.disk(verb, by, &from, &to, options)
    }

    /// A sync that is refused, with a message that names the path and what is allowed.
    fn refused(&self, from: &str, to: &str, names: &str, why: &str) {
        let run = self.run("sync", Journey::Relay, from, to, &[]);
        let message = run.expect_failure(5, &["refused"], names);
        assert!(message.contains(why), "{run}");
    }

    /// The names in a directory.
    fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).unwrap();
        let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        let mut names: Vec<_> = entries.map(|entry| name(entry.unwrap())).collect();
        names.sort();
        names
    }

    fn link(&self, target: impl AsRef<Path>, name: &str) {
        symlink(target, self.path(name)).unwrap();
    }

    /// A controller that does as it likes, with the agent that hvB forces.
    fn caller(&self) -> Caller {
        Caller::start(self.lab.ssh("hvB", "anything"))
    }
}

#[test]
fn what_is_allowed_is_synced_by_every_route() {
    let Some(ground) = Ground::new() else { return };
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
        ground.lab.sync(Journey::Push, &from, &to, options);
        image::change_blocks(&to, 20, 8);
    }
    let auto = ground.run("sync", Journey::Push, "from/disk", "to/disk", &[]);
    let _ = auto.expect_json();
    let verify = ground.run("verify", Journey::Relay, "from/disk", "to/disk", &[]);
    assert_eq!(verify.expect_json()["route"], "relay");
    assert_eq!(ground.names("to"), ["Direct", "Relay", "disk"]);
    ground.lab.wait_until_quiet();
}

#[test]
fn what_lies_outside_is_refused_by_name() {
    let Some(ground) = Ground::confined() else {
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
        ground.refused(from, "to/new", from, outside);
    }
    for to in [
        "out/new",
        "out/disk",
        "to/../out/new",
        "to/../../new",
        "to2",
    ] {
        ground.refused("from/disk", to, to, outside);
    }
    let allowed = ground.path("to").display().to_string();
    ground.refused("from/disk", "out/new", "out/new", &allowed);
    ground.refused("from/disk", "to", "to", "a directory");
    assert_eq!(ground.names("out"), ["disk"]);
    assert_eq!(ground.names("to"), [""; 0]);
}

#[test]
fn a_link_is_followed_as_far_as_it_stays_inside() {
    let Some(ground) = Ground::confined() else {
        return;
    };
    let outside = "outside of what this agent is allowed";
    for directory in ["from", "to"] {
        fs::create_dir(ground.path(directory).join("sub")).unwrap();
        ground.link("../out/disk", &format!("{directory}/relative"));
        ground.link(ground.path("out/disk"), &format!("{directory}/absolute"));
        ground.link("../out", &format!("{directory}/directory"));
        ground.link("/proc/self/root", &format!("{directory}/magic"));
    }
    let magic = ground.path("out/disk");
    let magic = format!("magic{}", magic.display());
    for name in ["relative", "absolute", "directory/disk", &magic] {
        let (from, to) = (format!("from/{name}"), format!("to/{name}"));
        ground.refused(&from, "to/new", name, outside);
        ground.refused("from/disk", &to, name, outside);
    }
    ground.refused("from/disk", "to/directory/new", "directory/new", outside);
    assert_eq!(ground.names("out"), ["disk"]);

    ground.link("../disk", "from/sub/link");
    ground.link("sub", "to/inner");
    ground.link("../copy", "to/sub/link");
    image::write(&ground.path("to/copy"), &[Piece::Hole(BLOCK)]);
    for (from, to) in [
        ("from/sub/link", "to/inner/new"),
        ("from/sub/../disk", "to/inner/link"),
    ] {
        let run = ground.run("sync", Journey::Relay, from, to, &[]);
        let _ = run.expect_json();
        image::assert_equal(&ground.path("from/disk"), &ground.path(to));
    }
    assert!(ground.path("to/sub/link").is_symlink());
    assert_eq!(ground.names("to/sub"), ["link", "new"]);
}

#[test]
fn a_device_has_to_be_named_and_so_has_the_directory_for_its_changes() {
    let Some(ground) = Ground::new() else { return };
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
    let Some(ground) = Ground::new() else { return };
    image::write(&ground.path("to/disk"), &[Piece::Random(2, BLOCK)]);
    let before = fs::read(ground.path("to/disk")).unwrap();
    ground.force("--write-only --allow @from", "--allow @to --read-only");
    let sync = |by| ground.run("sync", by, "from/disk", "to/disk", &[]);
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
    let run = recover(&[]);
    assert!(
        run.code() == Some(5) && run.stderr.contains("only reads"),
        "{run}"
    );
    let _ = recover(&["--dry-run"]).expect_json();

    ground.force("--allow @from --read-only", "--allow @to --write-only");
    let verify = || ground.run("verify", Journey::Relay, "from/disk", "to/disk", &[]);
    refused(verify(), "to/disk", "only writes");
    // A direction alone leaves all paths.
    ground.force("--read-only", "--read-only");
    verify().expect_code(7);
    refused(sync(Journey::Relay), "to/disk", "only reads");
    assert_eq!(fs::read(ground.path("to/disk")).unwrap(), before);
    assert_eq!(ground.names("to"), ["disk"]);
}

#[test]
fn a_confined_host_dials_no_other_one_unless_it_is_let() {
    let Some(ground) = Ground::confined() else {
        return;
    };
    let direct = ["--route", "direct"];
    let sync = |options: &[&str]| {
        let (from, to) = (ground.path("from/disk"), ground.path("to/disk"));
        let args = [
            kvm_clone_tests::journey::on("hvA", &from),
            kvm_clone_tests::journey::on("hvB", &to),
        ];
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
fn nothing_else_runs_for_a_key_that_is_forced() {
    let Some(ground) = Ground::confined() else {
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

/// Exchanges two names until it is told to stop.
fn exchange(one: &Path, other: &Path, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let flags = RenameFlags::RENAME_EXCHANGE;
        renameat2(AT_FDCWD, one, AT_FDCWD, other, flags).unwrap();
    }
}

/// Does something while two names of the laboratory are exchanged all the time.
fn while_exchanged(ground: &Ground, one: &str, other: &str, work: impl FnOnce()) {
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
    let Some(ground) = Ground::new() else { return };
    ground.force("--allow @from", "--allow @to");
    let inside = BLOCK * 5 + 5;
    image::write(&ground.path("out/disk"), &[Piece::Random(3, inside + 1)]);
    fs::create_dir(ground.path("to/sub")).unwrap();
    fs::copy(ground.path("from/disk"), ground.path("to/disk")).unwrap();
    fs::copy(ground.path("from/disk"), ground.path("to/sub/disk")).unwrap();
    ground.link("../out/disk", "to/link");
    ground.link("../out", "to/other");
    for (one, other, path) in [
        ("to/disk", "to/link", "to/disk"),
        ("to/sub", "to/other", "to/sub/disk"),
    ] {
        let (mut opened, mut refused) = (0, 0);
        while_exchanged(&ground, one, other, || {
            let mut caller = ground.caller();
            for disk in 0..TRIES {
                let answer = caller.ask(&Open {
                    disk,
                    path: ground.path(path).to_str().unwrap().into(),
                    access: Access::Compare,
                });
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
    let Some(ground) = Ground::new() else { return };
    ground.force("--allow @from", "--allow @to");
    fs::create_dir(ground.path("to/sub")).unwrap();
    ground.link("../out", "to/other");
    let params = SessionParams {
        size: MIB,
        hash: HashKind::Xxh3,
        seed: Seed([0; 32]),
        compare: false,
        ship: true,
    };
    let mut begun = 0;
    while_exchanged(&ground, "to/sub", "to/other", || {
        let mut caller = ground.caller();
        for disk in 0..TRIES {
            let path = ground.path(&format!("to/sub/new{disk}"));
            let answer = caller.ask(&Open {
                disk,
                path: path.to_str().unwrap().into(),
                access: Access::Destination,
            });
            let Control::Opened(opened) = answer else {
                continue;
            };
            assert_eq!(opened.kind, DiskKind::Missing);
            let version = SUPPORTED.max;
            let listening = caller.ask(&Listen {
                link: disk,
                version,
            });
            assert!(matches!(listening, Control::Listening(_)), "{listening:?}");
            let started = caller.ask(&Start {
                disk,
                link: disk,
                role: Role::Receiver,
                params,
                compression: Compression::Off,
                rate_limit: 0,
                apply: ApplyChoice::Auto,
                stage_dir: Vec::new(),
            });
            begun += u32::from(matches!(started, Control::Started(_)));
            assert_eq!(ground.names("out"), ["disk"]);
        }
    });
    assert!(begun > 0);
    assert_eq!(ground.names("out"), ["disk"]);
}
