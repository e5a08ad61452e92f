//! The result of a transfer, checked against the disks that it speaks of.

use std::path::Path;

use serde_json::Value;

use crate::controller::Run;
use crate::image::{self, BLOCK, Difference, KIB};
use crate::journey::Journey;
use crate::process::tool;

/// What a run may carry besides blocks and digests: the session's own messages.
pub const SESSION_BYTES: u64 = 64 * KIB;

/// Bytes that a compared block may cost on the wire: a digest of 16 bytes and its framing.
pub const DIGEST_BYTES: u64 = 24;

/// Room that a file system takes for its own map of a file, beyond a hundredth of the data: one
/// block of the protocol. A map of extents takes a page for some 300 of them on ext4, and
/// delayed or rounded allocation at the end of a file another few.
const MAP_BYTES: u64 = BLOCK;

/// The JSON of a successful `disk sync`, and what the disks said before it.
#[derive(Debug)]
pub struct Outcome {
    /// The object on standard output.
    pub json: Value,
    /// How source and destination differed before the run.
    pub before: Difference,
    /// The run.
    pub run: Run,
}

impl Outcome {
    pub(crate) fn of_sync(
        by: Journey,
        [from, to]: [&Path; 2],
        options: &[&str],
        run: impl FnOnce() -> Run,
    ) -> Self {
        let missing = !to.exists();
        let apply = apply(to, options);
        let before = image::difference(from, to);
        let data_bytes = image::data_bytes(from);
        let run = run();
        let outcome = Self {
            json: run.expect_json(),
            before,
            run,
        };
        let verified = if options.contains(&"reread") {
            "reread"
        } else {
            "streamed"
        };
        outcome.assert_described(by, apply, verified);
        outcome.assert_counted(from, data_bytes);
        if missing && outcome.json["resumed"] == false {
            assert_eq!(
                outcome.number("bytes_read_destination"),
                0,
                "{}",
                outcome.run
            );
        }
        image::assert_same_start(from, to);
        if std::fs::metadata(to).is_ok_and(|metadata| metadata.is_file()) {
            image::assert_equal(from, to);
        }
        outcome
    }

    /// A figure of the result.
    ///
    /// # Panics
    /// When it is not a number.
    #[must_use]
    pub fn number(&self, field: &str) -> u64 {
        let value = self.json[field].as_u64();
        value.unwrap_or_else(|| panic!("{field} is not a number in {}", self.run))
    }

    /// The warnings of the result.
    #[must_use]
    pub fn warnings(&self) -> String {
        self.json["warnings"].to_string()
    }

    /// Claims that nothing was shipped but digests.
    ///
    /// # Panics
    /// When something was.
    pub fn assert_only_digests(&self, source: &Path) {
        let run = &self.run;
        assert_eq!(self.number("blocks_changed"), 0, "{run}");
        assert_eq!(self.number("blocks_zeroed"), 0, "{run}");
        assert_eq!(self.number("bytes_changed"), 0, "{run}");
        let data_blocks = image::data_bytes(source).div_ceil(BLOCK);
        let bound = DIGEST_BYTES * data_blocks + SESSION_BYTES;
        assert!(
            self.number("bytes_wire") <= bound,
            "bytes_wire above {bound} in {run}"
        );
    }

    fn assert_described(&self, by: Journey, apply: &str, verified: &str) {
        let (json, run) = (&self.json, &self.run);
        for (field, expected) in [
            ("operation", "disk-sync"),
            ("method", "blocksync"),
            ("apply", apply),
            ("verified", verified),
        ] {
            assert_eq!(json[field], expected, "{field} in {run}");
        }
        assert_eq!(json["success"], true, "{run}");
        assert_eq!(json.get("error"), None, "{run}");
        let route = json["route"].as_str().unwrap_or_default();
        assert!(by.routes().contains(&route), "route in {run}");
        let id = json["operation_id"].as_str().unwrap_or_default();
        assert_eq!(
            (id.len(), id.matches('-').count()),
            (36, 4),
            "operation_id in {run}"
        );
        assert!(
            json["duration_seconds"]
                .as_f64()
                .is_some_and(|seconds| seconds > 0.0),
            "{run}"
        );
        assert!(
            json["warnings"].is_array() && json["resumed"].is_boolean(),
            "{run}"
        );
        assert!(
            json["source"].is_string() && json["destination"].is_string(),
            "{run}"
        );
    }

    /// Figures against what the disks really held, the source `data_before` bytes of data. A resumed
    /// run knows what an earlier one left, which the disks under their names do not tell.
    fn assert_counted(&self, source: &Path, data_before: u64) {
        let (size, run) = (image::length(source), &self.run);
        assert_eq!(self.number("bytes_total"), size, "{run}");
        // Of space that is only reserved XFS takes for data what is in the page cache, and that may
        // be less by the time that the run looks, or has ended.
        let data_after = image::data_bytes(source);
        let data = data_before.min(data_after)..=data_before.max(data_after);
        let told = self.number("bytes_data");
        assert!(data.contains(&told), "{told} of {data:?} bytes in {run}");
        assert_eq!(self.number("blocks_total"), self.before.total, "{run}");
        let [changed, zeroed] = ["blocks_changed", "blocks_zeroed"].map(|name| self.number(name));
        let unchanged = self.number("blocks_unchanged");
        assert_eq!(
            changed + zeroed + unchanged,
            self.before.total,
            "blocks in {run}"
        );
        assert!(self.number("bytes_read_source") <= size, "{run}");
        if self.json["resumed"] == true {
            return;
        }
        assert_eq!(changed, self.before.changed, "blocks_changed in {run}");
        assert_eq!(zeroed, self.before.zeroed, "blocks_zeroed in {run}");
        assert_eq!(
            self.number("bytes_changed"),
            self.before.bytes,
            "bytes_changed in {run}"
        );
    }
}

/// How changes are to reach a destination: as the user says, or as what is there allows.
fn apply<'a>(to: &Path, options: &[&'a str]) -> &'a str {
    let option = options.windows(2).find(|words| words[0] == "--apply");
    match option.map_or("auto", |words| words[1]) {
        "auto" if to.is_file() && makes_reflinks(to) => "reflink",
        "auto" => "staged",
        chosen => chosen,
    }
}

/// Whether the file system of a path shares blocks between files.
///
/// # Panics
/// When it cannot be asked.
#[must_use]
pub fn makes_reflinks(path: &Path) -> bool {
    let words = ["-L", "-f", "-c", "%T", "--"].map(AsRef::as_ref);
    let kind = tool("stat", words.into_iter().chain([path.as_os_str()]));
    matches!(kind.trim(), "xfs" | "btrfs")
}

/// Claims that a fresh copy occupies no more than the source's bytes that are not zeros, by more
/// than a hundredth and what the file system's own map takes.
///
/// # Panics
/// When it occupies more.
pub fn assert_sparse(source: &Path, copy: &Path) {
    let needed = image::nonzero_bytes(source).min(image::allocated(source));
    let bound = needed + needed / 100 + MAP_BYTES;
    let taken = image::allocated(copy);
    assert!(
        taken <= bound,
        "{} occupies {taken}, more than {bound}",
        copy.display()
    );
}
