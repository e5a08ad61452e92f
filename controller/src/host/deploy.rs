//! Getting the agent onto a host and started there.
//!
//! In the good case one ssh command finds the agent in a cache directory of the user's own and
//! becomes it. Otherwise that command waits while the agent is sent over a further channel: into
//! a temporary name, back again to be compared here byte by byte, then renamed into place. Two
//! controllers that do so at once use two temporary names, and either rename is right.
//!
//! An agent that does not start, or states another digest than ours, is sent again once.

use std::os::unix::ffi::OsStrExt as _;

use super::agent::{AgentConnection, StartFailure};
use super::facts::seconds_now;
use super::install::DEFAULT_INSTALL_PATH;
use super::script::Findable;
use super::session::{Greeting, Session};
use super::{AgentPath, Host, find, line_after, lines_after, script};
use crate::agent_binary::{self, Agent};
use crate::error::{Error, ErrorCode, Result};

/// Which agent has to be at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// The one that this program carries, byte by byte.
    Ours,
    /// Any that speaks our protocol: the user, or root, put it there.
    Any,
}

impl Expected {
    /// What a search of ours may find.
    fn of(path: &AgentPath) -> Self {
        match path {
            AgentPath::Forced => Self::Any,
            AgentPath::Direct(_) | AgentPath::Sudo(_) => Self::Ours,
        }
    }
}

/// Which agents [`Host::remove_agents`] removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unwanted {
    /// All, and every upload, broken or under way.
    All,
    /// All but the one that this program carries, and uploads that are broken.
    Old,
}

/// What [`Host::remove_agents`] did.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Removed {
    /// Files that are gone.
    pub removed: Vec<String>,
    /// Files that could not be removed.
    pub kept: Vec<String>,
}

impl Host {
    /// Opens the control connection, with the agent deployed and started, and its hello checked.
    /// Independent of every other host, so that several can be opened side by side.
    ///
    /// # Errors
    /// Whatever keeps an agent from running there, with what to do about it.
    pub async fn start_agent(&self) -> Result<AgentConnection> {
        if let Some(script) = self.fixed_agent()? {
            return self.start_fixed(&script).await;
        }
        match self.start_from_cache(true).await {
            Ok(connection) => Ok(connection),
            Err(StartFailure::Host(error)) => Err(error),
            Err(StartFailure::Agent(error)) => {
                tracing::warn!(host = %self, "{}; sending it again", error.one_line());
                self.start_from_cache(false)
                    .await
                    .map_err(StartFailure::into_error)
            }
        }
    }

    /// As [`Host::start_agent`], but where the agent is not on the host yet, it stays away and
    /// the answer is `None`.
    ///
    /// # Errors
    /// As [`Host::start_agent`]; also for an agent that is there and does not work.
    pub async fn find_agent(&self) -> Result<Option<AgentConnection>> {
        if let Some(script) = self.fixed_agent()? {
            return self.start_fixed(&script).await.map(Some);
        }
        let mut session = Session::open(self, &self.start_script(true)).await?;
        match session.greeting().await? {
            Greeting::Need(_) => Ok(None),
            Greeting::At(path) => {
                let expected = Expected::of(&path);
                AgentConnection::establish(session, path, expected, false)
                    .await
                    .map(Some)
                    .map_err(StartFailure::into_error)
            }
        }
    }

    /// The script for an agent that somebody else put there.
    fn fixed_agent(&self) -> Result<Option<String>> {
        let options = self.options();
        let path = options
            .agent_path
            .as_deref()
            .map(|path| path.as_os_str().as_bytes());
        if path.is_some_and(|path| !path.starts_with(b"/")) {
            return Err(Error::usage("--agent-path is not an absolute path"));
        }
        match (options.sudo, path) {
            (true, path) => {
                script::start_as_root(path.unwrap_or(DEFAULT_INSTALL_PATH.as_bytes())).map(Some)
            }
            (false, Some(path)) => script::start_given(path).map(Some),
            (false, None) => Ok(None),
        }
    }

