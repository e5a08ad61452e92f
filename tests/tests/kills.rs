//! What a kill leaves: a few of those that `kill_campaign` does by the hundred.

use kvm_clone_tests::campaign::{self, Apply, Plan};
use kvm_clone_tests::mount::Kind;

fn no_kill_leaves_a_mixture_or_anything_else(apply: Apply, on: Kind) {
    let plan = Plan {
        kills: 8,
        apply,
        on,
        seed: 1,
    };
    let Some(report) = campaign::run(&plan, |_| ()) else {
        return;
    };
    assert!(report.violations.is_empty(), "{report}");
    assert_eq!(report.kills(), plan.kills, "{report}");
}

#[test]
fn no_kill_leaves_a_mixture_of_what_is_staged_on_ext4() {
    no_kill_leaves_a_mixture_or_anything_else(Apply::Staged, Kind::Ext4);
}

#[test]
fn no_kill_leaves_a_mixture_of_what_is_staged_on_xfs() {
    no_kill_leaves_a_mixture_or_anything_else(Apply::Staged, Kind::Xfs);
}

#[test]
fn no_kill_leaves_a_mixture_of_what_is_reflinked_on_xfs() {
    no_kill_leaves_a_mixture_or_anything_else(Apply::Reflink, Kind::Xfs);
}
