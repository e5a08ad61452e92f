//! `--nice`: others on this host come first, at the processor and at the disks.
//!
//! Priority belongs to threads, and a new one has that of the thread that made it. Where the kernel
//! gives each session its share of the processor (autogroup), priority counts within the session
//! alone, so the session has to be nice too; that of the login is left for one of our own first.
//! Control groups are the administrator's: what they give us is ours, however nice we are.

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::libc;
use nix::unistd::{getpid, getsid, setsid};

/// The last in turn that is still served when the others want everything: an agent that said
/// nothing for half a minute would count as dead.
const NICE: libc::c_int = 19;

/// `IOPRIO_CLASS_IDLE` of linux/ioprio.h, at its place in a priority.
const IO_IDLE: libc::c_int = 3 << 13;

/// `IOPRIO_WHO_PROCESS`: one thread, by its number.
const ONE_THREAD: libc::c_int = 1;

/// Puts every thread of this process, and all that they will make, behind others.
///
/// # Errors
/// When the kernel does not let us.
pub(crate) fn be_nice() -> io::Result<()> {
    // The main thread comes first, and makes all others: none can escape.
    for entry in fs::read_dir("/proc/self/task")? {
        let name = entry?.file_name();
        if let Some(thread) = name.to_str().and_then(|name| name.parse().ok()) {
            step_back(thread)?;
        }
    }
    step_back_as_a_session();
    Ok(())
}

fn step_back(thread: libc::pid_t) -> io::Result<()> {
    // SAFETY: the call takes numbers alone.
    let nice = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.unsigned_abs(), NICE) };
    let nice = Errno::result(nice).map(drop);
    // SAFETY: the call takes numbers alone.
    let idle = unsafe { libc::syscall(libc::SYS_ioprio_set, ONE_THREAD, thread, IO_IDLE) };
    let idle = Errno::result(idle).map(drop);
    match nice.and(idle) {
        // It has ended meanwhile.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Does what can be done: not every kernel groups by session.
fn step_back_as_a_session() {
    // Refused to who leads a session or a group already, as sshd's children do.
    let _ = setsid();
    if getsid(None) == Ok(getpid()) {
        let _ = fs::write("/proc/self/autogroup", NICE.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::gettid;

    /// Nice value and I/O priority of this thread.
    fn priority() -> (String, libc::c_long) {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        let nice = stat.rsplit(") ").next().unwrap().split(' ').nth(16);
        // SAFETY: the call takes numbers alone.
        let io = unsafe { libc::syscall(libc::SYS_ioprio_get, ONE_THREAD, 0) };
        (nice.unwrap().to_owned(), io & !7)
    }

    #[test]
    fn a_thread_and_those_that_it_makes_step_back_and_no_other() {
        let before = priority();
        let nice = std::thread::spawn(|| {
            step_back(gettid().as_raw()).unwrap();
            let made = std::thread::spawn(priority).join().unwrap();
            (priority(), made)
        });
        let (own, made) = nice.join().unwrap();
        assert_eq!(own, ("19".to_owned(), libc::c_long::from(IO_IDLE)));
        assert_eq!(made, own);
        assert_eq!(priority(), before);
    }

    #[test]
    fn a_thread_that_is_gone_is_no_failure() {
        let gone = std::thread::spawn(gettid).join().unwrap();
        step_back(gone.as_raw()).unwrap();
    }
}
