//! Reverse deltas: a qcow2 image that stands on a destination goes on showing what that was, because
//! the blocks that a commit is about to overwrite are put there first.
//!
//! ```text
//!  0        64 KiB
//!  | header | L1 | blocks … L2 | blocks … L2 | refcounts | table of these |
//! ```
//!
//! Any QEMU reads it (docs/interop/qcow2.rst of its source): its clusters are our blocks, and one L2
//! table is for 8192 of them. It is written anew and takes the old one's place as a whole, which is
//! empty as a rule: who made the image puts a next one on the destination as soon as the commit is
//! done. What a run that broke off then has put there stays, for that is older than what the
//! destination holds.

use std::path::Path;

use kvm_clone_protocol::digest::is_zero;
use kvm_clone_protocol::message::{Apply, FailureCode};
use kvm_clone_protocol::sync::RunKind;
use kvm_clone_protocol::units::{BLOCK_SIZE, Geometry};

use super::attributes;
use super::destination::Destination;
use super::file::DiskFile;
use super::image::Image;
use super::names::{Names, remove, rename_over};
use super::read::Missing;
use super::throttle::admit;
use crate::failure::Failure;

const CLUSTER: usize = 64 * 1024;
const _: () = assert!(CLUSTER as u64 == BLOCK_SIZE);

/// Entries of a table that fills a cluster.
const ENTRIES: usize = CLUSTER / 8;

/// References are counted by 2^4 bits each.
const REFCOUNT_ORDER: u32 = 4;

/// Clusters whose references one cluster counts.
const COUNTED: u64 = CLUSTER as u64 / 2;

/// The first bytes of an image, with its version.
const MAGIC: [u8; 8] = *b"QFI\xfb\0\0\0\x03";

/// In an entry of L1 and L2: exactly one reference. Below it, the offset in the file.
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// In an entry of L2: the cluster is compressed; it is zero.
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Where the fields of the header are that matter here.
mod at {
    use std::ops::Range;

    pub(super) const CLUSTER_BITS: Range<usize> = 20..24;
    pub(super) const SIZE: Range<usize> = 24..32;
    pub(super) const CRYPT_METHOD: Range<usize> = 32..36;
    pub(super) const L1_SIZE: Range<usize> = 36..40;
    pub(super) const L1_OFFSET: Range<usize> = 40..48;
    pub(super) const REFCOUNTS_OFFSET: Range<usize> = 48..56;
    pub(super) const REFCOUNTS_CLUSTERS: Range<usize> = 56..60;
    pub(super) const SNAPSHOTS: Range<usize> = 60..64;
    pub(super) const INCOMPATIBLE: Range<usize> = 72..80;
    pub(super) const AUTOCLEAR: Range<usize> = 88..96;
    pub(super) const REFCOUNT_ORDER: Range<usize> = 96..100;
}

impl Destination {
    /// Puts what a commit will overwrite into the delta at `path`, unless something of the same place
    /// is there already.
    ///
    /// # Errors
    /// [`Failure`]: refused, when changes do not wait beside the destination, or that is no image
    /// which can take them; io; no space. Then the delta is what it was.
    pub(crate) fn preserve(&self, path: &Path) -> Result<(), Failure> {
        let apply = self.work.as_ref().map(|work| work.apply);
        match (self.staged(), apply) {
            (Some((base, journal)), _) => extend(path, base, journal.header().size, |each| {
                journal.for_each(|index, _| each(index))
            }),
            // Nothing is overwritten.
            (None, None | Some(Apply::New)) => Ok(()),
            (None, Some(_)) => {
                let disk = self.names.path.display();
                Err(refused(format!(
                    "what {disk} overwrites can be kept only of changes that wait beside it \
                     (--apply staged)"
                )))
            }
        }
    }
}

