//! Recovery points: the version of a VM at one instant, in a directory of its own that comes to be
//! whole or not at all. It holds all that starting the VM takes, for people without this program as
//! well.
//!
//! ```text
//!  DIR/points/20261129T123341Z/vda.raw …        what the guest saw, unless files share no blocks: then
//!  DIR/deltas/20261129T123341Z-vda.qcow2 …      the same, by what was overwritten since (chain.rs)
//!                              domain.xml       the definition, with disks in DIR/live
//!                              nvram, tpm/…     where the VM has them
//!                              manifest.json    whose version, of when, how consistent
//!                              RUNBOOK.txt      how to start it with virsh
//!                              pinned           the user wants it to stay
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize, Serializer};
use uuid::Uuid;

use super::result::DiskResult;
use super::survey::Survey;
use super::{chain, naming, network};
use crate::error::{Error, ErrorCode, Result};
use crate::host::{Export, Host, quoted};
use crate::libvirt::Hypervisor;
use crate::libvirt::definition::{Definition, DiskSource, Edit};
use crate::transfer::Consistency;
use crate::transfer::summary::Summary;

/// The version of the manifest's format.
const FORMAT: u32 = 1;

const MANIFEST: &str = "manifest.json";

const PINNED: &str = "pinned";

/// The form of a point's name.
const NAME: &str = "%Y%m%dT%H%M%SZ";

/// What a point is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    /// The version of the program that made it.
    pub made_by: String,
    /// The VM's name.
    pub vm: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// The host that had it.
    pub source: String,
    /// The instant whose contents all disks hold.
    pub instant: Timestamp,
    /// Counts the points of a replica as they were made: clocks are put back.
    pub sequence: u64,
    /// What they are to the guest.
    pub consistency: PointConsistency,
    /// The disks.
    pub disks: Vec<PointDisk>,
    /// UEFI variables and the state of the TPM.
    pub small_files: Vec<String>,
    /// What networks and bridges of the source are on this host.
    pub networks: BTreeMap<String, String>,
}

/// What the disks of a point are to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PointConsistency {
    /// It was off.
    Off,
    /// Its file systems stood still.
    Application,
    /// As after a power cut.
    Crash,
}

impl PointConsistency {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Application => "application",
            Self::Crash => "crash",
        }
    }

    /// That of disks which were read so; a replica is never read torn.
    pub(super) fn of(consistency: Option<Consistency>) -> Self {
        match consistency {
            None => Self::Off,
            Some(Consistency::Application) => Self::Application,
            Some(Consistency::Crash | Consistency::Torn) => Self::Crash,
        }
    }
}

/// A disk of a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointDisk {
    /// `vda`, `sda`, …
    pub target: String,
    /// Its file in the point's directory, or in that of what was overwritten.
    pub file: String,
    /// What that is.
    #[serde(default, skip_serializing_if = "PointFormat::is_raw")]
    pub format: PointFormat,
    /// What the guest sees, in bytes.
    pub size_bytes: u64,
    /// Its contents in one figure; it is not shown, since a guest must not come to know the seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
}

/// What the file of a disk is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PointFormat {
    /// The bytes that the guest sees.
    #[default]
    Raw,
    /// A qcow2 image that stands on the next newer point, or on the head.
    #[serde(rename = "qcow2")]
    Delta,
}

impl PointFormat {
    fn is_raw(&self) -> bool {
        *self == Self::Raw
    }

    /// QEMU's name.
    pub(super) fn of_qemu(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Delta => "qcow2",
        }
    }

    /// The name of a disk's file, of the point of this name.
    fn file_of(self, point: &str, target: &str) -> String {
        match self {
            Self::Raw => file_of(target),
            Self::Delta => format!("{point}-{target}.qcow2"),
        }
    }
}

/// A point that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Point {
    /// By which it is called: its instant.
    pub name: String,
    /// Its directory.
    pub path: String,
    /// The user wants it to stay.
    pub pinned: bool,
    /// What it is of.
    #[serde(flatten, serialize_with = "as_shown")]
    pub manifest: Manifest,
}

fn as_shown<S: Serializer>(manifest: &Manifest, serializer: S) -> Result<S::Ok, S::Error> {
    let mut shown = manifest.clone();
    for disk in &mut shown.disks {
        disk.summary = None;
    }
    shown.serialize(serializer)
}

