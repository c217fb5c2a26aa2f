//! Memory that lost what was behind it: a file that was truncated after it was mapped (failure policy 6).
//!
//! Who maps files for guests catches the signal that touching the missing part raises, lets something else appear
//! there, and calls [`Poison::set`]. Nothing is checked per access: what was read or written meanwhile is void, and
//! whoever used the memory looks at the poison afterwards - a lane once a turn.
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// How many mappings of this process have been poisoned: as long as that stays the same, nobody has to look again.
static POISONED: AtomicUsize = AtomicUsize::new(0);

/// Whether one mapping has lost memory. It never recovers: map the file again.
#[derive(Debug, Default)]
pub struct Poison(AtomicBool);

impl Poison {
    /// Nothing is lost.
    pub const fn new() -> Poison {
        Poison(AtomicBool::new(false))
    }

    /// Memory of the mapping was lost. Async-signal-safe.
    pub fn set(&self) {
        if !self.0.swap(true, Ordering::SeqCst) {
            POISONED.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Whether memory of the mapping was lost.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Looks at several poisons, at the price of one as long as nothing happens in this process.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The count at the last look.
    looked: AtomicUsize,
    found: AtomicBool,
}

impl Watch {
    /// Whether one of them is set. They must be the same ones each time.
    #[inline]
    pub(super) fn any<'a>(&self, poisons: impl IntoIterator<Item = &'a Poison>) -> bool {
        // Before the look: what happens during it is seen the next time.
        let count = POISONED.load(Ordering::SeqCst);
        if self.looked.load(Ordering::Relaxed) != count {
            if poisons.into_iter().any(Poison::is_set) {
                self.found.store(true, Ordering::Relaxed);
            }
            self.looked.store(count, Ordering::Release);
        }
        self.found.load(Ordering::Relaxed)
    }
}
