//! The agent of the destination dies at its first call that changes something, at its second, and
//! so on, until it lives through the run. Then the one that recovers does.

use std::fmt::Write as _;

use kvm_clone_protocol::message::{ApplyChoice, Fate, Recovery};
use kvm_clone_tests::mount::Kind;

use crate::agent::{Agent, Broken};
use crate::ground::Seen;
use crate::run::Stopped;
use crate::stride;
use crate::trial::{Trial, fresh, grows, shrinks, tell, try_out, two};

impl Trial {
    /// A run from the beginning, in which the agent dies. What it said; `None` when it lived.
    fn breaks_off(&mut self, faults: &str) -> Option<String> {
        self.ground.reset(&self.disks);
        let mut agent = Agent::start(&self.ground, faults);
        match self
            .source
            .sync(&self.ground, &mut agent, &self.disks, self.wish)
        {
            Ok(_) => None,
            Err(Stopped::Died) => Some(agent.killed()),
            Err(Stopped::Failed(role, failed)) => panic!("{role:?}: {failed:?}: {}", agent.said()),
        }
    }

    /// Dies as `fault` says for each step; `allowed` tells what may be seen right after that.
    /// One in `one_in` is tried, recovered in turn in one way and the other, or in both if all are.
    fn dies_at_every_step(
        &mut self,
        fault: fn(usize) -> String,
        one_in: usize,
        allowed: fn(&[Seen]) -> bool,
    ) {
        let ways = [Recovery::Finish, Recovery::RollBack];
        for (turn, step) in (1..).step_by(one_in).enumerate() {
            let chosen = match one_in {
                1 => &ways[..],
                _ => &ways[turn % 2..=turn % 2],
            };
            for recovery in chosen {
                let Some(said) = self.breaks_off(&fault(step)) else {
                    self.is_done("without a death");
                    tell(&format!("{} of {} steps", turn, step - 1));
                    return;
                };
                let at = format!("{recovery:?} after {said}");
                let seen = self.seen();
                assert!(allowed(&seen), "{seen:?} {at}");
                let mut agent = Agent::start(&self.ground, "");
                let fates = agent.recover(*recovery).unwrap();
                self.is_whole(&fates, *recovery, &at);
                self.is_completed_by_the_next_run(&mut agent, &at);
            }
        }
    }

    /// What holds after a recovery that went through: all are one version under their names.
    fn is_whole(&self, fates: &[Fate], recovery: Recovery, at: &str) {
        let seen = self.seen();
        let at = format!("{seen:?} {fates:?} {at}");
        let unfinished = [Fate::Stuck, Fate::Unfinished, Fate::Running, Fate::Torn];
        assert!(fates.iter().all(|fate| !unfinished.contains(fate)), "{at}");
        assert!(seen.iter().all(|each| *each == seen[0]), "{at}");
        assert!(
            [self.disks[0].before(), Seen::New].contains(&seen[0]),
            "{at}"
        );
        let is_finished = fates.contains(&Fate::Finished);
        assert!(!is_finished || seen[0] == Seen::New, "{at}");
        if recovery == Recovery::RollBack {
            assert_eq!(self.ground.left(&self.disks), [""; 0], "{at}");
        }
    }

    /// The run breaks off at some places, and the recovery from that at many.
    fn recovery_dies_at_every_step(&mut self, one_in: usize) {
        let (commit, end) = commit(&self.runs("log"));
        let committed = [commit, (commit + end) / 2, end - 3].map(|step| (step, Recovery::Finish));
        let open = (commit - 2, Recovery::RollBack);
        for (step, recovery) in committed.into_iter().chain([open]) {
            for (tried, death) in (1..).step_by(one_in).enumerate() {
                let said = self.breaks_off(&format!("change:{step}:die"));
                let mut at = format!("{recovery:?} after {said:?}");
                let mut agent = Agent::start(&self.ground, &format!("change:{death}:die"));
                let lived = match agent.recover(recovery) {
                    Err(Broken::Gone) => {
                        let _ = write!(at, " and {}", agent.killed());
                        agent = Agent::start(&self.ground, "");
                        let fates = agent.recover(recovery).unwrap();
                        self.is_whole(&fates, recovery, &at);
                        false
                    }
                    recovered => {
                        self.is_whole(&recovered.unwrap(), recovery, &at);
                        agent = Agent::start(&self.ground, "");
                        true
                    }
                };
                let expected = match recovery {
                    Recovery::Finish => Seen::New,
                    _ => Seen::Old,
                };
                assert_eq!(self.seen()[0], expected, "{at}");
                assert_eq!(self.ground.left(&self.disks), [""; 0], "{at}");
                if lived {
                    tell(&format!(
                        "step {step} of {end}: {tried} of {} steps",
                        death - 1
                    ));
                    break;
                }
                if one_in == 1 {
                    self.is_completed_by_the_next_run(&mut agent, &at);
                }
            }
        }
    }
}

