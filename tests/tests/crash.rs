//! A power cut at any moment leaves the old version of a disk or the new one, and the campaign
//! that says so finds what does not keep to it.

use kvm_clone_tests::mount::Kind;
use kvm_clone_tests::recorded::{Campaign, Counts, Product, Script, Subject, Tally};

/// Cuts of one run. `crash_campaign` has thousands.
const CUTS: usize = 24;

/// Runs that are recorded until what has to be found is found. One finds it nearly always.
const RUNS: u64 = 10;

/// Claims that every cut leaves the old version or the new one, or for a moment no name where the
/// way has that, and that recovery leaves nothing beside it.
fn stands(subject: &dyn Subject, kind: Kind) {
    let Some(campaign) = Campaign::new(subject, kind) else {
        return;
    };
    let tally = campaign.round(0, CUTS);
    assert!(tally.failures.is_empty(), "{tally}");
    let Counts { old, new, .. } = tally.recovered;
    assert_eq!(old + new, CUTS, "{tally}");
}

/// A campaign of which failures are expected.
fn doubted(subject: &dyn Subject, kind: Kind) -> Option<Campaign<'_>> {
    let keep = None;
    Campaign::new(subject, kind).map(|campaign| Campaign { keep, ..campaign })
}

/// Cuts runs until something is found.
fn find(campaign: Option<Campaign<'_>>, what: impl Fn(&Tally) -> bool) -> Option<Tally> {
    let campaign = campaign?;
    let mut tally = Tally::default();
    for run in 0..RUNS {
        tally += campaign.round(run, CUTS);
        if what(&tally) {
            return Some(tally);
        }
    }
    panic!("not found in {tally}");
}

#[test]
fn a_careful_replacement_on_ext4_is_never_torn() {
    stands(&Script::CAREFUL, Kind::Ext4);
}

#[test]
fn a_careful_replacement_on_xfs_is_never_torn() {
    stands(&Script::CAREFUL, Kind::Xfs);
}

#[test]
fn a_replacement_that_does_not_sync_is_found_torn() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        find(doubted(&Script::CARELESS, kind), |tally| {
            tally.found.torn > 0
        });
    }
}

#[test]
fn a_file_that_is_written_over_is_found_torn() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        find(doubted(&Script::IN_PLACE, kind), |tally| {
            tally.found.torn > 0
        });
    }
}

#[test]
fn a_file_without_its_name_is_the_new_version_after_recovery() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let found = find(Campaign::new(&Script::STAGED, kind), |tally| {
            tally.found.absent > 0
        });
        let Some(tally) = found else { return };
        assert!(tally.failures.is_empty(), "{tally}");
        assert!(tally.in_recovery > 0, "{tally}");
    }
}

#[test]
fn a_recovery_that_does_nothing_is_found() {
    let idle = Script {
        recover: ":",
        ..Script::STAGED
    };
    let unmended = |tally: &Tally| tally.recovered.absent > 0;
    let Some(tally) = find(doubted(&idle, Kind::Ext4), unmended) else {
        return;
    };
    let failures = tally.failures.join("\n");
    assert!(
        failures.contains("recovery made Absent of Absent"),
        "{tally}"
    );
    assert!(failures.contains("left by recovery"), "{tally}");
}

#[test]
fn a_name_that_is_not_synced_is_found_lost_after_success() {
    let hasty = Script {
        replace: r#"cp "$1" "$new"; chmod --reference="$2" "$new"
            chown --reference="$2" "$new"; sync "$new"; mv "$new" "$2""#,
        ..Script::CAREFUL
    };
    let found = |tally: &Tally| !tally.failures.is_empty();
    let Some(tally) = find(doubted(&hasty, Kind::Ext4), found) else {
        return;
    };
    assert!(tally.failures[0].contains("after success"), "{tally}");
}

#[test]
fn a_disk_that_is_new_on_ext4_is_whole_or_not_there() {
    stands(&Product::New, Kind::Ext4);
}

#[test]
fn a_disk_that_is_new_on_xfs_is_whole_or_not_there() {
    stands(&Product::New, Kind::Xfs);
}

#[test]
fn a_staged_disk_on_ext4_is_old_or_new() {
    stands(&Product::Staged, Kind::Ext4);
}

#[test]
fn a_staged_disk_on_xfs_is_old_or_new() {
    stands(&Product::Staged, Kind::Xfs);
}

#[test]
fn a_reflinked_disk_on_xfs_is_old_or_new() {
    stands(&Product::Reflink, Kind::Xfs);
}

#[test]
fn a_reflinked_disk_on_btrfs_is_old_or_new() {
    stands(&Product::Reflink, Kind::Btrfs);
}

#[test]
fn a_disk_that_is_torn_in_place_says_so_and_is_mended_by_the_next_run() {
    let campaign = Campaign::new(&Product::InPlace, Kind::Ext4);
    let campaign = campaign.map(|campaign| Campaign {
        again_every: 1,
        ..campaign
    });
    let Some(tally) = find(campaign, |tally| tally.found.torn > 0) else {
        return;
    };
    assert!(tally.failures.is_empty(), "{tally}");
    assert_eq!(tally.again.new, tally.cuts, "{tally}");
}
