//! An eventfd that ends a sleep.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::task;

use rustix::event::EventfdFlags;

/// Ends the sleep of a thread that watches it. Clones share one eventfd.
///
/// Watch it with [`Interest::READ_EDGE`](crate::Interest::READ_EDGE) and each wake is one event with nothing to read;
/// watched at level, it needs [`clear`](Self::clear).
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// A waker of its own. Takes one file descriptor.
    pub fn new() -> io::Result<Waker> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Waker(Arc::new(fd)))
    }

    /// Makes the eventfd readable and ends a sleep. Never blocks.
    pub fn wake(&self) {
        // The one possible failure is a counter at its end, and then the file is readable anyway.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Takes back all wakes so far: the eventfd is not readable until the next.
    pub fn clear(&self) {
        let mut count = [0; 8];
        // Fails when there is nothing to take back.
        let _ = rustix::io::read(&self.0, &mut count);
    }

    /// The same waker for futures.
    pub fn task_waker(&self) -> task::Waker {
        task::Waker::from(Arc::new(self.clone()))
    }
}

impl task::Wake for Waker {
    fn wake(self: Arc<Self>) {
        Waker::wake(&self);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        Waker::wake(self);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
