//! Hosts and disks as a user names them. Paths stay bytes: they need not be UTF-8.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use kvm_clone_protocol::message::Location;

use crate::error::{Error, Result};
pub use nbd::NbdUri;

mod nbd;

/// The name that stands for this machine, without ssh.
const LOCAL: &str = "local";

/// A host: `[user@]name[:port]`, an alias of the ssh configuration, `[v6]:port`, or `local`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostSpec {
    /// This machine.
    Local,
    /// A machine behind ssh.
    Ssh(SshTarget),
}

/// What ssh is told about where to go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SshTarget {
    /// `None`: what the ssh configuration says.
    pub user: Option<String>,
    /// A name, an address or an alias; an IPv6 address without its brackets.
    pub name: String,
    /// `None`: what the ssh configuration says.
    pub port: Option<u16>,
}

impl FromStr for HostSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == LOCAL {
            return Ok(Self::Local);
        }
        let (user, rest) = match text.rsplit_once('@') {
            Some((user, rest)) => (Some(user), rest),
            None => (None, text),
        };
        let (name, port) = split_port(rest)
            .ok_or_else(|| bad_host(text, "the part behind the colon is not a port number"))?;
        for part in user.into_iter().chain([name]) {
            check_name(part).map_err(|why| bad_host(text, why))?;
        }
        Ok(Self::Ssh(SshTarget {
            user: user.map(str::to_owned),
            name: name.to_owned(),
            port,
        }))
    }
}

/// `name`, `name:port`, `[v6]`, `[v6]:port`; more than one colon without brackets is IPv6.
fn split_port(text: &str) -> Option<(&str, Option<u16>)> {
    if let Some((name, rest)) = text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        return match rest.strip_prefix(':') {
            Some(port) => Some((name, Some(parse_port(port)?))),
            None => rest.is_empty().then_some((name, None)),
        };
    }
    match text.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Some((text, None)),
        Some((name, port)) => Some((name, Some(parse_port(port)?))),
        None => Some((text, None)),
    }
}

fn parse_port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port != 0)
}

/// A name that ssh would take for an option, or that no host can have, is caught here.
fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        Err("a part of it is empty")
    } else if name.starts_with('-') {
        Err("a part of it starts with a dash")
    } else if name.contains(['[', ']']) {
        Err("its brackets do not enclose an address")
    } else if name.chars().any(|c| c.is_control() || c.is_whitespace()) {
        Err("it holds a space or a control character")
    } else {
        Ok(())
    }
}

fn bad_host(text: &str, why: &str) -> Error {
    Error::usage(format!("\"{}\" is not a host: {why}", text.escape_debug())).hint(
        "a host is written [USER@]NAME[:PORT], as an alias of the ssh configuration, or as \
               \"local\" for this machine",
    )
}

impl fmt::Display for HostSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str(LOCAL),
            Self::Ssh(target) => target.fmt(f),
        }
    }
}

impl fmt::Display for SshTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        match (self.name.contains(':'), self.port) {
            (true, Some(port)) => write!(f, "[{}]:{port}", self.name),
            (true, None) => write!(f, "[{}]", self.name),
            (false, Some(port)) => write!(f, "{}:{port}", self.name),
            (false, None) => f.write_str(&self.name),
        }
    }
}

/// A disk: `HOST:/absolute/path`, `HOST:nbd+unix:///EXPORT?socket=PATH`,
/// `HOST:nbd://localhost:PORT/EXPORT`; without `HOST:` on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DiskSpec {
    /// Where it is.
    pub host: HostSpec,
    /// What it is there.
    pub location: DiskLocation,
}

/// Where on its host a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DiskLocation {
    /// An absolute path.
    Path(PathBuf),
    /// What an NBD server there exports.
    Nbd(NbdUri),
}

impl DiskLocation {
    /// As an agent is told.
    pub fn on_wire(&self) -> Location {
        match self {
            Self::Path(path) => Location::Path(path.as_os_str().as_bytes().to_vec()),
            Self::Nbd(uri) => Location::Export(uri.export()),
        }
    }
}

impl DiskSpec {
    /// A file or a block device.
    pub fn at(host: HostSpec, path: impl Into<PathBuf>) -> Self {
        let location = DiskLocation::Path(path.into());
        Self { host, location }
    }

    /// Reads a disk as a user writes it.
    ///
    /// # Errors
    /// Usage, saying what to write, for anything that is not one.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let bytes = text.as_bytes();
        let (host, location) = split_host(bytes).ok_or_else(|| bad_disk(text))?;
        let host = match host {
            None => HostSpec::Local,
            Some(host) => std::str::from_utf8(host)
                .map_err(|_| bad_host(&shown(text), "the name of its host is not UTF-8"))?
                .parse()?,
        };
        if location.contains(&0) {
            return Err(bad_disk(text));
        }
        let location = match is_nbd(location) {
            true => DiskLocation::Nbd(NbdUri::parse(location)?),
            false => DiskLocation::Path(OsString::from_vec(location.to_vec()).into()),
        };
        Ok(Self { host, location })
    }

    /// Its path, if it has one.
    pub fn path(&self) -> Option<&Path> {
        match &self.location {
            DiskLocation::Path(path) => Some(path),
            DiskLocation::Nbd(_) => None,
        }
    }
}

/// What is ahead of the first colon behind which a location begins, and the location.
fn split_host(text: &[u8]) -> Option<(Option<&[u8]>, &[u8])> {
    if text.starts_with(b"/") || is_nbd(text) {
        return Some((None, text));
    }
    let colons = (0..text.len()).filter(|at| text[*at] == b':');
    let mut split = colons.map(|at| (&text[..at], &text[at + 1..]));
    let (host, location) =
        split.find(|(_, location)| location.starts_with(b"/") || is_nbd(location))?;
    Some((Some(host), location))
}

