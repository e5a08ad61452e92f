//! A host: a real sshd in namespaces of its own.
//!
//! Its mount namespace has its own /root, /tmp, /var/tmp, /dev/shm, /run, /var/lib/kvm-clone and
//! /etc/passwd, so that home, cache, keys, known hosts, login shell and the notes of unfinished
//! runs are the host's; everything else, the disks under test included, is shared with the machine
//! at the same path. Its pid namespace dies with its sshd, so nothing that was started on the host
//! outlives the test.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::network::inside;
use crate::process::{agents_in, tool, wait_for};
use crate::skip::find_tool;

/// How long a host may take to answer, or a killed one to end. It takes 50 ms; a loaded machine
/// is given time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How often another port is tried when somebody else took the free one.
const PORT_ATTEMPTS: usize = 5;

/// What a host is to be, before it starts.
#[derive(Debug, Clone)]
pub struct HostSpec {
    name: &'static str,
    shell: &'static str,
    setup: String,
    bashrc: String,
    network: Option<Place>,
    machine: Machine,
}

/// What kind of machine a host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// The one that the tests run on.
    Own,
    /// An aarch64, as far as agents go: `uname -m` says so, and its programs run, emulated by QEMU.
    Aarch64,
}

/// Where a host is reached, if not on the loopback of the machine.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// The network namespace.
    pub(crate) namespace: String,
    pub(crate) address: String,
}

impl HostSpec {
    /// A plain host: root's shell is bash and says nothing.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            shell: "/bin/bash",
            setup: String::new(),
            bashrc: String::new(),
            network: None,
            machine: Machine::Own,
        }
    }

    /// Another login shell.
    #[must_use]
    pub fn shell(self, shell: &'static str) -> Self {
        Self { shell, ..self }
    }

    /// Shell commands that root runs inside of the host's namespaces before sshd starts.
    #[must_use]
    pub fn setup(self, commands: &str) -> Self {
        Self {
            setup: commands.to_owned(),
            ..self
        }
    }

    /// Another kind of machine.
    #[must_use]
    pub fn machine(self, machine: Machine) -> Self {
        Self { machine, ..self }
    }

    /// In a network of its own.
    pub(crate) fn network(self, place: Place) -> Self {
        Self {
            network: Some(place),
            ..self
        }
    }

    /// The contents of root's .bashrc, which bash reads when sshd starts it.
    #[must_use]
    pub fn bashrc(self, contents: &str) -> Self {
        Self {
            bashrc: contents.to_owned(),
            ..self
        }
    }
}

impl HostSpec {
    fn address(&self) -> &str {
        let place = self.network.as_ref();
        place.map_or("127.0.0.1", |place| &place.address)
    }
}

/// A running host.
#[derive(Debug)]
pub struct Host {
    name: &'static str,
    directory: PathBuf,
    address: String,
    port: u16,
    process: Child,
    mount_namespace: OsString,
}

