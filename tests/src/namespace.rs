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
pub fn apart<T: Send>(body: impl FnOnce() -> T + Send) -> T {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::{FileSystem, Kind};
    use crate::skip::{obstacle, skip};

    #[test]
    fn what_is_mounted_apart_is_not_seen_elsewhere() {
        if let Some(reason) = obstacle() {
            return skip(&reason);
        }
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("mounted");
        apart(|| {
            let _mounted = FileSystem::mount(Kind::Tmpfs, 1 << 20, &at);
            std::fs::write(at.join("file"), "").unwrap();
            // Of the process, which is that of its first thread, and of this one.
            let seen = ["self", "thread-self"].map(|who| {
                let mounts = std::fs::read_to_string(format!("/proc/{who}/mountinfo")).unwrap();
                mounts.contains(at.to_str().unwrap())
            });
            assert_eq!(seen, [false, true]);
        });
        assert_eq!(at.read_dir().unwrap().count(), 0);
    }
}
