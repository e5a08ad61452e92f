//! The site itself: hypervisors are what the other tests take them for.

use kvm_clone_tests::hypervisor::{Firmware, Site, Vm, mark};

#[test]
fn guests_boot_by_each_firmware_and_say_what_their_disks_hold() {
    let Some(site) = Site::start() else { return };
    for (name, firmware, said) in [
        ("web", Firmware::Bios, "bios"),
        ("db", Firmware::Uefi, "uefi"),
    ] {
        let vm = Vm::new(name)
            .firmware(firmware)
            .disks(&[("vda", "raw"), ("vdb", "qcow2")]);
        site.define(&site.a, &vm);
        let console = site.a.boots(name);
        for line in [
            format!("GUEST firmware {said}"),
            mark("vda", &format!("{name} vda")),
            mark("vdb", &format!("{name} vdb")),
        ] {
            assert!(console.contains(&line), "{line} in {console}");
        }
    }
    assert!(
        !site.b.virsh(&["list", "--all", "--name"]).contains("web"),
        "the hosts are apart"
    );
}
