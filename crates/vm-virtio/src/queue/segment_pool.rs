//! Blocks of segments for chains that are longer than a slot has room for: recycled, so that a queue allocates when it
//! meets longer or more chains than ever before, and not per request. What a queue can come to hold is limited.
use std::mem::MaybeUninit;

use super::error::QueueError;
use crate::memory::Segment;

/// Blocks up to this capacity stay with their slot when it is freed.
pub(super) const RETAINED: usize = 16;
/// Number of segments of the blocks of each class.
const CLASSES: [usize; 7] = [16, 64, 256, 1024, 4096, 16384, 65536];
/// Segments, 16 bytes each, in all the blocks of a queue: the larger of this and 64 for each entry.
const LIMIT: usize = 1 << 20;

type Block = Box<[MaybeUninit<Segment>]>;

pub(super) struct Pool {
    free: [Vec<Block>; CLASSES.len()],
    /// Segments of all blocks that exist, lent or free.
    total: usize,
    limit: usize,
}

// SAFETY: the blocks hold no segments, only room for them.
unsafe impl Send for Pool {}

impl Pool {
    pub(super) fn new(queue_size: u16) -> Pool {
        Pool { free: Default::default(), total: 0, limit: LIMIT.max(usize::from(queue_size) * 64) }
    }

    /// A block for `len` segments at least: its address and capacity. The caller gives it back by [`Self::put`] or
    /// [`Self::free`].
    pub(super) fn take(&mut self, len: usize) -> Result<(*mut Segment, u32), QueueError> {
        let class = CLASSES.iter().position(|cap| *cap >= len).ok_or(QueueError::OutOfSegments)?;
        let cap = CLASSES.get(class).copied().unwrap_or(len);
        let recycled = self.free.get_mut(class).and_then(Vec::pop);
        let block = match recycled {
            Some(block) => block,
            None => self.allocate(cap)?,
        };
        Ok((Box::into_raw(block).cast(), u32::try_from(cap).unwrap_or(u32::MAX)))
    }

    fn allocate(&mut self, cap: usize) -> Result<Block, QueueError> {
        if self.total + cap > self.limit {
            // What lies here in other classes makes room first.
            for class in &mut self.free {
                self.total -= class.drain(..).map(|block| block.len()).sum::<usize>();
            }
            if self.total + cap > self.limit {
                return Err(QueueError::OutOfSegments);
            }
        }
        self.total += cap;
        Ok(Box::new_uninit_slice(cap))
    }

    /// Takes back a block of this pool.
    pub(super) fn put(&mut self, segs: *mut Segment, cap: u32) {
        let cap = cap as usize;
        let class = CLASSES.iter().position(|known| *known == cap).and_then(|class| self.free.get_mut(class));
        let block = std::ptr::slice_from_raw_parts_mut(segs.cast::<MaybeUninit<Segment>>(), cap);
        // SAFETY: the caller has it from `take`, which took it out of such a box, and ends its use of it here.
        let block = unsafe { Box::from_raw(block) };
        match class {
            Some(class) => class.push(block),
            None => self.total = self.total.saturating_sub(cap),
        }
    }

    /// Frees a block whose pool is gone.
    ///
    /// # Safety
    /// It is from [`Self::take`] and nobody uses it any more.
    pub(super) unsafe fn free(segs: *mut Segment, cap: usize) {
        let block = std::ptr::slice_from_raw_parts_mut(segs.cast::<MaybeUninit<Segment>>(), cap);
        // SAFETY: as in `put`; the caller vouches for it.
        drop(unsafe { Box::from_raw(block) });
    }
}
