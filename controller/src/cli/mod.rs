//! The command line: what can be said, and who does it. Each command has a module of its own;
//! this one parses, starts what they share, and turns their end into an exit status.

mod agent;
mod answers;
mod config;
mod demo;
mod disk;
mod doctor;
mod history;
mod list;
pub mod options;
mod recover;
mod replicate;
mod vm;

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory as _, Parser, Subcommand};
use kvm_clone_protocol::preamble::SUPPORTED;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, ConfigFile};
use crate::endpoint::HostSpec;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Host, SshOptions};
use crate::transfer::Context;
use crate::{agent_binary, logging, output, progress};
use options::{Globals, OutputFormat};

/// Makes disks of KVM virtual machines equal between hypervisors that share nothing but ssh
#[derive(Debug, Parser)]
#[command(
    name = "kvm-clone-ctl",
    version,
    long_version = long_version(),
    max_term_width = 100,
    propagate_version = true
)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new VM on another hypervisor from one that is there
    Clone(Box<vm::Clone>),
    /// Bring the disks of a VM on another hypervisor up to date
    Sync(Box<vm::Sync>),
    /// Compare a VM with one on another hypervisor: disks and definition
    Verify(Box<vm::Verify>),
    /// Keep points of VMs on another host, as policies want them
    #[command(subcommand)]
    Replicate(replicate::Command),
    /// List the VMs of hosts
    List(list::Arguments),
    /// Sync or compare single disks
    #[command(subcommand)]
    Disk(disk::Command),
    /// Manage the agents on the hosts; transfers do so by themselves
    #[command(subcommand)]
    Agent(agent::Command),
    /// Finish or roll back what broken runs have left on the hosts
    Recover(recover::Arguments),
    /// Show the whole thing on a sample disk, and remove it again
    Demo {
        /// Copy the sample to this host; without it, from one file to another here
        #[arg(long, value_name = "HOST")]
        host: Option<HostSpec>,
    },
    /// Check everything that a transfer needs on the hosts, with what to do about each failure
    Doctor {
        /// Host: [USER@]NAME[:PORT], an alias of the ssh configuration, or "local"
        #[arg(required = true, value_name = "HOST")]
        hosts: Vec<HostSpec>,
    },
    /// Show what ran, when, how much, and with what result
    History(history::Arguments),
    /// Show and change the defaults in the configuration file
    #[command(subcommand)]
    Config(config::Command),
    /// Print completions for a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, of this program or of one command
    Man {
        /// Write the pages of all commands into this directory, such as /usr/local/share/man/man1
        #[arg(long, value_name = "DIRECTORY", conflicts_with = "command")]
        directory: Option<PathBuf>,
        /// Command, such as: disk sync
        #[arg(value_name = "COMMAND")]
        command: Vec<String>,
    },
}

/// The release, the protocol, and the agents that this program carries.
fn long_version() -> String {
    let agents = agent_binary::for_all();
    let agents: Vec<String> = agents.iter().map(ToString::to_string).collect();
    format!(
        "{}\nprotocol {SUPPORTED}\nagents {}",
        env!("CARGO_PKG_VERSION"),
        agents.join(", ")
    )
}

/// What the commands share.
#[derive(Debug)]
pub(crate) struct App {
    globals: Globals,
    config: Config,
    config_file: ConfigFile,
    ssh: Arc<SshOptions>,
    cancelled: CancellationToken,
}

impl App {
    fn new(globals: Globals, config_file: ConfigFile, config: Config) -> Self {
        // ssh takes the first value that it sees, so the command line's options go first.
        let options = globals
            .ssh_options
            .iter()
            .chain(&config.ssh_options)
            .cloned()
            .collect();
        let ssh = SshOptions {
            config: globals
                .ssh_config
                .clone()
                .or_else(|| config.ssh_config.clone()),
            key: globals.ssh_key.clone().or_else(|| config.ssh_key.clone()),
            options,
            forward_agent: globals.forward_agent,
            sudo: globals.sudo,
            agent_path: globals.agent_path.clone(),
        };
        Self {
            globals,
            config,
            config_file,
            ssh: Arc::new(ssh),
            cancelled: CancellationToken::new(),
        }
    }

    /// What a transfer needs to know.
    pub(crate) fn transfer_context(&self) -> Context {
        let wanted = !self.globals.quiet && !self.globals.no_progress;
        let terminal = std::io::stderr().is_terminal();
        let progress = progress::Style::choose(wanted, terminal, logging::colour());
        Context::new(Arc::clone(&self.ssh), self.cancelled.clone(), progress)
    }

    /// The same for work that goes on for ever: nobody watches its progress.
    pub(crate) fn quiet_context(&self) -> Context {
        let style = progress::Style::None;
        Context::new(Arc::clone(&self.ssh), self.cancelled.clone(), style)
    }

    /// How results are printed.
    pub(crate) fn format(&self) -> OutputFormat {
        self.globals.output
    }

    /// A warning for the user, unless errors only are wanted.
    pub(crate) fn warn(&self, warning: &str) {
        if !self.globals.quiet {
            output::to_stderr(&format!("warning: {warning}\n"));
        }
    }

