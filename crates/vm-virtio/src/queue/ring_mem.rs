//! Accessors of the ring memory: the only code that dereferences ring pointers.
//!
//! Invariants: each accessor is made of an [`Area`] that was checked for length, alignment and kind of access when
//! the queue was made, and lives no longer than the snapshot the area is from (both are in the queue). Each index is
//! checked or masked against the length here, whatever the caller believes. The guest writes the same memory at any
//! time: all accesses are atomic, each field is read once per call.
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::state::RingPos;
use super::stores::store;

/// `VIRTQ_DESC_F_AVAIL` (2.8.1), where it is in the second word of a packed ring's descriptor.
const AVAIL: u64 = 1 << (48 + 7);
/// `VIRTQ_DESC_F_USED` (2.8.1).
const USED: u64 = 1 << (48 + 15);
/// Of a descriptor that was [read](PackedRing::read): it is not available.
pub(super) const FOREIGN: u16 = ((AVAIL | USED) >> 48) as u16;

/// A contiguous, aligned piece of guest memory in the host.
pub(super) struct Area {
    host: *mut u8,
    len: u64,
}

impl Area {
    pub(super) fn new(host: *mut u8, len: u64) -> Area {
        Area { host, len }
    }

    /// How many entries of this size there are behind a header.
    fn entries(&self, header: u64, each: u64) -> u32 {
        u32::try_from(self.len.saturating_sub(header) / each).unwrap_or(u32::MAX)
    }
}

/// Address and length of a descriptor, and the half that holds them: `len`, `flags`, `next` (split) or `len`, `id`,
/// `flags` (packed).
#[derive(Clone, Copy)]
pub(super) struct Desc {
    pub(super) addr: u64,
    word: u64,
}

impl Desc {
    #[inline(always)]
    pub(super) fn new(addr: u64, word: u64) -> Desc {
        Desc { addr, word }
    }

    /// The half that is not the address.
    #[inline(always)]
    pub(super) fn word(self) -> u64 {
        self.word
    }

    // The truncations below take the fields of the second word apart (2.7.5, 2.8.13).
    #[inline(always)]
    pub(super) fn len(self) -> u32 {
        self.word as u32
    }

    #[inline(always)]
    pub(super) fn split_flags(self) -> u16 {
        (self.word >> 32) as u16
    }

    #[inline(always)]
    pub(super) fn split_next(self) -> u16 {
        (self.word >> 48) as u16
    }

    #[inline(always)]
    pub(super) fn packed_id(self) -> u16 {
        (self.word >> 32) as u16
    }

    #[inline(always)]
    pub(super) fn packed_flags(self) -> u16 {
        (self.word >> 48) as u16
    }
}

/// A ring or table of 16-byte descriptors, as pairs of words.
pub(super) struct Descs {
    words: *const AtomicU64,
    size: u32,
}

// SAFETY: the pointers of this and the following accessors are into guest memory, which any thread may access
// atomically.
unsafe impl Send for Descs {}

impl Descs {
    pub(super) fn new(area: &Area) -> Descs {
        Descs { words: area.host.cast(), size: area.entries(0, 16) }
    }

    #[inline(always)]
    fn words(&self, index: u16) -> Option<(&AtomicU64, &AtomicU64)> {
        if u32::from(index) >= self.size {
            return None;
        }
        let at = usize::from(index) * 2;
        // SAFETY: the area holds `size` descriptors of two words and is aligned to 16; atomics may be shared.
        Some(unsafe { (&*self.words.add(at), &*self.words.add(at + 1)) })
    }

    /// Reads a descriptor of a split table. The acquire load of the available index, which came first, orders it.
    #[inline(always)]
    pub(super) fn split(&self, index: u16) -> Option<Desc> {
        let (addr, word) = self.words(index)?;
        Some(Desc {
            addr: u64::from_le(addr.load(Ordering::Relaxed)),
            word: u64::from_le(word.load(Ordering::Relaxed)),
        })
    }
}

/// Where in a packed ring, and in which lap.
#[derive(Clone, Copy)]
pub(super) struct Cursor {
    /// In bytes: a multiple of 16.
    offset: u32,
    /// AVAIL and USED of a descriptor in this lap, where they are in its second word (2.8.1).
    bits: u64,
}

