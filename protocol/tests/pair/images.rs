//! Any two images converge, and what travels is what differs and a little for each block.

use std::rc::Rc;

use kvm_clone_protocol::digest::HashKind;
use kvm_clone_protocol::units::{BLOCK_SIZE, BlockRun};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use crate::check;
use crate::disk::{FakeDisk, Fill, Library};
use crate::pair::{Schedule, Trace};

/// What a block of the source and of the destination hold; `None` is a hole.
type Blocks = Vec<[Option<Fill>; 2]>;

fn fill() -> impl Strategy<Value = Option<Fill>> {
    prop_oneof![
        2 => Just(None),
        1 => Just(Some(Fill::ZERO)),
        4 => (1..4_u8).prop_map(|byte| Some(Fill::of(byte))),
        1 => Just(Some(Fill::part(1, 4096))),
    ]
}

fn blocks() -> impl Strategy<Value = Blocks> {
    let unlike = [fill(), fill()];
    let alike = fill().prop_map(|fill| [fill; 2]);
    prop::collection::vec(prop_oneof![unlike, alike], 0..120)
}

fn paint(library: &Rc<Library>, size: u64, fills: impl Iterator<Item = Option<Fill>>) -> FakeDisk {
    let mut disk = FakeDisk::new(library, size);
    for (index, fill) in (0..).zip(fills) {
        if let Some(fill) = fill {
            disk.put(index, fill);
        }
    }
    disk
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_travels_is_bounded_by_what_differs(
        blocks in blocks(),
        missing in 0..BLOCK_SIZE,
        seed: u64,
        compare: bool,
    ) {
        let library = Library::new(HashKind::Blake3);
        let count = blocks.len() as u64;
        let size = (count * BLOCK_SIZE).saturating_sub(missing);
        let mut source = paint(&library, size, blocks.iter().map(|pair| pair[0]));
        // Without a comparison the destination is known to be empty.
        let theirs = blocks.iter().map(|pair| pair[1].filter(|_| compare));
        let mut destination = paint(&library, size, theirs);
        let differing: u64 = source
            .differences(&destination)
            .into_iter()
            .filter(|at| !source.is_zero(*at))
            .map(|at| source.geometry().byte_range(BlockRun { first: at, count: 1 }).1)
            .sum();

        // A failure is played again many times on its way to a small one.
        let mut trace = Trace::default();
        let schedule = Schedule::calm(seed);
        let params = library.params(size, compare, true);
        let done = check::session(params, &mut source, &mut destination, schedule, &mut trace)
            .expect("a calm schedule ends well");
        prop_assert!(done.tally.payload <= differing);
        let bound = differing + 40 * count + 4096;
        prop_assert!(done.tally.wire <= bound, "{} of {bound}", done.tally.wire);
    }
}
