//! NBD exports as the URIs that the NBD project defines (`doc/uri.md` there).

use std::fmt;

use fluent_uri::Uri;
use fluent_uri::pct_enc::{EStr, Encoder};
use kvm_clone_protocol::message::{History, NbdExport, NbdServer};

use crate::error::{Error, Result};

/// The port of NBD, where none is named.
const PORT: u16 = 10809;

/// The longest name of an export that the protocol has, in bytes.
const MAX_NAME: usize = 4096;

/// The longest path of a socket that Linux takes, in bytes.
const MAX_SOCKET: usize = 107;

/// What the loopback of a host is called.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// An export on its host: `nbd+unix:///EXPORT?socket=PATH`, or `nbd://localhost[:PORT]/EXPORT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NbdUri {
    text: String,
    server: Server,
    name: String,
    history: Option<History>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Server {
    Unix(Vec<u8>),
    Loopback(u16),
}

impl NbdUri {
    /// Reads an export as a user writes it.
    ///
    /// # Errors
    /// Usage, saying what to write, for anything that is not one, or not on its host.
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let bad = |why: &str| {
            let shown = text.escape_ascii();
            Error::usage(format!("\"{shown}\" is not an NBD export: {why}")).hint(
                "write [HOST:]nbd+unix:///EXPORT?socket=/PATH, or [HOST:]nbd://localhost:PORT/EXPORT \
                 for a server on that host; what a URI cannot hold is written %XX",
            )
        };
        let text = std::str::from_utf8(text).map_err(|_| bad("it is not UTF-8"))?;
        let uri = Uri::parse(text).map_err(|error| bad(&error.to_string()))?;
        let server = match uri.scheme().as_str() {
            "nbd+unix" => unix(&uri),
            "nbd" => loopback(&uri),
            _ => Err("TLS is not spoken here: the server must be on the host itself, without it"),
        };
        let server = server.map_err(bad)?;
        if uri.fragment().is_some() {
            return Err(bad("it has a fragment"));
        }
        let name = decoded(uri.path()).ok_or_else(|| bad("the export's name is not UTF-8"))?;
        let name = name.strip_prefix('/').unwrap_or(&name).to_owned();
        if name.len() > MAX_NAME || name.contains('\0') {
            return Err(bad("no export has such a name"));
        }
        let text = text.to_owned();
        Ok(Self {
            text,
            server,
            name,
            history: None,
        })
    }

    /// An export of a socket, whose path and name need no escape in a URI.
    pub fn of_socket(socket: &str, name: &str) -> Self {
        Self {
            text: format!("nbd+unix:///{name}?socket={socket}"),
            server: Server::Unix(socket.as_bytes().to_vec()),
            name: name.to_owned(),
            history: None,
        }
    }

    /// The same export, of which digests are kept from run to run.
    pub fn with_history(self, history: Option<History>) -> Self {
        Self { history, ..self }
    }

    /// The export as the wire carries it.
    pub fn export(&self) -> NbdExport {
        NbdExport {
            server: match &self.server {
                Server::Unix(path) => NbdServer::Unix(path.clone()),
                Server::Loopback(port) => NbdServer::Loopback(*port),
            },
            name: self.name.clone(),
            history: self.history.clone(),
        }
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

fn unix(uri: &Uri<&str>) -> Result<Server, &'static str> {
    let authority = uri.authority().map(|authority| authority.as_str());
    if authority.is_some_and(|authority| !authority.is_empty()) {
        return Err("a Unix socket has no host: three slashes come ahead of the export");
    }
    let query = uri.query().ok_or("it has no ?socket=PATH")?;
    let mut socket = None;
    for parameter in query.split('&') {
        match parameter.split_once('=') {
            Some((name, path)) if name.as_str() == "socket" && socket.is_none() => {
                socket = Some(path.decode().to_bytes().into_owned());
            }
            _ => return Err("it has a parameter that is not socket=PATH, or two of these"),
        }
    }
    match socket {
        Some(path) if path.len() > MAX_SOCKET => Err("no socket has such a long path"),
        Some(path) if path.starts_with(b"/") && !path.contains(&0) => Ok(Server::Unix(path)),
        _ => Err("the path of its socket is not absolute"),
    }
}

