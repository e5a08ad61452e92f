//! `disk sync` of a disk that a VM has which runs: read as it is at one instant, as that of a whole VM.

use super::checks;
use super::live::{self, Hold, LiveChoice, Quiesce, Reading};
use super::obstacle::{Obstacles, to_error};
use super::pairs;
use super::survey::{Survey, source_path};
use super::transfers::Move;
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;
use crate::transfer::{self, Context, LiveRead, Request, TransferResult};

/// Syncs a disk. With `auto` libvirt is asked only about one that is in use. A failure is part of the
/// result.
pub async fn sync(
    context: &Context,
    connect: &str,
    request: &Request,
    live: LiveChoice,
    quiesce: Quiesce,
) -> TransferResult {
    let as_it_is = |live| {
        let mut request = request.clone();
        request.options.live = live;
        request
    };
    match live {
        LiveChoice::Refuse => transfer::run(context, &as_it_is(LiveRead::No)).await,
        LiveChoice::Torn => transfer::run(context, &as_it_is(LiveRead::Torn)).await,
        LiveChoice::Auto => {
            let result = transfer::run(context, &as_it_is(LiveRead::No)).await;
            let error = result.error.as_ref();
            let is_busy = error.is_some_and(|error| error.code() == ErrorCode::Busy);
            if !is_busy || request.dry_run {
                return result;
            }
            match Held::find(context, connect, request).await {
                Ok(held) => held.sync(context, live, quiesce).await,
                // It is in use by something else.
                Err(_) => result,
            }
        }
        LiveChoice::Pause | LiveChoice::Snapshot => {
            match Held::find(context, connect, request).await {
                Ok(held) => held.sync(context, live, quiesce).await,
                Err(error) => TransferResult::failed(request, error),
            }
        }
    }
}

/// A disk, and the VM that has it.
struct Held<'a> {
    request: &'a Request,
    path: String,
    source: Survey,
    obstacles: Obstacles,
}

impl<'a> Held<'a> {
    /// Finds the VM on the source's host that writes to the disk.
    async fn find(context: &Context, connect: &str, request: &'a Request) -> Result<Self> {
        let none = || {
            let message = format!("no VM has {} as a disk of its own", request.source);
            Error::new(ErrorCode::NotFound, message)
                .hint("\"--live pause\" and \"--live snapshot\" are for disks that a VM writes to")
        };
        let path = request.source.path().and_then(|path| path.to_str());
        let path = path.ok_or_else(none)?.to_owned();
        let on = Hypervisor::new(context.host(&request.source.host), connect);
        for definition in on.definitions().await? {
            let disks = definition.disks();
            for disk in disks.iter().filter(|disk| checks::is_at(disk, &path)) {
                if source_path(&on, disk).await?.as_ref() != Some(&path) {
                    continue;
                }
                let others = disks.iter().map(|disk| disk.target.clone());
                let others: Vec<String> = others.filter(|target| *target != disk.target).collect();
                let mut obstacles = Obstacles::default();
                let uuid = definition.uuid().to_string();
                let source = Survey::of(&on, &uuid, &others, &mut obstacles).await?;
                return Ok(Self {
                    request,
                    path,
                    source,
                    obstacles,
                });
            }
        }
        Err(none())
    }

    async fn sync(
        mut self,
        context: &Context,
        live: LiveChoice,
        quiesce: Quiesce,
    ) -> TransferResult {
        let mut warnings = Vec::new();
        let mut result = match self.held_sync(context, live, quiesce, &mut warnings).await {
            Ok(result) => result,
            Err(error) => TransferResult::failed(self.request, error),
        };
        result.source = self.request.source.to_string();
        warnings.append(&mut result.warnings);
        result.warnings = warnings;
        result
    }

    async fn held_sync(
        &mut self,
        context: &Context,
        live: LiveChoice,
        quiesce: Quiesce,
        warnings: &mut Vec<String>,
    ) -> Result<TransferResult> {
        let source = &mut self.source;
        live::mend(&source.on.clone(), source, warnings).await?;
        let mut request = self.request.clone();
        let mut obstacles = std::mem::take(&mut self.obstacles);
        let reading = live.reading(quiesce, source, &mut obstacles);
        if matches!(reading, Reading::Snapshot(_)) {
            pairs::for_agents(&mut request.options, &mut obstacles);
        }
        let what = format!("cannot copy {}", self.request.source);
        if let Some(error) = to_error(&obstacles.into_found(), &what) {
            return Err(error);
        }
        request.options.live = reading.live_read();
        let disk = source.disks.first().ok_or_else(|| {
            Error::new(
                ErrorCode::Internal,
                format!("{} is no disk of it any more", self.path),
            )
        })?;
        let hold = Hold::begin(source, reading, None, warnings).await?;
        let image = self.path.clone();
        let mut moves = [Move::of_guest(&disk.target, image, String::new())];
        if let Some(hold) = &hold {
            hold.redirect(&mut moves, &mut request.options);
        }
        if let [
            Move {
                read_from: Some(location),
                ..
            },
        ] = &moves
        {
            request.source.location = location.clone();
        }
        if matches!(reading, Reading::Snapshot(_)) && !disk.is_plain() {
            warnings.push(format!(
                "what the guest of {} sees of {} was copied: {} is a raw disk",
                source.name(),
                self.path,
                request.destination
            ));
        }
        let mut result = transfer::run(context, &request).await;
        result.consistency = live::consistency(reading, hold.as_ref());
        let done = match result.error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        };
        result.error = live::let_end(hold, done).await.err();
        result.success = result.error.is_none();
        Ok(result)
    }
}
