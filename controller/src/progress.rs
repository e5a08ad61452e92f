//! How far a run is: a bar on a terminal, else a line every few seconds, always on standard error.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a line is printed where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// How a run shows its progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Not at all.
    None,
    /// A line every few seconds.
    Lines,
    /// A bar, in colour if the user lets us.
    Bar {
        /// `NO_COLOR` is not set.
        colour: bool,
    },
}

impl Style {
    /// What fits standard error, unless the user wants none.
    pub fn choose(wanted: bool, terminal: bool, colour: bool) -> Self {
        match (wanted, terminal) {
            (false, _) => Self::None,
            (true, false) => Self::Lines,
            (true, true) => Self::Bar { colour },
        }
    }
}

/// The progress of one run.
#[derive(Debug)]
pub struct Progress {
    total: u64,
    started: Instant,
    shown: Shown,
}

#[derive(Debug)]
enum Shown {
    Nothing,
    Lines { last: Instant },
    Bar(ProgressBar),
}

impl Progress {
    /// A run over `total` bytes of a disk.
    pub fn new(total: u64, style: &Style) -> Self {
        let started = Instant::now();
        let shown = match *style {
            Style::None => Shown::Nothing,
            Style::Lines => Shown::Lines { last: started },
            Style::Bar { colour } => Shown::Bar(bar(total, colour)),
        };
        Self {
            total,
            started,
            shown,
        }
    }

    /// Bytes of the disk that are settled, bytes that were read, and bytes on the wire so far.
    pub fn update(&mut self, settled_bytes: u64, read_bytes: u64, shipped_bytes: u64) {
        let settled = settled_bytes.min(self.total);
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.set_position(settled);
                bar.set_message(format!(
                    "read {}, shipped {}",
                    size(read_bytes),
                    size(shipped_bytes)
                ));
            }
            Shown::Lines { last } if last.elapsed() >= LINE_INTERVAL => {
                *last = Instant::now();
                let line = line(
                    self.total,
                    settled,
                    read_bytes,
                    shipped_bytes,
                    self.started.elapsed(),
                );
                crate::output::to_stderr(&line);
            }
            Shown::Lines { .. } => {}
        }
    }

    /// The run is over: the bar goes, the result says the rest.
    pub fn finish(self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn bar(total: u64, colour: bool) -> ProgressBar {
    let bar_part = if colour { "{bar:28.green}" } else { "{bar:28}" };
    let template = format!(
        "{{percent:>3}}% {bar_part} {{binary_bytes}} of {{binary_total_bytes}}, \
         {{binary_bytes_per_sec}}, {{eta}} left; {{msg}}"
    );
    let style =
        ProgressStyle::with_template(&template).expect("the template is a constant, and valid");
    let bar = bars().add(ProgressBar::new(total));
    bar.set_style(style.progress_chars("=> "));
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}

/// All bars of this program, one below the other: the disks of a VM move side by side. Drawn ten
/// times a second, whatever the agents report.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10)))
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn line(total: u64, settled: u64, read: u64, shipped: u64, elapsed: Duration) -> String {
    let share = if total == 0 {
        1.0
    } else {
        settled as f64 / total as f64
    };
    let mut line = format!(
        "progress: {:.0}% ({} of {}), read {}, shipped {}",
        share * 100.0,
        size(settled),
        size(total),
        size(read),
        size(shipped)
    );
    let seconds = elapsed.as_secs_f64();
    if share > 0.0 && share < 1.0 && seconds > 0.0 {
        let rate = settled as f64 / seconds;
        let left = Duration::from_secs_f64((seconds / share - seconds).min(1e9));
        // Writing to a string does not fail.
        let _ = write!(
            line,
            ", {:.1} MiB/s, {} left",
            rate / f64::from(1 << 20),
            humantime::format_duration(Duration::from_secs(left.as_secs()))
        );
    }
    line.push('\n');
    line
}

fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_share_rate_and_time_left() {
        let line = line(
            100 << 20,
            25 << 20,
            50 << 20,
            1 << 20,
            Duration::from_secs(10),
        );
        assert_eq!(
            line,
            "progress: 25% (25.0 MiB of 100.0 MiB), read 50.0 MiB, shipped 1.0 MiB, 2.5 MiB/s, 30s left\n"
        );
    }

    #[test]
    fn an_empty_disk_is_done_at_once() {
        assert!(line(0, 0, 0, 0, Duration::ZERO).starts_with("progress: 100%"));
    }

    #[test]
    fn no_bar_without_a_terminal_and_nothing_when_quiet() {
        assert_eq!(Style::choose(false, true, true), Style::None);
        assert_eq!(Style::choose(true, false, true), Style::Lines);
        assert_eq!(
            Style::choose(true, true, false),
            Style::Bar { colour: false }
        );
        let mut progress = Progress::new(u64::MAX, &Style::Bar { colour: true });
        progress.update(u64::MAX, 1, 1);
        progress.finish();
    }
}
