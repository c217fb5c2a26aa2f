//! One interrupt for everything: two events, and a line that is high while one of them is there (4.1.4.5, 4.2.2).
use crate::lane::EventFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A buffer was used.
pub(super) const USED: u32 = 1;
/// The configuration changed, or the device needs a reset.
pub(super) const CONFIG: u32 = 2;
/// What a driver can see.
pub(super) const EVENTS: u32 = USED | CONFIG;
/// Nothing is sent. In the same word, so that what comes too late finds it.
const MUTED: u32 = 1 << 31;

/// The wire of an interrupt, from a device to the VMM's interrupt controller.
///
/// An [`EventFd`] is one, for an irqfd: each event is a write, so that the interrupt is of the edge kind, or of the level
/// kind whose owner asks again after each end of interrupt ([`mmio::Mmio::renew_interrupt`](super::mmio::Mmio::renew_interrupt)).
pub trait Line: Send + Sync {
    /// The line is high, or low. Comes with `true` for every event, also if it is high already, and at least once with
    /// `false` when everything is acknowledged. Must not block.
    fn set(&self, high: bool);
}

impl Line for EventFd {
    fn set(&self, high: bool) {
        if high {
            crate::Interrupt::signal(self);
        }
    }
}

/// Events and line.
pub(super) struct Events {
    word: AtomicU32,
    line: Arc<dyn Line>,
}

impl Events {
    /// Without an event, and muted until a driver is there.
    pub(super) fn new(line: Arc<dyn Line>) -> Self {
        Events { word: AtomicU32::new(MUTED), line }
    }

    /// The events that are there.
    #[inline]
    pub(super) fn pending(&self) -> u32 {
        self.word.load(Ordering::SeqCst) & EVENTS
    }

    /// Something happened. Whether it may be told.
    pub(super) fn signal(&self, event: u32) -> bool {
        let change = |word: u32| (word & MUTED == 0).then_some(word | event);
        let told = self.word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).is_ok();
        if told {
            self.settle();
        }
        told
    }

    /// Whether nothing may be told.
    pub(super) fn is_muted(&self) -> bool {
        self.word.load(Ordering::SeqCst) & MUTED != 0
    }

    /// The events that are there; there are none afterwards.
    pub(super) fn take(&self) -> u32 {
        let events = self.word.fetch_and(!EVENTS, Ordering::SeqCst) & EVENTS;
        if events != 0 {
            self.settle();
        }
        events
    }

    /// The driver has seen these events.
    #[inline]
    pub(super) fn acknowledge(&self, events: u32) {
        // One that comes just now comes after this.
        if self.pending() & events != 0 {
            self.clear(events & EVENTS);
        }
    }

    fn clear(&self, events: u32) {
        if self.word.fetch_and(!events, Ordering::SeqCst) & events != 0 {
            // What is left is news for a line of the edge kind.
            self.settle();
        }
    }

    /// No event is there, and none comes.
    pub(super) fn mute(&self) {
        self.word.store(MUTED, Ordering::SeqCst);
        self.settle();
    }

    /// Events may come.
    pub(super) fn unmute(&self) {
        self.word.fetch_and(!MUTED, Ordering::SeqCst);
    }

    /// The state that was saved.
    pub(super) fn restore(&self, events: u32) {
        self.word.store(events & EVENTS, Ordering::SeqCst);
        self.settle();
    }

    /// Makes the line what the events say. Several threads may be in here: whoever sets it last looks afterwards whether
    /// that is still right, so it ends right.
    pub(super) fn settle(&self) {
        loop {
            let high = self.pending() != 0;
            self.line.set(high);
            if (self.pending() != 0) == high {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    #[derive(Default)]
    struct Wire(Mutex<Vec<bool>>);
    impl Line for Wire {
        fn set(&self, high: bool) {
            self.0.lock().unwrap().push(high);
        }
    }
    impl Wire {
        fn take(&self) -> Vec<bool> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    fn events() -> (Arc<Wire>, Events) {
        let wire = Arc::new(Wire::default());
        let events = Events::new(wire.clone());
        events.unmute();
        (wire, events)
    }

    #[test]
    fn mmio_4_2_2_1_an_event_is_there_until_it_is_acknowledged_and_holds_the_line_up() {
        let (wire, events) = events();
        events.signal(USED);
        events.signal(CONFIG);
        assert_eq!((events.pending(), wire.take()), (3, vec![true, true]));
        events.acknowledge(USED);
        assert_eq!((events.pending(), wire.take()), (CONFIG, vec![true]), "what is left holds it up");
        events.acknowledge(!0);
        assert_eq!((events.pending(), wire.take()), (0, vec![false]));
        events.signal(USED);
        assert_eq!(wire.take(), [true], "and it rises again");
    }

    #[test]
    fn mmio_4_2_2_1_a_reset_clears_the_events_and_nothing_comes_after_it() {
        let (wire, events) = events();
        events.signal(USED);
        events.mute();
        assert_eq!((events.pending(), wire.take()), (0, vec![true, false]));
        events.signal(CONFIG);
        assert_eq!((events.pending(), wire.take()), (0, vec![]));
    }

    #[test]
    fn mmio_4_2_3_4_the_line_ends_as_the_events_say_whoever_comes_last() {
        #[derive(Default)]
        struct Last(AtomicBool);
        impl Line for Last {
            fn set(&self, high: bool) {
                std::thread::yield_now();
                self.0.store(high, Ordering::SeqCst);
            }
        }
        let last = Arc::new(Last::default());
        let events = Events::new(last.clone());
        events.unmute();
        for _ in 0..200 {
            std::thread::scope(|scope| {
                scope.spawn(|| events.signal(USED));
                scope.spawn(|| events.acknowledge(USED));
                scope.spawn(|| events.acknowledge(EVENTS));
            });
            assert_eq!(last.0.load(Ordering::SeqCst), events.pending() != 0);
        }
    }
}
