//! Whether a host lets QEMU make what a snapshot needs: a socket and a scratch file, which AppArmor
//! and SELinux may deny.

use uuid::Uuid;

use super::snapshot::{MIN_FREE, QEMU_DIRECTORY};
use crate::error::Result;
use crate::host::{Held, Place};
use crate::libvirt::{BackupDisk, Hypervisor, backup_job};

/// Where images are by libvirt's own choice.
const IMAGES: &str = "/var/lib/libvirt/images";

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// What confines QEMU there: `apparmor`, `selinux`, …; nothing where nothing does.
    pub confined_by: Vec<String>,
    /// Why there was no snapshot.
    pub denied: Option<String>,
}

impl Probe {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self.confined_by.first().map(String::as_str) {
            Some("apparmor") => {
                "if AppArmor denied it (journalctl -k | grep DENIED), add to \
                 /etc/apparmor.d/local/abstractions/libvirt-qemu the two lines \
                 \"/var/lib/libvirt/qemu/kc-*.sock rw,\" and \"/**/.*.kc-scratch rwk,\""
            }
            Some("selinux") => {
                "if SELinux denied it, \"ausearch -m avc -ts recent | audit2allow -M kvm-clone\" makes the \
                 rule, and \"semodule -i kvm-clone.pp\" takes it in"
            }
            _ => {
                "libvirt 7.6 and QEMU 6.1 are the oldest that do this by themselves; --live pause does without"
            }
        }
    }
}

/// Tries a snapshot with a VM that is made for it, and taken away. `None` where there is no directory
/// for its disk.
///
/// # Errors
/// When the host cannot be asked.
pub async fn probe(on: &Hypervisor) -> Result<Option<Probe>> {
    if on.host().file_facts(IMAGES).await?.is_none() {
        return Ok(None);
    }
    let capabilities = on.virsh(&["capabilities"]).await?;
    let name = format!("kc-probe-{}", Uuid::new_v4().simple());
    let image = format!("{IMAGES}/.{name}.qcow2");
    let (socket, scratch) = (
        format!("{QEMU_DIRECTORY}/kc-{name}.sock"),
        format!("{IMAGES}/.{name}.kc-scratch"),
    );
    let disk = BackupDisk {
        target: "vda",
        scratch: &scratch,
        since: None,
        is_tracked: false,
    };
    let vm = format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><os><type>hvm</type></os>\
         <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>\
         <target dev='vda' bus='virtio'/></disk></devices></domain>"
    );
    let scratch = [scratch.clone()];
    let place = Place {
        socket: &socket,
        scratch: &scratch,
        min_free: MIN_FREE,
    };
    let held = Held {
        uri: on.uri(),
        vm: &name,
    };
    let job = backup_job(&socket, &[disk]);
    let denied = on
        .host()
        .try_backup(held, &place, [&vm, &job, &image])
        .await;
    Ok(Some(Probe {
        confined_by: security_models(&capabilities),
        denied: denied.err().map(|error| error.one_line()),
    }))
}

/// The security drivers of a host's capabilities that keep QEMU from files.
fn security_models(capabilities: &str) -> Vec<String> {
    let Ok(document) = roxmltree::Document::parse(capabilities) else {
        return Vec::new();
    };
    let models = document
        .descendants()
        .filter(|node| node.has_tag_name("secmodel"));
    let names = models.filter_map(|model| {
        let name = model
            .children()
            .find(|node| node.has_tag_name("model"))?
            .text()?;
        Some(name.to_owned())
    });
    // The owner and mode of files are no policy.
    names
        .filter(|name| name != "dac" && name != "none")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_confines_qemu_is_found_beside_what_does_not() {
        let with = |models: &str| {
            let text = format!("<capabilities><host>{models}</host></capabilities>");
            security_models(&text)
        };
        let dac = "<secmodel><model>dac</model><doi>0</doi></secmodel>";
        assert!(with(dac).is_empty());
        let apparmor = format!("<secmodel><model>apparmor</model><doi>0</doi></secmodel>{dac}");
        assert_eq!(with(&apparmor), ["apparmor"]);
    }
}
