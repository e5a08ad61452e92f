//! `kvm-clone-agent`: what kvm-clone-ctl copies to a hypervisor.
//!
//! It has no configuration, does nothing that it was not asked for, and ends with its standard
//! input. Its standard output carries the protocol and nothing else.

#![deny(clippy::print_stdout)]

mod answers;
mod attach;
mod channel;
mod commands;
mod compress;
mod disk;
mod failure;
mod link;
mod links;
mod nbd;
mod pace;
mod play;
mod pool;
mod priority;
mod serve;
mod session;
mod slot;

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use kvm_clone_protocol::preamble::SUPPORTED;
use lexopt::prelude::*;

use commands::Commands;
use disk::Direction;

/// The exit code for a wrong command line, as everywhere.
const USAGE: u8 = 2;

const USAGE_TEXT: &str = "\
usage: kvm-clone-agent serve [--allow PATH]... [--read-only|--write-only] [--dial]
       kvm-clone-agent attach [NAME]
       kvm-clone-agent --version
In authorized_keys, \"serve\" with one of its options and \"attach\" without NAME look at
SSH_ORIGINAL_COMMAND: where that asks for \"attach NAME\", they bring that data connection.";

/// What sshd sets where authorized_keys forces a command: what was asked for.
const ASKED: &str = "SSH_ORIGINAL_COMMAND";

enum Command {
    Serve(Rules),
    Attach(Option<String>),
    Version,
}

/// What a controller may do here.
#[derive(Default)]
struct Rules {
    allowed: Vec<PathBuf>,
    read_only: bool,
    write_only: bool,
    dial: bool,
}

fn main() -> ExitCode {
    let result = match parse() {
        Ok(Command::Serve(rules)) => match asked_name().filter(|_| rules.confine()) {
            Some(name) => attach(&name),
            None => serve(&rules),
        },
        Ok(Command::Attach(name)) => match name.or_else(asked_name) {
            Some(name) => attach(&name),
            None => Err("this login brings data connections alone, and none was asked for".into()),
        },
        Ok(Command::Version) => version(),
        Err(error) => {
            say(&format!("{error}\n{USAGE_TEXT}"));
            return ExitCode::from(USAGE);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            say(&message);
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Command, lexopt::Error> {
    let mut parser = lexopt::Parser::from_env();
    let command = match parser.next()? {
        Some(Value(word)) if word == "serve" => return parse_rules(parser).map(Command::Serve),
        Some(Value(word)) if word == "attach" => match parser.next()? {
            Some(Value(name)) => Command::Attach(Some(name.string()?)),
            Some(argument) => return Err(argument.unexpected()),
            None => Command::Attach(None),
        },
        Some(Long("version") | Short('V')) => Command::Version,
        Some(argument) => return Err(argument.unexpected()),
        None => return Err("what to do is missing".into()),
    };
    match parser.next()? {
        Some(argument) => Err(argument.unexpected()),
        None => Ok(command),
    }
}

fn parse_rules(mut parser: lexopt::Parser) -> Result<Rules, lexopt::Error> {
    let mut rules = Rules::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("allow") => rules.allowed.push(parser.value()?.into()),
            Long("read-only") => rules.read_only = true,
            Long("write-only") => rules.write_only = true,
            Long("dial") => rules.dial = true,
            argument => return Err(argument.unexpected()),
        }
    }
    if rules.read_only && rules.write_only {
        return Err("--read-only and --write-only leave nothing to do".into());
    }
    Ok(rules)
}

impl Rules {
    /// Whether they take anything away.
    fn confine(&self) -> bool {
        !self.allowed.is_empty() || self.read_only || self.write_only || self.dial
    }

    fn direction(&self) -> Direction {
        match (self.read_only, self.write_only) {
            (true, _) => Direction::Read,
            (_, true) => Direction::Write,
            _ => Direction::Both,
        }
    }

    fn commands(&self) -> Commands {
        match (self.confine(), self.dial) {
            (false, _) => Commands::Any,
            (true, true) => Commands::SshToAgents,
            (true, false) => Commands::None,
        }
    }
}

/// The name of the data connection that whoever logged in asked for, by its last two words.
fn asked_name() -> Option<String> {
    let asked = std::env::var(ASKED).ok()?;
    let mut words = asked.split_ascii_whitespace().rev();
    let (name, verb) = (words.next()?, words.next()?);
    let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    (verb == "attach" && is_name).then(|| name.to_owned())
}

fn attach(name: &str) -> Result<(), String> {
    attach::attach(name).map_err(|error| error.to_string())
}

fn serve(rules: &Rules) -> Result<(), String> {
    if std::io::stdin().is_terminal() || std::io::stdout().is_terminal() {
        return Err("serve speaks a binary protocol; kvm-clone-ctl starts it over ssh".to_owned());
    }
    if rules.confine() {
        let confined = disk::confine(&rules.allowed, rules.direction());
        confined.map_err(|failure| failure.to_string())?;
    }
    // One thread moves all frames; disks and digests have their own in the pool.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("starting: {error}"))?;
    let result = runtime
        .block_on(serve::serve(rules.commands()))
        .map_err(|failure| failure.to_string());
    // Operations that are still running in the pool end with the process.
    runtime.shutdown_background();
    result
}

fn version() -> Result<(), String> {
    let line = format!(
        "kvm-clone-agent {} (protocol {SUPPORTED})\n",
        env!("CARGO_PKG_VERSION")
    );
    std::io::stdout()
        .write_all(line.as_bytes())
        .map_err(|error| error.to_string())
}

/// Standard error is what a person, or the controller, sees when something is wrong.
fn say(message: &str) {
    // Nobody may be listening any more, and there is nowhere else to say it.
    let _ = writeln!(std::io::stderr(), "kvm-clone-agent: {message}");
}
