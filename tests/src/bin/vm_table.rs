//! Measures `clone` and `sync` of a VM by each method, in one run, between the two hypervisors of
//! the tests, and prints a table:
//!
//! ```console
//! # cargo build --release --bin kvm-clone-ctl
//! # KVM_CLONE_CTL=target/release/kvm-clone-ctl cargo run --release -p kvm-clone-tests --bin vm_table
//! ```
//!
//! The VM has a disk of 64 MiB and one of 2 GiB, half of it data. Times are those of the results.

#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "the table is what this program is for")]

use kvm_clone_tests::hypervisor::{Site, SiteSpec, Vm};
use kvm_clone_tests::image::{self, MIB, Piece};
use serde_json::Value;

/// The disk that is copied, besides the one that boots.
const DISK: [Piece; 4] = [
    Piece::Random(1, 512 * MIB),
    Piece::Hole(512 * MIB),
    Piece::Random(2, 512 * MIB),
    Piece::Hole(512 * MIB),
];

fn main() {
    let spec = SiteSpec {
        images_bytes: 32 * 1024 * MIB,
        ..SiteSpec::default()
    };
    let Some(site) = Site::with(&spec) else {
        return;
    };
    let vm = Vm::new("web").disks(&[("vda", "raw"), ("vdb", "raw")]);
    site.define(&site.a, &vm);
    let disk = site.a.image(&vm.file("vdb"));
    image::write(&disk, &DISK);
    println!("| method | operation | seconds | changed MiB | on the wire MiB |");
    println!("| --- | --- | --- | --- | --- |");
    // Another seed each, so that each finds other bytes than the one before has left.
    for (method, seed) in ["blocksync", "rsync", "libvirt"].into_iter().zip(7..) {
        let name = format!("web-{method}");
        let run = |operation: &str, words: &[&str]| {
            let words = [&[operation, "hvA", "hvB", "web", "--method", method], words].concat();
            let result = site.controller.run(words).expect_json();
            println!("{}", row(method, operation, &result));
        };
        run("clone", &["--new-name", &name]);
        run("sync", &["--target-name", &name]);
        let changed = image::change_blocks(&disk, 100, seed);
        run("sync", &["--target-name", &name]);
        println!(
            "<!-- {} MiB of blocks were changed before the last one -->",
            changed / MIB
        );
    }
}

fn row(method: &str, operation: &str, result: &Value) -> String {
    let mib = |field: &str| {
        let bytes = result[field].as_u64();
        bytes.map_or_else(|| "unknown".to_owned(), |bytes| (bytes / MIB).to_string())
    };
    let seconds = result["duration_seconds"].as_f64().unwrap_or_default();
    format!(
        "| {method} | {operation} | {seconds:.1} | {} | {} |",
        mib("bytes_changed"),
        mib("bytes_wire")
    )
}
