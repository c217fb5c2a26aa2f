//! Whether to poll a little longer before sleeping.
//!
//! Waking a sleeping thread costs tens of microseconds where the request itself costs two, so a thread that is about
//! to get work again gains by not sleeping, and one that is idle must not burn its CPU. The window follows the rule of
//! the kernel's halt polling: a sleep that was so short that the longest window would have covered it doubles the
//! window; a long sleep halves it, down to none.

use std::hint;
use std::time::{Duration, Instant};

/// How long polling may last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpinPolicy {
    /// Longest time to poll before a sleep. Zero: never polls.
    pub limit: Duration,
}

impl SpinPolicy {
    /// Never polls.
    pub const OFF: SpinPolicy = SpinPolicy { limit: Duration::ZERO };
}

/// First window after none; below it polling is not worth the two readings of the clock.
const FIRST: Duration = Duration::from_micros(4);

/// Polls between two readings of the clock.
const POLLS_PER_LOOK: u32 = 16;

/// Polls for work within an adaptive window. Belongs to one thread.
#[derive(Debug)]
pub struct Spinner {
    limit: Duration,
    window: Duration,
}

impl Spinner {
    /// A spinner that has learned nothing yet: its first window is small.
    pub fn new(policy: SpinPolicy) -> Self {
        Spinner { limit: policy.limit, window: FIRST.min(policy.limit) }
    }

    /// Calls `poll` until it finds work (true) or the window is over (false: sleep, then tell [`woke`](Self::woke)).
    ///
    /// With a limit of zero `poll` is never called. Now and then the CPU is offered to other threads: work can come
    /// from a thread that waits for this very CPU.
    pub fn spin(&mut self, mut poll: impl FnMut() -> bool) -> bool {
        if self.window.is_zero() {
            return false;
        }
        let start = Instant::now();
        loop {
            for _ in 0..POLLS_PER_LOOK {
                if poll() {
                    return true;
                }
                hint::spin_loop();
            }
            if start.elapsed() >= self.window {
                return false;
            }
            std::thread::yield_now();
        }
    }

    /// Learns from a sleep that ended with work after `slept`, the time of a vain spin before it included or not.
    pub fn woke(&mut self, slept: Duration) {
        if slept > self.limit {
            let half = self.window / 2;
            self.window = if half < FIRST { Duration::ZERO } else { half };
        } else if slept > self.window {
            self.window = (self.window * 2).max(FIRST).min(self.limit);
        }
    }

    /// The present window.
    pub fn window(&self) -> Duration {
        self.window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);

    #[test]
    fn without_a_limit_it_never_polls() {
        let mut spinner = Spinner::new(SpinPolicy::OFF);
        spinner.woke(Duration::ZERO);
        assert!(!spinner.spin(|| panic!("polled")));
        assert_eq!(spinner.window(), Duration::ZERO);
    }

    #[test]
    fn short_sleeps_grow_the_window_to_the_limit_and_no_further() {
        let mut spinner = Spinner::new(SpinPolicy { limit: LIMIT });
        let mut last = spinner.window();
        for _ in 0..10 {
            spinner.woke(Duration::from_micros(49));
            assert!(spinner.window() >= last && spinner.window() <= LIMIT);
            last = spinner.window();
        }
        assert_eq!(last, LIMIT);
        spinner.woke(LIMIT);
        assert_eq!(spinner.window(), LIMIT, "a sleep that the window covers changes nothing");
    }

    #[test]
    fn long_sleeps_shrink_the_window_to_nothing_and_short_ones_bring_it_back() {
        let mut spinner = Spinner::new(SpinPolicy { limit: LIMIT });
        for _ in 0..10 {
            spinner.woke(LIMIT);
        }
        for _ in 0..10 {
            spinner.woke(Duration::from_millis(5));
        }
        assert_eq!(spinner.window(), Duration::ZERO);
        assert!(!spinner.spin(|| panic!("polled")));
        spinner.woke(Duration::from_micros(10));
        assert!(spinner.window() >= FIRST);
    }

    #[test]
    fn a_vain_spin_ends_after_its_window() {
        let mut spinner = Spinner::new(SpinPolicy { limit: Duration::from_millis(2) });
        for _ in 0..20 {
            spinner.woke(Duration::from_millis(2));
        }
        let start = Instant::now();
        let mut polls = 0_u64;
        assert!(!spinner.spin(|| {
            polls += 1;
            false
        }));
        assert!(start.elapsed() >= Duration::from_millis(2), "{:?}", start.elapsed());
        assert!(polls > 1);
    }

    #[test]
    fn work_ends_the_spin_at_once() {
        let mut spinner = Spinner::new(SpinPolicy { limit: LIMIT });
        let mut polls = 0;
        assert!(spinner.spin(|| {
            polls += 1;
            polls == 3
        }));
        assert_eq!(polls, 3);
    }
}
