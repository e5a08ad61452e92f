//! The two agents of a transfer, and what they say.

use std::collections::VecDeque;
use std::time::Duration;

use kvm_clone_protocol::message::{Abort, Control, Failed, FailureCode, Message};

use crate::error::{Error, ErrorCode, Result};
use crate::host::{AgentConnection, Host};
use crate::transfer::Stopped;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl Side {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// When one side lost the other, the other has this long to say why.
const BLAME_TIME: Duration = Duration::from_secs(3);

/// How much is kept of what is said while something else is waited for: more than all disks of a VM
/// have to say, even where data connections take long and each tells of its progress meanwhile.
const MAX_KEPT: usize = 2048;

/// Control connections to both hosts.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) source: AgentConnection,
    pub(super) destination: AgentConnection,
    /// How many disks there are to speak of.
    disks: usize,
    /// What was said while something else was waited for.
    kept: VecDeque<(Side, Control)>,
}

impl Pair {
    /// Opens both connections side by side, for so many disks.
    ///
    /// # Errors
    /// As [`Host::start_agent`]; the source's failure where both fail.
    pub(super) async fn connect(source: &Host, destination: &Host, disks: usize) -> Result<Self> {
        let (source, destination) = tokio::join!(source.start_agent(), destination.start_agent());
        match (source, destination) {
            (Ok(source), Ok(destination)) => Ok(Self {
                source,
                destination,
                disks,
                kept: VecDeque::new(),
            }),
            (Err(error), Ok(other)) | (Ok(other), Err(error)) => {
                other.close().await;
                Err(error)
            }
            (Err(error), Err(_)) => Err(error),
        }
    }

    /// Whether both agents run on the same host.
    pub(super) fn is_one_host(&self) -> bool {
        self.source.host().spec() == self.destination.host().spec()
    }

    /// Whether both agents run on the same machine, whatever its names.
    pub(super) fn is_one_kernel(&self) -> bool {
        self.source.welcome().boot_id == self.destination.welcome().boot_id
    }

