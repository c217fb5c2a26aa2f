//! Interrupts as messages (vhost-user, "In-band notifications").
//!
//! A lane must not touch the front-end's socket, so it leaves word here and wakes the main thread, which sends one
//! message for any number of interrupts since the last. Each message asks to be acknowledged, and until it is, the next
//! one waits: a front-end that is slow gets fewer messages, and what waits for it does not grow.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Wake;

use vm_virtio::Interrupt;

use crate::task::TaskWaker;

/// The interrupts of one ring.
pub(crate) struct InBandCall {
    /// Buffers were used since the last message.
    due: AtomicBool,
    /// A message has not been acknowledged.
    waiting: AtomicBool,
    waker: Arc<TaskWaker>,
}

impl InBandCall {
    pub(crate) fn new(waker: Arc<TaskWaker>) -> Arc<InBandCall> {
        Arc::new(InBandCall { due: AtomicBool::new(false), waiting: AtomicBool::new(false), waker })
    }

    /// Whether a message is to be sent now, which counts as sent. `last`: the ring stops, this one cannot wait.
    pub(crate) fn take(&self, last: bool) -> bool {
        if self.waiting.load(Ordering::Relaxed) && !last {
            return false;
        }
        let due = self.due.swap(false, Ordering::SeqCst);
        if due {
            self.waiting.store(true, Ordering::Relaxed);
        }
        due
    }

    /// The last message was acknowledged.
    pub(crate) fn acknowledged(&self) {
        self.waiting.store(false, Ordering::Relaxed);
    }

    /// The messages went to a channel that is gone: what was not acknowledged may not have been heard.
    pub(crate) fn lost(&self) {
        if self.waiting.swap(false, Ordering::Relaxed) {
            self.due.store(true, Ordering::SeqCst);
        }
    }
}

impl Interrupt for InBandCall {
    fn signal(&self) {
        self.due.store(true, Ordering::SeqCst);
        self.waker.wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_for_any_number_of_interrupts_and_none_before_the_last_is_acknowledged() {
        let call = InBandCall::new(TaskWaker::new(reactor::Waker::new().unwrap()));
        assert!(!call.take(false), "nothing was used");
        call.signal();
        call.signal();
        assert!(call.take(false));
        assert!(!call.take(false));
        call.signal();
        assert!(!call.take(false), "not acknowledged");
        call.acknowledged();
        assert!(call.take(false));
        call.signal();
        assert!(call.take(true), "a ring that stops tells all");
        assert!(!call.take(true));
        call.lost();
        assert!(call.take(false), "the next channel is told again");
    }
}
