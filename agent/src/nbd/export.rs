//! What a server exports, by as many connections as threads ask for at once.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::connection::{Connection, Facts};
use super::wire::Extent;
use super::{Address, NbdError};

/// Connections at most: as many as there are threads that could use them.
const MAX_CONNECTIONS: usize = 4;

/// What is asked for in one request about holes, in bytes: a server may answer for less.
const STATUS_LEN: u64 = 1 << 30;

/// An export, shared by threads.
#[derive(Debug)]
pub(crate) struct Export {
    address: Address,
    name: String,
    /// The context that tells what was changed.
    changed: Option<String>,
    facts: Facts,
    connections: Mutex<Connections>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    idle: Vec<Connection>,
    /// Those in use as well.
    open: usize,
}

impl Export {
    /// Opens an export, with the context that tells what was `changed`.
    ///
    /// # Errors
    /// There is no such server or export, or it cannot be spoken with.
    pub(crate) fn open(
        address: Address,
        name: String,
        changed: Option<String>,
    ) -> Result<Self, NbdError> {
        let connection = Connection::open(&address, &name, changed.as_deref())?;
        Ok(Self {
            address,
            name,
            changed,
            facts: connection.facts(),
            connections: Mutex::new(Connections {
                idle: vec![connection],
                open: 1,
            }),
            returned: Condvar::new(),
        })
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.facts.size
    }

    /// Whether nothing can be written to it.
    pub(crate) fn is_read_only(&self) -> bool {
        self.facts.is_read_only
    }

    /// Reads all of `bytes`.
    ///
    /// # Errors
    /// [`NbdError::Request`] names the first byte that is known not to be readable.
    pub(crate) fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), NbdError> {
        self.with(|connection| connection.read(bytes, offset))
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), NbdError> {
        self.with(|connection| connection.write(bytes, offset))
    }

    /// Whether ranges can be made to read as zeros without writing them.
    pub(crate) fn has_write_zeroes(&self) -> bool {
        self.facts.has_write_zeroes
    }

    /// Makes a range read as zeros, as a hole where the server can.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn write_zeroes(&self, offset: u64, len: u32) -> Result<(), NbdError> {
        self.with(|connection| connection.write_zeroes(offset, len))
    }

    /// Has the server make durable what was written.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn flush(&self) -> Result<(), NbdError> {
        match self.facts.has_flush {
            true => self.with(Connection::flush),
            // Nothing is ever kept back, as far as a server without it says.
            false => Ok(()),
        }
    }

    /// Which of a range is known to be zeros: extents from `offset` on, at least one, which may end
    /// before the range or behind it. `None` where the server cannot tell.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn allocation(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<Option<Vec<Extent>>, NbdError> {
        if !self.facts.has_allocation {
            return Ok(None);
        }
        let len = u32::try_from(len.min(STATUS_LEN)).expect("at most STATUS_LEN");
        let extents = self.with(|connection| connection.allocation(offset, len));
        extents.map(Some)
    }

    /// Which of a range was changed, as [`allocation`](Self::allocation) tells of zeros. `None` where
    /// the server cannot tell.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(crate) fn changes(&self, offset: u64, len: u64) -> Result<Option<Vec<Extent>>, NbdError> {
        if !self.facts.has_changes {
            return Ok(None);
        }
        let len = u32::try_from(len.min(STATUS_LEN)).expect("at most STATUS_LEN");
        let extents = self.with(|connection| connection.changes(offset, len));
        extents.map(Some)
    }

    /// Does something by a connection that nobody else uses meanwhile.
    fn with<T>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, NbdError>,
    ) -> Result<T, NbdError> {
        let mut connection = self.borrow()?;
        let result = work(&mut connection);
        let spared = !matches!(&result, Err(error) if !error.spares_the_connection());
        let mut connections = self.connections();
        match spared {
            true => connections.idle.push(connection),
            false => connections.open -= 1,
        }
        self.returned.notify_one();
        result
    }

    fn borrow(&self) -> Result<Connection, NbdError> {
        let limit = match self.facts.takes_several {
            true => MAX_CONNECTIONS,
            false => 1,
        };
        let mut connections = self.connections();
        loop {
            if let Some(connection) = connections.idle.pop() {
                return Ok(connection);
            }
            if connections.open < limit {
                connections.open += 1;
                break;
            }
            let waited = self.returned.wait(connections);
            connections = waited.unwrap_or_else(PoisonError::into_inner);
        }
        drop(connections);
        let opened = self.another();
        if opened.is_err() {
            self.connections().open -= 1;
            self.returned.notify_one();
        }
        opened
    }

    fn another(&self) -> Result<Connection, NbdError> {
        let connection = Connection::open(&self.address, &self.name, self.changed.as_deref())?;
        if connection.facts() != self.facts {
            return Err(NbdError::Misbehaved("the export is another one meanwhile"));
        }
        Ok(connection)
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        let locked = self.connections.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }
}
