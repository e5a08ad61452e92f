//! What this user's controllers remember: one SQLite file under the user's state directory, which
//! several of them use at once. What is kept in it is told by who keeps it: operations by
//! [`history`](crate::history), alarms by [`alarms`](crate::replicate::alarms). All statements are
//! such that another database could serve them for several machines.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rusqlite::{Connection, Params, Row};
use rusqlite_migration::{M, Migrations};
use rustix::process::geteuid;

use crate::error::{Error, ErrorCode, Result};

/// What systemd makes for the daemon: what its user asks by hand is answered from there as well.
const SERVICE: &str = "/var/lib/kvm-clone-ctl";

/// How long a writer waits for another one.
const PATIENCE: Duration = Duration::from_secs(10);

/// The tables, one step a version. A step that was published stays as it is.
const STEPS: [M<'static>; 2] = [
    M::up(
        "CREATE TABLE run (
            id INTEGER PRIMARY KEY,
            began_at TEXT NOT NULL,
            operation TEXT NOT NULL,
            vm TEXT,
            source TEXT NOT NULL,
            destination TEXT NOT NULL,
            success INTEGER,
            result TEXT
        ) STRICT;
        CREATE INDEX run_by_vm ON run (vm);",
    ),
    M::up(
        "CREATE TABLE alarm (
            policy TEXT NOT NULL,
            vm TEXT NOT NULL,
            kind TEXT NOT NULL,
            message TEXT NOT NULL,
            raised_at TEXT NOT NULL,
            told_at TEXT NOT NULL,
            PRIMARY KEY (policy, vm)
        ) STRICT;
        CREATE TABLE lease (
            name TEXT PRIMARY KEY,
            holder TEXT NOT NULL,
            until TEXT NOT NULL
        ) STRICT;",
    ),
];

/// The open file.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
}

impl Store {
    /// That of this user.
    ///
    /// # Errors
    /// Usage without a home directory; io when the file cannot be had.
    pub fn open() -> Result<Self> {
        let wanted = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
        let directory = directory(wanted, Path::new(SERVICE), std::env::home_dir());
        let directory = directory
            .ok_or_else(|| Error::usage("there is no home directory").hint("set XDG_STATE_HOME"))?;
        Self::at(&directory.join("history.db"))
    }

    pub(crate) fn at(path: &Path) -> Result<Self> {
        if let Some(directory) = path.parent() {
            // Paths and names of hosts are nobody else's business.
            let made = DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory);
            made.map_err(|error| {
                Error::io(
                    format!("cannot make the directory {}", directory.display()),
                    error,
                )
            })?;
        }
        let failed = |error| broken(path, error);
        let mut connection = Connection::open(path).map_err(failed)?;
        connection.busy_timeout(PATIENCE).map_err(failed)?;
        let migrated = Migrations::from_slice(&STEPS).to_latest(&mut connection);
        migrated.map_err(|error| {
            Error::new(
                ErrorCode::Io,
                format!("cannot use the history {}", path.display()),
            )
            .caused_by(error)
            .hint("a newer version of this program may have made it; use that one, or move it away")
        })?;
        Ok(Self {
            connection,
            path: path.to_owned(),
        })
    }

    /// Runs a statement that changes rows, and gives back how many it changed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn change(&self, sql: &str, values: impl Params) -> Result<usize> {
        let changed = self.connection.execute(sql, values);
        changed.map_err(|error| broken(&self.path, error))
    }

    /// Runs a statement that makes a row, and gives back its number.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn insert(&self, sql: &str, values: impl Params) -> Result<i64> {
        self.change(sql, values)?;
        Ok(self.connection.last_insert_rowid())
    }

    /// All rows of a query.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn rows<T>(
        &self,
        sql: &str,
        values: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let failed = |error| broken(&self.path, error);
        let mut statement = self.connection.prepare(sql).map_err(failed)?;
        let rows = statement.query_map(values, read);
        rows.and_then(Iterator::collect).map_err(failed)
    }

    /// Takes a lease that nobody else has, or makes one's own longer; whether it was had.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn lease(
        &self,
        name: &str,
        holder: &str,
        now: Timestamp,
        for_so_long: SignedDuration,
    ) -> Result<bool> {
        let sql = "INSERT INTO lease (name, holder, until) VALUES (?1, ?2, ?3)
                   ON CONFLICT (name) DO UPDATE SET holder = ?2, until = ?3
                   WHERE lease.holder = ?2 OR lease.until <= ?4";
        let until = now.saturating_add(for_so_long).unwrap_or(now);
        let changed = self.change(sql, (name, holder, sortable(until), sortable(now)))?;
        Ok(changed == 1)
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn release(&self, name: &str, holder: &str) -> Result<()> {
        let sql = "DELETE FROM lease WHERE name = ? AND holder = ?";
        self.change(sql, (name, holder)).map(drop)
    }
}

