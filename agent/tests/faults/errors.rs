//! Calls on disks that fail: the first of a kind, one in the middle, the last; once, or from then on.

use std::collections::BTreeMap;

use kvm_clone_protocol::message::{ApplyChoice, Failed, FailureCode, Role};
use kvm_clone_tests::mount::Kind;

use crate::agent::Agent;
use crate::ground::{Ground, Seen};
use crate::run::{Done, Source, Stopped};
use crate::stride;
use crate::trial::{Trial, fresh, grows, shrinks, tell, try_out, two};

/// Kinds of calls as an agent logs them, and as it is told of them.
const KINDS: [(&str, &str); 11] = [
    ("Read", "read"),
    ("Write", "write"),
    ("Sync", "sync"),
    ("Allocate", "allocate"),
    ("SetLen", "set_len"),
    ("Clone", "clone"),
    ("Create", "create"),
    ("Link", "link"),
    ("Rename", "rename"),
    ("Remove", "remove"),
    ("SyncDirectory", "sync_directory"),
];

/// What an agent's kernel calls may say.
const ERRORS: [(&str, FailureCode); 2] =
    [("EIO", FailureCode::Io), ("ENOSPC", FailureCode::NoSpace)];

/// How many calls there were of each kind.
fn calls(log: &str) -> BTreeMap<&'static str, usize> {
    let of = |shown: &str| log.matches(&format!("fault: {shown} ")).count();
    KINDS.map(|(shown, kind)| (kind, of(shown))).into()
}

/// What was struck: the kind of call, and the file.
fn struck(said: &str) -> Vec<(&str, &str)> {
    let lines = said.lines().filter(|line| line.contains(": Error("));
    lines
        .map(|line| {
            let line = line.strip_prefix("fault: ").unwrap();
            let (call, on) = line.split_once(" on ").unwrap();
            let kind = call.split(' ').next().unwrap();
            let path = on.split('"').nth(1).unwrap();
            (kind, path)
        })
        .collect()
}

/// Whether a file holds blocks, those of a destination or those that wait for it.
fn holds_blocks(path: &str) -> bool {
    !path.contains("/runs") && !path.contains("journal") && !path.ends_with("/to")
}

impl Trial {
    /// A run from the beginning with these faults, which need not fail. What the agent said.
    fn meets(&mut self, faults: &str) -> (Result<Done, Failed>, String) {
        self.ground.reset(&self.disks);
        let mut agent = Agent::start(&self.ground, faults);
        let result = self
            .source
            .sync(&self.ground, &mut agent, &self.disks, self.wish);
        let (status, said) = agent.end();
        assert!(status.success(), "{status} {faults}: {said}");
        match result {
            Ok(done) => (Ok(done), said),
            Err(Stopped::Failed(Role::Receiver, failed)) => (Err(failed), said),
            Err(other) => panic!("{other:?} {faults}: {said}"),
        }
    }

    /// What holds after a run that met faults, whether it failed or not, and that the next one
    /// makes it well. Gives how that went.
    fn is_mended(&mut self, result: &Result<Done, Failed>, at: &str) -> Done {
        let at = &format!("{at}: {result:?}");
        let is_inplace = self.wish.apply == ApplyChoice::Inplace;
        let seen = self.seen();
        if result.is_ok() {
            self.is_done(at);
        }
        assert!(is_inplace || !seen.contains(&Seen::Torn), "{seen:?} {at}");
        let is_full = matches!(result, Err(failed) if failed.code == FailureCode::NoSpace);
        let left = self.ground.left(&self.disks);
        let is_committed = seen.iter().any(|seen| *seen != self.disks[0].before())
            || left.iter().any(|name| name.ends_with(".run"));
        if is_full && !is_inplace && !is_committed {
            assert_eq!(left, [""; 0], "{at}");
        }
        let mut agent = Agent::start(&self.ground, "");
        self.is_completed_by_the_next_run(&mut agent, at)
    }

