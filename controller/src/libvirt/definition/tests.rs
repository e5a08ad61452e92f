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
