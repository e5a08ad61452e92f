//! Worker threads: everything that may block on a disk, or keep a processor busy, happens here.

use std::sync::{Arc, Mutex, PoisonError, mpsc};

use crate::disk::Scratch;

type Job = Box<dyn FnOnce(&mut Scratch) + Send>;

/// Threads that outlive every session of this process.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    jobs: mpsc::Sender<Job>,
}

impl Pool {
    /// One worker for each processor: two at least, so that a slow disk does not idle a fast
    /// processor, and four at most, since a few saturate memory and any disk that we know.
    pub(crate) fn start() -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let workers = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
        for n in 0..workers {
            let queue = Arc::clone(&queue);
            std::thread::Builder::new()
                .name(format!("disk-{n}"))
                .spawn(move || work(&queue))?;
        }
        Ok(Self { jobs })
    }

    /// Runs a job on some worker. What waits is bounded by the windows of the sessions.
    pub(crate) fn submit(&self, job: impl FnOnce(&mut Scratch) + Send + 'static) {
        self.jobs
            .send(Box::new(job))
            .expect("workers end only with the last sender");
    }
}

fn work(queue: &Mutex<mpsc::Receiver<Job>>) {
    let mut scratch = Scratch::new();
    loop {
        // The lock is held while waiting: the others wait for it as they would for a job.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(job) => job(&mut scratch),
            Err(mpsc::RecvError) => return,
        }
    }
}
