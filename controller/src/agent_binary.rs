//! The agent that this program carries: `build.rs` built it and packed it.

use std::sync::OnceLock;

use crate::error::{Error, ErrorCode, Result};

static PACKED: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent.zst"));

/// The machine that it runs on, as `uname -m` names it.
const ARCHITECTURE: &str = "x86_64";

/// The executable.
///
/// # Errors
/// Internal, when what was built in cannot be unpacked.
pub fn bytes() -> Result<&'static [u8]> {
    static UNPACKED: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(bytes) = UNPACKED.get() {
        return Ok(bytes);
    }
    let bytes = zstd::bulk::decompress(PACKED, size()).map_err(|error| {
        Error::new(
            ErrorCode::Internal,
            "the agent inside this program is damaged",
        )
        .caused_by(error)
    })?;
    Ok(UNPACKED.get_or_init(|| bytes))
}

/// Its size in bytes.
pub fn size() -> usize {
    env!("KVM_CLONE_AGENT_SIZE")
        .parse()
        .expect("build.rs writes a number")
}

/// Its BLAKE3.
pub fn digest() -> [u8; 32] {
    *blake3::Hash::from_hex(digest_hex())
        .expect("build.rs writes a BLAKE3 in hexadecimal")
        .as_bytes()
}

fn digest_hex() -> &'static str {
    env!("KVM_CLONE_AGENT_BLAKE3")
}

/// The name of its file on a host: the release and the first 16 digits of its BLAKE3.
pub fn file_name() -> String {
    format!(
        "agent-{}-{}",
        env!("CARGO_PKG_VERSION"),
        &digest_hex()[..16]
    )
}

/// Makes sure that it runs on a machine of this kind.
///
/// # Errors
/// Missing requirement, naming the machine.
pub fn check_architecture(host: &str, machine: &str) -> Result<()> {
    if supports(machine) {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::MissingRequirement,
        format!("{host} is a {machine} machine, and this program carries an agent for {ARCHITECTURE} only"),
    )
    .hint("build the agent for that machine, copy it there, and name it with --agent-path"))
}

/// Whether it runs on a machine of this kind.
pub fn supports(machine: &str) -> bool {
    [ARCHITECTURE, "amd64"].contains(&machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_in_comes_out_whole() {
        let bytes = bytes().unwrap();
        assert_eq!(bytes.len(), size());
        assert_eq!(*blake3::hash(bytes).as_bytes(), digest());
        assert!(file_name().starts_with("agent-") && !file_name().contains('/'));
    }

    #[test]
    fn a_foreign_machine_is_named() {
        assert!(check_architecture("hv", "amd64").is_ok());
        let error = check_architecture("hv", "riscv64").unwrap_err();
        assert_eq!(error.code(), ErrorCode::MissingRequirement);
        assert!(error.to_string().contains("riscv64"));
    }
}
