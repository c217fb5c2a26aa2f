//! Rate limit: at most so many bytes in a period, which begins with the first byte that is handed out.
//!
//! Guests of one process get a fixed part each ([`RateLimit::share`]): what one takes or leaves is neither felt nor
//! seen by another. A reset does not start a new period, or a guest could reset its way around the limit.
use std::time::{Duration, Instant};

use crate::state::PeriodV1;

/// Longer periods are taken for this one: longer than any guest lives, and the clock does not overflow.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// A limit that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// No byte could ever be handed out.
    #[error("0 bytes per period would never answer a request; leave the limit out for none")]
    NoBytes,
    /// The period would never end, or always.
    #[error("a period of 0 ms limits nothing; give at least 1 ms")]
    NoPeriod,
    /// Some guest would get nothing at all.
    #[error("{bytes} bytes per period cannot be shared by {guests} guests; give at least {guests}")]
    TooFew {
        /// What there is to share.
        bytes: u64,
        /// Among how many.
        guests: u32,
    },
}

/// At most `bytes` in each period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    bytes: u64,
    period: Duration,
}

impl RateLimit {
    /// At most `bytes` in each `period`.
    pub fn new(bytes: u64, period: Duration) -> Result<RateLimit, LimitError> {
        match (bytes, period.is_zero()) {
            (0, _) => Err(LimitError::NoBytes),
            (_, true) => Err(LimitError::NoPeriod),
            _ => Ok(RateLimit { bytes, period: period.min(LONGEST) }),
        }
    }

    /// The part of guest `index` (from 0) of `guests`. The parts add up to the whole: the first guests get one byte
    /// more where it cannot be divided evenly.
    ///
    /// # Errors
    /// If a guest would get nothing.
    pub fn share(self, index: u32, guests: u32) -> Result<RateLimit, LimitError> {
        let count = u64::from(guests.max(1));
        if self.bytes < count {
            return Err(LimitError::TooFew { bytes: self.bytes, guests });
        }
        let one_more = u64::from(u64::from(index) < self.bytes % count);
        Ok(RateLimit { bytes: self.bytes / count + one_more, period: self.period })
    }

    /// Bytes per period.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The period.
    pub fn period(&self) -> Duration {
        self.period
    }
}

/// What is left of a limit in the current period.
pub(crate) struct Window {
    limit: RateLimit,
    left: u64,
    /// None: nothing was handed out since the last period ended.
    ends: Option<Instant>,
}

impl Window {
    pub(crate) fn new(limit: RateLimit) -> Window {
        Window { limit, left: limit.bytes, ends: None }
    }

    /// How many bytes (not 0) may be handed out now, or when to ask again.
    pub(crate) fn allowed(&mut self, now: Instant) -> Result<u64, Instant> {
        match self.ends {
            Some(end) if now >= end => *self = Window::new(self.limit),
            Some(end) if self.left == 0 => return Err(end),
            _ => {}
        }
        Ok(self.left)
    }

    /// The period goes on under another limit: what was handed out in it stays handed out.
    pub(crate) fn change(&mut self, limit: RateLimit) {
        let handed_out = self.limit.bytes.saturating_sub(self.left);
        self.left = limit.bytes.saturating_sub(handed_out);
        // Its beginning stays where it was.
        self.ends =
            self.ends.and_then(|end| end.checked_sub(self.limit.period)).map(|begin| begin + limit.period);
        self.limit = limit;
    }

    /// What another device has to know to go on in the middle of the period.
    pub(crate) fn save(&self, now: Instant) -> PeriodV1 {
        let left = |end: Instant| end.saturating_duration_since(now).as_millis();
        PeriodV1 {
            bytes: self.left,
            milliseconds: self.ends.map(|end| u64::try_from(left(end)).unwrap_or(u64::MAX)),
        }
    }

