//! One kernel call that a disk is read or changed with: made again while signals interrupt it, and
//! the place where a test has it fail.

use std::fmt::Debug;
use std::io;

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Sync,
    Allocate,
    SetLen,
    Clone,
    Create,
    Link,
    Rename,
    Remove,
    SyncDirectory,
}

/// Makes a call on `on` until no signal interrupts it.
pub(super) fn call<T>(
    op: Op,
    on: &impl Debug,
    mut call: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    call_with(op, on, 0, |_| call())
}

/// The same for a call that takes up to `len` bytes at once.
pub(super) fn call_with<T>(
    op: Op,
    on: &impl Debug,
    len: usize,
    mut call: impl FnMut(usize) -> io::Result<T>,
) -> io::Result<T> {
    loop {
        match once(op, on, len, &mut call) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(any(test, feature = "fault-injection"))]
use super::faults::once;

#[cfg(not(any(test, feature = "fault-injection")))]
fn once<T>(
    _: Op,
    _: &impl Debug,
    len: usize,
    call: &mut impl FnMut(usize) -> io::Result<T>,
) -> io::Result<T> {
    call(len)
}
