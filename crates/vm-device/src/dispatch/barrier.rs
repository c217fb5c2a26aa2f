//! A barrier between many who must be fast and one who need not be.
//!
//! Each side stores, then loads what the other stored; at least one of them must see the other's store. That takes a full
//! barrier between store and load on both sides, unless one side can make the other have one: membarrier(2) interrupts
//! every processor that runs a thread of this process. So [`Barrier::light`] costs no instruction, and
//! [`Barrier::heavy`] a system call.
//!
//! Where the kernel does not do that ([`Barrier::is_light`]), who must be fast needs [`full`] ones. That is for who uses this to
//! see to: asking here would cost more than the barrier that it saves.
use crate::sync::fence;
use std::sync::atomic::Ordering;

pub(super) struct Barrier {
    by_kernel: bool,
}

impl Barrier {
    pub(super) fn new() -> Barrier {
        Barrier { by_kernel: register() }
    }

    /// One whose light side is none, as where the kernel does not help.
    #[cfg(all(test, loom))]
    pub(super) fn without_kernel() -> Barrier {
        Barrier { by_kernel: false }
    }

    /// Whether [`light`](Self::light) is enough beside [`heavy`](Self::heavy).
    pub(super) fn is_light(&self) -> bool {
        self.by_kernel
    }

    #[inline(always)]
    pub(super) fn light() {
        // Loom has no membarrier(2): this is what the system call makes of it.
        if cfg!(loom) { full() } else { std::sync::atomic::compiler_fence(Ordering::SeqCst) }
    }

    pub(super) fn heavy(&self) {
        full();
        if self.by_kernel {
            interrupt_all();
        }
    }
}

/// Enough on both sides.
pub(super) fn full() {
    fence(Ordering::SeqCst);
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
    cfg!(loom)
}

#[cfg(not(all(target_os = "linux", not(loom), not(miri))))]
fn interrupt_all() {}
