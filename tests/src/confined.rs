//! Hosts that let nobody in but to an agent, which authorized_keys confines.

use std::fs;
use std::path::PathBuf;

use crate::image::{self, BLOCK, MIB, Piece};
use crate::lab::{Lab, LabSpec};
use crate::mount::Kind;
use crate::wire::Caller;

/// A laboratory with the directories `from`, `to` and `out`, a disk in the first and the last of
/// them, and an agent where authorized_keys can name it. The directories lie in memory, where names
/// are exchanged so fast that a race is won within a few tries by whoever can win it.
#[derive(Debug)]
pub struct Confined {
    /// The laboratory.
    pub lab: Lab,
    /// The agent's path.
    pub agent: String,
}

impl Confined {
    /// Hosts that let everybody in still; `None`, and a line that says so, where none can be.
    ///
    /// # Panics
    /// When its files cannot be made.
    #[must_use]
    pub fn start() -> Option<Self> {
        let lab = LabSpec::new()?.mount(Kind::Tmpfs, 64 * MIB).start();
        let agent = lab.install_agent();
        let confined = Self { lab, agent };
        for name in ["from", "to", "out"] {
            fs::create_dir(confined.path(name)).expect("the laboratory is writable");
        }
        for name in ["from/disk", "out/disk"] {
            image::write(&confined.path(name), &[Piece::Random(1, 5 * BLOCK + 5)]);
        }
        Some(confined)
    }

    /// From now on the hosts give the controller an agent with these options; `@` stands for where
    /// the directories are.
    ///
    /// # Panics
    /// When the laboratory's path is not plain.
    pub fn force(&self, on_a: &str, on_b: &str) {
        let at = self.path("");
        let at = at.to_str().expect("a laboratory has a plain path");
        let serve = |options: &str| format!("{} serve {}", self.agent, options.replace('@', at));
        self.lab.a.force("controller", &serve(on_a));
        self.lab.b.force("controller", &serve(on_b));
    }

    /// A path beside the directories.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.lab.mounts()[0].join(name)
    }

    /// The names in a directory.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).expect("the laboratory is readable");
        let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        let mut names: Vec<_> = entries.filter_map(Result::ok).map(name).collect();
        names.sort();
        names
    }

    /// A controller that does as it likes, with the agent that hvB forces.
    #[must_use]
    pub fn caller(&self) -> Caller {
        Caller::start(self.lab.ssh("hvB", "anything"))
    }
}
