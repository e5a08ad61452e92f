//! The laboratory: a directory for disks, two hosts, a controller.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::controller::{Controller, Run, Running};
use crate::host::{Host, HostSpec, Machine, PATIENCE, Place, make_key};
use crate::journey::Journey;
use crate::mount::{FileSystem, Kind, LoopDevice};
use crate::network::Network;
use crate::outcome::Outcome;
use crate::process::{ssh_clients_of, wait_for};
use crate::skip::{obstacle, skip};

/// Where laboratories lie, unless `KVM_CLONE_TEST_DIR` says otherwise: outside of everything that
/// is a host's own, such as /tmp and /root, where the repository may well be.
const BASE: &str = "/var/lib/kvm-clone-tests";

/// Names the host that is an aarch64 machine, hvA or hvB, in whichever tests run.
const FOREIGN: &str = "KVM_CLONE_TEST_AARCH64";

/// What a laboratory holds, before its hosts start: a mount made later would not be seen by them.
#[derive(Debug)]
pub struct LabSpec {
    directory: TempDir,
    mounts: Vec<FileSystem>,
    host_a: HostSpec,
    host_b: HostSpec,
    network: Option<Network>,
}

/// Two hosts and a controller. Fields are dropped in order: hosts before what they use.
#[derive(Debug)]
pub struct Lab {
    /// The host hvA.
    pub a: Host,
    /// The host hvB.
    pub b: Host,
    /// The controller, on this machine.
    pub controller: Controller,
    network: Option<Network>,
    mounts: Vec<FileSystem>,
    directory: TempDir,
}

/// Where laboratories lie on this machine.
///
/// # Panics
/// When the directory cannot be made.
#[must_use]
pub fn base() -> PathBuf {
    let base = std::env::var_os("KVM_CLONE_TEST_DIR").map_or_else(|| BASE.into(), PathBuf::from);
    fs::create_dir_all(&base).unwrap_or_else(|error| panic!("{}: {error}", base.display()));
    base
}

impl LabSpec {
    /// An empty laboratory; `None`, and a line that says so, where none can be.
    ///
    /// # Panics
    /// When its directory cannot be made.
    #[must_use]
    pub fn new() -> Option<Self> {
        if let Some(reason) = obstacle() {
            skip(&reason);
            return None;
        }
        let directory = TempDir::with_prefix_in("lab-", base()).expect("root may make directories");
        let foreign = std::env::var_os(FOREIGN);
        let host = |name| match foreign.as_ref().is_some_and(|foreign| foreign == name) {
            true => HostSpec::new(name).machine(Machine::Aarch64),
            false => HostSpec::new(name),
        };
        let (host_a, host_b) = (host("hvA"), host("hvB"));
        Some(Self {
            directory,
            mounts: Vec::new(),
            host_a,
            host_b,
            network: None,
        })
    }

    /// A path in the laboratory's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Mounts a fresh file system; it is seen by both hosts at the same path.
    #[must_use]
    pub fn mount(mut self, kind: Kind, size: u64) -> Self {
        let directory = self.path(&format!("mnt{}-{kind}", self.mounts.len()));
        self.mounts.push(FileSystem::mount(kind, size, &directory));
        self
    }

    /// The file systems, in the order in which they were mounted.
    #[must_use]
    pub fn mounts(&self) -> &[FileSystem] {
        &self.mounts
    }

    /// Controller and hosts reach each other over connections that can be cut.
    #[must_use]
    pub fn networked(self) -> Self {
        let network = Network::new(2);
        let place = |host| Place {
            namespace: network.host(host).to_owned(),
            address: Network::address(host),
        };
        let spec = self
            .host_a(|spec| spec.network(place(0)))
            .host_b(|spec| spec.network(place(1)));
        Self {
            network: Some(network),
            ..spec
        }
    }

    /// Another hvA.
    #[must_use]
    pub fn host_a(self, change: impl FnOnce(HostSpec) -> HostSpec) -> Self {
        Self {
            host_a: change(self.host_a),
            ..self
        }
    }

    /// Another hvB.
    #[must_use]
    pub fn host_b(self, change: impl FnOnce(HostSpec) -> HostSpec) -> Self {
        Self {
            host_b: change(self.host_b),
            ..self
        }
    }

    /// Starts the hosts.
    ///
    /// # Panics
    /// When one does not come up.
    #[must_use]
    pub fn start(self) -> Lab {
        let home = self.path("controller");
        fs::create_dir_all(home.join(".ssh")).expect("the laboratory's directory is writable");
        make_key(&home.join(".ssh/id_ed25519"), "controller");
        let key = fs::read_to_string(home.join(".ssh/id_ed25519.pub")).expect("a key was made");
        let start = |spec: &HostSpec, name| Host::start(spec, self.path(name), key.trim());
        let (a, b) = (start(&self.host_a, "hvA"), start(&self.host_b, "hvB"));
        a.allow(&b.own_key());
        b.allow(&a.own_key());
        let config = home.join(".ssh/config");
        fs::write(&config, ssh_config(&home, &[&a, &b])).expect("a home is writable");
        let known: String = [&a, &b]
            .iter()
            .map(|host| host.known_hosts_line())
            .collect();
        fs::write(home.join(".ssh/known_hosts"), known).expect("a home is writable");
        let mut controller = Controller::new(home, config);
        if let Some(network) = &self.network {
            controller = controller.within(&network.controller());
        }
        Lab {
            a,
            b,
            controller,
            network: self.network,
            mounts: self.mounts,
            directory: self.directory,
        }
    }
}