impl Cursor {
    /// By the flags of an available descriptor: AVAIL as the wrap counter, USED the inverse.
    pub(super) fn available(position: RingPos) -> Cursor {
        Cursor::new(position, if position.wrap { AVAIL } else { USED })
    }

    /// By the flags of a used descriptor: both as the wrap counter.
    pub(super) fn used(position: RingPos) -> Cursor {
        Cursor::new(position, if position.wrap { AVAIL | USED } else { 0 })
    }

    fn new(position: RingPos, bits: u64) -> Cursor {
        Cursor { offset: u32::from(position.index) * 16, bits }
    }

    #[inline(always)]
    pub(super) fn index(self) -> u16 {
        // No ring has more than 32768 descriptors.
        (self.offset / 16) as u16
    }

    #[inline(always)]
    pub(super) fn wrap(self) -> bool {
        self.bits & AVAIL != 0
    }

    pub(super) fn position(self) -> RingPos {
        RingPos { index: self.index(), wrap: self.wrap() }
    }

    /// The flags.
    #[inline(always)]
    pub(super) fn bits(self) -> u64 {
        self.bits
    }

    /// The same place, with a second word that has the flags of this lap.
    #[inline(always)]
    pub(super) fn with_word(self, word: u64) -> Cursor {
        Cursor { offset: self.offset, bits: word }
    }
}

/// The descriptors of a packed ring.
pub(super) struct PackedRing {
    host: *const u8,
    /// In bytes: a multiple of 16, and not 0.
    len: u32,
}

// SAFETY: see `Descs`.
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// The area is of a queue with at most 32768 entries.
    pub(super) fn new(area: &Area) -> PackedRing {
        PackedRing { host: area.host, len: area.entries(0, 16).clamp(1, 1 << 15) * 16 }
    }

    #[inline(always)]
    fn words(&self, at: Cursor) -> Option<(&AtomicU64, &AtomicU64)> {
        if at.offset >= self.len {
            return None;
        }
        let host = self.host.wrapping_add(at.offset as usize);
        // SAFETY: the area has `len` bytes and is aligned to 16; `offset` is below that, and both are multiples of 16;
        // atomics may be shared.
        Some(unsafe { (&*host.cast(), &*host.wrapping_add(8).cast()) })
    }

    /// Reads a descriptor, with flags that have neither AVAIL nor USED if it is available in this lap.
    ///
    /// The flags come with the length and the id in one load, which is single-copy atomic: if it sees the flags that
    /// made the descriptor available, it sees what the driver wrote there before (2.8.21.1.1). Acquire orders the
    /// address, and the further descriptors of the list, behind it.
    #[inline(always)]
    pub(super) fn read(&self, at: Cursor) -> Option<Desc> {
        let (addr, word) = self.words(at)?;
        let word = u64::from_le(word.load(Ordering::Acquire)) ^ at.bits;
        Some(Desc { addr: u64::from_le(addr.load(Ordering::Relaxed)), word })
    }

    /// One descriptor further: at the end of the ring the next lap begins (2.8.1).
    #[inline(always)]
    pub(super) fn step(&self, at: &mut Cursor) {
        at.offset += 16;
        if at.offset >= self.len {
            std::hint::cold_path();
            *at = Cursor { offset: 0, bits: at.bits ^ (AVAIL | USED) };
        }
    }

    /// `count` descriptors further: no more than the ring has.
    #[inline(always)]
    pub(super) fn advance(&self, at: &mut Cursor, count: u16) {
        at.offset += u32::from(count) * 16;
        if at.offset >= self.len {
            std::hint::cold_path();
            *at = Cursor { offset: at.offset - self.len, bits: at.bits ^ (AVAIL | USED) };
        }
    }

    /// So many before: no more than the ring has.
    #[inline(always)]
    pub(super) fn back(&self, at: Cursor, count: u16) -> Cursor {
        match at.offset.checked_sub(u32::from(count) * 16) {
            Some(offset) => Cursor { offset, ..at },
            None => {
                std::hint::cold_path();
                let offset = at.offset.wrapping_add(self.len).wrapping_sub(u32::from(count) * 16);
                Cursor { offset, bits: at.bits ^ (AVAIL | USED) }
            }
        }
    }

    /// Whether the descriptor has the flags of this lap.
    #[inline(always)]
    pub(super) fn is(&self, at: Cursor) -> bool {
        let word = |(_, word): (&AtomicU64, &AtomicU64)| u64::from_le(word.load(Ordering::SeqCst));
        self.words(at).map(word).is_some_and(|word| (word ^ at.bits) & (AVAIL | USED) == 0)
    }

    /// Reads a descriptor as it is, without order.
    pub(super) fn raw(&self, index: u16) -> Option<Desc> {
        let (addr, word) = self.words(Cursor { offset: u32::from(index) * 16, bits: 0 })?;
        let [addr, word] = [addr, word].map(|word| u64::from_le(word.load(Ordering::Relaxed)));
        Some(Desc { addr, word })
    }

    /// The half of a descriptor that is not the address, as it is.
    #[inline(always)]
    pub(super) fn word(&self, at: Cursor) -> Option<u64> {
        self.words(at).map(|(_, word)| u64::from_le(word.load(Ordering::Relaxed)))
    }

    /// Whether there is a used descriptor of this lap. The flags of the cursor are those of available ones.
    pub(super) fn is_overwritten(&self, at: Cursor) -> bool {
        self.is(at.with_word(at.bits ^ USED))
    }

    /// Puts back what was there before a used descriptor that no driver has looked at: available in this lap.
    pub(super) fn make_available(&self, at: Cursor, desc: Desc) {
        self.store(at, desc.word & !(AVAIL | USED) | at.bits);
    }

    /// Writes the second word of a used descriptor that no driver looks at yet.
    #[inline(always)]
    pub(super) fn store(&self, at: Cursor, word: u64) {
        if let Some((_, place)) = self.words(at) {
            store(|| place.store(word.to_le(), Ordering::Relaxed));
        }
    }

    /// Writes the second word of the used descriptor that the driver polls, as a full barrier: the words stored
    /// before are visible to who sees this one, and no later load is done before it.
    #[inline(always)]
    pub(super) fn publish(&self, at: Cursor, word: u64) {
        if let Some((_, place)) = self.words(at) {
            store(|| place.swap(word.to_le(), Ordering::SeqCst));
        }
    }
}

