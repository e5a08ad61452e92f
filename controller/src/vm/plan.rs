//! The plan of a clone: what gets which name and address, which files are carried, and the new
//! definition. Making it changes nothing; whatever is in its way becomes an obstacle.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use uuid::Uuid;

use super::checks::{self, Connecting, Destination};
use super::clone::CloneRequest;
use super::container::Container;
use super::obstacle::Obstacles;
use super::pairs::Subject;
use super::record::{CloneRecord, Replaced};
use super::reference::Reference;
use super::survey::{Survey, SurveyedDisk, holds_data, source_path};
use super::{naming, space};
use crate::error::{Error, ErrorCode, Result};
use crate::libvirt::definition::{Definition, Disk, DiskSource, Edit, InterfaceSource, MacAddress};
use crate::libvirt::{Hypervisor, Image, Pool};

/// Everything that a clone will do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The new VM.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its addresses, in the interfaces' order.
    pub macs: Vec<String>,
    /// The files that are carried, in order.
    pub files: Vec<Carried>,
    /// The new definition.
    #[serde(skip)]
    pub(super) definition: Definition,
    /// Images in a format of their own that get what the guest sees.
    #[serde(skip)]
    pub(super) containers: Vec<Container>,
    /// UEFI variables and the TPM's state: from where to where.
    #[serde(skip)]
    pub(super) small_files: Vec<(String, String)>,
    /// Images that must be told where the one below them is now.
    #[serde(skip)]
    pub(super) overlays: Vec<Overlay>,
    /// What is remembered until it is done.
    #[serde(skip)]
    pub(super) record: CloneRecord,
    /// An interrupted clone is taken up.
    #[serde(skip)]
    pub(super) resumed: bool,
    /// What an interrupted clone under this name has left that is of no use for this one.
    #[serde(skip)]
    pub(super) abandoned: Vec<String>,
}

/// A file that a transfer carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Carried {
    /// The disk that it belongs to (`vda`), or what it is (`kernel`).
    pub target: String,
    /// Its path on the source host.
    pub source: String,
    /// Its path on the destination host.
    pub destination: String,
    /// What it occupies at the source, in bytes.
    pub bytes_data: u64,
    /// Others than its owner may read it: the files that a VM boots from.
    #[serde(skip)]
    pub(super) public: bool,
}

/// An image and what it stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Overlay {
    /// What it is told.
    pub(super) reference: Reference,
    /// The path that the reference means.
    pub(super) below: String,
    /// It already holds the reference.
    pub(super) is_right: bool,
}

/// Makes the plan.
pub(super) struct Planner<'a> {
    pub(super) request: &'a CloneRequest,
    subject: Subject,
    pub(super) survey: &'a Survey,
    pub(super) to: &'a Destination,
    pub(super) obstacles: &'a mut Obstacles,
    pub(super) warnings: &'a mut Vec<String>,
    pool: Option<Pool>,
    record: Option<CloneRecord>,
    /// Names that are taken, by directory.
    taken: BTreeMap<String, BTreeSet<String>>,
    edits: Vec<Edit>,
    files: Vec<Carried>,
    small_files: Vec<(String, String)>,
    overlays: Vec<Overlay>,
    containers: Vec<Container>,
    made: Vec<String>,
}

impl<'a> Planner<'a> {
    pub(super) fn new(
        request: &'a CloneRequest,
        subject: Subject,
        survey: &'a Survey,
        to: &'a Destination,
        obstacles: &'a mut Obstacles,
        warnings: &'a mut Vec<String>,
    ) -> Self {
        Self {
            request,
            subject,
            survey,
            to,
            obstacles,
            warnings,
            pool: None,
            record: None,
            taken: BTreeMap::new(),
            edits: Vec::new(),
            files: Vec::new(),
            small_files: Vec::new(),
            overlays: Vec::new(),
            containers: Vec::new(),
            made: Vec::new(),
        }
    }

