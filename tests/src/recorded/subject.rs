//! What replaces a file, and has to stand a power cut.

use std::fmt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::controller::{Controller, Run};
use crate::process::{agents_in, wait_for};

/// How long an agent may take to end after its controller. It takes 10 ms; a loaded machine is
/// given time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A way to replace a file.
pub trait Subject: fmt::Debug + Sync {
    /// Makes `disk` hold what `source` holds, and returns when it is promised that it will.
    fn replace(&self, controller: &Controller, source: &Path, disk: &Path);

    /// Ends what a crash has interrupted. Gives whether it says that the disk is whole.
    fn recover(&self, controller: &Controller, disk: &Path) -> bool;

    /// Whether there is a file to be replaced, or nothing yet.
    fn overwrites(&self) -> bool {
        true
    }

    /// Whether the disk may have no name until it is recovered. It is the new version then.
    fn may_hide(&self) -> bool {
        false
    }

    /// Whether the disk may be torn as long as recovery says so. Another run mends it.
    fn may_tear(&self) -> bool {
        false
    }

    /// Whether a file of this name may lie beside the disk after recovery.
    fn may_leave(&self, _name: &str) -> bool {
        false
    }
}

/// `kvm-clone-ctl disk sync` within this machine, and `recover`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// Onto nothing.
    New,
    /// `--apply inplace`.
    InPlace,
    /// `--apply staged`.
    Staged,
    /// `--apply reflink`.
    Reflink,
}

impl Product {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::New, Self::InPlace, Self::Staged, Self::Reflink];

    /// What `--apply` is told, and what the result says.
    fn apply(self) -> &'static str {
        match self {
            Self::InPlace => "inplace",
            Self::New | Self::Staged => "staged",
            Self::Reflink => "reflink",
        }
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "new",
            existing => existing.apply(),
        })
    }
}

impl Subject for Product {
    fn replace(&self, controller: &Controller, source: &Path, disk: &Path) {
        let apply = self.apply();
        let fixed = ["disk", "sync", "--apply", apply].map(AsRef::as_ref);
        let run = ended(controller.run(fixed.into_iter().chain([source, disk])));
        let result = run.expect_json();
        assert_eq!(result["apply"], apply, "{run}");
    }

    fn recover(&self, controller: &Controller, _: &Path) -> bool {
        let run = ended(controller.run(["recover", "local"]));
        if run.code() == Some(1) && run.json()["hosts"][0]["error"]["code"] == "partial" {
            return false;
        }
        run.expect_code(0);
        true
    }

    fn overwrites(&self) -> bool {
        *self != Self::New
    }

    fn may_hide(&self) -> bool {
        *self == Self::Staged
    }

    fn may_tear(&self) -> bool {
        *self == Self::InPlace
    }

    /// What says that it is torn.
    fn may_leave(&self, name: &str) -> bool {
        self.may_tear() && name == ".disk.kc-journal"
    }
}

/// A run whose agents have ended as well, so that nothing keeps the file system in use.
fn ended(run: Run) -> Run {
    let namespace =
        std::fs::read_link("/proc/thread-self/ns/mnt").expect("a thread has a namespace");
    wait_for("the end of the agents", PATIENCE, || {
        agents_in(namespace.as_os_str()).is_empty().then_some(())
    });
    run
}

/// Shell commands: `$1` is the source, `$2` the disk, `$new` and `$log` names beside it, `$dir` its
/// directory. In recovery there is no source.
#[derive(Debug, Clone, Copy)]
pub struct Script {
    /// Replaces.
    pub replace: &'static str,
    /// Recovers.
    pub recover: &'static str,
    /// Whether the disk may have no name until then.
    pub may_hide: bool,
}

impl Script {
    /// A file beside it, synced, takes its name, and the directory is synced.
    pub const CAREFUL: Self = Self {
        replace: r#"
            cp "$1" "$new"; chmod --reference="$2" "$new"; chown --reference="$2" "$new"
            sync "$new"; mv "$new" "$2"; sync "$dir""#,
        recover: r#"rm -f "$new""#,
        may_hide: false,
    };

    /// The same, but that the file is not synced before it takes the name.
    pub const CARELESS: Self = Self {
        replace: r#"
            cp "$1" "$new"; chmod --reference="$2" "$new"; chown --reference="$2" "$new"
            mv "$new" "$2"; sync "$dir""#,
        ..Self::CAREFUL
    };

    /// Written over, and synced.
    pub const IN_PLACE: Self = Self {
        replace: r#"dd if="$1" of="$2" bs=64k conv=notrunc,fsync status=none
            truncate --reference="$1" "$2"; sync "$2""#,
        recover: ":",
        may_hide: false,
    };

    /// All that is needed is synced beside it; then it loses its name, is written over, and gets
    /// its name back.
    pub const STAGED: Self = Self {
        replace: r#"
            cp "$1" "$log.part"; sync "$log.part"; mv "$log.part" "$log"; sync "$dir"
            mv "$2" "$new"; sync "$dir"
            cat "$log" 1<>"$new"; truncate --reference="$log" "$new"; sync "$new"
            mv "$new" "$2"; sync "$dir"; rm "$log""#,
        recover: r#"
            rm -f "$log.part"
            if [ -e "$new" ]; then
                cat "$log" 1<>"$new"; truncate --reference="$log" "$new"; sync "$new"
                mv "$new" "$2"; sync "$dir"
            fi
            rm -f "$log""#,
        may_hide: true,
    };

    /// Runs commands to their end.
    fn run(commands: &str, arguments: &[&Path], disk: &Path) {
        let directory = disk.parent().expect("a disk lies in a directory");
        let output = Command::new("/bin/bash")
            .args(["-e", "-c", commands, "script"])
            .args(arguments)
            .env("dir", directory)
            .env("new", directory.join(".disk.kc-new"))
            .env("log", directory.join(".disk.kc-log"))
            .output()
            .expect("there is a shell");
        let (status, stderr) = (output.status, String::from_utf8_lossy(&output.stderr));
        assert!(status.success(), "a script ended with {status}: {stderr}");
    }
}

impl Subject for Script {
    fn replace(&self, _: &Controller, source: &Path, disk: &Path) {
        Self::run(self.replace, &[source, disk], disk);
    }

    fn recover(&self, _: &Controller, disk: &Path) -> bool {
        Self::run(self.recover, &[Path::new(""), disk], disk);
        true
    }

    fn may_hide(&self) -> bool {
        self.may_hide
    }
}
