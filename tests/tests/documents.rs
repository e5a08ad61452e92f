//! The pages for people: each command that they show is run, and each link leads somewhere.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what takes its time"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use kvm_clone_tests::controller::Controller;
use kvm_clone_tests::desk::Desk;
use kvm_clone_tests::hypervisor::SiteSpec;
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::pages::{self, Page, root};

/// The pages that are followed at a desk whose hosts both have XFS.
const COPYING: [&str; 6] = [
    "README.md",
    "SECURITY.md",
    "controller/doc/cloning.md",
    "controller/doc/hosts.md",
    "controller/doc/syncing.md",
    "controller/doc/troubleshooting.md",
];

/// The pages that are followed at one whose source has ext4.
const REPLICATING: [&str; 2] = [
    "controller/doc/failover.md",
    "controller/doc/replication.md",
];

/// Follows pages one after the other, at one desk whose hosts have these file systems; `None` where
/// there can be no desk.
fn follow(kinds: [Kind; 2], names: &[&str]) -> Option<Desk> {
    let spec = SiteSpec {
        kinds,
        ..SiteSpec::default()
    };
    let begun = Instant::now();
    let took = |what: &str| println!("{:.0} s: {what}", begun.elapsed().as_secs_f64());
    let desk = Desk::start(&spec)?;
    took("the desk is set up");
    let only = std::env::var("KVM_CLONE_PAGE").unwrap_or_default();
    for name in names.iter().filter(|name| name.contains(&only)) {
        desk.follow(&pages::read(name), &|told| println!("{told}"));
        took(name);
    }
    Some(desk)
}

#[test]
fn the_pages_on_copying_can_be_followed() {
    follow([Kind::Xfs, Kind::Xfs], &COPYING);
}

#[test]
fn the_pages_on_replication_can_be_followed_and_the_unit_is_what_systemd_takes() {
    let Some(desk) = follow([Kind::Ext4, Kind::Xfs], &REPLICATING) else {
        return;
    };
    let told = desk.systemctl();
    let units = told
        .iter()
        .filter_map(|words| words.strip_prefix("enable --now "));
    let units: Vec<_> = units.map(|unit| desk.unit(unit)).collect();
    if units.is_empty() {
        // Only another page was asked for.
        assert!(std::env::var_os("KVM_CLONE_PAGE").is_some(), "{told:?}");
        return;
    }
    let mut verify = Command::new("systemd-analyze");
    verify.args(["verify", "--man=no", "--recursive-errors=no"]);
    let said = verify
        .args(units)
        .output()
        .expect("systemd-analyze is there");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    // The program is installed at the desk alone.
    let others: Vec<&str> = said
        .lines()
        .filter(|line| !line.contains("kvm-clone-ctl is not executable"))
        .collect();
    assert!(others.is_empty(), "{said}");
}

#[test]
fn no_page_with_commands_is_left_out() {
    let pages = pages::all();
    let to_follow = pages.iter().filter(|page| page.is_to_follow());
    let names: Vec<&str> = to_follow.map(|page| &page.name[..]).collect();
    assert_eq!(names, {
        let mut all = [&COPYING[..], &REPLICATING].concat();
        all.sort_unstable();
        all
    });
}

/// Whether all words of the one are in the other, in that order.
fn has_words(line: &str, words: &str) -> bool {
    let mut line = line.split_whitespace();
    words
        .split_whitespace()
        .all(|word| line.any(|there| there.trim_matches(['`', '\'', '"', ',', '.']) == word))
}

/// A command without the comment at its end.
fn without_comment(command: &str) -> &str {
    command.split(" # ").next().unwrap_or_default().trim()
}

#[test]
fn what_is_run_by_another_file_is_held_by_it() {
    for page in pages::all() {
        for block in &page.blocks {
            let Some((file, form)) = block.run_by() else {
                continue;
            };
            let at = format!("{}:{}", page.name, block.line);
            let held = fs::read_to_string(root().join(file));
            let held = held.unwrap_or_else(|error| panic!("{at}: {file}: {error}"));
            for step in block.steps() {
                let command = without_comment(&step.command.text);
                // It may be that file itself.
                let is_held = command == file
                    || held
                        .lines()
                        .any(|line| has_words(line, form.unwrap_or(command)));
                assert!(is_held, "{at}: {file} does not run {command}");
            }
        }
    }
}

#[test]
fn every_link_leads_somewhere() {
    let pages: BTreeMap<String, Page> = pages::all()
        .into_iter()
        .map(|page| (page.name.clone(), page))
        .collect();
    let (mut seen, mut lost) = (0, Vec::new());
    for page in pages.values() {
        for (line, link) in page.links() {
            if link.contains("://") {
                continue;
            }
            let at = format!("{}:{line}: {link}", page.name);
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => page.name.clone(),
                file => beside(&page.name, file),
            };
            let there = pages.get(&target).map(Page::anchors).unwrap_or_default();
            let is_there = anchor.is_empty() || there.iter().any(|one| one == anchor);
            if !is_there || !root().join(&target).exists() {
                lost.push(at);
            }
            seen += 1;
        }
    }
    assert!(lost.is_empty(), "{lost:#?}");
    assert!(seen > 50, "only {seen} links were found");
}

