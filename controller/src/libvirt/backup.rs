//! The XML of backup jobs: <https://libvirt.org/formatbackup.html>.

use super::definition::escape;

/// A disk of a job.
#[derive(Debug, Clone, Copy)]
pub struct BackupDisk<'a> {
    /// `vda`, `sda`, …
    pub target: &'a str,
    /// The file for what the guest overwrites meanwhile.
    pub scratch: &'a str,
    /// The checkpoint since which changes are told of.
    pub since: Option<&'a str>,
    /// Changes from now on are noted, until the checkpoint is deleted.
    pub is_tracked: bool,
}

/// A job that exports disks through the socket at `socket`.
pub fn backup_job(socket: &str, disks: &[BackupDisk<'_>]) -> String {
    let each = disks.iter().map(|disk| {
        let (target, scratch) = (attribute(disk.target), attribute(disk.scratch));
        let mode = disk.since.map_or_else(
            || "backupmode='full'".to_owned(),
            |since| format!("backupmode='incremental' incremental='{}'", attribute(since)),
        );
        format!(
            "<disk name='{target}' backup='yes' type='file' {mode}><scratch file='{scratch}'/></disk>"
        )
    });
    let (disks, socket) = (each.collect::<String>(), attribute(socket));
    format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>{disks}</disks></domainbackup>"
    )
}

/// The metadata context by which such a job tells of a disk's changes.
pub fn changes_context(target: &str) -> String {
    format!("qemu:dirty-bitmap:backup-{target}")
}

/// A checkpoint that begins with a job.
pub fn checkpoint(name: &str, disks: &[BackupDisk<'_>]) -> String {
    let each = disks.iter().map(|disk| {
        let kind = if disk.is_tracked { "bitmap" } else { "no" };
        let target = attribute(disk.target);
        format!("<disk name='{target}' checkpoint='{kind}'/>")
    });
    let (disks, name) = (each.collect::<String>(), attribute(name));
    format!("<domaincheckpoint><name>{name}</name><disks>{disks}</disks></domaincheckpoint>")
}

fn attribute(text: &str) -> String {
    escape(text, Some('\''))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_path_stays_an_attribute() {
        let scratch = "/a/.it's <b> & c.kc-scratch";
        let disk = BackupDisk {
            target: "vda",
            scratch,
            since: Some("kc-1"),
            is_tracked: true,
        };
        let job = backup_job("/s'x", &[disk]);
        let document = roxmltree::Document::parse(&job).unwrap();
        let named = |name: &str, attribute: &str| {
            let found = document.descendants().find(|node| node.has_tag_name(name));
            found.unwrap().attribute(attribute).unwrap().to_owned()
        };
        assert_eq!(named("server", "socket"), "/s'x");
        assert_eq!(named("scratch", "file"), scratch);
        assert_eq!(named("disk", "name"), "vda");
        assert_eq!(named("disk", "incremental"), "kc-1");
    }
}
