//! The controller of kvm-clone-ctl, as a library for its program and its tests.

#![forbid(unsafe_code)]

pub mod agent_binary;
pub mod cli;
pub mod config;
pub mod endpoint;
pub mod error;
pub mod history;
pub mod host;
pub mod libvirt;
mod logging;
pub mod output;
pub mod progress;
pub mod replicate;
pub mod store;
pub mod transfer;
pub mod vm;
