//! An image that a power cut has left: what is found on it, what recovery makes of that, and
//! whether another run succeeds.

use super::ground::{Ground, Mounted};
use super::story::{Seen, Story};
use super::subject::Subject;
use crate::mount::FileSystem;

/// The image, mounted. Fields are dropped in order.
pub(super) struct Image<'a> {
    subject: &'a dyn Subject,
    ground: &'a Ground,
    story: &'a Story,
    /// What must not be.
    wrong: &'a mut Vec<String>,
    _state: FileSystem,
    mounted: Mounted,
}

impl<'a> Image<'a> {
    pub(super) fn mount(
        subject: &'a dyn Subject,
        ground: &'a Ground,
        story: &'a Story,
        wrong: &'a mut Vec<String>,
    ) -> Self {
        let mounted = ground.mount();
        Self {
            subject,
            ground,
            story,
            wrong,
            _state: ground.bind_state(),
            mounted,
        }
    }

    /// Whether the run has left anything beside the disk.
    pub(super) fn has_left_something(&self) -> bool {
        !self.mounted.beside().is_empty()
    }

    /// What the cut has left of the disk.
    pub(super) fn find(&mut self, is_promised: bool) -> Seen {
        let found = self.story.seen(&self.ground.disk());
        let wrong = match &found {
            Seen::Torn(why) if !self.subject.may_tear() => format!("torn: {why}"),
            Seen::Absent if !self.subject.may_hide() => "it has lost its name".to_owned(),
            Seen::Old if is_promised => "the old version, after success".to_owned(),
            Seen::Old | Seen::New | Seen::Absent | Seen::Torn(_) => return found,
        };
        self.wrong.push(wrong);
        found
    }

    /// What recovery makes of it.
    pub(super) fn recover(&mut self, found: &Seen) -> Seen {
        let disk = self.ground.disk();
        let is_called_whole = self.subject.recover(&self.ground.controller, &disk);
        let recovered = self.story.seen(&disk);
        match (found, &recovered) {
            (_, Seen::New) | (Seen::Old, Seen::Old) | (Seen::Torn(_), Seen::Torn(_)) => {}
            _ => self
                .wrong
                .push(format!("recovery made {recovered:?} of {found:?}")),
        }
        let is_torn = matches!(recovered, Seen::Torn(_));
        match (self.subject.may_tear(), is_called_whole) {
            (true, true) if is_torn => self.wrong.push("torn, and called whole".to_owned()),
            (false, false) => self
                .wrong
                .push(format!("not called whole, as {recovered:?}")),
            _ => {}
        }
        let mut left = self.mounted.beside();
        left.retain(|name| !self.subject.may_leave(name));
        if !left.is_empty() {
            self.wrong.push(format!("left by recovery: {left:?}"));
        }
        recovered
    }

    /// What another run makes of it.
    pub(super) fn run_again(&mut self) -> Seen {
        let (source, disk) = (self.ground.source(), self.ground.disk());
        self.subject
            .replace(&self.ground.controller, &source, &disk);
        let (again, left) = (self.story.seen(&disk), self.mounted.beside());
        if again != Seen::New || !left.is_empty() {
            self.wrong
                .push(format!("another run left {again:?} and {left:?}"));
        }
        again
    }
}
