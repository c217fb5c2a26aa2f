//! What a floor does for a chain. An element is handed over as it is met; [`Work::end`] ends the chain.
#![allow(unsafe_code)]
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{Bytes, VolatileSlice};

use crate::load::ring::field;

pub(super) trait Work {
    /// Whether it wants the device-readable elements, too.
    const READS: bool;

    /// The next element of the chain. Returns the bytes written.
    fn element(&mut self, buffer: &VolatileSlice<'_>, writable: bool) -> io::Result<u32>;

    /// The chain has no more elements. Returns the bytes written for it now.
    fn end(&mut self) -> io::Result<u32> {
        Ok(0)
    }

    /// No more chains are available: those since the last time are going to be used.
    fn batch(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A number at the start of each buffer.
#[derive(Default)]
pub(super) struct Nothing(u64);

impl Work for Nothing {
    const READS: bool = false;

    fn element(&mut self, buffer: &VolatileSlice<'_>, _writable: bool) -> io::Result<u32> {
        self.0 += 1;
        let number = self.0.to_ne_bytes();
        let _ = buffer.write(&number, 0);
        Ok(buffer.len() as u32)
    }
}

/// getrandom(2) into each buffer.
pub(super) struct Random;

impl Work for Random {
    const READS: bool = false;

    fn element(&mut self, buffer: &VolatileSlice<'_>, _writable: bool) -> io::Result<u32> {
        let guard = buffer.ptr_guard_mut();
        let mut done = 0;
        while done < buffer.len() {
            // SAFETY: the kernel writes at most the rest of the buffer, which the guard keeps mapped and no Rust
            // reference covers.
            let more = unsafe { libc::getrandom(guard.as_ptr().add(done).cast(), buffer.len() - done, 0) };
            done += usize::try_from(more).map_err(|_| io::Error::last_os_error())?;
        }
        Ok(buffer.len() as u32)
    }
}

/// 5.2.6: the status, which is the last writable byte, says that all went well.
fn succeed(status: *mut u8) {
    // SAFETY: the byte is in guest memory, which stays mapped as long as the process lives, and no reference covers it.
    unsafe { status.write_volatile(0) };
}

fn last_byte(buffer: &VolatileSlice<'_>) -> Option<*mut u8> {
    let at = buffer.len().checked_sub(1)?;
    // SAFETY: an offset within the buffer.
    Some(unsafe { buffer.ptr_guard_mut().as_ptr().add(at) })
}

/// A block request that is answered and not carried out.
#[derive(Default)]
pub(super) struct StatusOnly {
    status: Option<*mut u8>,
    written: u32,
}

impl Work for StatusOnly {
    const READS: bool = false;

    fn element(&mut self, buffer: &VolatileSlice<'_>, _writable: bool) -> io::Result<u32> {
        self.status = last_byte(buffer);
        self.written += buffer.len() as u32;
        Ok(0)
    }

    fn end(&mut self) -> io::Result<u32> {
        if let Some(status) = self.status.take() {
            succeed(status);
        }
        Ok(std::mem::take(&mut self.written))
    }
}

/// A block request by one system call.
pub(super) struct OneCall {
    file: File,
    /// Type and first byte, once the header was met.
    header: Option<(u32, i64)>,
    data: Vec<libc::iovec>,
    /// Of `data`.
    bytes: usize,
    writable: usize,
}

/// Types of 5.2.6.
const IN: u32 = 0;
const OUT: u32 = 1;

impl OneCall {
    pub(super) fn open(path: &Path) -> io::Result<OneCall> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(OneCall { file, header: None, data: Vec::with_capacity(64), bytes: 0, writable: 0 })
    }
}

impl Work for OneCall {
    const READS: bool = true;

    /// The layout that Linux has: 16 bytes of header, data, one byte of status.
    fn element(&mut self, buffer: &VolatileSlice<'_>, writable: bool) -> io::Result<u32> {
        if self.header.is_none() {
            if buffer.len() != 16 {
                return Err(io::Error::other(
                    "a header in a descriptor of its own is all that a floor knows",
                ));
            }
            let kind = u32::from_le(field::<AtomicU32>(buffer, 0).load(Ordering::Relaxed));
            let sector = u64::from_le(field::<AtomicU64>(buffer, 8).load(Ordering::Relaxed));
            let at = i64::try_from(sector).ok().and_then(|sector| sector.checked_mul(512));
            self.header = Some((kind, at.ok_or_else(|| io::Error::other("a sector out of range"))?));
            return Ok(0);
        }
        self.data
            .push(libc::iovec { iov_base: buffer.ptr_guard_mut().as_ptr().cast(), iov_len: buffer.len() });
        self.bytes += buffer.len();
        self.writable += if writable { buffer.len() } else { 0 };
        Ok(0)
    }

    fn end(&mut self) -> io::Result<u32> {
        let (Some((kind, at)), Some(status)) = (self.header.take(), self.data.pop()) else {
            return Err(io::Error::other("a request without header or status"));
        };
        if status.iov_len != 1 {
            return Err(io::Error::other("a status in a descriptor of its own is all that a floor knows"));
        }
        let (fd, list, count) = (self.file.as_raw_fd(), self.data.as_ptr(), self.data.len() as libc::c_int);
        // SAFETY: each entry is a buffer in guest memory, which stays mapped as long as the process lives and which no
        // reference covers.
        let moved = unsafe {
            match kind {
                IN => libc::preadv(fd, list, count, at),
                OUT => libc::pwritev(fd, list, count, at),
                _ => return Err(io::Error::other("reads and writes are all that a floor knows")),
            }
        };
        let moved = usize::try_from(moved).map_err(|_| io::Error::last_os_error())?;
        let whole = std::mem::take(&mut self.bytes) - 1;
        self.data.clear();
        if moved != whole {
            return Err(io::Error::other(format!("{moved} of {whole} bytes")));
        }
        succeed(status.iov_base.cast());
        Ok(std::mem::take(&mut self.writable) as u32)
    }
}

/// A console's output by one system call a request, or one for all that are available.
pub(super) struct Output {
    file: File,
    data: Vec<libc::iovec>,
    bytes: usize,
    together: bool,
}

/// Most buffers of one writev(2) (`IOV_MAX` of Linux).
const MOST: usize = 1024;

impl Output {
    pub(super) fn open(path: &Path, together: bool) -> io::Result<Output> {
        let file = OpenOptions::new().append(true).open(path)?;
        Ok(Output { file, data: Vec::with_capacity(MOST), bytes: 0, together })
    }

    fn write(&mut self) -> io::Result<()> {
        let (list, count) = (self.data.as_ptr(), self.data.len() as libc::c_int);
        // SAFETY: each entry is a buffer in guest memory, which stays mapped as long as the process lives, and which the
        // kernel only reads.
        let moved = unsafe { libc::writev(self.file.as_raw_fd(), list, count) };
        let moved = usize::try_from(moved).map_err(|_| io::Error::last_os_error())?;
        self.data.clear();
        match std::mem::take(&mut self.bytes) {
            whole if whole == moved => Ok(()),
            whole => Err(io::Error::other(format!("{moved} of {whole} bytes"))),
        }
    }
}

impl Work for Output {
    const READS: bool = true;

    fn element(&mut self, buffer: &VolatileSlice<'_>, writable: bool) -> io::Result<u32> {
        if !writable {
            let base = buffer.ptr_guard_mut().as_ptr().cast();
            self.data.push(libc::iovec { iov_base: base, iov_len: buffer.len() });
            self.bytes += buffer.len();
        }
        if self.data.len() < MOST { Ok(0) } else { self.write().map(|()| 0) }
    }

    fn end(&mut self) -> io::Result<u32> {
        if self.together { Ok(0) } else { self.write().map(|()| 0) }
    }

    fn batch(&mut self) -> io::Result<()> {
        if self.data.is_empty() { Ok(()) } else { self.write() }
    }
}
