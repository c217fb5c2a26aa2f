//! The system calls that write to guest memory, which no safe wrapper offers: it is not Rust's to borrow.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_virtio::Segment;

use super::pieces;

/// Buffers that one read fills at most; a request with more gets fewer bytes.
const VECTORS: usize = 64;

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// getrandom(2) into memory of our own, without waiting.
pub(super) fn random(bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `len` bytes to a slice that we hold exclusively.
    count(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) })
}

/// getrandom(2) into guest memory, without waiting: up to `len` bytes from `offset` on.
pub(super) fn random_into(buffer: &Segment, offset: usize, len: usize) -> io::Result<usize> {
    let offset = offset.min(buffer.len());
    let len = len.min(buffer.len() - offset);
    // SAFETY: offset and length lie within the segment, which is guest memory for as long as it is borrowed: no Rust
    // reference covers it, and if it is not mapped any more the kernel says EFAULT.
    count(unsafe { libc::getrandom(buffer.as_ptr().wrapping_add(offset).cast(), len, libc::GRND_NONBLOCK) })
}

/// Reads up to `limit` bytes from the file's position into guest memory. With `cached` only what can be had without
/// waiting for a disk.
pub(super) fn read_into(
    file: BorrowedFd<'_>,
    buffers: &[Segment],
    limit: usize,
    cached: bool,
) -> io::Result<usize> {
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; VECTORS];
    let mut used = 0;
    for (vector, (buffer, part)) in vectors.iter_mut().zip(pieces(buffers, limit)) {
        *vector = libc::iovec { iov_base: buffer.as_ptr().cast(), iov_len: part };
        used += 1;
    }
    let flags = if cached { libc::RWF_NOWAIT } else { 0 };
    // SAFETY: `used` vectors are initialised, none longer than its segment, which is guest memory as above. Position
    // -1 is the file's own.
    count(unsafe { libc::preadv2(file.as_raw_fd(), vectors.as_ptr(), used, -1, flags) })
}
