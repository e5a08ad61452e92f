//! A file whose reads, writes and syncs are answered by this process, through the kernel's FUSE.
//!
//! It is a file system that consists of nothing but its root, which is a regular file, mounted on
//! a file. Requests are answered one after the other, by a thread, in the order in which they
//! come, so their order is that of the log.
//!
//! ```text
//!   request   length u32, opcode u32, unique u64, 24 bytes that do not matter, then by opcode
//!   reply     length u32, error i32, unique u64, then by opcode
//! ```
//!
//! Only what a loop device asks for is answered, which is less than what a library for FUSE brings
//! along. qemu-storage-daemon can export a file and log its writes as well; that of QEMU 7.2 has
//! been seen to write other bytes than it logs when several writes come at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const HEAD: usize = 40;
const REPLY_HEAD: usize = 16;

/// The version of the protocol that this is written after, and that every kernel since 5.4 speaks.
const VERSION: [u32; 2] = [7, 31];

/// Writes come with up to this many bytes, as whole pages.
const MAX_WRITE: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
const BIG_WRITES: u32 = 1 << 5;
const MAX_PAGES_COUNT: u32 = 1 << 22;

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;

/// What punches a hole or writes zeros, of the modes of fallocate.
const ZEROING: u32 = 0x02 | 0x10;

/// A regular file of the root's, in the kernel's numbers.
const MODE: u32 = 0o100_600;

/// What a file does.
pub(super) trait Device: Send + 'static {
    /// How many bytes it has.
    fn len(&self) -> u64;
    /// Gives so many bytes.
    fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Takes bytes.
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Reads as zeros from now on.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes what was written last.
    fn sync(&mut self) -> io::Result<()>;
}

/// A file that is mounted on another one. A device comes back when it is unmounted.
#[derive(Debug)]
pub(super) struct Export<D> {
    path: PathBuf,
    thread: Option<JoinHandle<D>>,
}

impl<D: Device> Export<D> {
    /// Has a device show as the file `path`, which is made.
    ///
    /// # Panics
    /// When the machine has no FUSE.
    pub(super) fn start(device: D, path: &Path) -> Self {
        File::create(path).expect("the laboratory's directory is writable");
        let mut options = OpenOptions::new();
        let channel = options.read(true).write(true).open("/dev/fuse");
        let channel = channel.unwrap_or_else(|error| panic!("/dev/fuse: {error}"));
        let data = format!(
            "fd={},rootmode={MODE:o},user_id=0,group_id=0",
            channel.as_raw_fd()
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let mounted = mount(Some("recorded"), path, Some("fuse"), flags, Some(&*data));
        mounted.unwrap_or_else(|error| panic!("mounting {}: {error}", path.display()));
        let thread = std::thread::spawn(move || serve(channel, device));
        Self {
            path: path.to_owned(),
            thread: Some(thread),
        }
    }

    /// Unmounts the file and gives the device; `None` while it is in use.
    ///
    /// # Panics
    /// When it was not served to the end.
    pub(super) fn stop(&mut self) -> Option<D> {
        match umount2(&self.path, MntFlags::empty()) {
            Err(Errno::EBUSY) => return None,
            unmounted => unmounted.expect("it was mounted"),
        }
        let thread = self.thread.take().expect("it is stopped once");
        Some(thread.join().expect("it was served to the end"))
    }
}

impl<D> Drop for Export<D> {
    fn drop(&mut self) {
        if self.thread.is_some() {
            // It goes when nothing uses it any more, and the thread with it.
            let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        }
    }
}

/// Answers until the file is unmounted.
fn serve<D: Device>(mut channel: File, mut device: D) -> D {
    let mut buffer = vec![0; MAX_WRITE as usize + 4096];
    loop {
        let request = match channel.read(&mut buffer) {
            Ok(len) => Request(&buffer[..len]),
            Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or_default()) {
                Errno::ENODEV => return device,
                // A request was taken back before it was read.
                Errno::EINTR | Errno::ENOENT | Errno::EAGAIN => continue,
                errno => panic!("/dev/fuse: {errno}"),
            },
        };
        let Some(answer) = answer(&mut device, &request) else {
            continue;
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-(errno as i32), Vec::new()),
        };
        let len = u32::try_from(REPLY_HEAD + body.len()).expect("a reply is short");
        let mut reply = Reply::default();
        reply
            .u32(len)
            .u32(error.cast_unsigned())
            .u64(request.unique());
        reply.0.extend(body);
        // In vain for a request that was taken back meanwhile.
        let _ = channel.write_all(&reply.0);
    }
}

