//! Builds the static agent for the machine that the controller is for, packs it, with those for other
//! machines that the environment names, and leaves what `agent_binary` takes in.

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machines that have agents, as Rust and `uname -m` name them, and the variable that names a file
/// with the agent for one.
const MACHINES: [(&str, &str); 2] = [
    ("x86_64", "KVM_CLONE_AGENT_X86_64"),
    ("aarch64", "KVM_CLONE_AGENT_AARCH64"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for path in [
        "build.rs",
        "../agent",
        "../protocol",
        "../Cargo.toml",
        "../Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    let own = env::var("CARGO_CFG_TARGET_ARCH")?;
    let mut agents = String::new();
    for (machine, variable) in MACHINES {
        println!("cargo::rerun-if-env-changed={variable}");
        let agent = match env::var_os(variable).filter(|path| !path.is_empty()) {
            Some(path) => {
                println!("cargo::rerun-if-changed={}", Path::new(&path).display());
                PathBuf::from(path)
            }
            None if machine == own => build(&agent_target_dir(&out), machine)?,
            None => continue,
        };
        let bytes =
            fs::read(&agent).map_err(|error| format!("reading {}: {error}", agent.display()))?;
        let packed = out.join(format!("agent-{machine}.zst"));
        // Level 19 takes two seconds and saves a quarter of level 3; the agent is built seldom.
        fs::write(&packed, zstd::bulk::compress(&bytes, 19)?)?;
        let (size, digest) = (bytes.len(), blake3::hash(&bytes).to_hex());
        writeln!(
            agents,
            "    Agent::packed({machine:?}, {size}, {:?}, include_bytes!({packed:?})),",
            digest.as_str()
        )?;
    }
    let carried = format!("fn carried() -> Vec<Agent> {{\n    vec![\n{agents}    ]\n}}\n");
    fs::write(out.join("agents.rs"), carried)?;
    Ok(())
}

/// `target/agent`, beside the profiles of the outer build, so that all of them share one agent:
/// building it takes a minute. (`OUT_DIR` is `target/PROFILE/build/PACKAGE/out`.)
fn agent_target_dir(out: &Path) -> PathBuf {
    let target = out.ancestors().nth(4);
    target.map_or_else(|| out.join("agent"), |target| target.join("agent"))
}

/// A build of its own: another profile, another target, and linked statically. It has its own
/// target directory, because the one of the outer build is locked.
fn build(target_dir: &Path, machine: &str) -> Result<PathBuf, Box<dyn Error>> {
    let target = format!("{machine}-unknown-linux-gnu");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([
        "build",
        "--profile",
        "agent",
        "-p",
        "kvm-clone-agent",
        "--target",
        target.as_str(),
    ]);
    cargo.arg("--target-dir").arg(target_dir);
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        if is_of_the_outer_build(name) {
            cargo.env_remove(name);
        }
    }
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    let output = cargo
        .output()
        .map_err(|error| format!("running cargo for the agent: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "the agent does not build:\n{}",
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    Ok(target_dir.join(target).join("agent/kvm-clone-agent"))
}

/// Settings that are meant for the controller: the flags and wrappers of clippy or a coverage
/// run, the outer target directory, and what cargo tells a build script.
fn is_of_the_outer_build(name: &str) -> bool {
    const EXACT: [&str; 8] = [
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "CLIPPY_ARGS",
        "CLIPPY_CONF_DIR",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTDOCFLAGS",
        "TARGET",
        "PROFILE",
    ];
    let wrapper_of_clippy = name == "RUSTC_WRAPPER"
        && env::var("RUSTC_WRAPPER").is_ok_and(|wrapper| wrapper.contains("clippy"));
    EXACT.contains(&name)
        || wrapper_of_clippy
        || [
            "CARGO_BUILD_",
            "CARGO_CFG_",
            "CARGO_FEATURE_",
            "CARGO_PROFILE_",
            "CARGO_TARGET_",
            "LLVM_PROFILE_",
        ]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}
