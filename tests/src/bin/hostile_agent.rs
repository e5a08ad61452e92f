//! An agent that lies to its controller: `hostile_agent STORY PROGRAM serve`, or `attach NAME`, with
//! a story of `kvm_clone_tests::hostile::lies` and the program of the real agent behind it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use kvm_clone_tests::hostile::{lies, mask};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [story, program, args @ ..] = args.as_slice() else {
        panic!("a story and a program are missing");
    };
    let stories = [lies::all(), lies::harmless(), lies::silences()].concat();
    let lie = stories.into_iter().find(|lie| lie.name == story);
    let lie = lie.unwrap_or_else(|| panic!("there is no story \"{story}\""));
    mask::play(lie.side, lie.when, lie.does, program, args)
}