/// In what an agent has logged, the first change after the commit was noted durably, and the
/// number of all changes.
fn commit(log: &str) -> (usize, usize) {
    let lines = log.lines().filter(|line| line.starts_with("fault: "));
    let changes: Vec<&str> = lines.filter(|line| !line.contains(" Read ")).collect();
    let noted = changes
        .iter()
        .rposition(|line| line.contains("Sync") && line.contains("/runs/"));
    (noted.unwrap() + 2, changes.len())
}

/// Instead of a change the process dies.
fn at_a_change(step: usize) -> String {
    format!("change:{step}:die")
}

/// Of a write a part is done: less than a header, or than an entry of the journal.
fn in_a_write(step: usize) -> String {
    format!("write:{step}:torn=30")
}

fn is_not_torn(seen: &[Seen]) -> bool {
    !seen.contains(&Seen::Torn)
}

fn has_a_version(seen: &[Seen]) -> bool {
    is_not_torn(seen) && !seen.contains(&Seen::Absent)
}

/// Nothing can start a mixture: one is away before the other is new.
fn is_no_mixture(seen: &[Seen]) -> bool {
    is_not_torn(seen) && (!seen.contains(&Seen::Old) || !seen.contains(&Seen::New))
}

#[test]
fn a_staged_run_may_die_at_every_step() {
    try_out(Kind::Ext4, ApplyChoice::Staged, grows, |trial| {
        trial.dies_at_every_step(at_a_change, stride(5), is_not_torn);
    });
}

#[test]
fn a_staged_run_may_die_in_every_write() {
    try_out(Kind::Ext4, ApplyChoice::Staged, shrinks, |trial| {
        trial.dies_at_every_step(in_a_write, stride(5), is_not_torn);
    });
}

#[test]
fn a_reflinked_run_may_die_at_every_step() {
    try_out(Kind::Xfs, ApplyChoice::Reflink, shrinks, |trial| {
        trial.dies_at_every_step(at_a_change, stride(5), has_a_version);
    });
}

#[test]
fn a_run_onto_what_does_not_exist_may_die_at_every_step() {
    try_out(Kind::Ext4, ApplyChoice::Auto, fresh, |trial| {
        trial.dies_at_every_step(at_a_change, stride(5), is_not_torn);
    });
}

#[test]
fn a_staged_run_of_two_disks_may_die_at_every_step() {
    try_out(Kind::Ext4, ApplyChoice::Staged, two, |trial| {
        trial.dies_at_every_step(at_a_change, stride(12), is_no_mixture);
    });
}

#[test]
fn a_reflinked_run_of_two_disks_may_die_at_every_step() {
    try_out(Kind::Xfs, ApplyChoice::Reflink, two, |trial| {
        trial.dies_at_every_step(at_a_change, stride(12), has_a_version);
    });
}

#[test]
fn the_recovery_of_staged_disks_may_die_at_every_step() {
    try_out(Kind::Ext4, ApplyChoice::Staged, two, |trial| {
        trial.recovery_dies_at_every_step(stride(40));
    });
}

#[test]
fn the_recovery_of_reflinked_disks_may_die_at_every_step() {
    try_out(Kind::Xfs, ApplyChoice::Reflink, two, |trial| {
        trial.recovery_dies_at_every_step(stride(9));
    });
}
