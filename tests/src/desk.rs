//! The desk of an administrator with two hypervisors, hv1 and hv2, at which the pages are followed.
//!
//! On hv1 there are the VMs `web`, whose disk is `web.qcow2` and whose guest has an agent, and `db`,
//! whose disk is `db.raw`; both are off. The desk's own machine has a home, a `/usr/local/bin`, units
//! and temporary directories of its own. There is no systemd: `systemctl` keeps the words that it was
//! given. The guests do not listen to their power button, so `virsh shutdown` switches them off.

use std::cell::Cell;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::controller::binary;
use crate::hypervisor::{Hypervisor, Site, SiteSpec, Vm};
use crate::lab;
use crate::pages::{Block, Body, Note, Page, Place, Typed};
use crate::process::wait_for;

/// No command of a page takes longer.
const LIMIT: Duration = Duration::from_secs(150);

/// How long one that is killed may take to end.
const TO_DIE: Duration = Duration::from_secs(10);

/// What of the machine is the desk's own.
const OWN: [(&str, &str); 5] = [
    ("local-bin", "/usr/local/bin"),
    ("units", "/etc/systemd/system"),
    ("state", "/var/lib/kvm-clone"),
    ("tmp", "/tmp"),
    ("var-tmp", "/var/tmp"),
];

/// Empties a host.
const EMPTY: &str = "ip link set eth0 up; pkill qemu-nbd; \
    for vm in $(virsh -q list --name); do virsh -q destroy $vm; done; \
    for vm in $(virsh -q list --all --name); do virsh -q undefine --nvram --checkpoints-metadata $vm; done; \
    find /var/lib/libvirt/images /var/lib/kvm-clone -mindepth 1 -delete";

const AGENT: &str =
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";

/// The desk.
#[derive(Debug)]
pub struct Desk {
    /// The hosts, of which `a` is hv1 and `b` hv2.
    pub site: Site,
    directory: TempDir,
    runs: Cell<u32>,
}

/// A command that runs, and the files to which it writes.
struct Started {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// What became of a command.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Desk {
    /// Sets it up; `None` where no site can be.
    ///
    /// # Panics
    /// When it cannot be.
    #[must_use]
    pub fn start(spec: &SiteSpec) -> Option<Self> {
        let site = Site::with(spec)?;
        let directory =
            TempDir::with_prefix_in("desk-", lab::base()).expect("root may make directories");
        let at = |name: &str| directory.path().join(name);
        for name in OWN.iter().map(|(name, _)| *name).chain(["bin", "service"]) {
            fs::create_dir(at(name)).expect("the desk is writable");
        }
        fs::write(at("bin/kvm-clone-ctl"), "").expect("the desk is writable");
        let script = |name: &str, does: &str| {
            let path = at("bin").join(name);
            fs::write(&path, format!("#!/bin/sh\n{does}\n")).expect("the desk is writable");
            let executable = fs::Permissions::from_mode(0o755);
            fs::set_permissions(&path, executable).expect("it was just made");
        };
        // Everybody at the desk is root.
        script("sudo", "exec \"$@\"");
        let told = at("systemctl");
        script("systemctl", &format!("echo \"$*\" >> {}", told.display()));
        let config = site.controller.ssh_config();
        let text = fs::read_to_string(config).expect("the site has one");
        let text = text.replace("Host hvA\n", "Host hvA hv1\n");
        let text = text.replace("Host hvB\n", "Host hvB hv2\n");
        fs::write(config, text).expect("the site is writable");
        for host in [&site.a, &site.b] {
            let off = "/tmp/virsh.real $(echo \"$*\" | sed s/shutdown/destroy/); exit";
            host.instead("virsh", "*shutdown*", off);
            // Where "agent install" puts an agent is the machine's otherwise.
            host.run(&[
                "mount",
                "-t",
                "tmpfs",
                "-o",
                "mode=755",
                "none",
                "/usr/local/lib",
            ]);
        }
        let runs = Cell::new(0);
        Some(Self {
            site,
            directory,
            runs,
        })
    }

    /// Makes all as it is said above, whatever a page has left.
    ///
    /// # Panics
    /// When it cannot be.
    fn tidy(&self) {
        for host in [&self.site.a, &self.site.b] {
            host.run(&["sh", "-c", EMPTY]);
        }
        let home = self.site.controller.home();
        for entry in fs::read_dir(home).expect("the desk is readable") {
            let path = entry.expect("the desk is readable").path();
            let stays = [".ssh", ".cache", "runs"]
                .iter()
                .any(|name| path.ends_with(name));
            if !stays {
                let removed = match path.is_dir() {
                    true => fs::remove_dir_all(&path),
                    false => fs::remove_file(&path),
                };
                removed.expect("the desk is writable");
            }
        }
        let service = self.file("service");
        fs::remove_dir_all(&service).expect("the desk is writable");
        fs::create_dir(&service).expect("the desk is writable");
        self.define("web", "qcow2");
        self.define("db", "raw");
    }