    /// Goes on in the middle of a period, but never beyond what this device may.
    pub(crate) fn restore(&mut self, period: PeriodV1, now: Instant) {
        let left = |ms| Duration::from_millis(ms).min(self.limit.period);
        self.ends = period.milliseconds.map(|ms| now + left(ms));
        // Without an end the period has not begun, and all of it is left.
        let unbegun = self.ends.is_none();
        self.left = if unbegun { self.limit.bytes } else { period.bytes.min(self.limit.bytes) };
    }

    /// Bytes were handed out.
    pub(crate) fn take(&mut self, bytes: u64, now: Instant) {
        self.left = self.left.saturating_sub(bytes);
        self.ends = self.ends.or(Some(now + self.limit.period));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_millis(10);

    #[test]
    fn the_bytes_of_a_period_are_handed_out_once() {
        let mut window = Window::new(RateLimit::new(100, PERIOD).unwrap());
        let start = Instant::now();
        assert_eq!(window.allowed(start), Ok(100));
        window.take(60, start);
        assert_eq!(window.allowed(start + PERIOD / 2), Ok(40));
        window.take(40, start + PERIOD / 2);
        assert_eq!(
            window.allowed(start + PERIOD / 2),
            Err(start + PERIOD),
            "the period began with its first byte"
        );
        assert_eq!(window.allowed(start + PERIOD), Ok(100));
        assert_eq!(window.allowed(start + 5 * PERIOD), Ok(100), "idle periods are not saved up");
    }

    #[test]
    fn a_changed_limit_forgets_nothing_that_was_handed_out() {
        let mut window = Window::new(RateLimit::new(100, PERIOD).unwrap());
        let start = Instant::now();
        window.take(60, start);
        window.change(RateLimit::new(50, PERIOD).unwrap());
        assert_eq!(window.allowed(start), Err(start + PERIOD), "more than that is gone already");
        window.change(RateLimit::new(80, 2 * PERIOD).unwrap());
        assert_eq!(window.allowed(start + PERIOD), Ok(80 - 50), "as much as was known to be handed out");
        assert_eq!(window.allowed(start + 2 * PERIOD), Ok(80));
    }

    #[test]
    fn a_saved_period_goes_on_and_a_hostile_one_is_cut_to_the_limit() {
        let limit = RateLimit::new(100, PERIOD).unwrap();
        let mut window = Window::new(limit);
        let start = Instant::now();
        window.take(60, start);
        let saved = window.save(start + PERIOD / 2);
        assert_eq!((saved.bytes, saved.milliseconds), (40, Some(5)));
        let mut other = Window::new(limit);
        other.restore(saved, start);
        other.take(40, start);
        assert_eq!(other.allowed(start), Err(start + PERIOD / 2));
        other.restore(PeriodV1 { bytes: u64::MAX, milliseconds: Some(u64::MAX) }, start);
        assert_eq!(other.allowed(start), Ok(100));
        other.take(100, start);
        assert_eq!(other.allowed(start), Err(start + PERIOD));
        // Nothing left and no end: the state of nobody. The next period begins at once.
        other.restore(PeriodV1 { bytes: 0, milliseconds: None }, start);
        assert_eq!(other.allowed(start), Ok(100));
    }

    #[test]
    fn shares_add_up_and_none_is_empty() {
        let whole = RateLimit::new(10, PERIOD).unwrap();
        let shares: Vec<u64> = (0..4).map(|i| whole.share(i, 4).unwrap().bytes()).collect();
        assert_eq!(shares, [3, 3, 2, 2]);
        assert_eq!(whole.share(0, 11), Err(LimitError::TooFew { bytes: 10, guests: 11 }));
        assert_eq!(RateLimit::new(0, PERIOD), Err(LimitError::NoBytes));
        assert_eq!(RateLimit::new(1, Duration::ZERO), Err(LimitError::NoPeriod));
    }

    #[test]
    fn a_period_beyond_the_clock_lasts() {
        let mut window = Window::new(RateLimit::new(1, Duration::MAX).unwrap());
        let now = Instant::now();
        window.take(1, now);
        assert!(window.allowed(now).is_err());
    }
}
