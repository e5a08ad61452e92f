//! Network namespaces without names, so that nothing has to be removed: the kernel ends each, and
//! the link in it, with the last process and the last open file that belong to it.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};

use crate::rate::Rate;

/// The two ends of the link. There is nothing else in the namespaces, so nothing can collide.
pub(crate) const ADDRESSES: [Ipv4Addr; 2] =
    [Ipv4Addr::new(10, 99, 8, 1), Ipv4Addr::new(10, 99, 8, 2)];

/// The interface at either end.
const WIRE: &str = "wire";

/// A network of its own, kept open.
#[derive(Debug)]
pub(crate) struct Namespace(File);

/// Two namespaces, joined by a pair of interfaces.
pub(crate) fn joined() -> Result<[Namespace; 2]> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "network namespaces need root"
    );
    let ends = [Namespace::new()?, Namespace::new()?];
    let other = ends[1].path();
    let pair = ["type", "veth", "peer", "name", WIRE, "netns", &other];
    ends[0].run("ip", &[&["link", "add", WIRE][..], &pair].concat())?;
    for (end, address) in ends.iter().zip(ADDRESSES) {
        let address = format!("{address}/24");
        end.run("ip", &["address", "add", &address, "dev", WIRE])?;
        end.run("ip", &["link", "set", WIRE, "up"])?;
        end.run("ip", &["link", "set", "lo", "up"])?;
    }
    Ok(ends)
}

impl Namespace {
    fn new() -> Result<Self> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
            Ok(Self(File::open("/proc/thread-self/ns/net")?))
        })
    }

    /// How another process names it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Does something in it: the processes and threads that this starts stay there.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET).context("entering a network namespace")?;
            work()
        })
    }

    /// Has the link carry so much from now on, in the direction that leaves from here.
    pub(crate) fn limit(&self, rate: Rate) -> Result<()> {
        let speed = format!("{}bit", rate.0);
        let burst = format!("{}b", burst_bytes(rate));
        let filter = ["tbf", "rate", &speed, "burst", &burst, "latency", "50ms"];
        let place = ["qdisc", "replace", "dev", WIRE, "root"];
        self.run("tc", &[&place[..], &filter].concat())
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        let output = self.inside(|| {
            let output = Command::new(program).args(args).output();
            output.with_context(|| format!("running {program}: install iproute2"))
        })?;
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("{program} {}: {}", args.join(" "), errors.trim());
        }
        Ok(())
    }
}

/// What may pass at once after a silence: 4 ms of the rate, so that a timer of tbf that is late by
/// less than that costs no rate, and at least two of the largest packets that TCP hands down. It
/// is also what a run is given for nothing: at 1 Gbit/s half a megabyte.
fn burst_bytes(rate: Rate) -> u64 {
    (rate.0 / 8 * 4 / 1000).max(128 * 1024)
}

/// A thread's namespace is its own: the rest of the bench stays where it is.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use kvm_clone_tests::skip::{obstacle, skip};

    use super::*;

    #[test]
    fn a_burst_lasts_for_four_milliseconds_and_holds_two_packets() {
        assert_eq!(burst_bytes(Rate(1_000_000_000)), 500_000);
        assert_eq!(burst_bytes(Rate(100_000_000)), 131_072);
    }
    #[test]
    fn one_end_hears_the_other_at_the_rate_and_no_faster() {
        if let Some(reason) = obstacle() {
            return skip(&reason);
        }
        let [source, destination] = joined().unwrap();
        source.limit(Rate(100_000_000)).unwrap();
        let listen = || Ok(TcpListener::bind((ADDRESSES[1], 0))?);
        let listener = destination.inside(listen).unwrap();
        let address = listener.local_addr().unwrap();
        let mut sender = source.inside(|| Ok(TcpStream::connect(address)?)).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let start = Instant::now();
        let send = thread::spawn(move || sender.write_all(&vec![1; 5_000_000]).unwrap());
        let mut received = Vec::new();
        receiver.read_to_end(&mut received).unwrap();
        send.join().unwrap();
        assert_eq!(received.len(), 5_000_000);
        // 5 MB but for the burst.
        assert!(start.elapsed() > Duration::from_millis(380));
    }
}
