//! Blocks of segments for chains that are longer than a slot has room for: recycled, so that a queue allocates when it
//! meets longer or more chains than ever before, and not per request. What a queue can come to hold is limited.
//!
//! A block's size is told by its class: 1 to [`CLASSES`]`.len()`; 0 is no block.
use std::mem::MaybeUninit;

use super::error::QueueError;
use crate::memory::Segment;

/// Blocks up to this class stay with their slot when it is freed.
pub(super) const RETAINED: u8 = 1;
/// Number of segments of the blocks of each class, from 1 on.
const CLASSES: [u32; 7] = [16, 64, 256, 1024, 4096, 16384, 65536];
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

    /// How many segments a block of this class has room for.
    pub(super) fn cap(class: u8) -> Option<u32> {
        CLASSES.get(usize::from(class).checked_sub(1)?).copied()
    }

    /// A block for `len` segments at least: its address and class. The caller gives it back by [`Self::put`] or
    /// [`Self::free`].
    pub(super) fn take(&mut self, len: usize) -> Result<(*mut Segment, u8), QueueError> {
        let fits = |class: &u8| Self::cap(*class).is_some_and(|cap| cap as usize >= len);
        let class = (1..=CLASSES.len() as u8).find(fits).ok_or(QueueError::OutOfSegments)?;
        let recycled = self.free.get_mut(usize::from(class) - 1).and_then(Vec::pop);
        let block = match recycled {
            Some(block) => block,
            None => self.allocate(Self::cap(class).unwrap_or(0) as usize)?,
        };
        Ok((Box::into_raw(block).cast(), class))
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
    pub(super) fn put(&mut self, segs: *mut Segment, class: u8) {
        let free = usize::from(class).checked_sub(1).and_then(|class| self.free.get_mut(class));
        if let (Some(free), Some(cap)) = (free, Self::cap(class)) {
            let block = std::ptr::slice_from_raw_parts_mut(segs.cast::<MaybeUninit<Segment>>(), cap as usize);
            // SAFETY: the caller has it from `take`, which took it out of such a box, and ends its use of it here.
            free.push(unsafe { Box::from_raw(block) });
        }
    }

    /// Frees a block whose pool is gone.
    ///
    /// # Safety
    /// It is from [`Self::take`], with this class, and nobody uses it any more; or the class is 0.
    pub(super) unsafe fn free(segs: *mut Segment, class: u8) {
        if let Some(cap) = Self::cap(class) {
            let block = std::ptr::slice_from_raw_parts_mut(segs.cast::<MaybeUninit<Segment>>(), cap as usize);
            // SAFETY: as in `put`; the caller vouches for it.
            drop(unsafe { Box::from_raw(block) });
        }
    }
}
