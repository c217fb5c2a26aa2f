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
