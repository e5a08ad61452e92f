//! `--read-limit`: how fast this process reads disks, all of them together.
//!
//! Who is about to read asks here first, and is held up on its own thread, which is one of those
//! that may block. What a limit holds back is never more than a part of a window, so a disk is read
//! evenly, and not a second's worth at once.

use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_clone_protocol::units::BLOCK_SIZE;
use tokio::time::Instant;

use crate::pace::Pace;

/// Of this process: a guest suffers from the sum of what is read.
static READS: LazyLock<Throttle> = LazyLock::new(Throttle::unlimited);

/// From now on this process reads at most so many bytes a second; zero takes no limit away. Of
/// several limits the lowest counts.
pub(crate) fn limit_reads(rate: u64) {
    READS.limit(rate);
}

/// Waits until something may be read; returns how many of `blocks`, which are then paid for.
pub(super) fn admit(blocks: u64) -> u64 {
    READS.admit(blocks)
}

/// A pace that threads share.
#[derive(Debug)]
struct Throttle(Mutex<Pace>);

impl Throttle {
    fn unlimited() -> Self {
        Self(Mutex::new(Pace::unlimited()))
    }

    fn limit(&self, rate: u64) {
        let mut pace = self.pace();
        if rate > 0 && (pace.rate() == 0 || rate < pace.rate()) {
            *pace = Pace::new(rate);
        }
    }

    fn admit(&self, blocks: u64) -> u64 {
        loop {
            match self.try_admit(blocks) {
                Ok(admitted) => return admitted,
                Err(wait) => thread::sleep(wait),
            }
        }
    }

    /// As many as may be read now, or how long until some may.
    fn try_admit(&self, blocks: u64) -> Result<u64, Duration> {
        let mut pace = self.pace();
        let wait = pace.ready().saturating_duration_since(Instant::now());
        if !wait.is_zero() {
            return Err(wait);
        }
        let open = pace.open() as u64 / BLOCK_SIZE;
        let admitted = open.max(1).min(blocks);
        pace.took(usize::try_from(admitted * BLOCK_SIZE).unwrap_or(usize::MAX));
        Ok(admitted)
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Blocks a second that some threads may read for a time, a window of them asked for at once.
    fn admitted(throttle: &Throttle, threads: usize, time: Duration) -> f64 {
        let begin = Instant::now();
        let end = begin + time;
        let one = || {
            let mut sum = 0;
            while Instant::now() < end {
                sum += throttle.admit(32);
            }
            sum
        };
        let sum: u64 = thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
            running.into_iter().map(|one| one.join().unwrap()).sum()
        });
        // A machine that is busy lets them end late.
        sum as f64 / begin.elapsed().as_secs_f64()
    }

    #[test]
    fn threads_share_a_limit_and_use_all_of_it() {
        for (threads, rate) in [(1, 200 * MIB), (4, 20 * MIB)] {
            let throttle = Throttle::unlimited();
            throttle.limit(rate);
            let time = Duration::from_secs(2);
            let read = admitted(&throttle, threads, time) * BLOCK_SIZE as f64;
            let share = read / rate as f64;
            // A bucket is a fortieth of this time, and each thread ends with a block too many.
            assert!((0.9..=1.08).contains(&share), "{threads}: {share}");
        }
    }

    #[test]
    fn the_lowest_limit_counts_and_none_takes_nothing_away() {
        let throttle = Throttle::unlimited();
        assert_eq!(throttle.admit(32), 32);
        for (rate, counts) in [(0, 0), (MIB, MIB), (2 * MIB, MIB), (0, MIB), (9, 9)] {
            throttle.limit(rate);
            assert_eq!(throttle.pace().rate(), counts);
        }
        assert_eq!(throttle.admit(32), 1, "one block at least");
        assert!(throttle.try_admit(1).unwrap_err() > Duration::from_secs(3600));
    }
}
