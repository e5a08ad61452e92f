//! What writes in the test guest all the time: `writer A B` appends numbered, checksummed records to
//! two files, each first to A and then to B, and syncs after each. So at every instant A holds the
//! records from 1 on without a gap, and B the same or one less. Once a second it says on standard
//! output how many there are and for how long at most it has been kept from going on since.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::time::{Duration, Instant};

/// Between two records: an emulated processor that never rests takes one of the host's.
const REST: Duration = Duration::from_millis(15);

/// The test reads records of this length; see `tests/src/hypervisor/records.rs`.
const RECORD: usize = 64;

fn record(number: u64) -> [u8; RECORD] {
    let mut sum: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in number.to_le_bytes() {
        sum = (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
    let text = format!("{number:016} {sum:016x}");
    let mut record = [b' '; RECORD];
    record[..text.len()].copy_from_slice(text.as_bytes());
    record[RECORD - 1] = b'\n';
    record
}

/// Opens a file behind its last whole record, and gives the number of that.
fn open(path: &str) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    let records = file.metadata()?.len() / RECORD as u64;
    file.set_len(records * RECORD as u64)?;
    Ok((file, records))
}

fn append(file: &mut File, number: u64) -> io::Result<()> {
    file.write_all(&record(number))?;
    file.sync_all()
}

fn main() -> io::Result<()> {
    let paths: Vec<String> = std::env::args().skip(1).collect();
    let (mut a, in_a) = open(&paths[0])?;
    let (mut b, in_b) = open(&paths[1])?;
    for number in in_b + 1..=in_a {
        append(&mut b, number)?;
    }
    let mut out = io::stdout();
    let (mut longest, mut told) = (Duration::ZERO, Instant::now());
    for number in in_a + 1.. {
        let began = Instant::now();
        append(&mut a, number)?;
        append(&mut b, number)?;
        longest = longest.max(began.elapsed());
        std::thread::sleep(REST);
        if told.elapsed() >= Duration::from_secs(1) {
            writeln!(out, "GUEST wrote {number} longest {} ms", longest.as_millis())?;
            (longest, told) = (Duration::ZERO, Instant::now());
        }
    }
    Ok(())
}