/// Puts blocks of `base`, which `changed` calls in their order, into the delta at `path`, and those
/// that are cut off when it has `size` bytes.
fn extend(
    path: &Path,
    base: &Image,
    size: u64,
    changed: impl FnOnce(&mut dyn FnMut(u64) -> Result<(), Failure>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::io("writing", path, &error);
    let names = Names::of_file(path).ok_or_else(|| refused("no file is named".to_owned()))?;
    let old = Old::open(path)?;
    let made = names.new_file();
    remove(&made).map_err(failed)?;
    let file = DiskFile::create(&made).map_err(failed)?;
    let written = (|| {
        attributes::copy(&old.file, &file).map_err(failed)?;
        let mut writer = Writer::new(&old, file);
        writer.carry_over()?;
        changed(&mut |index| writer.put(index, base))?;
        let was = Geometry::new(base.size()?).ok_or_else(|| old.damaged("stands on too much"))?;
        let mut at = size / BLOCK_SIZE;
        while size < was.size() && at < was.block_count() {
            for run in base.map(at, was)?.runs {
                let end = at + run.count;
                if run.kind == RunKind::Data {
                    (at..end).try_for_each(|index| writer.put(index, base))?;
                }
                at = end;
            }
        }
        writer.finish()?;
        rename_over(&made, path).map_err(failed)?;
        names.sync().map_err(failed)
    })();
    if written.is_err() {
        // It is of no use, and removed by the next one otherwise.
        let _ = remove(&made);
    }
    written
}

fn refused(message: String) -> Failure {
    Failure::new(FailureCode::Refused, message)
}

/// The delta as it is.
struct Old<'a> {
    path: &'a Path,
    file: DiskFile,
    /// Its first cluster: with what it stands on.
    header: Vec<u8>,
    /// What a guest sees, in bytes.
    size: u64,
    l1: Vec<u64>,
}

impl<'a> Old<'a> {
    fn open(path: &'a Path) -> Result<Self, Failure> {
        let file = DiskFile::open(path).map_err(|error| Failure::io("opening", path, &error))?;
        let mut old = Self {
            path,
            file,
            header: vec![0; CLUSTER],
            size: 0,
            l1: Vec::new(),
        };
        let mut header = vec![0; CLUSTER];
        old.read(&mut header, 0)?;
        let u32_at = |range| be_u32(&header, range);
        let u64_at = |range| be_u64(&header, range);
        let is_plain = header.starts_with(&MAGIC)
            && u32_at(at::CLUSTER_BITS) == CLUSTER.ilog2()
            && u32_at(at::CRYPT_METHOD) == 0
            && u32_at(at::SNAPSHOTS) == 0
            && u64_at(at::INCOMPATIBLE) == 0
            && u64_at(at::AUTOCLEAR) == 0
            && u32_at(at::REFCOUNT_ORDER) == REFCOUNT_ORDER;
        let size = u64_at(at::SIZE);
        let tables = size.div_ceil(BLOCK_SIZE).div_ceil(ENTRIES as u64);
        if !is_plain || Geometry::new(size).is_none() || u64::from(u32_at(at::L1_SIZE)) < tables {
            return Err(old.damaged("is no plain qcow2 image with clusters of 64 KiB"));
        }
        let tables = usize::try_from(tables).map_err(|_| old.damaged("is too large"))?;
        old.size = size;
        old.l1 = old.table(u64_at(at::L1_OFFSET), tables)?;
        old.header = header;
        Ok(old)
    }

    fn damaged(&self, why: &str) -> Failure {
        refused(format!("{} {why}", self.path.display()))
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), Failure> {
        let read = self
            .file
            .read_full_at(bytes, offset)
            .map_err(|error| Failure::io_at("reading", self.path, offset, &error))?;
        match read == bytes.len() {
            true => Ok(()),
            false => Err(self.damaged("ends too early")),
        }
    }

