//! Data connections that are cut, stall, pause, dribble or are slow; and a controller that falls
//! silent.

use std::time::{Duration, Instant};

use kvm_clone_protocol::message::{ApplyChoice, FailureCode, Fate, Recovery};
use kvm_clone_tests::image::Random;
use kvm_clone_tests::mount::Kind;

use crate::agent::Agent;
use crate::ground::{Disk, Ground, Length, Seen, on_ground};
use crate::relay::{Plan, Trouble, Way};
use crate::run::{Done, Source, Stopped, Wish};
use crate::stride;
use crate::trial::{Trial, fresh, grows, tell, try_out};

impl Trial {
    /// A run from the beginning, over a connection to which this happens.
    fn goes_over(&mut self, plans: &[Plan]) -> Result<Done, Stopped> {
        self.ground.reset(&self.disks);
        let mut agent = Agent::start(&self.ground, "");
        self.source.plans = Some(plans.to_vec());
        let result = self
            .source
            .sync(&self.ground, &mut agent, &self.disks, self.wish);
        self.source.plans = None;
        let (status, said) = agent.end();
        assert!(status.success(), "{plans:?}: {said}");
        result
    }

    /// What holds after a connection was lost: the old version is there, and the next run ships
    /// only what has not arrived.
    fn is_taken_up(&mut self, result: &Result<Done, Stopped>, at: &str) -> Done {
        match result {
            Ok(_) => self.is_done(at),
            Err(Stopped::Failed(_, failed)) => {
                assert_eq!(failed.code, FailureCode::LinkLost, "{failed:?} {at}");
                assert_eq!(self.seen()[0], self.disks[0].before(), "{at}");
            }
            Err(Stopped::Died) => panic!("{at}"),
        }
        let mut agent = Agent::start(&self.ground, "");
        self.is_completed_by_the_next_run(&mut agent, at)
    }

    /// Cuts at the first bytes, at the last ones, and at many between.
    fn is_cut_anywhere(&mut self) {
        let whole = self.goes_over(&[]).unwrap();
        let mut random = Random::new(8);
        let (mut saved, mut tried) = (0, 0);
        for way in Way::BOTH {
            let end = self.source.arrived.as_ref().unwrap().at(way);
            let places: Vec<u64> = match stride(2) {
                1 => (0..end)
                    .step_by(usize::try_from(end.div_ceil(400)).unwrap())
                    .collect(),
                _ => (0..9).map(|_| random.below(end)).collect(),
            };
            let edges = [0, 1, 15, 16, 17, end.saturating_sub(40), end - 1];
            for place in places.into_iter().chain(edges) {
                let plan = (way, Trouble::CutAt(place));
                let result = self.goes_over(&[plan]);
                let next = self.is_taken_up(&result, &format!("{plan:?}"));
                assert!(next.shipped <= whole.shipped, "{plan:?}");
                saved += whole.shipped - next.shipped;
                tried += 1;
            }
        }
        assert!(saved > 0, "nothing of what arrived was ever used");
        tell(&format!("{tried} cuts"));
    }
}

#[test]
fn a_connection_may_be_cut_at_any_byte() {
    try_out(
        Kind::Ext4,
        ApplyChoice::Staged,
        grows,
        Trial::is_cut_anywhere,
    );
    try_out(Kind::Ext4, ApplyChoice::Auto, fresh, Trial::is_cut_anywhere);
}

#[test]
fn a_connection_may_be_slow_or_give_bytes_in_any_pieces() {
    let late = Trouble::Late(Duration::from_millis(120));
    let plans = [
        Way::BOTH.map(|way| (way, late)),
        Way::BOTH.map(|way| (way, Trouble::Dribble(1))),
        Way::BOTH.map(|way| (way, Trouble::Dribble(2))),
        // Below the silence that is borne, by far enough for a machine that is busy.
        Way::BOTH.map(|way| (way, Trouble::PauseAt(700, Duration::from_secs(8)))),
    ];
    for disks in [grows as fn(&Ground) -> _, fresh] {
        try_out(Kind::Ext4, ApplyChoice::Auto, disks, |trial| {
            for plan in &plans {
                trial.goes_over(plan).unwrap();
                trial.is_done(&format!("{plan:?}"));
            }
        });
    }
}