    fn connect(&self) -> &str {
        let chosen = self
            .globals
            .connect
            .as_deref()
            .or(self.config.connect.as_deref());
        chosen.unwrap_or("qemu:///system")
    }

    fn host(&self, spec: &HostSpec) -> Host {
        Host::new(spec.clone(), Arc::clone(&self.ssh))
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    match try_main(std::env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(End::Clap(error)) => {
            // clap knows which stream its text belongs to; a closed one is no failure.
            let _ = error.print();
            if error.use_stderr() {
                ErrorCode::Usage.exit_code().into()
            } else {
                ExitCode::SUCCESS
            }
        }
        Err(End::Failed(error)) => {
            output::to_stderr(&error.for_people());
            error.exit_code().into()
        }
    }
}

/// Why the program ends before it is done.
enum End {
    /// Usage, help or version.
    Clap(clap::Error),
    Failed(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

fn try_main(args: impl Iterator<Item = OsString>) -> Result<(), End> {
    let Cli { globals, command } = Cli::try_parse_from(args).map_err(End::Clap)?;
    logging::start(&globals);
    match command {
        Command::Completions { shell } => return Ok(completions(shell)?),
        Command::Man { directory, command } => {
            let written = directory.map_or_else(|| manual(&command), |into| manuals(&into));
            return Ok(written?);
        }
        _ => {}
    }
    let config_file = ConfigFile::locate(globals.config.as_deref())?;
    if let Command::Config(command) = command {
        return Ok(config::run(&command, &config_file, globals.output)?);
    }
    let config = config_file.load()?;
    if let Some(agent) = &globals.agent {
        agent_binary::give(agent)?;
    }
    let app = App::new(globals, config_file, config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Frames are moved, never digested or compressed here: two threads keep both hosts busy.
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::io("starting the runtime", error))?;
    let done = runtime.block_on(run(&app, command));
    // A task that still reads from a dead host's pipe is not waited for.
    runtime.shutdown_background();
    Ok(done?)
}

async fn run(app: &App, command: Command) -> Result<()> {
    watch_signals(app.cancelled.clone())?;
    tracing::debug!(config = %app.config_file.path().display(), "started");
    match command {
        // These stop in order by themselves.
        Command::Clone(args) => vm::clone(app, *args).await,
        Command::Sync(args) => vm::sync(app, *args).await,
        Command::Verify(args) => vm::verify(app, *args).await,
        Command::Disk(command) => Box::pin(disk::run(app, command)).await,
        Command::Demo { host } => demo::run(app, host).await,
        Command::Replicate(command) => replicate::run(app, command).await,
        Command::List(args) => until_cancelled(app, list::run(app, args)).await,
        Command::History(args) => history::run(app, args),
        Command::Recover(args) => until_cancelled(app, recover::run(app, args)).await,
        Command::Agent(command) => until_cancelled(app, agent::run(app, command)).await,
        Command::Doctor { hosts } => until_cancelled(app, doctor::run(app, hosts)).await,
        Command::Config(_) | Command::Completions { .. } | Command::Man { .. } => Err(Error::new(
            ErrorCode::Internal,
            "a command that needs no runtime was given one",
        )),
    }
}

async fn until_cancelled(app: &App, done: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::select! {
        done = done => done,
        () = app.cancelled.cancelled() => Err(Error::new(ErrorCode::Cancelled, "stopped by the user")),
    }
}

/// The first signal asks for an orderly end; the second ends at once.
fn watch_signals(cancelled: CancellationToken) -> Result<()> {
    let watch = |kind| signal(kind).map_err(|error| Error::io("watching for signals", error));
    let (mut interrupt, mut terminate) = (
        watch(SignalKind::interrupt())?,
        watch(SignalKind::terminate())?,
    );
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        };
        next().await;
        cancelled.cancel();
        next().await;
        #[expect(
            clippy::exit,
            reason = "the user does not want to wait for the orderly end"
        )]
        std::process::exit(ErrorCode::Cancelled.exit_code().into());
    });
    Ok(())
}

/// Does the same on several hosts side by side; the answers come in the hosts' order.
async fn side_by_side<T, F>(hosts: Vec<Host>, work: impl Fn(Host) -> F) -> Vec<(Host, Result<T>)>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    for (at, host) in hosts.iter().enumerate() {
        let work = work(host.clone());
        tasks.spawn(async move { (at, work.await) });
    }
    let mut answers: Vec<Option<Result<T>>> = hosts.iter().map(|_| None).collect();
    while let Some(answer) = tasks.join_next().await {
        if let Ok((at, answer)) = answer {
            answers[at] = Some(answer);
        }
    }
    let panicked = || {
        Err(Error::new(
            ErrorCode::Internal,
            "the work on this host broke off",
        ))
    };
    hosts
        .into_iter()
        .zip(answers)
        .map(|(host, answer)| (host, answer.unwrap_or_else(panicked)))
        .collect()
}