    fn table(&self, offset: u64, entries: usize) -> Result<Vec<u64>, Failure> {
        let mut bytes = vec![0; entries * 8];
        self.read(&mut bytes, offset)?;
        let entries = bytes.chunks_exact(8);
        Ok(entries.map(|entry| be_u64(entry, 0..8)).collect())
    }

    /// The L2 table of a region; `None` for one that has none.
    fn l2(&self, region: usize) -> Result<Option<Vec<u64>>, Failure> {
        match self.l1[region] & OFFSET {
            0 => Ok(None),
            offset => self.table(offset, ENTRIES).map(Some),
        }
    }
}

/// The delta as it will be.
struct Writer<'a> {
    old: &'a Old<'a>,
    file: DiskFile,
    /// The next free byte.
    end: u64,
    l1: Vec<u64>,
    /// The region, of as many blocks as an L2 table has entries, that is being written.
    region: usize,
    l2: Vec<u64>,
    block: Vec<u8>,
}

impl<'a> Writer<'a> {
    fn new(old: &'a Old<'a>, file: DiskFile) -> Self {
        let tables = (old.l1.len() * 8).div_ceil(CLUSTER) as u64;
        Self {
            old,
            file,
            end: (1 + tables) * BLOCK_SIZE,
            l1: vec![0; old.l1.len()],
            region: 0,
            l2: vec![0; ENTRIES],
            block: vec![0; CLUSTER],
        }
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), Failure> {
        let path = self.old.path;
        self.file
            .write_all_at(bytes, offset)
            .map_err(|error| Failure::io_at("writing", path, offset, &error))
    }

    /// Puts a cluster behind the others, and gives the entry of a table for it.
    fn append(&mut self, cluster: &[u8]) -> Result<u64, Failure> {
        let offset = self.end;
        self.write(cluster, offset)?;
        self.end += BLOCK_SIZE;
        Ok(offset | COPIED)
    }

    /// Takes over what the old one has in this region.
    fn carry_over(&mut self) -> Result<(), Failure> {
        let old = self.old;
        let Some(l2) = (self.region < old.l1.len())
            .then(|| old.l2(self.region))
            .transpose()?
            .flatten()
        else {
            return Ok(());
        };
        let mut block = std::mem::take(&mut self.block);
        for (at, entry) in l2.into_iter().enumerate() {
            self.l2[at] = match entry & OFFSET {
                _ if entry & COMPRESSED != 0 => return Err(old.damaged("is compressed")),
                _ if entry & ZERO != 0 => ZERO,
                0 => 0,
                offset => {
                    old.read(&mut block, offset)?;
                    self.append(&block)?
                }
            };
        }
        self.block = block;
        Ok(())
    }

    /// Ends the regions before this one.
    fn go_to(&mut self, region: usize) -> Result<(), Failure> {
        while self.region < region {
            if self.l2.iter().any(|entry| *entry != 0) {
                let table = be_bytes(&self.l2);
                self.l1[self.region] = self.append(&table)?;
                self.l2.fill(0);
            }
            self.region += 1;
            self.carry_over()?;
        }
        Ok(())
    }

    /// Puts a block of `base` there, which is not before the last one.
    fn put(&mut self, index: u64, base: &Image) -> Result<(), Failure> {
        let offset = index * BLOCK_SIZE;
        if offset >= self.old.size {
            return Ok(());
        }
        let too_large = |_| self.old.damaged("is too large");
        let index = usize::try_from(index).map_err(too_large)?;
        self.go_to(index / ENTRIES)?;
        if self.l2[index % ENTRIES] != 0 {
            return Ok(());
        }
        admit(1);
        let mut block = std::mem::take(&mut self.block);
        base.read_block(&mut block, offset, Missing::Zeros)?;
        self.l2[index % ENTRIES] = match is_zero(&block) {
            true => ZERO,
            false => self.append(&block)?,
        };
        self.block = block;
        Ok(())
    }

