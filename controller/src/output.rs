//! What goes to standard output and to standard error. Results are data and go to the first;
//! everything else goes to the second. A reader that went away is no failure.

use std::io::Write as _;

use bytesize::ByteSize;
use comfy_table::Table;
use serde::Serialize;

use crate::cli::options::OutputFormat;
use crate::error::{Error, ErrorCode, Result};
use crate::transfer::TransferResult;
use crate::vm::VmResult;
use crate::vm::result::Scan;

/// Writes to standard output. A closed pipe ends the output and nothing else.
///
/// # Errors
/// When standard output cannot be written: a full disk behind a redirection.
pub fn to_stdout(bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(bytes.as_ref())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("writing to standard output", error))
        }
        _ => Ok(()),
    }
}

/// Writes to standard error; there is nobody to tell if that fails. What a host says is in there,
/// and it has no say in what a terminal does.
pub fn to_stderr(text: &str) {
    let _ = std::io::stderr()
        .lock()
        .write_all(harmless(text).as_bytes());
}

/// Prints a result in the form that the user chose; `text` is only asked for where it is needed.
///
/// # Errors
/// As [`to_stdout`].
pub fn print(
    result: &impl Serialize,
    format: OutputFormat,
    text: impl FnOnce() -> String,
) -> Result<()> {
    let internal = |error: &dyn std::fmt::Display| {
        Error::new(ErrorCode::Internal, "the result cannot be printed").caused_by(error.to_string())
    };
    to_stdout(match format {
        OutputFormat::Text => harmless(&text()),
        OutputFormat::Json => {
            plain_json(&serde_json::to_string_pretty(result).map_err(|error| internal(&error))?)
                + "\n"
        }
        OutputFormat::Yaml => serde_saphyr::to_string(result).map_err(|error| internal(&error))?,
    })
}

/// A table without lines, which is easy to cut apart as well.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(header);
    table
}

/// The rows of a table, without the blanks at the ends of its lines.
pub fn table_text(table: &Table) -> String {
    table
        .lines()
        .fold(String::new(), |text, line| text + line.trim_end() + "\n")
}

/// A transfer for people.
pub fn transfer_text(result: &TransferResult) -> String {
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), iec);
    let count =
        |blocks: Option<u64>| blocks.map_or_else(|| "unknown".to_owned(), |n| n.to_string());
    let (source, destination) = (printable(&result.source), printable(&result.destination));
    let mut rows = vec![
        ("disk", format!("{source} -> {destination}")),
        (
            "size",
            format!(
                "{}, {} of it data",
                size(result.bytes_total),
                size(result.bytes_data)
            ),
        ),
        (
            "read",
            format!(
                "{} at the source, {} at the destination",
                size(result.bytes_read_source),
                size(result.bytes_read_destination)
            ),
        ),
        (
            "not read",
            format!(
                "{} at the source, {} at the destination: unchanged since the last run",
                size(result.bytes_trusted_source),
                size(result.bytes_trusted_destination)
            ),
        ),
        (
            "on the wire",
            format!("{}{}", size(result.bytes_wire), route(result)),
        ),
        (
            "blocks",
            format!(
                "{} changed, {} zeroed, {} unchanged",
                count(result.blocks_changed),
                count(result.blocks_zeroed),
                count(result.blocks_unchanged)
            ),
        ),
        ("time", time(result)),
        ("verified", result.verified.to_owned()),
    ];
    if result.operation != "disk-sync" || result.dry_run {
        rows.retain(|(name, _)| *name != "verified");
        rows.push(("would ship", size(result.bytes_changed)));
    }
    let trusted = [
        result.bytes_trusted_source,
        result.bytes_trusted_destination,
    ];
    if trusted.into_iter().flatten().all(|bytes| bytes == 0) {
        rows.retain(|(name, _)| *name != "not read");
    }
    if let Some(offset) = result.first_difference {
        rows.push(("first difference", format!("at byte {offset}")));
    }
    if let Some(consistency) = result.consistency {
        rows.push(("consistency", consistency.to_string()));
    }
    let width = rows
        .iter()
        .map(|(name, _)| name.len())
        .max()
        .unwrap_or_default();
    rows.into_iter()
        .fold(headline(result), |text, (name, value)| {
            text + &format!("  {name:width$}  {value}\n")
        })
}

