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
//! * A snapshot that is not the current one is kept as long as a slot of its epoch is taken.
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell, UnsafeCell};
use std::mem::{self, MaybeUninit};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::chain::Chain;
use super::error::QueueError;
use super::segment_pool::{Pool, RETAINED};
use crate::memory::{GuestRam, Segment};

/// Segments that a slot has room for without a block of the pool: makes a slot two cache lines.
pub(super) const INLINE: usize = 4;

/// What a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// Not in use.
    Free,
    /// A handle is out.
    Out,
    /// Completed, held back behind an earlier one (`IN_ORDER`).
    Done,
    /// Given up without a used entry (`IN_ORDER`): nothing behind it can be published any more.
    Discarded,
}

/// A popped chain.
#[repr(C, align(128))]
pub(super) struct Slot {
    segs: Cell<*mut Segment>,
    cap: Cell<u32>,
    count: Cell<u32>,
    readable: Cell<u32>,
    writable_len: Cell<u32>,
    id: Cell<u16>,
    descs: Cell<u16>,
    epoch: Cell<u32>,
    seq: Cell<u32>,
    written: Cell<u32>,
    mark: Cell<Mark>,
    next: AtomicPtr<Slot>,
    shared: *const Shared,
    inline: UnsafeCell<[MaybeUninit<Segment>; INLINE]>,
}

/// What a chain is made of, as the walk found it.
pub(super) struct Shape {
    pub(super) count: u32,
    pub(super) readable: u32,
    pub(super) writable_len: u32,
    pub(super) id: u16,
    pub(super) descs: u16,
}

impl Slot {
    #[inline(always)]
    pub(super) fn id(&self) -> u16 {
        self.id.get()
    }

    #[inline(always)]
    pub(super) fn descs(&self) -> u16 {
        self.descs.get()
    }

    #[inline(always)]
    pub(super) fn writable_len(&self) -> u32 {
        self.writable_len.get()
    }

    #[inline(always)]
    pub(super) fn seq(&self) -> u32 {
        self.seq.get()
    }

    pub(super) fn written(&self) -> u32 {
        self.written.get()
    }

    pub(super) fn mark(&self) -> Mark {
        self.mark.get()
    }

    /// Ends a handle that is still needed for order: nothing is published for it yet.
    pub(super) fn hold(&self, mark: Mark, written: u32) {
        self.mark.set(mark);
        self.written.set(written);
    }

    /// The device-readable and the device-writable segments.
    #[inline(always)]
    pub(super) fn segments(&self) -> (&[Segment], &[Segment]) {
        // SAFETY: `count` segments at `segs` are initialised and do not change while the slot is taken; who has a
        // `&Slot` of a free slot does not call this (private to the queue, which lends them by handle).
        let all = unsafe { std::slice::from_raw_parts(self.segs.get(), self.count.get() as usize) };
        all.split_at_checked(self.readable.get() as usize).unwrap_or((all, &[]))
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
            // Release: whatever this thread did with the chain was before the queue gives it back.
            match shared.dropped.compare_exchange_weak(
                head,
                slot.as_ptr(),
                Ordering::Release,
                Ordering::Acquire,
            ) {
                Ok(_) => return,
                Err(other) => head = other,
            }
        }
    }
}

/// What handles and queue share.
struct Shared {
    /// Stack of the slots whose handles were dropped; [`CLOSED`] when the queue is gone.
    dropped: AtomicPtr<Slot>,
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
    len: u32,
    made: Cell<u32>,
}

impl SlotMemory {
    fn new(len: u32) -> SlotMemory {
        let Some(layout) = Self::layout(len) else { return SlotMemory::none() };
        // SAFETY: the layout is not of size 0, as `layout` says.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base.cast()) else { handle_alloc_error(layout) };
        SlotMemory { base, len, made: Cell::new(0) }
    }

    fn none() -> SlotMemory {
        SlotMemory { base: NonNull::dangling(), len: 0, made: Cell::new(0) }
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
                if slot.cap.get() as usize > INLINE {
                    Pool::free(slot.segs.get(), slot.cap.get() as usize);
                }
            }
        }
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: allocated with this very layout; slots have no destructors.
            unsafe { dealloc(self.base.as_ptr().cast(), layout) };
        }
    }
}

/// The memory snapshots that chains of this queue are from.
struct Epochs {
    current: GuestRam,
    number: u32,
    /// Earlier ones: number, snapshot, slots of it that are still taken.
    old: Vec<(u32, GuestRam, u32)>,
}

