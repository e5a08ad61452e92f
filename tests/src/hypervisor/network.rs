//! Network namespaces: one for the controller, with a bridge, and one for each host.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::mount::tear_down;
use crate::process::tool;

/// The first three numbers of every address. Each site has namespaces of its own, so all may use
/// the same.
const NET: &str = "10.99.7";

/// The namespaces of a site; gone when dropped.
#[derive(Debug)]
pub(super) struct Network {
    prefix: String,
    hosts: Vec<String>,
}

impl Network {
    /// Connects a controller and `n_hosts` hosts.
    pub(super) fn new(n_hosts: usize) -> Self {
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
        let (namespace, port) = (format!("{}-h{host}", self.prefix), format!("to-h{host}"));
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

    /// The controller's namespace.
    pub(super) fn controller(&self) -> String {
        format!("{}-ctl", self.prefix)
    }

    /// A host's namespace.
    pub(super) fn host(&self, host: usize) -> &str {
        &self.hosts[host]
    }

    /// A host's address.
    pub(super) fn address(host: usize) -> String {
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

fn ip(args: &[&str]) {
    tool("ip", args);
}

fn within(namespace: &str, args: &[&str]) {
    ip(&[&["-n", namespace], args].concat());
}
