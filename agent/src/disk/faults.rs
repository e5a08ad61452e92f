//! Faults of a disk: the Nth call of a kind fails, does only a part, or is the last thing that the
//! process does. Not in an agent that is built for a host: it takes the feature `fault-injection`.
//!
//! ```text
//!  write:17:EIO                  the 17th write fails
//!  write@.kc-stage:1+:ENOSPC     every write to a file that is called so, from the first on
//!  read:3:short=512              the third read gives 512 bytes
//!  sync:2:die                    instead of the second fsync the process is killed
//!  sync:2:die-after              the same, when it was done
//!  change:40:torn=100            of the 40th call that changes anything, 100 bytes are written
//!  log                           every call is told on standard error
//! ```
//!
//! Rules are separated by commas; the first that is hit counts. What strikes is told on standard
//! error, with its number among the calls of its kind. A test has its own, for its thread; the
//! process reads them from an environment variable.

use std::fmt::Debug;
use std::io::{self, Write};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::call::Op;

/// Kinds of calls by name; the last stands for all that change something.
const KINDS: [(&str, Kind); 12] = [
    ("read", Kind::Of(Op::Read)),
    ("write", Kind::Of(Op::Write)),
    ("sync", Kind::Of(Op::Sync)),
    ("allocate", Kind::Of(Op::Allocate)),
    ("set_len", Kind::Of(Op::SetLen)),
    ("clone", Kind::Of(Op::Clone)),
    ("create", Kind::Of(Op::Create)),
    ("link", Kind::Of(Op::Link)),
    ("rename", Kind::Of(Op::Rename)),
    ("remove", Kind::Of(Op::Remove)),
    ("sync_directory", Kind::Of(Op::SyncDirectory)),
    ("change", Kind::Change),
];

const ERRORS: [(&str, i32); 6] = [
    ("EIO", libc::EIO),
    ("ENOSPC", libc::ENOSPC),
    ("EDQUOT", libc::EDQUOT),
    ("EROFS", libc::EROFS),
    ("EINTR", libc::EINTR),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
];

/// What is to go wrong, and what was counted so far.
#[derive(Debug)]
pub(super) struct Faults {
    rules: Vec<Rule>,
    logs: bool,
    /// Calls so far, in the order of [`KINDS`].
    calls: [AtomicU64; KINDS.len()],
}

#[derive(Debug)]
struct Rule {
    kind: Kind,
    /// A part of how the file is shown, which is its path.
    name: String,
    nth: u64,
    /// That one, and all that follow.
    for_ever: bool,
    fault: Fault,
    /// Calls that it was about, so far.
    seen: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Of(Op),
    Change,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Error(i32),
    Short(usize),
    Die,
    DieAfter,
    Torn(usize),
}

impl Kind {
    fn is(self, op: Op) -> bool {
        match self {
            Self::Of(own) => own == op,
            Self::Change => op != Op::Read,
        }
    }
}

impl FromStr for Faults {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rules = text.split(',').filter(|rule| !["", "log"].contains(rule));
        Ok(Self {
            rules: rules.map(str::parse).collect::<Result<_, _>>()?,
            logs: text.split(',').any(|rule| rule == "log"),
            calls: Default::default(),
        })
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not KIND[@NAME]:N[+]:FAULT");
        let mut parts = text.splitn(3, ':');
        let mut part = || parts.next().ok_or_else(bad);
        let (calls, number, fault) = (part()?, part()?, part()?);
        let (kind, name) = calls.split_once('@').unwrap_or((calls, ""));
        let kind = KINDS.iter().find(|known| known.0 == kind);
        let (nth, for_ever) = match number.strip_suffix('+') {
            Some(number) => (number, true),
            None => (number, false),
        };
        Ok(Self {
            kind: kind.ok_or_else(bad)?.1,
            name: name.to_owned(),
            nth: nth.parse().map_err(|_| bad())?,
            for_ever,
            fault: Fault::parse(fault).ok_or_else(bad)?,
            seen: AtomicU64::new(0),
        })
    }
}

