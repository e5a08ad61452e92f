//! `replicate init`, `check`, `systemd`, `pause` and `resume`: all that is around the policies
//! themselves.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{App, File, Named, report};
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::Hypervisor;
use crate::output;
use crate::replicate::check::{Checked, check};
use crate::replicate::policy::TEMPLATE;
use crate::replicate::systemd::{self as units, Wanted};
use crate::vm::pause::{self, Pause};

#[derive(Debug, Args)]
pub(in crate::cli) struct Systemd {
    #[command(flatten)]
    file: File,
    /// A timer that starts "run --due" each minute, in place of the daemon
    #[arg(long)]
    timer: bool,
    /// The user whose ssh keys reach the hosts
    #[arg(long, value_name = "NAME", default_value = "root")]
    user: String,
    /// Write the units into this directory, such as /etc/systemd/system [default: print them]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Paused {
    policy: String,
    since: Timestamp,
}

#[derive(Debug, Serialize)]
struct Pauses {
    paused: Vec<Paused>,
}

#[derive(Debug, Serialize)]
struct Policies {
    policies: Vec<Checked>,
}

pub(super) fn init(path: &Path) -> Result<()> {
    let shown = path.display();
    if let Some(directory) = path.parent() {
        let made = std::fs::create_dir_all(directory);
        made.map_err(|error| Error::io(format!("making {}", directory.display()), error))?;
    }
    let file = std::fs::File::create_new(path);
    let mut file = file.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::new(ErrorCode::Refused, format!("{shown} is there already"))
                .hint("edit it, or choose another with --policies")
        }
        _ => Error::io(format!("making {shown}"), error),
    })?;
    let written = file.write_all(TEMPLATE.as_bytes());
    written.map_err(|error| Error::io(format!("writing {shown}"), error))?;
    output::to_stdout(format!("{shown}\n"))
}

pub(super) async fn check_policies(app: &App, named: &Named) -> Result<()> {
    let policies = named.load(app)?;
    let context = app.transfer_context();
    let (mut all, mut failed) = (Vec::new(), None);
    for policy in &policies {
        match check(&context, app.connect(), policy).await {
            Ok(checked) => all.push(checked),
            Err(error) => {
                failed.get_or_insert_with(|| error.context(format!("policy {}", policy.name)));
            }
        }
    }
    let found = all.iter().find_map(|checked| {
        let first = checked.obstacles.first()?;
        let message = format!("policy {}: {}", checked.policy, first.message);
        Some(Error::new(first.code, message).hint(&first.hint))
    });
    let what = Policies { policies: all };
    report(app, "replicate-check", what, failed.or(found), |what| {
        let mut text = String::new();
        for checked in &what.policies {
            let (policy, vms) = (&checked.policy, checked.vms.join(", "));
            text += &format!("{policy}: {vms}\n");
            for obstacle in &checked.obstacles {
                text += &format!("  {}\n     -> {}\n", obstacle.message, obstacle.hint);
            }
        }
        text
    })
}

pub(super) async fn pause(app: &App, named: &Named) -> Result<()> {
    let context = app.transfer_context();
    let mut paused = Vec::new();
    for policy in named.load(app)? {
        let on = Hypervisor::new(context.host(&policy.destination), app.connect());
        let Pause { since, .. } = pause::pause(&on, &policy.place()).await?;
        let policy = policy.name;
        paused.push(Paused { policy, since });
    }
    report(app, "replicate-pause", Pauses { paused }, None, |what| {
        let paused = what.paused.iter();
        let lines =
            paused.map(|Paused { policy, since }| format!("{policy} is paused since {since}\n"));
        lines.collect()
    })
}

pub(super) async fn resume(app: &App, named: &Named) -> Result<()> {
    let context = app.transfer_context();
    let mut paused = Vec::new();
    for policy in named.load(app)? {
        let on = Hypervisor::new(context.host(&policy.destination), app.connect());
        if let Some(Pause { since, .. }) = pause::resume(&on, &policy.place()).await? {
            let policy = policy.name;
            paused.push(Paused { policy, since });
        }
    }
    report(app, "replicate-resume", Pauses { paused }, None, |what| {
        let paused = what.paused.iter();
        let lines =
            paused.map(|Paused { policy, since }| format!("{policy} was paused since {since}\n"));
        let text: String = lines.collect();
        match text.is_empty() {
            true => "nothing was paused\n".to_owned(),
            false => text,
        }
    })
}

pub(super) fn systemd(app: &App, args: &Systemd) -> Result<()> {
    let program = std::env::current_exe();
    let program = program.map_err(|error| Error::io("looking for this program", error))?;
    let policies = args.file.path(app);
    let policies = std::path::absolute(&policies).unwrap_or(policies);
    let wanted = Wanted {
        program: &program,
        policies: &policies,
        config: app.globals.config.as_deref(),
        ssh_config: app.ssh.config.as_deref(),
        user: &args.user,
    };
    let units = match args.timer {
        true => units::timer(&wanted)?,
        false => units::daemon(&wanted)?,
    };
    let Some(directory) = &args.directory else {
        let all = units
            .iter()
            .map(|unit| format!("# {}\n{}\n", unit.name, unit.text));
        return output::to_stdout(all.collect::<String>());
    };
    for unit in &units {
        let path = directory.join(unit.name);
        let written = std::fs::write(&path, &unit.text);
        written.map_err(|error| Error::io(format!("writing {}", path.display()), error))?;
    }
    let last = units.last().map_or("", |unit| unit.name);
    output::to_stdout(format!(
        "systemctl daemon-reload && systemctl enable --now {last}\n"
    ))
}