/// The slots of a queue.
pub(super) struct Arena {
    free: Cell<*mut Slot>,
    /// Slots that are not free.
    taken: Cell<u32>,
    /// Handles that are out.
    out: Cell<u32>,
    memory: SlotMemory,
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
            left: AtomicUsize::new(0),
            keep: UnsafeCell::new(None),
        });
        Arena {
            free: Cell::new(ptr::null_mut()),
            taken: Cell::new(0),
            out: Cell::new(0),
            memory: SlotMemory::new(u32::from(size)),
            shared: NonNull::from(Box::leak(shared)),
            pool: RefCell::new(Pool::new(size)),
            epochs: Epochs { current: ram, number: 0, old: Vec::new() },
        }
    }

    /// The slot that [`Self::take`] will take.
    #[inline(always)]
    pub(super) fn peek(&self) -> Option<&Slot> {
        match NonNull::new(self.free.get()) {
            // SAFETY: free slots are made and in memory that lives as long as `self`.
            Some(slot) => Some(unsafe { &*slot.as_ptr() }),
            None => self.make(),
        }
    }

    /// Makes one more slot, if not all are: memory of slots that a queue never needs is never touched.
    #[cold]
    #[inline(never)]
    fn make(&self) -> Option<&Slot> {
        let made = self.memory.made.get();
        if made >= self.memory.len {
            return None;
        }
        // SAFETY: `made` is below the length of the allocation, and that slot is nobody's yet.
        let slot = unsafe {
            let slot = self.memory.base.add(made as usize).as_ptr();
            slot.write(Slot {
                segs: Cell::new((&raw mut (*slot).inline).cast()),
                cap: Cell::new(INLINE as u32),
                count: Cell::new(0),
                readable: Cell::new(0),
                writable_len: Cell::new(0),
                id: Cell::new(0),
                descs: Cell::new(0),
                epoch: Cell::new(0),
                seq: Cell::new(0),
                written: Cell::new(0),
                mark: Cell::new(Mark::Free),
                next: AtomicPtr::new(ptr::null_mut()),
                shared: self.shared.as_ptr(),
                inline: UnsafeCell::new([const { MaybeUninit::uninit() }; INLINE]),
            });
            &*slot
        };
        self.memory.made.set(made + 1);
        self.free.set(ptr::from_ref(slot).cast_mut());
        Some(slot)
    }

    /// Takes the slot that [`Self::peek`] gave, and which has its segments by now.
    #[inline(always)]
    pub(super) fn take(&self, slot: &Slot, shape: &Shape, seq: u32) -> Chain {
        self.free.set(slot.next.load(Ordering::Relaxed));
        slot.count.set(shape.count);
        slot.readable.set(shape.readable);
        slot.writable_len.set(shape.writable_len);
        slot.id.set(shape.id);
        slot.descs.set(shape.descs);
        slot.epoch.set(self.epochs.number);
        slot.seq.set(seq);
        slot.mark.set(Mark::Out);
        self.taken.set(self.taken.get() + 1);
        self.out.set(self.out.get() + 1);
        Chain::new(NonNull::from(slot))
    }

    /// The slot of a handle, if it is of this arena.
    #[inline(always)]
    pub(super) fn slot(&self, chain: &Chain) -> Option<&Slot> {
        let slot = chain.slot();
        let offset = (slot.as_ptr() as usize).wrapping_sub(self.memory.base.as_ptr() as usize);
        // SAFETY: a handle always points at a whole slot, and this one is in our memory.
        (offset < self.memory.len as usize * size_of::<Slot>()).then(|| unsafe { &*slot.as_ptr() })
    }

    /// Takes the handle in; the slot stays taken. The chain must be of this arena, or nothing is done.
    #[inline(always)]
    pub(super) fn end(&self, chain: Chain) -> Result<&Slot, Chain> {
        if self.slot(&chain).is_none() {
            return Err(chain);
        }
        self.out.set(self.out.get().wrapping_sub(1));
        // SAFETY: just found to be one of our slots.
        Ok(unsafe { &*chain.into_slot().as_ptr() })
    }

    /// Frees a slot whose handle has ended.
    #[inline(always)]
    pub(super) fn release(&self, slot: &Slot) {
        slot.mark.set(Mark::Free);
        if slot.cap.get() as usize > RETAINED {
            self.give_back(slot);
        }
        slot.next.store(self.free.get(), Ordering::Relaxed);
        self.free.set(ptr::from_ref(slot).cast_mut());
        self.taken.set(self.taken.get().wrapping_sub(1));
    }

    /// Whether the slot is of a former snapshot: then [`Self::leave_epoch`] is due when it is released.
    #[inline(always)]
    pub(super) fn is_old(&self, slot: &Slot) -> bool {
        slot.epoch.get() != self.epochs.number
    }

    /// One slot less of a former snapshot; the last one lets it go.
    #[cold]
    pub(super) fn leave_epoch(&mut self, epoch: u32) {
        if let Some(at) = self.epochs.old.iter().position(|(number, ..)| *number == epoch)
            && let Some((.., taken)) = self.epochs.old.get_mut(at)
        {
            *taken = taken.saturating_sub(1);
            if *taken == 0 {
                self.epochs.old.swap_remove(at);
            }
        }
    }

    /// Moves to another snapshot; taken slots keep theirs.
    pub(super) fn set_ram(&mut self, ram: GuestRam) {
        let elsewhere: u32 = self.epochs.old.iter().map(|(.., taken)| taken).sum();
        let here = self.taken.get().saturating_sub(elsewhere);
        let former = mem::replace(&mut self.epochs.current, ram);
        if here > 0 {
            self.epochs.old.push((self.epochs.number, former, here));
        }
        // Wraps after 2^32 changes of the map; a chain that is out that long could let its snapshot go early, so
        // numbers that are still in use are passed over.
        loop {
            self.epochs.number = self.epochs.number.wrapping_add(1);
            if !self.epochs.old.iter().any(|(number, ..)| *number == self.epochs.number) {
                break;
            }
        }
    }

    #[inline(always)]
    pub(super) fn ram(&self) -> &GuestRam {
        &self.epochs.current
    }

    /// The snapshot that a taken slot is from.
    pub(super) fn ram_of(&self, slot: &Slot) -> &GuestRam {
        let old = self.epochs.old.iter().find(|(number, ..)| *number == slot.epoch.get());
        old.map_or(&self.epochs.current, |(_, ram, _)| ram)
    }

    pub(super) fn epoch_of(&self, slot: &Slot) -> u32 {
        slot.epoch.get()
    }

    /// How many snapshots are kept for chains alone.
    pub(super) fn old_snapshots(&self) -> usize {
        self.epochs.old.len()
    }

    /// Handles that are out, those of dropped chains that were not swept yet included.
    #[inline(always)]
    pub(super) fn out(&self) -> u32 {
        self.out.get()
    }

    /// The position of a slot, to find it again by [`Self::at`].
    pub(super) fn index_of(&self, slot: &Slot) -> u32 {
        let offset = (ptr::from_ref(slot) as usize).wrapping_sub(self.memory.base.as_ptr() as usize);
        u32::try_from(offset / size_of::<Slot>()).unwrap_or(u32::MAX)
    }

    pub(super) fn at(&self, index: u32) -> Option<&Slot> {
        // SAFETY: slots below `made` are initialised and live as long as `self`.
        (index < self.memory.made.get()).then(|| unsafe { &*self.memory.base.add(index as usize).as_ptr() })
    }

    /// All slots that are not free, in no particular order.
    pub(super) fn taken(&self) -> impl Iterator<Item = &Slot> {
        (0..self.memory.made.get()).filter_map(|i| self.at(i)).filter(|slot| slot.mark.get() != Mark::Free)
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
        self.out.set(self.out.get().wrapping_sub(1));
        let next = slot.next.load(Ordering::Relaxed);
        // SAFETY: as in `take_dropped`.
        NonNull::new(next).map(|slot| self.index_of(unsafe { slot.as_ref() }))
    }

    /// Gives a slot room for more segments than it has, keeping the first `count`.
    #[cold]
    #[inline(never)]
    fn grow(&self, slot: &Slot, count: usize) -> Result<(), QueueError> {
        let (block, cap) = self.pool.borrow_mut().take(count + 1)?;
        // SAFETY: `count` segments are initialised at `segs`, and the block has room for more than that; they are
        // pointers and lengths, so that a copy is a move.
        unsafe { ptr::copy_nonoverlapping(slot.segs.get(), block, count) };
        self.give_back(slot);
        slot.segs.set(block);
        slot.cap.set(cap);
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn give_back(&self, slot: &Slot) {
        if slot.cap.get() as usize > INLINE {
            self.pool.borrow_mut().put(slot.segs.get(), slot.cap.get());
            slot.segs.set(slot.inline.get().cast());
            slot.cap.set(INLINE as u32);
        }
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
            (*shared).left.store(self.out.get() as usize + 1, Ordering::Relaxed);
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

/// Fills the segments of a slot that is being popped.
pub(super) struct SegSink<'a> {
    segs: *mut Segment,
    cap: usize,
    len: usize,
    slot: &'a Slot,
    arena: &'a Arena,
}

impl<'a> SegSink<'a> {
    #[inline(always)]
    pub(super) fn new(arena: &'a Arena, slot: &'a Slot) -> SegSink<'a> {
        SegSink { segs: slot.segs.get(), cap: slot.cap.get() as usize, len: 0, slot, arena }
    }

    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    pub(super) fn push(&mut self, segment: Segment) -> Result<(), QueueError> {
        if self.len == self.cap {
            self.arena.grow(self.slot, self.len)?;
            self.segs = self.slot.segs.get();
            self.cap = self.slot.cap.get() as usize;
        }
        // SAFETY: `len` is below the capacity of the slot's memory, which nobody else reads before it is taken.
        unsafe { self.segs.add(self.len).write(segment) };
        self.len += 1;
        Ok(())
    }
}
