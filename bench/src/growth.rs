//! How time, memory and traffic of blocksync grow, with one thing at a time: the size of a disk
//! that is nearly all holes, its data, the share of it that changed, the distance, and the number
//! of a VM's disks.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::case::Case;
use crate::image::Layout;
use crate::lab::{Lab, Outcome, check_space};
use crate::link::Link;
use crate::machine;
use crate::plot::{self, Curve, Panel, Scale};
use crate::report::{Report, Table};
use crate::samples::{Figure, Key, Samples};
use crate::setup::Setup;
use crate::size::Size;
use crate::tool::Tool;
use crate::vm::VmLab;
use crate::volume::Volume;

/// The data of a disk whose size grows, whatever its size.
const SPARSE_DATA: Size = Size(64 << 20);

/// Room for three images of that data, a payload, and what a file system needs for itself.
const VOLUME_SIZE: Size = Size(2 << 30);

/// The disks, all data, of which the changed share or the distance grows.
const DENSE: Size = Size(512 << 20);

/// Each of the disks, all data, whose number grows.
const EACH: Size = Size(128 << 20);

/// The runs at each step, but where the share of change itself grows.
const RUNS: [(Case, Tool); 4] = [
    (Case::First, Tool::Blocksync),
    (Case::Changed(1), Tool::Blocksync),
    (Case::Changed(1), Tool::BlocksyncKept),
    (Case::Changed(0), Tool::BlocksyncKept),
];

/// What grows, and through which steps.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// What grows [default: each in its turn]
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Steps of the size of a disk with little data
    #[arg(long, value_delimiter = ',', default_value = "1G,16G,256G,4T,16T")]
    sizes: Vec<Size>,
    /// Steps of the data of a disk without holes
    #[arg(long, value_delimiter = ',', default_value = "256M,512M,1G,2G,4G")]
    data: Vec<Size>,
    /// Steps of the percentage of blocks that changed
    #[arg(long, value_delimiter = ',', default_value = "0,1,5,10,25,50")]
    changes: Vec<u8>,
    /// Steps of the round trip, in milliseconds
    #[arg(long, value_delimiter = ',', default_value = "0,20,50,100")]
    round_trips: Vec<u64>,
    /// Steps of the number of disks, 8 at most
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8")]
    disks: Vec<u8>,
    /// Also draw each table, as DIR/growth-PART.svg
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
}

impl Options {
    /// One step of what needs no root.
    pub(crate) fn for_smoke() -> Self {
        Self {
            parts: vec![Part::Data],
            sizes: Vec::new(),
            data: vec![Size::MIB * 8],
            changes: Vec::new(),
            round_trips: Vec::new(),
            disks: Vec::new(),
            plots: None,
        }
    }

    fn parts(&self) -> &[Part] {
        match &self.parts[..] {
            [] => Part::value_variants(),
            some => some,
        }
    }
}

/// What grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The size of a disk that is nearly all holes (needs root, for a file system that takes it)
    Size,
    /// The data of a disk
    Data,
    /// The share that changed
    Change,
    /// The round trip
    Delay,
    /// The number of a VM's disks (needs root and libvirt)
    Disks,
}

impl Part {
    fn caption(self) -> String {
        match self {
            Self::Size => format!("Size of a disk with {SPARSE_DATA} of data, on xfs"),
            Self::Data => "Data of a disk without holes".to_owned(),
            Self::Change => format!("Share that changed of a disk with {DENSE} of data"),
            Self::Delay => format!("Round trip, a disk with {DENSE} of data"),
            Self::Disks => format!("Number of a VM's disks, each with {EACH} of data"),
        }
    }

