//! A run that is tried again and again, each time with another fault.

use kvm_clone_protocol::message::ApplyChoice;
use kvm_clone_tests::mount::Kind;

use crate::agent::Agent;
use crate::ground::{Disk, Ground, Length, Seen, on_ground};
use crate::run::{Done, Source, Wish};

/// A run that is to be broken off. Fields are dropped in order.
pub(crate) struct Trial {
    pub(crate) source: Source,
    pub(crate) disks: Vec<Disk>,
    pub(crate) wish: Wish,
    pub(crate) ground: Ground,
}

/// Tries something on a file system of its own, or says that it is skipped.
pub(crate) fn try_out(
    kind: Kind,
    apply: ApplyChoice,
    disks: fn(&Ground) -> Vec<Disk>,
    test: impl FnOnce(&mut Trial) + Send,
) {
    on_ground(|| test(&mut Trial::new(kind, apply, disks)));
}

impl Trial {
    fn new(kind: Kind, apply: ApplyChoice, disks: fn(&Ground) -> Vec<Disk>) -> Self {
        let ground = Ground::new(kind);
        Self {
            source: Source::new(&ground, ""),
            disks: disks(&ground),
            wish: Wish::new(apply),
            ground,
        }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.disks.iter().map(Disk::seen).collect()
    }

    /// A run from the beginning, to its end.
    pub(crate) fn runs(&mut self, faults: &str) -> String {
        self.ground.reset(&self.disks);
        let mut agent = Agent::start(&self.ground, faults);
        let done = self
            .source
            .sync(&self.ground, &mut agent, &self.disks, self.wish);
        let (status, said) = agent.end();
        assert!(done.is_ok() && status.success(), "{done:?}: {said}");
        self.is_done(faults);
        said
    }

    /// The next run makes all the new version, and leaves nothing. Gives how it went.
    pub(crate) fn is_completed_by_the_next_run(&mut self, agent: &mut Agent, at: &str) -> Done {
        let next = self
            .source
            .sync(&self.ground, agent, &self.disks, self.wish);
        let next = next.unwrap_or_else(|stopped| panic!("the next run: {stopped:?} {at}"));
        self.is_done(at);
        next
    }

    /// All are the new version, and nothing lies beside them.
    pub(crate) fn is_done(&self, at: &str) {
        assert!(self.seen().iter().all(|seen| *seen == Seen::New), "{at}");
        assert_eq!(self.ground.left(&self.disks), [""; 0], "{at}");
    }
}

/// For whoever reads along.
pub(crate) fn tell(what: &str) {
    use std::io::Write as _;
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    let _ = writeln!(std::io::stderr(), "{test}: {what}");
}

pub(crate) fn grows(ground: &Ground) -> Vec<Disk> {
    vec![ground.disk("disk", Length::Grows)]
}

pub(crate) fn shrinks(ground: &Ground) -> Vec<Disk> {
    vec![ground.disk("disk", Length::Shrinks)]
}

pub(crate) fn fresh(ground: &Ground) -> Vec<Disk> {
    vec![ground.new_disk("disk")]
}

pub(crate) fn two(ground: &Ground) -> Vec<Disk> {
    vec![
        ground.disk("one", Length::Grows),
        ground.disk("other", Length::Shrinks),
    ]
}