impl Host {
    /// Starts a host that keeps its state in `directory`, and waits until it answers.
    ///
    /// `login_key` is the public key of those who may log in. The host's own key may log in as
    /// well, on any host that is given this one's.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn start(spec: &HostSpec, directory: PathBuf, login_key: &str) -> Self {
        for name in ["root/.ssh", "tmp", "var-tmp", "shm", "state", "etc"] {
            fs::create_dir_all(directory.join(name)).expect("a host's directory is writable");
        }
        write(&directory.join("root/.bashrc"), &spec.bashrc);
        write(&directory.join("etc/passwd"), &passwd(spec.shell));
        for path in ["etc/host_key", "root/.ssh/id_ed25519"] {
            make_key(&directory.join(path), spec.name);
        }
        write(
            &directory.join("etc/authorized_keys"),
            &format!("{login_key}\n"),
        );
        private(&directory.join("root"));
        private(&directory.join("root/.ssh"));
        write(&directory.join("setup"), &setup_script(spec, &directory));
        let (process, port) = (0..PORT_ATTEMPTS)
            .find_map(|_| try_start(spec, &directory))
            .unwrap_or_else(|| panic!("{} does not come up: {}", spec.name, log(&directory)));
        let mount_namespace = mount_namespace(&process);
        Self {
            name: spec.name,
            directory,
            address: spec.address().to_owned(),
            port,
            process,
            mount_namespace,
        }
    }

    /// Its name in the controller's ssh configuration.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Where it is reached.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The port there.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What is /root on the host, as the test sees it.
    #[must_use]
    pub fn home(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// What is /var/tmp on the host, as the test sees it.
    #[must_use]
    pub fn var_tmp(&self) -> PathBuf {
        self.directory.join("var-tmp")
    }

    /// What is /dev/shm on the host, as the test sees it.
    #[must_use]
    pub fn shm(&self) -> PathBuf {
        self.directory.join("shm")
    }

    /// What is /var/lib/kvm-clone on the host, as the test sees it.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The link target of `/proc/PID/ns/mnt` of its processes.
    #[must_use]
    pub fn mount_namespace(&self) -> OsString {
        self.mount_namespace.clone()
    }

    /// The public half of the host's own key pair, with which its root logs in elsewhere.
    #[must_use]
    pub fn own_key(&self) -> String {
        read(&self.home().join(".ssh/id_ed25519.pub"))
    }

    /// Lets the owner of a public key log in.
    pub fn allow(&self, public_key: &str) {
        let path = self.directory.join("etc/authorized_keys");
        write(&path, &format!("{}{public_key}\n", read(&path)));
    }

    /// From now on the owner of the key with this comment gets this command, whatever it asks for.
    ///
    /// # Panics
    /// When the command holds a double quote, which would have to be quoted.
    pub fn force(&self, owner: &str, command: &str) {
        assert!(!command.contains('"'));
        let path = self.directory.join("etc/authorized_keys");
        let forced = |line: &str| match line.ends_with(&format!(" {owner}")) {
            true => {
                // Without what was forced before.
                let key = &line[line.find("ssh-").expect("a key's kind")..];
                format!("restrict,command=\"{command}\" {key}\n")
            }
            false => format!("{line}\n"),
        };
        write(&path, &read(&path).lines().map(forced).collect::<String>());
    }

    /// Its line in a known_hosts file.
    #[must_use]
    pub fn known_hosts_line(&self) -> String {
        format!(
            "[{}]:{} {}",
            self.address,
            self.port,
            read(&self.directory.join("etc/host_key.pub"))
        )
    }

    /// The agents that run on it, as /proc directories.
    #[must_use]
    pub fn agents(&self) -> Vec<PathBuf> {
        agents_in(&self.mount_namespace)
    }

    /// Waits until no agent runs on it.
    ///
    /// # Panics
    /// When one still does after a while.
    pub fn wait_without_agents(&self) {
        wait_for(&format!("{} without agents", self.name), PATIENCE, || {
            self.agents().is_empty().then_some(())
        });
    }

    /// The log of its sshd.
    #[must_use]
    pub fn log(&self) -> String {
        log(&self.directory)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Killing unshare kills the first process of the pid namespace, hence all of it; mounts
        // are free only after that.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let namespace = self.mount_namespace.clone();
        let gone = || {
            let entries = fs::read_dir("/proc").ok()?;
            let lives = entries.filter_map(Result::ok).any(|entry| {
                fs::read_link(entry.path().join("ns/mnt"))
                    .is_ok_and(|link| link.as_os_str() == namespace)
            });
            (!lives).then_some(())
        };
        if !std::thread::panicking() {
            wait_for(&format!("the end of {}", self.name), PATIENCE, gone);
        }
    }
}

fn try_start(spec: &HostSpec, directory: &Path) -> Option<(Child, u16)> {
    let port = free_port();
    write(
        &directory.join("etc/sshd_config"),
        &sshd_config(directory, spec.address(), port),
    );
    let network = spec.network.iter();
    let network = network.flat_map(|place| ["ip", "netns", "exec", &place.namespace]);
    let output = fs::File::create(directory.join("log")).expect("a host's directory is writable");
    // setpriv: the host ends with the thread that started it, however that ends.
    let mut process = Command::new("setpriv")
        .args(["--pdeathsig", "KILL"])
        .args(network)
        .args(["unshare", "--mount", "--propagation", "private", "--pid"])
        .args(["--fork", "--kill-child", "--mount-proc", "/bin/sh"])
        .arg(directory.join("setup"))
        .current_dir("/")
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .stdin(Stdio::null())
        .stdout(output.try_clone().expect("a handle can be cloned"))
        .stderr(output)
        .spawn()
        .expect("setpriv is installed");
    let answered = wait_for("an answer of sshd", PATIENCE, || {
        if process.try_wait().ok().flatten().is_some() {
            return Some(false);
        }
        // Another host may have taken the port meanwhile, and greets as well.
        let listens = log(directory).contains("Server listening on");
        (listens && greets(spec, port)).then_some(true)
    });
    answered.then_some((process, port))
}

