//! What a user may say about ssh, and the credentials that the hosts have.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kvm_clone_tests::image::{self, BLOCK, Piece};
use kvm_clone_tests::journey::{Journey, on};
use kvm_clone_tests::lab::Lab;
use kvm_clone_tests::process::{tool, wait_for};

/// A laboratory with a small disk in it, and a path for its copy.
fn lab_with_disk() -> Option<(Lab, PathBuf, PathBuf)> {
    let lab = Lab::start()?;
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 3 * BLOCK)]);
    Some((lab, source, copy))
}

/// Takes the lines that start with a word out of the controller's ssh configuration.
fn forget(lab: &Lab, word: &str) {
    let config = lab.controller.ssh_config();
    let text = fs::read_to_string(config).unwrap();
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with(word));
    fs::write(config, lines.collect::<Vec<_>>().join("\n") + "\n").unwrap();
}

#[test]
fn a_key_and_options_of_the_command_line_reach_ssh() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    forget(&lab, "IdentityFile");
    forget(&lab, "User ");
    let key = lab.controller.home().join(".ssh/id_ed25519");
    let options = ["-i", key.to_str().unwrap(), "--ssh-option", "User=root"];
    lab.sync(Journey::Relay, &source, &copy, &options);
    fs::remove_file(&copy).unwrap();
    lab.sync(Journey::Direct, &source, &copy, &options);
}

#[test]
fn a_host_may_be_given_with_user_and_port() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    let host = format!("root@127.0.0.1:{}", lab.b.port());
    let args = [
        "disk".into(),
        "sync".into(),
        source.clone().into(),
        on(&host, &copy),
    ];
    let result = lab.controller.run(args).expect_json();
    assert_eq!(result["destination"].as_str(), on(&host, &copy).to_str());
    image::assert_equal(&source, &copy);
}

/// An ssh agent that holds the controller's key, until the end of the test.
struct SshAgent(Child);

impl SshAgent {
    fn start(socket: &PathBuf, key: &std::path::Path) -> Self {
        let mut command = Command::new("ssh-agent");
        command
            .arg("-D")
            .arg("-a")
            .arg(socket)
            .stdout(Stdio::null());
        let agent = Self(command.spawn().unwrap());
        wait_for("the socket of ssh-agent", Duration::from_secs(10), || {
            socket.exists().then_some(())
        });
        let socket = format!("SSH_AUTH_SOCK={}", socket.display());
        tool(
            "env",
            [
                socket.as_ref(),
                "ssh-add".as_ref(),
                "-q".as_ref(),
                key.as_os_str(),
            ],
        );
        agent
    }
}

impl Drop for SshAgent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_forwarded_agent_takes_the_source_host_to_the_destination() {
    let Some((mut lab, source, copy)) = lab_with_disk() else {
        return;
    };
    // hvA has no key of its own.
    fs::remove_file(lab.a.home().join(".ssh/id_ed25519")).unwrap();
    let socket = lab.path("agent.socket");
    let _agent = SshAgent::start(&socket, &lab.controller.home().join(".ssh/id_ed25519"));
    lab.controller.use_ssh_agent(socket);

    let run = lab.disk("sync", Journey::Direct, &source, &copy, &[]);
    run.expect_failure(3, &["auth"], "hvB");
    assert!(!copy.exists());
    lab.sync(Journey::Direct, &source, &copy, &["--forward-agent"]);
}

#[test]
fn a_direct_run_needs_no_configuration_and_no_known_hosts_on_the_source_host() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    let ssh = lab.a.home().join(".ssh");
    let files = || {
        let mut names: Vec<_> = fs::read_dir(&ssh)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(files(), ["id_ed25519", "id_ed25519.pub"]);
    lab.sync(Journey::Direct, &source, &copy, &[]);
    assert_eq!(
        files(),
        ["id_ed25519", "id_ed25519.pub"],
        "a direct run left something"
    );
}

#[test]
fn a_route_that_was_asked_for_and_does_not_work_is_an_error_and_not_another_route() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    fs::remove_file(lab.a.home().join(".ssh/id_ed25519")).unwrap();
    let run = lab.disk("sync", Journey::Direct, &source, &copy, &[]);
    run.expect_failure(3, &["auth"], "hvB");
    assert!(!copy.exists());
    lab.sync(Journey::Relay, &source, &copy, &[]);
}
