//! What the controller is told: one queue for all answers, bounded by what the controller reads.
//!
//! A controller may be slow, and its connection too. It has room for some answers, news of progress
//! are left out while it is behind, and one that asks on and on and reads nothing is given up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvm_clone_protocol::frame::Frame;
use kvm_clone_protocol::message::{FailureCode, Message, Warning};
use tokio::sync::{Notify, mpsc};

use crate::failure::{Failure, short};

/// Bytes that may wait. All requests that may be under way are answered in this, each at length.
const MAX_WAITING: usize = 8 * 1024 * 1024;

/// What a frame takes in memory beside its bytes.
const FRAME_COST: usize = 128;

/// With more than this waiting, news are left out, and lists wait: a hundred answers of the usual
/// size and a full pipe are ahead of them.
const MUCH: usize = 64 * 1024;

/// Where answers to the controller go. It may have hung up; then the process is about to end.
#[derive(Debug, Clone)]
pub(crate) struct Answers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: mpsc::UnboundedSender<Frame>,
    /// Bytes that the queue takes.
    waiting: AtomicUsize,
    taken: Notify,
}

/// The other end of [`Answers`].
#[derive(Debug)]
pub(crate) struct Outbox {
    queue: mpsc::UnboundedReceiver<Frame>,
    shared: Arc<Shared>,
}

fn cost(frame: &Frame) -> usize {
    FRAME_COST + frame.wire_len()
}

/// An empty queue.
pub(crate) fn queue() -> (Answers, Outbox) {
    let (to, queue) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        queue: to,
        waiting: AtomicUsize::new(0),
        taken: Notify::new(),
    });
    (Answers(Arc::clone(&shared)), Outbox { queue, shared })
}

impl Answers {
    pub(crate) fn say(&self, message: &impl Message) {
        match message.frame() {
            Ok(frame) => self.send(frame),
            Err(error) => self.fail(None, error.into()),
        }
    }

    pub(crate) fn fail(&self, disk: Option<u32>, failure: Failure) {
        if let Ok(frame) = failure.message(disk).frame() {
            self.send(frame);
        }
    }

    pub(crate) fn answer<M: Message>(&self, disk: Option<u32>, result: Result<M, Failure>) {
        match result {
            Ok(message) => self.say(&message),
            Err(failure) => self.fail(disk, failure),
        }
    }

    pub(crate) fn warn(&self, disk: u32, warnings: Vec<String>) {
        for message in warnings {
            self.say(&Warning {
                disk: Some(disk),
                message: short(message),
            });
        }
    }

    /// Says what will be said again, unless much is unread.
    pub(crate) fn news(&self, message: &impl Message) {
        if self.waiting() <= MUCH {
            self.say(message);
        }
    }

    /// Waits until what was said before is read, but for a little.
    pub(crate) async fn room(&self) {
        loop {
            let taken = self.0.taken.notified();
            if self.waiting() <= MUCH {
                return;
            }
            taken.await;
        }
    }

    fn waiting(&self) -> usize {
        self.0.waiting.load(Ordering::Acquire)
    }

    fn send(&self, frame: Frame) {
        self.0.waiting.fetch_add(cost(&frame), Ordering::AcqRel);
        let _ = self.0.queue.send(frame);
    }
}

impl Outbox {
    /// The next answer. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        let frame = self.queue.recv().await?;
        self.shared
            .waiting
            .fetch_sub(cost(&frame), Ordering::AcqRel);
        self.shared.taken.notify_waiters();
        Some(frame)
    }

    /// # Errors
    /// [`Failure`] when more is unread than a controller that reads would leave.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.shared.waiting.load(Ordering::Acquire) <= MAX_WAITING {
            return Ok(());
        }
        let message = "the controller asks and does not read the answers";
        Err(Failure::new(FailureCode::Protocol, message))
    }
}

#[cfg(test)]
mod tests {
    use kvm_clone_protocol::message::Alive;

    use super::*;

    fn long() -> Failure {
        Failure::new(FailureCode::Io, "x".repeat(4000))
    }

    #[tokio::test]
    async fn what_is_not_read_is_bounded() {
        let (answers, mut outbox) = queue();
        let mut said = 0;
        while outbox.check().is_ok() {
            answers.fail(None, long());
            said += 4000;
        }
        assert!((MAX_WAITING / 2..=MAX_WAITING).contains(&said));
        while outbox.shared.waiting.load(Ordering::Acquire) > 0 {
            assert!(outbox.next().await.is_some());
        }
        assert_eq!(outbox.check(), Ok(()));
    }

    #[tokio::test]
    async fn news_are_left_out_and_lists_wait_while_much_is_unread() {
        let (answers, mut outbox) = queue();
        while answers.waiting() <= MUCH {
            answers.fail(None, long());
        }
        let before = answers.waiting();
        answers.news(&Alive {});
        assert_eq!(answers.waiting(), before);
        tokio::select! {
            biased;
            () = answers.room() => panic!("there is room"),
            _ = outbox.next() => {}
        }
        answers.room().await;
        answers.news(&Alive {});
        let (long, alive) = (long().message(None), Alive {});
        let [taken, added] = [long.frame(), alive.frame()].map(|frame| cost(&frame.unwrap()));
        assert_eq!(answers.waiting(), before - taken + added);
    }
}
