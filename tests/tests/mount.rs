//! `replicate mount`: files of a point, read where the point is.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use kvm_clone_tests::hypervisor::Vm;
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::process::{tool, wait_for};
use kvm_clone_tests::replication::Replication;
use nix::sys::signal::Signal;

const PATIENCE: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;

/// A disk with one partition, from 1 MiB on, and ext4 there.
fn make_partition(disk: &Path) {
    let file = File::create(disk).unwrap();
    file.set_len(16 * MIB).unwrap();
    let sectors = |bytes: u64| u32::try_from(bytes / 512).unwrap().to_le_bytes();
    let entry = [
        &[0, 0, 0, 0, 0x83, 0, 0, 0],
        &sectors(MIB)[..],
        &sectors(12 * MIB),
    ]
    .concat();
    file.write_all_at(&entry, 446).unwrap();
    file.write_all_at(&[0x55, 0xaa], 510).unwrap();
    let words = format!("-q -F -E offset={MIB} {} 12M", disk.display());
    tool("mkfs.ext4", words.split(' '));
}

fn write_file(disk: &Path, directory: &Path, contents: &str) {
    let file = directory.join("note");
    std::fs::write(&file, contents).unwrap();
    let image = format!("{}?offset={MIB}", disk.display());
    let _ = tool("debugfs", ["-w", "-R", "rm note", &image]);
    let write = format!("write {} note", file.display());
    tool("debugfs", ["-w", "-R", &write, &image]);
}

#[test]
fn files_of_an_older_point_are_read_on_its_host_until_somebody_says_stop() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let policy = "vms = [\"web\"]\nevery = \"1m\"\nrpo = \"5m\"\n";
        let Some(shop) = Replication::start([Kind::Ext4, kind], policy) else {
            return;
        };
        let (a, b) = (&shop.site.a, &shop.site.b);
        let web = Vm::new("web").disks(&[("vda", "raw"), ("vdb", "raw")]);
        shop.site.define(a, &web);
        let disk = a.image("web-vdb.raw");
        make_partition(&disk);
        for contents in ["one", "two"] {
            write_file(&disk, shop.site.controller.home(), contents);
            shop.run(&["run", "shop"]).expect_code(0);
        }
        let first = shop.points("web").remove(0);
        let first = first.rsplit('/').next().unwrap();
        let place = format!("/run/kvm-clone/points/web-{first}");
        let mount = ["mount", "shop", "web", "--point", first];
        let running = shop.start_run(&mount);
        let note = format!("{place}/vdb1/note");
        let found = wait_for("the file", PATIENCE, || {
            let read = b.exec(&["cat", &note]);
            read.status.success().then_some(read.stdout)
        });
        assert_eq!(found, b"one");
        let denied = b.exec(&["touch", &note]);
        assert!(!denied.status.success());
        b.run(&[
            "cmp",
            &format!("{place}/vda.raw"),
            &format!("{place}/vda.raw"),
        ]);
        // Nobody else has it meanwhile, and no run changes what it stands on.
        let again = shop.run(&mount);
        again.expect_code(5);
        let why = match kind {
            Kind::Ext4 => "reads a point",
            _ => "is there already",
        };
        assert!(again.stderr.contains(why), "{again}");
        running.interrupt();
        let ended = running.wait();
        ended.expect_code(0);
        let said = ended.json();
        assert_eq!(said["point"], first, "{ended}");
        let mut found = said["file_systems"].as_array().unwrap().iter();
        let ours = found.find(|found| found["name"] == "vdb1").unwrap();
        assert_eq!(ours["kind"], "ext4", "{ended}");
        let gone = || {
            let left = b.run(&["ls", "/run/kvm-clone/points"]);
            left.trim().is_empty().then_some(())
        };
        wait_for("the end of it", PATIENCE, gone);
        shop.run(&["run", "shop"]).expect_code(0);
        // One that is killed leaves nothing either.
        let killed = shop.start_run(&mount);
        wait_for("the file", PATIENCE, || {
            b.exec(&["cat", &note]).status.success().then_some(())
        });
        killed.signal(Signal::SIGKILL);
        drop(killed);
        wait_for("the end of it", PATIENCE, gone);
        b.assert_tidy();
    }
}
