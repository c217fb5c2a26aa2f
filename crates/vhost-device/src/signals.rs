//! SIGTERM and SIGINT as a readable descriptor, so that the main loop ends requests before it ends.
//!
//! The signals are blocked in the thread that makes the descriptor and in every thread it starts later: make it before
//! the lanes. This module holds the `unsafe` of the three system calls that rustix does not have.
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// The signals that ask the daemon to end.
const ENDING: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGINT];

/// A signal that asked the daemon to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signal(u32);

impl Signal {
    /// The signal's name.
    pub(crate) fn name(self) -> &'static str {
        match self.0 as libc::c_int {
            libc::SIGTERM => "SIGTERM",
            libc::SIGINT => "SIGINT",
            _ => "a signal",
        }
    }
}

/// The descriptor.
#[derive(Debug)]
pub(crate) struct Signals(OwnedFd);

impl Signals {
    /// Blocks the ending signals in this thread, ignores SIGPIPE, and opens the descriptor.
    pub(crate) fn new() -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set that it is given.
        let mut set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in ENDING {
            // SAFETY: `set` is initialised and `signal` is a valid signal number.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: `set` is initialised; no old set is asked for.
        let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        // A peer that closes its end gives EPIPE, never a signal. The Rust runtime does the same unless told otherwise.
        // SAFETY: SIG_IGN runs no code.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        // SAFETY: `set` is initialised and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd returned a new descriptor that nothing else owns.
        Ok(Signals(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The next signal that came, if any.
    pub(crate) fn take(&self) -> Option<Signal> {
        let mut buffer = [0u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.0, &mut buffer) {
            // The signal's number is the first field (signalfd(2)).
            Ok(n) if n == buffer.len() => {
                Some(Signal(u32::from_ne_bytes([buffer[0], buffer[1], buffer[2], buffer[3]])))
            }
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
