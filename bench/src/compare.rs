//! The comparison: every tool and every limit, in every case, over the loopback.

use std::fmt;

use anyhow::{Result, ensure};
use clap::Args;

use crate::case::Case;
use crate::image::Layout;
use crate::lab::check_space;
use crate::limits;
use crate::link::Link;
use crate::machine;
use crate::report::{Report, Table};
use crate::samples::{Figure, Key, Samples, cell};
use crate::setup::Setup;
use crate::size::Size;
use crate::tool::{self, Tool};

/// What is compared.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Size of the disk image
    #[arg(long, default_value = "4G")]
    size: Size,
    /// How much of the image is data; the rest is holes
    #[arg(long, default_value_t = 0.5, value_parser = share)]
    data_share: f64,
    /// Drop the page cache before each run, instead of filling it (needs root)
    #[arg(long)]
    cold: bool,
    /// What to measure beside the limits [default: all that this machine has]
    #[arg(long, value_enum, value_delimiter = ',')]
    tools: Vec<Tool>,
    /// Which cases: first, or the percentage of blocks that changed
    #[arg(long, value_delimiter = ',', default_value = "first,0,1,10,50")]
    cases: Vec<Case>,
}

impl Options {
    pub(crate) fn for_smoke(&self) -> Self {
        Self {
            size: Size::MIB * 32,
            ..self.clone()
        }
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected a number from 0 to 1".to_owned()),
    }
}

/// A row of the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    case: Case,
    tool: Tool,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.case, self.tool)
    }
}

impl Key for Entry {
    const FIELDS: &'static str = "case,tool";

    fn fields(&self) -> String {
        format!("{},{}", self.case, self.tool.plain_name())
    }

    fn kind(&self) -> String {
        self.to_string()
    }
}

/// Measures everything, case by case.
pub(crate) fn run(setup: &Setup, options: &Options) -> Result<Report> {
    ensure!(
        !options.cold || nix::unistd::geteuid().is_root(),
        "--cold needs root"
    );
    let (tools, absent) = tool::select(&options.tools, setup.xfs)?;
    let layout = Layout::new(options.size, options.data_share)?;
    // The destination may lose its holes.
    check_space(&setup.dir, layout, layout.size())?;
    let lab = setup
        .lab(layout, Link::Loopback)?
        .with_cold_cache(options.cold);
    let machine = machine::describe(lab.path());
    let mut samples = Samples::new();
    for tool in absent {
        samples.note(format!("{tool} was not measured: it is not on PATH"));
    }
    for &case in &options.cases {
        lab.prepare(case)?;
        let contenders = limits::of(case).into_iter().chain(tools.iter().copied());
        for tool in contenders.filter(|tool| tool.has_part_in(case)) {
            let entry = Entry { case, tool };
            samples.take(&entry, setup.runs, || lab.measure(case, tool));
        }
    }
    let caption = format!(
        "Image of {} with {} of data{}; {} cache; median of {}.",
        Size(layout.size()),
        Size(layout.data_bytes()),
        if setup.xfs { ", on XFS" } else { "" },
        if options.cold { "cold" } else { "warm" },
        setup.runs
    );
    let table = table(caption, &samples);
    Ok(Report::new(&machine, &[table], &samples))
}

fn table(caption: String, samples: &Samples<Entry>) -> Table {
    let figures = [
        Figure::Wall,
        Figure::Cpu,
        Figure::Peak,
        Figure::Wire,
        Figure::Allocated,
    ];
    let ratios = [
        ("× blocksync", Tool::Blocksync),
        ("× scan limit", Tool::ScanLimit),
        ("× wire limit", Tool::WireLimitAes),
    ];
    let titles = figures.map(Figure::title).into_iter();
    let titles: Vec<_> = titles.chain(ratios.map(|(title, _)| title)).collect();
    let mut table = Table::new(caption, &["case", "tool"], &titles);
    for entry in samples.keys() {
        let ratio = |(_, tool)| samples.ratio(&entry, &Entry { tool, ..entry });
        let mut row = vec![entry.case.to_string(), entry.tool.to_string()];
        row.extend(figures.map(|figure| samples.cell(&entry, figure)));
        row.extend(ratios.map(|yardstick| cell(ratio(yardstick), 2)));
        table.push(row);
    }
    table
}
