//! Network namespaces: one for the controller, with a bridge, and one for each host.

use std::fs::File;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, setns};

use crate::mount::tear_down;
use crate::process::tool;

/// The first three numbers of every address. Each site has namespaces of its own, so all may use
/// the same.
const NET: &str = "10.99.7";

/// The namespaces of a controller and its hosts; gone when dropped.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    hosts: Vec<String>,
}

impl Network {
    /// Connects a controller and `n_hosts` hosts.
    #[must_use]
    pub fn new(n_hosts: usize) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("kc{}-{number}", std::process::id());
        let mut network = Self {
            prefix,
            hosts: Vec::new(),
        };
        let controller = network.controller();
        ip(&["netns", "add", &controller]);
        within(&controller, &["link", "set", "lo", "up"]);
        within(&controller, &["link", "add", "br0", "type", "bridge"]);
        within(
            &controller,
            &["addr", "add", &format!("{NET}.1/24"), "dev", "br0"],
        );
        within(&controller, &["link", "set", "br0", "up"]);
        for host in 0..n_hosts {
            network.connect(host, &controller);
        }
        network
    }

    fn connect(&mut self, host: usize, controller: &str) {
        let (namespace, port) = (format!("{}-h{host}", self.prefix), port(host));
        ip(&["netns", "add", &namespace]);
        self.hosts.push(namespace.clone());
        within(&namespace, &["link", "set", "lo", "up"]);
        let peer = ["peer", "name", "eth0", "netns", &namespace];
        let link = ["link", "add", &port, "netns", controller, "type", "veth"];
        ip(&[&link[..], &peer].concat());
        within(controller, &["link", "set", &port, "master", "br0", "up"]);
        let address = format!("{}/24", Self::address(host));
        within(&namespace, &["addr", "add", &address, "dev", "eth0"]);
        within(&namespace, &["link", "set", "eth0", "up"]);
        // What VMs are connected to; nothing leads out of it.
        within(&namespace, &["link", "add", "br0", "type", "bridge"]);
        within(&namespace, &["link", "set", "br0", "up"]);
    }

    /// From now on nothing reaches a host any more, and nobody is told.
    pub fn cut(&self, host: usize) {
        within(&self.controller(), &["link", "set", &port(host), "down"]);
    }

    /// It is reached again.
    pub fn mend(&self, host: usize) {
        within(&self.controller(), &["link", "set", &port(host), "up"]);
    }

    /// The controller's namespace.
    #[must_use]
    pub fn controller(&self) -> String {
        format!("{}-ctl", self.prefix)
    }

    /// A host's namespace.
    #[must_use]
    pub fn host(&self, host: usize) -> &str {
        &self.hosts[host]
    }

    /// A host's address.
    #[must_use]
    pub fn address(host: usize) -> String {
        format!("{NET}.{}", host + 11)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let names = self.hosts.iter().cloned().chain([self.controller()]);
        for name in names {
            tear_down("ip", &["netns".as_ref(), "del".as_ref(), name.as_ref()]);
        }
    }
}

/// The controller's end of the connection with a host.
fn port(host: usize) -> String {
    format!("to-h{host}")
}

/// Does something in a namespace, on a thread that ends there.
///
/// # Panics
/// When there is no such namespace, or it cannot be done.
pub fn inside<T: Send>(namespace: &str, body: impl FnOnce() -> T + Send) -> T {
    let path = Path::new("/run/netns").join(namespace);
    let entered = || {
        let namespace = File::open(&path).expect("a namespace has a name");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
        body()
    };
    let joined = thread::scope(|scope| scope.spawn(entered).join());
    joined.unwrap_or_else(|panic| resume_unwind(panic))
}

fn ip(args: &[&str]) {
    tool("ip", args);
}

fn within(namespace: &str, args: &[&str]) {
    ip(&[&["-n", namespace], args].concat());
}
