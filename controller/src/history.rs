//! The history: every operation with its figures, in the [`store`](crate::store).
//!
//! A row is written when an operation begins and filled in when it ends, so that one which was
//! killed is seen as unfinished. Several of this program may write at once.

use jiff::Timestamp;
use rusqlite::{Row, params};
use serde::Serialize;
use serde_json::Value;

use crate::error::Result;
use crate::store::Store;

/// The operations of a store.
#[derive(Debug)]
pub struct History(Store);

/// A row that has begun.
#[derive(Debug, Clone, Copy)]
pub struct RunId(i64);

/// An operation that is being recorded.
#[derive(Debug)]
pub struct Recording {
    history: History,
    run: RunId,
}

impl Recording {
    /// Writes that it begins.
    ///
    /// # Errors
    /// As [`History::open`] and [`History::begin`].
    pub fn begin(begun: &Begun<'_>) -> Result<Self> {
        let history = History::open()?;
        let run = history.begin(begun)?;
        Ok(Self { history, run })
    }

    /// Writes what came of it.
    ///
    /// # Errors
    /// As [`History::finish`].
    pub fn end(self, result: &impl Serialize) -> Result<()> {
        let result = serde_json::to_value(result).unwrap_or(Value::Null);
        self.history.finish(self.run, &result)
    }
}

/// What begins.
#[derive(Debug, Clone)]
pub struct Begun<'a> {
    /// `disk-sync`, `clone`, …
    pub operation: &'a str,
    /// The VM, where it is about one.
    pub vm: Option<&'a str>,
    /// Where from, as given.
    pub source: String,
    /// Where to, as given.
    pub destination: String,
}

/// One operation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// When it began, RFC 3339.
    pub began_at: String,
    /// `disk-sync`, `clone`, …
    pub operation: String,
    /// The VM, where it was about one.
    pub vm: Option<String>,
    /// Where from.
    pub source: String,
    /// Where to.
    pub destination: String,
    /// Whether it did what was asked; `None` when it never ended.
    pub success: Option<bool>,
    /// The whole result, as the operation printed it; `None` when it never ended.
    pub result: Option<Value>,
}

/// Which operations are wanted.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// At most so many, the newest.
    pub limit: u32,
    /// Only those that failed or never ended.
    pub failed: bool,
    /// Only those about this VM.
    pub vm: Option<String>,
    /// Only those of this kind.
    pub operation: Option<&'static str>,
    /// Only those that began then or later.
    pub since: Option<Timestamp>,
}

impl History {
    /// The history of this user.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open() -> Result<Self> {
        Store::open().map(Self)
    }

    /// An operation begins.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn begin(&self, begun: &Begun<'_>) -> Result<RunId> {
        let sql =
            "INSERT INTO run (began_at, operation, vm, source, destination) VALUES (?, ?, ?, ?, ?)";
        let values = params![
            Timestamp::now().to_string(),
            begun.operation,
            begun.vm,
            begun.source,
            begun.destination
        ];
        self.0.insert(sql, values).map(RunId)
    }

    /// An operation has ended, with this object as its result.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&self, run: RunId, result: &Value) -> Result<()> {
        let sql = "UPDATE run SET success = ?, result = ?, vm = coalesce(?, vm) WHERE id = ?";
        let success = result["success"].as_bool().unwrap_or(false);
        let values = params![success, result.to_string(), result["vm"].as_str(), run.0];
        self.0.change(sql, values).map(drop)
    }

    /// The newest operations, the newest first.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn list(&self, filter: &Filter) -> Result<Vec<Record>> {
        let sql = "SELECT began_at, operation, vm, source, destination, success, result FROM run
                   WHERE (?1 IS NULL OR vm = ?1) AND (NOT ?2 OR success IS NOT 1)
                   AND (?3 IS NULL OR operation = ?3) AND (?4 IS NULL OR began_at >= ?4)
                   ORDER BY id DESC LIMIT ?5";
        // Times are compared as text up to their seconds.
        let since = filter
            .since
            .map(|since| since.strftime("%Y-%m-%dT%H:%M:%S").to_string());
        let values = params![
            filter.vm,
            filter.failed,
            filter.operation,
            since,
            filter.limit
        ];
        self.0.rows(sql, values, record)
    }
}

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let result: Option<String> = row.get(6)?;
    Ok(Record {
        began_at: row.get(0)?,
        operation: row.get(1)?,
        vm: row.get(2)?,
        source: row.get(3)?,
        destination: row.get(4)?,
        success: row.get(5)?,
        result: result.and_then(|text| serde_json::from_str(&text).ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun<'a>(operation: &'a str, vm: Option<&'a str>) -> Begun<'a> {
        Begun {
            operation,
            vm,
            source: "hv1".into(),
            destination: "hv2".into(),
        }
    }

    #[test]
    fn what_ended_well_badly_and_never_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/history.db");
        let history = History(Store::at(&path).unwrap());
        let other = History(Store::at(&path).unwrap());
        let well = history.begin(&begun("clone", Some("web"))).unwrap();
        let badly = other.begin(&begun("sync", Some("db"))).unwrap();
        history.begin(&begun("disk-sync", None)).unwrap();
        history
            .finish(well, &serde_json::json!({"success": true, "bytes_wire": 7}))
            .unwrap();
        other
            .finish(
                badly,
                &serde_json::json!({"success": false, "error": {"code": "io"}}),
            )
            .unwrap();
        let all = |filter| history.list(&filter).unwrap();
        let runs = all(Filter {
            limit: 9,
            ..Filter::default()
        });
        let ends: Vec<_> = runs
            .iter()
            .map(|run| (run.operation.as_str(), run.success))
            .collect();
        assert_eq!(
            ends,
            [
                ("disk-sync", None),
                ("sync", Some(false)),
                ("clone", Some(true))
            ]
        );
        assert_eq!(runs[2].result.as_ref().unwrap()["bytes_wire"], 7);
        assert_eq!(
            all(Filter {
                limit: 9,
                failed: true,
                ..Filter::default()
            })
            .len(),
            2
        );
        assert_eq!(
            all(Filter {
                limit: 9,
                vm: Some("web".into()),
                ..Filter::default()
            })
            .len(),
            1
        );
        assert_eq!(
            all(Filter {
                limit: 1,
                ..Filter::default()
            })
            .len(),
            1
        );
    }
}