    /// A VM whose disk is called as people call it.
    fn define(&self, name: &'static str, format: &'static str) {
        let host = &self.site.a;
        let vm = Vm::new(name).disks(&[("vda", format)]).devices(AGENT);
        self.site.define(host, &vm);
        host.virsh(&["undefine", name]);
        let (made, file) = (vm.file("vda"), format!("{name}.{format}"));
        fs::rename(host.image(&made), host.image(&file)).expect("it was just made");
        host.define(&vm.xml().replace(&made, &file));
        // As it is once libvirt has read what it wrote: before that its controllers are in another
        // order, in which those of a clone are not.
        let again = format!(
            "virsh dumpxml --inactive {name} >/tmp/again.xml && virsh define /tmp/again.xml"
        );
        host.run(&["sh", "-c", &again]);
    }

    /// Does what a page says, in order, with nothing of another page there, and tells how long each
    /// command took.
    ///
    /// # Panics
    /// When something turns out otherwise than the page says.
    pub fn follow(&self, page: &Page, tell: &dyn Fn(&str)) {
        self.tidy();
        for block in &page.blocks {
            if block.run_by().is_none() {
                self.try_block(&page.name, block, tell);
            }
        }
    }

    fn try_block(&self, page: &str, block: &Block, tell: &dyn Fn(&str)) {
        let at = format!("{page}:{}", block.line);
        let (mut code, mut until, mut words) = (0, None, Vec::new());
        for note in &block.notes {
            match note {
                Note::Exit(wanted) => code = *wanted,
                Note::Until(command) => until = Some(command),
                Note::First(command) => {
                    let begun = Instant::now();
                    self.succeed(&at, command);
                    let took = begun.elapsed().as_secs_f64();
                    tell(&format!("{at}: first: {took:.1} s: {}", command.text));
                }
                Note::With(word, command) => {
                    let printed = self.succeed(&at, command);
                    words.push((word, printed.trim().to_owned()));
                }
                Note::File(_) | Note::RunBy(..) => {}
            }
        }
        let meant = |text: &str| {
            words.iter().fold(text.to_owned(), |text, (word, printed)| {
                text.replace(*word, printed)
            })
        };
        if let Body::File(text) = &block.body {
            self.write(block, &meant(text));
        }
        let steps = block.steps();
        for (number, step) in steps.iter().enumerate() {
            let is_last = number + 1 == steps.len();
            let command = Typed {
                text: meant(&step.command.text),
                ..step.command.clone()
            };
            let begun = Instant::now();
            let ended = match until {
                Some(condition) if is_last => self.interrupt(&at, &command, condition),
                _ => self.run(&command),
            };
            let took = begun.elapsed().as_secs_f64();
            tell(&format!("{at}: {took:.1} s: {}", command.text));
            let wanted = if is_last { code } else { 0 };
            expect(&at, &command, &ended, wanted);
            let printed: Vec<String> = ended.stdout.lines().map(shape).collect();
            for line in step.prints.iter().filter(|line| *line != "…") {
                assert!(
                    printed.contains(&shape(line)),
                    "{at}: {}\ndoes not print {line:?} but\n{}",
                    command.text,
                    ended.stdout
                );
            }
        }
    }

    fn write(&self, block: &Block, text: &str) {
        for note in &block.notes {
            let Note::File(path) = note else { continue };
            let path = path.strip_prefix("~/").expect("files of pages are at home");
            let path = self.site.controller.home().join(path);
            let directory = path.parent().expect("it is in a directory");
            fs::create_dir_all(directory).expect("the desk is writable");
            fs::write(path, text).expect("the desk is writable");
        }
    }

    fn succeed(&self, at: &str, command: &Typed) -> String {
        let ended = self.run(command);
        expect(at, command, &ended, 0);
        ended.stdout
    }

    fn host(&self, name: &str) -> &Hypervisor {
        match name {
            "hv1" => &self.site.a,
            _ => &self.site.b,
        }
    }

    fn run(&self, command: &Typed) -> Ended {
        match &command.place {
            Place::Host(host) => on_host(self.host(host), &command.text),
            Place::Desk => wait(self.start_here(&command.text)),
        }
    }

