//! A chain while it is being popped: translates and counts its elements, in whatever table they are.
//!
//! It has to stay in registers: were its address given to a function that is not inlined, each element would cost a
//! dozen loads and stores, half of the time of a pop; were it moved in and out of a `Result`, a stall for each copy of a
//! field that was just written, five times the time. So what is not inlined takes and returns single values, and the
//! walks go through the device-readable and the device-writable part in two loops, each of which knows what it adds.
use super::MAX_CHAIN_BYTES;
use super::arena::{Arena, Shape, Slot};
use super::error::QueueError;
use super::ring_mem::Desc;
use crate::memory::{Access, Directory, Segment};

/// Invariant: `next` to `end` is room for segments in the slot's memory, which nobody reads before the slot is taken.
pub(super) struct Gather<'a> {
    arena: &'a Arena,
    slot: &'a Slot,
    directory: &'a Directory,
    next: *mut Segment,
    end: *mut Segment,
    /// Bytes so far.
    bytes: u64,
    /// Segments before the device-writable part, if that has begun.
    readable: Option<u32>,
}

impl<'a> Gather<'a> {
    #[inline(always)]
    pub(super) fn new(arena: &'a Arena, slot: &'a Slot) -> Gather<'a> {
        let (next, end) = slot.room();
        Gather { arena, slot, directory: arena.ram().directory(), next, end, bytes: 0, readable: None }
    }

    #[inline(always)]
    pub(super) fn directory(&self) -> &'a Directory {
        self.directory
    }

    /// Segments so far.
    #[inline(always)]
    fn count(&self) -> u32 {
        self.slot.count_to(self.next)
    }

    /// Adds an element of the part that the chain is in.
    #[inline(always)]
    fn add(&mut self, desc: Desc, access: Access) -> Result<(), QueueError> {
        let (addr, len) = (desc.addr, desc.len());
        self.bytes += u64::from(len);
        let host = match self.directory.lookup(addr, len, access) {
            Some(host) if self.next != self.end => host,
            _ => {
                (self.next, self.end) = add_pieces(self.arena, self.slot, self.next, (addr, len, access));
                if self.next.is_null() {
                    return Err(self.arena.parked());
                }
                return Ok(());
            }
        };
        // SAFETY: `next` is below `end`, see the invariant. The directory is of the snapshot that the slot's epoch keeps
        // as long as it is taken.
        unsafe { self.next.write(Segment::new(host, len as usize)) };
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    /// Adds a device-readable element, before all device-writable ones.
    #[inline(always)]
    pub(super) fn add_readable(&mut self, desc: Desc) -> Result<(), QueueError> {
        self.add(desc, Access::Read)
    }

    /// Adds a device-writable element.
    #[inline(always)]
    pub(super) fn add_writable(&mut self, desc: Desc) -> Result<(), QueueError> {
        self.add(desc, Access::Write)
    }

    /// From here on there are device-writable elements only.
    #[inline(always)]
    pub(super) fn turn(&mut self) {
        self.readable = Some(self.count());
    }

    /// Adds an element that may be of either kind.
    pub(super) fn add_any(&mut self, desc: Desc, write: bool) -> Result<(), QueueError> {
        match (self.readable, write) {
            (Some(_), false) => Err(QueueError::ReadableAfterWritable),
            (None, false) => self.add_readable(desc),
            (_, true) => {
                if self.readable.is_none() {
                    self.turn();
                }
                self.add_writable(desc)
            }
        }
    }

    /// The finished chain; `id` is the head (split) or the buffer id (packed), `descs` the ring's descriptors.
    #[inline(always)]
    pub(super) fn finish(self, id: u16, descs: u16) -> Result<Shape, QueueError> {
        // The sum is of 65535 lengths at most.
        if self.bytes > MAX_CHAIN_BYTES {
            return Err(QueueError::ChainTooLarge(self.bytes));
        }
        let count = self.count();
        let readable = self.readable.unwrap_or(count);
        Ok(Shape { count, readable, id, descs })
    }
}

/// Adds an element that is empty, unmapped, or more than one piece of host memory, or for which there is no place left
/// before the end. Returns the next place and the end; null after a violation, which is parked in the arena.
#[cold]
#[inline(never)]
fn add_pieces(
    arena: &Arena,
    slot: &Slot,
    next: *mut Segment,
    (addr, len, access): (u64, u32, Access),
) -> (*mut Segment, *mut Segment) {
    let added = (|| {
        let before = slot.count_to(next);
        // No more than the queue has entries (2.7.5.3.1, 2.8.17). Ends loops.
        let surplus = arena.surplus();
        if i64::from(before) - surplus >= arena.most() {
            return Err(QueueError::ChainTooLong);
        }
        let mut count = before;
        arena.ram().directory().pieces(addr, u64::from(len), access, |host, len| {
            arena.make_room(slot, count)?;
            // SAFETY: there is room for one behind `count`; else as in `Gather::add`.
            unsafe { slot.room().0.add(count as usize).write(Segment::new(host, len)) };
            count += 1;
            Ok::<(), QueueError>(())
        })?;
        let surplus = surplus + i64::from(count) - i64::from(before) - 1;
        arena.set_surplus(surplus);
        Ok(slot.room_behind(count, arena.most() + surplus))
    })();
    added.unwrap_or_else(|error| {
        arena.park(error);
        (std::ptr::null_mut(), std::ptr::null_mut())
    })
}

/// Walks a chain of the split format: each descriptor says which one is next (2.7.5). Stops at the end, or at a
/// descriptor with INDIRECT, which is returned.
#[inline(always)]
pub(super) fn walk(
    chain: &mut Gather<'_>,
    mut desc: Desc,
    get: impl Fn(u16) -> Option<Desc>,
) -> Result<Option<Desc>, QueueError> {
    use super::{INDIRECT, NEXT, WRITE};
    while desc.split_flags() & (WRITE | INDIRECT) == 0 {
        chain.add_readable(desc)?;
        if desc.split_flags() & NEXT == 0 {
            return Ok(None);
        }
        let next = desc.split_next();
        desc = get(next).ok_or(QueueError::Next(next))?;
    }
    if desc.split_flags() & INDIRECT != 0 {
        return Ok(Some(desc));
    }
    chain.turn();
    loop {
        chain.add_writable(desc)?;
        if desc.split_flags() & NEXT == 0 {
            return Ok(None);
        }
        let next = desc.split_next();
        desc = get(next).ok_or(QueueError::Next(next))?;
        if desc.split_flags() & (WRITE | INDIRECT) != WRITE {
            break;
        }
    }
    if desc.split_flags() & INDIRECT != 0 { Ok(Some(desc)) } else { Err(QueueError::ReadableAfterWritable) }
}
