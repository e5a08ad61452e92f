//! An sshd of the bench's own, with its own keys, on a free port of the loopback, behind a relay:
//! real ssh, and nothing of the user's configuration is touched.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::relay::Relay;

/// The name under which the tools reach the sshd, by [`Sshd::config`].
pub(crate) const HOST: &str = "bench-destination";

/// Where distributions put what the sftp subsystem runs.
const SFTP_SERVERS: [&str; 3] = [
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
];

/// A running sshd with the relay in front of it; ends when dropped.
#[derive(Debug)]
pub(crate) struct Sshd {
    child: Child,
    config: PathBuf,
    relay: Relay,
}

impl Sshd {
    /// Starts one whose keys and configuration live in `dir`, and which is reached at `address`.
    pub(crate) fn start(dir: &Path, address: Ipv4Addr) -> Result<Self> {
        for key in ["host_key", "user_key"] {
            make_key(&dir.join(key))?;
        }
        fs::copy(dir.join("user_key.pub"), dir.join("authorized_keys"))?;
        // The directory that sshd wants when root runs it; packages make it at boot.
        let _ = fs::create_dir("/run/sshd");
        let port = free_port()?;
        fs::write(dir.join("sshd_config"), server_config(dir, port)?)?;
        let child = spawn(dir)?;
        let relay = Relay::start(address, port)?;
        let config = dir.join("ssh_config");
        fs::write(&config, client_config(dir, address, relay.port())?)?;
        let mut sshd = Self {
            child,
            config,
            relay,
        };
        sshd.wait_until_up(dir, port)?;
        Ok(sshd)
    }

    /// The configuration for `ssh -F`.
    pub(crate) fn config(&self) -> &Path {
        &self.config
    }

    pub(crate) fn relay(&self) -> &Relay {
        &self.relay
    }

    fn wait_until_up(&mut self, dir: &Path, port: u16) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let ended = self.child.try_wait()?.is_some();
            if ended || Instant::now() > deadline {
                let log = fs::read_to_string(dir.join("sshd.log")).unwrap_or_default();
                bail!("the bench's sshd did not start: {}", log.trim());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Logs in as the tools will.
    pub(crate) fn try_login(&self) -> Result<()> {
        let output = Command::new("ssh")
            .arg("-F")
            .arg(&self.config)
            .args([HOST, "true"])
            .output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "logging in to the bench's sshd: {}",
            errors.trim()
        );
        Ok(())
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        // A polite end, so that it removes the file with its process number. It may have ended
        // already, and there is nobody to tell.
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

fn make_key(path: &Path) -> Result<()> {
    let status = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(path)
        .stdin(Stdio::null())
        .status()
        .context("running ssh-keygen")?;
    ensure!(status.success(), "ssh-keygen failed");
    Ok(())
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

fn spawn(dir: &Path) -> Result<Child> {
    // It re-executes itself, and so insists on an absolute path.
    let program = ["/usr/sbin/sshd", "/usr/bin/sshd", "/usr/local/sbin/sshd"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .context("no sshd on this machine: install openssh-server")?;
    Command::new(program)
        .args(["-D", "-f"])
        .arg(dir.join("sshd_config"))
        .arg("-E")
        .arg(dir.join("sshd.log"))
        .stdin(Stdio::null())
        .spawn()
        .context("starting sshd")
}

fn server_config(dir: &Path, port: u16) -> Result<String> {
    let dir = plain(dir)?;
    let sftp = SFTP_SERVERS
        .into_iter()
        .find(|path| Path::new(path).exists());
    let sftp = sftp.unwrap_or("internal-sftp");
    Ok(format!(
        "ListenAddress 127.0.0.1:{port}\n\
         HostKey {dir}/host_key\n\
         AuthorizedKeysFile {dir}/authorized_keys\n\
         PidFile {dir}/sshd.pid\n\
         UsePAM no\n\
         StrictModes no\n\
         PermitRootLogin prohibit-password\n\
         PasswordAuthentication no\n\
         MaxStartups 100\n\
         Subsystem sftp {sftp}\n\
         SetEnv XDG_CACHE_HOME={dir}/cache\n"
    ))
}

fn client_config(dir: &Path, address: Ipv4Addr, port: u16) -> Result<String> {
    let dir = plain(dir)?;
    let key = fs::read_to_string(format!("{dir}/host_key.pub"))?;
    fs::write(
        format!("{dir}/known_hosts"),
        format!("[{address}]:{port} {key}"),
    )?;
    Ok(format!(
        "Host {HOST}\n\
         HostName {address}\n\
         Port {port}\n\
         IdentityFile {dir}/user_key\n\
         IdentitiesOnly yes\n\
         UserKnownHostsFile {dir}/known_hosts\n\
         StrictHostKeyChecking yes\n\
         LogLevel ERROR\n"
    ))
}

/// ssh's configuration has quoting rules of its own; the bench's directory needs none.
fn plain(dir: &Path) -> Result<&str> {
    let text = dir
        .to_str()
        .filter(|text| !text.contains([' ', '"', '#', '%', '\n']));
    text.with_context(|| {
        format!(
            "{}: the path must be plain for ssh's configuration",
            dir.display()
        )
    })
}
