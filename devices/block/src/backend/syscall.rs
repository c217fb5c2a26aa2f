//! The system calls that no safe wrapper offers: transfers between a file and guest memory, which is not Rust's to borrow,
//! locks of an open file description, and the discard of a block device.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::Payload;

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn offset_of(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// preadv2(2) into what is ahead, once; moves on by what was read.
#[inline]
pub(crate) fn read(
    file: BorrowedFd<'_>,
    offset: u64,
    to: &mut Payload,
    flags: libc::c_int,
) -> io::Result<usize> {
    let (iovecs, offset) = (to.iovecs(), offset_of(offset)?);
    // SAFETY: the vectors are memory that the payload keeps mapped and that no Rust reference covers; if a page of it is
    // gone the kernel says EFAULT. There are at most IOV_MAX, as many as the slice has.
    let result = unsafe {
        libc::preadv2(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset, flags)
    };
    let done = count(result)?;
    to.advance(done);
    Ok(done)
}

/// pwritev2(2) from what is ahead, once; moves on by what was written.
#[inline]
pub(crate) fn write(
    file: BorrowedFd<'_>,
    offset: u64,
    from: &mut Payload,
    flags: libc::c_int,
) -> io::Result<usize> {
    let (iovecs, offset) = (from.iovecs(), offset_of(offset)?);
    // SAFETY: as in `read`.
    let result = unsafe {
        libc::pwritev2(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset, flags)
    };
    let done = count(result)?;
    from.advance(done);
    Ok(done)
}

/// `BLKDISCARD` of `_IO(0x12, 119)`.
pub(super) fn discard(device: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the request reads two 64-bit numbers, which are there, and writes nothing.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), 0x1277, range.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn range(at: i64) -> libc::flock {
    libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

/// Takes a shared lock on the byte at `at`, for the open file description, without waiting.
pub(super) fn lock(file: BorrowedFd<'_>, at: i64) -> io::Result<()> {
    let lock = range(at);
    // SAFETY: the call reads the structure, which is there, and keeps nothing of it.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives up what the open file description has locked of the byte at `at`.
pub(super) fn unlock(file: BorrowedFd<'_>, at: i64) -> io::Result<()> {
    let mut lock = range(at);
    lock.l_type = libc::F_UNLCK as libc::c_short;
    // SAFETY: `lock` is a `flock`, which is what F_OFD_SETLK reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether another open file description has a lock, shared or not, on the byte at `at`.
pub(super) fn is_locked(file: BorrowedFd<'_>, at: i64) -> io::Result<bool> {
    let mut lock = range(at);
    lock.l_type = libc::F_WRLCK as libc::c_short;
    // SAFETY: the call reads and writes the structure, which is ours alone meanwhile.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result == 0 {
        Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
    } else {
        Err(io::Error::last_os_error())
    }
}
