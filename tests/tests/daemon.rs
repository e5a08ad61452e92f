//! `replicate daemon`: promises are kept, and each mishap is told of once.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "the figures of a campaign")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use kvm_clone_tests::controller::{Controller, Running, binary};
use kvm_clone_tests::hypervisor::alone;
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::process::{tool, wait_for};
use kvm_clone_tests::replication::Replication;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

/// How old the newest point may be, in seconds.
const RPO: f64 = 60.0;

/// A daemon, what it tells, and what it measures.
struct Watched {
    shop: Replication,
    daemon: Running,
    notices: PathBuf,
    metrics: PathBuf,
}

impl Watched {
    fn start() -> Option<Self> {
        let shop = Replication::that_writes(Kind::Xfs, "")?;
        let home = shop.site.controller.home();
        let (notices, metrics) = (home.join("notices"), home.join("metrics.prom"));
        std::fs::write(&notices, "").unwrap();
        let command = format!("cat >> {0}; echo >> {0}", notices.display());
        // The least interval, for those who wait for these tests.
        let every = if seconds().is_some() { 20 } else { 10 };
        let policy = format!(
            "vms = [\"busy\"]\nevery = \"{every}s\"\nrpo = \"{RPO}s\"\nkeep = {{ last = 500 }}\n\
             [notify]\ncommand = \"{command}\"\n"
        );
        shop.write(&policy);
        let daemon = start_daemon(&shop, &metrics);
        let watched = Self {
            shop,
            daemon,
            notices,
            metrics,
        };
        watched.wait_for_another_point();
        Some(watched)
    }

    /// All that was told, as event and kind.
    fn told(&self) -> Vec<(String, String)> {
        let notices = std::fs::read_to_string(&self.notices).unwrap();
        let told = notices.lines().map(|line| {
            let notice: Value = serde_json::from_str(line).expect(line);
            assert_eq!(
                (&notice["policy"], &notice["vm"]),
                (&"shop".into(), &"busy".into())
            );
            let text = |key: &str| notice[key].as_str().unwrap().to_owned();
            (text("event"), text("kind"))
        });
        told.collect()
    }

    /// A figure of the VM.
    fn measured(&self, name: &str) -> Option<f64> {
        let text = std::fs::read_to_string(&self.metrics).ok()?;
        let start = format!("kvm_clone_{name}{{policy=\"shop\",vm=\"busy\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&start))?;
        value.parse().ok()
    }

    fn age(&self) -> Option<f64> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let newest = self.measured("newest_point_timestamp_seconds")?;
        Some(now.unwrap().as_secs_f64() - newest)
    }

    fn wait_for_another_point(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap().as_secs_f64();
        wait_for("another point", PATIENCE, || {
            let newest = self.measured("newest_point_timestamp_seconds")?;
            (newest > now).then_some(())
        });
    }

    /// Does something that keeps points from being made, as often as it takes until there is an
    /// alarm, undoes it, and waits for its end: it is one alarm, which may have become worse.
    fn suffers(&self, what: &str, mut mishap: impl FnMut(), remedy: impl FnOnce()) {
        let before = self.told().len();
        let begun = Instant::now();
        wait_for(&format!("an alarm: {what}"), PATIENCE, || {
            mishap();
            (self.told().len() > before).then_some(())
        });
        println!("{what}: alarm after {:.0} s", begun.elapsed().as_secs_f64());
        remedy();
        wait_for(&format!("the end of it: {what}"), PATIENCE, || {
            let told = self.told();
            (told[before..].last()?.0 == "over").then_some(())
        });
        println!("{what}: over after {:.0} s", begun.elapsed().as_secs_f64());
        let told = self.told()[before..].to_vec();
        assert_eq!(
            told[0],
            ("raised".to_owned(), "failed".to_owned()),
            "{what}"
        );
        let raised = told.iter().filter(|(event, _)| event == "raised");
        assert_eq!(raised.count(), 1, "{what}: {told:?}");
    }
}

/// How long nothing happens, in a campaign.
fn seconds() -> Option<u64> {
    let seconds = std::env::var("KVM_CLONE_DAEMON_SECONDS").ok()?;
    Some(seconds.parse().expect("seconds"))
}

/// What is done the first time only.
fn once(does: impl FnOnce()) -> impl FnMut() {
    let mut does = Some(does);
    move || {
        if let Some(does) = does.take() {
            does();
        }
    }
}

fn start_daemon(shop: &Replication, metrics: &std::path::Path) -> Running {
    let metrics = metrics.to_str().unwrap();
    shop.start_run(&["daemon", "--metrics", metrics])
}

