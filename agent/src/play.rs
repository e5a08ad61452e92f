//! A session under way: played to its end, and what the controller hears of it.

use std::sync::Arc;

use kvm_clone_protocol::message::{Ended, Progress};
use tokio::sync::RwLock;

use crate::answers::Answers;
use crate::failure::Failure;
use crate::links::Links;
use crate::pool::Pool;
use crate::serve::blocking;
use crate::slot::{Keeping, Ready};

/// What sessions are played on.
pub(crate) struct Stage {
    pub(crate) answers: Answers,
    pub(crate) pool: Pool,
    /// Read by whoever still notes what a source held.
    pub(crate) noting: Arc<RwLock<()>>,
}

impl Stage {
    /// Plays a session to its end, and tells the controller how it ended.
    pub(crate) async fn play(&self, disk: u32, mut ready: Ready, links: Links) {
        let progress = Arc::clone(&ready.progress);
        let keeping = ready.keeping.take();
        match self.play_session(disk, ready, links).await {
            Ok(ended) => {
                self.answers.say(&ended);
                keeping.into_iter().for_each(|keeping| self.note(keeping));
            }
            Err(failure) => {
                progress.fail(failure.code);
                self.answers.fail(Some(disk), failure);
            }
        }
    }

    async fn play_session(&self, disk: u32, ready: Ready, links: Links) -> Result<Ended, Failure> {
        let ships = ready.session.params.ship;
        let report = |counters| self.answers.news(&Progress { disk, counters });
        let outcome = ready.session.run(links, &self.pool, report).await?;
        if let Some(watch) = ready.watch
            && let Some(warning) = watch.look()?
        {
            self.answers.warn(disk, vec![warning]);
        }
        if ships {
            ready.progress.end();
        }
        Ok(Ended {
            disk,
            counters: outcome.counters,
            first_difference: outcome.first_difference,
            root: ships.then_some(outcome.root),
        })
    }

    /// The controller does not wait for that.
    fn note(&self, keeping: Keeping) {
        let noting = Arc::clone(&self.noting).try_read_owned();
        tokio::spawn(async move {
            let noted = blocking(move || {
                keeping.record();
                Ok(())
            });
            let _ = noted.await;
            drop(noting);
        });
    }
}