    fn axis(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Data => "data",
            Self::Change => "changed",
            Self::Delay => "round trip",
            Self::Disks => "disks",
        }
    }

    /// The unit of [`Step::value`].
    fn unit(self) -> &'static str {
        match self {
            Self::Size | Self::Data => "GiB",
            Self::Change => "%",
            Self::Delay => "ms",
            Self::Disks => "",
        }
    }

    /// What grows by multiplication is drawn so.
    fn scale(self) -> Scale {
        match self {
            Self::Size | Self::Data => Scale::Log,
            Self::Change | Self::Delay | Self::Disks => Scale::Linear,
        }
    }
}

/// How far it has grown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Bytes(Size),
    Percent(u8),
    RoundTripMs(u64),
    Disks(u8),
}

impl Step {
    fn value(self) -> f64 {
        match self {
            Self::Bytes(size) => size.0 as f64 / (1u64 << 30) as f64,
            Self::Percent(percent) => percent.into(),
            Self::RoundTripMs(ms) => ms as f64,
            Self::Disks(disks) => disks.into(),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(size) => size.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::RoundTripMs(ms) => write!(f, "{ms} ms"),
            Self::Disks(disks) => disks.fmt(f),
        }
    }
}

/// A row of a table: a kind of run at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    part: Part,
    step: Step,
    case: Case,
    tool: Tool,
}

impl Entry {
    /// What makes a curve over the steps.
    fn curve(&self) -> String {
        match self.step {
            Step::Percent(_) => self.tool.to_string(),
            _ => format!("{}, {}", self.case, self.tool),
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}, {}", self.part.axis(), self.step, self.curve())
    }
}

impl Key for Entry {
    const FIELDS: &'static str = "axis,unit,step,case,tool";

    fn fields(&self) -> String {
        let (axis, unit, step) = (self.part.axis(), self.part.unit(), self.step.value());
        let (case, tool) = (self.case, self.tool.plain_name());
        format!("{axis},{unit},{step},{case},{tool}")
    }

    fn kind(&self) -> String {
        format!("{}: {}", self.part.axis(), self.curve())
    }
}

/// Measures what was asked for.
pub(crate) fn run(setup: &Setup, options: &Options) -> Result<Report> {
    let machine = machine::describe(&setup.dir);
    let mut growth = Growth {
        setup: setup.with_controller()?,
        samples: Samples::new(),
    };
    for part in options.parts() {
        match part {
            Part::Size => growth.by_size(&options.sizes)?,
            Part::Data => growth.by_data(&options.data)?,
            Part::Change => growth.by_change(&options.changes)?,
            Part::Delay => growth.by_delay(&options.round_trips)?,
            Part::Disks => growth.by_disks(&options.disks)?,
        }
    }
    let samples = growth.samples;
    let tables = options.parts().iter();
    let tables: Vec<_> = tables
        .map(|part| table(*part, setup.runs, &samples))
        .collect();
    if let Some(dir) = &options.plots {
        draw(dir, options.parts(), &samples)?;
    }
    Ok(Report::new(&machine, &tables, &samples))
}

/// What has been measured so far.
#[derive(Debug)]
struct Growth {
    setup: Setup,
    samples: Samples<Entry>,
}

impl Growth {
    fn by_size(&mut self, sizes: &[Size]) -> Result<()> {
        let volume = Volume::new(&self.setup.dir, VOLUME_SIZE)?;
        for &size in sizes {
            let layout = Layout::new(size, SPARSE_DATA.0 as f64 / size.0 as f64)?;
            let lab = self.setup.lab_in(volume.path(), layout, Link::Loopback)?;
            self.step(&lab, Part::Size, Step::Bytes(size), &RUNS)?;
        }
        Ok(())
    }

    fn by_data(&mut self, data: &[Size]) -> Result<()> {
        for &size in data {
            let lab = self.dense_lab(size)?;
            self.step(&lab, Part::Data, Step::Bytes(size), &RUNS)?;
        }
        Ok(())
    }

    fn by_change(&mut self, changes: &[u8]) -> Result<()> {
        let lab = self.dense_lab(DENSE)?;
        for &percent in changes {
            let case = Case::Changed(percent);
            let runs = [(case, Tool::Blocksync), (case, Tool::BlocksyncKept)];
            self.step(&lab, Part::Change, Step::Percent(percent), &runs)?;
        }
        Ok(())
    }