    async fn start_fixed(&self, script: &str) -> Result<AgentConnection> {
        let mut session = Session::open(self, script).await?;
        match session.greeting().await? {
            Greeting::At(path) => AgentConnection::establish(session, path, Expected::Any, false)
                .await
                .map_err(StartFailure::into_error),
            Greeting::Need(_) => Err(Error::new(
                ErrorCode::Internal,
                "a script asks for what it was given",
            )),
        }
    }

    async fn start_from_cache(&self, search: bool) -> Result<AgentConnection, StartFailure> {
        let opened = async {
            let mut session = Session::open(self, &self.start_script(search)).await?;
            match session.greeting().await? {
                Greeting::At(path) => Ok((session, path, false)),
                Greeting::Need(machine) => {
                    let agent = agent_binary::for_machine(&self.to_string(), &machine)?;
                    let path = self.send(agent).await?;
                    session.start(&path).await?;
                    Ok((session, AgentPath::Direct(path), true))
                }
            }
        };
        let (session, path, copied) = opened.await.map_err(StartFailure::Host)?;
        let expected = Expected::of(&path);
        AgentConnection::establish(session, path, expected, copied)
            .await
            .map_err(|failure| match expected {
                Expected::Ours => failure,
                // No copy of ours would be run instead.
                Expected::Any => StartFailure::Host(failure.into_error()),
            })
    }

    fn start_script(&self, search: bool) -> String {
        let agents: Vec<Findable> = agent_binary::for_all().iter().map(findable).collect();
        script::start(&agents, search)
    }

    /// Puts the agent into the first cache directory that takes it. Gives back its path.
    async fn send(&self, ours: &Agent) -> Result<Vec<u8>> {
        let agent = ours.bytes()?;
        let mut tried = Vec::new();
        let mut from = 1;
        while from <= script::CANDIDATES {
            let upload = script::upload(&temporary_name(), agent.len(), from);
            let output = self.run(&upload, agent, agent.len() + MAX_CHATTER).await?;
            tried.extend(lines_after(&output.stdout, script::TRIED));
            let Some((number, temporary)) =
                line_after(&output.stdout, script::TEMPORARY).and_then(parse_temporary)
            else {
                break;
            };
            let Some(at) = find(&output.stdout, script::BACK) else {
                // No room there: the next candidate may be on another file system.
                from = number + 1;
                continue;
            };
            if output.stdout[at + script::BACK.len()..] != *agent {
                let _ = self
                    .run(&script::discard(temporary)?, b"", MAX_CHATTER)
                    .await;
                return Err(damaged(self, temporary));
            }
            return self.place(ours, temporary).await;
        }
        Err(nowhere(self, &tried))
    }

    async fn place(&self, agent: &Agent, temporary: &[u8]) -> Result<Vec<u8>> {
        let directory = temporary
            .iter()
            .rposition(|byte| *byte == b'/')
            .unwrap_or_default();
        let path = [&temporary[..=directory], agent.file_name().as_bytes()].concat();
        let output = self
            .run(&script::place(temporary, &path)?, b"", MAX_CHATTER)
            .await?;
        if find(&output.stdout, script::DONE).is_none() {
            return Err(Error::new(
                ErrorCode::Io,
                format!(
                    "cannot put the agent in place on {self} as {}",
                    String::from_utf8_lossy(&path)
                ),
            )
            .caused_by(output.stderr.trim().to_owned()));
        }
        tracing::info!(host = %self, path = %String::from_utf8_lossy(&path), "the agent was copied");
        Ok(path)
    }