    /// Each error at the first, the middle and the last call of each kind.
    fn meets_every_error(&mut self) {
        let calls = calls(&self.runs("log"));
        let mut tried = 0;
        for (kind, count) in calls {
            let mut places = vec![1, count.div_ceil(2), count];
            if stride(2) == 1 {
                places = (1..=count).collect();
            }
            places.dedup();
            for place in places.into_iter().filter(|place| *place > 0) {
                for (error, code) in ERRORS {
                    let faults = format!("{kind}:{place}:{error}");
                    let (result, said) = self.meets(&faults);
                    is_told(
                        &result,
                        code,
                        &said,
                        &self.disks[0].destination.display().to_string(),
                    );
                    self.is_mended(&result, &format!("{faults}: {said}"));
                    tried += 1;
                }
            }
        }
        tell(&format!("{tried} errors"));
    }
}

impl Trial {
    /// An fsync that fails is the end of what it was for: no other run takes that for durable.
    fn is_never_synced_at_last(&mut self) {
        let log = self.runs("log");
        let whole = self.meets("").0.unwrap();
        let syncs: Vec<&str> = log.lines().filter(|line| line.contains(" Sync ")).collect();
        let is_note = |line: &&str| line.contains("/runs/");
        let committed = syncs.iter().rposition(is_note).unwrap();
        // Digests need not be kept.
        let all = syncs.iter().enumerate();
        for (at, line) in all.filter(|(_, line)| !line.contains("/digests/")) {
            let place = at + 1;
            let (result, said) = self.meets(&format!("sync:{place}:EIO"));
            let failed = result.as_ref().unwrap_err();
            assert_eq!(failed.code, FailureCode::Io, "{place} {said}");
            let next = self.is_mended(&result, &said);
            if at < committed && !is_note(line) {
                assert_eq!(next, whole, "{place} {said}");
            }
        }
    }
}

/// Claims that a failure has this code, and names what was struck.
fn is_told(result: &Result<Done, Failed>, code: FailureCode, said: &str, disk: &str) {
    let struck = struck(said);
    let Some((kind, path)) = struck.first() else {
        return;
    };
    let Err(failed) = result else {
        // Space that cannot be given back is no reason to fail, a note can be made otherwise, what
        // another run says is not needed, and digests need not be kept.
        let is_optional = match *kind {
            _ if path.contains("/digests/") => true,
            "Allocate" => true,
            "Create" | "Read" => path.contains("/runs"),
            _ => false,
        };
        assert!(is_optional, "{said}");
        return;
    };
    assert_eq!(failed.code, code, "{failed:?} {said}");
    if ["Read", "Write", "Allocate"].contains(kind) && holds_blocks(path) {
        assert!(failed.offset.is_some(), "{failed:?} {said}");
        assert!(failed.message.contains(disk), "{failed:?} {said}");
    } else {
        assert!(failed.message.contains('/'), "{failed:?} {said}");
    }
}

#[test]
fn every_error_of_a_staged_run_is_told_and_mended() {
    try_out(Kind::Ext4, ApplyChoice::Staged, grows, |trial| {
        trial.meets_every_error();
    });
}

#[test]
fn every_error_of_a_reflinked_run_is_told_and_mended() {
    try_out(Kind::Xfs, ApplyChoice::Reflink, grows, |trial| {
        trial.meets_every_error();
    });
}

#[test]
fn every_error_of_a_run_in_place_is_told_and_mended() {
    try_out(Kind::Ext4, ApplyChoice::Inplace, shrinks, |trial| {
        trial.meets_every_error();
    });
}

#[test]
fn every_error_of_a_run_onto_what_does_not_exist_is_told_and_mended() {
    try_out(Kind::Ext4, ApplyChoice::Auto, fresh, |trial| {
        trial.meets_every_error();
    });
}

#[test]
fn what_could_not_be_synced_is_shipped_again() {
    try_out(Kind::Ext4, ApplyChoice::Staged, grows, |trial| {
        trial.is_never_synced_at_last();
    });
    try_out(Kind::Xfs, ApplyChoice::Reflink, grows, |trial| {
        trial.is_never_synced_at_last();
    });
    try_out(Kind::Ext4, ApplyChoice::Auto, fresh, |trial| {
        trial.is_never_synced_at_last();
    });
}

/// The first calls of every kind that can be are interrupted, one in three, and only `bytes` are
/// read and written at once.
fn disturbances(bytes: usize) -> String {
    let interrupted = KINDS.iter().flat_map(|(_, kind)| {
        (1..400)
            .step_by(3)
            .map(move |n| format!("{kind}:{n}:EINTR"))
    });
    let short = ["read", "write"].map(|kind| format!("{kind}:1+:short={bytes}"));
    interrupted.chain(short).collect::<Vec<_>>().join(",")
}

