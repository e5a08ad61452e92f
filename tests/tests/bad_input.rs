//! Bad input: the exit code and the message of each failure, and that nothing half-made is left.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use kvm_clone_tests::image::{self, BLOCK, MIB, Piece};
use kvm_clone_tests::journey::{Journey, on};
use kvm_clone_tests::lab::{Lab, LabSpec};
use kvm_clone_tests::mount::Kind;

/// A laboratory with a small disk in it, and a path for its copy.
fn lab_with_disk() -> Option<(Lab, PathBuf, PathBuf)> {
    let lab = Lab::start()?;
    let (source, copy) = (lab.path("source"), lab.path("copy"));
    image::write(&source, &[Piece::Random(1, 3 * BLOCK)]);
    Some((lab, source, copy))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the laboratory chooses plain names")
}

/// The files in a directory, apart from our own temporary ones: those that have a final name.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names
        .filter(|name| !name.starts_with('.') && name != "lost+found")
        .collect()
}

#[test]
fn an_unknown_host_cannot_be_reached() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    // Names in .invalid never resolve.
    let to = on("nowhere.invalid", &copy);
    let run = lab
        .controller
        .run(["disk".into(), "sync".into(), source.into_os_string(), to]);
    run.expect_failure(3, &["host_unreachable"], "nowhere.invalid");
}

#[test]
fn a_host_that_does_not_listen_cannot_be_reached() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    let config = lab.controller.ssh_config();
    let closed = fs::read_to_string(config)
        .unwrap()
        .replace(&lab.b.port().to_string(), "1");
    fs::write(config, closed).unwrap();
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &[]);
    run.expect_failure(3, &["host_unreachable"], "hvB");
    assert!(!copy.exists());
}

#[test]
fn a_host_key_that_is_not_known_is_never_accepted_silently() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    let known = lab.controller.home().join(".ssh/known_hosts");
    fs::write(&known, lab.a.known_hosts_line()).unwrap();
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &[]);
    run.expect_failure(3, &["host_key"], "hvB");
    assert_eq!(
        fs::read_to_string(&known).unwrap(),
        lab.a.known_hosts_line()
    );
    assert!(!copy.exists());
}

#[test]
fn a_host_key_that_has_changed_is_refused_on_every_route() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    let known = lab.controller.home().join(".ssh/known_hosts");
    let other = lab
        .a
        .known_hosts_line()
        .replace(&lab.a.port().to_string(), &lab.b.port().to_string());
    fs::write(&known, lab.a.known_hosts_line() + &other).unwrap();
    for by in [Journey::Direct, Journey::Relay, Journey::Push] {
        let run = lab.disk("sync", by, &source, &copy, &[]);
        run.expect_failure(3, &["host_key"], "hvB");
    }
    assert!(!copy.exists());
}

#[test]
fn a_refused_login_says_so() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    for half in ["id_ed25519", "id_ed25519.pub"] {
        fs::remove_file(lab.controller.home().join(".ssh").join(half)).unwrap();
    }
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &[]);
    run.expect_failure(3, &["auth"], "hv");
    assert!(!copy.exists());
}

#[test]
fn a_source_that_does_not_exist_is_not_found_and_the_destination_is_untouched() {
    let Some((lab, kept, copy)) = lab_with_disk() else {
        return;
    };
    let missing = lab.path("no such disk");
    for by in [Journey::Direct, Journey::Relay, Journey::Local] {
        lab.disk("sync", by, &missing, &copy, &[]).expect_failure(
            4,
            &["not_found"],
            text(&missing),
        );
        assert!(!copy.exists());
    }
    let before = fs::read(&kept).unwrap();
    let run = lab.disk("sync", Journey::Relay, &missing, &kept, &[]);
    run.expect_failure(4, &["not_found"], text(&missing));
    assert!(fs::read(&kept).unwrap() == before);
}

#[test]
fn a_destination_directory_that_does_not_exist_is_not_made() {
    let Some((lab, source, _)) = lab_with_disk() else {
        return;
    };
    let copy = lab.path("no/such/directory/copy");
    let run = lab.disk("sync", Journey::Relay, &source, &copy, &[]);
    run.expect_failure(4, &["not_found"], text(copy.parent().unwrap()));
    assert!(!lab.path("no").exists());
}

#[test]
fn a_directory_is_no_disk() {
    let Some((lab, source, copy)) = lab_with_disk() else {
        return;
    };
    let directory = lab.path("directory");
    fs::create_dir(&directory).unwrap();
    for by in [Journey::Relay, Journey::Local] {
        let as_source = lab.disk("sync", by, &directory, &copy, &[]);
        as_source.expect_failure(5, &["refused"], text(&directory));
        let as_destination = lab.disk("sync", by, &source, &directory, &[]);
        as_destination.expect_failure(5, &["refused"], text(&directory));
    }
    assert!(!copy.exists());
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
}

#[test]
fn a_fifo_and_a_character_device_are_no_disks_and_nobody_waits_for_them() {
    let Some((lab, _, copy)) = lab_with_disk() else {
        return;
    };
    let fifo = lab.path("fifo");
    kvm_clone_tests::process::tool("mkfifo", [&fifo]);
    for path in [fifo.as_path(), Path::new("/dev/zero")] {
        let run = lab.disk("sync", Journey::Relay, path, &copy, &[]);
        run.expect_failure(5, &["refused"], text(path));
    }
    assert!(!copy.exists());
}

