//! What users download: that packing it twice gives the same bytes, what is in it, and a Debian where it
//! is installed, used and purged.
//!
//! The program is the one that the other tests run, without its symbols; a real distribution takes a
//! quarter of an hour, and is made twice and looked at with `KVM_CLONE_DIST=full`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvm_clone_tests::lab::base;
use kvm_clone_tests::namespace::apart;
use kvm_clone_tests::pages::root;
use kvm_clone_tests::process::{built, tool};
use kvm_clone_tests::skip::{find_tool, obstacle, skip};
use tempfile::TempDir;

/// A directory for one test; `None`, and a line that says so, where a tool is missing.
fn ground(tools: &[&str]) -> Option<TempDir> {
    let missing = tools.iter().find(|tool| find_tool(tool).is_none());
    if let Some(tool) = missing {
        skip(&format!("{tool} is not installed"));
        return None;
    }
    Some(TempDir::with_prefix_in("dist-", base()).unwrap())
}

/// Runs `controller/dist/make` of these sources, and gives the names of what it has made.
fn make<S: AsRef<OsStr>>(
    sources: &Path,
    args: impl IntoIterator<Item = S>,
    into: &Path,
) -> Vec<String> {
    let mut command = Command::new(sources.join("controller/dist/make"));
    command.args(args).arg(into).env_remove("CARGO_TARGET_DIR");
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    tool(
        "sh",
        [
            "-c",
            "cd \"$1\" && sha256sum --check --strict --quiet SHA256SUMS",
            "sh",
            into.to_str().unwrap(),
        ],
    );
    let files = into.read_dir().unwrap();
    let mut names: Vec<String> = files
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Packs the program of the tests.
fn pack(directory: &Path) -> Vec<String> {
    let program = directory.join("kvm-clone-ctl");
    fs::create_dir(directory).unwrap();
    let tested = built("kvm-clone-ctl", "KVM_CLONE_CTL");
    tool(
        "strip",
        ["-o".as_ref(), program.as_os_str(), tested.as_os_str()],
    );
    make(
        &root(),
        ["--from".as_ref(), program.as_os_str()],
        &directory.join("out"),
    )
}

/// Whether two directories hold the same files.
fn assert_same(names: &[String], one: &Path, other: &Path) {
    for name in names {
        let bytes = |directory: &Path| fs::read(directory.join(name)).unwrap();
        assert!(bytes(one) == bytes(other), "{name} is not the same twice");
    }
}

/// What a tarball holds, without the directory that all of it is in, and without directories.
fn listed(tarball: &Path) -> BTreeSet<String> {
    let list = tool(
        "tar",
        ["--list".as_ref(), "--file".as_ref(), tarball.as_os_str()],
    );
    let files = list.lines().filter(|name| !name.ends_with('/'));
    files
        .map(|name| name.split_once('/').unwrap().1.to_owned())
        .collect()
}

/// Of what is promised, a file of each kind, below the prefix of an installation.
const PROMISED: [&str; 17] = [
    "bin/kvm-clone-ctl",
    "share/man/man1/kvm-clone-ctl.1.gz",
    "share/man/man1/kvm-clone-ctl-disk-sync.1.gz",
    "share/man/man1/kvm-clone-ctl-replicate-daemon.1.gz",
    "share/bash-completion/completions/kvm-clone-ctl",
    "share/zsh/site-functions/_kvm-clone-ctl",
    "share/fish/vendor_completions.d/kvm-clone-ctl.fish",
    "share/doc/kvm-clone-ctl/LICENSE",
    "share/doc/kvm-clone-ctl/README.md",
    "share/doc/kvm-clone-ctl/SECURITY.md",
    "share/doc/kvm-clone-ctl/controller/doc/report.png",
    "share/doc/kvm-clone-ctl/examples/policies.toml",
    "share/doc/kvm-clone-ctl/examples/kvm-clone-replicate.service",
    "share/doc/kvm-clone-ctl/examples/kvm-clone-replicate-due.service",
    "share/doc/kvm-clone-ctl/examples/kvm-clone-replicate-due.timer",
    "share/doc/kvm-clone-ctl/examples/alerts.yml",
    "share/doc/kvm-clone-ctl/examples/dashboard.json",
];

#[test]
fn packing_twice_gives_the_same_bytes_and_what_is_promised() {
    let Some(ground) = ground(&["cargo-deb", "strip", "dpkg-deb"]) else {
        return;
    };
    let [one, other] = ["one", "the other"].map(|name| ground.path().join(name));
    let names = pack(&one);
    assert_eq!(names, pack(&other));
    let (one, other) = (one.join("out"), other.join("out"));
    assert_same(&names, &one, &other);

    let [tarball, deb] = [".tar.gz", ".deb"].map(|kind| {
        let name = names.iter().find(|name| name.ends_with(kind)).unwrap();
        one.join(name)
    });
    let files = listed(&tarball);
    for promised in PROMISED {
        assert!(files.contains(promised), "no {promised} in {files:?}");
    }
    let deb = deb.to_str().unwrap();
    let fields = tool(
        "dpkg-deb",
        ["--field", deb, "Package", "Depends", "Recommends"],
    );
    let expected = "Package: kvm-clone-ctl\nDepends: openssh-client\nRecommends: rsync";
    assert_eq!(fields, expected);
    let packed = tool("dpkg-deb", ["--contents", deb]);
    for file in files {
        let file = file.replace("share/zsh/site-functions", "share/zsh/vendor-completions");
        let file = file.replace("kvm-clone-ctl/LICENSE", "kvm-clone-ctl/copyright");
        assert!(
            packed.contains(&format!("./usr/{file}")),
            "no {file} in {packed}"
        );
    }
    let owners = packed.lines().all(|line| line.contains(" 0/0 "));
    assert!(owners, "{packed}");
}

/// A Debian of this machine's release, so small that it has no Rust, with what our package depends on.
struct Debian {
    root: PathBuf,
}

impl Debian {
    /// `None`, and a line that says so, where no mirror answers.
    fn new(root: PathBuf) -> Option<Self> {
        let release = tool(
            "sh",
            ["-c", ". /etc/os-release && echo \"$VERSION_CODENAME\""],
        );
        let mut command = Command::new(find_tool("debootstrap").unwrap());
        command.args(["--variant=minbase", "--include=openssh-client", &release]);
        let output = command.arg(&root).output().unwrap();
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stdout);
            let last = log.lines().last().unwrap_or_default();
            skip(&format!("debootstrap of {release}: {last}"));
            return None;
        }
        Some(Self { root })
    }

    /// Runs a line of shell in it, as root, and gives what that prints.
    fn run(&self, line: &str) -> String {
        let path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
        let root = self.root.to_str().unwrap();
        tool(
            "chroot",
            [
                root,
                "/usr/bin/env",
                "-i",
                path,
                "HOME=/root",
                "sh",
                "-ec",
                line,
            ],
        )
    }

    /// Every file and directory in it, but what dpkg notes of its own work.
    fn listing(&self) -> BTreeSet<String> {
        let line = "find / -xdev -path /var/lib/dpkg -prune -o -path /var/log -prune -o \
                    -type d -printf '%p/ %m\\n' -o -printf '%p %m %s %l\\n'";
        self.run(line).lines().map(str::to_owned).collect()
    }
}

