//! A chain while it is being popped: translates and counts its elements, in whatever table they are.
//!
//! A direct chain is walked quickly as long as everything is as usual: each element in one piece of the host, a place for
//! it in the slot, nothing wrong. At the first element that is not, the quick walk leaves what it has in the slot,
//! and a careful one goes on from there ([`Gather::resume`]); only that one knows why a chain is
//! refused. So the quick walk is a function that calls nothing and comes back to nothing: what it works with stays in
//! registers, and there are few instructions but those that each element needs.
//!
//! Of an indirect chain it has to stay in registers, too: were its address given to a function that is not inlined, each
//! element would cost a dozen loads and stores; were it moved in and out of a `Result`, a stall for each copy of a field
//! that was just written. So what is not inlined takes and returns single values, and the walks go through the
//! device-readable and the device-writable part in two loops, each of which knows what it adds.
use super::arena::{Arena, Slot};
use super::error::QueueError;
use super::ring_mem::Desc;
use super::{INDIRECT, MAX_CHAIN_BYTES, NEXT, WRITE};
use crate::memory::{Access, Directory, Segment};

/// In a paused slot: there has been no device-writable element yet.
const NOT_TURNED: u32 = u32::MAX;

/// How far a quick walk came.
pub(super) enum Walked {
    /// To the end of the chain, with so many elements. The slot has its counts.
    Whole(u32),
    /// To an element that it could not add. [`Gather::resume`] goes on.
    Unusual,
    /// To an element, which it added, behind which there is nothing where it says there is.
    Missing,
}

/// The quick walk of a direct chain into a slot that is not taken yet, from its first element on; `next` reads the
/// element behind one. How far it came, and the last element. An element with one of these flags belongs to somebody else.
///
/// Its own loops, and not a `Gather`: fewer values than registers, so that little has to be stored.
#[inline(always)]
pub(super) fn quick<const FOREIGN: u16>(
    arena: &Arena,
    slot: &Slot,
    mut desc: Desc,
    flags: impl Fn(Desc) -> u16,
    mut next: impl FnMut(Desc) -> Option<Desc>,
) -> (Walked, Desc) {
    let directory = arena.ram().directory();
    let (mut at, end) = slot.room();
    let (mut to_read, mut to_write, mut readable) = (0, 0, NOT_TURNED);
    let walked = 'walk: {
        while flags(desc) & (FOREIGN | WRITE | INDIRECT) == 0 {
            if !add_quick(directory, &mut at, end, desc, Access::Read) {
                break 'walk Walked::Unusual;
            }
            to_read += u64::from(desc.len());
            if flags(desc) & NEXT == 0 {
                break 'walk Walked::Whole(0);
            }
            match next(desc) {
                Some(next) => desc = next,
                None => break 'walk Walked::Missing,
            }
        }
        if flags(desc) & (FOREIGN | INDIRECT) != 0 {
            break 'walk Walked::Unusual;
        }
        readable = slot.count_to(at);
        loop {
            if !add_quick(directory, &mut at, end, desc, Access::Write) {
                break 'walk Walked::Unusual;
            }
            to_write += u64::from(desc.len());
            if flags(desc) & NEXT == 0 {
                break 'walk Walked::Whole(0);
            }
            match next(desc) {
                Some(next) => desc = next,
                None => break 'walk Walked::Missing,
            }
            if flags(desc) & (FOREIGN | WRITE | INDIRECT) != WRITE {
                break 'walk Walked::Unusual;
            }
        }
    };
    match walked {
        // A chain that is too long, or as long as can be, is not usual. All that is shorter fits.
        Walked::Whole(_) if (to_read + to_write) >> 32 == 0 => {
            let count = slot.count_to(at);
            slot.set_counts(count, readable.min(count), to_write as u32);
            (Walked::Whole(count), desc)
        }
        Walked::Missing => (Walked::Missing, desc),
        walked => {
            std::hint::cold_path();
            let added = matches!(walked, Walked::Whole(_));
            slot.set_counts(slot.count_to(at) - u32::from(added), readable, 0);
            (Walked::Unusual, desc)
        }
    }
}

/// Adds an element at this place of a slot that is not taken, if it is in one piece of the host and the place is before
/// the end; else does nothing. The place must be in the slot's room, which ends there, or its end.
#[inline(always)]
fn add_quick(
    directory: &Directory,
    at: &mut *mut Segment,
    end: *mut Segment,
    desc: Desc,
    access: Access,
) -> bool {
    let host = match directory.lookup(desc.addr, desc.len(), access) {
        Some(host) if *at != end => host,
        _ => return false,
    };
    // SAFETY: the place is below the end of the slot's room, which is the queue's as long as it is not taken. The directory
    // is of the snapshot that the slot's epoch keeps as long as it is taken.
    unsafe { at.write(Segment::new(host, desc.len() as usize)) };
    *at = at.wrapping_add(1);
    true
}

