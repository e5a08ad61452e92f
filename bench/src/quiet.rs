//! What a guest loses while an agent scans a disk beside it, and what `--nice` and `--read-limit`
//! spare it.
//!
//! ```text
//!   fio ── 4 KiB here and there, past the cache ──► guest.img ┐
//!   agent ── a cold image, again and again ───────► disk.img  ┴ one file system
//! ```
//!
//! The image is compared with one that is all holes: so one agent reads, as on one of two hosts.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{major, minor};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::image::write_payload;
use crate::janitor::Janitor;
use crate::size::Size;
use crate::{machine, say, tool};

/// What the scan is told, and what is said of it; the first time there is none.
const BESIDE: [(&str, Option<&[&str]>); 5] = [
    ("nothing", None),
    ("a scan", Some(&[])),
    ("`--nice`", Some(&["--nice"])),
    ("`--read-limit 100M`", Some(&["--read-limit", "100M"])),
    (
        "`--nice --read-limit 100M`",
        Some(&["--nice", "--read-limit", "100M"]),
    ),
];

/// A guest at work: more reads than writes, some at once, none of them from a cache. What happens
/// in the first two seconds is not counted.
const FIO: [&str; 11] = [
    "--name=guest",
    "--rw=randrw",
    "--rwmixread=70",
    "--bs=4k",
    "--iodepth=8",
    "--ioengine=libaio",
    "--direct=1",
    "--time_based",
    "--ramp_time=2",
    "--randrepeat=1",
    "--output-format=json",
];

/// How often it is looked whether fio or a scan has ended.
const LOOK: Duration = Duration::from_millis(20);

/// Measures what a guest loses beside a scan.
#[derive(Debug, clap::Args)]
pub(crate) struct Quiet {
    /// Size of the image that is scanned
    #[arg(long, default_value = "8G")]
    size: Size,
    /// Size of the guest's own image
    #[arg(long, default_value = "1G")]
    guest_size: Size,
    /// Seconds of each run that count
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// Runs of each; the table shows the one with the median of all operations
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Where the images are made, in a directory of their own that is removed at the end
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Use this controller instead of building it
    #[arg(long, value_name = "PATH")]
    controller: Option<PathBuf>,
}

/// What a run showed.
#[derive(Debug)]
struct Figures {
    reads_per_second: f64,
    writes_per_second: f64,
    read_p99_ms: f64,
    write_p99_ms: f64,
    scan_mb_per_second: Option<f64>,
}

impl Figures {
    fn operations(&self) -> f64 {
        self.reads_per_second + self.writes_per_second
    }
}

impl Quiet {
    /// Measures, and prints the table.
    pub(crate) fn run(&self) -> Result<()> {
        ensure!(nix::unistd::geteuid().is_root(), "a cold cache needs root");
        let place = Place::make(self)?;
        // Run by run, so that what the machine does meanwhile falls on all alike.
        let mut rows: [Vec<Figures>; BESIDE.len()] = Default::default();
        for run in 1..=self.runs {
            for ((beside, options), row) in BESIDE.iter().zip(&mut rows) {
                say(&format!("beside {beside}, run {run} of {}", self.runs));
                row.push(place.measure(self.seconds, *options)?);
            }
        }
        write!(std::io::stdout(), "{}", table(&place.dir, rows)).context("writing the table")
    }
}

/// The images, removed when dropped.
struct Place {
    dir: PathBuf,
    controller: PathBuf,
    _janitor: Janitor,
}

impl Place {
    fn make(options: &Quiet) -> Result<Self> {
        let controller = match &options.controller {
            Some(path) => path.clone(),
            None => tool::build_controller()?,
        };
        let dir = TempDir::with_prefix_in("kvm-clone-bench-", &options.dir)
            .with_context(|| format!("making a directory in {}", options.dir.display()))?
            .keep();
        let place = Self {
            _janitor: Janitor::hire(&dir)?,
            dir,
            controller,
        };
        write_payload(&place.dir.join("disk.img"), options.size.0)?;
        write_payload(&place.dir.join("guest.img"), options.guest_size.0)?;
        File::create(place.dir.join("holes.img"))?.set_len(options.size.0)?;
        nix::unistd::sync();
        fs::write("/proc/sys/vm/drop_caches", "3").context("dropping the page cache")?;
        Ok(place)
    }

    /// Runs fio, and scans until it has ended.
    fn measure(&self, seconds: u32, scan: Option<&[&str]>) -> Result<Figures> {
        let said = self.dir.join("fio.json");
        let mut fio = Command::new("fio")
            .args(FIO)
            .arg(format!("--runtime={seconds}"))
            .arg(format!(
                "--filename={}",
                self.dir.join("guest.img").display()
            ))
            .stdin(Stdio::null())
            .stdout(File::create(&said)?)
            .spawn()
            .context("running fio: is it installed?")?;
        let started = Instant::now();
        let mut scanned = 0;
        while let (Some(options), None) = (scan, fio.try_wait()?) {
            scanned += self.scan(options, &mut fio)?;
        }
        ensure!(fio.wait()?.success(), "fio failed");
        let per_second = scanned as f64 / 1e6 / started.elapsed().as_secs_f64();
        let said = serde_json::from_slice(&fs::read(said)?).context("reading what fio says")?;
        figures(&said, scan.map(|_| per_second)).context("fio says something else than usual")
    }

