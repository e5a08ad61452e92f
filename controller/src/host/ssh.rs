//! The system's own `ssh`: which arguments it gets, what it says about a host, and what its
//! complaints mean. Configuration, agents, jump hosts and known_hosts stay the user's; nothing
//! here ever loosens the checking of host keys.

use std::ffi::{OsStr, OsString};
use std::fs::DirBuilder;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use crate::endpoint::SshTarget;
use crate::error::{Error, ErrorCode, Result};

/// The cipher that is put first where the processor makes it the fastest by far (1.65 times the
/// default one over loopback).
const FAST_CIPHER: &str = "Ciphers=^aes128-gcm@openssh.com";

/// ssh appends 17 bytes to a control path while it binds, and a socket's path ends at 107.
const MAX_SOCKET_PATH: usize = 80;

/// How this program reaches hosts: what the user said on the command line, for all of them.
#[derive(Debug, Clone, Default)]
pub struct SshOptions {
    /// `ssh -F`.
    pub config: Option<PathBuf>,
    /// `ssh -i`.
    pub key: Option<PathBuf>,
    /// `ssh -o`, in order; ssh takes the first that it sees.
    pub options: Vec<String>,
    /// `ssh -A`.
    pub forward_agent: bool,
    /// The agent runs through `sudo -n`.
    pub sudo: bool,
    /// Use this agent on the hosts and deploy nothing.
    pub agent_path: Option<PathBuf>,
}

/// What `ssh -G` says about a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The name or address that is connected to.
    pub hostname: String,
    /// The login.
    pub user: String,
    /// The port.
    pub port: u16,
    /// The name that its key is filed under, where the configuration gives one.
    pub host_key_alias: Option<String>,
    /// The user's known_hosts files, then the global ones.
    pub known_hosts: Vec<PathBuf>,
    /// Neither the configuration nor the command line names ciphers.
    pub default_ciphers: bool,
    /// Nobody set a time limit for connecting.
    pub default_connect_timeout: bool,
}

impl Resolved {
    /// The name that ssh on this machine files the key under.
    pub fn filed_under(&self) -> String {
        self.host_key_alias
            .clone()
            .unwrap_or_else(|| self.known_hosts_name())
    }

    /// The name that ssh looks a key up under, without an alias.
    pub fn known_hosts_name(&self) -> String {
        if self.port == 22 {
            self.hostname.clone()
        } else {
            format!("[{}]:{}", self.hostname, self.port)
        }
    }
}

/// How an ssh command relates to the control connection of its host.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sharing<'a> {
    /// It is the control connection, and listens here for others.
    Master(&'a Path),
    /// It is a further channel of the control connection that listens here.
    Channel(&'a Path),
    /// It has nothing to do with one.
    Alone,
}

impl SshOptions {
    /// The arguments of `ssh`, program name included, up to and without the remote command.
    pub(super) fn argv(
        &self,
        target: &SshTarget,
        resolved: &Resolved,
        sharing: Sharing<'_>,
    ) -> Vec<OsString> {
        // What the machinery rests on comes first, because ssh takes the first value it sees.
        let mut argv = words(["ssh", "-T", "-e", "none", "-o", "RemoteCommand=none"]);
        match sharing {
            Sharing::Master(socket) => {
                argv.extend(words([
                    "-o",
                    "ControlMaster=yes",
                    "-o",
                    "ControlPersist=no",
                    "-S",
                ]));
                argv.push(socket.into());
            }
            Sharing::Channel(socket) => {
                // It has nothing to ask for, and must not: see [`Sharing::shielded`].
                argv.extend(words([
                    "-o",
                    "BatchMode=yes",
                    "-o",
                    "ControlMaster=no",
                    "-S",
                ]));
                argv.push(socket.into());
            }
            Sharing::Alone => {
                argv.extend(words(["-o", "ControlMaster=no", "-o", "ControlPath=none"]));
            }
        }
        argv.extend(self.user_options(target, self.config.as_deref()));
        argv.extend(words([
            "-o",
            "ServerAliveInterval=5",
            "-o",
            "ServerAliveCountMax=3",
            "-o",
            "ClearAllForwardings=yes",
        ]));
        if resolved.default_connect_timeout {
            argv.extend(words(["-o", "ConnectTimeout=15"]));
        }
        if let Some(cipher) = fast_cipher(resolved) {
            argv.extend(words(["-o", cipher]));
        }
        argv.push("--".into());
        argv.push(target.name.clone().into());
        argv
    }

    /// Where to go, and what the user wants said to ssh.
    fn user_options(&self, target: &SshTarget, config: Option<&Path>) -> Vec<OsString> {
        let mut argv = Vec::new();
        if let Some(port) = target.port {
            argv.extend(words(["-p", &port.to_string()]));
        }
        if let Some(user) = &target.user {
            argv.extend(words(["-l", user]));
        }
        if let Some(config) = config {
            argv.extend(["-F".into(), config.into()]);
        }
        if let Some(key) = &self.key {
            argv.extend(["-i".into(), key.into()]);
        }
        if self.forward_agent {
            argv.push("-A".into());
        }
        for option in &self.options {
            argv.extend(words(["-o", option]));
        }
        argv
    }

    /// Asks ssh what it makes of a host, once as configured and once without any configuration:
    /// what differs, the user chose.
    ///
    /// # Errors
    /// When ssh is missing, or refuses the configuration.
    pub(super) async fn resolve(&self, target: &SshTarget) -> Result<Resolved> {
        let plain = Self::default();
        let (chosen, default) = tokio::join!(
            self.ask(target, self.config.as_deref()),
            plain.ask(target, Some(Path::new("none"))),
        );
        parse_resolved(&chosen?, &default?).ok_or_else(|| {
            Error::new(
                ErrorCode::Internal,
                format!("ssh -G says too little about {target}"),
            )
        })
    }

    async fn ask(&self, target: &SshTarget, config: Option<&Path>) -> Result<String> {
        let output = Command::new("ssh")
            .arg("-G")
            .args(self.user_options(target, config))
            .arg("--")
            .arg(&target.name)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(cannot_run_ssh)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(
            Error::usage(format!("ssh does not accept its options for {target}"))
                .caused_by(said)
                .hint("look at the ssh configuration, --ssh-config and --ssh-option"),
        )
    }
}

/// The option that puts the fast cipher first, where it pays and the user chose none.
pub(super) fn fast_cipher(resolved: &Resolved) -> Option<&'static str> {
    (resolved.default_ciphers && processor_has_aes()).then_some(FAST_CIPHER)
}

