//! The log: on standard error, and only what this program says itself.

use std::io::IsTerminal as _;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt};

use crate::cli::options::{Globals, LogFormat};

/// Starts the log as the command line says.
pub(crate) fn start(globals: &Globals) {
    let level = match (globals.quiet, globals.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, 2) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    let filter = Targets::new().with_target("kvm_clone", level);
    let to_stderr = fmt::layer().with_writer(std::io::stderr);
    let layer = match globals.log_format {
        LogFormat::Json => to_stderr.json().boxed(),
        LogFormat::Text => {
            // Seconds since the start of a run tell more than the hour, and need no time zone.
            to_stderr
                .with_target(false)
                .with_timer(fmt::time::uptime())
                .with_ansi(colour())
                .boxed()
        }
    };
    // A second start, as in a test, changes nothing.
    let _ = tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init();
}

/// Whether standard error takes colours, and the user wants them (<https://no-color.org>).
pub(crate) fn colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::stderr().is_terminal() && !refused
}
