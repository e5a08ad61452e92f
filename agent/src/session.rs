//! Drives one half of a session: the machine decides, the pool works, the links carry.

use std::sync::Arc;
use std::time::Duration;

use kvm_clone_protocol::digest::Digester;
use kvm_clone_protocol::message::{Compression, Counters, IoChoice, SessionParams};
use kvm_clone_protocol::sync::{DiskDone, DiskOp, Machine, Outcome, Ticket};
use kvm_clone_protocol::units::Geometry;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use crate::channel::BEAT;
use crate::compress::Compressor;
use crate::disk::{Disk, Kept, SessionContext};
use crate::failure::Failure;
use crate::links::{Event, Links};
use crate::pool::Pool;

/// How often the controller hears how far a session is.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

type Done = (Ticket, Result<DiskDone, Failure>);

/// One half of a session, ready to run.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) machine: Box<dyn Machine>,
    /// `None` for a destination that neither exists nor is to be made.
    pub(crate) disk: Option<Arc<Disk>>,
    pub(crate) geometry: Geometry,
    pub(crate) params: SessionParams,
    pub(crate) compression: Compression,
    /// Digests of the disk that are kept from run to run.
    pub(crate) kept: Option<Arc<Kept>>,
    /// How the disk is read.
    pub(crate) io: IoChoice,
}

impl Session {
    /// Runs to the end, and reports counters on the way. The disk is looked at while the links are
    /// still coming into being.
    ///
    /// # Errors
    /// [`Failure`] of the disk, the links or the other end.
    pub(crate) async fn run(
        mut self,
        mut links: Links,
        pool: &Pool,
        mut report: impl FnMut(Counters),
    ) -> Result<Outcome, Failure> {
        let compressor = Arc::new(Compressor::new(self.compression));
        let (done_to, mut done) = mpsc::unbounded_channel::<Done>();
        let mut ticks = tokio::time::interval(PROGRESS_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut beats = tokio::time::interval_at(Instant::now() + BEAT, BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.turn(&mut links, pool, &compressor, &done_to);
            compressor.set_wire_bound(self.machine.is_wire_bound());
            if let Some(outcome) = self.outcome(&links)
                && links.is_empty()
            {
                return Ok(outcome);
            }
            let patience = links.patience();
            tokio::select! {
                Some((ticket, result)) = done.recv() => {
                    self.machine.handle_disk(ticket, result?)?;
                    while let Ok((ticket, result)) = done.try_recv() {
                        self.machine.handle_disk(ticket, result?)?;
                    }
                }
                event = links.next() => match event? {
                    Event::Moved => {}
                    Event::Frame(frame) => {
                        self.machine.handle_frame(&frame)?;
                        while let Some(frame) = links.arrived() {
                            self.machine.handle_frame(&frame)?;
                        }
                    }
                    // If the peer has said its last word, all is well, and what could not be
                    // written is nothing that it waited for. Ours it must have been given.
                    Event::Lost if self.machine.outcome().is_none() => links.fall_silent(),
                    Event::Lost if links.is_empty() => {}
                    Event::Lost | Event::Over => return Err(links.failure().await),
                },
                () = tokio::time::sleep_until(patience) => {
                    if links.patience() <= Instant::now() {
                        return Err(links.failure().await);
                    }
                }
                _ = beats.tick() => links.beat()?,
                _ = ticks.tick() => report(self.counted(self.machine.counters(), &links)),
            }
        }
    }

    fn outcome(&self, links: &Links) -> Option<Outcome> {
        let outcome = self.machine.outcome()?;
        let counters = self.counted(outcome.counters, links);
        Some(Outcome {
            counters,
            ..outcome
        })
    }

    /// The machine knows nothing of what its links say for themselves, which are bytes between the
    /// agents too, nor of what needed no reading.
    fn counted(&self, mut counters: Counters, links: &Links) -> Counters {
        counters.bytes_wire += links.own_wire();
        counters.bytes_trusted = self.kept.as_ref().map_or(0, |kept| kept.bytes_trusted());
        counters.bytes_read = counters.bytes_read.saturating_sub(counters.bytes_trusted);
        counters
    }

    /// Does all that the machine wants now. What it sends may make room for operations.
    fn turn(
        &mut self,
        links: &mut Links,
        pool: &Pool,
        compressor: &Arc<Compressor>,
        done: &mpsc::UnboundedSender<Done>,
    ) {
        loop {
            while let Some((ticket, op)) = self.machine.poll_disk() {
                self.submit(pool, compressor, done, ticket, op);
            }
            // A peer that reads nothing and says on and on what it has would have ever more settled
            // blocks announced to it.
            if links.is_full() {
                return;
            }
            match self.machine.poll_transmit() {
                Some(frame) => links.push(frame),
                None => return,
            }
        }
    }

    fn submit(
        &self,
        pool: &Pool,
        compressor: &Arc<Compressor>,
        done: &mpsc::UnboundedSender<Done>,
        ticket: Ticket,
        op: DiskOp,
    ) {
        let Some(disk) = self.disk.clone() else {
            debug_assert!(false, "a session without a disk asked for {op:?}");
            return;
        };
        let digester = Digester::new(self.params.hash, self.params.seed);
        let (geometry, compressor, done) = (self.geometry, Arc::clone(compressor), done.clone());
        let (kept, io) = (self.kept.clone(), self.io);
        pool.submit(move |scratch| {
            let context = SessionContext {
                geometry,
                digester,
                compressor: &compressor,
                kept: kept.as_deref(),
                io,
            };
            // A session that has ended meanwhile no longer listens.
            let _ = done.send((ticket, disk.run(op, &context, scratch)));
        });
    }
}
