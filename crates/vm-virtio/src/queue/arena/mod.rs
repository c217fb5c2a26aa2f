//! Where popped chains live: one slot for each entry of the queue, segments included.
//!
//! A [`Chain`] is a pointer to its slot. The queue's own side - everything in a slot but `next` and `shared` - is
//! touched by the thread that has the queue, and by nobody while the queue is lent elsewhere. A handle that is dropped,
//! on whatever thread, pushes its slot on a lock-free stack, from which the queue sweeps it. A queue that goes while
//! handles are out leaves everything to them: the last one frees slots, segments and memory snapshots.
//!
//! Invariants:
//! * A slot is in one of three places: free (list through `next`), taken (one handle is out, or the completion is held
//!   back for `IN_ORDER`), or dropped (stack through `next`). Only the holder of the slot in that state writes `next`.
//! * `count <= cap`, and that many segments at `segs` are initialised, while a slot is taken; `segs` points at `inline`
//!   or at a block of `cap` segments that the slot owns. Neither changes while a handle is out.
//! * Free slots have the epoch of the current snapshot.
mod epochs;

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell, UnsafeCell};
use std::mem::{self, MaybeUninit};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use reactor::Waker;

use epochs::Epochs;

use super::chain::Chain;
use super::error::QueueError;
use super::segment_pool::{Pool, RETAINED};
use crate::memory::{GuestRam, Segment};

/// Segments that a slot has room for without a block of the pool: makes a slot two cache lines.
pub(super) const INLINE: usize = 4;

/// What a slot is that is not free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// A handle is out.
    Out,
    /// Completed, held back behind an earlier one (`IN_ORDER`).
    Done,
    /// Given up without a used entry (`IN_ORDER`): nothing behind it can be published any more.
    Discarded,
}

/// A popped chain: all but the segments in one cache line.
#[repr(C, align(128))]
pub(super) struct Slot {
    segs: Cell<*mut Segment>,
    /// Where the segments must end that are added without further checks: the room, or the longest chain.
    end: Cell<*mut Segment>,
    /// Number of segments; of those, the device-readable ones. Fields of their own, as all here: to put them together
    /// and take them apart costs more instructions than it saves stores.
    count: Cell<u32>,
    readable: Cell<u32>,
    /// The chain's number among all that were popped.
    seq: Cell<u32>,
    id: Cell<u16>,
    /// Its descriptors of the ring.
    descs: Cell<u16>,
    /// Of the snapshot that the segments are in; for a free slot, of the current one.
    epoch: Cell<u32>,
    /// Bytes of the device-writable part.
    writable: Cell<u32>,
    next: AtomicPtr<Slot>,
    shared: *const Shared,
    written: Cell<u32>,
    mark: Cell<Mark>,
    /// Of the block that `segs` points at: see the pool. 0: `inline`. With [`OLD`], if it is of a former snapshot: so one
    /// look tells whether there is more to do than usual when the slot is free again.
    class: Cell<u8>,
    /// In-flight tracking, packed: where in the region the chain is.
    entry: Cell<u16>,
    inline: UnsafeCell<[MaybeUninit<Segment>; INLINE]>,
}

const _: () = assert!(size_of::<Slot>() == 128);

/// No class has this bit.
const OLD: u8 = 0x80;

impl Slot {
    #[inline(always)]
    pub(super) fn id(&self) -> u16 {
        self.id.get()
    }

    #[inline(always)]
    pub(super) fn descs(&self) -> u16 {
        self.descs.get()
    }

    /// Names a slot that is not taken yet.
    #[inline(always)]
    pub(super) fn set_name(&self, id: u16, descs: u16, seq: u32) {
        self.id.set(id);
        self.descs.set(descs);
        self.seq.set(seq);
    }

    /// Number of segments, and of those the device-readable ones.
    #[inline(always)]
    pub(super) fn counts(&self) -> (u32, u32) {
        (self.count.get(), self.readable.get())
    }

    /// With the bytes of the device-writable part, or `u32::MAX` if there are more.
    #[inline(always)]
    pub(super) fn set_counts(&self, count: u32, readable: u32, writable: u32) {
        self.count.set(count);
        self.readable.set(readable);
        self.writable.set(writable);
    }

