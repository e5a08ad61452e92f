//! The figures of all runs, as a table for people and as CSV for everything else.

use std::fmt::{self, Write as _};

use anyhow::Result;

use crate::case::Case;
use crate::image::Layout;
use crate::lab::Outcome;
use crate::size::Size;
use crate::tool::Tool;

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Report {
    machine: Vec<String>,
    layout: Layout,
    runs: u32,
    cold: bool,
    notes: Vec<String>,
    rows: Vec<Row>,
    failed: bool,
}

#[derive(Debug)]
struct Row {
    case: Case,
    tool: Tool,
    run: u32,
    outcome: Outcome,
}

const HEADER: &str = "\
| case | tool | wall s | CPU s | peak RSS MiB | wire MB | on disk MiB | × blocksync | × scan limit | × wire limit |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
";

impl Report {
    pub(crate) fn new(machine: Vec<String>, layout: Layout, runs: u32, cold: bool) -> Self {
        Self {
            machine,
            layout,
            runs,
            cold,
            notes: Vec::new(),
            rows: Vec::new(),
            failed: false,
        }
    }

    /// Something that readers of the table must know.
    pub(crate) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Takes a run in; one that failed becomes a note and makes the report invalid.
    pub(crate) fn add(&mut self, case: Case, tool: Tool, run: u32, outcome: Result<Outcome>) {
        match outcome {
            Ok(outcome) => {
                if let Some(sync) = &outcome.sync {
                    self.note(format!("{tool}, {case}: {sync}"));
                }
                self.rows.push(Row {
                    case,
                    tool,
                    run,
                    outcome,
                });
            }
            Err(error) => {
                self.failed = true;
                self.note(format!("FAILED: {tool}, {case}, run {run}: {error:#}"));
            }
        }
    }

    /// Whether every run ended well, with a result equal to its source.
    pub(crate) fn all_valid(&self) -> bool {
        !self.failed
    }

    /// Every single run.
    pub(crate) fn csv(&self) -> String {
        let mut out =
            "case,tool,run,wall_seconds,cpu_seconds,peak_rss_kib,wire_bytes,allocated_bytes\n"
                .to_owned();
        for Row {
            case,
            tool,
            run,
            outcome,
        } in &self.rows
        {
            let figures = &outcome.figures;
            let optional =
                |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
            let tool = tool.to_string().replace(['*', ','], "");
            let line = format!(
                "{case},{tool},{run},{:.4},{:.2},{},{},{}\n",
                figures.wall_seconds,
                figures.cpu_seconds,
                optional(figures.peak_kib),
                figures.wire_bytes,
                optional(outcome.allocated_bytes),
            );
            out.push_str(&line);
        }
        out
    }

    fn median(
        &self,
        case: Case,
        tool: Tool,
        figure: impl Fn(&Outcome) -> Option<f64>,
    ) -> Option<f64> {
        let rows = self
            .rows
            .iter()
            .filter(|row| row.case == case && row.tool == tool);
        median(rows.filter_map(|row| figure(&row.outcome)).collect())
    }

    fn wall(&self, case: Case, tool: Tool) -> Option<f64> {
        self.median(case, tool, |outcome| Some(outcome.figures.wall_seconds))
    }

    /// Cases and tools in the order in which they were measured.
    fn pairs(&self) -> Vec<(Case, Tool)> {
        let mut pairs: Vec<_> = self.rows.iter().map(|row| (row.case, row.tool)).collect();
        pairs.dedup();
        pairs
    }

    fn line(&self, case: Case, tool: Tool) -> String {
        let cells = [
            cell(self.wall(case, tool), 2),
            cell(
                self.median(case, tool, |outcome| Some(outcome.figures.cpu_seconds)),
                2,
            ),
            cell(
                self.median(case, tool, |outcome| {
                    Some(outcome.figures.peak_kib? as f64 / 1024.0)
                }),
                0,
            ),
            cell(
                self.median(case, tool, |outcome| {
                    Some(outcome.figures.wire_bytes as f64 / 1e6)
                }),
                1,
            ),
            cell(
                self.median(case, tool, |outcome| {
                    Some(outcome.allocated_bytes? as f64 / 1048576.0)
                }),
                0,
            ),
            cell(self.ratio(case, tool, Tool::Blocksync), 2),
            cell(self.ratio(case, tool, Tool::ScanLimit), 2),
            cell(self.ratio(case, tool, Tool::WireLimitAes), 2),
        ];
        format!("| {case} | {tool} | {} |\n", cells.join(" | "))
    }

    /// How many times as long as `yardstick` a tool took.
    fn ratio(&self, case: Case, tool: Tool, yardstick: Tool) -> Option<f64> {
        Some(self.wall(case, tool)? / self.wall(case, yardstick)?)
    }
}

fn cell(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.decimals$}"))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        Some((values.get(middle.checked_sub(1)?)? + values.get(middle)?) / 2.0)
    } else {
        values.get(middle).copied()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, data) = (Size(self.layout.size()), Size(self.layout.data_bytes()));
        let cache = if self.cold { "cold" } else { "warm" };
        writeln!(
            f,
            "Image of {size} with {data} of data; {cache} cache; median of {}.",
            self.runs
        )?;
        for line in &self.machine {
            writeln!(f, "- {line}")?;
        }
        f.write_char('\n')?;
        f.write_str(HEADER)?;
        for (case, tool) in self.pairs() {
            f.write_str(&self.line(case, tool))?;
        }
        f.write_char('\n')?;
        for note in &self.notes {
            writeln!(f, "- {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Figures;

    fn outcome(wall_seconds: f64) -> Result<Outcome> {
        let figures = Figures {
            wall_seconds,
            cpu_seconds: 1.0,
            wire_bytes: 2_000_000,
            peak_kib: None,
        };
        Ok(Outcome {
            figures,
            allocated_bytes: Some(3 << 20),
            sync: None,
        })
    }

    #[test]
    fn a_row_shows_medians_and_ratios() {
        let layout = Layout::new(Size::MIB * 8, 0.5).unwrap();
        let mut report = Report::new(Vec::new(), layout, 3, false);
        let case = Case::Changed(1);
        for (run, wall) in [(1, 4.0), (2, 9.0), (3, 6.0)] {
            report.add(case, Tool::Blocksync, run, outcome(wall / 3.0));
            report.add(case, Tool::Rsync, run, outcome(wall));
        }
        let line = report.line(case, Tool::Rsync);
        assert_eq!(
            line,
            "| 1% changed | rsync | 6.00 | 1.00 | – | 2.0 | 3 | 3.00 | – | – |\n"
        );
        assert!(report.all_valid());
        assert_eq!(report.csv().lines().count(), 7);
    }

    #[test]
    fn a_failed_run_is_said_and_makes_the_report_invalid() {
        let layout = Layout::new(Size::MIB * 8, 0.5).unwrap();
        let mut report = Report::new(Vec::new(), layout, 1, false);
        report.add(Case::First, Tool::Scp, 1, Err(anyhow::anyhow!("no luck")));
        assert!(!report.all_valid());
        assert!(
            report
                .to_string()
                .contains("FAILED: scp, first copy, run 1: no luck")
        );
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(Vec::new()), None);
    }
}
