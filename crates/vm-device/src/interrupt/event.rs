//! An eventfd: one bit that survives until somebody takes it, and a file that wakes whoever waits for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::OFlags;

/// An eventfd that nobody can make its writer wait for: it does not block.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// A new one, nothing signalled.
    ///
    /// # Errors
    /// Those of `eventfd(2)`: no more files.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Takes an eventfd that somebody else made, and makes it non-blocking. (Whoever else has it can undo that, so it should
    /// not come from somebody who may hold up its writer.)
    ///
    /// # Errors
    /// Those of `fcntl(2)`.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        Ok(Self(fd))
    }

    /// Another descriptor of the same eventfd.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Signals. Never blocks: a counter that is full (after 2^64 - 2 signals, or because somebody with the file wrote that) says
    /// "signalled" already.
    pub fn signal(&self) {
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &1_u64.to_ne_bytes()));
    }

    /// Whether it was signalled since this was asked the last time.
    pub fn take(&self) -> bool {
        let mut count = [0; 8];
        rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut count)).is_ok_and(|n| n > 0)
    }

    /// Whether it is signalled and nobody has taken it; leaves it so.
    pub fn is_signalled(&self) -> bool {
        any_signalled([self]) == 1
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A bit for each of at most 64 events, the first is bit 0: which are signalled.
pub(super) fn any_signalled<'a>(events: impl IntoIterator<Item = &'a Event>) -> u64 {
    let mut files: Vec<PollFd<'_>> =
        events.into_iter().take(64).map(|event| PollFd::new(event, PollFlags::IN)).collect();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if rustix::io::retry_on_intr(|| poll(&mut files, Some(&now))).is_err() {
        return 0;
    }
    let ready = files.iter().map(|file| u64::from(file.revents().contains(PollFlags::IN)));
    ready.enumerate().fold(0, |bits, (index, ready)| bits | ready << index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_there_until_it_is_taken() {
        let event = Event::new().unwrap();
        assert!(!event.is_signalled() && !event.take());
        event.signal();
        event.signal();
        assert!(event.is_signalled() && event.is_signalled());
        assert!(event.take());
        assert!(!event.take() && !event.is_signalled());
        event.try_clone().unwrap().signal();
        assert!(event.take());
    }

    #[test]
    fn policy_8_a_full_event_does_not_block_whoever_signals() {
        let file = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let event = Event::from_fd(file).unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal();
        event.signal();
        assert!(event.take());
        assert!(!event.take());
    }

    #[test]
    fn up_to_64_are_asked_at_once() {
        let events: Vec<Event> = (0..70).map(|_| Event::new().unwrap()).collect();
        for signalled in [0, 3, 63, 64] {
            events[signalled].signal();
        }
        assert_eq!(any_signalled(&events), 1 << 63 | 1 << 3 | 1);
        assert_eq!(any_signalled([]), 0);
    }
}
