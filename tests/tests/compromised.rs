//! A source host that somebody has taken over: it has its own login on the destination host, which
//! brings data and nothing else, it knows the protocol, and it does not keep to it. Whatever it
//! does, nothing but the disk that it replicates changes. `src/bin/forger.rs` plays it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::Stdio;

use kvm_clone_protocol::message::{Control, Listen};
use kvm_clone_protocol::preamble::{SUPPORTED, find};
use kvm_clone_tests::controller::Run;
use kvm_clone_tests::journey::Journey;
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::wire::Caller;

/// The forger's disk, as it says.
const SIZE: usize = 3 * 65_536 + 100;

/// What the destination, and what lies beside it, is full of.
const OLD: u8 = 0x11;

struct Ground {
    lab: Lab,
}

impl Ground {
    fn new() -> Option<Self> {
        let lab = Lab::start()?;
        let agent = lab.install_agent();
        let forger = lab.path("forger");
        fs::copy(env!("CARGO_BIN_EXE_forger"), &forger).unwrap();
        let plans = lab.path("plans");
        let forged = format!("{} {}", forger.display(), plans.display());
        lab.a.force("controller", &forged);
        let disks = lab.path("disks").display().to_string();
        fs::create_dir(&disks).unwrap();
        let serve = format!("{agent} serve --allow {disks} --write-only");
        lab.b.force("controller", &serve);
        lab.b.force("hvA", &format!("{agent} attach"));
        Some(Self { lab })
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.lab.path("disks").join(name)
    }

    /// Lays out the disks, and gives the forger its plan.
    fn lay_out(&self, plan: &str) {
        let plans = self.lab.path("plans");
        let _ = fs::remove_dir_all(&plans);
        fs::create_dir(&plans).unwrap();
        fs::write(plans.join("plan"), plan).unwrap();
        let neighbour = self.disk("neighbour");
        fs::write(plans.join("neighbour"), neighbour.to_str().unwrap()).unwrap();
        let _ = fs::remove_file(self.disk("new"));
        for name in ["copy", "neighbour", ".neighbour.kc-new"] {
            fs::write(self.disk(name), vec![OLD; SIZE]).unwrap();
        }
    }

    /// Everything in the directory of the disks.
    fn everything(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.lab.path("disks")).unwrap();
        let entry = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        };
        entries.map(|found| entry(found.unwrap())).collect()
    }

    fn run(&self, by: Journey, destination: &str) -> Run {
        let (from, to) = (self.lab.path("forged"), self.disk(destination));
        self.lab.disk("sync", by, &from, &to, &[])
    }

    /// A run that fails with this exit code, and changes nothing: not even the disk, since what
    /// had arrived waited beside it.
    fn fails(&self, by: Journey, destination: &str, plan: &str, code: i32) {
        self.lay_out(plan);
        let before = self.everything();
        let run = self.run(by, destination);
        assert_eq!(run.code(), Some(code), "{plan}: {run}");
        assert!(!run.stderr.contains('\u{1b}'), "{plan}: {run}");
        let mut after = self.everything();
        // What has arrived waits for the next run.
        after.retain(|name, _| !name.starts_with(&format!(".{destination}.kc-")));
        assert!(after == before, "{plan}: {:?}", after.keys());
        self.let_go();
    }

    /// A run that succeeds, and changes the disk to what the forger says, and nothing else.
    fn spoils(&self, by: Journey, destination: &str, plan: &str) {
        self.lay_out(plan);
        let mut expected = self.everything();
        let run = self.run(by, destination);
        assert_eq!(run.code(), Some(0), "{plan}: {run}");
        expected.insert(destination.to_owned(), vec![0xee; SIZE]);
        let after = self.everything();
        assert!(after == expected, "{plan}: {:?}", after.keys());
    }

    /// Removes what a broken run has left, so that the next one begins anew.
    fn let_go(&self) {
        for name in self.everything().keys() {
            if name.starts_with(".copy.kc-") || name.starts_with(".new.kc-") {
                fs::remove_file(self.disk(name)).unwrap();
            }
        }
    }
}

/// Frames that break a session, and the exit code of the run.
const BROKEN: [(&str, i32); 10] = [
    ("data beyond", 9),
    ("data far beyond", 9),
    ("data back", 9),
    ("zeros beyond", 9),
    ("zeros far beyond", 9),
    ("settled beyond", 9),
    ("long block", 9),
    ("bomb", 9),
    ("root", 7),
    ("cut", 6),
];

#[test]
fn it_spoils_the_disk_that_it_replicates_and_nothing_else() {
    let Some(ground) = Ground::new() else { return };
    for by in [Journey::Direct, Journey::Relay] {
        for destination in ["copy", "new"] {
            ground.spoils(by, destination, "spoil");
        }
    }
}

#[test]
fn offsets_lengths_and_digests_that_it_forges_change_nothing() {
    let Some(ground) = Ground::new() else { return };
    for (plan, code) in BROKEN {
        ground.fails(Journey::Direct, "copy", plan, code);
    }
    // The relay looks at no offsets: the same agent does, at the other end.
    for (plan, code) in [BROKEN[1], BROKEN[8], BROKEN[9]] {
        ground.fails(Journey::Direct, "new", plan, code);
        ground.fails(Journey::Relay, "copy", plan, code);
    }
}

#[test]
fn what_only_a_controller_may_say_ends_a_data_connection() {
    let Some(ground) = Ground::new() else { return };
    for by in [Journey::Direct, Journey::Relay] {
        for plan in ["open", "commit", "abort", "control"] {
            ground.fails(by, "copy", plan, 9);
        }
        ground.fails(by, "new", "commit", 9);
    }
}

#[test]
fn it_gets_in_once_with_its_token_and_never_with_another_one_or_to_another_session() {
    let Some(ground) = Ground::new() else { return };
    // Another controller's agent on the destination host, which waits for its data connection.
    let mut caller = Caller::start(ground.lab.ssh("hvB", "agent"));
    let listen = Listen {
        link: 0,
        version: SUPPORTED.max,
    };
    let Control::Listening(other) = caller.ask(&listen) else {
        panic!("an agent listens");
    };
    ground.lay_out("tokens");
    let plans = ground.lab.path("plans");
    fs::write(plans.join("other"), &other.name).unwrap();
    let mut expected = ground.everything();
    let run = ground.run(Journey::Direct, "copy");
    assert_eq!(run.code(), Some(0), "{run}");
    expected.insert("copy".to_owned(), vec![0xee; SIZE]);
    assert!(ground.everything() == expected);
    let log = fs::read_to_string(plans.join("log")).unwrap();
    let attempts = [
        "wrong token: turned away",
        "no token: turned away",
        "half a token: turned away",
        "another session: turned away",
        "used token: turned away",
    ];
    assert_eq!(log.lines().collect::<Vec<_>>(), attempts);

    // The other session has come to no harm: its own token still opens its connection.
    let mut attach = ground
        .lab
        .ssh("hvB", &format!("kvm-clone-agent attach {}", other.name))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let token: String = other
        .token
        .0
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut stdin = attach.stdin.take().unwrap();
    stdin.write_all(format!("{token}\n").as_bytes()).unwrap();
    let mut preamble = [0; 16];
    attach
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut preamble)
        .unwrap();
    assert!(find(&mut preamble[..].into()).unwrap().is_some());
    drop((stdin, caller));
    attach.wait().unwrap();
}
