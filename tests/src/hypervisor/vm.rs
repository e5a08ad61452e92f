//! VMs for the tests: a disk that boots, perhaps one with data, a network card, a serial console
//! that is a file.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::guest::{Guest, set_mark};
use super::site::Hypervisor;
use crate::process::tool;

/// What starts the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// `SeaBIOS`.
    Bios,
    /// OVMF by path, with variables of its own.
    Uefi,
    /// OVMF by libvirt's choice.
    UefiAuto,
}

/// A VM to be.
#[derive(Debug, Clone)]
pub struct Vm {
    name: &'static str,
    firmware: Firmware,
    disks: Vec<(&'static str, &'static str)>,
    os: String,
    devices: String,
    writes: bool,
    data_bytes: u64,
}

/// The guest agent's channel.
const AGENT: &str =
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>";

impl Vm {
    /// A VM with BIOS and one raw disk, `vda`, marked `NAME vda`.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            firmware: Firmware::Bios,
            disks: vec![("vda", "raw")],
            os: String::new(),
            devices: String::new(),
            writes: false,
            data_bytes: 64 * 1024 * 1024,
        }
    }

    /// A VM with BIOS and three disks of these formats, whose guest has an agent and appends records
    /// to the second and the third all the time.
    #[must_use]
    pub fn that_writes(name: &'static str, formats: [&'static str; 3]) -> Self {
        let [a, b, c] = formats;
        let vm = Self::new(name).disks(&[("vda", a), ("vdb", b), ("vdc", c)]);
        Self { writes: true, ..vm }.devices(AGENT)
    }

    /// Another size of the disks to which its guest writes, in bytes.
    #[must_use]
    pub fn data_bytes(self, data_bytes: u64) -> Self {
        Self { data_bytes, ..self }
    }

    /// Another firmware.
    #[must_use]
    pub fn firmware(self, firmware: Firmware) -> Self {
        Self { firmware, ..self }
    }

    /// Other disks: target and format of each. The first one boots.
    #[must_use]
    pub fn disks(self, disks: &[(&'static str, &'static str)]) -> Self {
        let disks = disks.to_vec();
        Self { disks, ..self }
    }

    /// Further XML in `<os>`.
    #[must_use]
    pub fn os(mut self, xml: &str) -> Self {
        self.os.push_str(xml);
        self
    }

    /// Further XML in `<devices>`.
    #[must_use]
    pub fn devices(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self
    }

    /// The name of a disk's file in the image directory.
    #[must_use]
    pub fn file(&self, target: &str) -> String {
        let format = self
            .disks
            .iter()
            .find(|(name, _)| *name == target)
            .map_or("raw", |(_, format)| format);
        format!("{}-{target}.{format}", self.name)
    }

    pub(super) fn make_disks(&self, guest: &Guest, on: &Hypervisor) {
        for (at, (target, format)) in self.disks.iter().enumerate() {
            let raw = on.image(&format!(".{target}.making"));
            if at == 0 {
                fs::copy(guest.boot_disk(), &raw).expect("the images have room");
                tool("fallocate", ["--dig-holes".as_ref(), raw.as_os_str()]);
            } else if self.writes {
                make_ext4(&raw, self.data_bytes);
            } else {
                write_data(&raw);
            }
            set_mark(&raw, &format!("{} {target}", self.name));
            let file = on.image(&self.file(target));
            let words = ["convert", "-q", "-f", "raw", "-O", format];
            let paths = [raw.as_os_str(), file.as_os_str()];
            tool("qemu-img", words.iter().map(AsRef::as_ref).chain(paths));
            fs::remove_file(&raw).expect("it was just made");
        }
    }

    /// Its definition.
    #[must_use]
    pub fn xml(&self) -> String {
        let Self {
            name, os, devices, ..
        } = self;
        let mut disks = String::new();
        for (target, format) in &self.disks {
            let _ = writeln!(
                disks,
                "    <disk type='file' device='disk'><driver name='qemu' type='{format}'/>\
                 <source file='/var/lib/libvirt/images/{}'/><target dev='{target}' bus='virtio'/></disk>",
                self.file(target)
            );
        }
        let (attribute, firmware) = match self.firmware {
            Firmware::Bios => ("", String::new()),
            Firmware::UefiAuto => (
                " firmware='efi'",
                // The guest's kernel is signed by nobody.
                "<firmware><feature enabled='no' name='secure-boot'/></firmware>".to_owned(),
            ),
            Firmware::Uefi => (
                "",
                format!(
                    "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>\
                     <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/{name}_VARS.fd</nvram>"
                ),
            ),
        };
        format!(
            "<domain type='qemu'>\n  <name>{name}</name>\n  <memory unit='MiB'>256</memory>\n  <vcpu>1</vcpu>\n  \
             <os{attribute}><type arch='x86_64' machine='q35'>hvm</type>{firmware}{os}</os>\n  \
             <features><acpi/></features>\n  <cpu mode='custom' match='exact' check='none'><model>qemu64</model></cpu>\n  \
             <on_poweroff>destroy</on_poweroff><on_crash>destroy</on_crash>\n  <devices>\n    \
             <emulator>/usr/bin/qemu-system-x86_64</emulator>\n{disks}    \
             <interface type='bridge'><source bridge='br0'/><model type='virtio'/></interface>\n    \
             <serial type='file'><source path='/var/log/libvirt/{name}-console.log'/><target port='0'/></serial>\n    \
             {devices}\n  </devices>\n</domain>\n"
        )
    }
}

/// A disk of so many bytes with an ext4 file system, and room for the mark behind it.
fn make_ext4(path: &Path, bytes: u64) {
    let file = fs::File::create(path).expect("the images have room");
    file.set_len(bytes).expect("a hole takes no room");
    let blocks = (bytes / 4096 - 256).to_string();
    let words = ["-q", "-F", "-b", "4096", "-J", "size=4"].map(AsRef::as_ref);
    let rest = [path.as_os_str(), blocks.as_ref()];
    tool("mkfs.ext4", words.into_iter().chain(rest));
}

/// A disk of 64 MiB, half of it data that does not compress.
fn write_data(path: &Path) {
    let half = 32 * 1024 * 1024;
    let mut bytes = vec![0; half];
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    for chunk in bytes.chunks_exact_mut(8) {
        // xorshift64: quick, and without a pattern that a copy could hide behind.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    fs::write(path, &bytes).expect("the images have room");
    let file = fs::File::options()
        .write(true)
        .open(path)
        .expect("it was just made");
    file.set_len(2 * half as u64).expect("a hole takes no room");
}
