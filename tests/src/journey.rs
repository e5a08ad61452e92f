//! Which way a disk travels: between two hosts, from or to this machine, or within it.

use std::ffi::OsString;
use std::path::Path;

/// Where the two disks are, and how their bytes go from one to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journey {
    /// hvA to hvB, by an ssh connection that hvA opens to hvB.
    Direct,
    /// hvA to hvB, through the controller.
    Relay,
    /// This machine to hvB.
    Push,
    /// hvA to this machine.
    Pull,
    /// Within this machine.
    Local,
}

impl Journey {
    /// Every way.
    pub const ALL: [Self; 5] = [
        Self::Direct,
        Self::Relay,
        Self::Push,
        Self::Pull,
        Self::Local,
    ];

    /// The source as an argument.
    #[must_use]
    pub fn source(self, path: &Path) -> OsString {
        match self {
            Self::Direct | Self::Relay | Self::Pull => on("hvA", path),
            Self::Push | Self::Local => path.into(),
        }
    }

    /// The destination as an argument.
    #[must_use]
    pub fn destination(self, path: &Path) -> OsString {
        match self {
            Self::Direct | Self::Relay | Self::Push => on("hvB", path),
            Self::Pull => on("local", path),
            Self::Local => path.into(),
        }
    }

    /// Options that ask for it. What has one sensible route is left to `auto`.
    #[must_use]
    pub fn options(self) -> &'static [&'static str] {
        match self {
            Self::Direct => &["--route", "direct"],
            Self::Relay => &["--route", "relay"],
            Self::Push | Self::Pull | Self::Local => &[],
        }
    }

    /// What the result may say about the route.
    #[must_use]
    pub fn routes(self) -> &'static [&'static str] {
        match self {
            Self::Direct => &["direct"],
            Self::Relay => &["relay"],
            Self::Push | Self::Pull => &["direct", "relay"],
            Self::Local => &["local"],
        }
    }
}

/// A disk of a host, as the command line names it.
#[must_use]
pub fn on(host: &str, path: &Path) -> OsString {
    let mut disk = OsString::from(format!("{host}:"));
    disk.push(path);
    disk
}