/// The points of a VM.
#[derive(Debug, Default)]
pub struct Listed {
    /// From the oldest on.
    pub points: Vec<Point>,
    /// What is among them and no point that can be read, and why.
    pub strange: Vec<String>,
}

impl Listed {
    /// Their instants.
    pub fn instants(&self) -> impl Iterator<Item = Timestamp> {
        self.points.iter().map(|point| point.manifest.instant)
    }
}

/// What a point is made of.
pub(super) struct Making<'a> {
    pub(super) survey: &'a Survey,
    pub(super) instant: Timestamp,
    pub(super) sequence: u64,
    pub(super) consistency: PointConsistency,
    /// The directory with the disks, `vda.raw` and so on, which hold that version.
    pub(super) head: &'a str,
    /// What the files of its disks are.
    pub(super) format: PointFormat,
    /// The transfers that brought them.
    pub(super) brought: &'a [DiskResult],
    /// The contents of small files, by their names in the point.
    pub(super) small: &'a [(String, Vec<u8>)],
    /// What networks and bridges of the source are on the host of the point.
    pub(super) networks: &'a BTreeMap<String, String>,
}

impl Making<'_> {
    fn summary_of(&self, target: &str) -> Result<Summary> {
        let mut brought = self.brought.iter();
        let disk = brought.find(|disk| disk.target == target);
        let summary = disk.and_then(|disk| disk.transfer.summary.clone());
        summary.ok_or_else(|| {
            let message = format!("of disk {target} no agent has said what it is now");
            Error::new(ErrorCode::Internal, message)
        })
    }
}

/// The points of one VM.
#[derive(Debug)]
pub(super) struct Points<'a> {
    on: &'a Host,
    directory: &'a str,
}

/// The number of the point that comes after these.
pub(super) fn next(points: &[Point]) -> u64 {
    let numbers = points.iter().map(|point| point.manifest.sequence);
    numbers.max().unwrap_or(0) + 1
}

/// The directory of the disks of a replica that is started.
pub(super) fn live(directory: &str) -> String {
    naming::join(directory, "live")
}

/// The name of a raw disk's file.
pub(super) fn file_of(target: &str) -> String {
    format!("{target}.raw")
}

impl<'a> Points<'a> {
    /// Those below the directory of a replica.
    pub(super) fn of(on: &'a Host, directory: &'a str) -> Self {
        Self { on, directory }
    }

    fn path(&self, name: &str) -> String {
        format!("{}/points/{name}", self.directory)
    }

    fn deltas(&self) -> String {
        naming::join(self.directory, "deltas")
    }

    /// Makes a point; its disks share their blocks with those of the head, or stand on them.
    ///
    /// # Errors
    /// When the host cannot be reached, or something cannot be written: then there is none.
    pub(super) async fn make(&self, making: &Making<'_>) -> Result<Point> {
        let unfinished = self.path(".new");
        self.on.remove(std::slice::from_ref(&unfinished)).await?;
        self.on.make_directory(&unfinished, "0700").await?;
        let name = name_of(making.instant);
        let disks: Vec<PointDisk> = making
            .survey
            .disks
            .iter()
            .map(|disk| {
                Ok(PointDisk {
                    target: disk.target.clone(),
                    file: making.format.file_of(&name, &disk.target),
                    format: making.format,
                    size_bytes: disk.size_bytes(),
                    summary: Some(making.summary_of(&disk.target)?),
                })
            })
            .collect::<Result<_>>()?;
        match making.format {
            PointFormat::Raw => self.share(making.head, &disks, &unfinished).await?,
            PointFormat::Delta => chain::make(self.on, &self.deltas(), &disks).await?,
        }

        let live = live(self.directory);
        let definition = definition_at(making.survey, &live)?;
        let manifest = Manifest {
            format: FORMAT,
            made_by: env!("CARGO_PKG_VERSION").to_owned(),
            vm: making.survey.name().to_owned(),
            uuid: definition.uuid(),
            source: making.survey.on.host().to_string(),
            instant: making.instant,
            sequence: making.sequence,
            consistency: making.consistency,
            disks,
            small_files: making.small.iter().map(|(name, _)| name.clone()).collect(),
            networks: making.networks.clone(),
        };
        let point = Point {
            path: self.path(&name),
            name,
            pinned: false,
            manifest,
        };
        let runbook = runbook(&point, &definition, &live)?;
        let json = serde_json::to_vec_pretty(&point.manifest).map_err(|error| {
            Error::new(ErrorCode::Internal, "a manifest that is no JSON").caused_by(error)
        })?;
        let texts = [
            ("domain.xml", definition.text().as_bytes()),
            ("RUNBOOK.txt", runbook.as_bytes()),
            (MANIFEST, &json),
        ];
        let small = making.small.iter();
        let small = small.map(|(name, contents)| (name.as_str(), contents.as_slice()));
        for (name, contents) in small.chain(texts) {
            let path = naming::join(&unfinished, name);
            if name.contains('/') {
                let (directory, _) = naming::split(&path);
                self.on.make_directory(directory, "0700").await?;
            }
            self.on.write_file(&path, contents).await?;
        }
        let words = ["mv", "-T", "--", &unfinished, &point.path];
        self.on.tool_output(&words, b"").await?;
        self.on
            .tool_output(&["sync", "--", &self.path("")], b"")
            .await?;
        Ok(point)
    }

