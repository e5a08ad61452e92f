//! Disks over links that are slow, and over links that are far away.
//!
//! A slow link joins two network namespaces, and a token bucket at each end keeps its rate. A far
//! one is the bench's relay, which holds every byte for half of the round trip. The two are
//! measured apart: of a run over both nobody could say what it waited for.

use std::fmt;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::case::Case;
use crate::image::Layout;
use crate::lab::check_space;
use crate::link::Link;
use crate::machine;
use crate::rate::Rate;
use crate::report::{Report, Table};
use crate::samples::{Figure, Key, Samples, cell};
use crate::setup::Setup;
use crate::size::Size;
use crate::tool::Tool;

/// What is run over far links: what a login costs, a first copy, and two incremental runs.
const FAR: [(Case, Tool); 4] = [
    (Case::First, Tool::Login),
    (Case::First, Tool::Blocksync),
    (Case::Changed(1), Tool::Blocksync),
    (Case::Changed(1), Tool::BlocksyncKept),
];

/// What is measured.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Which links [default: both]
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Size of the image for slow links, all of it data
    #[arg(long, default_value = "2G")]
    size: Size,
    /// What a slow link carries
    #[arg(long, value_delimiter = ',', default_value = "100mbit,1gbit")]
    rates: Vec<Rate>,
    /// The percentages of blocks that changed, for slow links
    #[arg(long, value_delimiter = ',', default_value = "1,10,50")]
    cases: Vec<Case>,
    /// Also measure these over slow links, beside blocksync and scp
    #[arg(long, value_enum, value_delimiter = ',')]
    tools: Vec<Tool>,
    /// Size of the image for far links, all of it data
    #[arg(long, default_value = "512M")]
    far_size: Size,
    /// Round trips of far links, in milliseconds
    #[arg(long, value_delimiter = ',', default_value = "0,20,100")]
    round_trips: Vec<u64>,
}

/// A kind of link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Limited rates (needs root)
    Slow,
    /// Long round trips
    Far,
}

impl Options {
    /// Only what needs no root.
    pub(crate) fn for_smoke() -> Self {
        Self {
            parts: vec![Part::Far],
            size: Size::MIB,
            rates: Vec::new(),
            cases: Vec::new(),
            tools: Vec::new(),
            far_size: Size::MIB * 8,
            round_trips: vec![20],
        }
    }

    fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }
}

/// What there is between the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Between {
    Rate(Rate),
    RoundTripMs(u64),
}

impl fmt::Display for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate(rate) => rate.fmt(f),
            Self::RoundTripMs(ms) => write!(f, "{ms} ms"),
        }
    }
}

/// A row of either table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    link: Between,
    case: Case,
    tool: Tool,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, {}", self.link, self.case, self.tool)
    }
}

impl Key for Entry {
    const FIELDS: &'static str = "link,case,tool";

    fn fields(&self) -> String {
        format!("{},{},{}", self.link, self.case, self.tool.plain_name())
    }

    fn kind(&self) -> String {
        format!("{}, {}", self.case, self.tool)
    }
}

/// Measures what was asked for.
pub(crate) fn run(setup: &Setup, options: &Options) -> Result<Report> {
    let machine = machine::describe(&setup.dir);
    let mut samples = Samples::new();
    let mut tables = Vec::new();
    if options.wants(Part::Slow) {
        over_slow_links(setup, options, &mut samples)?;
        let caption = format!(
            "Slow links, a dense image of {}; median of {}, scp once.",
            options.size, setup.runs
        );
        tables.push(table_of_rates(caption, &samples));
    }
    if options.wants(Part::Far) {
        over_far_links(setup, options, &mut samples)?;
        let caption = format!(
            "Far links, a dense image of {}; median of {}.",
            options.far_size, setup.runs
        );
        tables.push(table_of_round_trips(caption, &samples, options.far_size));
    }
    Ok(Report::new(&machine, &tables, &samples))
}

