//! Many lanes on few threads: a thousand devices in one process without a thread each.
//!
//! Each lane's reactor is a file itself; all of them are watched, edge-triggered, by one epoll that every thread of the
//! pool waits in. Whichever thread gets an event gives its lane a few turns. A lane that has more to do then writes to
//! its own waker: that puts it behind all others that are due, in the kernel's order, so no busy lane keeps another
//! waiting for longer than the turns of those before it.
//!
//! * One thread at a time is in a lane: `asked` counts the events that came for it, and only who raises it from zero goes
//!   in. Events that come meanwhile are made up for by another wake-up.
//! * An error or panic of a worker fails its lane inside [`LaneRunner`], as on a thread of its own. A panic of the runtime
//!   itself ends that lane; its device needs a reset, its thread goes on with the others.
//! * A lane that hangs in a device's code keeps the thread it hangs on, and no other lane waits for it in particular. The
//!   rest of the pool goes on with one thread less; when as many lanes hang as there are threads, all stand still.
//! * Nothing polls: idle lanes make no wake-ups. The price is a second epoll on the way of each event, so lanes
//!   whose latency matters are better off with [threads of their own](LaneRunner::run).
use super::{LaneRunner, Shared};
use crate::device::Worker;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use std::io;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

/// Turns that a lane gets before others do: one that works and one that finds nothing more is the rule.
const TURNS: u32 = 4;

/// The key of the waker that ends the threads: no lane has it.
const END: u64 = u64::MAX;

/// What became of a lane in a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There may be more to do.
    More,
    /// Its reactor becomes readable when there is.
    Idle,
    /// It was shut down.
    Over,
}

/// A lane and what is known of it outside.
struct Seat<W: Worker> {
    lane: Mutex<Option<LaneRunner<W>>>,
    /// Events that came for it and are not worked off.
    asked: AtomicUsize,
    waker: reactor::Waker,
    shared: Arc<Shared>,
}

struct Pool<W: Worker> {
    epoll: OwnedFd,
    seats: Vec<Seat<W>>,
    /// Lanes that have not ended.
    left: AtomicUsize,
    end: reactor::Waker,
}

/// Carries lanes with `threads` threads until all of them are shut down; then the threads end. Lanes in a pool do not
/// spin before they sleep: that would keep a thread from the others.
///
/// # Errors
/// Without descriptors or threads left.
pub fn run_in_pool<W: Worker>(
    lanes: Vec<LaneRunner<W>>,
    threads: NonZeroUsize,
) -> io::Result<Vec<JoinHandle<()>>> {
    let pool = Pool {
        epoll: epoll::create(CreateFlags::CLOEXEC)?,
        left: AtomicUsize::new(lanes.len()),
        seats: lanes.into_iter().map(Seat::new).collect(),
        end: reactor::Waker::new()?,
    };
    epoll::add(&pool.epoll, pool.end.as_fd(), EventData::new_u64(END), EventFlags::IN)?;
    for (key, seat) in (0..).zip(&pool.seats) {
        if let Some(lane) = &*seat.lane() {
            let flags = EventFlags::IN | EventFlags::ET;
            epoll::add(&pool.epoll, lane.reactor.as_fd(), EventData::new_u64(key), flags)?;
        }
        // Each has its first turn.
        seat.waker.wake();
    }
    if pool.seats.is_empty() {
        return Ok(Vec::new());
    }
    let pool = Arc::new(pool);
    let spawn = |number| {
        let pool = pool.clone();
        Builder::new().name(format!("lanes{number}")).spawn(move || pool.carry())
    };
    let threads: io::Result<Vec<_>> = (0..threads.get()).map(spawn).collect();
    if threads.is_err() {
        pool.end.wake();
    }
    threads
}

impl<W: Worker> Seat<W> {
    fn new(mut lane: LaneRunner<W>) -> Seat<W> {
        lane.spinner = None;
        let (waker, shared) = (lane.waker.clone(), lane.up.shared.clone());
        Seat { lane: Mutex::new(Some(lane)), asked: AtomicUsize::new(0), waker, shared }
    }

    fn lane(&self) -> std::sync::MutexGuard<'_, Option<LaneRunner<W>>> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A few turns. True: the lane is over.
    fn turns(&self) -> bool {
        let mut seat = self.lane();
        let Some(lane) = seat.as_mut() else { return false };
        for _ in 0..TURNS {
            match catch_unwind(AssertUnwindSafe(|| lane.step())) {
                Ok(Step::More) => {}
                Ok(Step::Idle) => return false,
                Ok(Step::Over) => {
                    *seat = None;
                    return true;
                }
                Err(_) => {
                    let lane = seat.take();
                    self.shared.failures.worker_failures.fetch_add(1, Ordering::Relaxed);
                    self.shared.needs_reset("the lane runtime panicked".to_owned());
                    let _ = catch_unwind(AssertUnwindSafe(|| drop(lane)));
                    return true;
                }
            }
        }
        // Behind those that wait.
        self.waker.wake();
        false
    }
}

impl<W: Worker> Pool<W> {
    /// What each thread does.
    fn carry(&self) {
        loop {
            // One at a time: who hangs in a lane has nothing of the others.
            let mut buffer = [MaybeUninit::<Event>::uninit(); 1];
            let key = match epoll::wait(&self.epoll, &mut buffer[..], None) {
                Ok((events, _)) => events.first().map(|event| event.data.u64()),
                Err(Errno::INTR) => None,
                // The kernel refuses to wait on our own epoll: this thread is of no use.
                Err(_) => return,
            };
            match key {
                Some(END) => return,
                Some(key) => {
                    if let Some(seat) = usize::try_from(key).ok().and_then(|key| self.seats.get(key)) {
                        self.visit(seat);
                    }
                }
                None => {}
            }
        }
    }

    fn visit(&self, seat: &Seat<W>) {
        if seat.asked.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        if seat.turns() && self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.end.wake();
        }
        if seat.asked.swap(0, Ordering::AcqRel) > 1 {
            // Somebody was turned away; what brought them may have come after the last look.
            seat.waker.wake();
        }
    }
}
