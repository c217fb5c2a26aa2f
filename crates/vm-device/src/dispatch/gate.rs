//! The gate between vCPUs and devices: who may enter, and when a device that was taken out is quiet.
//!
//! There is one current *map*, which is never changed, only replaced, and there are *rooms* that maps lead to. Whoever
//! wants to enter rooms has a [`Pass`], which names the map that its owner uses and the room that it is in, for others
//! to read. Nobody enters by a map that is not current any more:
//!
//! * Who enters writes the room's address to its pass, and only then looks whether its map is still the current one. If
//!   not, it takes the room back, takes the current map, and begins again. Until that look it does not touch the room.
//! * Who closes a room makes a map without it the current one, and only then reads all passes.
//!
//! With a barrier between the two steps on each side ([`Barrier`]) one of them sees the other: either the room is on a
//! pass, or its owner finds that its map is old. The kernel makes that barrier, and who enters pays nothing; where it
//! does not, `usual` is null and `closings` never zero, so that who enters or leaves goes the way that has a barrier of its
//! own. So when no pass names a room that the current map does not have, nobody
//! is in it, and nobody will be. Maps are freed by the same rule: a pass names its map before its owner reads it.
//!
//! Closing does not wait for ever, and from within any room not at all: two threads could wait for each other. The room
//! goes to the list of those that are *closing*, and whoever leaves last takes it from there. The number of rooms that
//! are being closed is read by everybody who leaves; while it is zero, which is almost always, nobody takes a lock.
//!
//! Locks: `keeper` is held by who changes the map, `closing` by who waits for a room or leaves one meanwhile. Neither is
//! held while foreign code runs.
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::time::{Duration, Instant};

use super::barrier::{self, Barrier};
use crate::sync::{
    AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Condvar, Mutex, MutexGuard, lock, thread_token,
};

/// See the module. `K` is what who changes the map works on, `M` a map, `R` a room.
pub(super) struct Gate<K, M, R> {
    read: Read<M>,
    /// The latest of a list that only grows.
    passes: AtomicPtr<Pass<M, R>>,
    keeper: Mutex<Keeper<K, M>>,
    closing: Mutex<Vec<Arc<R>>>,
    left: Condvar,
}

/// What everybody reads all the time, apart from what is written more often.
#[repr(align(128))]
struct Read<M> {
    /// The current map once more, for who needs no barrier; null if all do. Stored after `current`.
    usual: AtomicPtr<M>,
    /// How many rooms are being closed, and one if who leaves needs a barrier.
    closings: AtomicUsize,
    /// Never null.
    current: AtomicPtr<M>,
    barrier: Barrier,
}

impl<M> Read<M> {
    /// Whether this map is the current one, after a store that who changes the map looks for.
    fn is_current(&self, map: *mut M) -> bool {
        barrier::full();
        self.current.load(Acquire) == map
    }

    /// As [`is_current`](Self::is_current), at no cost; may say no when it is.
    #[inline(always)]
    fn is_usual(&self, map: *mut M) -> bool {
        Barrier::light();
        self.usual.load(Acquire) == map
    }
}

// SAFETY: maps, rooms and what the keeper works on are given from thread to thread and shared by them; the raw pointers
// are to maps and passes that the gate owns.
unsafe impl<K: Send, M: Send + Sync, R: Send + Sync> Send for Gate<K, M, R> {}
// SAFETY: as above.
unsafe impl<K: Send, M: Send + Sync, R: Send + Sync> Sync for Gate<K, M, R> {}

/// What who changes the map holds.
pub(super) struct Keeper<K, M> {
    pub(super) work: K,
    /// Maps that were current, and that passes may name.
    old: Vec<NonNull<M>>,
    passes: usize,
}

impl<K, M> Keeper<K, M> {
    /// Whether anybody could look at the map.
    pub(super) fn is_watched(&self) -> bool {
        self.passes > 0
    }
}

