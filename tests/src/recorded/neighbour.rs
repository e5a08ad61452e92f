//! Somebody else on the same file system, who syncs a file of his own again and again.
//!
//! That brings the file system's journal to the disk, and with it the names and lengths of all
//! files, but not their data: what a careful program has to be prepared for.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::image::Random;

/// The longest pause between two of his syncs: a run takes some hundred milliseconds.
const PAUSE_MS: u64 = 20;

/// He goes on until this is dropped.
#[derive(Debug)]
pub(super) struct Neighbour {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Neighbour {
    /// Begins, with a file in this directory.
    pub(super) fn start(directory: &Path, seed: u64) -> Self {
        let mut file = File::create(directory.join("neighbour")).expect("there is room");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let mut random = Random::new(seed);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let synced = file.write_all(b"something").and_then(|()| file.sync_all());
                synced.expect("the recorded disk works");
                std::thread::sleep(Duration::from_millis(random.below(PAUSE_MS)));
            }
        });
        let thread = Some(thread);
        Self { stop, thread }
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(
            std::thread::panicking() || matches!(ended, Some(Ok(()))),
            "the neighbour failed"
        );
    }
}
