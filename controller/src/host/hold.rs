//! A VM that runs and whose disks are to be read as they are at one instant: the host holds that
//! instant for as long as a guard stands there.

use super::guard::{Guard, Stay, Task};
use super::script::live as script;
use super::{Host, find};
use crate::error::{Error, ErrorCode, Result};

/// Asks a guest agent whether the guest's file systems are frozen.
pub const FREEZE_STATUS: &str = r#"{"execute":"guest-fsfreeze-status"}"#;

/// A VM of a libvirt.
#[derive(Debug, Clone, Copy)]
pub struct Held<'a> {
    /// The URI of its libvirt, as seen from the host.
    pub uri: &'a str,
    /// Its name or UUID.
    pub vm: &'a str,
}

/// A backup job to be.
#[derive(Debug, Clone, Copy)]
pub struct Backup<'a> {
    /// Its XML, as for `virsh backup-begin`.
    pub job: &'a str,
    /// That of the checkpoint that begins with it; nothing, where none does.
    pub checkpoint: &'a str,
    /// How the guest's file systems are frozen: `auto`, `require` or `off`.
    pub quiesce: &'a str,
    /// Bytes of each disk, in the order of the scratch files.
    pub sizes: &'a [u64],
    /// Where it puts what it needs.
    pub place: Place<'a>,
}

/// Where a backup job puts what it needs.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The socket of its export; no other job has that.
    pub socket: &'a str,
    /// The files for what the guest overwrites meanwhile.
    pub scratch: &'a [String],
    /// Bytes that are to be left on their file systems.
    pub min_free: u64,
}

impl Place<'_> {
    /// The command line of a script of a backup job.
    fn words<'a>(&'a self, text: &'a str, vm: Held<'a>, floor: &'a str) -> Vec<&'a str> {
        vec!["sh", "-c", text, vm.uri, vm.vm, self.socket, floor]
    }

    /// In the unit of df.
    fn floor(&self) -> String {
        self.min_free.div_ceil(1024).to_string()
    }
}

impl Host {
    /// Suspends a VM until the guard ends, or this program or the connection does; where files can
    /// be copied by sharing their blocks, only for as long as that takes: then the copies are there
    /// until the guard ends. Whether they are comes with it. `forget` is as for
    /// [`guard`](Self::guard).
    ///
    /// # Errors
    /// As [`guard`](Self::guard).
    pub async fn suspend(
        &self,
        vm: Held<'_>,
        copies: &[(String, String)],
        forget: &[&str],
    ) -> Result<(Guard, bool)> {
        let (suspend, resume) = (script::suspend(), script::resume());
        let pairs = copies.iter().flat_map(|(from, to)| [from.as_str(), to]);
        let begin: Vec<&str> = ["sh", "-c", &suspend, vm.uri, vm.vm]
            .into_iter()
            .chain(pairs)
            .collect();
        let names = copies.iter().map(|(_, to)| to.as_str());
        let undo: Vec<&str> = ["sh", "-c", &resume, vm.uri, vm.vm]
            .into_iter()
            .chain(names)
            .collect();
        let guard = self.guard(&begin, &undo, forget).await?;
        let copied = guard.has_said(script::COPIED);
        Ok((guard, copied))
    }

    /// Begins a backup job, which stands until the guard ends, or this program or the connection
    /// does, or the file systems of the scratch files have too little space left. Whether the
    /// guest's file systems were frozen at its instant comes with it. `forget` is as for
    /// [`guard`](Self::guard).
    ///
    /// # Errors
    /// No space, before anything is begun; missing requirement, where the guest's file systems had to
    /// be frozen and cannot be; refused, where libvirt does not begin the job. The guest runs on then.
    pub async fn back_up(
        &self,
        vm: Held<'_>,
        backup: &Backup<'_>,
        forget: &[&str],
    ) -> Result<(Guard, bool)> {
        let texts = [script::backup(), script::watch(), script::end_backup()];
        let (place, floor) = (&backup.place, backup.place.floor());
        let scratch: Vec<&str> = place.scratch.iter().map(String::as_str).collect();
        let [mut begin, mut watch, mut undo] =
            texts.each_ref().map(|text| place.words(text, vm, &floor));
        let sizes: Vec<String> = backup.sizes.iter().map(u64::to_string).collect();
        let sizes = sizes.join(" ");
        begin.extend([backup.quiesce, FREEZE_STATUS, backup.job]);
        begin.extend([backup.checkpoint, &sizes]);
        for words in [&mut begin, &mut watch, &mut undo] {
            words.extend(&scratch);
        }
        let task = Task {
            begin: &begin,
            watch: &watch,
            undo: &undo,
            forget,
        };
        let (code, complaint) = match self.stand_guard(&task).await? {
            Stay::Begun(guard) => {
                let frozen = guard.has_said(script::FROZEN);
                return Ok((*guard, frozen));
            }
            Stay::Ended { code, complaint } => (code, complaint),
        };
        let (code, what) = match code {
            script::NO_SPACE => (
                ErrorCode::NoSpace,
                "has no room for what its guest overwrites meanwhile",
            ),
            script::NOT_FROZEN => (
                ErrorCode::MissingRequirement,
                "does not freeze the guest's file systems",
            ),
            _ => (ErrorCode::Refused, "does not begin a backup job"),
        };
        Err(Error::new(code, format!("{self} {what}")).caused_by(complaint))
    }

    /// What tells the process of QEMU that a VM of this name is from every other one; `None` where it
    /// cannot be told.
    ///
    /// # Errors
    /// When the host cannot be reached.
    pub async fn process_of(&self, name: &str) -> Result<Option<String>> {
        let output = self
            .tool(&["sh", "-c", &script::process(), name], b"")
            .await?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Ok(Some(said).filter(|_| output.status.success()))
    }

    /// Tries a backup job with a VM that is made for it, by its XML and that of the job, and taken away.
    /// Its disk is made at a path, and taken away as well.
    ///
    /// # Errors
    /// Io, with what libvirt or QEMU complained about.
    pub async fn try_backup(
        &self,
        vm: Held<'_>,
        place: &Place<'_>,
        [definition, job, image]: [&str; 3],
    ) -> Result<()> {
        let (text, floor) = (script::try_backup(), place.floor());
        let mut words = place.words(&text, vm, &floor);
        words.extend([definition, job, image]);
        words.extend(place.scratch.iter().map(String::as_str));
        let output = self.tool(&words, b"").await?;
        if output.status.success() {
            return Ok(());
        }
        Err(self.not_begun(output.stderr.trim()))
    }

    /// Ends a backup job whose guard is gone, if it is still there, and removes what it needed.
    ///
    /// # Errors
    /// Io, when it does not end.
    pub async fn end_backup(&self, vm: Held<'_>, place: &Place<'_>) -> Result<()> {
        let (text, floor) = (script::end_backup(), place.floor());
        let mut words = place.words(&text, vm, &floor);
        words.extend(place.scratch.iter().map(String::as_str));
        self.tool_output(&words, b"").await.map(drop)
    }
}

impl Guard {
    /// Ends a backup job. Whether it had already ended, because too little space was left, comes
    /// with it.
    ///
    /// # Errors
    /// When it does not end, or nobody knows.
    pub async fn end_backup(self) -> (bool, Result<()>) {
        let (heard, ended) = self.finish().await;
        (find(&heard, script::FULL).is_some(), ended)
    }
}
