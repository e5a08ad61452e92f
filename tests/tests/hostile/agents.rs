//! Hostile agents: what a controller is told, and must not believe.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use kvm_clone_tests::controller::{Controller, Run};
use kvm_clone_tests::hostile::agent;
use kvm_clone_tests::hostile::ground::Ground;
use kvm_clone_tests::hostile::lies::{self, Lie};
use kvm_clone_tests::hostile::watch::Watch;
use kvm_clone_tests::image::MIB;
use tempfile::TempDir;

use super::tell;

/// What a controller may have resident, whatever its agents do.
const MEMORY: u64 = 128 * MIB;

/// What it may say in all: a hundred long warnings, and each of them again in its result.
const MUCH: usize = 1 << 20;

/// A controller, and both agents of its on this machine, which play a story.
struct Stage {
    controller: Controller,
    directory: TempDir,
    source: Ground,
    destination: Ground,
}

impl Stage {
    fn new() -> Self {
        let directory = TempDir::with_prefix("kc-lies-").unwrap();
        let config = directory.path().join("ssh_config");
        fs::write(&config, "").unwrap();
        let controller = Controller::new(directory.path().join("home"), config);
        Self {
            controller,
            directory,
            source: Ground::other(),
            destination: Ground::longer(),
        }
    }

    /// A program that plays the story.
    fn agent(&self, lie: &Lie) -> PathBuf {
        let path = self.directory.path().join("agent");
        let (mask, real) = (env!("CARGO_BIN_EXE_hostile_agent"), agent::binary());
        let real = real.display();
        let script = format!("#!/bin/sh\nexec '{mask}' '{}' '{real}' \"$@\"\n", lie.name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn arguments(&self, lie: &Lie) -> Vec<String> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let disks = [text(&self.source.disk()), text(&self.destination.disk())];
        let (words, disks): (&[&str], &[String]) = match lie.run {
            lies::Run::Sync => (&["disk", "sync", "--apply", "staged"], &disks),
            lies::Run::Relay => (
                &["disk", "sync", "--apply", "staged", "--route", "relay"],
                &disks,
            ),
            lies::Run::Reread => (
                &["disk", "sync", "--apply", "staged", "--verify", "reread"],
                &disks,
            ),
            lies::Run::Verify => (&["disk", "verify"], &disks),
            lies::Run::Recover => (&["recover", "local"], &[]),
        };
        let fixed = ["--agent-path".to_owned(), text(&self.agent(lie))];
        let words = words.iter().map(|&word| word.to_owned());
        fixed
            .into_iter()
            .chain(words)
            .chain(disks.iter().cloned())
            .collect()
    }

    /// Plays it, and claims what must hold of every run.
    fn play(&self, lie: &Lie) -> Run {
        tell(lie.name, lie.run);
        let running = self.controller.start(self.arguments(lie));
        let watch = Watch::start(running.id());
        let run = running.wait();
        let (hung, peak) = watch.stop();
        assert!(!hung, "{run}");
        assert!(peak < MEMORY, "the controller took {peak} bytes: {run}");
        assert_eq!(run.code(), Some(lie.exit), "{run}");
        assert!(run.stderr.contains(lie.says), "{run}");
        assert!(!run.stderr.contains("panicked"), "{run}");
        // What a terminal would do as it is told.
        for said in [&run.stderr, &run.text()] {
            let control = said.chars().find(|c| c.is_control() && *c != '\n');
            assert_eq!(control, None, "{said:?}");
        }
        assert!(
            run.stderr.len() + run.stdout.len() < MUCH,
            "it says too much: {run}"
        );
        self.source.assert_untouched();
        run
    }
}

/// Plays stories, some at once, since each mostly waits; names all that fail.
fn play_all(lies: Vec<Lie>, at_once: usize, play: impl Fn(&Lie) + Sync) {
    let (left, failed) = (Mutex::new(lies.into_iter()), Mutex::new(Vec::new()));
    let next = || left.lock().unwrap().next();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(lie) = next() {
                    if catch_unwind(AssertUnwindSafe(|| play(&lie))).is_err() {
                        failed.lock().unwrap().push(lie.name);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "these failed: {failed:?}");
}

#[test]
fn a_controller_ends_with_the_lie_of_an_agent() {
    play_all(lies::all(), 4, |lie| {
        let stage = Stage::new();
        stage.play(lie);
        // Who says that he has committed may have.
        if !lie.name.starts_with("committed") {
            stage.destination.assert_untouched();
        }
    });
}

#[test]
fn what_an_agent_says_does_not_reach_the_terminal_as_it_is() {
    play_all(lies::harmless(), 4, |lie| drop(Stage::new().play(lie)));
}

#[test]
fn a_controller_notices_an_agent_that_is_silent() {
    play_all(lies::silences(), 16, |lie| {
        let stage = Stage::new();
        let run = stage.play(lie);
        assert!(run.elapsed.as_secs() < 45, "{run}");
        stage.destination.assert_untouched();
    });
}