/// The right to enter one room at a time. Two cache lines of its own, since others read it seldom and its owner writes it
/// all the time.
#[repr(align(128))]
pub(super) struct Pass<M, R> {
    /// The room that its owner is in, or about to enter; or null.
    room: AtomicPtr<R>,
    /// The map that its owner uses; null before the first use.
    map: AtomicPtr<M>,
    /// The thread that entered.
    thread: AtomicUsize,
    taken: AtomicBool,
    next: *const Pass<M, R>,
    /// Where its owner found something the last time; a number means nothing to the gate.
    pub(super) hints: [AtomicUsize; 2],
    pub(super) counts: Counts,
}

impl<M, R> Pass<M, R> {
    /// Says that its owner is about to enter.
    #[inline(always)]
    fn announce(&self, room: NonNull<R>) {
        self.thread.store(thread_token(), Relaxed);
        // Release: who reads it as ours also reads the thread as ours.
        self.room.store(room.as_ptr(), Release);
    }
}

/// Events, each counted by a pass's owner only.
#[derive(Default)]
pub(super) struct Counts([AtomicU64; Counts::KINDS]);

impl Counts {
    pub(super) const KINDS: usize = 5;

    pub(super) fn add(&self, kind: usize) {
        if let Some(count) = self.0.get(kind) {
            count.store(count.load(Relaxed).wrapping_add(1), Relaxed);
        }
    }
}

/// What became of a room that was closed.
pub(super) enum Closed {
    /// Nobody is in it.
    Quiet,
    /// Somebody is; it is dropped when the last one left.
    Later,
}

impl<K, M, R> Gate<K, M, R> {
    pub(super) fn new(work: K, first: M) -> Self {
        Self::with_barrier(work, first, Barrier::new())
    }

    pub(super) fn with_barrier(work: K, first: M, barrier: Barrier) -> Self {
        let first = Box::into_raw(Box::new(first));
        Gate {
            read: Read {
                usual: AtomicPtr::new(if barrier.is_light() { first } else { ptr::null_mut() }),
                closings: AtomicUsize::new(usize::from(!barrier.is_light())),
                current: AtomicPtr::new(first),
                barrier,
            },
            passes: AtomicPtr::new(ptr::null_mut()),
            keeper: Mutex::new(Keeper { work, old: Vec::new(), passes: 0 }),
            closing: Mutex::new(Vec::new()),
            left: Condvar::new(),
        }
    }