impl Fault {
    fn parse(text: &str) -> Option<Self> {
        match text.split_once('=') {
            None if text == "die" => Some(Self::Die),
            None if text == "die-after" => Some(Self::DieAfter),
            None => ERRORS
                .iter()
                .find(|error| error.0 == text)
                .map(|error| Self::Error(error.1)),
            Some(("short", bytes)) => bytes.parse().ok().map(Self::Short),
            Some(("torn", bytes)) => bytes.parse().ok().map(Self::Torn),
            Some(_) => None,
        }
    }
}

impl Faults {
    /// Counts a call, and gives what strikes it.
    fn strike(&self, op: Op, on: &impl Debug) -> Option<Fault> {
        let mut number = 0;
        for (counter, (_, kind)) in self.calls.iter().zip(KINDS) {
            if kind.is(op) {
                let calls = counter.fetch_add(1, Ordering::Relaxed) + 1;
                number = if kind == Kind::Change { number } else { calls };
            }
        }
        let mut fault = None;
        // Each rule counts on, also when another one has struck.
        for rule in &self.rules {
            if rule.hits(op, on) && fault.is_none() {
                fault = Some(rule.fault);
            }
        }
        if (self.logs || fault.is_some()) && !cfg!(test) {
            let fault = fault.map_or_else(String::new, |fault| format!(": {fault:?}"));
            let _ = writeln!(io::stderr(), "fault: {op:?} {number} on {on:?}{fault}");
        }
        fault
    }
}

impl Rule {
    fn hits(&self, op: Op, on: &impl Debug) -> bool {
        if !self.kind.is(op) || !(self.name.is_empty() || format!("{on:?}").contains(&self.name)) {
            return false;
        }
        let seen = self.seen.fetch_add(1, Ordering::Relaxed) + 1;
        seen == self.nth || self.for_ever && seen > self.nth
    }
}

/// Makes a call once, or has it go wrong.
pub(super) fn once<T>(
    op: Op,
    on: &impl Debug,
    len: usize,
    call: &mut impl FnMut(usize) -> io::Result<T>,
) -> io::Result<T> {
    match scope::with(|faults| faults.strike(op, on)) {
        None => call(len),
        Some(Fault::Error(code)) => Err(io::Error::from_raw_os_error(code)),
        Some(Fault::Short(bytes)) => call(bytes.min(len)),
        Some(Fault::Die) => die(),
        Some(Fault::DieAfter) => {
            let _ = call(len);
            die()
        }
        Some(Fault::Torn(bytes)) => {
            if len > 0 {
                let _ = call(bytes.min(len));
            }
            die()
        }
    }
}

/// What kill -9 does.
fn die() -> ! {
    let _ = kill(Pid::this(), Signal::SIGKILL);
    loop {
        std::thread::park();
    }
}

/// In a test: for one thread.
#[cfg(test)]
mod scope {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::Faults;

    thread_local! {
        static CURRENT: RefCell<Option<Rc<Faults>>> = const { RefCell::new(None) };
    }

    /// Faults that strike until this is dropped.
    pub(in crate::disk) struct Scope(Rc<Faults>);

    impl Scope {
        pub(in crate::disk) fn new(rules: &str) -> Self {
            let faults = Rc::new(rules.parse().unwrap_or_else(|error| panic!("{error}")));
            CURRENT.set(Some(Rc::clone(&faults)));
            Self(faults)
        }

        /// How many calls there were so far.
        pub(in crate::disk) fn calls(&self, kind: &str) -> u64 {
            let at = super::KINDS.iter().position(|known| known.0 == kind);
            let counter = &self.0.calls[at.expect("a kind of calls")];
            counter.load(std::sync::atomic::Ordering::Relaxed)
        }
    }

    impl Drop for Scope {
        fn drop(&mut self) {
            CURRENT.set(None);
        }
    }

    pub(super) fn with<T>(ask: impl FnOnce(&Faults) -> Option<T>) -> Option<T> {
        CURRENT.with_borrow(|faults| faults.as_deref().and_then(ask))
    }
}

