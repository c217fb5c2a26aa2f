//! A barrier between many who must be fast and one who need not be.
//!
//! Each side stores, then loads what the other stored; at least one of them must see the other's store. That takes a full
//! barrier between store and load on both sides, unless one side can make the other have one: membarrier(2) interrupts
//! every processor that runs a thread of this process. So [`Barrier::light`] costs no instruction, and
//! [`Barrier::heavy`] a system call.
use crate::sync::fence;
use std::sync::atomic::Ordering;

pub(super) struct Barrier {
    /// Whether the kernel does it; if not, both sides have a full barrier.
    by_kernel: bool,
}

impl Barrier {
    pub(super) fn new() -> Barrier {
        Barrier { by_kernel: register() }
    }

    #[inline(always)]
    pub(super) fn light(&self) {
        if self.by_kernel {
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    pub(super) fn heavy(&self) {
        fence(Ordering::SeqCst);
        if self.by_kernel {
            interrupt_all();
        }
    }
}

#[cfg(all(target_os = "linux", not(loom), not(miri)))]
fn register() -> bool {
    use rustix::thread::{MembarrierCommand, membarrier};
    membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok()
}

#[cfg(all(target_os = "linux", not(loom), not(miri)))]
fn interrupt_all() {
    use rustix::thread::{MembarrierCommand, membarrier};
    // It fails only for a process that is not registered. A child that fork() made is not: it has one thread, but may
    // start others.
    if membarrier(MembarrierCommand::PrivateExpedited).is_err() && register() {
        let _ = membarrier(MembarrierCommand::PrivateExpedited);
    }
}

#[cfg(not(all(target_os = "linux", not(loom), not(miri))))]
fn register() -> bool {
    false
}

#[cfg(not(all(target_os = "linux", not(loom), not(miri))))]
fn interrupt_all() {}
