//! A thread whose mounts are its own.
//!
//! They are seen by what it starts and by nobody else, and they are gone when it has ended and
//! that as well, even where the whole process is killed. It sees what others unmount.

use std::panic::resume_unwind;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use crate::process::tool;

/// Runs `body` on a thread with a mount namespace of its own.
///
/// # Panics
/// When `body` does, or without the right to have one.
pub(super) fn apart<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    let name = thread::current().name().unwrap_or("apart").to_owned();
    let separate = || {
        unshare(CloneFlags::CLONE_NEWNS).expect("root may have a mount namespace");
        tool("mount", ["--make-rslave", "/"]);
        body()
    };
    let joined = thread::scope(|scope| {
        let builder = thread::Builder::new().name(name);
        let thread = builder.spawn_scoped(scope, separate);
        thread.expect("a thread can be started").join()
    });
    joined.unwrap_or_else(|panic| resume_unwind(panic))
}
