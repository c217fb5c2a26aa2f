//! Accessors of an in-flight region: the only code that dereferences its pointer.
//!
//! The region is written by this process alone as long as it keeps its promise; a front-end that does not changes it at
//! any time. So all accesses are atomic, of whole words of eight bytes, and each word is read once, before anything is
//! made of it. Fields are little-endian, whatever the host is.
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::stores::store;
use super::{InflightError, InflightRegion};
use crate::memory::SharedMemory;

/// A word of a region.
#[repr(transparent)]
pub(super) struct Word(AtomicU64);

impl Word {
    #[inline(always)]
    pub(super) fn load(&self) -> u64 {
        u64::from_le(self.0.load(Ordering::Relaxed))
    }

    /// Stores the word. Release keeps the compiler from moving stores before it behind it; what a process that is
    /// killed has stored so far is there, in this order.
    #[inline(always)]
    pub(super) fn store(&self, word: u64) {
        store(|| self.0.store(word.to_le(), Ordering::Release));
    }
}

/// A header of so many words and a table of entries of so many words.
pub(super) struct Table<const HEADER: usize, const ENTRY: usize> {
    base: NonNull<u8>,
    size: u16,
    memory: Arc<SharedMemory>,
    _words: PhantomData<Word>,
}

// SAFETY: the pointer is into shared memory, which any thread may access atomically.
unsafe impl<const HEADER: usize, const ENTRY: usize> Send for Table<HEADER, ENTRY> {}

impl<const HEADER: usize, const ENTRY: usize> Table<HEADER, ENTRY> {
    /// That many words behind the region's start.
    pub(super) fn new(region: &InflightRegion, before: usize, size: u16) -> Result<Self, InflightError> {
        let needed = 8 * (before + HEADER + ENTRY * usize::from(size));
        if region.len < needed {
            return Err(InflightError::TooSmall { len: region.len, needed });
        }
        let base = region.memory.as_ptr().wrapping_add(region.offset).wrapping_add(8 * before);
        let base = NonNull::new(base).ok_or(InflightError::Place)?;
        Ok(Table { base, size, memory: region.memory.clone(), _words: PhantomData })
    }

    pub(super) fn header(&self) -> &[Word; HEADER] {
        // SAFETY: the region is within memory that `self` keeps, has `HEADER` words and more, and is aligned to them
        // (`InflightRegion::new`); atomics may be shared.
        unsafe { self.base.cast().as_ref() }
    }

    #[inline(always)]
    pub(super) fn entry(&self, index: u16) -> Option<&[Word; ENTRY]> {
        let at = 8 * (HEADER + ENTRY * usize::from(index));
        // SAFETY: as in `header`; the region has `size` entries behind the header.
        (index < self.size).then(|| unsafe { self.base.add(at).cast().as_ref() })
    }

    pub(super) fn is_poisoned(&self) -> bool {
        self.memory.is_poisoned()
    }
}

/// The word of the header that has the version, in both formats.
pub(super) fn version_word(region: &InflightRegion) -> Option<&Word> {
    let at = region.memory.as_ptr().wrapping_add(region.offset).wrapping_add(8);
    // SAFETY: a region has a header of two words at least, within memory that it keeps, and is aligned to them
    // (`InflightRegion::new`); atomics may be shared.
    (region.len >= 16).then(|| unsafe { &*at.cast() })
}

/// Sixteen bits of a word.
pub(super) fn field(word: u64, at: u32) -> u16 {
    (word >> at) as u16
}
