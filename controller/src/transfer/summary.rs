//! The contents of a disk in one figure: what a transfer has left at its destination, and what a disk
//! holds now, by which the two can be told apart without the source.

use kvm_clone_protocol::digest::{Digest, HashKind, Seed};
use kvm_clone_protocol::message::{Access, Control, Message, Open, Summarize};
use serde::{Deserialize, Serialize};

use super::unexpected;
use crate::endpoint::DiskLocation;
use crate::error::{Error, ErrorCode, Result};
use crate::host::{AgentConnection, Host};

/// The most that an agent warns of before it answers.
const MAX_WARNINGS: usize = 100;

/// The figure, and how it was made (protocol/PROTOCOL.md, section 6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    hash: Hash,
    seed: Hex<32>,
    /// Bytes that it is of.
    size_bytes: u64,
    root: Hex<16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Hash {
    Xxh3,
    Blake3,
}

/// Bytes as lower-case hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
struct Hex<const N: usize>([u8; N]);

impl<const N: usize> From<Hex<N>> for String {
    fn from(hex: Hex<N>) -> Self {
        hex.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl<const N: usize> TryFrom<String> for Hex<N> {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let expected = || format!("expected {} hexadecimal digits", 2 * N);
        if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(expected());
        }
        let mut bytes = [0; N];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = str::from_utf8(digits).map_err(|_| expected())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| expected())?;
        }
        Ok(Self(bytes))
    }
}

impl Summary {
    /// Of a session of this size, hash and seed, on which both agents agreed.
    pub(super) fn new(size_bytes: u64, hash: HashKind, seed: Seed, root: Digest) -> Self {
        let hash = match hash {
            HashKind::Xxh3 => Hash::Xxh3,
            HashKind::Blake3 => Hash::Blake3,
        };
        Self {
            hash,
            seed: Hex(seed.0),
            size_bytes,
            root: Hex(root.0),
        }
    }

    /// Whether a disk of this host, all of which is read for it, has these contents.
    ///
    /// # Errors
    /// When the host cannot be reached, or the disk cannot be read.
    pub async fn is_of(&self, on: &Host, disk: &DiskLocation) -> Result<bool> {
        let mut agent = on.start_agent().await?;
        let root = self.root(&mut agent, disk).await;
        agent.close().await;
        Ok(root?.0 == self.root.0)
    }

    async fn root(&self, agent: &mut AgentConnection, disk: &DiskLocation) -> Result<Digest> {
        let open = Open {
            disk: 0,
            location: disk.on_wire(),
            access: Access::Compare,
        };
        match ask(agent, &open).await? {
            Control::Opened(opened) if opened.disk == 0 => {}
            answer => return Err(unexpected("open", &answer)),
        }
        let wanted = Summarize {
            disk: 0,
            size: self.size_bytes,
            hash: match self.hash {
                Hash::Xxh3 => HashKind::Xxh3,
                Hash::Blake3 => HashKind::Blake3,
            },
            seed: Seed(self.seed.0),
        };
        match ask(agent, &wanted).await? {
            Control::Summary(summary) if summary.disk == 0 => Ok(summary.root),
            answer => Err(unexpected("summarize", &answer)),
        }
    }
}

/// Asks an agent, and leaves aside what it warns of.
async fn ask<M: Message>(agent: &mut AgentConnection, message: &M) -> Result<Control> {
    agent.send(message).await?;
    for _ in 0..MAX_WARNINGS {
        match agent.next().await? {
            Control::Warning(_) => {}
            Control::Failed(failed) => return Err(failed.into()),
            answer => return Ok(answer),
        }
    }
    let message = "an agent warns without end";
    Err(Error::new(ErrorCode::Protocol, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written_and_not_otherwise() {
        let summary = Summary::new(65_537, HashKind::Xxh3, Seed([0xab; 32]), Digest([7; 16]));
        let json = serde_json::to_string(&summary).unwrap();
        assert!(json.contains(r#""hash":"xxh3""#) && json.contains(&"ab".repeat(32)));
        assert_eq!(serde_json::from_str::<Summary>(&json).unwrap(), summary);
        for wrong in ["ab", "ä", "zz"] {
            let json = json.replace(&"ab".repeat(32), &wrong.repeat(31));
            assert!(serde_json::from_str::<Summary>(&json).is_err(), "{wrong}");
        }
    }
}