    /// The plan, as far as the obstacles let it be made.
    ///
    /// # Errors
    /// Whatever keeps the hosts from answering.
    pub(super) async fn plan(mut self) -> Result<Plan> {
        let name = self.request.new_name(self.survey);
        let found = CloneRecord::read(&self.to.on, name).await?;
        let source_uuid = self.definition().uuid();
        let left = found
            .as_ref()
            .map(CloneRecord::leftovers)
            .unwrap_or_default();
        self.record = found.filter(|record| record.source_uuid == source_uuid);
        self.find_pool().await?;
        let replaced = self.replaced(name).await?;
        let uuid = self
            .record
            .as_ref()
            .map_or_else(Uuid::new_v4, |record| record.uuid);
        self.name(name, uuid);
        let macs = self.interfaces(replaced.as_ref())?;
        self.disks(name).await?;
        self.media().await?;
        self.boot_files().await?;
        self.firmware(name, uuid).await?;
        space::check(&self.files, self.to.on.host(), self.obstacles).await?;
        let definition = self.definition().edited(&self.edits)?;
        let record = CloneRecord {
            format: 1,
            source_uuid,
            name: name.to_owned(),
            uuid,
            macs: macs.clone(),
            files: self
                .files
                .iter()
                .map(|file| (file.source.clone(), file.destination.clone()))
                .chain(self.small_files.iter().cloned())
                .collect(),
            made: self.made,
            replaced,
        };
        let kept = record.leftovers();
        let mut abandoned = left;
        abandoned.retain(|path| !kept.contains(path) && !self.to.uses(path));
        Ok(Plan {
            name: name.to_owned(),
            uuid,
            macs: macs.into_values().collect(),
            files: self.files,
            definition,
            containers: self.containers,
            small_files: self.small_files,
            overlays: self.overlays,
            record,
            resumed: self.record.is_some(),
            abandoned,
        })
    }

