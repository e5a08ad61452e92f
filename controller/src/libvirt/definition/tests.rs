//! Definitions read and changed: the fixtures beside this file, and single cases.

use super::*;

const PLAIN: &str = "<domain type='qemu'>\r\n  <name>a &amp; b</name><uuid>a021b7ff-2a93-4cc2-b142-283ca4f1df4a</uuid>\r\n  <metadata><x:m xmlns:x='urn:x'><x:name>n</x:name><disk/></x:m></metadata>\r\n  <memory unit='MiB'>256</memory><vcpu>2</vcpu>\r\n  <os firmware='efi'>\r\n    <type arch='x86_64' machine='q35'>hvm</type>\r\n  </os>\r\n  <devices>\r\n    <disk type='block' device='disk'>\r\n      <source dev=\"/dev/vg/a\"   index='1'/>\r\n      <target dev='vda'/>\r\n    </disk>\r\n    <disk type='file' device='cdrom'>\r\n      <source file='/iso'/>\r\n      <target dev='sda'/>\r\n    </disk>\r\n    <interface type='network'><source network='default' portgroup='p'/></interface>\r\n  </devices>\r\n</domain>";

fn plain() -> Definition {
    Definition::parse(PLAIN.to_owned()).unwrap()
}

#[test]
fn each_edit_changes_its_own_place_only() {
    let cases = [
        (Edit::Name("c<d".into()), "a &amp; b", "c&lt;d"),
        (
            Edit::DiskSource {
                disk: 0,
                source: DiskSource::File("/i/it's".into()),
            },
            "type='block' device='disk'>\r\n      <source dev=\"/dev/vg/a\"",
            "type='file' device='disk'>\r\n      <source file='/i/it&apos;s'",
        ),
        (
            Edit::DiskSource {
                disk: 1,
                source: DiskSource::None,
            },
            "\r\n      <source file='/iso'/>",
            "",
        ),
        (
            Edit::InterfaceSource {
                interface: 0,
                source: InterfaceSource::Bridge("br0".into()),
            },
            "type='network'><source network='default' portgroup='p'",
            "type='bridge'><source bridge='br0'",
        ),
        (
            Edit::Mac {
                interface: 0,
                mac: MacAddress::random_qemu([1, 2, 3]),
            },
            "<source network=",
            "<mac address='52:54:00:01:02:03'/><source network=",
        ),
        (
            Edit::LinkDown { interface: 0 },
            "</interface>",
            "<link state='down'/></interface>",
        ),
        (
            Edit::Nvram("/n".into()),
            "hvm</type>",
            "hvm</type>\r\n    <nvram>/n</nvram>",
        ),
    ];
    for (edit, old, new) in cases {
        let edited = plain().edited(std::slice::from_ref(&edit)).unwrap();
        assert_eq!(edited.text(), PLAIN.replacen(old, new, 1), "{edit:?}");
    }
    assert_eq!(plain().edited(&[]).unwrap().text(), PLAIN);
    assert!(plain().edited(&[Edit::RemoveDisk { disk: 2 }]).is_err());
}

#[test]
fn what_a_guest_says_is_logged_where_it_has_a_serial_port() {
    let log = [Edit::ConsoleLog("/l & m".into())];
    assert!(!plain().has_serial() && plain().edited(&log).is_err());
    let serial = |log: &str| {
        let serial = format!("<serial type='pty'>{log}<target port='0'/></serial></devices>");
        Definition::parse(PLAIN.replacen("</devices>", &serial, 1)).unwrap()
    };
    let expected = serial("<log file='/l &amp; m' append='off'/>");
    for had in ["", "<log file='/other' append='off'/>"] {
        assert!(serial(had).has_serial());
        assert_eq!(serial(had).edited(&log).unwrap().text(), expected.text());
    }
}

#[test]
fn values_are_read_from_their_own_place() {
    let plain = plain();
    assert_eq!(
        (plain.name(), plain.vcpus(), plain.memory_bytes()),
        ("a & b", 2, 256 << 20)
    );
    assert_eq!(plain.disks().len(), 2);
    assert!(
        plain.firmware().auto && plain.disks()[0].source == DiskSource::Block("/dev/vg/a".into())
    );
    assert!("x".parse::<MacAddress>().is_err() && "52:54:00:1:2:FF".parse::<MacAddress>().is_ok());
}