/// Where a user's store is: where they want it, else that of a service of theirs, else at home.
fn directory(wanted: Option<PathBuf>, service: &Path, home: Option<PathBuf>) -> Option<PathBuf> {
    const NAME: &str = "kvm-clone-ctl";
    let is_ours = |path: &Path| {
        let facts = path.metadata();
        facts.is_ok_and(|facts| facts.is_dir() && facts.uid() == geteuid().as_raw())
    };
    match wanted.filter(|path| path.is_absolute()) {
        Some(wanted) => Some(wanted.join(NAME)),
        None if is_ours(service) => Some(service.to_owned()),
        None => Some(home?.join(".local/state").join(NAME)),
    }
}

/// An instant as text whose order is that of time.
fn sortable(instant: Timestamp) -> String {
    instant.strftime("%Y-%m-%dT%H:%M:%S.%9fZ").to_string()
}

fn broken(path: &Path, error: rusqlite::Error) -> Error {
    Error::new(
        ErrorCode::Io,
        format!("the history {} fails", path.display()),
    )
    .caused_by(error)
    .hint("if it is damaged, move it away; a new one is made")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_newer_version_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("history.db");
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        let error = Store::at(&path).unwrap_err();
        assert!(error.hint_text().unwrap().contains("newer"), "{error:?}");
    }

    #[test]
    fn a_user_finds_what_a_service_of_theirs_has_written() {
        let directory = tempfile::tempdir().unwrap();
        let (service, home) = (directory.path(), Some(PathBuf::from("/home/me")));
        let wanted = Some(PathBuf::from("/state"));
        let of = |wanted, service| super::directory(wanted, service, home.clone()).unwrap();
        assert_eq!(of(wanted, service), Path::new("/state/kvm-clone-ctl"));
        assert_eq!(of(None, service), service);
        let at_home = Path::new("/home/me/.local/state/kvm-clone-ctl");
        assert_eq!(of(None, &service.join("gone")), at_home);
        assert_eq!(super::directory(None, &service.join("gone"), None), None);
    }

    #[test]
    fn a_lease_is_one_holders_until_it_is_over_or_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("history.db");
        let (one, other) = (Store::at(&path).unwrap(), Store::at(&path).unwrap());
        let at = |second| Timestamp::from_second(second).unwrap();
        let long = SignedDuration::from_secs(10);
        assert!(one.lease("daemon", "one", at(0), long).unwrap());
        assert!(!other.lease("daemon", "other", at(9), long).unwrap());
        assert!(one.lease("daemon", "one", at(9), long).unwrap());
        assert!(!other.lease("daemon", "other", at(18), long).unwrap());
        assert!(other.lease("daemon", "other", at(19), long).unwrap());
        // Who has lost it does not take it from another one.
        one.release("daemon", "one").unwrap();
        assert!(!one.lease("daemon", "one", at(20), long).unwrap());
        other.release("daemon", "other").unwrap();
        assert!(one.lease("daemon", "one", at(20), long).unwrap());
    }
}
