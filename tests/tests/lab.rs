//! The laboratory itself: hosts are what the other tests take them for.

use std::path::Path;

use kvm_clone_tests::image::{self, MIB, Piece};
use kvm_clone_tests::lab::LabSpec;
use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::process::tool;

fn ssh(lab: &kvm_clone_tests::lab::Lab, host: &str, command: &str) -> String {
    let config = lab.controller.ssh_config().as_os_str();
    tool(
        "ssh",
        ["-F".as_ref(), config, host.as_ref(), command.as_ref()],
    )
}

#[test]
fn each_host_has_a_home_and_a_shell_of_its_own_and_shares_the_disks() {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec
        .mount(Kind::Tmpfs, MIB)
        .host_b(|host| host.shell("/bin/dash"))
        .start();
    let disk = lab.mounts()[0].join("disk");
    image::write(&disk, &[Piece::Byte(7)]);

    ssh(
        &lab,
        "hvA",
        "echo hello >/root/a; echo >/tmp/t; echo >/var/tmp/t; echo >/dev/shm/t; \
         echo >/var/lib/kvm-clone/t",
    );
    assert_eq!(
        std::fs::read_to_string(lab.a.home().join("a")).unwrap(),
        "hello\n"
    );
    assert_eq!(
        ssh(
            &lab,
            "hvB",
            "ls /root /tmp /var/tmp /dev/shm /var/lib/kvm-clone | grep -c '^[at]$' || :"
        ),
        "0"
    );
    assert!(lab.a.state().join("t").exists());
    assert!(!Path::new("/var/lib/kvm-clone/t").exists());
    assert_eq!(ssh(&lab, "hvA", "echo $0"), "bash");
    assert!(ssh(&lab, "hvB", "echo $0").ends_with("dash"));
    assert_eq!(
        ssh(&lab, "hvB", &format!("wc -c < {}", disk.display())),
        "1"
    );
}

#[test]
fn the_hosts_may_log_in_to_each_other_but_know_no_host_keys() {
    let Some(lab) = LabSpec::new().map(LabSpec::start) else {
        return;
    };
    let hop = |check: &str| {
        let port = lab.b.port();
        format!("ssh -o BatchMode=yes -o StrictHostKeyChecking={check} -p {port} 127.0.0.1 pwd")
    };
    assert_eq!(
        ssh(&lab, "hvA", &format!("{} || echo refused", hop("yes"))),
        "refused"
    );
    assert_eq!(ssh(&lab, "hvA", &hop("no")), "/root");
}

#[test]
fn nothing_of_a_host_outlives_it() {
    let Some(lab) = LabSpec::new().map(LabSpec::start) else {
        return;
    };
    ssh(
        &lab,
        "hvA",
        "setsid sleep 600 >/dev/null 2>&1 </dev/null & echo started",
    );
    let (namespace, directory) = (lab.a.mount_namespace(), lab.path(""));
    let lives = || {
        std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            std::fs::read_link(entry.path().join("ns/mnt"))
                .is_ok_and(|link| link.as_os_str() == namespace)
        })
    };
    assert!(lives());
    drop(lab);
    assert!(!lives());
    assert!(!directory.exists());
}

#[test]
fn a_host_sees_every_kind_of_file_system_and_nothing_stays_mounted() {
    let Some(mut spec) = LabSpec::new() else {
        return;
    };
    for kind in Kind::ALL {
        spec = spec.mount(kind, 400 * MIB);
    }
    let lab = spec.start();
    let directory = lab.path("");
    let device = lab.device("device", MIB);
    let listed = ssh(&lab, "hvA", "cut -d' ' -f2,3 /proc/mounts");
    for kind in Kind::ALL {
        let ours = |line: &&str| line.starts_with(directory.to_str().unwrap());
        let found = listed
            .lines()
            .filter(ours)
            .any(|line| line.ends_with(&format!(" {kind}")));
        assert!(found, "{kind} is not mounted on hvA: {listed}");
    }
    assert_eq!(
        ssh(
            &lab,
            "hvB",
            &format!("test -b {} && echo block", device.path().display())
        ),
        "block"
    );

    drop((device, lab));
    let left = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!left.contains(directory.to_str().unwrap()), "{left}");
    let backing = tool(
        "losetup",
        ["--list", "--noheadings", "--output", "BACK-FILE"],
    );
    assert!(!backing.contains(directory.to_str().unwrap()), "{backing}");
}