    /// Runs a command that waits for Ctrl-C, which it gets once the condition holds, and as from a
    /// terminal what it has started gets it too.
    fn interrupt(&self, at: &str, command: &Typed, condition: &Typed) -> Ended {
        assert_eq!(command.place, Place::Desk, "{at}: Ctrl-C is for the desk");
        // Without a shell that would hear it as well.
        let mut started = self.start_here(&format!("exec {}", command.text));
        let holds = || {
            let early = started.child.try_wait().expect("it is a child");
            (early.is_some() || self.run(condition).code == Some(0)).then_some(())
        };
        wait_for(&format!("{at}: {}", condition.text), LIMIT, holds);
        // It may have ended by itself, which is found out below.
        let _ = killpg(id(&started.child), Signal::SIGINT);
        wait(started)
    }

    fn start_here(&self, text: &str) -> Started {
        let number = self.runs.replace(self.runs.get() + 1);
        let (stdout, stderr) = (
            self.file(&format!("{number}-stdout")),
            self.file(&format!("{number}-stderr")),
        );
        let mut command = self.site.controller.command(Path::new("unshare"));
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.args([&self.entry(), "sh", text]);
        for name in ["XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"] {
            command.env_remove(name);
        }
        let create = |path: &Path| File::create(path).expect("the desk is writable");
        command.stdin(Stdio::null());
        command.stdout(create(&stdout)).stderr(create(&stderr));
        // So that one that hangs can be ended with all that it has started.
        command.process_group(0);
        Started {
            child: command.spawn().expect("unshare is installed"),
            stdout,
            stderr,
        }
    }

    /// What becomes the command: everything before is only seen by it.
    fn entry(&self) -> String {
        let at = self.directory.path().display();
        let binary = binary();
        let binary = binary.display();
        let mut script = format!("set -e\nmount --bind {binary} {at}/bin/kvm-clone-ctl\n");
        // Writing to a string does not fail.
        for (name, place) in OWN {
            let _ = writeln!(script, "mkdir -p {place}; mount --bind {at}/{name} {place}");
        }
        // What a service of the machine has written, if it has one.
        let service = "/var/lib/kvm-clone-ctl";
        let _ = writeln!(
            script,
            "test ! -d {service} || mount --bind {at}/service {service}"
        );
        let home = self.site.controller.home().display();
        let _ = write!(
            script,
            "mount --bind {home} /root\nset +e\ncd /root\nexport HOME=/root\n\
             export PATH=/usr/local/sbin:/usr/local/bin:{at}/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
             exec sh -c \"$1\"\n"
        );
        script
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What systemctl was told, a command a line.
    #[must_use]
    pub fn systemctl(&self) -> Vec<String> {
        let told = fs::read_to_string(self.file("systemctl")).unwrap_or_default();
        told.lines().map(str::to_owned).collect()
    }

    /// A file of the directory of units.
    #[must_use]
    pub fn unit(&self, name: &str) -> PathBuf {
        self.file("units").join(name)
    }
}

fn wait(started: Started) -> Ended {
    let Started {
        mut child,
        stdout,
        stderr,
    } = started;
    let begun = Instant::now();
    let status = wait_for("the end of a command", LIMIT + TO_DIE, || {
        if begun.elapsed() > LIMIT {
            // Then it ends without a code.
            let _ = killpg(id(&child), Signal::SIGKILL);
        }
        child.try_wait().expect("it is a child")
    });
    let text = |path: &Path| {
        let bytes = fs::read(path).expect("it was just written");
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Ended {
        code: status.code(),
        stdout: text(&stdout),
        stderr: text(&stderr),
    }
}

fn id(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("process ids are small"))
}

fn on_host(host: &Hypervisor, text: &str) -> Ended {
    // Files, since what a server that goes on inherits would keep a pipe open.
    let script = "cd /root; export HOME=/root; sh -c \"$1\" >/tmp/said 2>/tmp/complained; code=$?; \
                  cat /tmp/said; cat /tmp/complained >&2; exit $code";
    let limit = LIMIT.as_secs().to_string();
    let output = host.exec(&["timeout", &limit, "sh", "-c", script, "sh", text]);
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn expect(at: &str, command: &Typed, ended: &Ended, code: i32) {
    let Ended { stdout, stderr, .. } = ended;
    assert_eq!(
        ended.code,
        Some(code),
        "{at}: {}\n{stdout}\n{stderr}",
        command.text
    );
}

/// A line without its figures, which are others each time.
fn shape(line: &str) -> String {
    let mut shape = String::new();
    for sign in line.trim().chars() {
        let sign = if sign.is_ascii_digit() { '0' } else { sign };
        if !(sign == '0' && shape.ends_with('0')) {
            shape.push(sign);
        }
    }
    shape
}
