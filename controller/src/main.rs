//! The program: a command line, a runtime, an exit status.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    kvm_clone_ctl::cli::main()
}