    /// Copies the disks of the head, with which the copies share their blocks.
    async fn share(&self, head: &str, disks: &[PointDisk], to: &str) -> Result<()> {
        let heads: Vec<String> = disks
            .iter()
            .map(|disk| naming::join(head, &disk.file))
            .collect();
        let mut words = vec!["cp", "--reflink=always", "--preserve=mode", "--"];
        words.extend(heads.iter().map(String::as_str));
        words.push(to);
        self.on.tool_output(&words, b"").await?;
        let copies: Vec<String> = disks
            .iter()
            .map(|disk| naming::join(to, &disk.file))
            .collect();
        let mut words = vec!["sync", "--"];
        words.extend(copies.iter().map(String::as_str));
        self.on.tool_output(&words, b"").await.map(drop)
    }

    /// All that there are; none where there is no replica.
    ///
    /// # Errors
    /// When the host cannot be reached.
    pub(super) async fn list(&self) -> Result<Listed> {
        let mut listed = Listed::default();
        let Some(names) = self.on.names_in(&self.path("")).await? else {
            return Ok(listed);
        };
        let (manifests, pinned) = tokio::try_join!(self.manifests(), self.pinned())?;
        for name in names.into_iter().filter(|name| !name.starts_with('.')) {
            let path = self.path(&name);
            let file = naming::join(&path, MANIFEST);
            let json = manifests.get(&path).map(String::as_str);
            match serde_json::from_str(json.unwrap_or_default()) {
                Ok(manifest) => listed.points.push(Point {
                    pinned: pinned.contains(&path),
                    name,
                    path,
                    manifest,
                }),
                Err(why) => listed.strange.push(format!(
                    "{file} on {} is not what this program writes, and its point is left alone: {why}",
                    self.on
                )),
            }
        }
        listed.points.sort_by_key(|point| point.manifest.instant);
        Ok(listed)
    }

    /// The manifests by the directories that they are in, all by one command: a run looks at them
    /// every time.
    async fn manifests(&self) -> Result<BTreeMap<String, String>> {
        let at = self.path("");
        let grep = ["-exec", "grep", "-H", "", "{}", "+"];
        let said = self
            .on
            .tool_output(&[&finding(&at, MANIFEST)[..], &grep].concat(), b"")
            .await?;
        let mut manifests: BTreeMap<String, String> = BTreeMap::new();
        for line in said.lines() {
            if let Some((path, text)) = line.split_once(&format!("/{MANIFEST}:")) {
                let manifest = manifests.entry(path.to_owned()).or_default();
                manifest.push_str(text);
                manifest.push('\n');
            }
        }
        Ok(manifests)
    }

    /// The directories of points that are to stay.
    ///
    /// # Errors
    /// When the host cannot be reached.
    pub(super) async fn pinned(&self) -> Result<BTreeSet<String>> {
        let at = self.path("");
        let said = self.on.tool_output(&finding(&at, PINNED), b"").await?;
        let paths = said.lines().map(|path| naming::split(path).0.to_owned());
        Ok(paths.collect())
    }

