//! `history`, and how operations get into it.

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::App;
use crate::error::Result;
use crate::history::{self, Begun, Filter, History, Record};
use crate::output;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Show at most so many
    #[arg(long, value_name = "N", default_value = "20")]
    limit: u32,
    /// Show only those that failed or never ended
    #[arg(long)]
    failed: bool,
    /// Show only those about this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    operation: &'static str,
    success: bool,
    runs: Vec<Record>,
}

pub(super) fn run(app: &App, args: Arguments) -> Result<()> {
    let filter = Filter {
        limit: args.limit,
        failed: args.failed,
        vm: args.vm,
        ..Filter::default()
    };
    let report = Report {
        operation: "history",
        success: true,
        runs: History::open()?.list(&filter)?,
    };
    output::print(&report, app.format(), || table(&report.runs))
}

/// An operation that is being recorded. A history that fails is a warning, and no more.
#[derive(Debug)]
pub(super) struct Recording(Option<history::Recording>);

impl Recording {
    pub(super) fn begin(app: &App, begun: &Begun<'_>) -> Self {
        let recording = history::Recording::begin(begun);
        Self(recording.map_err(|error| app.warn(&error.one_line())).ok())
    }

    pub(super) fn end(self, app: &App, result: &impl Serialize) {
        if let Some(Err(error)) = self.0.map(|recording| recording.end(result)) {
            app.warn(&error.one_line());
        }
    }
}

fn table(runs: &[Record]) -> String {
    let header = [
        "began",
        "operation",
        "what",
        "method",
        "shipped",
        "time",
        "result",
    ];
    let mut table = output::table(&header);
    for run in runs {
        table.add_row(row(run));
    }
    output::table_text(&table)
}

fn row(run: &Record) -> [String; 7] {
    let null = Value::Null;
    let result = run.result.as_ref().unwrap_or(&null);
    let what = match &run.vm {
        Some(vm) => format!("{vm}: {} -> {}", run.source, run.destination),
        None => format!("{} -> {}", run.source, run.destination),
    };
    let ended = match run.success {
        None => "unfinished".to_owned(),
        Some(true) => "done".to_owned(),
        Some(false) => result["error"]["code"]
            .as_str()
            .unwrap_or("failed")
            .to_owned(),
    };
    let method =
        [&result["method"], &result["route"]].map(|value| value.as_str().unwrap_or_default());
    let seconds = result["duration_seconds"].as_f64();
    [
        run.began_at
            .split('.')
            .next()
            .unwrap_or_default()
            .replace('T', " "),
        run.operation.clone(),
        output::printable(&what),
        method.join(" ").trim().to_owned(),
        result["bytes_wire"]
            .as_u64()
            .map(output::iec)
            .unwrap_or_default(),
        seconds
            .map(|seconds| format!("{seconds:.1} s"))
            .unwrap_or_default(),
        ended,
    ]
}