    /// Bytes of the device-writable part; a part of 2^32 bytes is one byte shorter than what can be told of.
    #[inline(always)]
    pub(super) fn writable_len(&self) -> u32 {
        self.writable.get()
    }

    #[inline(always)]
    pub(super) fn seq(&self) -> u32 {
        self.seq.get()
    }

    #[inline(always)]
    pub(super) fn entry(&self) -> u16 {
        self.entry.get()
    }

    #[inline(always)]
    pub(super) fn set_entry(&self, entry: u16) {
        self.entry.set(entry);
    }

    pub(super) fn written(&self) -> u32 {
        self.written.get()
    }

    pub(super) fn mark(&self) -> Mark {
        self.mark.get()
    }

    /// Where the slot's segments are, and where those end that are added without further checks.
    #[inline(always)]
    pub(super) fn room(&self) -> (*mut Segment, *mut Segment) {
        (self.segs.get(), self.end.get())
    }

    /// How many segments there are before that place: at most a few for each element, so that they fit.
    #[inline(always)]
    pub(super) fn count_to(&self, next: *mut Segment) -> u32 {
        let bytes = (next as usize).wrapping_sub(self.segs.get() as usize);
        (bytes / size_of::<Segment>()) as u32
    }

    /// How many segments there is room for.
    fn cap(&self) -> u32 {
        Pool::cap(self.class()).unwrap_or(INLINE as u32)
    }

    fn class(&self) -> u8 {
        self.class.get() & !OLD
    }

    /// The place behind `count` segments, and where the room or the chain must end, of `most` segments.
    pub(super) fn room_behind(&self, count: u32, most: i64) -> (*mut Segment, *mut Segment) {
        let segs = self.segs.get();
        let end = i64::from(self.cap()).min(most).max(i64::from(count));
        (segs.wrapping_add(count as usize), segs.wrapping_add(usize::try_from(end).unwrap_or(0)))
    }

    /// Ends a handle that is still needed for order: nothing is published for it yet.
    pub(super) fn hold(&self, mark: Mark, written: u32) {
        self.mark.set(mark);
        self.written.set(written);
    }

    /// The device-readable and the device-writable segments.
    #[inline(always)]
    pub(super) fn segments(&self) -> (&[Segment], &[Segment]) {
        let (count, readable) = self.counts();
        // SAFETY: `count` segments at `segs` are initialised and do not change while the slot is taken; who has a
        // `&Slot` of a free slot does not call this (private to the queue, which lends them by handle).
        let all = unsafe { std::slice::from_raw_parts(self.segs.get(), count as usize) };
        all.split_at_checked(readable as usize).unwrap_or((all, &[]))
    }

    /// The end of a handle that nobody completed. Any thread.
    #[cold]
    pub(super) fn abandon(slot: NonNull<Slot>) {
        // SAFETY: the handle that is being dropped keeps the slot, and `Shared`, allocated up to the exchange or the
        // decrement below. `shared` does not change after the slot was made, `next` is the dropped handle's to write.
        let (shared, next) = unsafe { (&*(*slot.as_ptr()).shared, &(*slot.as_ptr()).next) };
        let mut head = shared.dropped.load(Ordering::Acquire);
        loop {
            if head == CLOSED {
                // The queue is gone: it left a count of the handles that were out.
                if shared.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    // SAFETY: this was the last one that knew of it, and it was made by `Box::into_raw`.
                    drop(unsafe { Box::from_raw(ptr::from_ref(shared).cast_mut()) });
                }
                return;
            }
            next.store(head, Ordering::Relaxed);
            // Taken before the exchange, after which the queue may be gone. Who finds others on the stack is not the
            // first: that one wakes.
            let waker = if head.is_null() { shared.waker.get().cloned() } else { None };
            // Release: whatever this thread did with the chain was before the queue gives it back.
            match shared.dropped.compare_exchange_weak(
                head,
                slot.as_ptr(),
                Ordering::Release,
                Ordering::Acquire,
            ) {
                Ok(_) => {
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                    return;
                }
                Err(other) => head = other,
            }
        }
    }
}

