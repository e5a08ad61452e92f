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

#[test]
fn every_obstacle_is_told_in_one_report_and_nothing_is_changed() {
    let Some(site) = Site::start() else { return };
    let everything = "\
        <disk type='network' device='disk'><source protocol='nbd' name='x'><host name='h'/></source><target dev='vdc' bus='virtio'/></disk>\
        <disk type='file' device='disk'><driver type='raw'/><source file='/var/lib/libvirt/images/shared.raw'/><target dev='vdd' bus='virtio'/><shareable/></disk>\
        <disk type='block' device='disk'><driver type='raw'/><source dev='/dev/loop-of-odd'/><target dev='vde' bus='virtio'/></disk>\
        <disk type='file' device='disk'><driver type='raw'/><source file='/var/lib/libvirt/images/luks.raw'><encryption format='luks'><secret type='passphrase' uuid='5f1a0f1e-0000-4000-8000-000000000001'/></encryption></source><target dev='vdf' bus='virtio'/></disk>\
        <hostdev mode='subsystem' type='pci' managed='yes'><source><address domain='0' bus='0x7f' slot='0x1f' function='7'/></source></hostdev>\
        <interface type='bridge'><source bridge='br9'/></interface>\
        <interface type='network'><source network='nowhere'/></interface>\
        <interface type='vhostuser'><source type='unix' path='/run/vhost.sock' mode='server'/><model type='virtio'/></interface>\
        <filesystem type='mount'><source dir='/root/only-here'/><target dir='share'/></filesystem>";
    let vm = Vm::new("odd")
        .os("<kernel>/var/lib/libvirt/boot/vmlinuz</kernel><initrd>/var/lib/libvirt/boot/initrd</initrd>")
        .devices(everything);
    std::fs::write(site.a.image("shared.raw"), [7; 65536]).unwrap();
    std::fs::write(site.a.image("luks.raw"), [8; 65536]).unwrap();
    std::fs::copy(site.guest.kernel(), site.a.library("boot/vmlinuz")).unwrap();
    std::fs::copy(site.guest.initrd(), site.a.library("boot/initrd")).unwrap();
    site.a.run(&["mkdir", "-p", "/root/only-here"]);
    site.a.run(&[
        "sh",
        "-c",
        "truncate -s 1M /tmp/backing; ln -sf $(losetup -f --show /tmp/backing) /dev/loop-of-odd",
    ]);
    let define = vm
        .xml()
        .replace("<memory unit='MiB'>256", "<memory unit='TiB'>7");
    vm_disks_and(&site, &vm, &define);
    site.define(&site.b, &Vm::new("taken"));
    let (here, there) = (site.a.state(), site.b.state());
    let run = site.controller.run([
        "clone",
        "hvA",
        "hvB",
        "odd",
        "--new-name",
        "taken",
        "--method",
        "blocksync",
    ]);
    site.a.run(&[
        "sh",
        "-c",
        "losetup -d $(readlink /dev/loop-of-odd); rm /dev/loop-of-odd",
    ]);
    let message = run.expect_failure(5, &["refused"], "obstacles");
    for part in [
        "a VM taken already",
        "disk vdc of odd is of type network",
        "disk vdd of odd is shared",
        "disk vde is the block device",
        "5f1a0f1e-0000-4000-8000-000000000001",
        "type pci",
        "no bridge br9",
        "no network nowhere",
        "vhost-user",
        "/root/only-here",
        "/var/lib/libvirt/boot/vmlinuz, the kernel of odd",
        "/var/lib/libvirt/boot/initrd, the initrd of odd",
        "of memory",
    ] {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
    assert_eq!(
        run.json()["obstacles"].as_array().map(Vec::len),
        Some(13),
        "{run}"
    );
    assert_eq!((site.a.state(), site.b.state()), (here, there), "{run}");
}

/// Makes a VM's disks, and defines it by other XML than its own.
fn vm_disks_and(site: &Site, vm: &Vm, xml: &str) {
    site.define(&site.a, vm);
    site.a.virsh(&["undefine", "odd"]);
    site.a.define(xml);
}

#[test]
fn what_the_destination_lacks_is_exit_8_and_can_be_carried_or_mapped() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::new("net")
        .os("<kernel>/var/lib/libvirt/boot/vmlinuz</kernel><initrd>/var/lib/libvirt/boot/initrd</initrd><cmdline>console=ttyS0 loglevel=3 mitigations=off</cmdline>")
        .devices("<interface type='bridge'><source bridge='br7'/><model type='virtio'/></interface>\
                  <disk type='file' device='cdrom'><driver type='raw'/><source file='/var/lib/libvirt/boot/a.iso'/><target dev='sda' bus='sata'/><readonly/></disk>");
    std::fs::copy(site.guest.kernel(), site.a.library("boot/vmlinuz")).unwrap();
    std::fs::copy(site.guest.initrd(), site.a.library("boot/initrd")).unwrap();
    std::fs::write(site.a.library("boot/a.iso"), vec![9; 200_000]).unwrap();
    site.a.run(&["ip", "link", "add", "br7", "type", "bridge"]);
    site.define(&site.a, &vm);
    let there = site.b.state();
    let clone = |options: &[&str]| {
        let words = [
            "clone",
            "hvA",
            "hvB",
            "net",
            "--new-name",
            "n2",
            "--method",
            "blocksync",
        ];
        site.controller.run(words.iter().chain(options))
    };
    let message = clone(&[]).expect_failure(8, &["missing_requirement"], "3 obstacles");
    assert!(
        message.contains("br7") && message.contains("vmlinuz"),
        "{message}"
    );
    let dry = clone(&["--dry-run", "--with-boot-files", "--network-map", "br7=br0"]);
    assert_eq!(
        dry.expect_json()["plan"]["files"].as_array().map(Vec::len),
        Some(4),
        "{dry}"
    );
    assert_eq!(site.b.state(), there, "a dry run changes nothing");
    let run = clone(&["--with-boot-files", "--network-map", "br7=br0", "--start"]);
    run.expect_code(0);
    assert_eq!(site.b.virsh(&["domstate", "n2"]).trim(), "running");
    site.b.virsh(&["destroy", "n2"]);
    let console = site.b.boots_with_console("n2", "net");
    assert!(console.contains(&mark("vda", "net vda")), "{console}");
    let without =
        site.controller
            .run(["clone", "hvB", "hvA", "n2", "--new-name", "n3", "--dry-run"]);
    without.expect_code(0);
    site.b.assert_tidy();
}

