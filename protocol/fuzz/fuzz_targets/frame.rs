//! See `kvm_clone_protocol::fuzzing::frame`.

#![no_main]

use kvm_clone_protocol::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzzing::frame(data));