/// Whether something on the port speaks ssh.
fn greets(spec: &HostSpec, port: u16) -> bool {
    let address = spec.address().parse().expect("an address is one");
    let address = SocketAddr::new(address, port);
    let greets = || {
        let Ok(mut stream) = TcpStream::connect_timeout(&address, PATIENCE) else {
            return false;
        };
        let _ = stream.set_read_timeout(Some(PATIENCE));
        let mut banner = [0; 4];
        stream.read_exact(&mut banner).is_ok() && &banner == b"SSH-"
    };
    match &spec.network {
        Some(place) => inside(&place.namespace, greets),
        None => greets(),
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has free ports");
    listener
        .local_addr()
        .expect("a bound socket has an address")
        .port()
}

/// The namespace of sshd, which is the child of the process that was started.
fn mount_namespace(process: &Child) -> OsString {
    let children = format!("/proc/{0}/task/{0}/children", process.id());
    let child = read(Path::new(&children));
    let link = format!("/proc/{}/ns/mnt", child.trim());
    fs::read_link(&link)
        .unwrap_or_else(|error| panic!("{link}: {error}"))
        .into_os_string()
}

/// Has this kernel give programs for aarch64 to QEMU, which is opened here and now (`F`). The number is
/// what an ELF header of one begins with, and its mask leaves out what differs among them; both are
/// those of QEMU's own binfmt.d. On Linux 6.7 and newer this ends with the last mount.
const EMULATION: &str = r"mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
[ -e /proc/sys/fs/binfmt_misc/kvm-clone-aarch64 ] ||
  echo ':kvm-clone-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:F' >/proc/sys/fs/binfmt_misc/register ||
  [ -e /proc/sys/fs/binfmt_misc/kvm-clone-aarch64 ]";

/// What becomes sshd: everything before `exec` is only seen by the host.
fn setup_script(spec: &HostSpec, directory: &Path) -> String {
    // Where the machine itself is no host yet, it gets the empty directory that is mounted over.
    let mut script = "set -e\nmkdir -p /var/lib/kvm-clone\n".to_owned();
    let binds = [
        ("root", "/root"),
        ("tmp", "/tmp"),
        ("var-tmp", "/var/tmp"),
        ("shm", "/dev/shm"),
        ("state", "/var/lib/kvm-clone"),
    ];
    for (from, to) in binds.into_iter().chain([("etc/passwd", "/etc/passwd")]) {
        let from = directory.join(from);
        // The laboratory chooses its directory, so the path is plain.
        let _ = writeln!(script, "mount --bind {} {to}", from.display());
    }
    let sshd = find_tool("sshd").expect("checked before anything starts");
    let config = directory.join("etc/sshd_config");
    script.push_str("mount -t tmpfs none /run\nmkdir /run/sshd\n");
    if spec.machine == Machine::Aarch64 {
        let uname = directory.join("etc/uname");
        write(&uname, "#!/bin/sh\necho aarch64\n");
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&uname, executable).expect("a host's directory is its own");
        let _ = writeln!(
            script,
            "{EMULATION}\nmount --bind {} /usr/bin/uname",
            uname.display()
        );
    }
    let _ = writeln!(script, "{}", spec.setup);
    let _ = writeln!(
        script,
        "exec {} -D -e -f {}",
        sshd.display(),
        config.display()
    );
    script
}

fn sshd_config(directory: &Path, address: &str, port: u16) -> String {
    let etc = directory.join("etc");
    let etc = etc.display();
    format!(
        "ListenAddress {address}\nPort {port}\nHostKey {etc}/host_key\nPidFile none\n\
         AuthorizedKeysFile {etc}/authorized_keys\nPermitRootLogin prohibit-password\n\
         PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\n\
         MaxStartups 100:30:200\nMaxSessions 100\nUseDNS no\nSubsystem sftp internal-sftp\n\
         LogLevel VERBOSE\n"
    )
}

/// The machine's users, with another shell for root.
fn passwd(shell: &str) -> String {
    read(Path::new("/etc/passwd"))
        .lines()
        .map(|line| {
            match line
                .strip_prefix("root:")
                .and_then(|_| line.rsplit_once(':'))
            {
                Some((rest, _)) => format!("{rest}:{shell}\n"),
                None => format!("{line}\n"),
            }
        })
        .collect()
}

/// Makes a key pair without a passphrase, unless there is one.
pub(crate) fn make_key(path: &Path, comment: &str) {
    if !path.exists() {
        let fixed = ["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"];
        tool(
            "ssh-keygen",
            fixed.map(OsString::from).into_iter().chain([path.into()]),
        );
    }
}

fn log(directory: &Path) -> String {
    fs::read_to_string(directory.join("log")).unwrap_or_default()
}

fn private(path: &Path) {
    let mode = fs::Permissions::from_mode(0o700);
    fs::set_permissions(path, mode).expect("the laboratory's directories are its own");
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn write(path: &Path, contents: &str) {
    fs::write(path, contents).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_roots_shell_is_replaced() {
        let users = passwd("/bin/dash");
        assert!(
            users
                .lines()
                .any(|line| line.starts_with("root:") && line.ends_with(":/bin/dash"))
        );
        assert_eq!(users.matches("/bin/dash\n").count(), 1);
        assert_eq!(
            users.lines().count(),
            read(Path::new("/etc/passwd")).lines().count()
        );
    }
}