    /// Scans once, or until fio has ended; returns the bytes that were read. A scan leaves the
    /// cache as it was, so the next one is cold too.
    fn scan(&self, options: &[&str], fio: &mut Child) -> Result<u64> {
        let said = self.dir.join("scan.json");
        let mut scan = tool::isolated(&self.controller, &self.dir)
            .args(["-o", "json", "--no-progress", "disk", "diff"])
            .args(options)
            .args([self.dir.join("disk.img"), self.dir.join("holes.img")])
            .stdin(Stdio::null())
            .stdout(File::create(&said)?)
            .stderr(Stdio::null())
            .spawn()
            .context("running the controller")?;
        while scan.try_wait()?.is_none() {
            if fio.try_wait()?.is_some() {
                kill(Pid::from_raw(scan.id().try_into()?), Signal::SIGINT)?;
                break;
            }
            thread::sleep(LOOK);
        }
        scan.wait()?;
        let result: Value =
            serde_json::from_slice(&fs::read(said)?).context("reading the result of disk diff")?;
        let stopped = result["error"]["code"] == "cancelled";
        ensure!(
            result["success"] == true || stopped,
            "a scan failed: {result}"
        );
        Ok(result["bytes_read_source"].as_u64().unwrap_or(0))
    }
}

fn figures(fio: &Value, scan_mb_per_second: Option<f64>) -> Option<Figures> {
    let job = &fio["jobs"][0];
    let p99_ms = |side: &str| {
        let ns = job[side]["clat_ns"]["percentile"]["99.000000"].as_f64()?;
        Some(ns / 1e6)
    };
    Some(Figures {
        reads_per_second: job["read"]["iops"].as_f64()?,
        writes_per_second: job["write"]["iops"].as_f64()?,
        read_p99_ms: p99_ms("read")?,
        write_p99_ms: p99_ms("write")?,
        scan_mb_per_second,
    })
}

fn table(dir: &Path, rows: [Vec<Figures>; BESIDE.len()]) -> String {
    let mut lines: Vec<String> = machine::describe(dir);
    lines.extend([
        format!("I/O scheduler of the device: {}", scheduler(dir)),
        String::new(),
        "| beside the guest | IOPS | of alone | read p99 ms | write p99 ms | scan MB/s |"
            .to_owned(),
        "| --- | ---: | ---: | ---: | ---: | ---: |".to_owned(),
    ]);
    let rows = rows.map(middle);
    let alone = rows[0].as_ref().map_or(0.0, Figures::operations);
    for ((beside, _), figures) in BESIDE.iter().zip(rows.iter().flatten()) {
        let scan = figures.scan_mb_per_second;
        lines.push(format!(
            "| {beside} | {:.0} | {:.0}% | {:.1} | {:.1} | {} |",
            figures.operations(),
            100.0 * figures.operations() / alone,
            figures.read_p99_ms,
            figures.write_p99_ms,
            scan.map_or_else(|| "–".to_owned(), |scan| format!("{scan:.0}")),
        ));
    }
    lines.join("\n") + "\n"
}

/// The run with the median of all operations.
fn middle(mut runs: Vec<Figures>) -> Option<Figures> {
    runs.sort_by(|one, other| one.operations().total_cmp(&other.operations()));
    let middle = runs.len() / 2;
    runs.into_iter().nth(middle)
}

/// The one in brackets is in use. A partition has that of its disk.
fn scheduler(dir: &Path) -> String {
    let device = fs::metadata(dir).map_or(0, |metadata| metadata.dev());
    let device = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    ["queue/scheduler", "../queue/scheduler"]
        .iter()
        .find_map(|file| fs::read_to_string(Path::new(&device).join(file)).ok())
        .map_or_else(|| "unknown".to_owned(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fio_says_is_read() {
        let side = |iops: f64, p99: u64| {
            let percentile = serde_json::json!({ "99.000000": p99 });
            serde_json::json!({ "iops": iops, "clat_ns": { "percentile": percentile } })
        };
        let job = serde_json::json!({
            "read": side(700.0, 2_500_000), "write": side(300.5, 4_000_000),
        });
        let said = serde_json::json!({ "jobs": [job] });
        let read = figures(&said, Some(90.0)).unwrap();
        assert_eq!(read.operations(), 1000.5);
        assert_eq!((read.read_p99_ms, read.write_p99_ms), (2.5, 4.0));
        assert!(figures(&serde_json::json!({}), None).is_none());
    }
}