    fn definition(&self) -> &'a Definition {
        &self.survey.domain.definition
    }

    fn name(&mut self, name: &str, uuid: Uuid) {
        self.edits.push(Edit::Uuid(uuid));
        if name != self.definition().name() {
            self.edits.push(Edit::Name(name.to_owned()));
        }
        if self.definition().has_genid() {
            self.edits.push(Edit::GenId(Uuid::new_v4()));
        }
    }

    async fn find_pool(&mut self) -> Result<()> {
        let Some(name) = &self.request.dest_pool else {
            return Ok(());
        };
        match self.to.on.pool(name).await {
            Ok(pool) => self.pool = Some(pool),
            Err(error) => self.obstacles.take(error)?,
        }
        Ok(())
    }

    /// The VM that has the name already and gives way, if the user wants that.
    async fn replaced(&mut self, name: &str) -> Result<Option<Replaced>> {
        let earlier = self
            .record
            .as_ref()
            .and_then(|record| record.replaced.clone());
        let Some(there) = self.to.named(name) else {
            return Ok(earlier);
        };
        let host = self.to.on.host();
        if self
            .record
            .as_ref()
            .is_some_and(|record| record.uuid == there.uuid())
        {
            // The clone is defined already; only its end is missing.
            return Ok(earlier);
        }
        if there.uuid() == self.definition().uuid() && self.request.is_one_host() {
            self.obstacles.refused(
                format!("{name} would be cloned onto itself"),
                "give the clone another name with --new-name",
            );
            return Ok(None);
        }
        if !self.request.force {
            self.obstacles.refused(
                format!("{host} has a VM {name} already"),
                "give the clone another name with --new-name, or replace the VM with --force",
            );
            return Ok(None);
        }
        let domain = self.to.on.domain(&there.uuid().to_string()).await?;
        if !domain.state.is_off() {
            self.obstacles.refused(
                format!(
                    "{name} on {host}, which is to be replaced, is {}",
                    domain.state
                ),
                "shut it down first",
            );
        }
        Ok(Some(Replaced {
            uuid: there.uuid(),
            definition: domain.definition.text().to_owned(),
            autostart: domain.autostart,
            files: self.files_of(there).await?,
        }))
    }

    /// The files of a VM that no other VM uses: disks, UEFI variables, the TPM's state.
    async fn files_of(&mut self, there: &Definition) -> Result<Vec<String>> {
        let mut files = Vec::new();
        for disk in there
            .disks()
            .iter()
            .filter(|disk| holds_data(disk) && !disk.shareable && !disk.read_only)
        {
            let Some(path) = source_path(&self.to.on, disk).await? else {
                continue;
            };
            let others = self
                .to
                .definitions
                .iter()
                .filter(|other| other.uuid() != there.uuid());
            let is_used = others
                .flat_map(Definition::disks)
                .any(|other| checks::is_at(other, &path));
            if is_used || matches!(disk.source, DiskSource::Block(_)) {
                self.warnings
                    .push(format!("{path} of the VM that is replaced is kept"));
            } else {
                files.push(path);
            }
        }
        files.extend(Hypervisor::nvram_path(there, there.name()));
        if there.tpm().is_some() {
            files.push(Hypervisor::tpm_directory(there.uuid()));
        }
        Ok(files)
    }

    /// Connects the interfaces, and gives them their addresses.
    fn interfaces(&mut self, replaced: Option<&Replaced>) -> Result<BTreeMap<usize, String>> {
        let mut used = self.to.macs();
        if let Some(there) = replaced.and_then(|replaced| self.to.with_uuid(replaced.uuid)) {
            for mac in there
                .interfaces()
                .iter()
                .filter_map(|each| each.mac.as_ref()?.parse().ok())
            {
                used.remove(&mac);
            }
        }
        let mut macs = BTreeMap::new();
        for (index, interface) in self.definition().interfaces().iter().enumerate() {
            self.connect(
                index,
                &interface.source,
                self.request.network.target(interface),
            );
            let kept = self
                .record
                .as_ref()
                .and_then(|record| record.macs.get(&index)?.parse().ok());
            let own = interface.mac.as_ref().and_then(|mac| mac.parse().ok());
            let mac = match (self.request.network.new_mac(interface), kept, own) {
                (Some(wanted), _, _) => wanted,
                (None, _, Some(own)) if self.request.preserve_mac => own,
                (None, Some(kept), _) => kept,
                (None, None, _) => new_mac(&used)?,
            };
            let is_new = Some(mac) != kept;
            if is_new && used.contains(&mac) {
                self.obstacles.refused(
                    format!(
                        "a VM on {} has the MAC address {mac} already",
                        self.to.on.host()
                    ),
                    "clone without --preserve-mac, or give another one in --network-config",
                );
            }
            used.insert(mac);
            macs.insert(index, mac.to_string());
            self.edits.push(Edit::Mac {
                interface: index,
                mac,
            });
        }
        Ok(macs)
    }

    fn connect(&mut self, index: usize, source: &InterfaceSource, wanted: Option<&str>) {
        let connecting = Connecting {
            vm: self.survey.name(),
            to: self.to,
            starts: self.request.start,
        };
        let edit = connecting.connect(index, source, wanted, self.obstacles, self.warnings);
        self.edits.extend(edit);
    }

    /// Finds a place for every image of every disk.
    async fn disks(&mut self, name: &str) -> Result<()> {
        for (index, disk) in self.definition().disks().iter().enumerate() {
            if self.request.exclude_disks.contains(&disk.target) {
                self.edits.push(Edit::RemoveDisk { disk: index });
            }
        }
        for disk in &self.survey.disks {
            let defined = self.survey.defined(disk);
            let images = match self.subject {
                Subject::Images => &disk.images[..],
                Subject::Contents => &disk.images[..1],
            };
            let mut paths = Vec::new();
            for image in images {
                match self.place(disk, image, name).await? {
                    Some(path) => paths.push(path),
                    None => break,
                }
            }
            if paths.len() < images.len() {
                continue;
            }
            self.edits.push(Edit::DiskSource {
                disk: disk.index,
                source: self.new_source(defined, &paths[0]),
            });
            if defined.has_explicit_chain {
                self.edits.push(Edit::DropBackingStore { disk: disk.index });
            }
            match self.subject {
                Subject::Images => self.chain(disk, &paths),
                Subject::Contents => self.contents(disk, &paths[0]),
            }
        }
        if !self.survey.domain.snapshots.is_empty() {
            self.warnings.push(format!(
                "libvirt's snapshots do not travel: {}",
                self.survey.domain.snapshots.join(", ")
            ));
        }
        Ok(())
    }

    fn new_source(&self, defined: &Disk, path: &str) -> DiskSource {
        match (&defined.source, &self.pool) {
            (DiskSource::Volume { .. }, Some(pool)) => DiskSource::Volume {
                pool: pool.name.clone(),
                volume: naming::split(path).1.to_owned(),
            },
            _ => DiskSource::File(path.to_owned()),
        }
    }

    /// What holds what the guest sees of a disk.
    fn contents(&mut self, disk: &SurveyedDisk, path: &str) {
        let had = disk.images[0].format.as_str();
        let format = self.request.dest_format.of(had);
        let target = &disk.target;
        if !matches!(format, "raw" | "qcow2") {
            self.obstacles.refused(
                format!("disk {target} is {format}, which what a guest sees is not written into"),
                "give its copy another format: --dest-format qcow2 or raw",
            );
            return;
        }
        if format != had {
            self.edits.push(Edit::DiskFormat {
                disk: disk.index,
                format: format.to_owned(),
            });
        }
        if format == "qcow2" {
            self.containers.push(Container {
                target: target.clone(),
                path: path.to_owned(),
                format: format.to_owned(),
                size_bytes: disk.size_bytes(),
                exists: false,
            });
        }
        let snapshots = disk
            .images
            .iter()
            .flat_map(|image| &image.internal_snapshots);
        for snapshot in snapshots {
            self.warnings.push(format!(
                "the snapshot {snapshot} inside of disk {target} does not travel with what its guest sees"
            ));
        }
    }

    /// What the images of a disk must say of those below them.
    fn chain(&mut self, disk: &SurveyedDisk, paths: &[String]) {
        for (at, below) in paths.iter().enumerate().skip(1) {
            let (image, path) = (&disk.images[at - 1], &paths[at - 1]);
            let had = image.backing.clone().unwrap_or_default();
            let ((here, _), (there, name)) = (naming::split(path), naming::split(below));
            let backing = if had.starts_with('/') || here != there {
                below.clone()
            } else {
                name.to_owned()
            };
            self.overlays.push(Overlay {
                is_right: backing == had,
                reference: Reference {
                    path: path.clone(),
                    format: image.format.clone(),
                    backing,
                    backing_format: disk.images[at].format.clone(),
                },
                below: below.clone(),
            });
        }
    }

    /// The path for the copy of an image; `None` when there is no place for it.
    async fn place(
        &mut self,
        disk: &SurveyedDisk,
        image: &Image,
        name: &str,
    ) -> Result<Option<String>> {
        let target = &disk.target;
        let (own, file) = naming::split(&image.path);
        if image.is_device() && self.request.dest_pool.is_none() {
            self.obstacles.refused(
                format!("disk {target} is the block device {}", image.path),
                "say where its copy goes: --dest-pool POOL",
            );
            return Ok(None);
        }
        let directory = match (&self.pool, &self.request.dest_dir) {
            (Some(pool), _) => pool.directory.clone(),
            (None, Some(directory)) => directory.clone(),
            (None, None) => own.to_owned(),
        };
        // A pool that cannot be used has been told of.
        if self.request.dest_pool.is_some() && self.pool.is_none()
            || !self.look_into(&directory).await?
        {
            return Ok(None);
        }
        let format = match self.subject {
            Subject::Images => &image.format,
            Subject::Contents => self.request.dest_format.of(&image.format),
        };
        let file = if image.is_device() {
            format!("{file}.{format}")
        } else {
            naming::in_format(file, &image.format, format)
        };
        let wanted = naming::for_copy(&file, self.definition().name(), name);
        let path = self.destination_of(&image.path, &directory, &wanted);
        let allocated = |image: &Image| image.facts.allocated_bytes.min(image.facts.size_bytes);
        let bytes_data = match self.subject {
            Subject::Images => allocated(image),
            Subject::Contents => disk.images.iter().map(allocated).sum(),
        };
        // Two disks may stand on one image: it is carried once.
        if self.files.iter().all(|file| file.source != image.path) {
            self.files.push(Carried {
                target: target.clone(),
                source: image.path.clone(),
                destination: path.clone(),
                bytes_data,
                public: false,
            });
        }
        Ok(Some(path))
    }

    /// Whether the clone that is taken up is a VM already, and only its end is missing.
    fn is_defined(&self) -> bool {
        let uuid = self.record.as_ref().map(|record| record.uuid);
        uuid.is_some_and(|uuid| self.to.with_uuid(uuid).is_some())
    }

    /// The path that a file of the source was given, or is given now.
    fn destination_of(&mut self, source: &str, directory: &str, wanted: &str) -> String {
        if let Some(planned) = self.files.iter().find(|file| file.source == source) {
            return planned.destination.clone();
        }
        let recorded = self
            .record
            .as_ref()
            .and_then(|record| record.files.get(source));
        let is_ours = |path: &&String| {
            let is_there = naming::split(path).0 == directory.trim_end_matches('/');
            // Somebody may have made a VM of what an interrupted clone has left.
            is_there && (self.is_defined() || !self.to.uses(path))
        };
        if let Some(path) = recorded.filter(is_ours) {
            return path.clone();
        }
        let taken = self.taken.entry(directory.to_owned()).or_default();
        let name = naming::free(wanted, taken);
        taken.insert(name.clone());
        naming::join(directory, &name)
    }

    /// Learns the names in a directory of the destination; false, and an obstacle, when it is not
    /// there.
    async fn look_into(&mut self, directory: &str) -> Result<bool> {
        if self.taken.contains_key(directory) {
            return Ok(true);
        }
        let Some(names) = self.to.on.host().names_in(directory).await? else {
            self.obstacles.missing(
                format!("{} has no directory {directory}", self.to.on.host()),
                "make it there, or choose another place with --dest-dir or --dest-pool",
            );
            return Ok(false);
        };
        self.taken
            .insert(directory.to_owned(), names.into_iter().collect());
        Ok(true)
    }

    /// Media in drives: what the destination has stays in, the rest is carried or taken out.
    async fn media(&mut self) -> Result<()> {
        for (index, disk) in self.definition().disks().iter().enumerate() {
            if holds_data(disk) || self.request.exclude_disks.contains(&disk.target) {
                continue;
            }
            let path = match source_path(&self.survey.on, disk).await {
                Ok(Some(path)) => path,
                Ok(None) => continue,
                Err(error) => {
                    self.warnings
                        .push(format!("drive {}: {}", disk.target, error.one_line()));
                    self.edits.push(Edit::DiskSource {
                        disk: index,
                        source: DiskSource::None,
                    });
                    continue;
                }
            };
            if self.to.on.host().file_facts(&path).await?.is_some() {
                continue;
            }
            if self.request.with_boot_files {
                self.carry(&disk.target, &path).await?;
                self.edits.push(Edit::DiskSource {
                    disk: index,
                    source: DiskSource::File(path),
                });
            } else {
                self.warnings.push(format!(
                    "{} has no {path}: the drive {} of the clone is empty (--with-boot-files carries it)",
                    self.to.on.host(),
                    disk.target
                ));
                self.edits.push(Edit::DiskSource {
                    disk: index,
                    source: DiskSource::None,
                });
            }
        }
        Ok(())
    }

    /// Kernel, initrd and firmware by path: the destination has them, they are carried, or they
    /// are in the way.
    async fn boot_files(&mut self) -> Result<()> {
        let definition = self.definition();
        let files = definition
            .boot_files()
            .iter()
            .map(|file| (file.element.as_str(), file.path.as_str()));
        let loader = definition
            .firmware()
            .loader
            .as_deref()
            .map(|path| ("loader", path));
        for (what, path) in files.chain(loader) {
            if self.to.on.host().file_facts(path).await?.is_some() {
                continue;
            }
            if self.request.with_boot_files {
                self.carry(what, path).await?;
            } else {
                self.obstacles.missing(
                    format!(
                        "{} has no {path}, the {what} of {}",
                        self.to.on.host(),
                        definition.name()
                    ),
                    "carry it along with --with-boot-files, or provide it there",
                );
            }
        }
        Ok(())
    }

    /// Carries a file to the path that it has at the source, where nothing is.
    async fn carry(&mut self, what: &str, path: &str) -> Result<()> {
        let Some(facts) = self.survey.on.host().file_facts(path).await? else {
            let host = self.survey.on.host();
            self.obstacles.add(
                ErrorCode::NotFound,
                format!("{host} itself has no {path} ({what})"),
                "take it out of the definition",
            );
            return Ok(());
        };
        self.files.push(Carried {
            target: what.to_owned(),
            source: path.to_owned(),
            destination: path.to_owned(),
            bytes_data: facts.allocated_bytes.min(facts.size_bytes),
            public: true,
        });
        Ok(())
    }

    /// UEFI variables and the TPM's state.
    async fn firmware(&mut self, name: &str, uuid: Uuid) -> Result<()> {
        let definition = self.definition();
        if let Some(own) = Hypervisor::nvram_path(definition, definition.name()) {
            let (directory, file) = naming::split(&own);
            let names = self
                .to
                .on
                .host()
                .names_in(directory)
                .await?
                .unwrap_or_default();
            self.taken
                .insert(directory.to_owned(), names.into_iter().collect());
            let wanted = naming::for_copy(file, definition.name(), name);
            let path = self.destination_of(&own, directory, &wanted);
            let is_custom = path == Hypervisor::default_nvram_path(name);
            if definition.firmware().nvram.is_some() || !is_custom {
                self.edits.push(Edit::Nvram(path.clone()));
            }
            if self.survey.nvram.is_some() {
                self.small_files.push((own, path));
            } else {
                self.nvram_template().await?;
            }
        }
        let (old, new) = (
            Hypervisor::tpm_directory(definition.uuid()),
            Hypervisor::tpm_directory(uuid),
        );
        for file in &self.survey.tpm_files {
            self.small_files
                .push((naming::join(&old, file), naming::join(&new, file)));
        }
        if !self.survey.tpm_files.is_empty() {
            self.made.push(new);
        }
        Ok(())
    }

    /// What the variables of a VM that never ran are made from.
    async fn nvram_template(&mut self) -> Result<()> {
        let Some(template) = &self.definition().firmware().nvram_template else {
            return Ok(());
        };
        if self.to.on.host().file_facts(template).await?.is_none() {
            self.obstacles.missing(
                format!(
                    "{} has no {template}, which the UEFI variables are made from",
                    self.to.on.host()
                ),
                "install the firmware there (package ovmf or edk2-ovmf)",
            );
        }
        Ok(())
    }
}

/// An address of QEMU's own range that nothing has.
fn new_mac(used: &BTreeSet<MacAddress>) -> Result<MacAddress> {
    loop {
        let mut bytes = [0; 3];
        getrandom::fill(&mut bytes).map_err(|error| {
            Error::new(ErrorCode::Internal, "the system gives no random numbers").caused_by(error)
        })?;
        let mac = MacAddress::random_qemu(bytes);
        if !used.contains(&mac) {
            return Ok(mac);
        }
    }
}