    /// Writes the tables, and makes all of it durable.
    fn finish(mut self) -> Result<(), Failure> {
        self.go_to(self.l1.len())?;
        // What counts references is counted as well.
        let used = self.end / BLOCK_SIZE;
        let (mut blocks, mut tables) = (1, 1);
        while blocks * COUNTED < used + blocks + tables || tables * (ENTRIES as u64) < blocks {
            blocks = (used + blocks + tables).div_ceil(COUNTED);
            tables = blocks.div_ceil(ENTRIES as u64);
        }
        let mut left = used + blocks + tables;
        let mut table = Vec::new();
        for _ in 0..blocks {
            let counted = left.min(COUNTED);
            left -= counted;
            let ones = usize::try_from(counted).expect("entries of a cluster");
            let mut counts = [0, 1].repeat(ones);
            counts.resize(CLUSTER, 0);
            table.push(self.append(&counts)? & OFFSET);
        }
        let at = self.end;
        self.write(&be_bytes(&table), at)?;
        let end = at + tables * BLOCK_SIZE;
        self.write(&be_bytes(&self.l1), BLOCK_SIZE)?;
        let mut header = self.old.header.clone();
        let l1_size = u32::try_from(self.l1.len()).map_err(|_| self.old.damaged("is too large"))?;
        let tables = u32::try_from(tables).map_err(|_| self.old.damaged("is too large"))?;
        header[at::L1_SIZE].copy_from_slice(&l1_size.to_be_bytes());
        header[at::L1_OFFSET].copy_from_slice(&BLOCK_SIZE.to_be_bytes());
        header[at::REFCOUNTS_OFFSET].copy_from_slice(&at.to_be_bytes());
        header[at::REFCOUNTS_CLUSTERS].copy_from_slice(&tables.to_be_bytes());
        self.write(&header, 0)?;
        let path = self.old.path;
        let whole = self.file.set_len(end).and_then(|()| self.file.sync());
        whole.map_err(|error| Failure::io("writing", path, &error))
    }
}

fn be_u32(bytes: &[u8], range: std::ops::Range<usize>) -> u32 {
    u32::from_be_bytes(bytes[range].try_into().expect("four bytes"))
}

fn be_u64(bytes: &[u8], range: std::ops::Range<usize>) -> u64 {
    u64::from_be_bytes(bytes[range].try_into().expect("eight bytes"))
}

