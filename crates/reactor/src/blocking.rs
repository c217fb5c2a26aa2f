//! Calls that block, off the threads that must not: a bounded pool of threads for a whole process.
//!
//! A lane opens a [`Desk`]: it submits jobs there, and watches it for their results, which come back to the lane's own
//! thread. Everything is bounded: the threads of the pool, the jobs of a desk, and how many threads one desk can hold.
//!
//! * **A call that hangs** holds its thread and nothing else. Nobody waits for it: not the desk that is closed, not the
//!   pool that is dropped, not the process that ends. A desk never has more than half of the threads (at least one), so
//!   one guest whose backend hangs leaves the others the rest.
//! * **A job that panics** gives [`JobPanicked`] as its result; its thread goes on.
//! * Jobs of one desk begin in their order. Desks take turns: the first job that may begin is the one that was submitted
//!   first among those whose desk has threads left.
//! * Threads start when they are needed, and sleep without waking up when they are not.
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::Waker;

type Job = Box<dyn FnOnce() + Send>;

struct State {
    /// Jobs that have not begun, each with its desk's number.
    waiting: VecDeque<(u64, Job)>,
    /// Threads that desks hold.
    running: HashMap<u64, usize>,
    threads: usize,
    idle: usize,
    desks: u64,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Most threads.
    limit: usize,
    /// Most threads of one desk.
    share: usize,
}

/// Threads for calls that block. Clones are the same pool; it ends with the last of them and of its desks.
#[derive(Clone)]
pub struct BlockingPool(Arc<Handle>);

/// Closes the pool when nobody can submit any more.
struct Handle(Arc<Shared>);

impl BlockingPool {
    /// A pool of at most so many threads, none of which is started yet.
    pub fn new(threads: NonZeroUsize) -> BlockingPool {
        let state = State {
            waiting: VecDeque::new(),
            running: HashMap::new(),
            threads: 0,
            idle: 0,
            desks: 0,
            closed: false,
        };
        let limit = threads.get();
        let (state, work) = (Mutex::new(state), Condvar::new());
        BlockingPool(Arc::new(Handle(Arc::new(Shared { state, work, limit, share: (limit / 2).max(1) }))))
    }

    /// A desk for at most `capacity` jobs at a time, those whose results were not taken included. Takes one file
    /// descriptor.
    pub fn desk<T: Send + 'static>(&self, capacity: usize) -> io::Result<Desk<T>> {
        let tray = Arc::new(Tray { results: Mutex::default(), waker: Waker::new()? });
        let mut state = self.0.0.lock();
        state.desks += 1;
        Ok(Desk { pool: self.clone(), number: state.desks, tray, epoch: 0, capacity, out: 0 })
    }
}

impl fmt::Debug for BlockingPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingPool").field("limit", &self.0.0.limit).finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        let never = std::mem::take(&mut state.waiting);
        drop(state);
        self.0.work.notify_all();
        // What they hold is dropped without the lock.
        drop(never);
    }
}

/// Results that wait to be taken: with the desk's epoch at their submission.
struct Tray<T> {
    results: Mutex<VecDeque<(u64, Result<T, JobPanicked>)>>,
    waker: Waker,
}

impl<T> Tray<T> {
    fn put(&self, epoch: u64, result: Result<T, JobPanicked>) {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).push_back((epoch, result));
        self.waker.wake();
    }
}

/// A job did not return: it panicked, or no thread could be started for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a blocking call did not return")]
pub struct JobPanicked;

/// A job that was not taken: the desk has as many as it may. It comes back with the error.
#[derive(thiserror::Error)]
#[error("too many blocking calls are under way")]
pub struct Full<F>(pub F);

impl<F> fmt::Debug for Full<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Full")
    }
}

/// Where one lane submits jobs and gets their results. Watch it with
/// [`Interest::READ_EDGE`](crate::Interest::READ_EDGE), and [`take`](Self::take) until there is nothing more.
pub struct Desk<T> {
    pool: BlockingPool,
    number: u64,
    tray: Arc<Tray<T>>,
    epoch: u64,
    capacity: usize,
    /// Jobs of this epoch whose results were not taken.
    out: usize,
}

