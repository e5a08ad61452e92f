//! The yardsticks: what this machine could do at best.

use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Result, ensure};
use xxhash_rust::xxh3::Xxh3;

use crate::case::Case;
use crate::image::for_each_data;
use crate::tool::Tool;

/// The limits that mean something in a case: without an older copy there are no two disks to
/// scan, and without a change there is nothing to ship.
pub(crate) fn of(case: Case) -> Vec<Tool> {
    match case {
        Case::First => vec![Tool::WireLimit, Tool::WireLimitAes],
        Case::Changed(0) => vec![Tool::ScanLimit],
        Case::Changed(_) => vec![Tool::ScanLimit, Tool::WireLimit, Tool::WireLimitAes],
    }
}

/// Reads and digests the data of all files at once, a thread each, and nothing else.
pub(crate) fn scan(files: &[PathBuf]) -> Result<()> {
    let digests = thread::scope(|scope| {
        let threads: Vec<_> = files
            .iter()
            .map(|file| scope.spawn(|| digest(file)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join())
            .collect::<Vec<_>>()
    });
    for digest in digests {
        let digest = digest.map_err(|_| anyhow::anyhow!("a scanning thread panicked"))??;
        // Also keeps the compiler from leaving the work out.
        ensure!(digest != 0, "a digest of zero");
    }
    Ok(())
}

fn digest(file: &Path) -> Result<u128> {
    let mut state = Xxh3::new();
    for_each_data(file, |piece| state.update(piece))?;
    Ok(state.digest128())
}