    /// Removes agents of ours from the host's cache directories.
    ///
    /// # Errors
    /// When the host cannot be reached, or runs no shell.
    pub async fn remove_agents(&self, which: Unwanted) -> Result<Removed> {
        let ours = agent_binary::for_all();
        let names: Vec<String> = ours.iter().map(|agent| agent.file_name()).collect();
        let script = script::remove(match which {
            Unwanted::All => None,
            Unwanted::Old => Some(script::Spared {
                agents: &names,
                uploads_after: seconds_now() - UPLOAD_SECONDS,
            }),
        });
        let output = self.run(&script, b"", MAX_LISTING).await?;
        if find(&output.stdout, script::DONE).is_none() {
            return Err(self.runs_no_script(&output));
        }
        Ok(Removed {
            removed: lines_after(&output.stdout, script::REMOVED),
            kept: lines_after(&output.stdout, script::KEPT),
        })
    }
}

/// What a login shell may print ahead of what a script says.
pub(super) const MAX_CHATTER: usize = 128 * 1024;

/// A list of files that were removed; there are never many.
const MAX_LISTING: usize = 1024 * 1024;

/// An upload that is older than this is broken: it takes a second on a good line. Nothing that is
/// on every host tells how old a file is, so its name does, by our clock; clocks differ by less.
const UPLOAD_SECONDS: i64 = 3600;

/// What a search for an agent is told.
fn findable(agent: &&'static Agent) -> Findable {
    Findable {
        machines: agent.machines(),
        name: agent.file_name(),
        size: agent.size(),
    }
}

/// A name that no other upload has, and nobody can guess.
pub(super) fn temporary_name() -> String {
    format!(".agent.{}.{}", seconds_now(), uuid::Uuid::new_v4().simple())
}

fn parse_temporary(line: &[u8]) -> Option<(usize, &[u8])> {
    let space = line.iter().position(|byte| *byte == b' ')?;
    let number = std::str::from_utf8(&line[..space]).ok()?.parse().ok()?;
    Some((number, &line[space + 1..]))
}

pub(super) fn damaged(host: &Host, path: &[u8]) -> Error {
    Error::new(
        ErrorCode::Io,
        format!(
            "what was sent to {host} as {} came back as something else",
            String::from_utf8_lossy(path)
        ),
    )
    .hint("the host's file system or its shell changes bytes: run \"kvm-clone-ctl doctor\" on it")
}