#[test]
fn a_debian_without_rust_installs_uses_and_forgets_the_package() {
    if let Some(reason) = obstacle() {
        return skip(&reason);
    }
    let Some(ground) = ground(&["cargo-deb", "strip", "debootstrap", "chroot"]) else {
        return;
    };
    let Some(debian) = Debian::new(ground.path().join("debian")) else {
        return;
    };
    let packed = ground.path().join("packed");
    let names = pack(&packed);
    let deb = names.iter().find(|name| name.ends_with(".deb")).unwrap();
    apart(|| {
        let proc = debian.root.join("proc");
        tool(
            "mount",
            [
                "-t".as_ref(),
                "proc".as_ref(),
                "proc".as_ref(),
                proc.as_os_str(),
            ],
        );
        let before = debian.listing();
        let inside = debian.root.join("tmp/kvm-clone-ctl.deb");
        fs::copy(packed.join("out").join(deb), &inside).unwrap();
        debian.run("! command -v cargo && dpkg --install /tmp/kvm-clone-ctl.deb");
        fs::remove_file(inside).unwrap();
        let installed = debian.listing();
        for file in installed.difference(&before) {
            assert!(file.starts_with("/usr/"), "{file}");
            assert!(!file.contains("systemd/system"), "{file}");
        }

        let said = debian.run("kvm-clone-ctl demo --no-progress");
        assert!(said.contains("source and copy are equal"), "{said}");
        // What the units' daemon would leave.
        debian.run("mkdir /var/lib/kvm-clone-ctl && touch /var/lib/kvm-clone-ctl/history.sqlite");
        debian.run("kvm-clone-ctl agent remove local && dpkg --purge kvm-clone-ctl");
        let after = debian.listing();
        // A place for what any program keeps is nobody's to remove.
        let cache = |line: &&String| line.starts_with("/root/.cache/ ");
        let left = after.symmetric_difference(&before);
        let left: Vec<_> = left.filter(|line| !cache(line)).collect();
        assert!(left.is_empty(), "{left:#?}");
    });
}