/// What handles and queue share.
struct Shared {
    /// Stack of the slots whose handles were dropped; [`CLOSED`] when the queue is gone.
    dropped: AtomicPtr<Slot>,
    /// Whose turn sweeps the stack.
    waker: OnceLock<Waker>,
    /// With the queue gone: how many handles are left.
    left: AtomicUsize,
    /// With the queue gone: what the handles need.
    keep: UnsafeCell<Option<Keep>>,
}

const CLOSED: *mut Slot = ptr::without_provenance_mut(1);

/// What must outlive the last handle, dropped in this order.
struct Keep {
    _memory: SlotMemory,
    _pool: Pool,
    _epochs: Epochs,
}

/// The slots; those below `made` are initialised.
struct SlotMemory {
    base: NonNull<Slot>,
    /// In bytes: what a handle's place is compared with.
    bytes: usize,
    len: u32,
    made: Cell<u32>,
}

impl SlotMemory {
    fn new(len: u32) -> SlotMemory {
        let Some(layout) = Self::layout(len) else { return SlotMemory::none() };
        // SAFETY: the layout is not of size 0, as `layout` says.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base.cast()) else { handle_alloc_error(layout) };
        SlotMemory { base, bytes: layout.size(), len, made: Cell::new(0) }
    }

    fn none() -> SlotMemory {
        SlotMemory { base: NonNull::dangling(), bytes: 0, len: 0, made: Cell::new(0) }
    }

    fn layout(len: u32) -> Option<Layout> {
        Layout::array::<Slot>(len as usize).ok().filter(|layout| layout.size() > 0)
    }

    /// Pointers to the slots that were made.
    fn made(&self) -> impl Iterator<Item = NonNull<Slot>> + use<> {
        let base = self.base;
        // SAFETY: `made` slots are within the allocation.
        (0..self.made.get()).map(move |i| unsafe { base.add(i as usize) })
    }
}

impl Drop for SlotMemory {
    fn drop(&mut self) {
        for slot in self.made() {
            // SAFETY: nobody else has the slots any more; a block of the slot is its own.
            unsafe {
                let slot = slot.as_ref();
                Pool::free(slot.segs.get(), slot.class());
            }
        }
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated with this very layout; slots have no destructors.
            unsafe { dealloc(self.base.as_ptr().cast(), layout) };
        }
    }
}

/// The slots of a queue.
pub(super) struct Arena {
    free: Cell<*mut Slot>,
    /// Handles made so far, less those that were put back; the number of the latest.
    popped: Cell<u64>,
    /// Handles that have ended otherwise.
    ended: Cell<u64>,
    /// See [`Self::surplus`]: with the value of `popped` that it belongs to.
    surplus: Cell<(u64, i64)>,
    parked: Cell<Option<QueueError>>,
    memory: SlotMemory,
    /// Number of entries of the queue.
    size: u16,
    shared: NonNull<Shared>,
    pool: RefCell<Pool>,
    epochs: Epochs,
}

// SAFETY: the slots that the pointers lead to belong to the queue; what handles on other threads touch is atomic.
unsafe impl Send for Arena {}

impl Arena {
    /// As many slots as the queue has entries: the driver cannot have more buffers out.
    pub(super) fn new(size: u16, ram: GuestRam) -> Arena {
        let shared = Box::new(Shared {
            dropped: AtomicPtr::new(ptr::null_mut()),
            waker: OnceLock::new(),
            left: AtomicUsize::new(0),
            keep: UnsafeCell::new(None),
        });
        Arena {
            free: Cell::new(ptr::null_mut()),
            popped: Cell::new(0),
            ended: Cell::new(0),
            surplus: Cell::new((0, 0)),
            parked: Cell::new(None),
            memory: SlotMemory::new(u32::from(size)),
            size,
            shared: NonNull::from(Box::leak(shared)),
            pool: RefCell::new(Pool::new(size)),
            epochs: Epochs { current: ram, number: 0, old: Vec::new() },
        }
    }

    /// Who is woken by a dropped handle. Once.
    pub(super) fn set_waker(&self, waker: Waker) {
        // SAFETY: the queue's part of `Shared` ends when `self` is dropped.
        let _ = unsafe { self.shared.as_ref() }.waker.set(waker);
    }