fn be_bytes(entries: &[u64]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| entry.to_be_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Write};
    use std::path::PathBuf;
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

    use kvm_clone_protocol::message::Access;
    use kvm_clone_tests::skip::{find_tool, skip};
    use tempfile::TempDir;

    use super::super::faults::Scope;
    use super::super::open_image;
    use super::*;

    /// A shell that runs all programs of a test: a process of ours that is being started has all that
    /// we hold, so that other tests would find their locks taken now and then.
    struct Shell {
        child: Child,
        input: ChildStdin,
        output: BufReader<ChildStdout>,
    }

    impl Shell {
        fn start() -> Self {
            let mut child = Command::new("sh")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
            Self {
                child,
                input,
                output: BufReader::new(output),
            }
        }

        fn run(&mut self, command: &str) {
            writeln!(self.input, "{command} >&2; echo $?").unwrap();
            let mut status = String::new();
            self.output.read_line(&mut status).unwrap();
            assert_eq!(status, "0\n", "{command}");
        }
    }

    impl Drop for Shell {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// A directory with a disk and images that stand on it; `None` without QEMU.
    struct Chain {
        directory: TempDir,
        shell: Shell,
        /// Images, each of which stands on the next, and what they show.
        versions: Vec<(PathBuf, Vec<u8>)>,
    }

    impl Chain {
        fn new(contents: &[u8]) -> Option<Self> {
            if find_tool("qemu-img").is_none() {
                skip("qemu-img is not installed");
                return None;
            }
            let directory = tempfile::tempdir().unwrap();
            let chain = Self {
                directory,
                shell: Shell::start(),
                versions: Vec::new(),
            };
            fs::write(chain.disk(), contents).unwrap();
            Some(chain)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn disk(&self) -> PathBuf {
            self.path("disk")
        }

        /// What the disk is now gets an image.
        fn keep(&mut self) {
            let path = self.path(&self.versions.len().to_string());
            let contents = fs::read(self.disk()).unwrap();
            let size = contents.len().to_string();
            let shown = path.display();
            let create = format!("qemu-img create -q -f qcow2 -F raw -b disk {shown} {size}");
            self.shell.run(&create);
            if let Some((last, _)) = self.versions.last() {
                let last = last.display();
                let rebase = format!("qemu-img rebase -u -f qcow2 -F qcow2 -b {shown} {last}");
                self.shell.run(&rebase);
            }
            self.versions.push((path, contents));
        }

        fn extend(&self, next: &[u8]) -> Result<(), Failure> {
            let path = self.disk();
            let image = open_image(&path, &fs::metadata(&path).unwrap(), Access::Destination)?;
            let blocks = |bytes: &[u8]| -> Vec<Vec<u8>> {
                bytes.chunks(CLUSTER).map(<[u8]>::to_vec).collect()
            };
            let (was, is) = (blocks(&fs::read(&path).unwrap()), blocks(next));
            let (delta, _) = self.versions.last().unwrap();
            extend(delta, &image, next.len() as u64, |put| {
                let differ = (0..is.len()).filter(|at| was.get(*at) != Some(&is[*at]));
                differ.map(|at| at as u64).try_for_each(put)
            })
        }

        fn check(&mut self) {
            self.check_newest(self.versions.len());
        }

        fn check_newest(&mut self, n: usize) {
            let raw = self.path("raw");
            for (path, contents) in self.versions.iter().rev().take(n) {
                let (from, to) = (path.display(), raw.display());
                self.shell.run(&format!("qemu-img check -q {from}"));
                let convert = format!("qemu-img convert -f qcow2 -O raw {from} {to}");
                self.shell.run(&convert);
                assert!(fs::read(&raw).unwrap() == *contents, "{from}");
            }
        }
    }

    /// Numbers that seem random, and are the same every time.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, end: usize) -> usize {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            usize::try_from(self.0 >> 33).unwrap() % end
        }
    }

    #[test]
    fn every_version_is_shown_whatever_the_disk_becomes() {
        let mut dice = Dice(7);
        let Some(mut chain) = Chain::new(&vec![1; 20 * CLUSTER]) else {
            return;
        };
        chain.keep();
        for turn in 2..60_u8 {
            let mut next = fs::read(chain.disk()).unwrap();
            if dice.below(3) == 0 {
                // Sizes are in sectors.
                next.resize((1 + dice.below(24 * 128)) * 512, 0);
            }
            for _ in 0..dice.below(6) {
                let at = dice.below(next.len() / 512) * 512;
                let end = next.len().min(at + dice.below(3 * CLUSTER));
                next[at..end].fill(turn * u8::from(dice.below(4) > 0));
            }
            chain.extend(&next).unwrap();
            chain.check_newest(1);
            fs::write(chain.disk(), &next).unwrap();
            chain.check_newest(3);
            // A run that breaks off here makes no version of it.
            if dice.below(3) > 0 {
                chain.keep();
            }
        }
        chain.check();
        assert!(chain.versions.len() > 20);
    }

    /// A disk of which one L2 table is not enough.
    #[test]
    fn blocks_far_apart_have_tables_of_their_own() {
        let Some(mut chain) = Chain::new(b"") else {
            return;
        };
        let file = fs::File::options().write(true).open(chain.disk()).unwrap();
        file.set_len(3 << 30).unwrap();
        let path = chain.path("0");
        let shown = path.display();
        let create = format!("qemu-img create -q -f qcow2 -F raw -b disk {shown} 3G");
        chain.shell.run(&create);
        chain.versions.push((path.clone(), Vec::new()));
        let write = |index: u64, byte: u8| {
            use std::os::unix::fs::FileExt;
            file.write_all_at(&[byte; CLUSTER], index * BLOCK_SIZE)
                .unwrap();
        };
        let far = [0, 8191, 8192, 40_000, 49_151];
        far.iter().for_each(|index| write(*index, 5));
        let disk = chain.disk();
        let image = || {
            let metadata = fs::metadata(&disk).unwrap();
            open_image(&disk, &metadata, Access::Destination).unwrap()
        };
        for some in [&far[1..2], &far[2..4], &far[..]] {
            let each = some.iter().copied();
            let changed =
                |put: &mut dyn FnMut(u64) -> Result<(), Failure>| each.clone().try_for_each(put);
            extend(&path, &image(), 3 << 30, changed).unwrap();
            some.iter().for_each(|index| write(*index, 6));
        }
        chain.shell.run(&format!("qemu-img check -q {shown}"));
        for index in far {
            let pattern = format!("read -P 5 {} 64k", index * BLOCK_SIZE);
            let read = format!("qemu-io -f qcow2 -c '{pattern}' {shown}");
            chain.shell.run(&read);
        }
    }

    #[test]
    fn whatever_fails_the_delta_is_what_it_was_or_whole() {
        let (was, is) = (vec![1; 9 * CLUSTER], vec![2; 7 * CLUSTER + 512]);
        let Some(mut chain) = Chain::new(&was) else {
            return;
        };
        chain.keep();
        let mut failures = 0;
        for nth in 1..100 {
            let full = Scope::new(&format!("change:{nth}:ENOSPC"));
            let done = chain.extend(&is);
            drop(full);
            chain.check();
            let names = fs::read_dir(chain.directory.path()).unwrap();
            let is_left = |name: &str| name.contains(".kc-");
            let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            assert!(!names.any(|name| is_left(&name)), "{nth}");
            match done {
                Ok(()) => break,
                Err(failure) => assert_eq!(failure.code, FailureCode::NoSpace, "{nth}"),
            }
            failures += 1;
        }
        assert!((8..99).contains(&failures), "{failures}");
        fs::write(chain.disk(), &is).unwrap();
        chain.check();
    }

    #[test]
    fn what_is_no_image_of_this_kind_is_refused_and_left_alone() {
        let Some(mut chain) = Chain::new(&[1; 4 * CLUSTER]) else {
            return;
        };
        chain.keep();
        let (path, _) = chain.versions[0].clone();
        let good = fs::read(&path).unwrap();
        let spoils: [(&str, usize, u8); 8] = [
            ("no magic", 0, 0),
            ("another version", 7, 2),
            ("small clusters", at::CLUSTER_BITS.end - 1, 9),
            ("encrypted", at::CRYPT_METHOD.end - 1, 1),
            ("a snapshot", at::SNAPSHOTS.end - 1, 1),
            ("a feature", at::INCOMPATIBLE.end - 1, 4),
            ("a table too short", at::L1_SIZE.end - 1, 0),
            ("a table that is nowhere", at::L1_OFFSET.start + 1, 1),
        ];
        for (what, at, byte) in spoils {
            let mut bad = good.clone();
            bad[at] = byte;
            fs::write(&path, &bad).unwrap();
            let failure = chain.extend(&[2; 4 * CLUSTER]).unwrap_err();
            assert_eq!(failure.code, FailureCode::Refused, "{what}");
            assert!(fs::read(&path).unwrap() == bad, "{what}");
        }
        fs::write(&path, &good[..CLUSTER / 2]).unwrap();
        let failure = chain.extend(&[2; 4 * CLUSTER]).unwrap_err();
        assert_eq!(failure.code, FailureCode::Refused);
    }
}