#[test]
fn a_relative_path_is_wrong_usage() {
    let Some((lab, source, _)) = lab_with_disk() else {
        return;
    };
    for disk in ["hvB:relative/disk", "relative-disk", "hvB:", ""] {
        let args = [
            "disk".as_ref(),
            "sync".as_ref(),
            source.as_os_str(),
            disk.as_ref(),
        ];
        lab.controller.run(args).expect_code(2);
    }
}

#[test]
fn one_storage_as_source_and_destination_is_refused_by_any_of_its_names() {
    let Some((lab, source, _)) = lab_with_disk() else {
        return;
    };
    let (link, hard) = (lab.path("link"), lab.path("hard"));
    std::os::unix::fs::symlink(&source, &link).unwrap();
    fs::hard_link(&source, &hard).unwrap();
    let before = fs::read(&source).unwrap();
    // The hosts share a kernel and this directory, as two hosts share an NFS export.
    for by in [
        Journey::Direct,
        Journey::Relay,
        Journey::Push,
        Journey::Local,
    ] {
        for destination in [&source, &link, &hard] {
            let run = lab.disk("sync", by, &source, destination, &[]);
            run.expect_failure(5, &["refused", "busy"], text(destination));
        }
    }
    assert!(fs::read(&source).unwrap() == before);
}

#[test]
fn a_source_that_cannot_be_read_is_an_io_error_that_names_the_place() {
    let Some(lab) = Lab::start() else { return };
    let device = lab.device("backing", 8 * MIB);
    image::overwrite(device.path(), &[Piece::Random(1, 8 * MIB)]);
    // The device stays as large as it was, and its second half cannot be read any more.
    let backing = fs::OpenOptions::new()
        .write(true)
        .open(device.backing())
        .unwrap();
    backing.set_len(4 * MIB).unwrap();
    for by in [Journey::Direct, Journey::Relay, Journey::Local] {
        kvm_clone_tests::process::tool(
            "blockdev",
            ["--flushbufs".as_ref(), device.path().as_os_str()],
        );
        let copy = lab.path(format!("copy-{by:?}"));
        let run = lab.disk("sync", by, device.path(), &copy, &[]);
        let message = run.expect_failure(1, &["io"], text(device.path()));
        // Readers work side by side: any place of the second half may be the first to fail.
        let place = message.split_once("at byte ").map_or("", |(_, rest)| rest);
        let digits = place.split(|c: char| !c.is_ascii_digit()).next().unwrap();
        let offset: u64 = digits
            .parse()
            .unwrap_or_else(|_| panic!("no offset in {message:?}"));
        assert!((4 * MIB..8 * MIB).contains(&offset), "{message:?}");
        assert!(!copy.exists());
    }
}

#[test]
fn a_read_only_file_system_takes_no_copy() {
    let Some(spec) = LabSpec::new() else { return };
    let spec = spec.mount(Kind::Ext4, 64 * MIB);
    let existing = spec.mounts()[0].join("existing");
    image::write(&existing, &[Piece::Random(2, BLOCK)]);
    spec.mounts()[0].set_read_only();
    let lab = spec.start();
    let source = lab.path("source");
    image::write(&source, &[Piece::Random(1, BLOCK)]);
    let before = fs::read(&existing).unwrap();
    for to in [lab.mounts()[0].join("fresh"), existing.clone()] {
        // The agents may still look for each other when one of them finds it out.
        for by in Journey::ALL {
            let run = lab.disk("sync", by, &source, &to, &[]);
            let message = run.expect_failure(1, &["io"], text(&to));
            assert!(message.to_lowercase().contains("read-only"), "{message}");
        }
    }
    assert!(fs::read(&existing).unwrap() == before);
    assert_eq!(names_in(lab.mounts()[0].path()), ["existing"]);
}

#[test]
fn a_full_file_system_is_no_space_and_leaves_nothing_under_the_final_name() {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.mount(Kind::Ext4, 64 * MIB).start();
    let (source, to) = (lab.path("source"), lab.mounts()[0].join("copy"));
    image::write(&source, &[Piece::Random(1, 100 * MIB)]);
    for by in [Journey::Direct, Journey::Relay, Journey::Local] {
        let run = lab.disk("sync", by, &source, &to, &[]);
        run.expect_failure(8, &["no_space"], text(&to));
        assert_eq!(names_in(lab.mounts()[0].path()), Vec::<String>::new());
    }
}

#[test]
fn a_disk_that_is_larger_than_the_destination_but_sparse_fits() {
    let Some(spec) = LabSpec::new() else { return };
    let lab = spec.mount(Kind::Ext4, 64 * MIB).start();
    let (source, to) = (lab.path("source"), lab.mounts()[0].join("copy"));
    image::write(
        &source,
        &[
            Piece::Random(1, MIB),
            Piece::Hole(300 * MIB),
            Piece::Byte(1),
        ],
    );
    lab.sync(Journey::Relay, &source, &to, &[]);
}