    /// The slot that [`Self::take`] will take; `None`: ask [`Self::make`].
    #[inline(always)]
    pub(super) fn peek(&self) -> Option<&Slot> {
        // SAFETY: free slots are made and in memory that lives as long as `self`.
        unsafe { self.free.get().as_ref() }
    }

    /// Makes one more slot if none is free, if not all are: memory of slots that a queue never needs is never touched.
    ///
    /// If there is none left, as many chains are taken as the queue has entries, and the driver has more available.
    /// Either it reuses what it does not own, which is an error, or the device has dropped some, which are the driver's
    /// again after the next publication: `None`.
    #[cold]
    #[inline(never)]
    pub(super) fn make(&self) -> Result<Option<&Slot>, QueueError> {
        if let Some(slot) = self.peek() {
            return Ok(Some(slot));
        }
        let made = self.memory.made.get();
        if made >= self.memory.len {
            return if self.has_dropped() { Ok(None) } else { Err(QueueError::TooManyOutstanding) };
        }
        // SAFETY: `made` is below the length of the allocation, and that slot is nobody's yet.
        let slot = unsafe {
            let slot = self.memory.base.add(made as usize).as_ptr();
            slot.write(Slot {
                segs: Cell::new(ptr::null_mut()),
                end: Cell::new(ptr::null_mut()),
                count: Cell::new(0),
                readable: Cell::new(0),
                seq: Cell::new(0),
                id: Cell::new(0),
                descs: Cell::new(0),
                epoch: Cell::new(self.epochs.number),
                writable: Cell::new(0),
                next: AtomicPtr::new(ptr::null_mut()),
                shared: self.shared.as_ptr(),
                written: Cell::new(0),
                mark: Cell::new(Mark::Out),
                class: Cell::new(0),
                entry: Cell::new(0),
                inline: UnsafeCell::new([const { MaybeUninit::uninit() }; INLINE]),
            });
            &*slot
        };
        self.set_room(slot, slot.inline.get().cast(), 0);
        self.memory.made.set(made + 1);
        self.free.set(ptr::from_ref(slot).cast_mut());
        Ok(Some(slot))
    }

    /// Takes the slot that [`Self::peek`] gave, and which has its segments and counts by now: `id` is the head (split) or
    /// the buffer id (packed), `descs` the ring's descriptors.
    #[inline(always)]
    pub(super) fn take(&self, slot: &Slot, id: u16, descs: u16) -> Chain {
        let chain = self.take_named(slot);
        slot.set_name(id, descs, self.latest());
        chain
    }

    /// The same of one that has its name by now, too.
    #[inline(always)]
    pub(super) fn take_named(&self, slot: &Slot) -> Chain {
        self.free.set(slot.next.load(Ordering::Relaxed));
        self.popped.set(self.popped.get() + 1);
        Chain::new(NonNull::from(slot))
    }

    /// The slot of a handle, if it is of this arena.
    #[inline(always)]
    pub(super) fn slot(&self, chain: &Chain) -> Option<&Slot> {
        let slot = chain.slot();
        let offset = (slot.as_ptr() as usize).wrapping_sub(self.memory.base.as_ptr() as usize);
        // SAFETY: a handle always points at a whole slot, and this one is in our memory.
        (offset < self.memory.bytes).then(|| unsafe { &*slot.as_ptr() })
    }

    /// Takes the handle in; the slot stays taken. The chain must be of this arena, or nothing is done.
    #[inline(always)]
    pub(super) fn end(&self, chain: Chain) -> Result<&Slot, Chain> {
        if self.slot(&chain).is_none() {
            return Err(chain);
        }
        self.ended.set(self.ended.get() + 1);
        // SAFETY: just found to be one of our slots.
        Ok(unsafe { &*chain.into_slot().as_ptr() })
    }

    /// Takes the handle in as if it had never been made, if it is the latest one.
    pub(super) fn end_latest(&self, chain: Chain) -> Result<&Slot, Chain> {
        if self.slot(&chain).is_none_or(|slot| slot.seq() != self.latest()) {
            return Err(chain);
        }
        self.popped.set(self.popped.get() - 1);
        self.set_surplus(0);
        // SAFETY: just found to be one of our slots.
        Ok(unsafe { &*chain.into_slot().as_ptr() })
    }

