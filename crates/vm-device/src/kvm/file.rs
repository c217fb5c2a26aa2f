//! Our events as `kvm-ioctls` wants them.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};

use vmm_sys_util::eventfd::EventFd;

/// Another descriptor of the same eventfd. KVM keeps the eventfd itself and compares eventfds, not descriptors, so this may be closed
/// after the call it is for.
pub(super) fn eventfd(event: BorrowedFd<'_>) -> io::Result<EventFd> {
    let fd = event.try_clone_to_owned()?.into_raw_fd();
    // SAFETY: the descriptor was made a line above and given up by its owner, so `EventFd` is the only one who closes it.
    Ok(unsafe { EventFd::from_raw_fd(fd) })
}