fn processor_has_aes() -> bool {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    let has = std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    let has = std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
    let has = false;
    has
}

pub(super) fn cannot_run_ssh(error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::new(
            ErrorCode::MissingRequirement,
            "there is no ssh on this machine",
        )
        .hint("install the OpenSSH client (package openssh-client or openssh-clients)");
    }
    Error::io("running ssh", error)
}

fn parse_resolved(chosen: &str, default: &str) -> Option<Resolved> {
    let known_hosts = ["userknownhostsfile", "globalknownhostsfile"]
        .into_iter()
        .filter_map(|key| value(chosen, key))
        .flat_map(str::split_whitespace)
        .filter(|file| !file.eq_ignore_ascii_case("none"))
        .map(expand_home)
        .collect();
    Some(Resolved {
        hostname: value(chosen, "hostname")?.to_owned(),
        user: value(chosen, "user")?.to_owned(),
        port: value(chosen, "port")?.parse().ok()?,
        host_key_alias: value(chosen, "hostkeyalias").map(str::to_owned),
        known_hosts,
        default_ciphers: value(chosen, "ciphers") == value(default, "ciphers"),
        default_connect_timeout: matches!(
            value(chosen, "connecttimeout"),
            None | Some("none" | "0")
        ),
    })
}

fn value<'a>(listing: &'a str, key: &str) -> Option<&'a str> {
    listing
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value.trim())
}

fn expand_home(file: &str) -> PathBuf {
    match (file.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(file),
    }
}

fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<OsString> {
    words.into_iter().map(OsString::from).collect()
}

impl Sharing<'_> {
    /// Wraps a command so that Ctrl-C, which a terminal sends to every process in the foreground, does
    /// not end it: this program is told too, stops the agents in order, and ends its children itself.
    ///
    /// ssh stays in the foreground, where it can ask for a passphrase, and ignores what was ignored
    /// before. As a channel of another connection it does not, and leaves the foreground.
    pub(super) fn shielded(self, argv: &[OsString]) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"trap "" INT; exec "$@""#, "sh"])
            .args(argv)
            .kill_on_drop(true);
        if matches!(self, Self::Channel(_)) {
            command.process_group(0);
        }
        command
    }
}

/// Where a control connection listens. Gone when dropped, however ssh ended.
#[derive(Debug)]
pub(super) struct ControlSocket {
    path: PathBuf,
    _fallback: Option<tempfile::TempDir>,
}

