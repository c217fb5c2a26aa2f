//! Requests in io_uring: collected over a turn, handed to the kernel in one call.
//!
//! Invariants: a slot holds a request from [`Ring::begin`] until the kernel has completed it, so what the kernel knows -
//! pieces of guest memory, and the list of them - stays where it is. A ring that goes while the kernel still works leaves
//! those requests to it for good: leaked, not freed.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, squeue, types};

use super::{Action, Request};
use crate::backend::RawFile;

/// The one file that is registered.
const FILE: types::Fixed = types::Fixed(0);
/// Completions of cancellations.
const NOBODY: u64 = u64::MAX;

struct Slot {
    request: Request,
    /// The kernel has said "again" once.
    again: bool,
    /// Nobody wants it any more.
    cancelled: bool,
}

/// A lane's ring.
pub(super) struct Ring {
    uring: IoUring,
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
}

impl Ring {
    /// A ring for so many requests at a time, and for this file.
    pub(super) fn new(raw: &RawFile, entries: u16) -> io::Result<Ring> {
        // Twice as many: each request can be cancelled while others begin.
        let uring = IoUring::builder().setup_clamp().build(u32::from(entries) * 2)?;
        uring.submitter().register_files(&[raw.file().as_raw_fd()])?;
        let slots: Vec<_> = (0..usize::from(entries)).map(|_| None).collect();
        let free = (0..slots.len()).rev().collect();
        Ok(Ring { uring, slots, free })
    }

    /// Takes a request; back if there is no room. `elsewhere`: not by the thread that submits it.
    pub(super) fn begin(&mut self, request: Request, elsewhere: bool) -> Option<Request> {
        let Some(at) = self.free.pop() else { return Some(request) };
        let Some(slot) = self.slots.get_mut(at) else { return Some(request) };
        *slot = Some(Slot { request, again: false, cancelled: false });
        if self.push(at, elsewhere) {
            return None;
        }
        self.take(at)
    }

    fn take(&mut self, at: usize) -> Option<Request> {
        let slot = self.slots.get_mut(at)?.take()?;
        self.free.push(at);
        Some(slot.request)
    }

    /// Queues what is left of the request in a slot.
    fn push(&mut self, at: usize, elsewhere: bool) -> bool {
        let Some(Some(Slot { request, .. })) = self.slots.get(at) else { return false };
        let iovecs = request.payload.iovecs();
        // No more than IOV_MAX.
        let count = iovecs.len() as u32;
        let entry = match request.action {
            Action::Read(offset) => opcode::Readv::new(FILE, iovecs.as_ptr(), count).offset(offset).build(),
            Action::Write { offset, stable } => opcode::Writev::new(FILE, iovecs.as_ptr(), count)
                .offset(offset)
                .rw_flags(if stable { libc::RWF_DSYNC as _ } else { 0 })
                .build(),
            Action::Flush => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            Action::Discard(_) | Action::WriteZeroes { .. } => return false,
        };
        let flags = if elsewhere { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = entry.user_data(at as u64).flags(flags);
        // SAFETY: the pieces and the list of them belong to the request in the slot, which stays there, and unchanged, until
        // the kernel has completed the entry (see the module).
        unsafe { self.enter(&entry) }
    }

    /// # Safety
    /// What the entry refers to has to stay until it is completed.
    unsafe fn enter(&mut self, entry: &squeue::Entry) -> bool {
        for _ in 0..2 {
            // SAFETY: the caller's.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return true;
            }
            self.submit();
        }
        false
    }

    /// Hands all that is queued to the kernel, without waiting for any of it. Whether there was something, and it was taken;
    /// what the kernel does not take now (EAGAIN, EBUSY) stays queued for the next time.
    pub(super) fn submit(&mut self) -> bool {
        if self.uring.submission().is_empty() {
            return false;
        }
        while let Err(error) = self.uring.submit() {
            if error.kind() != io::ErrorKind::Interrupted {
                tracing::warn!(%error, "io_uring takes no requests for now");
                return false;
            }
        }
        true
    }

    pub(super) fn has_news(&mut self) -> bool {
        !self.uring.completion().is_empty()
    }

    /// The next request that is over.
    pub(super) fn next(&mut self) -> Option<(Request, io::Result<()>)> {
        loop {
            let completed = self.uring.completion().next()?;
            let Ok(at) = usize::try_from(completed.user_data()) else { continue };
            let Some(result) = self.progress(at, completed.result()) else { continue };
            if let Some(request) = self.take(at) {
                return Some((request, result));
            }
        }
    }