impl<T: Send + 'static> Desk<T> {
    /// Has a thread of the pool run `job`. Never blocks.
    pub fn submit<F: FnOnce() -> T + Send + 'static>(&mut self, job: F) -> Result<(), Full<F>> {
        let shared = &self.pool.0.0;
        let mut state = shared.lock();
        // Those that were given up count as long as they are there, or a guest could reset its way around the bound.
        let waiting = state.waiting.iter().filter(|(desk, _)| *desk == self.number).count();
        let running = state.running.get(&self.number).copied().unwrap_or(0);
        if (waiting + running).max(self.out) >= self.capacity {
            return Err(Full(job));
        }
        let (tray, epoch) = (Arc::clone(&self.tray), self.epoch);
        let job = move || {
            let result = catch_unwind(AssertUnwindSafe(job)).map_err(|_| JobPanicked);
            tray.put(epoch, result);
        };
        state.waiting.push_back((self.number, Box::new(job)));
        self.out += 1;
        // Each idle thread will take one of those that wait.
        let starts = state.waiting.len() > state.idle && state.threads < shared.limit;
        if starts {
            state.threads += 1;
        }
        drop(state);
        if !starts {
            shared.work.notify_one();
        } else if shared.start().is_err() {
            let mut state = shared.lock();
            state.threads -= 1;
            let nobody = state.threads == 0;
            drop(state);
            // Others will come to it, if there are any.
            if nobody {
                for _ in 0..self.cancel() {
                    self.tray.put(epoch, Err(JobPanicked));
                }
            }
        }
        Ok(())
    }

    /// The next result, in the order in which the jobs ended.
    pub fn take(&mut self) -> Option<Result<T, JobPanicked>> {
        loop {
            let next = self.tray.results.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let (epoch, result) = next?;
            if epoch == self.epoch {
                self.out -= 1;
                return Some(result);
            }
        }
    }

    /// Jobs whose results were not taken.
    pub fn outstanding(&self) -> usize {
        self.out
    }

    /// Gives up all jobs so far: those that have not begun never will, and the results of the others are dropped when
    /// they come. For a reset; takes no time, whatever hangs.
    pub fn forget(&mut self) {
        self.epoch += 1;
        self.out = 0;
        self.cancel();
    }
}

impl<T> Desk<T> {
    /// Drops the jobs that have not begun, and returns how many those were.
    fn cancel(&self) -> usize {
        let mut state = self.pool.0.0.lock();
        let all = std::mem::take(&mut state.waiting).into_iter();
        let (gone, kept): (VecDeque<_>, VecDeque<_>) = all.partition(|(desk, _)| *desk == self.number);
        state.waiting = kept;
        // What they hold is dropped without the lock.
        drop(state);
        gone.len()
    }
}

impl<T> AsFd for Desk<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tray.waker.as_fd()
    }
}

impl<T> Drop for Desk<T> {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl<T> fmt::Debug for Desk<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").field("outstanding", &self.out).finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No critical section runs foreign code, so a poisoned lock guards a sound state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(self: &Arc<Self>) -> io::Result<()> {
        let shared = Arc::clone(self);
        std::thread::Builder::new().name("blocking".to_owned()).spawn(move || shared.work())?;
        Ok(())
    }

    /// What each thread does.
    fn work(&self) {
        let mut state = self.lock();
        loop {
            let free = |desk: &u64| state.running.get(desk).copied().unwrap_or(0) < self.share;
            let next = state.waiting.iter().position(|(desk, _)| free(desk));
            if let Some((desk, job)) = next.and_then(|at| state.waiting.remove(at)) {
                *state.running.entry(desk).or_insert(0) += 1;
                drop(state);
                // What the job's result or captures do when they are dropped is caught as well.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.lock();
                if let Some(running) = state.running.get_mut(&desk) {
                    *running -= 1;
                    if *running == 0 {
                        state.running.remove(&desk);
                    }
                }
                // A job of the same desk may have waited for just this.
                continue;
            }
            if state.closed {
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}
