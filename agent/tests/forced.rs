//! The agent as authorized_keys starts it: what it makes of its options and of what was asked for.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not see as such"
)]

use std::fs;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Command, Output, Stdio};

/// What sshd sets to what a login asked for.
const ASKED: &str = "SSH_ORIGINAL_COMMAND";

/// A token that nobody has given away.
const TOKEN: &[u8] = b"00112233445566778899aabbccddeeff\n";

/// Runs the agent with this input to its end.
fn run(args: &[&str], asked: Option<&str>, input: &[u8]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvm-clone-agent"));
    command.args(args).env_remove(ASKED);
    command.envs(asked.map(|asked| (ASKED, asked)));
    feed(command, input)
}

fn feed(mut command: Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end without reading.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Whether it began to speak as one that serves: with a preamble.
fn served(output: &Output) -> bool {
    output.stdout.starts_with(b"\x89KVC\r\n")
}

#[test]
fn options_that_make_no_sense_are_told_with_the_usage() {
    for args in [
        &["serve", "--read-only", "--write-only"][..],
        &["serve", "--allow"],
        &["serve", "/srv"],
        &["attach", "a", "b"],
        &["attach", "--allow", "/srv"],
    ] {
        let output = run(args, None, b"");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let stderr = stderr(&output);
        assert!(stderr.contains("serve [--allow PATH]..."), "{stderr}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_path_that_confines_nothing_keeps_the_agent_from_starting() {
    for (path, why) in [
        ("images", "not an absolute path"),
        ("/no/such/directory/disk", "No such file"),
    ] {
        let output = run(&["serve", "--allow", path], None, b"");
        let stderr = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(path) && stderr.contains(why), "{stderr}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn who_is_confined_gets_the_data_connection_that_was_asked_for() {
    let asked = "exec kvm-clone-agent attach 0123abc";
    for args in [
        &["attach"][..],
        &["serve", "--allow", "/tmp"],
        &["serve", "--read-only"],
        &["serve", "--write-only", "--dial"],
    ] {
        let output = run(args, Some(asked), TOKEN);
        let stderr = stderr(&output);
        assert!(stderr.contains("Connection refused"), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty());
    }
    assert!(served(&run(&["serve"], Some(asked), b"")));
}

#[test]
fn anything_else_that_was_asked_for_is_not_done() {
    let directory = tempfile::tempdir().unwrap();
    let made = directory.path().join("made");
    let touch = format!("touch {}", made.display());
    for asked in [
        &touch,
        "attach",
        "attach a;b",
        "attach -x",
        "sh -c attach",
        "",
    ] {
        let output = run(&["attach"], Some(asked), TOKEN);
        let stderr = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{asked}: {stderr}");
        assert!(stderr.contains("none was asked for"), "{asked}: {stderr}");
        assert!(output.stdout.is_empty());
        let output = run(&["serve", "--allow", "/tmp"], Some(asked), b"");
        assert!(served(&output), "{asked}");
    }
    assert!(!made.exists());
}

#[test]
fn a_token_is_not_shown_to_another_user_who_has_taken_the_name() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: to be two users needs root");
        return;
    }
    let name = format!("taken{}", std::process::id());
    let address = SocketAddr::from_abstract_name(format!("kvm-clone-{name}")).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    // Where nobody may go as well.
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(directory.path(), open).unwrap();
    let agent = directory.path().join("agent");
    // By another process, so that no test that forks meanwhile keeps it open for writing.
    let mut copy = Command::new("cp");
    copy.arg(env!("CARGO_BIN_EXE_kvm-clone-agent")).arg(&agent);
    assert!(copy.status().unwrap().success());

    let received = std::thread::spawn(move || {
        let mut received = [0; 16];
        let (mut stream, _) = listener.accept().unwrap();
        let n = stream.read(&mut received).unwrap();
        received[..n].to_vec()
    });
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    command.arg(&agent).args(["attach", &name]);
    let output = feed(command, TOKEN);
    let stderr = stderr(&output);
    assert!(stderr.contains("another user's"), "{stderr}");
    assert_eq!(received.join().unwrap(), b"");
}