#[test]
fn a_clone_that_is_killed_leaves_no_vm_and_is_taken_up_by_the_same_command() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::new("big").disks(&[("vda", "raw"), ("vdb", "raw")]);
    site.define(&site.a, &vm);
    let before = site.b.image_names();
    for method in ["blocksync", "rsync"] {
        let name = format!("big-{method}");
        let words = [
            "clone",
            "hvA",
            "hvB",
            "big",
            "--new-name",
            &name,
            "--method",
            method,
        ];
        let limited = words.iter().chain(&["--bandwidth-limit", "4M"]);
        let running = site.controller.start(limited);
        let partial = format!(".{name}-vdb.raw.kc-new");
        kvm_clone_tests::process::wait_for(
            "data on the way",
            std::time::Duration::from_secs(60),
            || {
                let arrived = std::fs::metadata(site.b.image(&partial)).ok()?;
                use std::os::unix::fs::MetadataExt as _;
                (arrived.blocks() > 4096).then_some(())
            },
        );
        running.signal(nix::sys::signal::Signal::SIGKILL);
        drop(running);
        let defined = site.b.virsh(&["list", "--all", "--name"]);
        assert!(!defined.lines().any(|line| line == name), "no half VM");
        let run = site.controller.run(words);
        let result = run.expect_json();
        assert_eq!(result["resumed"], true, "{run}");
        for target in ["vda", "vdb"] {
            assert_equal(
                &site.a.image(&vm.file(target)),
                &site.b.image(&format!("{name}-{target}.raw")),
            );
        }
        site.a.assert_tidy();
        site.b.assert_tidy();
        assert_eq!(
            site.b
                .virsh(&["list", "--all", "--name"])
                .lines()
                .filter(|line| *line == name)
                .count(),
            1
        );
        let made = site.b.image_names().len() - before.len();
        assert_eq!(
            made % 2,
            0,
            "two disks a clone, and nothing else: {:?}",
            site.b.image_names()
        );
        let uuid = result["plan"]["uuid"].as_str().unwrap().to_owned();
        assert_eq!(site.b.virsh(&["domuuid", &name]).trim(), uuid);
    }
}