    pub(super) fn side(&mut self, side: Side) -> &mut AgentConnection {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    /// Asks one side, about one disk where that is the case, and waits for its answer. What it
    /// says of other things meanwhile is kept for [`Pair::next`].
    ///
    /// # Errors
    /// The failure that it answers with, or its connection's.
    pub(super) async fn ask<M: Message>(
        &mut self,
        side: Side,
        disk: Option<u32>,
        request: &M,
    ) -> Result<Control> {
        self.tell(side, request).await?;
        self.hear(side, |said| answers(said, disk)).await
    }

    /// Asks one side without waiting for the [answer](Self::answer).
    ///
    /// # Errors
    /// Its connection's.
    pub(super) async fn tell<M: Message>(&mut self, side: Side, request: &M) -> Result<()> {
        self.side(side).send(request).await
    }

    /// Waits for one of several answers that a side owes at once, in whatever order they come:
    /// the first that `is_it`. What it says of other things is kept, the other answers as well.
    ///
    /// # Errors
    /// The failure that it answers with, or its connection's.
    pub(super) async fn answer(
        &mut self,
        side: Side,
        is_it: impl Fn(&Control) -> bool,
    ) -> Result<Control> {
        let kept = |(from, said): &(Side, Control)| *from == side && is_it(said);
        match self.kept.iter().position(kept) {
            Some(at) => {
                let (_, said) = self.kept.remove(at).expect("it was found there");
                self.unless_failed(side, said)
            }
            None => self.hear(side, is_it).await,
        }
    }

    /// Listens to a side until it says what `is_it`, and keeps what it says before.
    async fn hear(&mut self, side: Side, is_it: impl Fn(&Control) -> bool) -> Result<Control> {
        loop {
            let said = self.side(side).next().await?;
            self.about(&said)?;
            if is_it(&said) {
                return self.unless_failed(side, said);
            }
            self.keep(side, said)?;
        }
    }

    fn unless_failed(&mut self, side: Side, said: Control) -> Result<Control> {
        match said {
            Control::Failed(failed) => Err(on(self.side(side), failed)),
            said => Ok(said),
        }
    }

    /// The disk that is spoken of.
    ///
    /// # Errors
    /// Protocol, when there is no such disk.
    fn about(&self, said: &Control) -> Result<Option<u32>> {
        let disk = match said {
            Control::Progress(progress) => Some(progress.disk),
            Control::Ended(ended) => Some(ended.disk),
            Control::Warning(warning) => warning.disk,
            Control::Failed(failed) => failed.disk,
            _ => None,
        };
        let exists = |disk| usize::try_from(disk).is_ok_and(|disk| disk < self.disks);
        match disk {
            Some(disk) if !exists(disk) => {
                let message = format!("an agent speaks of disk {disk}, which there is not");
                Err(Error::new(ErrorCode::Protocol, message))
            }
            disk => Ok(disk),
        }
    }

    /// Keeps what was said for [`Pair::next`].
    fn keep(&mut self, side: Side, said: Control) -> Result<()> {
        if self.kept.len() >= MAX_KEPT {
            let message = "an agent says more than it is asked";
            return Err(Error::new(ErrorCode::Protocol, message));
        }
        self.kept.push_back((side, said));
        Ok(())
    }

    /// The next thing that either side says.
    ///
    /// # Errors
    /// A failure that one reports, of one of its disks. If that is only that it lost the other,
    /// and the other has a reason, that reason.
    pub(super) async fn next(&mut self) -> Result<(Side, Control), Stopped> {
        let (side, said) = match self.kept.pop_front() {
            Some((side, said)) => (side, Ok(said)),
            None => tokio::select! {
                said = self.source.next() => (Side::Source, said),
                said = self.destination.next() => (Side::Destination, said),
            },
        };
        let said = said?;
        self.about(&said)?;
        let Control::Failed(failed) = said else {
            return Ok((side, said));
        };
        let disk = failed.disk;
        let lost_other = failed.code == FailureCode::LinkLost;
        let mut error = on(self.side(side), failed);
        if lost_other {
            error = self.blame(side, disk).await.unwrap_or(error);
        }
        let at = disk.and_then(|disk| usize::try_from(disk).ok());
        let at = at.unwrap_or(0);
        Err(Stopped { at, error })
    }

    /// `side` did not reach the other on the way for `disk`: the reason, if either of them has one.
    /// A disk that cannot be begun with is waited for by nobody.
    pub(super) async fn reason(&mut self, side: Side, disk: u32) -> Option<Error> {
        for side in [side, side.other()] {
            let is_reason = |(from, said): &(Side, Control)| {
                *from == side
                    && matches!(said, Control::Failed(failed)
                        if failed.disk == Some(disk) && failed.code != FailureCode::LinkLost)
            };
            if let Some(at) = self.kept.iter().position(is_reason)
                && let Some((_, Control::Failed(failed))) = self.kept.remove(at)
            {
                return Some(on(self.side(side), failed));
            }
        }
        self.blame(side, Some(disk)).await
    }

    /// `side` lost the other on the way for `disk`: the reason that the other gives, if it has
    /// one. It has none when it says only that it has lost this side as well.
    async fn blame(&mut self, side: Side, disk: Option<u32>) -> Option<Error> {
        let other = side.other();
        let reason = async {
            loop {
                match self.side(other).next().await {
                    Ok(Control::Failed(failed)) if failed.code == FailureCode::LinkLost => {
                        if failed.disk == disk {
                            return None;
                        }
                    }
                    Ok(Control::Failed(failed)) => return Some(on(self.side(other), failed)),
                    Ok(said) => {
                        if let Err(error) = self.keep(other, said) {
                            return Some(error);
                        }
                    }
                    Err(error) => return Some(error),
                }
            }
        };
        let blamed = tokio::time::timeout(BLAME_TIME, reason).await;
        blamed.ok().flatten()
    }

    /// Tells both to stop, as far as they can still be told, and closes the connections.
    pub(super) async fn abort(mut self, reason: &str) {
        let abort = Abort {
            reason: reason.to_owned(),
        };
        let tell = async {
            let _ = tokio::join!(self.source.send(&abort), self.destination.send(&abort));
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), tell).await;
        self.close().await;
    }

    pub(super) async fn close(self) {
        tokio::join!(self.source.close(), self.destination.close());
    }
}

/// A failure with the host that reported it.
fn on(agent: &AgentConnection, failed: Failed) -> Error {
    let error = Error::from(failed);
    let code = error.code();
    let error = Error::new(code, format!("{}: {error}", agent.host()));
    match code {
        ErrorCode::Interrupted => error.hint("the same command takes the run up again"),
        ErrorCode::NoSpace => {
            error.hint("make room on the destination, and run the same command again")
        }
        _ => error,
    }
}

/// Whether it answers what was asked, about a disk where that is the case. Before the answer there
/// is nothing else to say of a disk that is asked about.
pub(super) fn answers(said: &Control, disk: Option<u32>) -> bool {
    match said {
        Control::Failed(failed) => failed.disk.is_none() || failed.disk == disk,
        Control::Progress(progress) => Some(progress.disk) == disk,
        Control::Ended(ended) => Some(ended.disk) == disk,
        Control::Warning(_) => false,
        _ => true,
    }
}
