//! Drives one half of a session: the machine decides, the pool works, the link carries.

use std::sync::Arc;
use std::time::Duration;

use kvm_clone_protocol::digest::Digester;
use kvm_clone_protocol::message::{Beat, Compression, Counters, Message, SessionParams};
use kvm_clone_protocol::preamble::PREAMBLE_LEN;
use kvm_clone_protocol::sync::{DiskDone, DiskOp, Machine, Outcome, Ticket};
use kvm_clone_protocol::units::Geometry;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use crate::channel::{BEAT, SILENCE};
use crate::compress::Compressor;
use crate::disk::{Disk, Kept, SessionContext};
use crate::failure::Failure;
use crate::link::Link;
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
}

impl Session {
    /// Runs to the end, and reports counters on the way.
    ///
    /// # Errors
    /// [`Failure`] of the disk, the link or the other end.
    pub(crate) async fn run(
        mut self,
        mut link: Link,
        pool: &Pool,
        mut report: impl FnMut(Counters),
    ) -> Result<Outcome, Failure> {
        let compressor = Arc::new(Compressor::new(self.compression));
        let (done_to, mut done) = mpsc::unbounded_channel::<Done>();
        let mut ticks = tokio::time::interval(PROGRESS_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut beats = tokio::time::interval_at(Instant::now() + BEAT, BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The link may have waited for its session, and the peer for its own.
        link.reader.expect_life();
        loop {
            self.turn(&mut link, pool, &compressor, &done_to);
            compressor.set_wire_bound(self.machine.is_wire_bound());
            if let Some(outcome) = self.outcome()
                && link.writer.is_empty()
            {
                return Ok(outcome);
            }
            let silent = tokio::time::sleep_until(link.reader.heard() + SILENCE);
            tokio::select! {
                Some((ticket, result)) = done.recv() => {
                    self.machine.handle_disk(ticket, result?)?;
                    while let Ok((ticket, result)) = done.try_recv() {
                        self.machine.handle_disk(ticket, result?)?;
                    }
                }
                frame = link.reader.next() => {
                    let Some(frame) = frame? else { return Err(link.lost().await) };
                    self.machine.handle_frame(&frame)?;
                    while let Some(frame) = link.reader.buffered()? {
                        self.machine.handle_frame(&frame)?;
                    }
                }
                written = link.writer.write_some() => {
                    if let Err(error) = written {
                        return match self.hear_out(&mut link).await {
                            Some(outcome) => Ok(outcome),
                            None => Err(Failure::link(format!(
                                "writing to the peer: {error}{}", link.last_words().await
                            ))),
                        };
                    }
                }
                () = silent => if link.reader.heard().elapsed() >= SILENCE {
                    return Err(Failure::link(format!(
                        "the peer is silent{}", link.last_words().await
                    )));
                },
                _ = beats.tick() => if link.writer.is_empty() {
                    link.writer.push(&Beat {}.frame()?);
                },
                _ = ticks.tick() => report(self.counted(self.machine.counters())),
            }
        }
    }

    fn outcome(&self) -> Option<Outcome> {
        let outcome = self.machine.outcome()?;
        let counters = self.counted(outcome.counters);
        Some(Outcome {
            counters,
            ..outcome
        })
    }

    /// The machine knows neither of the preambles, which are bytes between the agents too, nor of
    /// what needed no reading.
    fn counted(&self, mut counters: Counters) -> Counters {
        counters.bytes_wire += 2 * PREAMBLE_LEN as u64;
        counters.bytes_trusted = self.kept.as_ref().map_or(0, |kept| kept.bytes_trusted());
        counters.bytes_read = counters.bytes_read.saturating_sub(counters.bytes_trusted);
        counters
    }

    /// Hears the rest of a peer that hears nothing any more: if it has said its last word, all is
    /// well, and what could not be written is nothing that it waited for.
    async fn hear_out(&mut self, link: &mut Link) -> Option<Outcome> {
        if self.machine.outcome().is_some() {
            return None;
        }
        let heard = async {
            while self.machine.outcome().is_none() {
                let frame = link.reader.next().await.ok()??;
                self.machine.handle_frame(&frame).ok()?;
            }
            self.outcome()
        };
        tokio::time::timeout(SILENCE, heard).await.ok()?
    }

    /// Does all that the machine wants now. What it sends may make room for operations.
    fn turn(
        &mut self,
        link: &mut Link,
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
            if link.writer.is_full() {
                return;
            }
            match self.machine.poll_transmit() {
                Some(frame) => link.writer.push(&frame),
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
        let kept = self.kept.clone();
        pool.submit(move |scratch| {
            let context = SessionContext {
                geometry,
                digester,
                compressor: &compressor,
                kept: kept.as_deref(),
            };
            // A session that has ended meanwhile no longer listens.
            let _ = done.send((ticket, disk.run(op, &context, scratch)));
        });
    }
}