/// Takes the element that a quick walk added last out again: it is the careful one's.
pub(super) fn undo(slot: &Slot, last_is_written: bool) {
    let (count, readable) = slot.counts();
    slot.set_counts(count.saturating_sub(1), if last_is_written { readable } else { NOT_TURNED }, 0);
}

/// Invariant: `next` to `end` is room for segments in the slot's memory, which nobody reads before the slot is taken.
pub(super) struct Gather<'a> {
    arena: &'a Arena,
    slot: &'a Slot,
    directory: &'a Directory,
    next: *mut Segment,
    end: *mut Segment,
    /// Bytes so far.
    bytes: u64,
    /// Of those, before the device-writable part, if that has begun.
    to_read: u64,
    /// Segments before the device-writable part, if that has begun.
    readable: Option<u32>,
}

impl<'a> Gather<'a> {
    #[inline(always)]
    pub(super) fn new(arena: &'a Arena, slot: &'a Slot) -> Gather<'a> {
        let (next, end) = slot.room();
        Gather {
            arena,
            slot,
            directory: arena.ram().directory(),
            next,
            end,
            bytes: 0,
            to_read: 0,
            readable: None,
        }
    }

    #[inline(always)]
    pub(super) fn directory(&self) -> &'a Directory {
        self.directory
    }

    /// Segments so far; of a quick walk, elements.
    #[inline(always)]
    pub(super) fn count(&self) -> u32 {
        self.slot.count_to(self.next)
    }

    /// Adds an element if it is in one piece of the host and there is a place for it before the end; else does nothing.
    #[inline(always)]
    fn add_usual(&mut self, desc: Desc, access: Access) -> bool {
        let host = match self.directory.lookup(desc.addr, desc.len(), access) {
            Some(host) if self.next != self.end => host,
            _ => return false,
        };
        self.bytes += u64::from(desc.len());
        // SAFETY: `next` is below `end`, see the invariant. The directory is of the snapshot that the slot's epoch keeps
        // as long as it is taken.
        unsafe { self.next.write(Segment::new(host, desc.len() as usize)) };
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Adds an element of the part that the chain is in.
    #[inline(always)]
    fn add(&mut self, desc: Desc, access: Access) -> Result<(), QueueError> {
        if self.add_usual(desc, access) {
            return Ok(());
        }
        self.bytes += u64::from(desc.len());
        (self.next, self.end) = add_pieces(self.arena, self.slot, self.next, (desc.addr, desc.len(), access));
        if self.next.is_null() {
            return Err(self.arena.parked());
        }
        Ok(())
    }

    /// Goes on where a quick walk paused: with how many elements.
    pub(super) fn resume(arena: &'a Arena, slot: &'a Slot) -> (Gather<'a>, u32) {
        let (count, readable) = slot.counts();
        let (segs, end) = slot.room();
        let readable = (readable != NOT_TURNED).then_some(readable);
        let directory = arena.ram().directory();
        let next = segs.wrapping_add(count as usize);
        // SAFETY: the quick walk has written that many segments there.
        let so_far = unsafe { std::slice::from_raw_parts(segs, count as usize) };
        let bytes = so_far.iter().map(|segment| segment.len() as u64).sum();
        let before = readable.unwrap_or(count) as usize;
        arena.set_surplus(0);
        let to_read: u64 = so_far.iter().take(before).map(|segment| segment.len() as u64).sum();
        (Gather { arena, slot, directory, next, end, bytes, to_read, readable }, count)
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
        self.to_read = self.bytes;
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

    /// The end of the chain: the slot gets its counts. Not returned: two fields that were just written one by one and are then read
    /// as one wait a dozen cycles.
    #[inline(always)]
    pub(super) fn finish(self) -> Result<(), QueueError> {
        // The sum is of 65535 lengths at most.
        if self.bytes > MAX_CHAIN_BYTES {
            return Err(QueueError::ChainTooLarge(self.bytes));
        }
        let count = self.count();
        match self.readable {
            None => self.slot.set_counts(count, count, 0),
            Some(readable) => {
                // A part of 2^32 bytes is one byte shorter than what can be told of.
                let writable = u32::try_from(self.bytes - self.to_read).unwrap_or(u32::MAX);
                self.slot.set_counts(count, readable, writable);
            }
        }
        Ok(())
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

/// Walks a table of the split format: each descriptor says which one is next (2.7.5). Stops at the end, or at a
/// descriptor with INDIRECT, which is returned.
#[inline(always)]
pub(super) fn walk(
    chain: &mut Gather<'_>,
    mut desc: Desc,
    get: impl Fn(u16) -> Option<Desc>,
) -> Result<Option<Desc>, QueueError> {
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