impl ControlSocket {
    /// A fresh path in a directory that only this user can enter.
    ///
    /// # Errors
    /// When no such directory can be made.
    pub(super) fn new() -> Result<Self> {
        let name = socket_name()?;
        let directory =
            runtime_dir().filter(|dir| dir.as_os_str().len() + 1 + name.len() <= MAX_SOCKET_PATH);
        if let Some(directory) = directory {
            match make_private(&directory) {
                Ok(()) => {
                    return Ok(Self {
                        path: directory.join(name),
                        _fallback: None,
                    });
                }
                Err(why) => {
                    tracing::debug!(directory = %directory.display(), why, "not used for control sockets");
                }
            }
        }
        // tempfile makes its directories with mode 0700.
        let fallback = tempfile::Builder::new()
            .prefix("kvm-clone-")
            .tempdir_in("/tmp")
            .map_err(|error| Error::io("making a directory for control sockets in /tmp", error))?;
        Ok(Self {
            path: fallback.path().join(name),
            _fallback: Some(fallback),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // ssh removes it itself unless it was killed.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn socket_name() -> Result<String> {
    let random = getrandom::u32().map_err(|error| {
        Error::new(
            ErrorCode::Internal,
            "the operating system gives no random numbers",
        )
        .caused_by(error)
    })?;
    Ok(format!("{}-{random:08x}", std::process::id()))
}

fn runtime_dir() -> Option<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match runtime.filter(|dir| dir.is_absolute() && dir.is_dir()) {
        Some(dir) => Some(dir.join("kvm-clone")),
        None => Some(std::env::home_dir()?.join(".cache/kvm-clone/ctl")),
    }
}

/// Makes a directory with mode 0700, or makes sure that one which is there is ours alone.
fn make_private(directory: &Path) -> Result<(), &'static str> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|_| "cannot be made")?;
    let found = std::fs::symlink_metadata(directory).map_err(|_| "cannot be looked at")?;
    if !found.is_dir() {
        Err("is not a directory")
    } else if found.uid() != rustix::process::geteuid().as_raw() {
        Err("belongs to somebody else")
    } else if found.mode() & 0o077 != 0 {
        Err("is open to others")
    } else {
        Ok(())
    }
}

/// What ssh's own failure (exit status 255) means. The hints name the host as ssh knows it, which
/// an alias hides from ssh-keygen and ssh-keyscan.
pub(super) fn classify(target: &SshTarget, resolved: Option<&Resolved>, stderr: &str) -> Error {
    let said = |patterns: &[&str]| patterns.iter().any(|pattern| stderr.contains(pattern));
    let login = target
        .port
        .map_or_else(String::new, |port| format!("-p {port} "))
        + &target.name;
    let error = if said(&["HOST IDENTIFICATION HAS CHANGED"]) {
        let filed = resolved.map_or_else(|| target.name.clone(), |known| known.filed_under());
        Error::new(
            ErrorCode::HostKey,
            format!("the key of {target} has changed"),
        )
        .hint(format!(
            "if the host was installed anew, remove its old key (ssh-keygen{} -R '{filed}'), then \
             log in once and compare the fingerprint of the new one: ssh {login}",
            known_hosts_option(resolved)
        ))
    } else if said(&["Host key verification failed", "host key is known for"]) {
        let scan = resolved.map_or_else(
            || login.clone(),
            |known| format!("-p {} {}", known.port, known.hostname),
        );
        Error::new(ErrorCode::HostKey, format!("the key of {target} is not known")).hint(format!(
            "log in once and compare the fingerprint that ssh shows (ssh {login}), or add a key that \
             you trust to your known_hosts: ssh-keyscan {scan}"
        ))
    } else if said(&[
        "Permission denied (",
        "Too many authentication failures",
        "Authentication failed",
    ]) {
        Error::new(ErrorCode::Auth, format!("{target} refuses the login")).hint(format!(
            "\"ssh {login} true\" must work; give a key with --ssh-key, or another user as USER@HOST"
        ))
    } else if said(&[
        "Bad configuration option",
        "bad configuration options",
        "Bad owner or permissions",
        "Can't open user config file",
    ]) {
        Error::usage(format!("ssh does not accept its options for {target}"))
            .hint("look at the ssh configuration, --ssh-config and --ssh-option")
    } else {
        Error::new(ErrorCode::HostUnreachable, format!("cannot reach {target}"))
            .hint(format!("\"ssh {login} true\" must work from this machine"))
    };
    match stderr.trim() {
        "" => error,
        said => error.caused_by(said.to_owned()),
    }
}

/// The user's own known_hosts file, where it is not the usual one.
fn known_hosts_option(resolved: Option<&Resolved>) -> String {
    match resolved.and_then(|known| known.known_hosts.first()) {
        Some(file) if !file.ends_with(".ssh/known_hosts") => format!(" -f '{}'", file.display()),
        _ => String::new(),
    }
}

/// Bytes for people.
pub(super) fn lossy(path: &OsStr) -> String {
    String::from_utf8_lossy(path.as_bytes()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn target() -> SshTarget {
        SshTarget {
            user: Some("root".into()),
            name: "hv1".into(),
            port: Some(2222),
        }
    }

    fn resolved() -> Resolved {
        Resolved {
            hostname: "10.0.0.1".into(),
            user: "root".into(),
            port: 2222,
            host_key_alias: None,
            known_hosts: vec!["/kh".into()],
            default_ciphers: false,
            default_connect_timeout: true,
        }
    }

    #[test]
    fn the_users_options_come_before_ours_and_after_the_machinery() {
        let options = SshOptions {
            options: vec!["ServerAliveInterval=3".into(), "ControlMaster=no".into()],
            config: Some("/cfg".into()),
            ..SshOptions::default()
        };
        let argv = options.argv(&target(), &resolved(), Sharing::Master(Path::new("/run/s")));
        let at = |word: &str| {
            argv.iter()
                .position(|arg| arg == word)
                .unwrap_or_else(|| panic!("{word} in {argv:?}"))
        };
        assert!(at("ControlMaster=yes") < at("ControlMaster=no"));
        assert!(at("ServerAliveInterval=3") < at("ServerAliveInterval=5"));
        assert!(at("-F") < at("--") && at("-p") < at("--"));
        assert_eq!(at("hv1"), argv.len() - 1);
        assert!(
            !argv
                .iter()
                .any(|arg| lossy(arg).contains("StrictHostKeyChecking"))
        );
        assert!(
            !argv.iter().any(|arg| lossy(arg).contains("Ciphers")),
            "the user named ciphers"
        );
    }

    #[test]
    fn listings_of_ssh_are_read() {
        let default = "ciphers a,b\n";
        let chosen = "user root\nhostname 10.0.0.1\nport 2222\nciphers a,b\nhostkeyalias hv\n\
                      globalknownhostsfile /etc/a /etc/b\nuserknownhostsfile /u/a none\nconnecttimeout none\n";
        let read = parse_resolved(chosen, default).unwrap();
        assert_eq!(
            read.known_hosts,
            ["/u/a", "/etc/a", "/etc/b"].map(PathBuf::from)
        );
        assert_eq!(read.host_key_alias.as_deref(), Some("hv"));
        assert!(read.default_ciphers && read.default_connect_timeout);
        assert_eq!(read.known_hosts_name(), "[10.0.0.1]:2222");
        let chosen = chosen
            .replace("a,b", "c")
            .replace("timeout none", "timeout 5");
        let read = parse_resolved(&chosen, default).unwrap();
        assert!(!read.default_ciphers && !read.default_connect_timeout);
        assert!(parse_resolved("user root\n", default).is_none());
    }

    #[test]
    fn complaints_of_ssh_are_told_apart() {
        let cases = [
            (
                "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
                ErrorCode::HostKey,
                "has changed",
            ),
            (
                "No ED25519 host key is known for [h]:2 and you have requested strict checking.\nHost key verification failed.",
                ErrorCode::HostKey,
                "not known",
            ),
            (
                "root@h: Permission denied (publickey,password).",
                ErrorCode::Auth,
                "refuses",
            ),
            (
                "Received disconnect from ::1: Too many authentication failures",
                ErrorCode::Auth,
                "refuses",
            ),
            (
                "ssh: Could not resolve hostname hv1: Name or service not known",
                ErrorCode::HostUnreachable,
                "cannot reach",
            ),
            (
                "ssh: connect to host hv1 port 22: Connection refused",
                ErrorCode::HostUnreachable,
                "cannot reach",
            ),
            (
                "command-line: line 0: Bad configuration option: foo",
                ErrorCode::Usage,
                "options",
            ),
            ("", ErrorCode::HostUnreachable, "cannot reach"),
        ];
        for (stderr, code, message) in cases {
            let error = classify(&target(), None, stderr);
            assert_eq!(error.code(), code, "{stderr}");
            assert!(error.to_string().contains(message), "{error}");
            assert!(error.hint_text().is_some());
        }
        let changed = classify(&target(), Some(&resolved()), cases[0].0);
        assert!(
            changed
                .hint_text()
                .unwrap()
                .contains("ssh-keygen -f '/kh' -R '[10.0.0.1]:2222'")
        );
    }

    #[test]
    fn a_directory_for_sockets_is_ours_alone() {
        let root = tempfile::tempdir().unwrap();
        let fresh = root.path().join("a/b");
        make_private(&fresh).unwrap();
        assert_eq!(std::fs::metadata(&fresh).unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&fresh, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(make_private(&fresh).is_err());
        let link = root.path().join("link");
        std::os::unix::fs::symlink(root.path(), &link).unwrap();
        assert!(make_private(&link).is_err());
    }

    #[test]
    fn a_control_path_leaves_room_for_what_ssh_appends() {
        let socket = ControlSocket::new().unwrap();
        assert!(socket.path().as_os_str().len() <= MAX_SOCKET_PATH);
    }
}
