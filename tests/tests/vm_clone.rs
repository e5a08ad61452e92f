//! `clone`: a VM on one hypervisor becomes another VM on another.

use kvm_clone_tests::hypervisor::{Firmware, Site, Vm, mark};
use kvm_clone_tests::image::assert_equal;

/// The value of an attribute or element, taken from XML that the tests wrote themselves.
fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let (_, rest) = text
        .split_once(before)
        .unwrap_or_else(|| panic!("{before} in {text}"));
    rest.split_once(after)
        .unwrap_or_else(|| panic!("{after} in {rest}"))
        .0
}

#[test]
fn a_clone_by_each_method_boots_elsewhere_and_its_source_is_untouched() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::new("web").disks(&[("vda", "raw"), ("vdb", "qcow2")]);
    site.define(&site.a, &vm);
    let before = site.a.state();
    for method in ["blocksync", "rsync", "libvirt"] {
        let name = format!("web-{method}");
        let run = site.controller.run([
            "clone",
            "hvA",
            "hvB",
            "web",
            "--new-name",
            &name,
            "--method",
            method,
        ]);
        let result = run.expect_json();
        assert_eq!(
            (&result["vm"], &result["target_vm"]),
            (&"web".into(), &name.as_str().into()),
            "{run}"
        );
        assert_eq!(
            (&result["method"], &result["route"]),
            (&method.into(), &"direct".into()),
            "{run}"
        );
        assert_eq!(result["disks"].as_array().map(Vec::len), Some(2), "{run}");
        assert_eq!(
            result["bytes_total"],
            result["disks"][0]["bytes_total"].as_u64().unwrap()
                + result["disks"][1]["bytes_total"].as_u64().unwrap()
        );
        assert_eq!(site.a.state(), before, "the source after {run}");
        for (target, format) in [("vda", "raw"), ("vdb", "qcow2")] {
            assert_equal(
                &site.a.image(&vm.file(target)),
                &site.b.image(&format!("{name}-{target}.{format}")),
            );
        }
        let (old, new) = (
            site.a.virsh(&["dumpxml", "web"]),
            site.b.virsh(&["dumpxml", &name]),
        );
        assert_ne!(between(&old, "<uuid>", "<"), between(&new, "<uuid>", "<"));
        assert_ne!(
            between(&old, "<mac address='", "'"),
            between(&new, "<mac address='", "'")
        );
        assert!(new.contains("<mac address='52:54:00:"), "{new}");
        site.a.assert_tidy();
        site.b.assert_tidy();
    }
    for method in ["blocksync", "rsync", "libvirt"] {
        let name = format!("web-{method}");
        // The clone still writes to the console that its source names.
        let console = site.b.boots_with_console(&name, "web");
        let uuid = site.b.virsh(&["domuuid", &name]);
        for line in [
            mark("vda", "web vda"),
            mark("vdb", "web vdb"),
            format!("GUEST uuid {}", uuid.trim()),
        ] {
            assert!(console.contains(&line), "{line} in {console}");
        }
    }
}

#[test]
fn uefi_variables_go_along() {
    let Some(site) = Site::start() else { return };
    for (name, firmware) in [("db", Firmware::Uefi), ("auto", Firmware::UefiAuto)] {
        let vm = Vm::new(name).firmware(firmware);
        site.define(&site.a, &vm);
        site.a.boots(name);
        let clone = format!("{name}2");
        let run = site.controller.run([
            "clone",
            "hvA",
            "hvB",
            name,
            "--new-name",
            &clone,
            "--method",
            "blocksync",
        ]);
        run.expect_code(0);
        let variables = |host: &kvm_clone_tests::hypervisor::Hypervisor, vm: &str| {
            std::fs::read(host.library(&format!("qemu/nvram/{vm}_VARS.fd")))
                .unwrap_or_else(|error| panic!("{vm}: {error}"))
        };
        assert!(
            variables(&site.a, name) == variables(&site.b, &clone),
            "{run}"
        );
        let console = site.b.boots_with_console(&clone, name);
        assert!(
            console.contains("GUEST firmware uefi")
                && console.contains(&mark("vda", &format!("{name} vda"))),
            "{console}"
        );
    }
}