/// The available ring of a split queue (2.7.6): flags, idx, ring, used_event.
pub(super) struct AvailRing {
    fields: *const AtomicU16,
    mask: u16,
}

// SAFETY: see `Descs`.
unsafe impl Send for AvailRing {}

impl AvailRing {
    /// The area is of a queue with a power of two of entries, at most 32768.
    pub(super) fn new(area: &Area) -> AvailRing {
        let entries = area.entries(6, 2);
        // A size that is not a power of two cannot get here; the mask of the next smaller one is safe for it, too.
        let mask = entries.checked_ilog2().map_or(0, |bits| (1u32 << bits.min(15)) - 1);
        AvailRing { fields: area.host.cast(), mask: mask as u16 }
    }

    #[inline(always)]
    fn field(&self, index: usize) -> &AtomicU16 {
        // SAFETY: callers pass 0 and 1 (flags, idx), 2 to 2 + mask (ring) or 3 + mask (used_event): the area has
        // 6 + 2 * (mask + 1) bytes at least and is aligned to 2; atomics may be shared.
        unsafe { &*self.fields.add(index) }
    }

    /// The flags, as the second half of a store-and-look sequence.
    #[inline(always)]
    pub(super) fn flags(&self) -> u16 {
        u16::from_le(self.field(0).load(Ordering::SeqCst))
    }

    /// The available index: acquire, so that ring entries and descriptors read later are those it made available.
    #[inline(always)]
    pub(super) fn idx(&self) -> u16 {
        u16::from_le(self.field(1).load(Ordering::Acquire))
    }

    /// The available index, as the second half of a store-and-look sequence.
    #[inline(always)]
    pub(super) fn idx_after_barrier(&self) -> u16 {
        u16::from_le(self.field(1).load(Ordering::SeqCst))
    }