    /// Has a point stay, or lets it go again.
    ///
    /// # Errors
    /// When the host cannot be reached, or that cannot be written.
    pub(super) async fn pin(&self, point: &Point, stays: bool) -> Result<()> {
        let path = naming::join(&point.path, PINNED);
        match stays {
            true => self.on.make_file(&path).await?,
            false => self.on.remove(std::slice::from_ref(&path)).await?,
        }
        let words = ["sync", "--", &point.path];
        self.on.tool_output(&words, b"").await.map(drop)
    }

    /// Removes points: each is there, or it is not.
    ///
    /// # Errors
    /// When the host cannot be reached, or one cannot be removed.
    pub(super) async fn remove(&self, points: &[&Point]) -> Result<()> {
        if points.iter().any(|point| chain::stands(point)) {
            let leaving = points.iter().map(|point| point.name.as_str()).collect();
            chain::part(self.on, &self.list().await?, &leaving).await?;
        }
        for point in points {
            let leaving = self.path(&format!(".gone-{}", point.name));
            let words = ["mv", "-T", "--", &point.path, &leaving];
            self.on.tool_output(&words, b"").await?;
        }
        self.sweep().await
    }

    /// Removes what was being made, or removed, by a run that broke off.
    ///
    /// # Errors
    /// When the host cannot be reached, or it cannot be removed.
    pub(super) async fn sweep(&self) -> Result<()> {
        let Some(names) = self.on.names_in(&self.path("")).await? else {
            return Ok(());
        };
        let hidden = names.iter().filter(|name| name.starts_with('.'));
        let hidden: Vec<String> = hidden.map(|name| self.path(name)).collect();
        self.on.remove(&hidden).await?;
        let deltas = self.deltas();
        let files = self.on.names_in(&deltas).await?.unwrap_or_default();
        let is_of_none = |file: &&String| {
            let point = file.split_once('-').map(|(point, _)| point);
            point.is_some_and(|point| !names.iter().any(|name| name == point))
        };
        let orphans = files.iter().filter(is_of_none);
        let orphans: Vec<String> = orphans.map(|file| naming::join(&deltas, file)).collect();
        self.on.remove(&orphans).await
    }
}

/// What finds the files of a name, one in each point of a directory.
fn finding<'w>(points: &'w str, name: &'w str) -> [&'w str; 8] {
    let depth = "2";
    [
        "find",
        points,
        "-mindepth",
        depth,
        "-maxdepth",
        depth,
        "-name",
        name,
    ]
}

/// The name of the point of an instant: no colon, which QEMU would take for a protocol.
pub(super) fn name_of(instant: Timestamp) -> String {
    instant.strftime(NAME).to_string()
}