fn is_nbd(text: &[u8]) -> bool {
    [&b"nbd:"[..], b"nbd+unix:", b"nbds:", b"nbds+unix:"]
        .iter()
        .any(|scheme| {
            text.strip_prefix(*scheme)
                .is_some_and(|rest| rest.starts_with(b"//"))
        })
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let HostSpec::Ssh(target) = &self.host {
            write!(f, "{target}:")?;
        }
        match &self.location {
            DiskLocation::Path(path) => path.display().fmt(f),
            DiskLocation::Nbd(uri) => uri.fmt(f),
        }
    }
}

fn shown(text: &OsStr) -> String {
    text.as_bytes().escape_ascii().to_string()
}

fn bad_disk(text: &OsStr) -> Error {
    let what = if text.is_empty() {
        "an empty name is not a disk".to_owned()
    } else {
        format!("\"{}\" is not a disk: it has no absolute path", shown(text))
    };
    let hint = match std::path::absolute(Path::new(text)) {
        Ok(path) if !text.is_empty() && !text.as_bytes().contains(&b':') => {
            format!(
                "for a file on this machine write {}; for one elsewhere HOST:/absolute/path",
                path.display()
            )
        }
        _ => "write HOST:/absolute/path, or /absolute/path for this machine".to_owned(),
    };
    Error::usage(what).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;

    fn host(text: &str) -> HostSpec {
        text.parse().unwrap()
    }

    fn ssh(user: Option<&str>, name: &str, port: Option<u16>) -> HostSpec {
        HostSpec::Ssh(SshTarget {
            user: user.map(str::to_owned),
            name: name.to_owned(),
            port,
        })
    }

    #[test]
    fn hosts_in_every_form() {
        assert_eq!(host("local"), HostSpec::Local);
        assert_eq!(host("hv1"), ssh(None, "hv1", None));
        assert_eq!(host("root@hv1:2222"), ssh(Some("root"), "hv1", Some(2222)));
        assert_eq!(host("dom@in@hv1"), ssh(Some("dom@in"), "hv1", None));
        assert_eq!(host("[fe80::1]:22"), ssh(None, "fe80::1", Some(22)));
        assert_eq!(host("fe80::1"), ssh(None, "fe80::1", None));
        for text in ["hv1", "root@hv1:2222", "[fe80::1]:22", "local"] {
            assert_eq!(host(text).to_string(), text);
        }
    }

    #[test]
    fn what_ssh_would_misread_is_not_a_host() {
        for text in [
            "",
            "-oProxyCommand=x",
            "a b",
            "a\nb",
            "@hv",
            "root@",
            "hv:",
            "hv:x",
            "hv:0",
            "hv:70000",
            "-x@hv",
            "root@-hv",
            "[::1",
            "[::1]x",
            "hv\u{7f}",
        ] {
            let error = text.parse::<HostSpec>().unwrap_err();
            assert_eq!(error.code(), ErrorCode::Usage, "{text:?}");
            assert!(error.hint_text().is_some());
        }
    }

    fn disk(text: &[u8]) -> Result<DiskSpec> {
        DiskSpec::parse(OsStr::from_bytes(text))
    }

    #[test]
    fn a_disk_is_cut_at_the_first_colon_and_slash() {
        let parsed = disk(b"root@hv:22:/img/a:/b c\n\xff").unwrap();
        assert_eq!(parsed.host, ssh(Some("root"), "hv", Some(22)));
        let path = Path::new(OsStr::from_bytes(b"/img/a:/b c\n\xff"));
        assert_eq!(parsed.path(), Some(path));
        let local = disk(b"/img/hv:/x").unwrap();
        assert_eq!(local.host, HostSpec::Local);
        assert_eq!(local.path(), Some(Path::new("/img/hv:/x")));
        assert_eq!(disk(b"[::1]:/x").unwrap().host, ssh(None, "::1", None));
        assert_eq!(
            disk(b"[::1]:22:/x").unwrap().host,
            ssh(None, "::1", Some(22))
        );
        assert_eq!(disk(b"local:/x").unwrap().host, HostSpec::Local);
    }

    #[test]
    fn an_export_is_on_its_host() {
        let uri = "nbd+unix:///vda?socket=/run/a:/b";
        let parsed = disk(format!("root@hv:22:{uri}").as_bytes()).unwrap();
        assert_eq!(parsed.host, ssh(Some("root"), "hv", Some(22)));
        assert_eq!(parsed.path(), None);
        assert_eq!(parsed.to_string(), format!("root@hv:22:{uri}"));
        let local = disk(uri.as_bytes()).unwrap();
        assert_eq!(
            (&local.host, &local.location),
            (&HostSpec::Local, &parsed.location)
        );
        // The first location counts, so a path may look like an export.
        let file = disk(b"hv:/a:nbd://localhost/x").unwrap();
        assert_eq!(file.path(), Some(Path::new("/a:nbd://localhost/x")));
    }

    #[test]
    fn what_is_not_a_disk_says_what_to_write() {
        for text in [
            &b""[..],
            b"image.raw",
            b"hv:image.raw",
            b"hv:",
            b":/x",
            b"nbd:x",
            b"hv:nbd:x",
            b"\xff:/x",
        ] {
            let error = disk(text).unwrap_err();
            assert_eq!(error.code(), ErrorCode::Usage, "{text:?}");
            assert!(
                error
                    .hint_text()
                    .is_some_and(|hint| hint.contains('/') || hint.contains("host"))
            );
        }
        let relative = disk(b"image.raw").unwrap_err();
        assert!(
            relative.hint_text().unwrap().contains("/image.raw"),
            "{relative:?}"
        );
    }
}