    /// Lets a number pass, so that no handle is the latest.
    pub(super) fn skip_seq(&self) {
        self.popped.set(self.popped.get() + 1);
        self.ended.set(self.ended.get() + 1);
    }

    /// The number of the latest handle, cut off as slots have it.
    #[inline(always)]
    pub(super) fn latest(&self) -> u32 {
        self.popped.get() as u32
    }

    /// Most elements of a chain.
    pub(super) fn most(&self) -> i64 {
        i64::from(self.size)
    }

    /// Segments minus elements of the chain that is being popped, of those elements that do not have one segment. All
    /// others take one of the places before the end that a slot tells of, of which there are no more than a chain may
    /// have elements; so they need not be counted.
    pub(super) fn surplus(&self) -> i64 {
        // What is there may be of a chain before.
        let (chain, surplus) = self.surplus.get();
        if chain == self.popped.get() { surplus } else { 0 }
    }

    pub(super) fn set_surplus(&self, surplus: i64) {
        self.surplus.set((self.popped.get(), surplus));
    }

    /// Keeps a violation until the walk is back where it can be told.
    pub(super) fn park(&self, error: QueueError) {
        self.parked.set(Some(error));
    }

    /// The same for what would else be an outcome.
    #[inline(always)]
    pub(super) fn settle<T>(&self, outcome: Result<T, QueueError>) -> Option<T> {
        match outcome {
            Ok(outcome) => Some(outcome),
            Err(error) => {
                self.park(error);
                None
            }
        }
    }

    #[cold]
    #[inline(never)]
    pub(super) fn parked(&self) -> QueueError {
        self.violation().unwrap_or(QueueError::ChainTooLong)
    }

    /// What the last pop stumbled over, if it did.
    pub(super) fn violation(&self) -> Option<QueueError> {
        self.parked.take()
    }

    /// Handles made, less those that were put back.
    #[inline(always)]
    pub(super) fn popped(&self) -> u64 {
        self.popped.get()
    }

    /// Handles that have ended, but for those that were put back.
    pub(super) fn ended(&self) -> u64 {
        self.ended.get()
    }

    /// Frees a slot whose handle has ended.
    pub(super) fn release(&self, slot: &Slot) {
        self.release_usual(slot);
        if slot.class() > RETAINED {
            self.give_back(slot);
        }
    }

    /// Whether the slot is of the current snapshot and keeps its segments' memory: then [`Self::release_usual`] is enough.
    #[inline(always)]
    pub(super) fn is_usual(&self, slot: &Slot) -> bool {
        slot.class.get() <= RETAINED
    }

    /// Frees a usual slot whose handle has ended. What it says stays there until it is taken again.
    #[inline(always)]
    pub(super) fn release_usual(&self, slot: &Slot) {
        slot.next.store(self.free.get(), Ordering::Relaxed);
        self.free.set(ptr::from_ref(slot).cast_mut());
    }

    /// Handles that are out, those of dropped chains that were not swept yet included: no more than there are slots.
    pub(super) fn out(&self) -> usize {
        usize::try_from(self.popped.get() - self.ended.get()).unwrap_or(usize::MAX)
    }

    /// The position of a slot, to find it again by [`Self::at`].
    #[inline(always)]
    pub(super) fn index_of(&self, slot: &Slot) -> u32 {
        let offset = (ptr::from_ref(slot) as usize).wrapping_sub(self.memory.base.as_ptr() as usize);
        // No arena has as many.
        (offset / size_of::<Slot>()) as u32
    }

    pub(super) fn at(&self, index: u32) -> Option<&Slot> {
        // SAFETY: slots below `made` are initialised and live as long as `self`.
        (index < self.memory.made.get()).then(|| unsafe { &*self.memory.base.add(index as usize).as_ptr() })
    }

    fn free_slots(&self) -> impl Iterator<Item = &Slot> {
        let mut slot = self.free.get();
        std::iter::from_fn(move || {
            // SAFETY: slots on the list of free ones are made, and ours alone.
            let at = unsafe { slot.as_ref() }?;
            slot = at.next.load(Ordering::Relaxed);
            Some(at)
        })
    }

