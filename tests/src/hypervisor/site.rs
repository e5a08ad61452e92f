//! A site: two hypervisors, their network, and a controller.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::guest::Guest;
use super::vm::Vm;
use crate::controller::Controller;
use crate::host::make_key;
use crate::image::MIB;
use crate::lab;
use crate::mount::{FileSystem, Kind};
use crate::network::Network;
use crate::process::{agents_in, wait_for};
use crate::skip::{find_tool, skip, vm_obstacle};

/// How long a host, or libvirt on it, may take to come up. It takes one second.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a guest may take to boot, emulated on a machine that does other things as well. Alone
/// it takes 10 s.
const BOOT: Duration = Duration::from_secs(140);

/// What a site is to be.
#[derive(Debug, Clone)]
pub struct SiteSpec {
    /// Size of the file systems for images, in bytes; they are sparse.
    pub images_bytes: u64,
    /// The file systems for images.
    pub kinds: [Kind; 2],
}

impl Default for SiteSpec {
    fn default() -> Self {
        Self {
            images_bytes: 2048 * MIB,
            kinds: [Kind::Xfs, Kind::Ext4],
        }
    }
}

impl SiteSpec {
    /// A site of which neither host can copy files by sharing their blocks.
    #[must_use]
    pub fn without_reflinks() -> Self {
        Self {
            kinds: [Kind::Ext4, Kind::Ext4],
            ..Self::default()
        }
    }
}

/// Two hypervisors and a controller. Fields are dropped in order.
#[derive(Debug)]
pub struct Site {
    /// The hypervisor hvA.
    pub a: Hypervisor,
    /// The hypervisor hvB.
    pub b: Hypervisor,
    /// The controller, which reaches them by those names.
    pub controller: Controller,
    /// The guest that VMs run.
    pub guest: Guest,
    _network: Network,
    _directory: TempDir,
}

/// A hypervisor. Fields are dropped in order: processes before what they use.
#[derive(Debug)]
pub struct Hypervisor {
    name: &'static str,
    process: Child,
    init: u32,
    directory: PathBuf,
    _images: FileSystem,
}

impl Site {
    /// Brings a site up; `None`, and a line that says so, where none can be.
    #[must_use]
    pub fn start() -> Option<Self> {
        Self::with(&SiteSpec::default())
    }

    /// Brings up a site of another shape.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn with(spec: &SiteSpec) -> Option<Self> {
        if let Some(reason) = vm_obstacle() {
            skip(&reason);
            return None;
        }
        let guest = Guest::built();
        let directory =
            TempDir::with_prefix_in("site-", lab::base()).expect("root may make directories");
        let network = Network::new(2);
        let home = directory.path().join("controller");
        fs::create_dir_all(home.join(".ssh")).expect("the site's directory is writable");
        make_key(&home.join(".ssh/id_ed25519"), "controller");
        let names = ["hvA", "hvB"];
        for name in names {
            prepare(name, &directory.path().join(name));
        }
        let keys: String = names
            .iter()
            .map(|name| read(&directory.path().join(name).join("root/.ssh/id_ed25519.pub")))
            .chain([read(&home.join(".ssh/id_ed25519.pub"))])
            .collect();
        for name in names {
            write(
                &directory.path().join(name).join("ssh/authorized_keys"),
                &keys,
            );
        }
        let boot = |host: usize| {
            Hypervisor::boot(
                names[host],
                directory.path().join(names[host]),
                network.host(host),
                spec,
                host,
            )
        };
        // One after the other: a host ends with the thread that started it.
        let (a, b) = (boot(0), boot(1));
        let config = home.join(".ssh/config");
        write(&config, &ssh_config(&home));
        let known: String = [&a, &b]
            .iter()
            .zip(0..)
            .map(|(host, at)| host.known_hosts_line(at))
            .collect();
        write(&home.join(".ssh/known_hosts"), &known);
        let controller = Controller::new(home, config).within(&network.controller());
        Some(Self {
            a,
            b,
            controller,
            guest,
            _network: network,
            _directory: directory,
        })
    }

    /// Puts a VM's disks on a host, and defines it there.
    pub fn define(&self, on: &Hypervisor, vm: &Vm) {
        vm.make_disks(&self.guest, on);
        on.define(&vm.xml());
    }
}

