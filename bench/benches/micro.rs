//! How long the operations take that a run repeats for every block, by criterion.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvm_clone_bench::operation::Operation;
use kvm_clone_protocol::units::BLOCK_SIZE;

/// The rate is that of the disk's bytes which an operation stands for.
fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("micro");
    for operation in Operation::ALL {
        let mut once = operation.prepare();
        group.throughput(Throughput::Bytes(operation.blocks() * BLOCK_SIZE));
        group.bench_function(operation.name(), |bencher| {
            bencher.iter(|| black_box(&mut once)());
        });
    }
    group.finish();
}

criterion_group!(micro, all);
criterion_main!(micro);