fn loopback(uri: &Uri<&str>) -> Result<Server, &'static str> {
    let authority = uri.authority().ok_or("it has no host")?;
    if authority.userinfo().is_some() || uri.query().is_some() {
        return Err("it has more than a host, a port and a name");
    }
    if !LOOPBACK.contains(&authority.host()) {
        return Err(
            "NBD is not encrypted: its server must be localhost, as the host itself sees it",
        );
    }
    match authority.port_to_u16() {
        Ok(None) => Ok(Server::Loopback(PORT)),
        Ok(Some(port)) if port != 0 => Ok(Server::Loopback(port)),
        _ => Err("its port is not one"),
    }
}

fn decoded<E: Encoder>(text: &EStr<E>) -> Option<String> {
    Some(text.decode().to_string().ok()?.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorCode;

    fn export(text: &str) -> NbdExport {
        NbdUri::parse(text.as_bytes()).unwrap().export()
    }

    #[test]
    fn exports_in_every_form() {
        let unix = |path: &[u8]| NbdServer::Unix(path.to_vec());
        for (text, server, name) in [
            (
                "nbd+unix:///vda?socket=/run/x.sock",
                unix(b"/run/x.sock"),
                "vda",
            ),
            ("nbd+unix:///?socket=/run/x", unix(b"/run/x"), ""),
            (
                "nbd+unix:///a%20b/c%3f?socket=/a%20b+%ff%26",
                unix(b"/a b+\xff&"),
                "a b/c?",
            ),
            ("nbd://localhost/vda", NbdServer::Loopback(10809), "vda"),
            ("nbd://127.0.0.1:10810", NbdServer::Loopback(10810), ""),
            ("nbd://[::1]:1//x", NbdServer::Loopback(1), "/x"),
        ] {
            let name = name.to_owned();
            let history = None;
            let expected = NbdExport {
                server,
                name,
                history,
            };
            assert_eq!(export(text), expected, "{text}");
            assert_eq!(NbdUri::parse(text.as_bytes()).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_export_of_the_host_itself_says_what_to_write() {
        for (text, why) in [
            ("nbd://10.0.0.1/x", "not encrypted"),
            ("nbd://127.0.0.1.example/x", "not encrypted"),
            ("nbd://user@localhost/x", "more than"),
            ("nbd://localhost:0/x", "port"),
            ("nbd://localhost:70000/x", "port"),
            ("nbd://localhost/x?socket=/y", "more than"),
            ("nbd://localhost/x#y", "fragment"),
            ("nbds://localhost/x", "TLS"),
            ("nbds+unix:///x?socket=/y", "TLS"),
            ("nbd+unix:///x", "no ?socket"),
            ("nbd+unix:///x?socket=y", "absolute"),
            ("nbd+unix:///x?socket=/y&socket=/z", "two"),
            ("nbd+unix:///x?tls=no&socket=/y", "not socket"),
            ("nbd+unix://hv/x?socket=/y", "three slashes"),
            ("nbd+unix:///%ff?socket=/y", "UTF-8"),
            ("nbd+unix:///a b?socket=/y", "is not an NBD export"),
        ] {
            let error = NbdUri::parse(text.as_bytes()).unwrap_err();
            assert_eq!(error.code(), ErrorCode::Usage, "{text}");
            assert!(error.to_string().contains(why), "{text}: {error}");
            assert!(error.hint_text().is_some());
        }
        let long = format!("nbd+unix:///x?socket=/{}", "y".repeat(107));
        assert!(NbdUri::parse(long.as_bytes()).is_err());
    }
}
