//! Ctrl-C and SIGTERM as a flag that waiting loops look at, so that what was started is put away before the end.
//!
//! Only programs that want it call [`catch`]; test binaries leave signals as they are.

use std::sync::atomic::{AtomicI32, Ordering};

static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    // A second signal ends the process at once: whoever presses Ctrl-C twice means it.
    if CAUGHT.swap(signal, Ordering::Relaxed) != 0 {
        // SAFETY: `_exit` may be called from a signal handler (POSIX lists it as async-signal-safe).
        unsafe { libc::_exit(128 + signal) };
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP set the flag instead of ending the process.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only touches an atomic and calls `_exit`; the action is fully initialised (all zero
        // is a valid `sigaction`: no flags, empty mask), and the old action is not asked for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as extern "C" fn(libc::c_int) as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// The signal that came since [`catch`], if one did.
#[must_use]
pub fn caught() -> Option<i32> {
    match CAUGHT.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(signal),
    }
}
