//! What kind of machine this is, so that figures can be read by somebody who has another.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Lines that say what matters for the figures.
pub(crate) fn describe(dir: &Path) -> Vec<String> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let file_system = output(
        "findmnt",
        &["-n", "-o", "FSTYPE", "-T", &dir.to_string_lossy()],
    );
    vec![
        format!("{cores} cores ({}), {}", processor(), memory()),
        format!(
            "kernel {}, file system {file_system}",
            output("uname", &["-r"])
        ),
        format!(
            "{}; {}; {}",
            output("ssh", &["-V"]),
            output("rsync", &["--version"]),
            output("qemu-img", &["--version"])
        ),
        format!("load before the first run: {}", load()),
    ]
}

/// The compiler that Cargo uses here.
pub(crate) fn compiler() -> String {
    output("rustc", &["--version"])
}

fn processor() -> String {
    let known: Vec<_> = ["avx2", "avx512f", "aes", "vaes"]
        .into_iter()
        .filter(|feature| has(feature))
        .collect();
    format!("{}, {}", std::env::consts::ARCH, known.join(" "))
}

/// Whether the processor says that it has a feature, by Linux's name for it.
pub(crate) fn has(feature: &str) -> bool {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let is_list = |line: &&str| line.starts_with("flags") || line.starts_with("Features");
    cpu.lines()
        .find(is_list)
        .is_some_and(|list| list.split(' ').any(|found| found == feature))
}

fn memory() -> String {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = kib.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kib.map_or_else(
        || "unknown memory".to_owned(),
        |kib| format!("{:.0} GiB", kib / 1_048_576.0),
    )
}

fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or("unknown").to_owned()
}

/// The first line that a program prints, on whichever of its outputs.
fn output(program: &str, args: &[&str]) -> String {
    let Ok(output) = Command::new(program).args(args).output() else {
        return format!("no {program}");
    };
    let bytes = if output.stdout.is_empty() {
        output.stderr
    } else {
        output.stdout
    };
    String::from_utf8_lossy(&bytes)
        .lines()
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned()
}