#[test]
fn a_promise_is_kept_and_each_mishap_is_one_alarm_after_which_all_is_as_before() {
    let _alone = alone();
    let Some(mut watched) = Watched::start() else {
        return;
    };
    let seconds = seconds().unwrap_or(25);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut oldest: f64 = 0.0;
    while Instant::now() < end {
        oldest = oldest.max(watched.age().expect("it is measured"));
        assert!(oldest <= RPO, "the newest point is {oldest} s old");
        std::thread::sleep(Duration::from_millis(500));
    }
    println!("{seconds} s: the newest point was never older than {oldest:.0} s");
    assert_eq!(watched.told(), []);
    // What is measured is what there is.
    let points = watched.shop.points("busy");
    let made = watched.measured("points_made_total").unwrap();
    let there = f64::from(u32::try_from(points.len()).unwrap());
    assert!((made - there).abs() <= 1.0, "{made} and {there}");
    let status = watched.shop.run(&["status", "--exit-code"]).expect_json();
    let vm = &status["vms"][0];
    assert_eq!(vm["state"], "kept", "{status}");
    assert_eq!(vm["last_run"]["success"], true, "{status}");
    assert!(vm["next_run"].is_string(), "{status}");

    let b = &watched.shop.site.b;
    let cut = std::env::var("KVM_CLONE_DAEMON_CUT");
    let cut = cut.map_or(5, |seconds| seconds.parse().expect("seconds"));
    watched.suffers(
        "the network is cut",
        once(|| drop(b.run(&["ip", "link", "set", "eth0", "down"]))),
        || {
            std::thread::sleep(Duration::from_secs(cut));
            b.run(&["ip", "link", "set", "eth0", "up"]);
        },
    );
    watched.suffers(
        "processes of the destination are killed",
        || {
            // One that has just done its work is not missed: then the next is struck.
            if b.agents().is_empty() {
                return;
            }
            drop(b.exec(&["pkill", "-KILL", "-f", "kvm-clone/agent-"]));
        },
        || {},
    );
    watched.suffers(
        "the destination is full",
        once(|| {
            drop(b.exec(&[
                "sh",
                "-c",
                "head -c 100G /dev/zero > /var/lib/libvirt/images/full",
            ]));
        }),
        || drop(b.run(&["rm", "/var/lib/libvirt/images/full"])),
    );

    let page = watched.shop.site.controller.home().join("page.html");
    let report = ["report", "--to", page.to_str().unwrap()];
    watched.shop.run(&report).expect_code(0);
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("<b>1</b>promises kept"), "{page}");

    // A daemon that is killed is followed by another one, which tells nobody of what is well.
    let before = watched.told().len();
    watched.daemon.signal(Signal::SIGKILL);
    watched.daemon = start_daemon(&watched.shop, &watched.metrics);
    watched.wait_for_another_point();
    assert_eq!(watched.told().len(), before);

    // It stops in order; no good point was lost, and none is torn.
    watched.daemon.signal(Signal::SIGTERM);
    let Watched { shop, daemon, .. } = watched;
    let stopped = daemon.wait();
    stopped.expect_code(0);
    let after = shop.points("busy");
    assert_eq!(after[..points.len()], points);
    let records: Vec<u64> = after.iter().map(|point| shop.records(point)).collect();
    assert!(records.is_sorted(), "{records:?}");
    println!(
        "{} points, of {:?} to {:?} records",
        after.len(),
        records.first(),
        records.last()
    );
    shop.site.a.assert_tidy();
    shop.site.b.assert_tidy();
}

/// A daemon as systemd starts it, whose hosts cannot be reached.
struct Service {
    directory: tempfile::TempDir,
    socket: UnixDatagram,
    hook: TcpListener,
    /// Where its figures are served.
    figures: SocketAddr,
    child: Child,
}