impl Lab {
    /// A laboratory without further file systems; `None`, and a line that says so, where none can
    /// be.
    #[must_use]
    pub fn start() -> Option<Self> {
        LabSpec::new().map(LabSpec::start)
    }

    /// A path in the laboratory's directory, the same here and on both hosts.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts an agent where authorized_keys can name it, and leaves nothing else of ours on the
    /// hosts. Gives its path.
    ///
    /// # Panics
    /// When it cannot be had.
    #[must_use]
    pub fn install_agent(&self) -> String {
        let deployed = self
            .controller
            .run(["agent", "deploy", "hvA"])
            .expect_json();
        let path = deployed["hosts"][0]["path"].as_str().unwrap_or_default();
        let below_home = path.strip_prefix("/root/").expect("deployed at home");
        // Under a name by which processes are known as agents.
        let agent = self.path("kvm-clone/agent-installed");
        let directory = agent.parent().expect("a path in the laboratory");
        fs::create_dir_all(directory).expect("the laboratory is writable");
        fs::copy(self.a.home().join(below_home), &agent).expect("it was just deployed");
        let removed = self.controller.run(["agent", "remove", "hvA"]);
        let _ = removed.expect_json();
        agent
            .to_str()
            .expect("a laboratory has a plain path")
            .to_owned()
    }

    /// What the controller's user gets from a host by hand.
    #[must_use]
    pub fn ssh(&self, host: &str, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.arg("-F").arg(self.controller.ssh_config());
        ssh.args([host, command]);
        ssh
    }

    /// A block device of this size.
    #[must_use]
    pub fn device(&self, name: &str, size: u64) -> LoopDevice {
        LoopDevice::new(&self.path(name), size)
    }

    /// The file systems, in the order in which they were mounted.
    #[must_use]
    pub fn mounts(&self) -> &[FileSystem] {
        &self.mounts
    }

    /// What connects controller and hosts, hvA as 0 and hvB as 1.
    ///
    /// # Panics
    /// When it is the machine's loopback.
    #[must_use]
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("a networked laboratory")
    }

    /// Runs a `disk` command on two paths.
    pub fn disk(&self, verb: &str, by: Journey, from: &Path, to: &Path, options: &[&str]) -> Run {
        self.start_disk(verb, by, from, to, options).wait()
    }

    /// Starts a `disk` command on two paths.
    pub fn start_disk(
        &self,
        verb: &str,
        by: Journey,
        from: &Path,
        to: &Path,
        options: &[&str],
    ) -> Running {
        let mut args: Vec<OsString> = vec!["disk".into(), verb.into()];
        args.extend([by.source(from), by.destination(to)]);
        args.extend(by.options().iter().chain(options).map(OsString::from));
        self.controller.start(args)
    }

    /// Waits until nothing of ours runs any more: no agent on a host, no connection to one.
    ///
    /// # Panics
    /// When something still does after a while.
    pub fn wait_until_quiet(&self) {
        self.a.wait_without_agents();
        self.b.wait_without_agents();
        wait_for("the end of the controller's ssh", PATIENCE, || {
            ssh_clients_of(self.controller.ssh_config())
                .is_empty()
                .then_some(())
        });
    }

    /// Runs `disk sync`, claims that it succeeds, that its figures add up and that the
    /// destination holds what the source holds, and gives the result.
    pub fn sync(&self, by: Journey, from: &Path, to: &Path, options: &[&str]) -> Outcome {
        Outcome::of_sync(by, [from, to], options, || {
            self.disk("sync", by, from, to, options)
        })
    }
}

/// The controller's view of the hosts. Nothing of the user's own configuration is read.
fn ssh_config(home: &Path, hosts: &[&Host]) -> String {
    let home = home.display();
    let entry = |host: &&Host| {
        format!(
            "Host {}\n  HostName {}\n  Port {}\n  User root\n",
            host.name(),
            host.address(),
            host.port()
        )
    };
    let all = format!(
        "Host *\n  IdentityFile {home}/.ssh/id_ed25519\n  IdentitiesOnly yes\n  \
         UserKnownHostsFile {home}/.ssh/known_hosts\n  GlobalKnownHostsFile none\n  \
         StrictHostKeyChecking yes\n"
    );
    hosts.iter().map(entry).chain([all]).collect()
}