    /// The head that the ring has for a free-running index.
    #[inline(always)]
    pub(super) fn head(&self, index: u16) -> u16 {
        u16::from_le(self.field(2 + usize::from(index & self.mask)).load(Ordering::Relaxed))
    }

    /// The used index that the driver wants to be told of, as the second half of a store-and-look sequence.
    #[inline(always)]
    pub(super) fn used_event(&self) -> u16 {
        u16::from_le(self.field(3 + usize::from(self.mask)).load(Ordering::SeqCst))
    }
}

/// The used ring of a split queue (2.7.8): flags, idx, ring of (id, len), avail_event.
pub(super) struct UsedRing {
    host: *mut u8,
    mask: u16,
}

// SAFETY: see `Descs`.
unsafe impl Send for UsedRing {}

impl UsedRing {
    /// The area is of a queue with a power of two of entries, at most 32768.
    pub(super) fn new(area: &Area) -> UsedRing {
        let entries = area.entries(6, 8);
        let mask = entries.checked_ilog2().map_or(0, |bits| (1u32 << bits.min(15)) - 1);
        UsedRing { host: area.host, mask: mask as u16 }
    }

    #[inline(always)]
    fn half(&self, byte: usize) -> &AtomicU16 {
        // SAFETY: callers pass 0, 2 or 4 + 8 * (mask + 1): the area has 6 + 8 * (mask + 1) bytes at least and is
        // aligned to 4; atomics may be shared.
        unsafe { &*self.host.add(byte).cast() }
    }

    /// Sets the flags: whether kicks are wanted (without the event index).
    #[inline(always)]
    pub(super) fn set_flags(&self, flags: u16) {
        store(|| self.half(0).swap(flags.to_le(), Ordering::SeqCst));
    }

    /// Asks for a kick when the available index passes this one, as a full barrier.
    #[inline(always)]
    pub(super) fn set_avail_event(&self, index: u16) {
        store(|| self.half(4 + 8 * (usize::from(self.mask) + 1)).swap(index.to_le(), Ordering::SeqCst));
    }

    /// Writes an entry that no driver looks at yet.
    #[inline(always)]
    pub(super) fn put(&self, index: u16, id: u16, len: u32) {
        let entry = 4 + 8 * usize::from(index & self.mask);
        // SAFETY: the entry is one of `mask + 1` of eight bytes, behind a header of four, in an area aligned to 4;
        // atomics may be shared.
        let (id_field, len_field): (&AtomicU32, &AtomicU32) =
            unsafe { (&*self.host.add(entry).cast(), &*self.host.add(entry + 4).cast()) };
        store(|| id_field.store(u32::from(id).to_le(), Ordering::Relaxed));
        store(|| len_field.store(len.to_le(), Ordering::Relaxed));
    }

    /// Makes the entries before this index visible, as a full barrier: no later load is done before it.
    #[inline(always)]
    pub(super) fn publish(&self, idx: u16) {
        store(|| self.half(2).swap(idx.to_le(), Ordering::SeqCst));
    }

    /// The used index, as a queue before this one has left it.
    pub(super) fn idx(&self) -> u16 {
        u16::from_le(self.half(2).load(Ordering::Acquire))
    }
}

/// An event suppression structure of a packed queue (2.8.14), read and written as a whole.
pub(super) struct EventArea {
    word: *const AtomicU32,
}

// SAFETY: see `Descs`.
unsafe impl Send for EventArea {}

impl EventArea {
    pub(super) fn new(area: &Area) -> EventArea {
        EventArea { word: area.host.cast() }
    }

    #[inline(always)]
    fn word(&self) -> &AtomicU32 {
        // SAFETY: the area has four bytes and is aligned to 4; atomics may be shared.
        unsafe { &*self.word }
    }

    /// Offset and wrap counter (low half), flags (high half), as the second half of a store-and-look sequence.
    #[inline(always)]
    pub(super) fn load(&self) -> u32 {
        u32::from_le(self.word().load(Ordering::SeqCst))
    }

    /// Writes all of it, as a full barrier.
    #[inline(always)]
    pub(super) fn store(&self, word: u32) {
        store(|| self.word().swap(word.to_le(), Ordering::SeqCst));
    }
}