/// The instant of a point by its name, to a second; `None` for what is none.
pub(super) fn instant_of(name: &str) -> Option<Timestamp> {
    let civil = DateTime::strptime(NAME, name).ok()?;
    Some(civil.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

/// The definition of a VM whose disks are raw files in another directory.
fn definition_at(survey: &Survey, directory: &str) -> Result<Definition> {
    let mut edits = Vec::new();
    for disk in &survey.disks {
        let (index, defined) = (disk.index, survey.defined(disk));
        let path = naming::join(directory, &file_of(&disk.target));
        edits.push(Edit::DiskSource {
            disk: index,
            source: DiskSource::File(path),
        });
        if defined.has_explicit_chain {
            edits.push(Edit::DropBackingStore { disk: index });
        }
        if disk.images[0].format != "raw" {
            edits.push(Edit::DiskFormat {
                disk: index,
                format: "raw".to_owned(),
            });
        }
    }
    survey.domain.definition.edited(&edits)
}

/// The changes after which disks that are in one directory are in another one.
pub(super) fn moved(definition: &Definition, from: &str, to: &str) -> Vec<Edit> {
    let from = format!("{from}/");
    let disks = definition.disks().iter().enumerate();
    let edits = disks.filter_map(|(disk, defined)| match &defined.source {
        DiskSource::File(path) => {
            let source = DiskSource::File(naming::join(to, path.strip_prefix(&from)?));
            Some(Edit::DiskSource { disk, source })
        }
        _ => None,
    });
    edits.collect()
}

impl Point {
    /// The path of the file of one of its disks.
    pub(super) fn file(&self, disk: &PointDisk) -> String {
        match disk.format {
            PointFormat::Raw => naming::join(&self.path, &disk.file),
            PointFormat::Delta => {
                let (directory, _) = naming::split(naming::split(&self.path).0);
                format!("{directory}/deltas/{}", disk.file)
            }
        }
    }

    /// One of its disks as a server shows it.
    pub(super) fn export(&self, disk: &PointDisk) -> Export {
        Export {
            name: disk.target.clone(),
            path: self.file(disk),
            format: disk.format.of_qemu().to_owned(),
            is_device: false,
            is_writable: false,
        }
    }

    /// The commands that copy it to where a VM may change it: its disks to `live`, which must not be
    /// there, and the small files to where libvirt has those.
    pub(super) fn copying(&self, definition: &Definition, live: &str) -> Vec<Vec<String>> {
        let Self { path, manifest, .. } = self;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let mut all: Vec<Vec<String>> = vec![words(&["mkdir", "-m", "0711", live])];
        for disk in &manifest.disks {
            let (from, to) = (self.file(disk), naming::join(live, &file_of(&disk.target)));
            all.push(match disk.format {
                PointFormat::Raw => words(&["cp", "--reflink=auto", "--", &from, &to]),
                PointFormat::Delta => words(&[
                    "qemu-img", "convert", "-f", "qcow2", "-O", "raw", &from, &to,
                ]),
            });
        }
        if let Some(nvram) = self.nvram(definition) {
            all.push(words(&["mkdir", "-p", naming::split(&nvram).0]));
            all.push(words(&["cp", "--", &naming::join(path, "nvram"), &nvram]));
        }
        if let Some(state) = self.tpm() {
            all.push(words(&["mkdir", "-p", "-m", "0711", &state]));
            all.push(words(&[
                "cp",
                "-r",
                "--",
                &naming::join(path, "tpm/."),
                &state,
            ]));
        }
        all
    }

    /// What that makes outside of `live`.
    pub(super) fn made(&self, definition: &Definition) -> Vec<String> {
        self.nvram(definition)
            .into_iter()
            .chain(self.tpm())
            .collect()
    }

    /// Where libvirt has the UEFI variables, if there are any.
    fn nvram(&self, definition: &Definition) -> Option<String> {
        let mut small = self.manifest.small_files.iter();
        small.find(|name| *name == "nvram")?;
        Hypervisor::nvram_path(definition, &self.manifest.vm)
    }

    /// Where libvirt has the state of the TPM, if there is any.
    fn tpm(&self) -> Option<String> {
        let mut small = self.manifest.small_files.iter();
        small.find(|name| name.starts_with("tpm/"))?;
        Some(Hypervisor::tpm_directory(self.manifest.uuid))
    }
}

/// How to start the VM from a point, with virsh alone.
fn runbook(point: &Point, definition: &Definition, live: &str) -> Result<String> {
    let Manifest {
        vm,
        source,
        instant,
        networks,
        ..
    } = &point.manifest;
    let mut text = format!(
        "{vm} as it was on {source} at {instant}\n\n\
         To start it here without kvm-clone-ctl, as root. First be sure that it does not run on \
         {source}\nany more: two of one VM spoil each other's work. {live} must not be there yet.\n\n"
    );
    let define = ["virsh", "define", &naming::join(&point.path, "domain.xml")].map(str::to_owned);
    let start = ["virsh", "start", vm].map(str::to_owned);
    let last = [define.to_vec(), start.to_vec()];
    for words in point.copying(definition, live).iter().chain(&last) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {}", quoted(&words)?);
    }
    let connected = definition.interfaces().iter();
    let connected = connected.filter_map(|interface| network::name_of(&interface.source));
    let connected: Vec<String> = connected
        .map(|name| match networks.get(name) {
            Some(here) => format!("{name} (here {here})"),
            None => name.to_owned(),
        })
        .collect();
    if chain::stands(point) {
        text.push_str(
            "\nIts disks need those of newer points, and head/. Where head/ has a file .*.kc-applying, a \
             sync broke off\njust then: \"kvm-clone-ctl recover\" for this host ends that first.\n",
        );
    }
    if !connected.is_empty() {
        let _ = writeln!(
            text,
            "\nIt is connected to: {}. What is called otherwise here, \"virsh edit\" changes.",
            connected.join(", ")
        );
    }
    Ok(text)
}
