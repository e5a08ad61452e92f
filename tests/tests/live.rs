//! A VM that runs and writes all the time: its copy is one instant of all of its disks.

use kvm_clone_tests::hypervisor::{Site, Vm, records};

/// Claims that a copy is one instant: all that was written to the second disk is on the first, and
/// at most one record more. Gives back how many records there are.
fn assert_instant(site: &Site, name: &str, formats: [&str; 2]) -> u64 {
    let [a, b] = [("vdb", formats[0]), ("vdc", formats[1])].map(|(target, format)| {
        let copy = site.b.image(&format!("{name}-{target}.{format}"));
        records(&copy, format).unwrap_or_else(|wrong| panic!("{}: {wrong}", copy.display()))
    });
    assert!(
        a == b || a == b + 1,
        "{a} records on the first disk, {b} on the second"
    );
    a
}

#[test]
fn a_vm_that_writes_is_copied_as_it_is_at_one_instant() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::that_writes("busy", ["qcow2", "raw", "qcow2"]);
    site.define(&site.a, &vm);
    site.a.start_writing("busy");
    let began = site.a.console("busy").len();
    let clone = site.controller.run(["clone", "hvA", "hvB", "busy"]);
    eprintln!("{clone}");
    let mut last = assert_instant(&site, "busy", ["raw", "qcow2"]);
    site.a.assert_tidy();
    site.b.assert_tidy();
    for _ in 0..2 {
        let sync = site.controller.run(["sync", "hvA", "hvB", "busy"]);
        eprintln!("{sync}");
        let now = assert_instant(&site, "busy", ["raw", "qcow2"]);
        assert!(now > last);
        last = now;
    }
    eprintln!("{:?}", site.a.pauses("busy", began));
    site.a.assert_tidy();
    site.b.assert_tidy();
}
