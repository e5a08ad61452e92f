//! Real NBD servers, `qemu-nbd` and `nbdkit`, on a Unix socket.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::process::wait_for;
use crate::skip::{find_tool, skip};

/// A server that runs until it is dropped.
#[derive(Debug)]
pub struct NbdServer {
    child: Child,
    socket: PathBuf,
}

impl NbdServer {
    /// `qemu-nbd` with an image of this format, as the export `vda`, for several connections.
    #[must_use]
    pub fn qemu(socket: &Path, format: &str, image: &Path, options: &[&str]) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=8", "--export-name=vda"]);
        command.args(["--discard=unmap", "--detect-zeroes=unmap"]);
        command.arg("--socket").arg(socket);
        command.arg("--format").arg(format).args(options).arg(image);
        Self::start(command, socket)
    }

    /// `nbdkit` with these words; `None`, and a line that says so, where it is not installed.
    #[must_use]
    pub fn nbdkit(socket: &Path, words: &[&str]) -> Option<Self> {
        if find_tool("nbdkit").is_none() {
            skip("nbdkit is not installed");
            return None;
        }
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--exit-with-parent", "--unix"]);
        command.arg(socket).args(words);
        Some(Self::start(command, socket))
    }

    fn start(mut command: Command, socket: &Path) -> Self {
        let child = command.stdin(Stdio::null()).spawn();
        let server = Self {
            child: child.expect("the server is installed"),
            socket: socket.to_owned(),
        };
        wait_for("an NBD server", Duration::from_secs(20), || {
            socket.exists().then_some(())
        });
        server
    }

    /// What names an export of it, on a host that sees the socket.
    #[must_use]
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// Waits until somebody is connected: nbdkit then has threads for requests.
    pub fn wait_for_client(&self) {
        let threads = PathBuf::from(format!("/proc/{}/task", self.child.id()));
        wait_for("a client of nbdkit", Duration::from_secs(20), || {
            (threads.read_dir().ok()?.count() > 1).then_some(())
        });
    }

    /// Ends it, at once.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Has it make its image whole, and end.
    pub fn stop(mut self) {
        let id = self.child.id().to_string();
        crate::process::tool("kill", [&id]);
        let ended = self.child.wait().expect("it is a child of ours");
        assert!(ended.success() || ended.code().is_none(), "{ended}");
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
    }
}