#[test]
fn interruptions_and_short_calls_are_not_noticed() {
    for (kind, apply, disks) in [
        (Kind::Ext4, ApplyChoice::Staged, two as fn(&Ground) -> _),
        (Kind::Xfs, ApplyChoice::Reflink, two),
        (Kind::Ext4, ApplyChoice::Inplace, two),
        (Kind::Ext4, ApplyChoice::Auto, fresh),
    ] {
        try_out(kind, apply, disks, |trial| {
            for reread in [false, true] {
                trial.wish.reread = reread;
                for bytes in [1000, 5000] {
                    let disturbances = disturbances(bytes);
                    trial.source = Source::new(&trial.ground, &disturbances);
                    let said = trial.runs(&disturbances);
                    assert!(
                        said.contains("Error(4)") && said.contains("Short"),
                        "{said}"
                    );
                }
            }
        });
    }
}

#[test]
fn a_source_that_cannot_be_read_is_named_with_its_byte() {
    for (apply, disks) in [
        (ApplyChoice::Staged, grows as fn(&Ground) -> _),
        (ApplyChoice::Auto, fresh),
    ] {
        try_out(Kind::Ext4, apply, disks, |trial| {
            // The source of 40 blocks has 28 that are data, and one short one.
            for place in [1, 14, 29] {
                let faults = format!("read@source:{place}:EIO");
                trial.source = Source::new(&trial.ground, &faults);
                trial.ground.reset(&trial.disks);
                let mut agent = Agent::start(&trial.ground, "");
                let result = trial
                    .source
                    .sync(&trial.ground, &mut agent, &trial.disks, trial.wish);
                let (status, said) = agent.end();
                assert!(status.success(), "{said}");
                let Err(Stopped::Failed(Role::Sender, failed)) = result else {
                    panic!("{faults}: {result:?}");
                };
                let source = trial.disks[0].source.display().to_string();
                assert_eq!(failed.code, FailureCode::Io, "{failed:?}");
                assert!(failed.message.contains(&source), "{failed:?}");
                assert!(failed.offset.is_some_and(|at| at < trial.disks[0].size()));
                trial.source = Source::new(&trial.ground, "");
                trial.is_mended(&Err(failed), &faults);
            }
        });
    }
}

#[test]
fn a_disk_that_breaks_for_good_is_mended_by_the_next_run_on_a_whole_one() {
    for (kind, apply, disks) in [
        (Kind::Ext4, ApplyChoice::Staged, grows as fn(&Ground) -> _),
        (Kind::Xfs, ApplyChoice::Reflink, shrinks),
        (Kind::Ext4, ApplyChoice::Auto, fresh),
    ] {
        try_out(kind, apply, disks, |trial| {
            let changes = trial.runs("log").matches("fault: ").count();
            for place in (1..changes).step_by(stride(20)) {
                for (error, _) in ERRORS {
                    let faults = format!("change:{place}+:{error}");
                    let (result, said) = trial.meets(&faults);
                    if result.is_ok() && !said.contains("Error(") {
                        break;
                    }
                    trial.is_mended(&result, &format!("{faults}: {said}"));
                }
            }
        });
    }
}

#[test]
fn a_file_system_without_space_is_left_as_it_was() {
    for (kind, apply, disks) in [
        (Kind::Ext4, ApplyChoice::Staged, grows as fn(&Ground) -> _),
        (Kind::Xfs, ApplyChoice::Reflink, shrinks),
        (Kind::Ext4, ApplyChoice::Auto, fresh),
    ] {
        try_out(kind, apply, disks, |trial| {
            // Nothing more can be written to what lies beside the destination, or allocated in it.
            for place in (1..60).step_by(stride(7)) {
                let full = [
                    "write@/images/",
                    "allocate@/images/to/disk\"",
                    "create@/images/",
                ]
                .map(|calls| format!("{calls}:{place}+:ENOSPC"));
                let faults = full.join(",");
                let (result, said) = trial.meets(&faults);
                let mended = trial.is_mended(&result, &format!("{faults}: {said}"));
                if let Err(failed) = result {
                    assert_eq!(failed.code, FailureCode::NoSpace, "{failed:?}: {said}");
                    assert!(!mended.resumed[0], "{said}");
                }
            }
        });
    }
}
