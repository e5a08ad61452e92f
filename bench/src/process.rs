//! What the processes that the bench started have used, read from `/proc`.
//!
//! The bench is the subreaper of all its descendants, so that nothing that detaches itself, here
//! or behind the bench's sshd, leaves the sum.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};

/// A line of `/proc/PID/stat`.
#[derive(Debug)]
struct Stat {
    pid: u32,
    name: String,
    state: char,
    parent: u32,
    own_ticks: u64,
    reaped_ticks: u64,
}

impl Stat {
    /// `None` for a process that is gone.
    fn read(pid: &str) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(line: &str) -> Option<Self> {
        // The name stands in parentheses and may hold some itself.
        let (pid, rest) = line.split_once(" (")?;
        let (name, rest) = rest.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self {
            pid: pid.parse().ok()?,
            name: name.to_owned(),
            state: fields.first()?.chars().next()?,
            parent: u32::try_from(number(1)?).ok()?,
            own_ticks: number(11)? + number(12)?,
            reaped_ticks: number(13)? + number(14)?,
        })
    }
}

/// All descendants of this process.
fn descendants() -> Result<Vec<Stat>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        all.extend(
            entry?
                .file_name()
                .to_str()
                .filter(|name| is_pid(name))
                .and_then(Stat::read),
        );
    }
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for stat in &all {
        children.entry(stat.parent).or_default().push(stat.pid);
    }
    let mut found = BTreeSet::new();
    let mut queue = vec![std::process::id()];
    while let Some(pid) = queue.pop() {
        for &child in children.get(&pid).into_iter().flatten() {
            found.insert(child);
            queue.push(child);
        }
    }
    all.retain(|stat| found.contains(&stat.pid));
    Ok(all)
}

fn is_pid(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_digit())
}

/// Processor seconds of all descendants so far, the ended ones included.
pub(crate) fn cpu_seconds() -> Result<f64> {
    let reaped = Stat::read("self")
        .context("reading /proc/self/stat")?
        .reaped_ticks;
    let living: u64 = descendants()?
        .iter()
        .map(|stat| stat.own_ticks + stat.reaped_ticks)
        .sum();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
    Ok((reaped + living) as f64 / per_second as f64)
}

/// How many descendants still run.
pub(crate) fn running() -> Result<usize> {
    Ok(descendants()?
        .iter()
        .filter(|stat| stat.state != 'Z')
        .count())
}

/// Raises `peaks` to the largest resident size in KiB that the kernel has seen of each
/// descendant, by process name.
pub(crate) fn note_peaks(peaks: &mut BTreeMap<String, u64>) -> Result<()> {
    for stat in descendants()? {
        if let Some(kib) = peak_kib(stat.pid) {
            let peak = peaks.entry(stat.name).or_default();
            *peak = kib.max(*peak);
        }
    }
    Ok(())
}

fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_is_read() {
        let line = "42 (a) b (c) S 7 1 1 0 -1 4194560 1 2 3 4 11 12 13 14 20 0 1";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.pid, stat.parent, stat.state), (42, 7, 'S'));
        assert_eq!(
            (stat.name.as_str(), stat.own_ticks, stat.reaped_ticks),
            ("a) b (c", 23, 27)
        );
    }

    #[test]
    fn a_child_counts_while_it_lives_and_after() {
        let before = cpu_seconds().unwrap();
        let busy = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo; read line";
        let mut child = Command::new("sh")
            .args(["-c", busy])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let mut peaks = BTreeMap::new();
        note_peaks(&mut peaks).unwrap();
        assert!(cpu_seconds().unwrap() > before, "while it lives");
        assert!(!peaks.is_empty());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(cpu_seconds().unwrap() > before, "after it ended");
    }
}