#[test]
fn a_connection_that_never_comes_is_done_without() {
    for disks in [grows as fn(&Ground) -> _, fresh] {
        try_out(Kind::Ext4, ApplyChoice::Auto, disks, |trial| {
            trial.source.misses_one = true;
            for plan in [
                &[] as &[Plan],
                &Way::BOTH.map(|way| (way, Trouble::Dribble(3))),
            ] {
                let since = Instant::now();
                trial.goes_over(plan).unwrap();
                trial.is_done(&format!("{plan:?}"));
                // Nobody waits until it is given up.
                assert!(since.elapsed() < Duration::from_secs(20), "{plan:?}");
            }
            let cut = [(Way::ToDestination, Trouble::CutAt(300_000))];
            let result = trial.goes_over(&cut);
            trial.is_taken_up(&result, "cut");
        });
    }
}

/// A run that stalls. Gives how long that took to be noticed.
fn stalls(ground: &Ground, disk: Disk, plan: &[Plan]) -> Duration {
    let mut source = Source::new(ground, "");
    let mut agent = Agent::start(ground, "");
    source.plans = Some(plan.to_vec());
    let (disks, wish) = ([disk], Wish::new(ApplyChoice::Staged));
    let since = Instant::now();
    let result = source.sync(ground, &mut agent, &disks, wish);
    let elapsed = since.elapsed();
    let Err(Stopped::Failed(_, failed)) = result else {
        panic!("{plan:?}: {result:?}");
    };
    assert_eq!(failed.code, FailureCode::LinkLost, "{plan:?}: {failed:?}");
    assert_eq!(disks[0].seen(), disks[0].before(), "{plan:?}");
    drop(agent);
    source.plans = None;
    let mut agent = Agent::start(ground, "");
    source.sync(ground, &mut agent, &disks, wish).unwrap();
    assert_eq!(disks[0].seen(), Seen::New, "{plan:?}");
    elapsed
}

#[test]
fn a_connection_that_stalls_is_lost_after_twenty_seconds() {
    on_ground(|| {
        let ground = &Ground::new(Kind::Ext4);
        let stall = |at| move |way| (way, Trouble::StallAt(at));
        let both = [0, 10, 16, 300].map(|at| Way::BOTH.map(stall(at)).to_vec());
        let one = [(0, 0), (1, 0), (0, 16), (1, 16), (1, 300), (0, 500_000)];
        let one = one.map(|(way, at)| vec![stall(at)(Way::BOTH[way])]);
        let plans: Vec<_> = both.into_iter().chain(one).collect();
        std::thread::scope(|scope| {
            let runs: Vec<_> = plans
                .iter()
                .enumerate()
                .map(|(number, plan)| {
                    let disk = ground.disk(&format!("disk-{number}"), Length::Grows);
                    disk.reset();
                    (plan, scope.spawn(move || stalls(ground, disk, plan)))
                })
                .collect();
            for (plan, run) in runs {
                let elapsed = run.join().unwrap();
                // Twenty seconds, or thirty for a connection that has not come into being; and
                // each of the two may notice only when the other one hangs up.
                let bounds = Duration::from_secs(15)..Duration::from_secs(35);
                assert!(bounds.contains(&elapsed), "{plan:?}: {elapsed:?}");
            }
        });
    });
}

#[test]
fn an_agent_whose_controller_falls_silent_ends_and_keeps_what_has_arrived() {
    try_out(Kind::Ext4, ApplyChoice::Staged, grows, |trial| {
        trial.ground.reset(&trial.disks);
        let mut agent = Agent::start(&trial.ground, "");
        // What is shipped stops in the middle.
        trial.source.plans = Some(vec![(Way::ToDestination, Trouble::StallAt(500_000))]);
        agent.falls_silent();
        let since = Instant::now();
        let result = trial
            .source
            .sync(&trial.ground, &mut agent, &trial.disks, trial.wish);
        assert!(result.is_err(), "{result:?}");
        let (status, said) = agent.ends_by_itself();
        let elapsed = since.elapsed();
        assert!(elapsed < Duration::from_secs(30), "{elapsed:?}");
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(said.contains("silent"), "{said}");
        let mut agent = Agent::start(&trial.ground, "");
        assert_eq!(agent.recover(Recovery::List).unwrap(), [Fate::Waiting]);
        trial.source.plans = None;
        let next = trial
            .source
            .sync(&trial.ground, &mut agent, &trial.disks, trial.wish);
        assert!(next.unwrap().resumed[0]);
        trial.is_done("after silence");
    });
}
