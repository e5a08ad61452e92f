//! Stories of destinations whose runs end well, break off, and are ended by others. A run that is
//! dropped without a word is one whose process was killed.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_clone_protocol::digest::{Content, DIGEST_LEN, Digester, HashKind, Seed};
use kvm_clone_protocol::message::{
    Access, Apply, ApplyChoice, Compression, Fate, IoChoice, Recovery,
};
use kvm_clone_protocol::sync::{DiskDone, DiskOp, content_at};
use kvm_clone_protocol::units::{BLOCK_LEN, BLOCK_SIZE, BlockRun, Geometry};
use tempfile::TempDir;

use super::destination::Begun;
use super::faults::Scope;
use super::journal::{Header, Journal, State};
use super::recover::{forward, recover, settle};
use super::*;

const BLOCKS: u8 = 8;

/// A directory with a disk of eight blocks, each full of its own number, on a real disk: the
/// directory for temporary files may be memory.
struct Ground {
    directory: TempDir,
}

impl Ground {
    fn new() -> Self {
        let here = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let ground = Self { directory };
        ground.make("disk");
        ground
    }

    fn make(&self, name: &str) {
        let contents: Vec<u8> = (1..=BLOCKS).flat_map(|n| vec![n; BLOCK_LEN]).collect();
        fs::write(self.path(name), contents).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn disk(&self) -> PathBuf {
        self.path("disk")
    }

    /// The first byte of each block.
    fn holds(&self, name: &str) -> Vec<u8> {
        let contents = fs::read(self.path(name)).unwrap();
        contents.chunks(BLOCK_LEN).map(|block| block[0]).collect()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn geometry() -> Geometry {
    Geometry::new(u64::from(BLOCKS) * BLOCK_SIZE).unwrap()
}

const OLD: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
const NEW: [u8; 8] = [1, 2, 99, 4, 5, 0, 7, 8];

/// A run on one or more destinations.
struct Story {
    run: Option<Run>,
    destinations: Vec<Destination>,
    begun: Vec<Begun>,
}

impl Story {
    fn begin(paths: &[PathBuf], choice: ApplyChoice) -> Self {
        let mut run = Some(Run::begin().unwrap());
        let (mut destinations, mut begun) = (Vec::new(), Vec::new());
        for path in paths {
            settle(path).unwrap();
            let mut destination = Destination::open(path).unwrap();
            begun.push(
                destination
                    .begin(geometry(), choice, None, run.as_mut().unwrap())
                    .unwrap(),
            );
            destinations.push(destination);
        }
        Self {
            run,
            destinations,
            begun,
        }
    }

    /// Block 2 becomes 99, and block 5 zero.
    fn change(&self) {
        for begun in &self.begun {
            put(&begun.disk, 2, 99);
            zero(&begun.disk, 5);
        }
    }

    fn prepare(&mut self) {
        for destination in &mut self.destinations {
            destination.prepare(geometry(), None).unwrap();
        }
    }

    fn note_commit(&mut self) {
        self.run.as_mut().unwrap().commit().unwrap();
    }

    fn finish(mut self) {
        self.prepare();
        self.finish_prepared();
    }

    fn finish_prepared(mut self) {
        self.note_commit();
        forward(&self.destinations.iter().collect::<Vec<_>>()).unwrap();
        self.run.take().unwrap().end().unwrap();
    }
}

fn put(disk: &Disk, index: u64, byte: u8) {
    disk.is_changed.store(true, Ordering::Release);
    let block = vec![byte; BLOCK_LEN];
    match &disk.overlay {
        Some(overlay) => overlay.put(index, &block).unwrap(),
        None => disk.blocks.write_block(index * BLOCK_SIZE, &block).unwrap(),
    }
}

fn zero(disk: &Disk, first: u64) {
    disk.zero(BlockRun { first, count: 1 }, geometry()).unwrap();
}

/// What a session sees in the blocks of a disk.
fn seen(disk: &Disk) -> Vec<Content> {
    let compressor = Compressor::new(Compression::Off);
    let context = SessionContext {
        geometry: geometry(),
        digester: digester(),
        compressor: &compressor,
        kept: None,
        io: IoChoice::Auto,
    };
    let run = BlockRun {
        first: 0,
        count: u64::from(BLOCKS),
    };
    let done = disk.run(DiskOp::Digest { run }, &context, &mut Scratch::new());
    let DiskDone::Digested(digests) = done.unwrap() else {
        panic!("digests were asked for");
    };
    (0..digests.len() / DIGEST_LEN)
        .map(|at| content_at(&digests, at))
        .collect()
}

fn digester() -> Digester {
    Digester::new(HashKind::Xxh3, Seed([3; 32]))
}

fn contents(blocks: &[u8]) -> Vec<Content> {
    let content = |byte: &u8| digester().content(&vec![*byte; BLOCK_LEN]);
    blocks.iter().map(content).collect()
}

fn fates(recovery: Recovery) -> Vec<Fate> {
    recover(recovery)
        .unwrap()
        .iter()
        .map(|each| each.fate)
        .collect()
}

#[test]
fn what_is_staged_counts_at_the_commit_and_leaves_nothing() {
    let ground = Ground::new();
    let inode = fs::metadata(ground.disk()).unwrap().ino();
    let story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    story.change();
    assert_eq!(story.begun[0].apply, Apply::Staged);
    assert_eq!(ground.holds("disk"), OLD);
    story.finish();
    assert_eq!(ground.holds("disk"), NEW);
    assert_eq!(ground.names(), ["disk"]);
    assert_eq!(fs::metadata(ground.disk()).unwrap().ino(), inode);
    assert_eq!(fates(Recovery::RollBack), []);
}

#[test]
fn what_is_overwritten_is_kept_of_changes_that_wait_beside_a_disk_and_of_no_others() {
    for (choice, fits) in [(ApplyChoice::Staged, true), (ApplyChoice::Inplace, false)] {
        let ground = Ground::new();
        let delta = ground.path("delta");
        fs::write(&delta, vec![7; BLOCK_LEN]).unwrap();
        let mut story = Story::begin(&[ground.disk()], choice);
        story.change();
        story.prepare();
        let failure = story.destinations[0].preserve(&delta).unwrap_err();
        assert_eq!(failure.code, FailureCode::Refused);
        assert_eq!(
            failure.message.contains("no plain qcow2"),
            fits,
            "{failure:?}"
        );
        assert_eq!(
            failure.message.contains("--apply staged"),
            !fits,
            "{failure:?}"
        );
        story.finish_prepared();
        assert_eq!(ground.holds("disk"), NEW);
        let mut story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
        story.prepare();
        // Nothing is overwritten.
        story.destinations[0].preserve(&delta).unwrap();
        let mut story = Story::begin(&[ground.path("new")], choice);
        story.change();
        story.prepare();
        story.destinations[0].preserve(&delta).unwrap();
        assert_eq!(fs::read(&delta).unwrap(), vec![7; BLOCK_LEN]);
    }
}

#[test]
fn a_new_copy_is_read_where_it_was_copied_from_and_written_where_it_is() {
    let ground = Ground::new();
    ground.make("original");
    fs::write(ground.path("copy"), vec![0; BLOCK_LEN]).unwrap();
    let image = |name| match open_path(&ground.path(name), Access::Destination).unwrap() {
        Target::Destination(destination) => Arc::clone(destination.base().unwrap()),
        _ => panic!("it is to be written to"),
    };
    let disk = Disk::copy_of(image("original"), image("copy"));
    put(&disk, 0, 99);
    assert_eq!(seen(&disk), contents(&[1, 2, 3, 4, 5, 6, 7, 8]));
    assert_eq!(ground.holds("copy"), [99]);
}

#[test]
fn a_broken_run_is_rolled_back_or_taken_up() {
    let ground = Ground::new();
    let story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    story.change();
    drop(story);
    assert_eq!(fates(Recovery::List), [Fate::Waiting]);
    assert_eq!(fates(Recovery::Finish), [Fate::Waiting]);

    let story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    assert!(story.begun[0].resumed);
    assert_eq!(seen(&story.begun[0].disk), contents(&NEW));
    drop(story);
    assert_eq!(fates(Recovery::RollBack), [Fate::RolledBack]);
    assert_eq!(ground.holds("disk"), OLD);
    assert_eq!(ground.names(), ["disk"]);
    assert_eq!(fates(Recovery::List), []);
}

#[test]
fn a_run_that_is_taken_up_needs_no_second_shipping() {
    // On auto a reflink copy is tried first; what waits must survive that.
    for choice in [ApplyChoice::Staged, ApplyChoice::Auto] {
        let ground = Ground::new();
        Story::begin(&[ground.disk()], choice).change();
        let story = Story::begin(&[ground.disk()], choice);
        assert!(story.begun[0].resumed, "{choice:?}");
        assert_eq!(seen(&story.begun[0].disk), contents(&NEW));
        story.finish();
        assert_eq!(ground.holds("disk"), NEW);
        assert_eq!(ground.names(), ["disk"]);
    }
}

#[test]
fn what_was_committed_goes_forward_with_the_next_run_or_with_recover() {
    for by_recover in [false, true] {
        let ground = Ground::new();
        ground.make("other");
        let paths = [ground.disk(), ground.path("other")];
        let mut story = Story::begin(&paths, ApplyChoice::Staged);
        story.change();
        story.prepare();
        story.note_commit();
        // Killed while the first has lost its name.
        story.destinations[0].take_away().unwrap();
        drop(story);
        assert!(!ground.disk().exists());
        let refused = open_path(&ground.disk(), Access::Source).unwrap_err();
        assert!(refused.message.contains("recover"), "{refused}");
        if by_recover {
            assert_eq!(fates(Recovery::List), [Fate::Unfinished, Fate::Unfinished]);
            assert_eq!(
                fates(Recovery::RollBack),
                [Fate::Finished, Fate::Finished],
                "a committed run is never rolled back"
            );
        } else {
            assert_eq!(settle(&ground.disk()).unwrap().len(), 1);
        }
        assert_eq!(ground.holds("disk"), NEW);
        assert_eq!(ground.holds("other"), NEW);
        assert_eq!(ground.names(), ["disk", "other"]);
    }
}

#[test]
fn a_disk_that_was_used_after_a_crash_is_not_made_a_mixture() {
    let ground = Ground::new();
    let mut story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    story.change();
    story.prepare();
    story.note_commit();
    drop(story);
    let file = File::options().write(true).open(ground.disk()).unwrap();
    file.write_all_at(&[55; BLOCK_LEN], 0).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    let refused = settle(&ground.disk()).unwrap_err();
    assert_eq!(refused.code, FailureCode::Refused);
    assert_eq!(fates(Recovery::RollBack), [Fate::Stuck]);
    assert_eq!(ground.holds("disk"), [55, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn a_journal_that_is_damaged_or_of_another_disk_is_ignored_with_a_warning() {
    type Spoil = fn(&Ground);
    let spoils: [(&str, Spoil); 3] = [
        ("damaged", |ground| {
            let journal = ground.path(".disk.kc-journal");
            let file = File::options().write(true).open(journal).unwrap();
            file.write_all_at(&[0xff; 32], 0).unwrap();
            file.write_all_at(&[0xff; 32], 16 * 1024).unwrap();
        }),
        ("of a later version", |ground| {
            let journal = ground.path(".disk.kc-journal");
            let file = File::options().write(true).open(journal).unwrap();
            file.write_all_at(&[9], 8).unwrap();
            file.write_all_at(&[9], 16 * 1024 + 8).unwrap();
        }),
        ("of another disk", |ground| {
            fs::remove_file(ground.disk()).unwrap();
            ground.make("disk");
        }),
    ];
    for (what, spoil) in spoils {
        let ground = Ground::new();
        Story::begin(&[ground.disk()], ApplyChoice::Staged).change();
        spoil(&ground);
        let story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
        let begun = &story.begun[0];
        assert!(!begun.resumed, "{what}");
        assert!(
            begun.warnings[0].contains("ignored"),
            "{what}: {:?}",
            begun.warnings
        );
        assert_eq!(seen(&begun.disk), contents(&OLD), "{what}");
        story.change();
        story.finish();
        assert_eq!(ground.holds("disk"), NEW, "{what}");
        assert_eq!(ground.names(), ["disk"], "{what}");
    }
}

/// Whoever may write in the directory of a disk may write a journal there.
#[test]
fn a_journal_that_names_any_other_file_as_its_stage_has_no_say_in_that() {
    for state in [State::Open, State::Prepared] {
        let ground = Ground::new();
        let elsewhere = ground.path("elsewhere");
        fs::write(&elsewhere, "precious").unwrap();
        Story::begin(&[ground.disk()], ApplyChoice::Staged).change();
        let journal = Journal::open(&ground.path(".disk.kc-journal")).unwrap();
        let forge = |header: &mut Header| {
            header.state = state;
            header.stage.clone_from(&elsewhere);
        };
        journal.unwrap().update(forge).unwrap();
        assert_eq!(fates(Recovery::RollBack), [Fate::Stuck]);
        let story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
        let begun = &story.begun[0];
        assert!(!begun.resumed && begun.warnings[0].contains("another disk"));
        story.change();
        story.finish();
        assert_eq!(ground.holds("disk"), NEW);
        assert_eq!(ground.names(), ["disk", "elsewhere"]);
        assert_eq!(fs::read(&elsewhere).unwrap(), b"precious");
    }
}

#[test]
fn a_staged_block_that_is_damaged_is_shipped_again() {
    let ground = Ground::new();
    Story::begin(&[ground.disk()], ApplyChoice::Staged).change();
    let stage = ground.path(".disk.kc-stage");
    let file = File::options().write(true).open(stage).unwrap();
    file.write_all_at(&[98], 2 * BLOCK_SIZE + 100).unwrap();
    let story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    let disk = Arc::clone(&story.begun[0].disk);
    assert_eq!(seen(&disk), contents(&[1, 2, 3, 4, 5, 0, 7, 8]));
    put(&disk, 2, 99);
    drop(disk);
    story.finish();
    assert_eq!(ground.holds("disk"), NEW);
}

#[test]
fn in_place_is_torn_until_a_run_has_finished() {
    let ground = Ground::new();
    Story::begin(&[ground.disk()], ApplyChoice::Inplace).change();
    assert_eq!(ground.holds("disk"), NEW);
    let refused = open_path(&ground.disk(), Access::Source).unwrap_err();
    assert!(refused.message.contains("torn"), "{refused}");
    assert_eq!(fates(Recovery::RollBack), [Fate::Torn]);

    // A run that stages and breaks off does not make it whole.
    Story::begin(&[ground.disk()], ApplyChoice::Staged).change();
    assert_eq!(fates(Recovery::RollBack), [Fate::Torn]);
    assert!(open_path(&ground.disk(), Access::Source).is_err());

    let story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    story.change();
    story.finish();
    assert!(open_path(&ground.disk(), Access::Source).is_ok());
    assert_eq!(ground.names(), ["disk"]);
}

#[test]
fn a_run_without_changes_leaves_the_disk_as_it_is() {
    let ground = Ground::new();
    let before = fs::metadata(ground.disk()).unwrap();
    Story::begin(&[ground.disk()], ApplyChoice::Auto).finish();
    let after = fs::metadata(ground.disk()).unwrap();
    assert_eq!(
        (before.ino(), before.modified().unwrap()),
        (after.ino(), after.modified().unwrap())
    );
    assert_eq!(ground.names(), ["disk"]);
}

#[test]
fn a_new_destination_that_breaks_off_is_taken_up_or_removed() {
    let ground = Ground::new();
    let path = ground.path("fresh");
    let story = Story::begin(std::slice::from_ref(&path), ApplyChoice::Auto);
    assert_eq!(story.begun[0].apply, Apply::New);
    story.change();
    drop(story);
    assert!(Story::begin(std::slice::from_ref(&path), ApplyChoice::Auto).begun[0].resumed);
    assert_eq!(fates(Recovery::RollBack), [Fate::RolledBack]);
    assert_eq!(ground.names(), ["disk"]);
}

#[test]
fn what_a_run_had_only_begun_to_make_is_removed_unless_another_run_is_at_it() {
    for path in ["disk", "fresh"] {
        let ground = Ground::new();
        let mut destination = Some(Destination::open(&ground.path(path)).unwrap());
        let mut run = Run::begin().unwrap();
        run.add(&destination.as_ref().unwrap().names).unwrap();
        drop(run);
        let left = [".kc-clone", ".kc-journal.new", ".kc-stage"].map(|end| format!(".{path}{end}"));
        for name in &left {
            fs::write(ground.path(name), "").unwrap();
        }
        if path == "disk" {
            // What is there is held by another run.
            assert_eq!(fates(Recovery::RollBack), [Fate::Running]);
            assert_eq!(ground.names().len(), 1 + left.len());
        }
        destination.take();
        assert_eq!(fates(Recovery::List), []);
        assert_eq!(ground.names().len(), 1 + left.len());
        assert_eq!(fates(Recovery::RollBack), []);
        assert_eq!(ground.names(), ["disk"]);
    }
}

#[test]
fn a_journal_that_was_being_made_goes_with_the_one_before() {
    let ground = Ground::new();
    Story::begin(&[ground.disk()], ApplyChoice::Staged).change();
    fs::write(ground.path(".disk.kc-journal.new"), "").unwrap();
    assert_eq!(fates(Recovery::RollBack), [Fate::RolledBack]);
    assert_eq!(ground.names(), ["disk"]);
}

#[test]
fn a_name_that_was_taken_meanwhile_is_left_alone() {
    let ground = Ground::new();
    let path = ground.path("fresh");
    let mut story = Story::begin(std::slice::from_ref(&path), ApplyChoice::Auto);
    story.change();
    story.prepare();
    story.note_commit();
    fs::write(&path, "theirs").unwrap();
    let failure = story.destinations[0].forward().unwrap_err();
    assert_eq!(failure.code, FailureCode::Refused);
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
}

#[test]
fn what_stands_in_the_way_is_not_taken_up() {
    let ground = Ground::new();
    std::os::unix::fs::symlink("/etc/passwd", ground.path(".fresh.kc-new")).unwrap();
    let destination = Destination::open(&ground.path("fresh")).unwrap();
    let failure = destination.describe(0).unwrap_err();
    assert_eq!(failure.code, FailureCode::Refused);
    let linked = Path::new("/etc/passwd");
    assert!(linked.exists());
}

#[test]
fn two_runs_never_meet_on_one_disk() {
    let ground = Ground::new();
    let first = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    first.change();
    assert_eq!(settle(&ground.disk()).unwrap_err().code, FailureCode::Busy);
    let second = Destination::open(&ground.disk()).unwrap_err();
    assert_eq!(second.code, FailureCode::Busy);
    assert_eq!(fates(Recovery::RollBack), [Fate::Running]);
    first.finish();
    assert_eq!(ground.holds("disk"), NEW);
}

#[test]
fn the_space_for_holes_is_reserved_and_given_back() {
    let ground = Ground::new();
    let file = File::create(ground.disk()).unwrap();
    file.set_len(geometry().size()).unwrap();
    drop(file);
    let occupied = || fs::metadata(ground.disk()).unwrap().blocks();
    let before = fs::metadata(ground.disk()).unwrap().modified().unwrap();
    let mut story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    story.change();
    assert_eq!(occupied(), 0);
    story.prepare();
    assert_eq!(occupied() * 512, BLOCK_SIZE, "one block will be filled");
    let after = fs::metadata(ground.disk()).unwrap().modified().unwrap();
    assert_eq!(before, after, "the old version is as it was");
    drop(story);
    assert_eq!(fates(Recovery::RollBack), [Fate::RolledBack]);
    assert_eq!(occupied(), 0);
}

#[test]
fn nothing_is_reserved_for_blocks_that_have_their_space() {
    let ground = Ground::new();
    File::open(ground.disk()).unwrap().sync_all().unwrap();
    let changed = || {
        let found = fs::metadata(ground.disk()).unwrap();
        (found.ctime(), found.ctime_nsec())
    };
    let before = changed();
    let _refused = Scope::new("allocate@/disk\":1+:ENOSPC");
    let mut story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    story.change();
    story.prepare();
    assert_eq!(changed(), before, "the old version is not touched");
    story.finish();
    assert_eq!(ground.holds("disk"), NEW);
}

#[test]
fn space_that_was_reserved_is_given_back_by_whoever_lets_go() {
    let ground = Ground::new();
    let file = File::create(ground.disk()).unwrap();
    file.set_len(geometry().size()).unwrap();
    drop(file);
    let occupied = || fs::metadata(ground.disk()).unwrap().blocks() * 512;
    let begin = || {
        let story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
        (1..5).for_each(|index| put(&story.begun[0].disk, index, 99));
        story
    };
    let mut story = begin();
    // One block or two have their space by then: reserving may take two calls for each.
    let full = Scope::new("allocate@/disk\":3+:ENOSPC");
    let failure = story.destinations[0].prepare(geometry(), None).unwrap_err();
    assert_eq!(failure.code, FailureCode::NoSpace);
    assert!(occupied() > 0);
    drop(full);
    assert!(!story.destinations[0].abandon(failure.code));
    assert_eq!((occupied(), ground.names()), (0, vec!["disk".to_owned()]));
    drop(story);

    // Of one that was prepared, and taken up.
    begin().prepare();
    assert_eq!(occupied(), 4 * BLOCK_SIZE);
    let story = begin();
    assert!(story.begun[0].resumed);
    zero(&story.begun[0].disk, 2);
    drop(story);
    assert_eq!(fates(Recovery::RollBack), [Fate::RolledBack]);
    assert_eq!(occupied(), 0);
}

#[test]
fn what_is_staged_is_taken_up_where_no_copies_can_be_made() {
    let ground = Ground::new();
    let _no_copies = Scope::new("clone:1+:EOPNOTSUPP");
    Story::begin(&[ground.disk()], ApplyChoice::Auto).change();
    let story = Story::begin(&[ground.disk()], ApplyChoice::Auto);
    let begun = &story.begun[0];
    assert_eq!((begun.apply, begun.resumed), (Apply::Staged, true));
}

#[test]
fn a_commit_that_was_found_is_durable_before_anything_goes_forward() {
    let ground = Ground::new();
    let mut story = Story::begin(&[ground.disk()], ApplyChoice::Staged);
    story.change();
    story.prepare();
    story.note_commit();
    drop(story);
    let no_space = Scope::new("sync@/runs/:1:EIO");
    assert_eq!(settle(&ground.disk()).unwrap_err().code, FailureCode::Io);
    assert_eq!(ground.holds("disk"), OLD);
    drop(no_space);
    assert_eq!(settle(&ground.disk()).unwrap().len(), 1);
    assert_eq!(ground.holds("disk"), NEW);
}

#[test]
fn what_could_not_be_made_durable_is_let_go() {
    let ground = Ground::new();
    for name in ["disk", "fresh"] {
        let mut story = Story::begin(&[ground.path(name)], ApplyChoice::Staged);
        story.change();
        let faults = Scope::new("sync:1:EIO");
        let destination = &mut story.destinations[0];
        let failure = destination.prepare(geometry(), None).unwrap_err();
        assert_eq!(failure.code, FailureCode::Io);
        drop(faults);
        assert!(!destination.abandon(failure.code), "nothing is left");
        assert_eq!(ground.names(), ["disk"]);
    }
}

#[test]
fn a_run_that_cannot_begin_leaves_nothing() {
    for (choice, fault) in [
        (ApplyChoice::Staged, "create@stage:1:ENOSPC"),
        (ApplyChoice::Staged, "sync_directory:1:EIO"),
        (ApplyChoice::Inplace, "set_len:1:ENOSPC"),
    ] {
        let ground = Ground::new();
        let mut run = Run::begin().unwrap();
        let mut destination = Destination::open(&ground.disk()).unwrap();
        let larger = Geometry::new(2 * geometry().size()).unwrap();
        let _faults = Scope::new(fault);
        destination
            .begin(larger, choice, None, &mut run)
            .unwrap_err();
        assert_eq!(ground.names(), ["disk"], "{fault}");
        assert_eq!(ground.holds("disk"), OLD);
    }
}
