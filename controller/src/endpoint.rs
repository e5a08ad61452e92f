//! Hosts and disks as a user names them. Paths stay bytes: they need not be UTF-8.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result};

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

/// A disk: `HOST:/absolute/path`, or `/absolute/path` on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DiskSpec {
    /// Where it is.
    pub host: HostSpec,
    /// Absolute.
    pub path: PathBuf,
}

impl DiskSpec {
    /// Reads a disk as a user writes it.
    ///
    /// # Errors
    /// Usage, saying what to write, for anything that is not one.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let bytes = text.as_bytes();
        if [&b"nbd://"[..], b"nbd+unix://"]
            .iter()
            .any(|scheme| bytes.starts_with(scheme))
        {
            return Err(Error::usage(format!(
                "\"{}\": this version does not read NBD exports",
                shown(text)
            ))
            .hint("give a regular file or a block device: HOST:/absolute/path"));
        }
        let (host, path) = if bytes.starts_with(b"/") {
            (HostSpec::Local, bytes)
        } else {
            let at = bytes
                .windows(2)
                .position(|pair| pair == b":/")
                .ok_or_else(|| bad_disk(text))?;
            let host = std::str::from_utf8(&bytes[..at])
                .map_err(|_| bad_host(&shown(text), "the name of its host is not UTF-8"))?;
            (host.parse()?, &bytes[at + 1..])
        };
        if path.contains(&0) {
            return Err(bad_disk(text));
        }
        Ok(Self {
            host,
            path: PathBuf::from(OsString::from_vec(path.to_vec())),
        })
    }

    /// The path as the wire carries it.
    pub fn path_bytes(&self) -> Vec<u8> {
        self.path.as_os_str().as_bytes().to_vec()
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            HostSpec::Local => self.path.display().fmt(f),
            HostSpec::Ssh(target) => write!(f, "{target}:{}", self.path.display()),
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
        assert_eq!(parsed.path_bytes(), b"/img/a:/b c\n\xff");
        let local = disk(b"/img/hv:/x").unwrap();
        assert_eq!(local.host, HostSpec::Local);
        assert_eq!(local.path_bytes(), b"/img/hv:/x");
        assert_eq!(disk(b"[::1]:/x").unwrap().host, ssh(None, "::1", None));
        assert_eq!(
            disk(b"[::1]:22:/x").unwrap().host,
            ssh(None, "::1", Some(22))
        );
        assert_eq!(disk(b"local:/x").unwrap().host, HostSpec::Local);
    }

    #[test]
    fn what_is_not_a_disk_says_what_to_write() {
        for text in [
            &b""[..],
            b"image.raw",
            b"hv:image.raw",
            b"hv:",
            b":/x",
            b"nbd://h/x",
            b"nbd+unix:///x",
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