#[cfg(test)]
pub(super) use scope::Scope;

/// In a process: from its environment.
#[cfg(not(test))]
mod scope {
    use std::sync::LazyLock;

    use super::Faults;

    const VARIABLE: &str = "KVM_CLONE_FAULTS";

    static OF_THE_PROCESS: LazyLock<Option<Faults>> = LazyLock::new(|| {
        let rules = std::env::var(VARIABLE).ok()?;
        let faults = rules.parse();
        Some(faults.unwrap_or_else(|error| panic!("{VARIABLE}: {error}")))
    });

    pub(super) fn with<T>(ask: impl FnOnce(&Faults) -> Option<T>) -> Option<T> {
        OF_THE_PROCESS.as_ref().and_then(ask)
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::FallocateFlags;

    use super::*;
    use crate::disk::file::DiskFile;
    use crate::disk::names::{remove, rename_new, rename_over, sync_directory};

    fn file() -> DiskFile {
        DiskFile::new(tempfile::tempfile().unwrap())
    }

    fn code<T: Debug>(result: io::Result<T>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    #[test]
    fn the_nth_call_of_a_kind_fails_and_no_other() {
        let file = file();
        let faults = Scope::new("write:2:ENOSPC,sync:1:EIO");
        file.write_all_at(b"one", 0).unwrap();
        assert_eq!(code(file.write_all_at(b"two", 3)), Some(libc::ENOSPC));
        file.write_all_at(b"two", 3).unwrap();
        assert!(!file.is_doubtful());
        assert_eq!(code(file.sync()), Some(libc::EIO));
        assert!(file.is_doubtful(), "whatever a second one says");
        file.sync().unwrap();
        assert!(file.is_doubtful());
        assert_eq!(
            ["write", "sync", "change"].map(|kind| faults.calls(kind)),
            [3, 2, 5]
        );
        drop(faults);
        file.set_len(1).unwrap();
    }

    #[test]
    fn interruptions_and_short_calls_are_made_up_for() {
        let (file, contents) = (file(), vec![7; 5000]);
        let _faults = Scope::new(
            "write:1:EINTR,write:3:EINTR,write:1+:short=999,read:2:EINTR,read:1+:short=1001,\
             sync:1:EINTR,set_len:1:EINTR,allocate:1:EINTR",
        );
        file.write_all_at(&contents, 10).unwrap();
        let mut read = vec![0; 6000];
        assert_eq!(file.read_full_at(&mut read, 10).unwrap(), 5000);
        assert_eq!(read[..5000], contents);
        file.sync().unwrap();
        file.set_len(3).unwrap();
        file.allocate(FallocateFlags::empty(), 0, 4096).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4096);
    }

    #[test]
    fn names_fail_as_well_and_only_those_that_are_meant() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let _faults =
            Scope::new("create@/b:1:EIO,rename@/c:1+:EIO,remove:1:EIO,sync_directory:1:EIO");
        DiskFile::create(&path("a")).unwrap();
        assert_eq!(code(DiskFile::create(&path("b"))), Some(libc::EIO));
        assert_eq!(code(rename_new(&path("a"), &path("c"))), Some(libc::EIO));
        assert_eq!(code(rename_over(&path("a"), &path("c"))), Some(libc::EIO));
        rename_new(&path("a"), &path("d")).unwrap();
        assert_eq!(code(remove(&path("d"))), Some(libc::EIO));
        assert!(remove(&path("d")).unwrap());
        assert_eq!(code(sync_directory(directory.path())), Some(libc::EIO));
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for wrong in [
            "x",
            "write",
            "write:1",
            "write:1:EWHAT",
            "write:x:EIO",
            "paint:1:EIO",
            "read:1:short",
        ] {
            let refused = wrong.parse::<Faults>().unwrap_err();
            assert!(refused.contains(wrong), "{refused}");
        }
        assert!("".parse::<Faults>().unwrap().rules.is_empty());
        assert!("log".parse::<Faults>().unwrap().logs);
    }
}