impl Hypervisor {
    fn boot(
        name: &'static str,
        directory: PathBuf,
        netns: &str,
        spec: &SiteSpec,
        number: usize,
    ) -> Self {
        let images = FileSystem::mount(
            spec.kinds[number],
            spec.images_bytes,
            &directory.join("images"),
        );
        mode(&directory.join("images"), 0o711);
        write(&directory.join("setup"), &setup_script(name, &directory));
        let log =
            fs::File::create(directory.join("log/console.log")).expect("the site is writable");
        let process = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "ip",
                "netns",
                "exec",
                netns,
                "unshare",
            ])
            .args([
                "--mount",
                "--uts",
                "--ipc",
                "--pid",
                "--propagation",
                "private",
            ])
            .args(["--fork", "--kill-child", "--mount-proc", "/bin/sh"])
            .arg(directory.join("setup"))
            .current_dir("/")
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a handle can be cloned"))
            .stderr(log)
            .spawn()
            .expect("setpriv is installed");
        let ready = directory.join("log/ready");
        let console = directory.join("log/console.log");
        wait_for(
            &format!("{name} up, see {}", console.display()),
            PATIENCE,
            || ready.exists().then_some(()),
        );
        let children = format!("/proc/{0}/task/{0}/children", process.id());
        let init = read(Path::new(&children))
            .trim()
            .parse()
            .expect("the host has a first process");
        let host = Self {
            name,
            process,
            init,
            directory,
            _images: images,
        };
        wait_for(&format!("sshd on {name}"), PATIENCE, || {
            host.exec(&["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/22"])
                .status
                .success()
                .then_some(())
        });
        host
    }

    /// Its name in the controller's ssh configuration.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Runs a program on the host, past ssh.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn exec(&self, words: &[&str]) -> Output {
        let target = self.init.to_string();
        Command::new(find_tool("nsenter").expect("checked before anything starts"))
            .args(["-t", &target, "-m", "-u", "-i", "-n", "-p", "--"])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .expect("nsenter is installed")
    }

    /// Runs a program on the host to its end, and gives what it wrote.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, words: &[&str]) -> String {
        let output = self.exec(words);
        let (stdout, stderr) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert!(
            output.status.success(),
            "{words:?} on {}: {stderr}",
            self.name
        );
        stdout.trim_end().to_owned()
    }

    /// Has a program of the host do something else from then on, when its words are such: both as a
    /// shell has them.
    pub fn instead(&self, program: &str, words: &str, does: &str) {
        let script = format!(
            "real=$(command -v {program}); cp $real /tmp/{program}.real; \
             printf '%s\\n' '#!/bin/sh' 'case \"$*\" in {words}) {does} ;; esac' \
             'exec /tmp/{program}.real \"$@\"' >/tmp/{program}; \
             chmod +x /tmp/{program}; mount --bind /tmp/{program} $real"
        );
        self.run(&["sh", "-c", &script]);
    }

    /// The end of that.
    pub fn as_ever(&self, program: &str) {
        let script = format!("umount -l $(command -v {program})");
        self.run(&["sh", "-c", &script]);
    }

    /// Runs virsh on the host.
    pub fn virsh(&self, words: &[&str]) -> String {
        self.run(&[&["virsh", "-q"], words].concat())
    }

    /// Defines a domain. The first one has libvirt ask QEMU what it can do, and on a loaded machine
    /// the two have been seen to wait for each other for ever: then that QEMU is ended, and libvirt
    /// asks another.
    ///
    /// # Panics
    /// When it cannot be defined.
    pub fn define(&self, xml: &str) {
        write(&self.directory.join("tmp/define.xml"), xml);
        let words = ["timeout", "60", "virsh", "-q", "define", "/tmp/define.xml"];
        let asked = "qemu-system.*-machine none";
        for _ in 0..2 {
            if self.exec(&words).status.success() {
                return;
            }
            let _ = self.exec(&["pkill", "-KILL", "-f", "--", asked]);
        }
        self.run(&words);
    }

    /// Puts a definition where libvirt keeps its own, and starts libvirt anew.
    ///
    /// # Panics
    /// When libvirt does not come up again.
    pub fn define_unchecked(&self, vm: &str, xml: &str) {
        self.end_libvirtd();
        fs::create_dir_all(self.directory.join("etc/qemu")).expect("the site is writable");
        write(&self.directory.join(format!("etc/qemu/{vm}.xml")), xml);
        self.start_libvirtd();
    }

    /// Ends libvirtd and starts it again, with its VMs running on.
    pub fn restart_libvirtd(&self) {
        self.end_libvirtd();
        self.start_libvirtd();
    }

    fn end_libvirtd(&self) {
        self.run(&["pkill", "--exact", "libvirtd"]);
        let gone = || {
            (!self
                .exec(&["pgrep", "--exact", "libvirtd"])
                .status
                .success())
            .then_some(())
        };
        wait_for("the end of libvirtd", PATIENCE, gone);
    }

    fn start_libvirtd(&self) {
        self.run(&["libvirtd", "-d"]);
        let up = || {
            self.exec(&["virsh", "-q", "uri"])
                .status
                .success()
                .then_some(())
        };
        wait_for("libvirtd", PATIENCE, up);
        self.run(&[
            "sh",
            "-c",
            "virsh -q pool-start default; virsh -q net-start default; true",
        ]);
    }

    /// Starts a VM, waits until its guest has said everything, switches it off, and gives what it
    /// said.
    pub fn boots(&self, vm: &str) -> String {
        self.boots_with_console(vm, vm)
    }

    /// The same for a VM whose console is that of another name: a clone's is its source's.
    pub fn boots_with_console(&self, vm: &str, console: &str) -> String {
        let _ = fs::remove_file(self.console_path(console));
        self.virsh(&["start", vm]);
        let said = wait_for(&format!("the boot of {vm} on {}", self.name), BOOT, || {
            let said = self.console(console);
            said.contains("GUEST ready").then_some(said)
        });
        self.virsh(&["destroy", vm]);
        said
    }

    /// Starts a VM whose guest writes, and waits until it does.
    pub fn start_writing(&self, vm: &str) {
        let _ = fs::remove_file(self.console_path(vm));
        self.virsh(&["start", vm]);
        self.wait_for_writing(vm);
    }

    /// Waits until the guest of a VM that was started writes.
    pub fn wait_for_writing(&self, vm: &str) {
        wait_for(&format!("what {vm} writes on {}", self.name), BOOT, || {
            self.console(vm).contains("GUEST wrote").then_some(())
        });
    }

    /// The longest time for which a guest was kept from writing, of each second since its console had
    /// so many bytes, in milliseconds.
    #[must_use]
    pub fn pauses(&self, vm: &str, since: usize) -> Vec<u64> {
        let said = self.console(vm);
        let lines = said.get(since..).unwrap_or_default().lines();
        let number = |line: &str| {
            line.split_once("longest ")?
                .1
                .split_once(' ')?
                .0
                .parse()
                .ok()
        };
        lines.filter_map(number).collect()
    }

    fn console_path(&self, vm: &str) -> PathBuf {
        self.directory.join("log").join(format!("{vm}-console.log"))
    }

    /// What a VM's guest has said so far.
    #[must_use]
    pub fn console(&self, vm: &str) -> String {
        let bytes = fs::read(self.console_path(vm)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A file of its image directory, as the test sees it.
    #[must_use]
    pub fn image(&self, name: &str) -> PathBuf {
        self.directory.join("images").join(name)
    }

    /// A file of its /var/tmp, as the test sees it.
    #[must_use]
    pub fn var_tmp(&self, name: &str) -> PathBuf {
        self.directory.join("var-tmp").join(name)
    }

    /// A file below its /var/lib/libvirt or /var/lib/kvm-clone, as the test sees it.
    #[must_use]
    pub fn library(&self, path: &str) -> PathBuf {
        self.directory.join("lib").join(path)
    }

    /// Everything that an operation could have changed: definitions, files, volumes.
    #[must_use]
    pub fn state(&self) -> String {
        let mut state = String::new();
        for vm in self
            .virsh(&["list", "--all", "--name"])
            .lines()
            .filter(|vm| !vm.is_empty())
        {
            let _ = writeln!(state, "{vm} {}", self.virsh(&["dumpxml", "--inactive", vm]));
            let _ = writeln!(state, "{vm} {}", self.virsh(&["domstate", vm]));
        }
        state += &self.virsh(&["vol-list", "default"]);
        let find = "cd /var/lib; find libvirt/images libvirt/qemu/nvram libvirt/swtpm kvm-clone -path kvm-clone/digests -prune -o -type f -printf '%p %s %T@ %i\n' | sort; \
                    find libvirt/images -type f | sort | xargs -r md5sum";
        state + &self.run(&["sh", "-c", find])
    }

    /// Names in its image directory, hidden ones included.
    #[must_use]
    pub fn image_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .run(&["ls", "-A1", "/var/lib/libvirt/images"])
            .lines()
            .map(str::to_owned)
            .collect();
        names.retain(|name| name != "lost+found");
        names
    }

    /// The agents that run on it, as /proc directories.
    ///
    /// # Panics
    /// When the host does not run.
    #[must_use]
    pub fn agents(&self) -> Vec<PathBuf> {
        let link = fs::read_link(format!("/proc/{}/ns/mnt", self.init)).expect("the host runs");
        agents_in(link.as_os_str())
    }

    /// Claims that nothing of ours is left on it: no agent, no record of a clone, no partial file.
    ///
    /// # Panics
    /// When something is.
    pub fn assert_tidy(&self) {
        wait_for(&format!("{} without agents", self.name), PATIENCE, || {
            self.agents().is_empty().then_some(())
        });
        let left = || {
            self.run(&[
            "sh",
            "-c",
            "cd /var/lib/kvm-clone; ls -A clones held nbd 2>/dev/null | grep -e json -e '[0-9a-f]$'; \
             find /var/lib/libvirt -name '*.kc-*' ! -name '*.kc-checkpoint-*'; \
             find /var/lib/libvirt/qemu -name 'kc-*' ! -path '*/checkpoint/*'; pgrep --ns $$ -a qemu-nbd; \
             for vm in $(virsh -q list --name); do virsh -q backup-dumpxml $vm 2>/dev/null; done; true",
        ])
        };
        // A host cleans up by itself when a controller is gone.
        let tidy = Instant::now() + PATIENCE;
        while !left().is_empty() && Instant::now() < tidy {
            std::thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(left(), "", "left on {}", self.name);
    }

    fn known_hosts_line(&self, number: usize) -> String {
        let key = read(&self.directory.join("ssh/host_key.pub"));
        format!("{} {key}", Network::address(number))
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        // Ends the pid namespace with all that runs in it, so that the mounts are free.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let process = PathBuf::from(format!("/proc/{}", self.init));
        if !std::thread::panicking() {
            wait_for(&format!("the end of {}", self.name), PATIENCE, || {
                (!process.exists()).then_some(())
            });
        }
    }
}

/// The directories and files that are a host's own.
fn prepare(name: &str, directory: &Path) {
    for part in [
        "root/.ssh",
        "tmp",
        "var-tmp",
        "shm",
        "ssh",
        "log",
        "cache",
        "etc",
        "images",
        "state",
        "localca",
        "lib/images",
        "lib/qemu/nvram",
        "lib/swtpm",
        "lib/dnsmasq",
        "lib/network",
        "lib/boot",
    ] {
        fs::create_dir_all(directory.join(part)).expect("the site's directory is writable");
    }
    for part in ["root", "root/.ssh"] {
        mode(&directory.join(part), 0o700);
    }
    for part in ["tmp", "var-tmp", "shm"] {
        mode(&directory.join(part), 0o1777);
    }
    make_key(&directory.join("ssh/host_key"), name);
    make_key(&directory.join("root/.ssh/id_ed25519"), name);
    let etc = directory.join("etc");
    write(
        &etc.join("qemu.conf"),
        "security_driver = \"none\"\ncgroup_controllers = [ ]\nnamespaces = [ ]\n\
         user = \"libvirt-qemu\"\ngroup = \"libvirt-qemu\"\n",
    );
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").expect("Linux gives UUIDs");
    write(
        &etc.join("libvirtd.conf"),
        &format!(
            "host_uuid = \"{}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n\
             log_outputs = \"2:file:/var/log/libvirt/libvirtd.log\"\n",
            uuid.trim()
        ),
    );
    write(
        &directory.join("ssh/sshd_config"),
        "Port 22\nHostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized_keys\nPidFile none\n\
         PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nStrictModes no\nUseDNS no\n\
         MaxStartups 100:30:200\nSubsystem sftp internal-sftp\nLogLevel VERBOSE\n",
    );
    write(
        &directory.join("network.xml"),
        "<network><name>default</name><forward mode='bridge'/><bridge name='br0'/></network>",
    );
}

/// What becomes sshd: everything before is only seen by the host.
///
/// VMs are emulated. Where /dev/kvm is root's alone libvirt finds that QEMU has KVM, as root, and that
/// it may not use it, as another user, and does not keep what it has asked for: it would ask QEMU anew
/// for each definition, which takes seconds.
fn setup_script(name: &str, directory: &Path) -> String {
    // The site chooses its directory, so the path is plain.
    let at = directory.display();
    let mut script = format!(
        "set -e\nhostname {name}\nmkdir -p /var/log/libvirt /var/cache/libvirt /var/lib/kvm-clone /var/lib/swtpm-localca\n"
    );
    for (from, to) in [
        ("root", "/root"),
        ("tmp", "/tmp"),
        ("var-tmp", "/var/tmp"),
        ("shm", "/dev/shm"),
        ("ssh", "/etc/ssh"),
        ("etc", "/etc/libvirt"),
        ("lib", "/var/lib/libvirt"),
        ("log", "/var/log/libvirt"),
        ("cache", "/var/cache/libvirt"),
        ("state", "/var/lib/kvm-clone"),
        ("localca", "/var/lib/swtpm-localca"),
        ("images", "/var/lib/libvirt/images"),
    ] {
        let _ = writeln!(script, "mount --bind {at}/{from} {to}");
    }
    let _ = write!(
        script,
        "cp {at}/network.xml /tmp/network.xml\n\
         mount -t tmpfs -o mode=755 none /run\nmkdir -p /run/sshd /run/lock /run/libvirt\n\
         : >/run/no-kvm; chmod 0 /run/no-kvm; test ! -e /dev/kvm || mount --bind /run/no-kvm /dev/kvm\n\
         chmod 711 /var/lib/libvirt /var/lib/libvirt/images\n\
         chown -R libvirt-qemu:libvirt-qemu /var/lib/libvirt/qemu\n\
         chown tss:tss /var/lib/swtpm-localca || :\n\
         virtlogd -d\nlibvirtd -d\n\
         until virsh -q uri >/dev/null 2>&1; do sleep 0.1; done\n\
         virsh -q pool-define-as default dir --target /var/lib/libvirt/images\n\
         virsh -q pool-start default\nvirsh -q net-define /tmp/network.xml\nvirsh -q net-start default\n\
         touch /var/log/libvirt/ready\n\
         exec {} -D -e -f /etc/ssh/sshd_config\n",
        find_tool("sshd")
            .expect("checked before anything starts")
            .display()
    );
    script
}

/// The controller's view of the hosts. Nothing of the user's own configuration is read.
fn ssh_config(home: &Path) -> String {
    let home = home.display();
    let mut config = String::new();
    for (name, host) in ["hvA", "hvB"].into_iter().zip(0..) {
        let _ = writeln!(
            config,
            "Host {name}\n  HostName {}\n  User root",
            Network::address(host)
        );
    }
    config
        + &format!(
            "Host *\n  IdentityFile {home}/.ssh/id_ed25519\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {home}/.ssh/known_hosts\n  GlobalKnownHostsFile none\n  \
             StrictHostKeyChecking yes\n"
        )
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .expect("the site's directories are its own");
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn write(path: &Path, contents: &str) {
    fs::write(path, contents).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
