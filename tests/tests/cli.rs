//! The command line itself: what it offers, what it refuses, and with which exit code.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kvm_clone_tests::controller::{Controller, Run};
use tempfile::TempDir;

/// What is there. A command that does not exist yet is not listed, even if it is promised.
const COMMANDS: [&str; 14] = [
    "agent",
    "clone",
    "completions",
    "config",
    "demo",
    "disk",
    "doctor",
    "history",
    "list",
    "man",
    "recover",
    "replicate",
    "sync",
    "verify",
];

/// A controller that knows no hosts; needs no root.
fn controller() -> (Controller, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("ssh_config");
    std::fs::write(&config, "").unwrap();
    (
        Controller::new(directory.path().join("home"), config),
        directory,
    )
}

fn run(args: &[&str]) -> Run {
    controller().0.run_plain(args)
}

/// The commands that a help text lists.
fn listed(help: &str) -> Vec<String> {
    let after = help.split_once("Commands:\n").map_or("", |(_, rest)| rest);
    let lines = after.lines().take_while(|line| !line.trim().is_empty());
    let mut names: Vec<_> = lines
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

#[test]
fn help_lists_the_commands_that_exist_and_no_others() {
    let help = run(&["--help"]).expect_code(0).text();
    assert_eq!(listed(&help), COMMANDS, "{help}");
}

#[test]
fn every_command_at_every_depth_explains_itself() {
    let mut pending: Vec<Vec<String>> = vec![vec![]];
    let mut seen = 0;
    while let Some(path) = pending.pop() {
        let args: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let help = run(&args).expect_code(0).text();
        assert!(help.contains("Usage: kvm-clone-ctl"), "{help}");
        seen += 1;
        pending.extend(
            listed(&help)
                .into_iter()
                .map(|name| [path.clone(), vec![name]].concat()),
        );
    }
    // The program, its commands, and those below disk, agent and config.
    assert!(
        seen >= 1 + COMMANDS.len() + 10,
        "only {seen} commands were found"
    );
}

#[test]
fn the_transfer_options_of_a_disk_sync_are_all_explained() {
    let help = run(&["disk", "sync", "--help"]).expect_code(0).text();
    for option in [
        "--method",
        "--bandwidth-limit",
        "--compress",
        "--route",
        "--hash",
        "--timeout",
        "--dry-run",
        "--output",
        "--ssh-config",
        "--ssh-key",
        "--ssh-option",
        "--sudo",
        "--agent-path",
        "--forward-agent",
        "--log-format",
        "--no-progress",
        "--config",
    ] {
        assert!(help.contains(option), "{option} is not in {help}");
    }
}

#[test]
fn the_version_is_the_workspaces() {
    let own = format!("kvm-clone-ctl {}", env!("CARGO_PKG_VERSION"));
    assert_eq!(run(&["-V"]).expect_code(0).text().trim(), own);
    let long = run(&["--version"]).expect_code(0).text();
    let lines: Vec<&str> = long.lines().collect();
    let [release, protocol, agents] = lines[..] else {
        panic!("{long}");
    };
    assert_eq!((release, protocol), (&own[..], "protocol 2 to 3"));
    let ours = format!("agents {} ", std::env::consts::ARCH);
    assert!(agents.starts_with(&ours), "{long}");
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_is_wrong() {
    let sync = ["disk", "sync", "/a", "/b"];
    let cases: [(&[&str], &str); 14] = [
        (&[], "Usage"),
        (&["no-such-command"], "no-such-command"),
        (&["disk"], "Usage"),
        (&["disk", "sync", "/a"], "DST"),
        (&["disk", "sync", "a", "/b"], "a"),
        (&["disk", "sync", "hvA:a", "/b"], "hvA:a"),
        (
            &[&sync[..], &["--bandwidth-limit", "fast"]].concat(),
            "fast",
        ),
        (&[&sync[..], &["--bandwidth-limit", "0"]].concat(), "0"),
        (&[&sync[..], &["--compress", "20"]].concat(), "20"),
        (&[&sync[..], &["--route", "scenic"]].concat(), "scenic"),
        (&[&sync[..], &["--hash", "md5"]].concat(), "md5"),
        (&[&sync[..], &["--timeout", "soon"]].concat(), "soon"),
        (
            &[&sync[..], &["--method", "carrier-pigeon"]].concat(),
            "carrier-pigeon",
        ),
        (&[&sync[..], &["-o", "xml"]].concat(), "xml"),
    ];
    for (args, names) in cases {
        let run = run(args);
        run.expect_code(2);
        assert!(
            run.stderr.contains(names),
            "{names:?} is not named by {run}"
        );
        assert!(run.stdout.is_empty(), "{run}");
    }
}

#[test]
fn a_host_that_looks_like_an_option_is_never_handed_to_ssh() {
    let (controller, directory) = controller();
    let witness = directory.path().join("witness");
    let host = format!("-oProxyCommand=touch {}", witness.display());
    let run = controller.run_plain(["disk", "sync", "/etc/hostname", &format!("{host}:/x")]);
    run.expect_code(2);
    for args in [["doctor", "--", &host], ["agent", "status", &host]] {
        controller.run_plain(args).expect_code(2);
    }
    assert!(!witness.exists());
}

#[test]
fn completions_and_the_manual_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]).expect_code(0).text();
        assert!(script.contains("kvm-clone-ctl"), "{shell}: {script}");
    }
    let page = run(&["man"]).expect_code(0).text();
    assert!(
        page.starts_with(".ie") || page.contains(".TH kvm-clone-ctl"),
        "{page}"
    );
}

