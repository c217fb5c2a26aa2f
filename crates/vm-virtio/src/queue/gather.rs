//! A chain while it is being popped: translates and counts its elements, in whatever table they are.
use super::MAX_CHAIN_BYTES;
use super::arena::{Arena, SegSink, Shape, Slot};
use super::error::QueueError;
use crate::memory::{Access, Directory, Segment};

pub(super) struct Gather<'a> {
    directory: &'a Directory,
    segs: SegSink<'a>,
    /// Elements that may still come: a chain has no more than the queue has entries (2.7.5.3.1, 2.8.17). Ends loops.
    left: u32,
    /// Segments before the first device-writable element.
    readable: usize,
    writing: bool,
    readable_bytes: u64,
    writable_bytes: u64,
}

impl<'a> Gather<'a> {
    #[inline(always)]
    pub(super) fn new(arena: &'a Arena, slot: &'a Slot, size: u32) -> Gather<'a> {
        Gather {
            directory: arena.ram().directory(),
            segs: SegSink::new(arena, slot),
            left: size,
            readable: 0,
            writing: false,
            readable_bytes: 0,
            writable_bytes: 0,
        }
    }

    #[inline(always)]
    pub(super) fn directory(&self) -> &'a Directory {
        self.directory
    }

    /// Adds one element.
    #[inline(always)]
    pub(super) fn add(&mut self, addr: u64, len: u32, write: bool) -> Result<(), QueueError> {
        if self.left == 0 {
            return Err(QueueError::ChainTooLong);
        }
        self.left -= 1;
        let access = if write {
            if !self.writing {
                self.writing = true;
                self.readable = self.segs.len();
            }
            self.writable_bytes += u64::from(len);
            Access::Write
        } else {
            if self.writing {
                return Err(QueueError::ReadableAfterWritable);
            }
            self.readable_bytes += u64::from(len);
            Access::Read
        };
        match self.directory.lookup(addr, len, access) {
            // SAFETY: the directory is of the snapshot that the slot's epoch keeps as long as it is taken.
            Some(host) => self.segs.push(unsafe { Segment::new(host, len as usize) }),
            None => self.add_pieces(addr, len, access),
        }
    }

    /// An element that is empty, unmapped, or more than one piece of host memory.
    #[cold]
    #[inline(never)]
    fn add_pieces(&mut self, addr: u64, len: u32, access: Access) -> Result<(), QueueError> {
        let segs = &mut self.segs;
        self.directory.pieces(addr, u64::from(len), access, |host, len| {
            // SAFETY: as in `add`.
            segs.push(unsafe { Segment::new(host, len) })
        })
    }

    /// The finished chain; `id` is the head (split) or the buffer id (packed), `descs` the ring's descriptors.
    #[inline(always)]
    pub(super) fn finish(self, id: u16, descs: u16) -> Result<Shape, QueueError> {
        let total = self.readable_bytes + self.writable_bytes;
        if total > MAX_CHAIN_BYTES {
            return Err(QueueError::ChainTooLarge(total));
        }
        let count = self.segs.len();
        // The pool has no blocks of 2^32 segments, and lengths above u32::MAX cannot be told to the driver anyway.
        Ok(Shape {
            count: count as u32,
            readable: if self.writing { self.readable as u32 } else { count as u32 },
            writable_len: u32::try_from(self.writable_bytes).unwrap_or(u32::MAX),
            id,
            descs,
        })
    }
}