/// One error for what happened on several hosts: the only one, or what they have in common.
fn combined(mut errors: Vec<(Host, Error)>, hosts: usize) -> Result<()> {
    let Some((_, first)) = errors.first() else {
        return Ok(());
    };
    if hosts == 1 {
        return Err(errors.remove(0).1);
    }
    let common =
        errors.len() == hosts && errors.iter().all(|(_, error)| error.code() == first.code());
    let code = if common {
        first.code()
    } else {
        ErrorCode::Partial
    };
    let failed = errors.iter().map(|(host, error)| (host.to_string(), error));
    let failed: Vec<(String, &Error)> = failed.collect();
    Err(together(code, &failed, hosts, "hosts"))
}

/// The error for those that failed, by their names, of so many: with what each said, and the first
/// hint.
fn together(code: ErrorCode, failed: &[(String, &Error)], of: usize, what: &str) -> Error {
    let each = failed.iter();
    let each: Vec<String> = each
        .map(|(name, error)| format!("{name}: {}", error.one_line()))
        .collect();
    let message = format!("{} of {of} {what} failed", failed.len());
    let error = Error::new(code, message).caused_by(each.join("\n  "));
    match failed.iter().find_map(|(_, error)| error.hint_text()) {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn completions(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kvm-clone-ctl", &mut script);
    output::to_stdout(script)
}

fn manual(path: &[String]) -> Result<()> {
    let mut root = Cli::command();
    root.build();
    let mut command = root;
    for name in path {
        command = command
            .find_subcommand(name)
            .cloned()
            .ok_or_else(|| Error::usage(format!("there is no command \"{}\"", path.join(" "))))?;
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut page)
        .map_err(|error| Error::io("writing the manual page", error))?;
    output::to_stdout(page)
}

fn manuals(directory: &Path) -> Result<()> {
    clap_mangen::generate_to(Cli::command(), directory).map_err(|error| {
        let message = format!("writing manual pages into {}", directory.display());
        Error::io(message, error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["kvm-clone-ctl"], args].concat())
    }

    #[test]
    fn every_method_is_taken_under_both_names() {
        for option in ["--method", "--transfer-method"] {
            for method in ["rsync", "libvirt", "blocksync", "auto"] {
                parse(&["disk", "sync", "/a", "/b", option, method]).unwrap();
            }
            let error = parse(&["disk", "sync", "/a", "/b", option, "ftp"]).unwrap_err();
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn help_shows_only_what_there_is() {
        let mut root = Cli::command();
        root.build();
        let disk = root.find_subcommand_mut("disk").unwrap();
        let help = disk
            .find_subcommand_mut("sync")
            .unwrap()
            .render_long_help()
            .to_string();
        let hidden = "transfer-method";
        assert!(!help.contains(hidden), "{hidden} in {help}");
        for present in [
            "--bandwidth-limit",
            "--streams",
            "--keep-sent",
            "--io",
            "--nice",
            "--read-limit",
            "--compress",
            "--route",
            "--apply",
            "--verify",
            "--dry-run",
        ] {
            assert!(help.contains(present), "{present} in {help}");
        }
    }

    #[test]
    fn disks_need_not_be_utf_8() {
        use std::os::unix::ffi::OsStrExt as _;
        let odd = std::ffi::OsStr::from_bytes(b"hv:/img/\xff");
        let args = [
            std::ffi::OsStr::new("kvm-clone-ctl"),
            "disk".as_ref(),
            "diff".as_ref(),
            odd,
            odd,
        ];
        Cli::try_parse_from(args).unwrap();
    }

    #[test]
    fn global_options_go_anywhere() {
        let cli = parse(&[
            "doctor",
            "hv1",
            "-o",
            "json",
            "-F",
            "/cfg",
            "--ssh-option",
            "A=b",
        ])
        .unwrap();
        assert_eq!(cli.globals.output, OutputFormat::Json);
        assert_eq!(cli.globals.ssh_options, ["A=b"]);
        assert!(parse(&["doctor", "-oProxyCommand=x"]).is_err());
        assert!(parse(&["-q", "-v", "doctor", "hv1"]).is_err());
    }

    #[test]
    fn failures_on_several_hosts_become_one() {
        let failed = |name: &str, code| {
            (
                Host::new(name.parse().unwrap(), Arc::default()),
                Error::new(code, "x").hint("do"),
            )
        };
        assert!(combined(Vec::new(), 2).is_ok());
        let one = combined(vec![failed("a", ErrorCode::Auth)], 1).unwrap_err();
        assert_eq!(
            (one.code(), one.to_string().as_str()),
            (ErrorCode::Auth, "x")
        );
        let some = combined(vec![failed("a", ErrorCode::Auth)], 2).unwrap_err();
        assert_eq!(some.code(), ErrorCode::Partial);
        let all = combined(
            vec![failed("a", ErrorCode::Auth), failed("b", ErrorCode::Auth)],
            2,
        )
        .unwrap_err();
        assert_eq!(all.code(), ErrorCode::Auth);
        assert!(all.one_line().contains("b: x") && all.hint_text() == Some("do"));
    }
}