#[test]
fn a_clone_that_is_stopped_by_the_user_removes_what_it_made() {
    let Some(site) = Site::start() else { return };
    site.define(&site.a, &Vm::new("big"));
    for (options, left) in [(&[][..], 0), (&["--keep-partial"], 1)] {
        let words = [
            "clone",
            "hvA",
            "hvB",
            "big",
            "--new-name",
            "b2",
            "--method",
            "blocksync",
            "--bandwidth-limit",
            "2M",
        ];
        let running = site.controller.start(words.iter().chain(options));
        let partial = site.b.image(".b2-vda.raw.kc-new");
        let appeared = || {
            use std::os::unix::fs::MetadataExt as _;
            let arrived = std::fs::metadata(&partial).ok()?;
            (arrived.blocks() > 2048).then_some(())
        };
        kvm_clone_tests::process::wait_for(
            "the copy begins",
            std::time::Duration::from_secs(60),
            appeared,
        );
        running.interrupt();
        let run = running.wait();
        run.expect_failure(130, &["cancelled"], "stopped by the user");
        assert_eq!(site.b.image_names().len(), left, "{run}");
    }
    let resumed = site.controller.run([
        "clone",
        "hvA",
        "hvB",
        "big",
        "--new-name",
        "b2",
        "--method",
        "blocksync",
    ]);
    assert_eq!(resumed.expect_json()["resumed"], true, "{resumed}");
    site.a.assert_tidy();
    site.b.assert_tidy();
}

#[test]
fn force_replaces_a_vm_that_is_off_and_its_disks_go_last() {
    let Some(site) = Site::start() else { return };
    site.define(&site.a, &Vm::new("app"));
    let old = Vm::new("app").disks(&[("vda", "qcow2")]);
    site.define(&site.b, &old);
    let clone = |options: &[&str]| {
        site.controller.run(
            ["clone", "hvA", "hvB", "app", "--method", "blocksync"]
                .iter()
                .chain(options),
        )
    };
    clone(&[]).expect_failure(5, &["refused"], "a VM app already");
    let uuid = site.b.virsh(&["domuuid", "app"]);
    site.b.virsh(&["start", "app"]);
    let there = site.b.virsh(&["dumpxml", "app"]);
    clone(&["--force"]).expect_failure(5, &["refused"], "running");
    assert_eq!(site.b.virsh(&["dumpxml", "app"]), there);
    site.b.virsh(&["destroy", "app"]);
    clone(&["--force"]).expect_code(0);
    assert_ne!(site.b.virsh(&["domuuid", "app"]), uuid);
    assert_eq!(site.b.image_names(), ["app-vda.raw"]);
    site.b.assert_tidy();
}

#[test]
fn chains_are_carried_whole_or_flattened() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::new("lay").disks(&[("vda", "qcow2")]);
    site.define(&site.a, &vm);
    site.a.run(&[
        "sh",
        "-c",
        "cd /var/lib/libvirt/images; mv lay-vda.qcow2 base.qcow2; \
        qemu-img create -q -f qcow2 -F qcow2 -b /var/lib/libvirt/images/base.qcow2 lay-vda.qcow2; \
        qemu-io -c 'write -q -P 7 1M 64k' lay-vda.qcow2",
    ]);
    // Something has the name of the lower image already.
    std::fs::write(site.b.image("l2-base.qcow2"), b"other").unwrap();
    for (name, options) in [("l2", &[][..]), ("l3", &["--flatten"])] {
        let words = [
            "clone",
            "hvA",
            "hvB",
            "lay",
            "--new-name",
            name,
            "--method",
            "blocksync",
        ];
        site.controller
            .run(words.iter().chain(options))
            .expect_code(0);
        let file = format!("/var/lib/libvirt/images/{name}-vda.qcow2");
        let info = site.b.run(&["qemu-img", "info", "--backing-chain", &file]);
        assert_eq!(info.contains("l2-base-1.qcow2"), name == "l2", "{info}");
        site.a.run(&[
            "qemu-img",
            "convert",
            "-O",
            "raw",
            "/var/lib/libvirt/images/lay-vda.qcow2",
            "/tmp/a.raw",
        ]);
        site.b
            .run(&["qemu-img", "convert", "-O", "raw", &file, "/tmp/b.raw"]);
        assert_eq!(
            site.a.run(&["md5sum", "/tmp/a.raw"])[..32],
            site.b.run(&["md5sum", "/tmp/b.raw"])[..32]
        );
    }
    assert_eq!(site.b.image_names().len(), 4, "{:?}", site.b.image_names());
    site.controller
        .run(["verify", "hvA", "hvB", "lay", "--target-name", "l2"])
        .expect_code(0);
}