/// The body of a reply; `None` where the kernel wants none.
fn answer(device: &mut impl Device, request: &Request<'_>) -> Option<Result<Vec<u8>, Errno>> {
    let done = |result: io::Result<()>| result.map(|()| Vec::new()).map_err(|_| Errno::EIO);
    Some(match request.opcode() {
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        INIT => Ok(introduction()),
        GETATTR => Ok(attributes(device.len())),
        STATFS => Ok(statistics()),
        // No handle, no flags.
        OPEN => Ok(vec![0; 16]),
        FLUSH | RELEASE | DESTROY => Ok(Vec::new()),
        READ => {
            let (offset, len) = (request.u64(8), request.u32(16) as usize);
            device.read(offset, len).map_err(|_| Errno::EIO)
        }
        WRITE => {
            let data = &request.0[HEAD + 40..];
            let written = u64::from(request.u32(16));
            let result = device.write(request.u64(8), data);
            done(result).map(|_| written.to_le_bytes().to_vec())
        }
        FSYNC => done(device.sync()),
        FALLOCATE if request.u32(24) & ZEROING != 0 => {
            done(device.discard(request.u64(8), request.u64(16)))
        }
        FALLOCATE => Err(Errno::EOPNOTSUPP),
        _ => Err(Errno::ENOSYS),
    })
}

fn introduction() -> Vec<u8> {
    let mut reply = Reply::default();
    let [major, minor] = VERSION;
    reply.u32(major).u32(minor).u32(0);
    reply.u32(BIG_WRITES | MAX_PAGES_COUNT);
    // The kernel's own limits for what goes on in the background.
    reply.u32(0).u32(MAX_WRITE).u32(1);
    reply.u32(u32::from(MAX_PAGES));
    reply.zeros(32);
    reply.0
}

fn attributes(len: u64) -> Vec<u8> {
    let mut reply = Reply::default();
    // Valid for no time, inode 1; the three times are zero.
    reply.zeros(16).u64(1).u64(len).u64(len / 512).zeros(36);
    reply.u32(MODE).u32(1).zeros(12).u32(4096).u32(0);
    reply.0
}

/// All that matters is the size of a block, of which a loop device makes that of its discards.
fn statistics() -> Vec<u8> {
    let mut reply = Reply::default();
    reply.zeros(40).u32(4096).u32(255).u32(4096).zeros(28);
    reply.0
}

/// A request; places in it are counted from behind its head.
struct Request<'a>(&'a [u8]);

impl Request<'_> {
    fn opcode(&self) -> u32 {
        u32::from_le_bytes(self.0[4..8].try_into().expect("four bytes"))
    }

    fn unique(&self) -> u64 {
        u64::from_le_bytes(self.0[8..16].try_into().expect("eight bytes"))
    }

    fn u32(&self, at: usize) -> u32 {
        let bytes = &self.0[HEAD + at..][..4];
        u32::from_le_bytes(bytes.try_into().expect("four bytes"))
    }

    fn u64(&self, at: usize) -> u64 {
        let bytes = &self.0[HEAD + at..][..8];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }
}

#[derive(Default)]
struct Reply(Vec<u8>);

impl Reply {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_have_the_lengths_that_the_kernel_expects() {
        let lengths = [introduction(), attributes(1 << 30), statistics()].map(|body| body.len());
        assert_eq!(lengths, [64, 104, 80]);
    }
}