impl Service {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let socket = UnixDatagram::bind(at("notify")).unwrap();
        let patience = Some(Duration::from_secs(20));
        socket.set_read_timeout(patience).unwrap();
        let hook = TcpListener::bind("127.0.0.1:0").unwrap();
        // What a mail is given to, by the interface that every mail server has.
        let sendmail = format!(
            "#!/bin/sh\necho \"$@\" > {0}\ncat >> {0}\n",
            at("mail").display()
        );
        std::fs::create_dir(at("bin")).unwrap();
        std::fs::write(at("bin/sendmail"), sendmail).unwrap();
        let executable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(at("bin/sendmail"), executable).unwrap();
        let notify = format!(
            "[notify]\ncommand = \"cat > {}\"\nmail = \"root@example.org\"\nwebhook = \"http://{}/a?key=secret\"\n",
            at("command").display(),
            hook.local_addr().unwrap()
        );
        std::fs::write(at("policies.toml"), notify + &policy("10s")).unwrap();
        let controller = Controller::new(at("home"), at("ssh"));
        let mut command = controller.command(&binary());
        command.args(["replicate", "daemon", "--policies"]);
        command.arg(at("policies.toml"));
        // Free just now.
        let figures = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let figures = figures.unwrap();
        command.args(["--listen", &figures.to_string()]);
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", at("bin").display()));
        command.env("NOTIFY_SOCKET", at("notify"));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        Self {
            directory,
            socket,
            hook,
            figures,
            child,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What the webhook gets next: the first line, and the body.
    fn posted(&self) -> (String, Value) {
        let (stream, _) = self.hook.accept().unwrap();
        let mut reader = BufReader::new(stream);
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            match line.trim_end() {
                "" => break,
                line => head.push(line.to_owned()),
            }
        }
        let length = head
            .iter()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.unwrap().parse().unwrap()];
        reader.read_exact(&mut body).unwrap();
        let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
        reader.get_mut().write_all(answer).unwrap();
        (head.remove(0), serde_json::from_slice(&body).unwrap())
    }

    /// Waits until it has told systemd this.
    fn tells(&self, wanted: &str) {
        let mut buffer = [0; 4096];
        loop {
            let read = self.socket.recv(&mut buffer).expect(wanted);
            let said = std::str::from_utf8(&buffer[..read]).unwrap();
            if said.lines().any(|line| line.starts_with(wanted)) {
                return;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).unwrap();
        kill(Pid::from_raw(id), signal).unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It has ended, or the test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn policy(every: &str) -> String {
    format!(
        "[policy.shop]\nsource = \"a.invalid\"\ndestination = \"b.invalid\"\nvms = [\"*\"]\n\
         every = \"{every}\"\nrpo = \"1h\"\n"
    )
}

#[test]
fn systemd_and_people_are_told_what_goes_on() {
    let mut service = Service::start();
    service.tells("READY=1");
    service.tells("WATCHDOG=1");
    // Nothing is known of the VMs of a policy whose hosts do not answer: that is an alarm.
    service.tells("STATUS=0 run, 0 wait, 1 alarms");
    let (line, posted) = service.posted();
    assert_eq!(line, "POST /a?key=secret HTTP/1.1");
    assert_eq!(
        (&posted["event"], &posted["policy"]),
        (&"raised".into(), &"shop".into())
    );
    let read = |name: &str| {
        wait_for(name, PATIENCE, || {
            let text = std::fs::read_to_string(service.path(name)).ok()?;
            text.ends_with(['\n', '}']).then_some(text)
        })
    };
    let by_command: Value = serde_json::from_str(&read("command")).unwrap();
    assert_eq!(by_command, posted);
    let mail = read("mail");
    assert!(
        mail.starts_with("-oi -- root@example.org\nTo: root@example.org\n"),
        "{mail}"
    );
    assert!(
        mail.contains("Subject: [kvm-clone-ctl] shop: failed\n"),
        "{mail}"
    );
    let fetch = |path: &str| {
        let url = format!("http://{}{path}", service.figures);
        tool("curl", ["-s", "-i", &url])
    };
    let figures = fetch("/metrics");
    assert!(figures.starts_with("HTTP/1.1 200 OK\r\n"), "{figures}");
    assert!(
        figures.contains("\r\ncontent-type: application/openmetrics-text;"),
        "{figures}"
    );
    assert!(figures.contains("\nkvm_clone_running 0\n"), "{figures}");
    assert!(fetch("/").starts_with("HTTP/1.1 404 "));
    let policies = service.path("policies.toml");
    for text in [policy("30s"), "no policy".to_owned()] {
        std::fs::write(&policies, text).unwrap();
        service.signal(Signal::SIGHUP);
        service.tells("RELOADING=1");
        service.tells("READY=1");
    }
    service.signal(Signal::SIGTERM);
    service.tells("STOPPING=1");
    assert_eq!(service.child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_units_are_what_systemd_takes() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().join("my home");
    std::fs::create_dir(&home).unwrap();
    let controller = Controller::new(home, directory.path().join("ssh"));
    let units = directory.path().to_str().unwrap();
    for (options, names) in [
        (&[][..], &["kvm-clone-replicate.service"][..]),
        (
            &["--timer"],
            &[
                "kvm-clone-replicate-due.service",
                "kvm-clone-replicate-due.timer",
            ],
        ),
    ] {
        let words = [&["replicate", "systemd", "--directory", units][..], options].concat();
        let run = controller.run_plain(words);
        run.expect_code(0);
        assert!(run.text().contains(names.last().unwrap()), "{run}");
        let mut verify = Command::new("systemd-analyze");
        verify.args(["verify", "--man=no", "--recursive-errors=no"]);
        verify.args(names.iter().map(|name| directory.path().join(name)));
        let said = verify.output().expect("systemd-analyze is there");
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(said.status.success() && text.is_empty(), "{text}");
    }
    let refused = controller.run_plain(["replicate", "systemd", "--user", "no body"]);
    refused.expect_code(2);
}
