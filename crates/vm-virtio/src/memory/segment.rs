//! A contiguous piece of guest memory, and lists of them.
//!
//! A segment can be looked at through a reference only - it is neither `Copy` nor `Clone`, and no safe code outside
//! of this crate makes one - so that it cannot outlive the chain, buffer or list that keeps its memory mapped.
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::atomic::{AtomicU8, Ordering};

use super::{Access, Directory, GuestRam, MemFault, copy};

/// A contiguous piece of guest memory in this process: a pointer and a length, laid out as an `iovec`.
#[repr(C)]
pub struct Segment {
    base: *mut u8,
    len: usize,
}

// SAFETY: guest memory may be accessed from any thread: it is shared with the guest's CPUs from the start, and
// accessed by volatile copies only.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// # Safety
    /// `base` must be valid for `len` bytes of volatile access for as long as safe code can reach the segment.
    #[inline(always)]
    pub(crate) unsafe fn new(base: *mut u8, len: usize) -> Segment {
        Segment { base, len }
    }

    /// Where the memory is in this process: for system calls.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base
    }

    /// Length in bytes; never 0 in what this crate hands out.
    #[inline]
    #[allow(clippy::len_without_is_empty, reason = "there are no empty segments")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies from the segment, beginning `offset` bytes into it; returns how many bytes there were to copy.
    #[inline(always)]
    pub fn read(&self, offset: usize, data: &mut [u8]) -> usize {
        if offset <= self.len && data.len() <= self.len - offset {
            // By itself because the length is often a constant, and the copy then a few instructions.
            // SAFETY: that many bytes are within the segment, and are what `data` has.
            unsafe { copy(self.base.wrapping_add(offset), data.as_mut_ptr(), data.len()) };
            return data.len();
        }
        let n = self.len.saturating_sub(offset).min(data.len());
        // SAFETY: `offset + n` is within the segment, unless n is 0 and nothing is accessed; `data` has n bytes.
        unsafe { copy(self.base.wrapping_add(offset), data.as_mut_ptr(), n) };
        n
    }

    /// Copies into the segment, beginning `offset` bytes into it; returns how many bytes there was room for.
    #[inline(always)]
    pub fn write(&self, offset: usize, data: &[u8]) -> usize {
        if offset <= self.len && data.len() <= self.len - offset {
            // SAFETY: that many bytes are within the segment, and are what `data` has.
            unsafe { copy(data.as_ptr(), self.base.wrapping_add(offset), data.len()) };
            return data.len();
        }
        let n = self.len.saturating_sub(offset).min(data.len());
        // SAFETY: `offset + n` is within the segment, unless n is 0 and nothing is accessed; `data` has n bytes.
        unsafe { copy(data.as_ptr(), self.base.wrapping_add(offset), n) };
        n
    }

    /// Sets bits of the byte at `offset` in one access; what it was before. None beyond the end.
    pub(crate) fn fetch_or(&self, offset: usize, bits: u8) -> Option<u8> {
        if offset >= self.len {
            return None;
        }
        // SAFETY: the byte is within the segment, so it may be accessed for as long as `self` may; an atomic byte needs no
        // alignment, and whoever else accesses guest memory does so by atomic or volatile accesses.
        let byte = unsafe { AtomicU8::from_ptr(self.base.wrapping_add(offset)) };
        Some(byte.fetch_or(bits, Ordering::SeqCst))
    }

    /// As an `iovec`, for a system call. What the kernel does with it must end before the chain is completed or dropped.
    pub fn as_iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.base.cast(), iov_len: self.len }
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{}", self.base, self.len)
    }
}

/// The segments as the kernel takes them, without copying.
pub fn iovecs(segments: &[Segment]) -> &[libc::iovec] {
    const {
        assert!(size_of::<Segment>() == size_of::<libc::iovec>());
        assert!(align_of::<Segment>() == align_of::<libc::iovec>());
        assert!(std::mem::offset_of!(Segment, base) == std::mem::offset_of!(libc::iovec, iov_base));
    }
    // SAFETY: both structures are a pointer and a length in this order, as asserted, and any values are valid.
    unsafe { std::slice::from_raw_parts(segments.as_ptr().cast(), segments.len()) }
}

/// A list of segments of one snapshot, to be filled by [`GuestRam::slices`] and reused.
#[derive(Debug, Default)]
pub struct Segs<'a> {
    list: Vec<Segment>,
    ram: PhantomData<&'a GuestRam>,
}

impl Segs<'_> {
    /// An empty list.
    pub fn new() -> Self {
        Segs::default()
    }

    /// Forgets the segments and keeps the room.
    pub fn clear(&mut self) {
        self.list.clear();
    }

    /// The caller must be sure that the directory lives as long as what `self` stands for.
    pub(super) fn append(
        &mut self,
        directory: &Directory,
        addr: u64,
        len: u64,
        access: Access,
    ) -> Result<(), MemFault> {
        directory.pieces(addr, len, access, |host, len| {
            // SAFETY: the directory says that the piece is mapped, and its snapshot outlives the list: callers
            // bind the list's lifetime to it.
            self.list.push(unsafe { Segment::new(host, len) });
            Ok(())
        })
    }
}

impl Deref for Segs<'_> {
    type Target = [Segment];

    fn deref(&self) -> &[Segment] {
        &self.list
    }
}