/// The result of an operation on a whole VM, for people.
pub fn vm_text(result: &VmResult) -> String {
    let mut text = format!(
        "{}: {} of {} -> {} of {}{}\n",
        result.operation,
        printable(&result.vm),
        result.source,
        printable(&result.target_vm),
        result.destination,
        if result.dry_run {
            " (dry run; nothing was changed)"
        } else {
            ""
        },
    );
    if let Some(plan) = &result.plan {
        text += &format!("  {:12}  {}\n", "uuid", plan.uuid);
        for mac in &plan.macs {
            text += &format!("  {:12}  {mac}\n", "interface");
        }
        for file in &plan.files {
            text += &format!(
                "  {:12}  {} -> {} ({} of data)\n",
                file.target,
                printable(&file.source),
                printable(&file.destination),
                iec(file.bytes_data)
            );
        }
    }
    for disk in &result.disks {
        let figure = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), iec);
        let transfer = &disk.transfer;
        text += &format!(
            "  {:12}  {}{}: {} of {} data{}, {} on the wire{}\n",
            disk.target,
            transfer.method,
            match disk.scan {
                Some(Scan::Changes) => ", only what was written since",
                Some(Scan::Full) | None => "",
            },
            figure(transfer.bytes_changed),
            figure(transfer.bytes_data),
            if result.operation == "verify" {
                " differ"
            } else {
                " changed"
            },
            figure(transfer.bytes_wire),
            route(transfer)
                .split_once(" by ")
                .map_or(String::new(), |(_, by)| format!(", by {by}")),
        );
    }
    if let Some(consistency) = result.consistency {
        text += &format!("  {:12}  {consistency}\n", "consistency");
    }
    for checkpoint in &result.checkpoints {
        text += &format!("  {:12}  {}\n", "checkpoint", printable(checkpoint));
    }
    for difference in result.definition_differences.iter().flatten() {
        text += &format!("  {:12}  {}\n", "definition", printable(difference));
    }
    text + &format!("  {:12}  {:.1} s\n", "time", result.duration_seconds)
}

fn headline(result: &TransferResult) -> String {
    let outcome = match (result.operation, result.success, result.dry_run) {
        (_, false, _) => "failed",
        ("disk-verify", ..) => "equal",
        ("disk-diff", ..) => "compared; nothing was written",
        (_, _, true) => "dry run; nothing was written",
        _ if result.resumed => "done; an interrupted run was taken up",
        _ => "done",
    };
    format!("{}: {outcome}\n", result.operation)
}

fn route(result: &TransferResult) -> String {
    match &result.route {
        Some(route) => format!(
            ", {} by route {}",
            result.method,
            format!("{route:?}").to_lowercase()
        ),
        None => String::new(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn time(result: &TransferResult) -> String {
    let seconds = result.duration_seconds;
    match result.bytes_read_source {
        Some(bytes) if seconds > 0.0 => {
            let rate = bytes as f64 / seconds / f64::from(1 << 20);
            format!("{seconds:.1} s, {rate:.0} MiB/s of the source")
        }
        _ => format!("{seconds:.1} s"),
    }
}

/// A size for people.
pub fn iec(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// A name that may hold anything, on one line of a terminal.
pub fn printable(name: &str) -> String {
    escaped(name, |_| false)
}

/// Lines that may hold anything, for a terminal.
fn harmless(text: &str) -> String {
    // ssh ends its lines in both characters.
    escaped(&text.replace("\r\n", "\n"), |c| matches!(c, '\n' | '\t'))
}

/// JSON says the same, without the control characters that its strings may hold as they are: DEL
/// and those of eight bits.
fn plain_json(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_control() && c != '\n' {
            plain += &format!("\\u{:04x}", u32::from(c));
        } else {
            plain.push(c);
        }
    }
    plain
}

fn escaped(text: &str, is_spared: impl Fn(char) -> bool) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && !is_spared(c) {
            plain.extend(c.escape_default());
        } else {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_write_to_the_terminal() {
        assert_eq!(printable("hv:/a\u{1b}[2J\nü"), "hv:/a\\u{1b}[2J\\nü");
    }

    #[test]
    fn what_a_host_says_keeps_its_lines_and_cannot_write_to_the_terminal() {
        let said = "error: hv: \u{1b}]0;x\u{7}\r\ncaused by:\tdenied\r\u{9b}2J\n";
        let plain = "error: hv: \\u{1b}]0;x\\u{7}\ncaused by:\tdenied\\r\\u{9b}2J\n";
        assert_eq!(harmless(said), plain);
    }

    #[test]
    fn no_format_writes_to_the_terminal_as_it_is_told() {
        let said = "a\u{1b}[2J\u{7f}\u{9b}b\r\u{85}c";
        let json = plain_json(&serde_json::to_string(said).unwrap());
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), said);
        let yaml = serde_saphyr::to_string(&said).unwrap();
        for text in [harmless(&format!("{said}\n\tx")), json, yaml] {
            let control = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
            assert_eq!(text.find(control), None, "{text:?}");
        }
    }

    #[test]
    fn tables_are_plain() {
        let mut table = table(&["HOST", "STATE"]);
        table.add_row(["hv1", "ok"]);
        assert_eq!(table_text(&table), " HOST  STATE\n hv1   ok\n");
    }
}