    /// What has become of a request. None: it goes on.
    fn progress(&mut self, at: usize, result: i32) -> Option<io::Result<()>> {
        let Slot { request, again, cancelled } = self.slots.get_mut(at)?.as_mut()?;
        let cancelled = *cancelled;
        let Ok(done) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(-result);
            let passing = matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
            if cancelled || !passing || std::mem::replace(again, true) {
                return Some(Err(error));
            }
            // A thread of the kernel can wait.
            return if self.push(at, true) { None } else { Some(Err(error)) };
        };
        let end = match &mut request.action {
            Action::Read(offset) => {
                *offset += done as u64;
                // The file is shorter than it was.
                io::ErrorKind::UnexpectedEof
            }
            Action::Write { offset, .. } => {
                *offset += done as u64;
                io::ErrorKind::WriteZero
            }
            _ => return Some(Ok(())),
        };
        request.payload.advance(done);
        match (request.payload.left(), done) {
            (0, _) => Some(Ok(())),
            (_, 0) => Some(Err(end.into())),
            _ if cancelled => Some(Err(io::ErrorKind::Interrupted.into())),
            _ if self.push(at, false) => None,
            _ => Some(Err(io::ErrorKind::OutOfMemory.into())),
        }
    }

    /// Asks the kernel to end what is under way. What cannot be ended comes back when it is done.
    pub(super) fn cancel(&mut self) {
        for at in 0..self.slots.len() {
            if let Some(Some(slot)) = self.slots.get_mut(at) {
                slot.cancelled = true;
                let entry = opcode::AsyncCancel::new(at as u64).build().user_data(NOBODY);
                // SAFETY: the entry refers to no memory.
                unsafe { self.enter(&entry) };
            }
        }
        self.submit();
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's file is open for as long as the ring is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.cancel();
        while self.next().is_some() {}
        if self.slots.iter().all(Option::is_none) {
            // A ring is closed some time later; whoever opens the image next must not meet its locks.
            let _ = self.uring.submitter().unregister_files();
        }
        // The kernel may go on with the rest after the ring is closed.
        for slot in self.slots.drain(..).flatten() {
            std::mem::forget(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::backend::Payload;

    fn reading(len: usize, epoch: u32) -> Request {
        Request { payload: Payload::from_bytes(vec![0; len]), action: Action::Read(0), fills: 0, epoch }
    }

    #[track_caller]
    fn wait(ring: &mut Ring) -> (Request, io::Result<()>) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            ring.submit();
            if let Some(done) = ring.next() {
                return done;
            }
            assert!(Instant::now() < deadline, "a completion");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A pipe is a file whose reads hang until somebody writes.
    fn pipe() -> Option<(Ring, File)> {
        let (reader, writer) = std::io::pipe().unwrap();
        let raw = RawFile::of(File::from(std::os::fd::OwnedFd::from(reader)));
        match Ring::new(&raw, 4) {
            Ok(ring) => Some((ring, File::from(std::os::fd::OwnedFd::from(writer)))),
            Err(error) => {
                println!("SKIP: no io_uring: {error}");
                None
            }
        }
    }

    #[test]
    fn what_hangs_is_cancelled_and_what_is_half_done_goes_on() {
        let Some((mut ring, mut writer)) = pipe() else { return };
        assert!(ring.begin(reading(8, 1), false).is_none());
        ring.submit();
        assert!(ring.next().is_none());
        ring.cancel();
        let (request, result) = wait(&mut ring);
        assert!(result.is_err() && request.epoch == 1 && request.payload.left() == 8);
        // Slots are used again, and a short read is continued.
        for epoch in 2..12 {
            assert!(ring.begin(reading(8, epoch), false).is_none());
            ring.submit();
            writer.write_all(b"abc").unwrap();
            std::thread::sleep(Duration::from_millis(2));
            assert!(ring.next().is_none());
            ring.submit();
            writer.write_all(b"defgh").unwrap();
            let (request, result) = wait(&mut ring);
            result.unwrap();
            assert_eq!((request.epoch, request.payload.into_bytes().as_slice()), (epoch, &b"abcdefgh"[..]));
        }
    }

    #[test]
    fn the_end_of_a_file_is_an_error_and_a_full_ring_gives_requests_back() {
        let Some((mut ring, writer)) = pipe() else { return };
        for epoch in 0..4 {
            assert!(ring.begin(reading(8, epoch), false).is_none());
        }
        assert!(ring.begin(reading(8, 9), false).is_some_and(|request| request.epoch == 9));
        ring.submit();
        drop(writer);
        for _ in 0..4 {
            assert_eq!(wait(&mut ring).1.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_ring_that_goes_with_requests_in_the_kernel_leaves_them_their_memory() {
        let Some((mut ring, mut writer)) = pipe() else { return };
        assert!(ring.begin(reading(1 << 16, 1), false).is_none());
        ring.submit();
        drop(ring);
        // Whatever the kernel still does with them, nothing here is touched that was freed.
        let _ = writer.write_all(&[1; 4096]);
    }
}
