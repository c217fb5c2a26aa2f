//! Waiting for a socket, not for ever: the front-end's endpoints are the only ones that wait.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::Error;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        // A time-out beyond the clock's end is as good as a day.
        let now = Instant::now();
        Deadline(now.checked_add(timeout).unwrap_or(now + Duration::from_secs(86_400)))
    }

    /// Sleeps until the socket is readable or at its end.
    pub(crate) fn readable(self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        self.ready(socket, PollFlags::IN)
    }

    /// Sleeps until the socket is writable or at its end.
    pub(crate) fn writable(self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        self.ready(socket, PollFlags::OUT)
    }

    fn ready(self, socket: BorrowedFd<'_>, flags: PollFlags) -> Result<(), Error> {
        loop {
            let rest = self.0.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(rest.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: rest.subsec_nanos().into(),
            };
            match rustix::event::poll(&mut [PollFd::from_borrowed_fd(socket, flags)], Some(&timeout)) {
                Ok(0) => return Err(Error::TimedOut),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Io(io::Error::from(error))),
            }
        }
    }
}
