//! The guest memory of one request, on its way through the host: a cursor over pieces, and what keeps them in place.
//!
//! Invariant: the pieces are those of the chain that the payload owns (or of bytes of its own). A chain's memory stays
//! mapped where it is until the chain is completed or dropped, even if its queue is gone; so whoever owns the payload - a
//! thread of the pool, a request in the kernel - may read and write the pieces whenever it likes. They are shared with the
//! guest all the time: only system calls and volatile copies touch them.
#![allow(unsafe_code)]
use std::fmt;

use vm_memory::VolatileSlice;
use vm_virtio::{Chain, Queue, Segment};

/// Pieces that one system call takes at most (`IOV_MAX`).
const VECTORS: usize = 1024;

/// What keeps the pieces where they are.
enum Keep {
    Chain(Chain),
    /// Memory of our own, reached through its piece only.
    Bytes(Vec<u8>),
}

/// Room for the pieces of a payload, lent to one request after the other. Empty in between.
#[derive(Default)]
pub(crate) struct Room(Vec<libc::iovec>);

// SAFETY: there are no pieces in it, only room for some.
unsafe impl Send for Room {}

/// What a request reads from or writes to: its bytes in guest memory. Reading, filling and advancing move on in it.
pub struct Payload {
    pieces: Vec<libc::iovec>,
    /// The piece that is next; of that, what is behind us is cut off.
    next: usize,
    left: u64,
    keep: Keep,
}

// SAFETY: the pieces are memory that is shared with other parties by its nature, see the module; what owns it can be sent.
unsafe impl Send for Payload {}

impl Payload {
    /// The device-readable part of a chain behind its first `skip` bytes.
    pub(crate) fn readable(queue: &Queue, chain: Chain, skip: usize, room: Room) -> Payload {
        let mut payload = Payload::of(queue.readable(&chain), room, Keep::Bytes(Vec::new()));
        payload.keep = Keep::Chain(chain);
        payload.advance(skip);
        payload
    }

    /// The device-writable part of a chain without its last byte, which is the status.
    pub(crate) fn writable(queue: &Queue, chain: Chain, room: Room) -> Payload {
        let mut payload = Payload::of(queue.writable(&chain), room, Keep::Bytes(Vec::new()));
        payload.keep = Keep::Chain(chain);
        if let Some(last) = payload.pieces.last_mut() {
            last.iov_len -= 1;
            payload.left -= 1;
            if last.iov_len == 0 {
                payload.pieces.pop();
            }
        }
        payload
    }

    /// No bytes at all, for a request that has none.
    pub(crate) fn none(chain: Chain, room: Room) -> Payload {
        Payload { pieces: room.0, next: 0, left: 0, keep: Keep::Chain(chain) }
    }

    /// Bytes that are nobody's memory but its own: for who uses an image without a device.
    pub fn from_bytes(mut bytes: Vec<u8>) -> Payload {
        let piece = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let left = bytes.len() as u64;
        let pieces = if bytes.is_empty() { Vec::new() } else { vec![piece] };
        Payload { pieces, next: 0, left, keep: Keep::Bytes(bytes) }
    }

    /// Ends it; what [`Payload::from_bytes`] was given, as it is now.
    pub fn into_bytes(self) -> Vec<u8> {
        match self.keep {
            Keep::Bytes(bytes) => bytes,
            Keep::Chain(_) => Vec::new(),
        }
    }

    fn of(segments: &[Segment], Room(mut pieces): Room, keep: Keep) -> Payload {
        pieces.extend(segments.iter().map(Segment::as_iovec));
        let left = pieces.iter().map(|piece| piece.iov_len as u64).sum();
        Payload { pieces, next: 0, left, keep }
    }

    /// Ends it: the chain, and the room for pieces.
    pub(crate) fn into_parts(self) -> (Option<Chain>, Room) {
        let Payload { mut pieces, keep, .. } = self;
        pieces.clear();
        (if let Keep::Chain(chain) = keep { Some(chain) } else { None }, Room(pieces))
    }

    /// The chain that the memory is of.
    pub(crate) fn chain(&self) -> Option<&Chain> {
        if let Keep::Chain(chain) = &self.keep { Some(chain) } else { None }
    }

    /// Bytes that are ahead.
    #[inline]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// What is ahead, for a system call: no more than one takes.
    #[inline]
    pub fn iovecs(&self) -> &[libc::iovec] {
        let ahead = self.pieces.get(self.next..).unwrap_or(&[]);
        ahead.get(..VECTORS).unwrap_or(ahead)
    }

    /// Whether each piece ahead begins at, and is, a multiple of `align` (a power of two).
    pub(crate) fn is_aligned(&self, align: usize) -> bool {
        let ahead = self.pieces.get(self.next..).unwrap_or(&[]);
        ahead.iter().all(|piece| (piece.iov_base.addr() | piece.iov_len) & (align - 1) == 0)
    }

    /// Moves on by `count` bytes, or to the end.
    #[inline]
    pub fn advance(&mut self, count: usize) {
        self.walk(count, |_, _| {});
    }

    /// Copies what is ahead to `data` and moves on; returns how many bytes there were.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        let count = data.len();
        self.walk(count, |piece, done| {
            if let Some(data) = data.get_mut(done..) {
                piece.copy_to(data);
            }
        })
    }

    /// Fills what is ahead from `data` and moves on; returns how many bytes there was room for.
    pub fn write(&mut self, data: &[u8]) -> usize {
        self.walk(data.len(), |piece, done| {
            if let Some(data) = data.get(done..) {
                piece.copy_from(data);
            }
        })
    }

    /// Moves on by up to `count` bytes, with each piece's part and how many bytes were before it.
    #[inline]
    fn walk(&mut self, count: usize, mut visit: impl FnMut(VolatileSlice<'_>, usize)) -> usize {
        let mut done = 0;
        while done < count {
            let Some(piece) = self.pieces.get_mut(self.next) else { break };
            let part = piece.iov_len.min(count - done);
            // SAFETY: `part` bytes of the piece are memory that this payload keeps in place, see the invariant of the
            // module, for longer than the slice lives, which does not leave this loop. It is accessed by volatile copies.
            visit(unsafe { VolatileSlice::new(piece.iov_base.cast(), part) }, done);
            done += part;
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(part).cast();
            piece.iov_len -= part;
            if piece.iov_len == 0 {
                self.next += 1;
            }
        }
        self.left -= done as u64;
        done
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Payload").field("left", &self.left).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_filled_and_passed_over_in_order() {
        let mut payload = Payload::from_bytes((0..10).collect());
        assert!(payload.is_aligned(1) && payload.left() == 10);
        let mut data = [0; 3];
        assert_eq!(payload.read(&mut data), 3);
        assert_eq!(data, [0, 1, 2]);
        payload.advance(2);
        assert_eq!(payload.write(&[77, 78]), 2);
        assert_eq!(payload.iovecs().iter().map(|piece| piece.iov_len).sum::<usize>(), 3);
        assert_eq!(payload.read(&mut [0; 8]), 3, "no more than there is");
        assert_eq!((payload.left(), payload.read(&mut data), payload.write(&data)), (0, 0, 0));
        assert_eq!(payload.into_bytes(), [0, 1, 2, 3, 4, 77, 78, 7, 8, 9]);
        assert!(Payload::from_bytes(Vec::new()).iovecs().is_empty());
    }
}
