//! The shape of the workspace: who may depend on whom, who may start processes, and that the
//! documents speak of what is there.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use kvm_clone_tests::pages::root;

/// The crates that a member names in its own manifest, `dev-dependencies` apart.
fn dependencies(member: &str) -> BTreeSet<String> {
    let manifest = fs::read_to_string(root().join(member).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    ["dependencies", "build-dependencies"]
        .iter()
        .filter_map(|section| manifest.get(*section)?.as_table())
        .flat_map(|section| section.keys().cloned())
        .collect()
}

/// The Rust files of a member's `src`.
fn sources(member: &str) -> Vec<PathBuf> {
    let mut pending = vec![root().join(member).join("src")];
    let mut found = Vec::new();
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            pending.extend(
                fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    assert!(!found.is_empty(), "{member} has sources");
    found
}

/// The code of a file: without comments, and without the tests at its end.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let code = text
        .split("#[cfg(test)]\nmod tests")
        .next()
        .unwrap_or_default();
    code.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .fold(String::new(), |mut all, line| {
            all.push_str(line);
            all.push('\n');
            all
        })
}

/// The files of a member that hold one of the words, relative to its `src`.
fn files_with(member: &str, words: &[&str]) -> BTreeSet<String> {
    let base = root().join(member).join("src");
    let holds = |path: &PathBuf| words.iter().any(|word| code(path).contains(word));
    let name = |path: PathBuf| {
        path.strip_prefix(&base)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    sources(member)
        .into_iter()
        .filter(holds)
        .map(name)
        .collect()
}

#[test]
fn agent_and_controller_depend_on_the_protocol_and_not_on_each_other() {
    let ours = |member| -> Vec<String> {
        dependencies(member)
            .into_iter()
            .filter(|name| name.starts_with("kvm-clone"))
            .collect()
    };
    assert_eq!(ours("protocol"), Vec::<String>::new());
    assert_eq!(ours("agent"), ["kvm-clone-protocol"]);
    assert_eq!(ours("controller"), ["kvm-clone-protocol"]);
    for outside in ["tests", "bench"] {
        let forbidden = ["kvm-clone-agent", "kvm-clone-ctl"];
        assert!(
            ours(outside)
                .iter()
                .all(|name| !forbidden.contains(&name.as_str())),
            "{outside}"
        );
    }
}

#[test]
fn the_protocol_does_no_io_and_reads_no_clock() {
    let allowed = [
        "blake3",
        "bytes",
        "postcard",
        "serde",
        "thiserror",
        "tokio-util",
        "xxhash-rust",
    ];
    let named = dependencies("protocol");
    let foreign: Vec<_> = named
        .iter()
        .filter(|name| !allowed.contains(&name.as_str()))
        .collect();
    assert!(foreign.is_empty(), "protocol depends on {foreign:?}");

    let manifest = fs::read_to_string(root().join("protocol/Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    let optional = manifest["dependencies"]["tokio-util"]["optional"].as_bool();
    assert_eq!(
        optional,
        Some(true),
        "tokio-util brings tokio, so it is a feature"
    );
    let default = manifest["features"].get("default");
    assert!(default.is_none_or(|list| list.as_array().is_some_and(Vec::is_empty)));

    let io = [
        "std::fs",
        "std::net",
        "std::process",
        "std::io::std",
        "Instant::now",
        "SystemTime",
    ];
    assert_eq!(files_with("protocol", &io), BTreeSet::new());
}

#[test]
fn only_the_modules_for_hosts_start_processes_in_the_controller() {
    let starters = files_with("controller", &["Command::new"]);
    let elsewhere: Vec<_> = starters
        .iter()
        .filter(|file| !file.starts_with("host/"))
        .collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?} start processes");
    assert!(!starters.is_empty(), "something starts ssh");
}

#[test]
fn one_function_quotes_for_the_remote_shell() {
    let quoting = files_with("controller", &["shlex"]);
    assert_eq!(quoting, BTreeSet::from(["host/quote.rs".to_owned()]));
}

#[test]
fn unsafe_code_is_forbidden_outside_of_the_agent() {
    for (member, file) in [
        ("protocol", "lib.rs"),
        ("controller", "lib.rs"),
        ("bench", "main.rs"),
        ("tests", "lib.rs"),
    ] {
        let text = fs::read_to_string(root().join(member).join("src").join(file)).unwrap();
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{member}/src/{file}"
        );
    }
    // File handles that come from elsewhere, and system calls on disks and of priority that nix does
    // not wrap.
    let in_agent = files_with("agent", &["unsafe {", "unsafe fn", "unsafe impl"]);
    let expected = |file: &&String| {
        let others = ["channel.rs", "link.rs", "priority.rs"];
        file.starts_with("disk/") || others.contains(&file.as_str())
    };
    assert!(in_agent.iter().all(|file| expected(&file)), "{in_agent:?}");
}

#[test]
fn only_what_is_confined_hands_the_paths_of_disks_to_the_kernel() {
    let calls = [
        "OpenOptions::new",
        "fs::metadata",
        "fs::symlink_metadata",
        "path.symlink_metadata",
        "fs::canonicalize",
        "path.canonicalize",
        "fs::rename",
        "fs::remove_file",
        "fs::hard_link",
        "renameat2(",
        "linkat(",
    ];
    let expected = [
        "disk/confinement.rs",
        // A descriptor of its own, by its number.
        "disk/direct.rs",
        "disk/file.rs",
        "disk/mod.rs",
        "disk/names.rs",
        // What the others go through.
        "disk/root.rs",
    ];
    let mut found = files_with("agent", &calls);
    // Tests alone.
    found.remove("disk/stories.rs");
    assert_eq!(found, expected.map(str::to_owned).into());
}

#[test]
fn every_module_says_what_it_owns() {
    for member in ["protocol", "agent", "controller", "bench", "tests"] {
        for path in sources(member) {
            let text = fs::read_to_string(&path).unwrap();
            assert!(
                text.starts_with("//! "),
                "{} has no module comment",
                path.display()
            );
        }
    }
}

#[test]
fn tests_are_neither_ignored_nor_expected_to_panic() {
    let forbidden = [["#[", "ignore"].concat(), ["#[", "should_panic"].concat()];
    for member in ["protocol", "agent", "controller", "bench", "tests"] {
        let mut directories = vec![root().join(member)];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else if path.extension().is_some_and(|extension| extension == "rs") {
                    let text = fs::read_to_string(&path).unwrap();
                    let found = forbidden.iter().find(|word| text.contains(word.as_str()));
                    assert_eq!(found, None, "{}", path.display());
                }
            }
        }
    }
}

#[test]
fn the_programs_and_paths_that_the_readme_names_exist() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let commands: Vec<_> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("$ "))
        .collect();
    assert!(
        commands
            .iter()
            .any(|line| line.starts_with("cargo run --release")),
        "{commands:?}"
    );
    assert!(commands.contains(&"tests/run"), "{commands:?}");
    for word in commands.iter().flat_map(|line| line.split_whitespace()) {
        let is_ours = ["tests/", "bench/", ".ci/", "./"]
            .iter()
            .any(|at| word.starts_with(at));
        assert!(
            !is_ours || root().join(word).exists(),
            "the README names {word}"
        );
    }
}
