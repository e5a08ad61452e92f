//! A limit on bytes a second: a token bucket, kept as the instant at which it would be full. Who
//! writes frames waits here, and who reads disks in `disk/throttle.rs`.

use std::time::Duration;

use tokio::time::Instant;

/// The bucket holds what may go out in this time: short enough that no second carries notably
/// more than its share, long enough that timers do not cost throughput.
const DEPTH: Duration = Duration::from_millis(50);

/// Paces who writes, or reads.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes a second; zero for no limit.
    rate: u64,
    /// When everything so far is paid for.
    paid: Instant,
}

impl Pace {
    pub(crate) fn unlimited() -> Self {
        Self::new(0)
    }

    pub(crate) fn new(rate: u64) -> Self {
        Self {
            rate,
            paid: Instant::now(),
        }
    }

    /// Bytes a second; zero for no limit.
    pub(crate) fn rate(&self) -> u64 {
        self.rate
    }

    /// When at least half of the bucket is there: before that nothing should go.
    pub(crate) fn ready(&self) -> Instant {
        self.paid.checked_sub(DEPTH / 2).unwrap_or(self.paid)
    }

    /// How many bytes may go now; a little at least.
    pub(crate) fn open(&self) -> usize {
        if self.rate == 0 {
            return usize::MAX;
        }
        let open = (Instant::now() + DEPTH)
            .saturating_duration_since(self.paid)
            .min(DEPTH);
        let bytes = self.rate as f64 * open.as_secs_f64();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a float cast saturates, and the product is not negative"
        )]
        let bytes = bytes as usize;
        bytes.max(1)
    }

    /// So many bytes went.
    pub(crate) fn took(&mut self, bytes: usize) {
        if self.rate > 0 {
            let cost = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            // An idle time is not saved up.
            self.paid = self.paid.max(Instant::now()) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn seconds_for(total: usize, rate: u64) -> f64 {
        let start = Instant::now();
        let mut pace = Pace::new(rate);
        let mut left = total;
        while left > 0 {
            tokio::time::sleep_until(pace.ready()).await;
            let part = pace.open().min(left);
            pace.took(part);
            left -= part;
        }
        start.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn ten_seconds_worth_takes_ten_seconds_at_any_rate() {
        for rate in [1_000, 1_000_000, 20_000_000, 1_000_000_000] {
            let seconds = seconds_for(usize::try_from(rate).unwrap() * 10, rate).await;
            assert!((9.8..10.2).contains(&seconds), "{rate}: {seconds}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_time_is_not_saved_up() {
        let mut pace = Pace::new(1000);
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(pace.open() <= 50);
        pace.took(50);
        assert!(pace.ready() >= Instant::now() + Duration::from_millis(20));
    }
}
