//! The system calls on guest memory, which no safe wrapper offers: it is not Rust's to borrow.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_virtio::Segment;

/// Pieces that one system call takes: the kernel copies so many descriptions without allocating more than it has at hand
/// for a few, and more of them gain nothing.
const VECTORS: usize = 128;

/// Bytes of one system call: a guest may give a buffer of 4 GiB, and files take all of it.
const MOST: usize = 1 << 20;

/// Pieces of guest memory for one system call, in order. The segments stay borrowed, and with them their chains.
pub(crate) struct Pieces<'a> {
    vectors: [libc::iovec; VECTORS],
    used: usize,
    bytes: usize,
    segments: std::marker::PhantomData<&'a Segment>,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new() -> Pieces<'a> {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Pieces { vectors: [none; VECTORS], used: 0, bytes: 0, segments: std::marker::PhantomData }
    }

    /// Adds these segments but for the first `skip` bytes, as far as there is room: a few of them, and [`MOST`] bytes. False:
    /// that was not all.
    pub(crate) fn add(&mut self, segments: &'a [Segment], mut skip: u64) -> bool {
        for segment in segments {
            let length = segment.len() as u64;
            if skip >= length {
                skip -= length;
                continue;
            }
            let Some(vector) = self.vectors.get_mut(self.used) else { return false };
            // Less than the length, which is a usize.
            let offset = skip as usize;
            skip = 0;
            let (whole, room) = (segment.len() - offset, MOST - self.bytes);
            let base = segment.as_ptr().wrapping_add(offset).cast();
            *vector = libc::iovec { iov_base: base, iov_len: whole.min(room) };
            self.used += 1;
            self.bytes += whole.min(room);
            if whole >= room {
                return false;
            }
        }
        true
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.used == 0
    }

    fn count(&self) -> libc::c_int {
        // At most VECTORS.
        self.used as libc::c_int
    }
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Writes guest memory to a file.
pub(crate) fn write_from(file: BorrowedFd<'_>, pieces: &Pieces<'_>) -> io::Result<usize> {
    // SAFETY: the vectors in use are initialised and each is a part of a segment that is borrowed for as long as `pieces`
    // is: guest memory, which the kernel only reads here. Memory that is gone is EFAULT.
    count(unsafe { libc::writev(file.as_raw_fd(), pieces.vectors.as_ptr(), pieces.count()) })
}

/// Reads from a file into guest memory.
pub(crate) fn read_into(file: BorrowedFd<'_>, pieces: &Pieces<'_>) -> io::Result<usize> {
    // SAFETY: as above; no Rust reference covers guest memory, so the kernel may write it.
    count(unsafe { libc::readv(file.as_raw_fd(), pieces.vectors.as_ptr(), pieces.count()) })
}