#[test]
fn what_the_destination_cannot_run_or_hold_is_found_before_a_byte_moves() {
    let Some(site) = Site::start() else { return };
    let vm = Vm::new("alien").disks(&[("vda", "raw"), ("vdb", "raw")]).devices(
        "<disk type='nvme' device='disk'><driver name='qemu' type='raw'/><source type='pci' managed='yes' namespace='1'><address domain='0' bus='1' slot='0' function='0'/></source><target dev='vdc' bus='virtio'/></disk>\
         <disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/><source type='unix' path='/run/blk.sock'/><target dev='vdd' bus='virtio'/></disk>",
    );
    site.define(
        &site.a,
        &Vm::new("alien").disks(&[("vda", "raw"), ("vdb", "raw")]),
    );
    site.a.virsh(&["undefine", "alien"]);
    // libvirt checks a definition that it is given, and believes one that it finds.
    let xml = vm
        .xml()
        .replace(
            "<memory",
            "<uuid>5f1a0f1e-0000-4000-8000-0000000000aa</uuid><memory",
        )
        .replace("machine='q35'", "machine='pc-q35-99.9'")
        .replace("<model>qemu64</model>", "<model>Colossus</model>");
    site.a.define_unchecked("alien", &xml);
    site.b
        .run(&["fallocate", "-l", "1900M", "/var/lib/libvirt/images/full"]);
    let there = site.b.state();
    let clone = |options: &[&str]| {
        let words = [
            "clone",
            "hvA",
            "hvB",
            "alien",
            "--new-name",
            "a2",
            "--method",
            "blocksync",
        ];
        site.controller.run(words.iter().chain(options))
    };
    let message = clone(&[]).expect_failure(5, &["refused"], "obstacles");
    for part in [
        "vdc of alien is of type nvme",
        "vdd of alien is of type vhostuser",
        "machine type pc-q35-99.9",
        "are needed",
    ] {
        assert!(message.contains(part), "{part:?} is not in {message}");
    }
    let excluded = ["--exclude-disk", "vdc", "--exclude-disk", "vdd"];
    let lacks = clone(&excluded);
    lacks.expect_failure(8, &["missing_requirement"], "2 obstacles");
    site.a
        .define_unchecked("alien", &xml.replace("pc-q35-99.9", "q35"));
    let model = clone(&excluded).expect_failure(8, &["missing_requirement"], "CPU model Colossus");
    assert!(model.contains("are needed"), "{model}");
    // This machine has no network file system, so a stat that speaks of one stands in for it.
    site.a.run(&[
        "sh",
        "-c",
        "cp /usr/bin/stat /tmp/stat.real; \
         printf '#!/bin/sh\\ncase \"$*\" in -f*images*) echo 1 1 1 nfs;; *) exec /tmp/stat.real \"$@\";; esac\\n' >/tmp/stat; \
         chmod +x /tmp/stat; mount --bind /tmp/stat /usr/bin/stat",
    ]);
    let shared = clone(&excluded).expect_failure(5, &["refused"], "shared storage (nfs)");
    assert!(shared.contains("disk vdb"), "{shared}");
    assert_eq!(site.b.state(), there);
    clone(&["--exclude-disk", "vdx"]).expect_failure(4, &["not_found"], "vdx");
}
