//! The agents that this program carries, one for each kind of machine: `build.rs` packed them. Another
//! one can be given in place of that for its machine.

use std::path::Path;
use std::sync::OnceLock;

use crate::error::{Error, ErrorCode, Result};

/// An agent for one kind of machine.
#[derive(Debug)]
pub struct Agent {
    /// As `uname -m` names it.
    machine: &'static str,
    size: usize,
    /// Its BLAKE3 in hexadecimal.
    digest: String,
    packed: &'static [u8],
    unpacked: OnceLock<Vec<u8>>,
}

/// Machines of one kind have several names.
const ALIASES: [(&str, &str); 2] = [("amd64", "x86_64"), ("arm64", "aarch64")];

/// `e_machine` of an ELF header, and what `uname -m` calls that (elf.h).
const MACHINES: [(u16, &str); 2] = [(62, "x86_64"), (183, "aarch64")];

static GIVEN: OnceLock<Agent> = OnceLock::new();

/// Those that this program carries, with the one that was given ahead of the one for the same machine.
fn all() -> impl Iterator<Item = &'static Agent> {
    static CARRIED: OnceLock<Vec<Agent>> = OnceLock::new();
    let carried = CARRIED.get_or_init(carried);
    GIVEN.get().into_iter().chain(carried)
}

// Defines `carried`, which makes them.
include!(concat!(env!("OUT_DIR"), "/agents.rs"));

/// Takes the executable in this file for the agent of its machine.
///
/// # Errors
/// Usage, when it cannot be read, or is no executable for a machine that has agents.
pub fn give(path: &Path) -> Result<()> {
    let shown = path.display();
    let bytes = std::fs::read(path).map_err(|error| {
        Error::usage(format!("--agent {shown} cannot be read")).caused_by(error)
    })?;
    let machine = machine_of(&bytes).ok_or_else(|| {
        Error::usage(format!(
            "--agent {shown} is no program for Linux on x86_64 or aarch64"
        ))
        .hint("give the file of a kvm-clone-agent")
    })?;
    let agent = Agent {
        machine,
        size: bytes.len(),
        digest: blake3::hash(&bytes).to_hex().to_string(),
        packed: &[],
        unpacked: bytes.into(),
    };
    let twice = |_| Error::new(ErrorCode::Internal, "an agent was given twice");
    GIVEN.set(agent).map_err(twice)
}

/// The machine that a 64-bit little-endian ELF executable is for.
fn machine_of(bytes: &[u8]) -> Option<&'static str> {
    let machine = u16::from_le_bytes(bytes.get(18..20)?.try_into().ok()?);
    let is_elf = bytes.starts_with(b"\x7fELF\x02\x01");
    let known = MACHINES.iter().find(|(number, _)| *number == machine);
    known.filter(|_| is_elf).map(|(_, name)| *name)
}

/// The agents for all machines: one for each.
pub fn for_all() -> Vec<&'static Agent> {
    let mut agents: Vec<&Agent> = Vec::new();
    for agent in all() {
        if agents.iter().all(|known| known.machine != agent.machine) {
            agents.push(agent);
        }
    }
    agents
}

/// The agent for a host, which is a machine of this kind.
///
/// # Errors
/// Missing requirement, naming the machine.
pub fn for_machine(host: &str, machine: &str) -> Result<&'static Agent> {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == machine);
    let name = alias.map_or(machine, |(_, name)| name);
    all().find(|agent| agent.machine == name).ok_or_else(|| {
        let known: Vec<&str> = for_all().iter().map(|agent| agent.machine).collect();
        let known = known.join(" and ");
        let message = format!(
            "{host} is of machine {machine}, and this program carries an agent for {known} only"
        );
        let hint = match MACHINES.iter().any(|(_, known)| *known == name) {
            true => "take the program as it is distributed, which carries both, or give it one with --agent",
            false => "build the agent for that machine, copy it there, and name it with --agent-path",
        };
        Error::new(ErrorCode::MissingRequirement, message).hint(hint)
    })
}

/// The first 16 hexadecimal digits of a BLAKE3, by which agents are told apart.
pub fn short_digest(digest: [u8; 32]) -> String {
    blake3::Hash::from_bytes(digest).to_hex()[..16].to_owned()
}

/// The agent that states this BLAKE3, if it is one of ours.
pub fn with_digest(digest: [u8; 32]) -> Option<&'static Agent> {
    let digest = blake3::Hash::from_bytes(digest).to_hex();
    all().find(|agent| agent.digest == digest.as_str())
}

impl Agent {
    fn packed(machine: &'static str, size: usize, digest: &str, packed: &'static [u8]) -> Self {
        Self {
            machine,
            size,
            digest: digest.to_owned(),
            packed,
            unpacked: OnceLock::new(),
        }
    }

    /// What `uname -m` says where it runs.
    pub fn machines(&self) -> Vec<&'static str> {
        let aliases = ALIASES.iter().filter(|(_, name)| *name == self.machine);
        let aliases = aliases.map(|(alias, _)| *alias);
        std::iter::once(self.machine).chain(aliases).collect()
    }

    /// The executable.
    ///
    /// # Errors
    /// Internal, when what was built in cannot be unpacked.
    pub fn bytes(&self) -> Result<&[u8]> {
        if let Some(bytes) = self.unpacked.get() {
            return Ok(bytes);
        }
        let bytes = zstd::bulk::decompress(self.packed, self.size).map_err(|error| {
            let message = "the agent inside this program is damaged";
            Error::new(ErrorCode::Internal, message).caused_by(error)
        })?;
        Ok(self.unpacked.get_or_init(|| bytes))
    }

    /// Its size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The name of its file on a host: the release and the first 16 digits of its BLAKE3.
    pub fn file_name(&self) -> String {
        let release = env!("CARGO_PKG_VERSION");
        format!("agent-{release}-{}", &self.digest[..16])
    }
}

impl std::fmt::Display for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.machine, &self.digest[..16])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_in_comes_out_whole_and_is_for_its_machine() {
        let agents = for_all();
        assert!(
            agents
                .iter()
                .any(|agent| agent.machine == std::env::consts::ARCH)
        );
        for agent in agents {
            let bytes = agent.bytes().unwrap();
            assert_eq!(bytes.len(), agent.size());
            assert_eq!(machine_of(bytes), Some(agent.machine));
            let digest = *blake3::hash(bytes).as_bytes();
            assert_eq!(with_digest(digest).unwrap().machine, agent.machine);
            let name = agent.file_name();
            assert!(name.starts_with("agent-") && !name.contains('/'));
            for machine in agent.machines() {
                assert_eq!(for_machine("hv", machine).unwrap().file_name(), name);
            }
        }
        assert!(with_digest([0; 32]).is_none());
    }

    #[test]
    fn a_foreign_machine_is_named() {
        let error = for_machine("hv", "riscv64").unwrap_err();
        assert_eq!(error.code(), ErrorCode::MissingRequirement);
        assert!(error.to_string().contains("riscv64"));
    }

    #[test]
    fn what_is_no_executable_is_no_agent() {
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        elf.resize(64, 0);
        assert_eq!(machine_of(&elf), None);
        elf[18] = 183;
        assert_eq!(machine_of(&elf), Some("aarch64"));
        elf[5] = 2;
        assert_eq!(machine_of(&elf), None);
        assert_eq!(machine_of(b"#!/bin/sh"), None);
        let error = give(Path::new("/etc/passwd")).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Usage);
    }
}
