//! What the dispatch protocol synchronises with: the standard library's, or loom's, which tries every order of them.
#[cfg(not(loom))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, fence};
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

    /// A number that no other living thread has.
    #[inline(always)]
    pub(crate) fn thread_token() -> usize {
        thread_local!(static PLACE: u8 = const { 0 });
        // A thread's own variable lies where no other living thread's lies.
        PLACE.with(|place| std::ptr::from_ref(place).addr())
    }
}

#[cfg(loom)]
mod real {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, fence};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};

    pub(crate) fn thread_token() -> usize {
        loom::thread_local!(static PLACE: u8 = 0);
        PLACE.with(|place| std::ptr::from_ref(place).addr())
    }
}

pub(crate) use real::*;

/// Locks it. None of our code panics while it holds a lock, so that a poisoned one is as good as any.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