    /// All slots that are not free, in no particular order.
    pub(super) fn taken(&self) -> impl Iterator<Item = &Slot> {
        let mut free = vec![false; self.memory.made.get() as usize];
        for slot in self.free_slots() {
            if let Some(mark) = free.get_mut(self.index_of(slot) as usize) {
                *mark = true;
            }
        }
        (0..).zip(free).filter(|(_, free)| !free).filter_map(|(index, _)| self.at(index))
    }

    #[inline(always)]
    pub(super) fn has_dropped(&self) -> bool {
        // SAFETY: the queue's part of `Shared` ends when `self` is dropped. Relaxed: the sweep that follows acquires.
        !unsafe { self.shared.as_ref() }.dropped.load(Ordering::Relaxed).is_null()
    }

    /// The slots whose handles were dropped, as a list through [`Self::next_dropped`]. Counts the handles as ended.
    #[cold]
    pub(super) fn take_dropped(&self) -> Option<u32> {
        // SAFETY: as in `has_dropped`. Acquire: what the dropping thread did with the chain was before.
        let head = unsafe { self.shared.as_ref() }.dropped.swap(ptr::null_mut(), Ordering::Acquire);
        // SAFETY: slots on the stack are ours, made, and nobody else's any more.
        NonNull::new(head).map(|slot| self.index_of(unsafe { slot.as_ref() }))
    }

    /// Ends the handle of a dropped slot and returns the one behind it.
    pub(super) fn next_dropped(&self, slot: &Slot) -> Option<u32> {
        self.ended.set(self.ended.get() + 1);
        let next = slot.next.load(Ordering::Relaxed);
        // SAFETY: as in `take_dropped`.
        NonNull::new(next).map(|slot| self.index_of(unsafe { slot.as_ref() }))
    }

    /// Gives a slot that is not taken room for one segment more than `count`, which it keeps.
    pub(super) fn make_room(&self, slot: &Slot, count: u32) -> Result<(), QueueError> {
        if count < slot.cap() {
            return Ok(());
        }
        let (block, class) = self.pool.borrow_mut().take(count as usize + 1)?;
        // SAFETY: `count` segments are initialised at `segs`, and the block has room for more than that; they are
        // pointers and lengths, so that a copy is a move.
        unsafe { ptr::copy_nonoverlapping(slot.segs.get(), block, count as usize) };
        self.give_back(slot);
        self.set_room(slot, block, class);
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn give_back(&self, slot: &Slot) {
        if slot.class() > 0 {
            self.pool.borrow_mut().put(slot.segs.get(), slot.class());
            self.set_room(slot, slot.inline.get().cast(), 0);
        }
    }

    fn set_room(&self, slot: &Slot, segs: *mut Segment, class: u8) {
        slot.segs.set(segs);
        slot.class.set(class | (slot.class.get() & OLD));
        slot.end.set(segs.wrapping_add(slot.cap().min(u32::from(self.size)) as usize));
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let ram = GuestRam::empty();
        let keep = Keep {
            _memory: mem::replace(&mut self.memory, SlotMemory::none()),
            _pool: mem::replace(self.pool.get_mut(), Pool::new(0)),
            _epochs: mem::replace(&mut self.epochs, Epochs { current: ram, number: 0, old: Vec::new() }),
        };
        let shared = self.shared.as_ptr();
        // SAFETY: handles touch `left` and `keep` only once they see `CLOSED`, which is below; the decrement tells
        // who is the last to know of `Shared`, and it was made by `Box::leak`. The slots of the stack are in `keep`.
        unsafe {
            *(*shared).keep.get() = Some(keep);
            (*shared).left.store(self.out() + 1, Ordering::Relaxed);
            let mut slot = (*shared).dropped.swap(CLOSED, Ordering::AcqRel);
            let mut ended = 1;
            while let Some(dropped) = slot.as_ref() {
                ended += 1;
                slot = dropped.next.load(Ordering::Relaxed);
            }
            if (*shared).left.fetch_sub(ended, Ordering::AcqRel) == ended {
                drop(Box::from_raw(shared));
            }
        }
    }
}