#[test]
fn the_manual_has_a_page_for_each_command() {
    let (controller, directory) = controller();
    let pages = directory.path().join("man1");
    let write = || controller.run_plain(["man", "--directory", pages.to_str().unwrap()]);
    write().expect_code(1);
    std::fs::create_dir(&pages).unwrap();
    write().expect_code(0);
    for command in COMMANDS {
        let page = pages.join(format!("kvm-clone-ctl-{command}.1"));
        let page = std::fs::read_to_string(page).unwrap();
        assert!(
            page.contains(&format!(".TH kvm-clone-ctl-{command} 1")),
            "{page}"
        );
    }
    for page in ["kvm-clone-ctl.1", "kvm-clone-ctl-replicate-run.1"] {
        assert!(pages.join(page).is_file(), "{page}");
    }
    let args = ["man", "--directory", "/tmp", "disk", "sync"];
    controller.run_plain(args).expect_code(2);
}

#[test]
fn a_setting_is_kept_shown_and_taken_back() {
    let (controller, _directory) = controller();
    controller.run_plain(["config", "init"]).expect_code(0);
    let shown = || {
        controller
            .run_plain(["config", "show"])
            .expect_code(0)
            .text()
    };
    let before = shown();
    controller
        .run_plain(["config", "set", "compress", "3"])
        .expect_code(0);
    assert_ne!(shown(), before);
    controller
        .run_plain(["config", "unset", "compress"])
        .expect_code(0);
    assert_eq!(shown(), before);
}

#[test]
fn a_setting_that_does_not_exist_and_a_value_that_makes_no_sense_are_wrong_usage() {
    let (controller, _directory) = controller();
    for args in [["set", "no_such_setting", "1"], ["set", "compress", "very"]] {
        let run = controller.run_plain(["config"].iter().chain(&args));
        run.expect_code(2);
        assert!(run.stderr.contains(args[1]), "{run}");
    }
}

#[test]
fn a_setting_is_what_a_run_takes_when_nothing_is_said() {
    let (controller, directory) = controller();
    let (source, copy) = (
        directory.path().join("source"),
        directory.path().join("copy"),
    );
    let zeros_and_ones = [0, 0, 0, 0, 0, 0, 0, 1].repeat(100_000);
    std::fs::write(&source, &zeros_and_ones).unwrap();
    let wire = || {
        let _ = std::fs::remove_file(&copy);
        let args = [
            "disk".as_ref(),
            "sync".as_ref(),
            source.as_os_str(),
            copy.as_os_str(),
        ];
        controller.run(args).expect_json()["bytes_wire"]
            .as_u64()
            .unwrap()
    };
    controller
        .run_plain(["config", "set", "compress", "off"])
        .expect_code(0);
    assert!(wire() >= 800_000);
    controller
        .run_plain(["config", "set", "compress", "19"])
        .expect_code(0);
    assert!(wire() < 80_000);
}