/// Definitions of different ages and machine types, with what other tools and people put in.
fn fixtures() -> Vec<(String, String)> {
    let directory = fixture_directory();
    let mut fixtures: Vec<(String, String)> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "xml"))
        .map(|path| {
            (
                path.file_stem().unwrap().to_str().unwrap().to_owned(),
                std::fs::read_to_string(&path).unwrap(),
            )
        })
        .collect();
    fixtures.sort();
    fixtures
}

fn fixture_directory() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/libvirt/definition/fixtures")
}

/// Everything that a clone may change, changed.
fn clone_edits(definition: &Definition) -> Vec<Edit> {
    let mut edits = vec![
        Edit::Name("new <name> & \"more\"".into()),
        Edit::Uuid(Uuid::from_u128(0xffff_0000)),
    ];
    if definition.has_genid() {
        edits.push(Edit::GenId(Uuid::from_u128(0xeeee_0000)));
    }
    for (interface, _) in (0_u8..).zip(definition.interfaces()) {
        let mac = MacAddress::random_qemu([0xee, 0xee, interface]);
        edits.push(Edit::Mac {
            interface: interface.into(),
            mac,
        });
    }
    for (disk, defined) in definition.disks().iter().enumerate() {
        let is_drive = matches!(defined.device, DiskDevice::Cdrom | DiskDevice::Floppy);
        let source = match defined.source {
            DiskSource::Other(_) | DiskSource::None => continue,
            _ if is_drive => DiskSource::None,
            _ => DiskSource::File(format!("/new/it's \"{disk}\" & <more>")),
        };
        edits.push(Edit::DiskSource { disk, source });
        if defined.has_explicit_chain {
            edits.push(Edit::DropBackingStore { disk });
        }
    }
    if definition.firmware().nvram.is_some() {
        edits.push(Edit::Nvram("/new/vars & more".into()));
    }
    edits
}