fn over_slow_links(setup: &Setup, options: &Options, samples: &mut Samples<Entry>) -> Result<()> {
    let layout = Layout::new(options.size, 1.0)?;
    check_space(&setup.dir, layout, layout.size())?;
    let lab = setup.lab(layout, Link::shaped()?)?;
    let mut measure = |link, case, tool, runs| {
        samples.take(&Entry { link, case, tool }, runs, || {
            lab.measure(case, tool)
        });
    };
    lab.prepare(Case::First)?;
    for &rate in &options.rates {
        lab.link().limit(rate)?;
        // A full copy is the same in every case, and slow.
        measure(Between::Rate(rate), Case::First, Tool::Scp, 1);
    }
    for &case in &options.cases {
        lab.prepare(case)?;
        for &rate in &options.rates {
            lab.link().limit(rate)?;
            let own = [Tool::Blocksync, Tool::BlocksyncKept, Tool::BlocksyncSent];
            let own = &own[..if setup.xfs { 3 } else { 2 }];
            let tools = [own, &options.tools[..]].concat();
            for tool in tools.into_iter().filter(|tool| tool.has_part_in(case)) {
                measure(Between::Rate(rate), case, tool, setup.runs);
            }
        }
    }
    Ok(())
}

fn table_of_rates(caption: String, samples: &Samples<Entry>) -> Table {
    let figures = [Figure::Wall, Figure::Cpu, Figure::Peak, Figure::Wire];
    let titles = [
        &figures.map(Figure::title)[..],
        &["Mbit/s", "times as fast as scp"],
    ];
    let mut table = Table::new(caption, &["link", "case", "tool"], &titles.concat());
    let rate_of = |entry: &Entry| match entry.link {
        Between::Rate(rate) => Some(rate.0),
        Between::RoundTripMs(_) => None,
    };
    let mut entries = samples.keys();
    entries.retain(|entry| rate_of(entry).is_some());
    entries.sort_by_key(rate_of);
    for entry in entries {
        let scp = Entry {
            case: Case::First,
            tool: Tool::Scp,
            ..entry
        };
        let mut row = words(&entry);
        row.extend(figures.map(|figure| samples.cell(&entry, figure)));
        row.push(cell(mbit_per_second(samples, &entry), 0));
        row.push(cell(samples.ratio(&scp, &entry), 1));
        table.push(row);
    }
    table
}

fn words(entry: &Entry) -> Vec<String> {
    let case = match entry.tool {
        Tool::Login => "–".to_owned(),
        _ => entry.case.to_string(),
    };
    vec![entry.link.to_string(), case, entry.tool.to_string()]
}

/// What the link carried, in Mbit/s.
fn mbit_per_second(samples: &Samples<Entry>, entry: &Entry) -> Option<f64> {
    Some(8.0 * samples.median(entry, Figure::Wire)? / samples.median(entry, Figure::Wall)?)
}

fn over_far_links(setup: &Setup, options: &Options, samples: &mut Samples<Entry>) -> Result<()> {
    let layout = Layout::new(options.far_size, 1.0)?;
    check_space(&setup.dir, layout, layout.size())?;
    let lab = setup.lab(layout, Link::Loopback)?;
    for (case, tool) in FAR {
        lab.prepare(case)?;
        for &round_trip_ms in &options.round_trips {
            lab.set_round_trip_ms(round_trip_ms);
            let link = Between::RoundTripMs(round_trip_ms);
            samples.take(&Entry { link, case, tool }, setup.runs, || {
                lab.measure(case, tool)
            });
        }
    }
    Ok(())
}

fn table_of_round_trips(caption: String, samples: &Samples<Entry>, size: Size) -> Table {
    let numbers = ["wall s", "image MB/s", "wire MB", "round trips"];
    let mut table = Table::new(caption, &["round trip", "case", "tool"], &numbers);
    let far = |entry: &Entry| matches!(entry.link, Between::RoundTripMs(_));
    for entry in samples.keys().into_iter().filter(far) {
        let speed = |seconds| (entry.tool != Tool::Login).then_some(size.0 as f64 / 1e6 / seconds);
        let mut row = words(&entry);
        row.push(samples.cell(&entry, Figure::Wall));
        row.push(cell(
            samples.median(&entry, Figure::Wall).and_then(speed),
            0,
        ));
        row.push(samples.cell(&entry, Figure::Wire));
        row.push(cell(round_trips(samples, entry), 1));
        table.push(row);
    }
    table
}

/// How many round trips a run waited for: what it took longer than over no distance, in these.
fn round_trips(samples: &Samples<Entry>, entry: Entry) -> Option<f64> {
    let Between::RoundTripMs(round_trip_ms @ 1..) = entry.link else {
        return None;
    };
    let near = Entry {
        link: Between::RoundTripMs(0),
        ..entry
    };
    let seconds = samples.median(&entry, Figure::Wall)? - samples.median(&near, Figure::Wall)?;
    Some(seconds * 1000.0 / round_trip_ms as f64)
}
