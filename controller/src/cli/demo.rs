//! `demo`: the whole thing on a sample disk, and what travelled against what a copy would carry.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_clone_protocol::PARTIAL_SUFFIX;
use kvm_clone_protocol::units::BLOCK_SIZE;
use serde::Serialize;
use uuid::Uuid;

use super::App;
use super::options::OutputFormat;
use crate::endpoint::{DiskSpec, HostSpec};
use crate::error::{Error, ErrorCode, Result};
use crate::host::Host;
use crate::output;
use crate::transfer::{self, Context, Operation, Options, Request, TransferResult};

/// Virtual size of the sample disk.
const SIZE: u64 = 2 << 30;

/// The sample disk holds data in every so many blocks' worth of stripes: one in eight.
const STRIPE: u64 = 16;
const STRIPES_APART: u64 = 8;

/// Of a hundred blocks with data, one changes before the second run.
const CHANGED_OF: u64 = 100;

/// The three runs of the demonstration.
#[derive(Debug, Serialize)]
struct DemoResult {
    operation: &'static str,
    success: bool,
    first_copy: TransferResult,
    second_sync: TransferResult,
    verify: TransferResult,
}

/// Makes a sample disk, copies it, changes it, syncs it, verifies it, and removes it.
///
/// # Errors
/// Those of the runs; what was made is removed all the same.
pub(super) async fn run(app: &App, host: Option<HostSpec>) -> Result<()> {
    let host = host.unwrap_or(HostSpec::Local);
    let directory = tempfile::Builder::new()
        .prefix("kvm-clone-demo-")
        .tempdir_in(std::env::temp_dir())
        .map_err(|error| Error::io("making a directory for the sample disk", error))?;
    let source = directory.path().join("sample.img");
    let copy = match &host {
        HostSpec::Local => directory.path().join("copy.img"),
        HostSpec::Ssh(_) => PathBuf::from(format!(
            "/var/tmp/kvm-clone-demo-{}.img",
            Uuid::new_v4().simple()
        )),
    };
    let context = &app.transfer_context();
    let demo = Demo {
        context,
        source,
        host,
        copy,
    };
    let outcome = demo.play(app.format()).await;
    let cleaned = demo.clean_up().await;
    outcome.and(cleaned)
}

struct Demo<'a> {
    context: &'a Context,
    source: PathBuf,
    host: HostSpec,
    copy: PathBuf,
}

impl Demo<'_> {
    async fn play(&self, format: OutputFormat) -> Result<()> {
        if format == OutputFormat::Text {
            let (size, data) = (output::iec(SIZE), output::iec(SIZE / STRIPES_APART));
            output::to_stdout(format!("a sample disk of {size}, {data} of it data\n"))?;
        }
        let source = self.source.clone();
        blocking(move || fill(&source, Fill::New, SIZE)).await?;
        let first_copy = self.transfer(Operation::Sync, "first copy", format).await?;
        let source = self.source.clone();
        blocking(move || fill(&source, Fill::Change, SIZE)).await?;
        let second_sync = self.transfer(Operation::Sync, "1% changed", format).await?;
        let verify = self.transfer(Operation::Verify, "verify", format).await?;
        let result = DemoResult {
            operation: "demo",
            success: true,
            first_copy,
            second_sync,
            verify,
        };
        output::print(&result, format, || {
            "source and copy are equal; both are removed now (an agent stays in the host's cache \
             directory: see \"agent remove\")\n"
                .to_owned()
        })
    }

    async fn transfer(
        &self,
        operation: Operation,
        title: &str,
        format: OutputFormat,
    ) -> Result<TransferResult> {
        let request = Request {
            operation,
            source: DiskSpec::at(HostSpec::Local, &self.source),
            destination: DiskSpec::at(self.host.clone(), &self.copy),
            dry_run: false,
            preserve: None,
            options: Options::default(),
        };
        let mut result = transfer::run(self.context, &request).await;
        if let Some(error) = result.error.take() {
            return Err(error);
        }
        if format == OutputFormat::Text {
            output::to_stdout(line(title, operation, &result))?;
        }
        Ok(result)
    }

    /// The copy goes; the source goes with its directory.
    async fn clean_up(&self) -> Result<()> {
        if self.host == HostSpec::Local {
            return Ok(());
        }
        let host = Host::new(self.host.clone(), Arc::clone(&self.context.ssh));
        let output = host
            .remove_files(&[&self.copy, &partial(&self.copy)])
            .await?;
        if output.status.success() {
            return Ok(());
        }
        let path = self.copy.display();
        Err(Error::new(
            ErrorCode::Io,
            format!("the sample disk {path} on {host} cannot be removed"),
        )
        .caused_by(output.stderr))
    }
}

/// What a run did, for people.
fn line(title: &str, operation: Operation, result: &TransferResult) -> String {
    let carried = output::iec(result.bytes_wire.unwrap_or_default());
    let seconds = result.duration_seconds;
    let beside = match operation {
        Operation::Sync => format!("where a plain copy carries {}", output::iec(SIZE)),
        Operation::Diff | Operation::Verify => "both were read, and are equal".to_owned(),
    };
    format!("  {title:<10}  {carried:>9} travelled in {seconds:.1} s, {beside}\n")
}

/// Where an interrupted first copy leaves what it has.
fn partial(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(PARTIAL_SUFFIX);
    path.with_file_name(name)
}

async fn blocking(work: impl FnOnce() -> std::io::Result<()> + Send + 'static) -> Result<()> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| {
            Error::new(ErrorCode::Internal, "writing the sample disk").caused_by(error)
        })?
        .map_err(|error| Error::io("writing the sample disk", error))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fill {
    New,
    Change,
}

/// Writes the sample disk, or changes one in a hundred of its blocks with data.
fn fill(path: &Path, what: Fill, size: u64) -> std::io::Result<()> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    file.set_len(size)?;
    let label: &[u8] = if what == Fill::New {
        b"new"
    } else {
        b"changed"
    };
    let mut noise = blake3::Hasher::new().update(label).finalize_xof();
    let mut block = vec![0; usize::try_from(BLOCK_SIZE).expect("64 KiB")];
    let stripes =
        (0..size / BLOCK_SIZE / STRIPE).step_by(usize::try_from(STRIPES_APART).expect("small"));
    let blocks = stripes.flat_map(|stripe| stripe * STRIPE..(stripe + 1) * STRIPE);
    let every = if what == Fill::New { 1 } else { CHANGED_OF };
    for index in blocks.step_by(usize::try_from(every).expect("small")) {
        noise.fill(&mut block);
        file.write_all_at(&block, index * BLOCK_SIZE)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_block_in_a_hundred_changes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sample");
        fill(&path, Fill::New, 128 << 20).unwrap();
        let before = std::fs::read(&path).unwrap();
        fill(&path, Fill::Change, 128 << 20).unwrap();
        let after = std::fs::read(&path).unwrap();
        let block = usize::try_from(BLOCK_SIZE).unwrap();
        let differ = before
            .chunks(block)
            .zip(after.chunks(block))
            .filter(|(a, b)| a != b)
            .count();
        let data = before
            .chunks(block)
            .filter(|block| block.iter().any(|byte| *byte != 0))
            .count();
        assert_eq!(data, 256);
        assert_eq!(differ, 3);
    }
}