/// The lines that differ, found without the editor: `-` only before, `+` only after.
fn changed_lines(before: &str, after: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (
        before.split_inclusive('\n').collect(),
        after.split_inclusive('\n').collect(),
    );
    // The longest common subsequence of the lines, from the end.
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for (i, line) in old.iter().enumerate().rev() {
        for (j, other) in new.iter().enumerate().rev() {
            common[i][j] = if line == other {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, String::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            lines += &format!("-{}\n", old[i].escape_debug());
            i += 1;
        } else {
            lines += &format!("+{}\n", new[j].escape_debug());
            j += 1;
        }
    }
    lines
}

#[test]
fn a_clone_changes_the_lines_that_it_means_to_change_and_no_byte_else() {
    let fixtures = fixtures();
    assert!(fixtures.len() >= 20);
    let mut changes = String::new();
    for (name, text) in fixtures {
        let definition =
            Definition::parse(text.clone()).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!(
            definition.edited(&[]).unwrap().text(),
            text,
            "{name}: nothing edited, nothing changed"
        );
        let edits = clone_edits(&definition);
        let clone = definition
            .edited(&edits)
            .unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!(clone.name(), "new <name> & \"more\"", "{name}");
        assert_eq!(clone.uuid(), Uuid::from_u128(0xffff_0000), "{name}");
        for edit in edits {
            match edit {
                Edit::Mac { interface, mac } => {
                    assert_eq!(clone.interfaces()[interface].mac, Some(mac.to_string()));
                }
                Edit::DiskSource { disk, source } => {
                    assert_eq!(clone.disks()[disk].source, source, "{name}");
                }
                Edit::DropBackingStore { disk } => assert!(!clone.disks()[disk].has_explicit_chain),
                Edit::Nvram(path) => assert_eq!(clone.firmware().nvram, Some(path)),
                _ => {}
            }
        }
        let differences = definition.differences(&clone);
        assert!(differences.is_empty(), "{name}: {differences:?}");
        changes += &format!("== {name}\n{}", changed_lines(&text, clone.text()));
    }
    // Read by a person whenever it changes; KVM_CLONE_BLESS=1 writes it anew.
    let expected = fixture_directory().join("cloned.diff");
    if std::env::var_os("KVM_CLONE_BLESS").is_some() {
        std::fs::write(&expected, &changes).unwrap();
    }
    assert_eq!(
        changes,
        std::fs::read_to_string(&expected).unwrap_or_default()
    );
}

#[test]
fn what_a_clone_must_know_is_found_in_every_kind_of_definition() {
    let of = |wanted: &str| {
        let (_, text) = fixtures()
            .into_iter()
            .find(|(name, _)| name == wanted)
            .unwrap();
        Definition::parse(text).unwrap()
    };
    assert_eq!(of("hostdev").host_devices().len(), 4);
    assert_eq!(of("tpm-passthrough").tpm().unwrap().backend, "passthrough");
    assert_eq!(of("tpm-secret").secrets()[0].used_by, "the TPM");
    assert_eq!(
        of("luks").secrets()[0].id,
        "9f3a1b5c-0000-4000-8000-00000000bbbb"
    );
    assert_eq!(of("network-disks").secrets().len(), 2);
    let sources: Vec<_> = of("network-disks")
        .disks()
        .iter()
        .map(|disk| disk.source.clone())
        .collect();
    assert_eq!(sources[2], DiskSource::Other("nvme".into()));
    assert_eq!(
        of("vhost-user").disks()[0].source,
        DiskSource::Other("vhostuser".into())
    );
    assert_eq!(
        of("vhost-user").interfaces()[0].source,
        InterfaceSource::Other("vhostuser".into())
    );
    assert_eq!(of("virtiofs").shared_directories()[0].source, "/srv/share");
    assert_eq!(of("direct-boot").boot_files().len(), 4);
    assert_eq!(of("direct-boot").memory_bytes(), 512 << 20);
    assert_eq!(of("direct-boot").host_paths()[0].path, "/dev/hwrng");
    assert_eq!(
        of("secure-boot").firmware().nvram.as_deref(),
        Some("/var/lib/libvirt/qemu/nvram/win11_VARS.fd")
    );
    assert!(of("uefi-auto").firmware().auto);
    assert_eq!(of("quoting").name(), "Zürich & Genève <1>");
    assert_eq!(of("cdata").name(), "raw <name> & co");
    assert_eq!(of("comments").name(), "noted");
    assert_eq!(
        of("whitespace").disks()[0].source,
        DiskSource::File("/i/spaced.raw".into())
    );
    assert_eq!(of("metadata").disks().len(), 1);
    assert_eq!(of("many-nics").interfaces()[4].mac, None);
    assert_eq!(of("s390x").memory_bytes(), 1 << 40);
}

#[test]
fn what_differs_is_named_and_what_makes_another_vm_does_not_count() {
    let (_, text) = fixtures()
        .into_iter()
        .find(|(name, _)| name == "uefi-nvram")
        .unwrap();
    let here = Definition::parse(text.clone()).unwrap();
    let controllers = [
        "<controller type='usb' index='0'/>",
        "<controller type='scsi' index='0'/>",
    ];
    let with = |controllers: String| {
        let text = text.replacen("<devices>", &format!("<devices>{controllers}"), 1);
        Definition::parse(text).unwrap()
    };
    let turned = with(controllers.iter().rev().copied().collect());
    assert_eq!(
        with(controllers.concat()).differences(&turned),
        Vec::<String>::new()
    );
    assert_eq!(
        here.differences(&turned).len(),
        6,
        "two, with kind and index"
    );
    let other = text
        .replace("<memory unit='GiB'>2", "<memory unit='GiB'>3")
        .replace("<model type='virtio'/>", "<model type='e1000'/>")
        .replace("<serial>FEDORA01</serial>", "")
        .replace("52:54:00:00:02:01", "52:54:00:00:02:99");
    let lines = here.differences(&Definition::parse(other).unwrap());
    assert_eq!(lines.len(), 3, "{lines:?}");
    for part in [
        "memory[1]: \"2\" here, \"3\" there",
        "model[1]/@type",
        "serial[1]",
    ] {
        assert!(
            lines.iter().any(|line| line.contains(part)),
            "{part} in {lines:?}"
        );
    }
}
