//! The records that the guest writes all the time: `tests/guest/writer.rs`.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::lab;
use crate::process::tool;

/// Bytes of one.
const RECORD: usize = 64;

/// Records that a copy of a guest's disk holds, after the journal of its file system was replayed as
/// a guest would replay it. The copy is not touched.
///
/// # Errors
/// What is wrong with it: a file system that is not whole after that, a gap, a checksum.
///
/// # Panics
/// When a tool is missing.
pub fn records(copy: &Path, format: &str) -> Result<u64, String> {
    let directory =
        TempDir::with_prefix_in("records-", lab::base()).expect("root may make directories");
    let (raw, file) = (
        directory.path().join("raw"),
        directory.path().join("records"),
    );
    let words = ["convert", "-q", "-f", format, "-O", "raw"].map(AsRef::as_ref);
    tool(
        "qemu-img",
        words.into_iter().chain([copy.as_os_str(), raw.as_os_str()]),
    );
    let fsck = |option: &str| {
        let output = Command::new("e2fsck")
            .arg(option)
            .arg(&raw)
            .output()
            .expect("e2fsck is installed");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), said)
    };
    // The journal is replayed, and that is all that there is to be done.
    for (option, fine) in [("-p", [Some(0), Some(1)]), ("-fn", [Some(0); 2])] {
        let (code, said) = fsck(option);
        if !fine.contains(&code) {
            return Err(format!("e2fsck {option}: {code:?} {said}"));
        }
    }
    let dump = format!("dump /records {}", file.display());
    tool("debugfs", ["-R".as_ref(), dump.as_ref(), raw.as_os_str()]);
    let bytes = std::fs::read(&file).unwrap_or_default();
    let whole = bytes.chunks_exact(RECORD);
    let mut number = 0;
    for record in whole {
        if record != expected(number + 1) {
            let found = String::from_utf8_lossy(record);
            // A file may be longer than what was synced; what follows is then zeros to its end.
            if record.iter().all(|byte| *byte == 0) {
                break;
            }
            return Err(format!("record {} is {found:?}", number + 1));
        }
        number += 1;
    }
    Ok(number)
}

/// As the guest writes it: the number, its FNV-1a, spaces.
fn expected(number: u64) -> [u8; RECORD] {
    let sum = number
        .to_le_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
    let text = format!("{number:016} {sum:016x}");
    let mut record = [b' '; RECORD];
    record[..text.len()].copy_from_slice(text.as_bytes());
    record[RECORD - 1] = b'\n';
    record
}