    /// To change the map; others who want to wait.
    pub(super) fn keeper(&self) -> MutexGuard<'_, Keeper<K, M>> {
        lock(&self.keeper)
    }

    /// Makes this the current map.
    pub(super) fn publish(&self, keeper: &mut Keeper<K, M>, map: M) {
        let map = Box::into_raw(Box::new(map));
        let old = self.read.current.swap(map, AcqRel);
        if self.read.barrier.is_light() {
            self.read.usual.store(map, Release);
        }
        keeper.old.extend(NonNull::new(old));
        // Each pass may hold one map for as long as its owner sleeps; a barrier for more than a few others is well spent.
        if keeper.passes == 0 || keeper.old.len() >= 2 * keeper.passes + 8 {
            self.free_maps(keeper);
        }
    }

    pub(super) fn free_maps(&self, keeper: &mut Keeper<K, M>) {
        if keeper.passes > 0 {
            self.read.barrier.heavy();
        }
        let used: Vec<*mut M> = self.passes().map(|pass| pass.map.load(Acquire)).collect();
        keeper.old.retain(|map| {
            let free = !used.contains(&map.as_ptr());
            if free {
                // SAFETY: it was made by `Box::into_raw`, is not current, and after the barrier no pass names it; one that
                // comes to name it now finds that it is not current, and does not read it.
                drop(unsafe { Box::from_raw(map.as_ptr()) });
            }
            !free
        });
    }

    fn passes(&self) -> impl Iterator<Item = &Pass<M, R>> {
        // SAFETY: passes are made by `Box::into_raw` in `take_pass` and freed when the gate is dropped.
        let mut next = unsafe { self.passes.load(Acquire).cast_const().as_ref() };
        std::iter::from_fn(move || {
            let pass = next?;
            // SAFETY: as above; `next` is written before the pass is in the list.
            next = unsafe { pass.next.as_ref() };
            Some(pass)
        })
    }

    /// A pass that nobody uses, or a new one. `fresh` makes a map for the first, if the keeper made none meanwhile.
    pub(super) fn take_pass(&self, fresh: impl FnOnce(&mut K) -> Option<M>) -> &Pass<M, R> {
        let spare = |pass: &&Pass<M, R>| !pass.taken.load(Relaxed) && !pass.taken.swap(true, Acquire);
        let pass = match self.passes().find(spare) {
            Some(pass) => pass,
            None => self.new_pass(fresh),
        };
        if pass.map.load(Relaxed).is_null() {
            self.take_map(pass);
        }
        pass
    }

    #[cold]
    fn new_pass(&self, fresh: impl FnOnce(&mut K) -> Option<M>) -> &Pass<M, R> {
        let mut keeper = self.keeper();
        let pass = Box::into_raw(Box::new(Pass {
            room: AtomicPtr::new(ptr::null_mut()),
            map: AtomicPtr::new(ptr::null_mut()),
            thread: AtomicUsize::new(0),
            taken: AtomicBool::new(true),
            next: self.passes.load(Relaxed),
            hints: [AtomicUsize::new(0), AtomicUsize::new(0)],
            counts: Counts::default(),
        }));
        self.passes.store(pass, Release);
        keeper.passes += 1;
        if let Some(map) = fresh(&mut keeper.work) {
            self.publish(&mut keeper, map);
        }
        // SAFETY: made above; passes live as long as the gate.
        unsafe { &*pass }
    }

    /// Gives a pass back, which remembers its map for the next owner if that is `soon`.
    ///
    /// # Safety
    /// The caller has it from [`take_pass`](Self::take_pass), is in no room, and does not use it any more.
    pub(super) unsafe fn return_pass(&self, pass: &Pass<M, R>, soon: bool) {
        if !soon {
            pass.map.store(ptr::null_mut(), Release);
        }
        pass.taken.store(false, Release);
    }

    /// Calls `find` with the map that the pass names, and enters the room that it finds, if that is the current map as far as
    /// can be said at no cost. `None`: nothing found, or not said. Then [`enter`](Self::enter) is to be asked, which is kept
    /// out of the way of this: what few need costs all some registers.
    ///
    /// # Safety
    /// As of [`enter`](Self::enter).
    #[inline(always)]
    pub(super) unsafe fn enter_at_once<'g, X>(
        &'g self,
        pass: &'g Pass<M, R>,
        find: impl Fn(&M) -> Option<(NonNull<R>, X)>,
    ) -> Option<(&'g R, X)> {
        let map = pass.map.load(Relaxed);
        // SAFETY: the pass named it when it was current (`take_map`), so it is not freed.
        let (room, more) = find(unsafe { &*map })?;
        pass.announce(room);
        if self.read.is_usual(map) {
            // SAFETY: the pass names the room, and after that its map was current: who closes the room after that sees it.
            return Some((unsafe { room.as_ref() }, more));
        }
        self.leave(pass);
        None
    }

    /// Calls `find` with the current map, and enters the room that it finds. What else it finds is handed on.
    ///
    /// # Safety
    /// The caller owns this pass of this gate, is in no room with it, and calls [`leave`](Self::leave) when it was given a
    /// room, which it does not use afterwards. `find` gives rooms that the map leads to; whoever publishes a map keeps
    /// each of its rooms until it has been [closed](Self::close) after a later map.
    pub(super) unsafe fn enter<'g, X, E>(
        &'g self,
        pass: &'g Pass<M, R>,
        find: impl Fn(&M) -> Result<(NonNull<R>, X), E>,
    ) -> Result<(&'g R, X), E> {
        loop {
            let map = pass.map.load(Relaxed);
            // SAFETY: as in `enter_at_once`.
            match find(unsafe { &*map }) {
                Ok((room, more)) => {
                    pass.announce(room);
                    if self.read.is_current(map) {
                        // SAFETY: as in `enter_at_once`.
                        return Ok((unsafe { room.as_ref() }, more));
                    }
                    self.leave(pass);
                }
                Err(error) => {
                    if self.read.current.load(Acquire) == map {
                        return Err(error);
                    }
                }
            }
            self.take_map(pass);
        }
    }

    /// Out of the room, if in one.
    #[inline(always)]
    pub(super) fn leave(&self, pass: &Pass<M, R>) {
        pass.room.store(ptr::null_mut(), Release);
        Barrier::light();
        if self.read.closings.load(Relaxed) != 0 {
            self.left_while_closing();
        }
    }

    #[cold]
    fn left_while_closing(&self) {
        if !self.read.barrier.is_light() {
            barrier::full();
            if self.read.closings.load(Relaxed) == 1 {
                return;
            }
        }
        let mut closing = lock(&self.closing);
        let quiet: Vec<Arc<R>> = closing.extract_if(.., |room| self.is_quiet(Arc::as_ptr(room))).collect();
        self.left.notify_all();
        drop(closing);
        for room in quiet {
            self.read.closings.fetch_sub(1, SeqCst);
            drop_foreign(room);
        }
    }

    #[cold]
    fn take_map(&self, pass: &Pass<M, R>) {
        loop {
            let map = self.read.current.load(Acquire);
            // Release: the map before is not read any more.
            pass.map.store(map, Release);
            if self.read.is_current(map) {
                return;
            }
        }
    }

    fn is_quiet(&self, room: *const R) -> bool {
        self.passes().all(|pass| !ptr::eq(pass.room.load(Acquire), room))
    }

    /// Whether this thread is in a room.
    pub(super) fn is_inside(&self) -> bool {
        let me = thread_token();
        // What a thread wrote itself it sees. A pass that it had before may be another's by now: the room is read first, so
        // that the thread is at least as new.
        self.passes().any(|pass| !pass.room.load(Acquire).is_null() && pass.thread.load(Relaxed) == me)
    }

    /// Closes a room that the current map does not have: waits until nobody is in it, no longer than this, and not at all
    /// if the caller is in a room itself. Then it is dropped.
    pub(super) fn close(&self, room: Arc<R>, patience: Duration) -> Closed {
        self.read.closings.fetch_add(1, SeqCst);
        self.read.barrier.heavy();
        let place = Arc::as_ptr(&room);
        if !self.is_quiet(place) && !self.wait_until_quiet(&room, patience) {
            return Closed::Later;
        }
        self.read.closings.fetch_sub(1, SeqCst);
        drop_foreign(room);
        Closed::Quiet
    }

    #[cold]
    fn wait_until_quiet(&self, room: &Arc<R>, patience: Duration) -> bool {
        let patience = if self.is_inside() { Duration::ZERO } else { patience };
        let deadline = Instant::now().checked_add(patience);
        let mut closing = lock(&self.closing);
        while !self.is_quiet(Arc::as_ptr(room)) {
            let left =
                deadline.map_or(patience, |deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                closing.push(room.clone());
                return false;
            }
            closing = match self.left.wait_timeout(closing, left) {
                Ok((closing, _)) => closing,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }

    /// The sum of each kind of event.
    pub(super) fn counts(&self) -> [u64; Counts::KINDS] {
        let mut sums = [0u64; Counts::KINDS];
        for pass in self.passes() {
            for (sum, count) in sums.iter_mut().zip(&pass.counts.0) {
                *sum = sum.wrapping_add(count.load(Relaxed));
            }
        }
        sums
    }
}

/// Drops what may run a device's own `Drop`, in the thread of a vCPU that happened to leave last: a panic stays in it.
fn drop_foreign<R>(room: Arc<R>) {
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(room)));
    // What was thrown may panic again when it is dropped.
    let _ = dropped.map_err(std::mem::forget);
}

impl<K, M, R> Drop for Gate<K, M, R> {
    fn drop(&mut self) {
        let current = self.read.current.load(Relaxed);
        let old = std::mem::take(&mut lock(&self.keeper).old);
        for map in old.into_iter().map(NonNull::as_ptr).chain([current]) {
            // SAFETY: made by `Box::into_raw`; nobody has a pass any more, since that takes a reference to the gate.
            drop(unsafe { Box::from_raw(map) });
        }
        let mut next = self.passes.load(Relaxed);
        while !next.is_null() {
            // SAFETY: as above.
            let pass = unsafe { Box::from_raw(next) };
            next = pass.next.cast_mut();
        }
    }
}
