//! `kvm-clone-agent`: what kvm-clone-ctl copies to a hypervisor.
//!
//! It has no configuration, does nothing that it was not asked for, and ends with its standard
//! input. Its standard output carries the protocol and nothing else.

#![deny(clippy::print_stdout)]

mod answers;
mod attach;
mod channel;
mod compress;
mod disk;
mod failure;
mod link;
mod pace;
mod pool;
mod serve;
mod session;
mod slot;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use kvm_clone_protocol::preamble::SUPPORTED;
use lexopt::prelude::*;

/// The exit code for a wrong command line, as everywhere.
const USAGE: u8 = 2;

enum Command {
    Serve,
    Attach(String),
    Version,
}

fn main() -> ExitCode {
    let result = match parse() {
        Ok(Command::Serve) => serve(),
        Ok(Command::Attach(name)) => attach::attach(&name).map_err(|error| error.to_string()),
        Ok(Command::Version) => version(),
        Err(error) => {
            say(&format!(
                "{error}\nusage: kvm-clone-agent serve | attach NAME | --version"
            ));
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
        Some(Value(word)) if word == "serve" => Command::Serve,
        Some(Value(word)) if word == "attach" => Command::Attach(parser.value()?.string()?),
        Some(Long("version") | Short('V')) => Command::Version,
        Some(argument) => return Err(argument.unexpected()),
        None => return Err("what to do is missing".into()),
    };
    match parser.next()? {
        Some(argument) => Err(argument.unexpected()),
        None => Ok(command),
    }
}

fn serve() -> Result<(), String> {
    if std::io::stdin().is_terminal() || std::io::stdout().is_terminal() {
        return Err("serve speaks a binary protocol; kvm-clone-ctl starts it over ssh".to_owned());
    }
    // One thread moves all frames; disks and digests have their own in the pool.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("starting: {error}"))?;
    let result = runtime
        .block_on(serve::serve())
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