/// The path of a file that a page names, from the root.
fn beside(page: &str, file: &str) -> String {
    let mut parts: Vec<&str> = Path::new(page)
        .parent()
        .unwrap()
        .iter()
        .map(|part| part.to_str().unwrap())
        .collect();
    for part in file.split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop().unwrap()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The help of a command at any depth, by its words.
struct Helps {
    controller: Controller,
    texts: BTreeMap<Vec<String>, String>,
}

impl Helps {
    fn of(&mut self, words: &[&str]) -> &str {
        let key: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let args = words.iter().chain(&["--help"]);
        let controller = &self.controller;
        self.texts
            .entry(key)
            .or_insert_with(|| controller.run_plain(args).expect_code(0).text())
    }

    /// The words of a command line that name a command.
    fn command<'a>(&mut self, words: &[&'a str]) -> Vec<&'a str> {
        let mut command = Vec::new();
        for word in words {
            let help = self.of(&command);
            let listed = format!("\n  {word} ");
            let commands = help.split("\nOptions:").next().unwrap_or_default();
            if !commands.contains("\nCommands:") || !commands.contains(&listed) {
                break;
            }
            command.push(*word);
        }
        command
    }
}

impl Helps {
    fn new(directory: &Path) -> Self {
        let config = directory.join("ssh_config");
        fs::write(&config, "").unwrap();
        Self {
            controller: Controller::new(directory.join("home"), config),
            texts: BTreeMap::new(),
        }
    }

    /// Those of all commands.
    fn all(&mut self) -> String {
        let mut all = String::new();
        let mut pending: Vec<Vec<String>> = vec![vec![]];
        while let Some(path) = pending.pop() {
            let words: Vec<&str> = path.iter().map(String::as_str).collect();
            let help = self.of(&words).to_owned();
            let commands = help
                .split_once("\nCommands:\n")
                .map_or("", |(_, rest)| rest);
            let commands = commands.lines().take_while(|line| !line.trim().is_empty());
            let names = commands.filter(|line| !line.starts_with("   "));
            let names = names.filter_map(|line| line.split_whitespace().next());
            for name in names.filter(|name| *name != "help") {
                pending.push([path.clone(), vec![name.to_owned()]].concat());
            }
            all += &help;
        }
        all
    }
}

/// Options in the text of pages that are of other programs: of our agent, of virsh, of rsync, and of tar.
const OF_OTHERS: [&str; 9] = [
    "--allow",
    "--dial",
    "--fsync",
    "--ignore-times",
    "--inplace",
    "--read-only",
    "--strip-components",
    "--version",
    "--write-only",
];

#[test]
fn every_option_of_which_a_page_speaks_exists() {
    let directory = tempfile::tempdir().unwrap();
    let help = Helps::new(directory.path()).all();
    let known = |option: &str| OF_OTHERS.contains(&option) || help.contains(option);
    let mut seen = 0;
    for page in pages::all() {
        let of_ours = page.name.starts_with("controller/doc") || !page.name.contains('/');
        let of_others = ["comparison.md", "CONTRIBUTING.md", "ARCHITECTURE.md"];
        if !of_ours || of_others.iter().any(|name| page.name.ends_with(name)) {
            continue;
        }
        for (line, text) in &page.prose {
            let code = text.split('`').skip(1).step_by(2);
            let words = code.flat_map(|code| code.split([' ', '=', '[', ']']));
            for option in words.filter(|word| word.starts_with("--")) {
                assert!(known(option), "{}:{line}: {option}", page.name);
                seen += 1;
            }
        }
    }
    assert!(seen > 100, "the pages speak of {seen} options");
}

#[test]
fn every_command_and_option_in_a_page_exists() {
    let directory = tempfile::tempdir().unwrap();
    let mut helps = Helps::new(directory.path());
    let mut seen = 0;
    for page in pages::all() {
        for step in page.blocks.iter().flat_map(pages::Block::steps) {
            let text = step.command.text.replace("\\\n", " ");
            let words: Vec<&str> = without_comment(&text).split_whitespace().collect();
            let ours = words.iter().position(|word| *word == "kvm-clone-ctl");
            let Some(ours) = ours.filter(|_| words[0] != "cargo" && words[0] != "sudo") else {
                continue;
            };
            let words = &words[ours + 1..];
            let command = helps.command(words);
            assert!(!command.is_empty() || words[0].starts_with('-'), "{text}");
            let help = helps.of(&command);
            for option in words.iter().filter(|word| word.starts_with("--")) {
                let name = option.split('=').next().unwrap();
                assert!(
                    help.contains(name),
                    "{}: {name} of {text:?} is not in {help}",
                    page.name
                );
            }
            seen += 1;
        }
    }
    assert!(seen > 40, "the pages show {seen} commands");
}