/// Half an hour on two processors. It builds what is committed.
#[test]
fn a_distribution_is_the_same_from_two_clones_and_runs_on_both_machines() {
    if std::env::var_os("KVM_CLONE_DIST").is_none_or(|what| what != "full") {
        return;
    }
    let tools = [
        "cargo-deb",
        "cargo-cyclonedx",
        "qemu-aarch64-static",
        "aarch64-linux-gnu-gcc",
    ];
    let Some(ground) = ground(&tools) else {
        return;
    };
    let sources = root();
    let built = ["one", "in/another/place"].map(|name| {
        let clone = ground.path().join(name).join("sources");
        let from_to = [sources.as_os_str(), clone.as_os_str()];
        tool(
            "git",
            ["clone".as_ref(), "--quiet".as_ref()]
                .into_iter()
                .chain(from_to),
        );
        let out = clone.with_file_name("out");
        let names = make(&clone, [""; 0], &out);
        fs::remove_dir_all(clone).unwrap();
        (names, out)
    });
    let [(names, one), (others, other)] = &built;
    assert_eq!(names, others);
    // Of each machine a tarball, a package, and the lists of two programs.
    assert_eq!(names.len(), 2 * 4 + 1, "{names:?}");
    assert_same(names, one, other);

    for (machine, runner) in [("x86_64", "env"), ("aarch64", "qemu-aarch64-static")] {
        let tarball = names
            .iter()
            .find(|name| name.ends_with(&format!("{machine}-linux.tar.gz")));
        let prefix = ground.path().join(machine);
        fs::create_dir(&prefix).unwrap();
        let (prefix, tarball) = (prefix.to_str().unwrap(), one.join(tarball.unwrap()));
        tool(
            "tar",
            [
                "-C",
                prefix,
                "-x",
                "--strip-components=1",
                "-f",
                tarball.to_str().unwrap(),
            ],
        );
        let program = format!("{prefix}/bin/kvm-clone-ctl");
        let version = tool(runner, [&program, "--version"]);
        let carried = ["x86_64", "aarch64"].map(|machine| version.contains(machine));
        assert_eq!(carried, [true, true], "{version}");
        let said = tool(runner, [&program, "demo", "--no-progress"]);
        assert!(said.contains("source and copy are equal"), "{said}");
    }
}