    fn by_delay(&mut self, round_trips: &[u64]) -> Result<()> {
        let lab = self.dense_lab(DENSE)?;
        for &round_trip_ms in round_trips {
            lab.set_round_trip_ms(round_trip_ms);
            self.step(&lab, Part::Delay, Step::RoundTripMs(round_trip_ms), &RUNS)?;
        }
        Ok(())
    }

    fn by_disks(&mut self, disks: &[u8]) -> Result<()> {
        for &disks in disks {
            let layout = Layout::new(EACH, 1.0)?;
            let Some(lab) = VmLab::new(&self.setup.controller()?, layout, disks)? else {
                self.samples
                    .note("the number of disks was left out".to_owned());
                return Ok(());
            };
            let step = Step::Disks(disks);
            self.each(Part::Disks, step, &RUNS, |case, tool| {
                lab.measure(case, tool)
            });
        }
        Ok(())
    }

    fn dense_lab(&self, size: Size) -> Result<Lab> {
        let layout = Layout::new(size, 1.0)?;
        check_space(&self.setup.dir, layout, layout.size())?;
        self.setup.lab(layout, Link::Loopback)
    }

    fn step(&mut self, lab: &Lab, part: Part, step: Step, runs: &[(Case, Tool)]) -> Result<()> {
        for &run in runs {
            lab.prepare(run.0)?;
            self.each(part, step, &[run], |case, tool| lab.measure(case, tool));
        }
        Ok(())
    }

    fn each(
        &mut self,
        part: Part,
        step: Step,
        runs: &[(Case, Tool)],
        measure: impl Fn(Case, Tool) -> Result<Outcome>,
    ) {
        for &(case, tool) in runs {
            let entry = Entry {
                part,
                step,
                case,
                tool,
            };
            let samples = &mut self.samples;
            samples.take(&entry, self.setup.runs, || measure(case, tool));
        }
    }
}

fn table(part: Part, runs: u32, samples: &Samples<Entry>) -> Table {
    let figures = [Figure::Wall, Figure::Cpu, Figure::Peak, Figure::Wire];
    let caption = format!("{}; median of {runs}.", part.caption());
    let titles = figures.map(Figure::title);
    let mut table = Table::new(caption, &[part.axis(), "run"], &titles);
    for entry in entries(part, samples) {
        let mut row = vec![entry.step.to_string(), entry.curve()];
        row.extend(figures.map(|figure| samples.cell(&entry, figure)));
        table.push(row);
    }
    table
}

fn entries(part: Part, samples: &Samples<Entry>) -> Vec<Entry> {
    let mut entries = samples.keys();
    entries.retain(|entry| entry.part == part);
    entries
}

fn draw(dir: &Path, parts: &[Part], samples: &Samples<Entry>) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    for &part in parts {
        let panels = [Figure::Wall, Figure::Peak, Figure::Wire].map(|figure| Panel {
            title: figure.title(),
            curves: curves(&entries(part, samples), figure, samples),
        });
        let name = part.to_possible_value().expect("no part is hidden");
        let path = dir.join(format!("growth-{}.svg", name.get_name()));
        let across = match part.unit() {
            "" => part.axis().to_owned(),
            unit => format!("{}, {unit}", part.axis()),
        };
        plot::draw(&path, &across, part.scale(), &panels)?;
    }
    Ok(())
}

fn curves(entries: &[Entry], figure: Figure, samples: &Samples<Entry>) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for entry in entries {
        let Some(value) = samples.median(entry, figure) else {
            continue;
        };
        let (name, point) = (entry.curve(), (entry.step.value(), value));
        match curves.iter_mut().find(|curve| curve.name == name) {
            Some(curve) => curve.points.push(point),
            None => curves.push(Curve {
                name,
                points: vec![point],
            }),
        }
    }
    curves
}