fn nowhere(host: &Host, tried: &[String]) -> Error {
    let error = Error::new(ErrorCode::MissingRequirement, format!("no directory on {host} takes the agent"))
        .hint(
            "give the user a directory that is not mounted noexec (XDG_CACHE_HOME on the host), or put the \
             agent somewhere yourself and name it with --agent-path",
        );
    if tried.is_empty() {
        error
    } else {
        error.caused_by(tried.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output, Stdio};

    /// Stands for the agent: says how it was called.
    const AGENT: &[u8] = b"#!/bin/sh\necho \"started $*\"\n";

    const NAME: &str = "agent-0.1.0-0123456789abcdef";

    fn stand_in() -> Findable {
        Findable {
            machines: vec!["riscv64", std::env::consts::ARCH],
            name: NAME.to_owned(),
            size: AGENT.len(),
        }
    }

    /// A host's user: a home directory, in which the scripts run under real shells.
    struct User {
        home: tempfile::TempDir,
        shell: &'static str,
    }

    impl User {
        fn new(shell: &'static str) -> Self {
            Self {
                home: tempfile::tempdir().unwrap(),
                shell,
            }
        }

        fn cache(&self) -> PathBuf {
            self.home.path().join("a cache")
        }

        fn agent(&self) -> PathBuf {
            self.cache().join("kvm-clone").join(NAME)
        }

        fn run(&self, script: &str, input: &[u8]) -> Output {
            let mut child = Command::new(self.shell)
                .args(["-c", script])
                .env("XDG_CACHE_HOME", self.cache())
                .env("HOME", self.home.path())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut stdin = child.stdin.take().unwrap();
            // A script that does not read its input closes it.
            let _ = stdin.write_all(input);
            drop(stdin);
            child.wait_with_output().unwrap()
        }

        fn start(&self) -> Vec<u8> {
            self.run(&script::start(&[stand_in()], true), b"").stdout
        }

        /// The names of the files below its home of which a removal speaks, sorted.
        fn remove(&self, spared: Option<script::Spared<'_>>, marker: &[u8]) -> Vec<String> {
            let output = self.run(&script::remove(spared), b"").stdout;
            assert!(find(&output, script::DONE).is_some());
            let paths = lines_after(&output, marker).into_iter().map(PathBuf::from);
            let mut names: Vec<_> = paths
                .filter(|path| path.starts_with(self.home.path()))
                .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
                .collect();
            names.sort();
            names
        }

        fn deploy(&self) {
            let output = self.run(&script::upload(".agent.1", AGENT.len(), 1), AGENT);
            let (number, temporary) = line_after(&output.stdout, script::TEMPORARY)
                .and_then(parse_temporary)
                .unwrap();
            assert_eq!(number, 1);
            let back = find(&output.stdout, script::BACK).unwrap() + script::BACK.len();
            assert_eq!(&output.stdout[back..], AGENT);
            let path = self.agent();
            let place = script::place(temporary, path.as_os_str().as_bytes()).unwrap();
            assert!(find(&self.run(&place, b"").stdout, script::DONE).is_some());
        }
    }

    fn shells() -> impl Iterator<Item = User> {
        ["dash", "bash"].into_iter().map(User::new)
    }

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    #[test]
    fn an_agent_is_asked_for_sent_placed_and_found() {
        for user in shells() {
            let asked = user.start();
            assert_eq!(
                line_after(&asked, script::NEED),
                Some(std::env::consts::ARCH.as_bytes())
            );
            user.deploy();
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(&user.agent()), 0o700);
            assert_eq!(mode(user.agent().parent().unwrap()), 0o700);
            let found = user.start();
            let expected = [b"direct ", user.agent().as_os_str().as_bytes()].concat();
            assert_eq!(line_after(&found, script::AT), Some(&expected[..]));
            assert!(
                found.ends_with(b"\nstarted serve\n"),
                "{}",
                found.escape_ascii()
            );
        }
    }

    #[test]
    fn a_waiting_script_starts_what_it_is_told() {
        for user in shells() {
            user.deploy();
            let told = [user.agent().as_os_str().as_bytes(), b"\nrest"].concat();
            let output = user.run(&script::start(&[stand_in()], false), &told).stdout;
            assert!(
                output.ends_with(b"\nstarted serve\n"),
                "{}",
                output.escape_ascii()
            );
            let unheard = user.run(&script::start(&[stand_in()], false), b"");
            assert!(
                !unheard.status.success(),
                "a controller that went away starts nothing"
            );
        }
    }

    #[test]
    fn an_agent_that_others_could_have_made_is_not_started() {
        type Spoil = fn(&User);
        let spoils: [(&str, Spoil); 10] = [
            ("size", |user| {
                std::fs::write(user.agent(), b"#!/bin/sh\n").unwrap();
            }),
            ("mode", |user| set_mode(&user.agent(), 0o755)),
            ("directory's mode", |user| {
                set_mode(user.agent().parent().unwrap(), 0o770);
            }),
            ("link", |user| {
                let moved = user.cache().join("elsewhere");
                std::fs::rename(user.agent(), &moved).unwrap();
                symlink(&moved, user.agent()).unwrap();
            }),
            ("directory is a link", |user| {
                let moved = user.cache().join("elsewhere");
                std::fs::rename(user.agent().parent().unwrap(), &moved).unwrap();
                symlink(&moved, user.agent().parent().unwrap()).unwrap();
            }),
            ("second name", |user| {
                std::fs::hard_link(user.agent(), user.cache().join("elsewhere")).unwrap();
            }),
            ("cache is the group's", |user| {
                set_mode(&user.cache(), 0o770);
            }),
            ("cache is everybody's", |user| {
                set_mode(&user.cache(), 0o707);
            }),
            ("home is the group's", |user| {
                set_mode(user.home.path(), 0o770);
            }),
            ("gone", |user| std::fs::remove_file(user.agent()).unwrap()),
        ];
        for (what, spoil) in spoils {
            for user in shells() {
                user.deploy();
                spoil(&user);
                let output = user.start();
                assert!(
                    line_after(&output, script::NEED).is_some(),
                    "{what}: {}",
                    output.escape_ascii()
                );
            }
        }
    }

    #[test]
    fn a_cache_behind_the_users_own_link_does_and_is_called_by_its_real_name() {
        for user in shells() {
            user.deploy();
            let real = user.home.path().join("scratch");
            std::fs::rename(user.cache(), &real).unwrap();
            symlink(&real, user.cache()).unwrap();
            let output = user.start();
            let expected = [b"direct ", real.as_os_str().as_bytes()].concat();
            let found = line_after(&output, script::AT).unwrap();
            assert!(found.starts_with(&expected), "{}", found.escape_ascii());
            // A directory that many may write to, and in which nobody can touch another's.
            set_mode(user.home.path(), 0o1777);
            assert!(line_after(&user.start(), script::AT).is_some());
        }
    }

    #[test]
    fn a_directory_of_the_users_own_is_closed_to_others() {
        for user in shells() {
            let directory = user.cache().join("kvm-clone");
            std::fs::create_dir_all(&directory).unwrap();
            // What a directory inherits from a shared one.
            set_mode(&directory, 0o2775);
            user.deploy();
            let mode = std::fs::metadata(directory).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o700);
            assert!(line_after(&user.start(), script::AT).is_some());
        }
    }

    #[test]
    fn nothing_is_put_behind_a_link_in_the_agents_place() {
        for user in shells() {
            user.deploy();
            let elsewhere = user.home.path().join("elsewhere");
            std::fs::create_dir(&elsewhere).unwrap();
            std::fs::remove_file(user.agent()).unwrap();
            symlink(&elsewhere, user.agent()).unwrap();
            user.deploy();
            assert_eq!(std::fs::read(user.agent()).unwrap(), AGENT);
            assert_eq!(std::fs::read_dir(elsewhere).unwrap().count(), 0);
            assert!(line_after(&user.start(), script::AT).is_some());
        }
    }

    #[test]
    fn an_agent_that_cannot_be_placed_leaves_nothing() {
        for user in shells() {
            std::fs::create_dir_all(user.agent()).unwrap();
            set_mode(user.agent().parent().unwrap(), 0o700);
            let temporary = user.agent().with_file_name(".agent.1");
            std::fs::write(&temporary, AGENT).unwrap();
            let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
            let place = script::place(&bytes(&temporary), &bytes(&user.agent())).unwrap();
            let output = user.run(&place, b"");
            assert!(find(&output.stdout, script::DONE).is_none());
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.ends_with("is a directory\n"), "{said}");
            assert!(!temporary.exists());
            assert_eq!(std::fs::read_dir(user.agent()).unwrap().count(), 0);
        }
    }

    #[test]
    fn an_upload_that_is_cut_leaves_nothing() {
        for user in shells() {
            let output = user.run(&script::upload(".agent.1", AGENT.len(), 1), &AGENT[..7]);
            assert!(find(&output.stdout, script::BACK).is_none());
            let left = std::fs::read_dir(user.cache().join("kvm-clone"))
                .unwrap()
                .count();
            assert_eq!(left, 0);
        }
    }

    #[test]
    fn a_cache_that_does_not_do_is_named_and_the_next_one_taken() {
        for user in shells() {
            // A file in the place of the directory fails for root as well.
            std::fs::write(user.cache(), b"").unwrap();
            let output = user.run(&script::upload(".agent.1", AGENT.len(), 1), AGENT);
            let tried = lines_after(&output.stdout, script::TRIED);
            assert_eq!(
                tried,
                [format!("{}: cannot be made", user.cache().display())]
            );
            let (number, temporary) = line_after(&output.stdout, script::TEMPORARY)
                .and_then(parse_temporary)
                .unwrap();
            assert_eq!(number, 2);
            assert!(temporary.starts_with(user.home.path().join(".cache").as_os_str().as_bytes()));
        }
    }

    #[test]
    fn removing_takes_agents_and_leftovers_and_nothing_else() {
        for user in shells() {
            user.deploy();
            let directory = user.cache().join("kvm-clone");
            std::fs::write(directory.join(".agent.broken"), b"").unwrap();
            std::fs::write(directory.join("mine"), b"").unwrap();
            let removed = user.remove(None, script::REMOVED);
            assert_eq!(removed, [".agent.broken", NAME]);
            assert!(directory.join("mine").exists() && !user.agent().exists());
        }
    }

    #[test]
    fn removing_what_is_old_spares_the_agent_and_uploads_under_way() {
        let spared = Some(script::Spared {
            agents: &[NAME.to_owned()],
            uploads_after: 1_000_000,
        });
        for user in shells() {
            user.deploy();
            let directory = user.cache().join("kvm-clone");
            let old = [
                ".agent.0123456789abcdef0123456789abcdef",
                ".agent.1000000.0f",
                ".agent.999.0f",
                "agent-0.0.9-0123456789abcdef",
                "agent-0.1.0-0123456789abcdee",
            ];
            for name in old.iter().chain(&[".agent.1000001.0f"]) {
                std::fs::write(directory.join(name), b"").unwrap();
            }
            assert_eq!(user.remove(spared, script::REMOVED), old);
            let mut left: Vec<_> = std::fs::read_dir(&directory)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            left.sort();
            assert_eq!(left, [".agent.1000001.0f", NAME]);
            assert_eq!(user.remove(spared, script::REMOVED), [""; 0]);
        }
    }

    #[test]
    fn what_is_not_safe_to_remove_is_named() {
        for user in shells() {
            user.deploy();
            set_mode(&user.cache(), 0o777);
            assert_eq!(user.remove(None, script::KEPT), ["kvm-clone"]);
            assert!(user.agent().exists());
        }
    }

    #[test]
    fn a_temporary_name_tells_when_the_upload_began() {
        let name = temporary_name();
        let rest = name.strip_prefix(".agent.").unwrap();
        let (seconds, random) = rest.split_once('.').unwrap();
        let age = seconds_now() - seconds.parse::<i64>().unwrap();
        assert!((0..60).contains(&age) && random.len() == 32, "{name}");
    }

    #[test]
    fn a_root_agent_that_others_can_change_is_refused() {
        for user in shells() {
            user.deploy();
            let path = user.agent();
            let script = script::start_as_root(path.as_os_str().as_bytes()).unwrap();
            set_mode(&path, 0o777);
            let output = user.run(&script, b"");
            let reason = line_after(&output.stdout, script::REFUSED).unwrap();
            assert!(!reason.is_empty() && find(&output.stdout, script::AT).is_none());
            let missing = script::start_as_root(b"/nowhere/agent").unwrap();
            let output = user.run(&missing, b"").stdout;
            assert_eq!(
                line_after(&output, script::REFUSED),
                Some(&b"/nowhere/agent is not there"[..])
            );
        }
    }

    #[test]
    fn what_a_path_holds_is_not_run() {
        for user in shells() {
            let odd = user
                .home
                .path()
                .join("$(touch owned) `touch owned` ' \" ;touch owned");
            std::fs::write(&odd, AGENT).unwrap();
            set_mode(&odd, 0o700);
            let script = script::start_given(odd.as_os_str().as_bytes()).unwrap();
            let output = user.run(&format!("cd \"$HOME\"; {script}"), b"").stdout;
            assert!(
                output.ends_with(b"\nstarted serve\n"),
                "{}",
                output.escape_ascii()
            );
            assert!(!user.home.path().join("owned").exists());
        }
    }
}
