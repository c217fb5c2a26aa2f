//! Rate limits: so many bytes, so many operations, in a period.
//!
//! A worker that every request passes asks a [`Limiter`] before it pops, and leaves requests in the ring until the time
//! that it is told, by a timer of its lane: nothing is parked and nothing sleeps, so a stop or reset finds nothing to
//! wait for.
//!
//! * A period begins with the first thing that is taken in it. What a period leaves is gone, up to the burst: so much
//!   may be saved up by being idle, and taken at once.
//! * What is larger than all there is left may be taken all the same: later periods pay for it. So no request is too
//!   large to be ever served, and none is cut for the limit's sake unless the device wants to.
//! * Guests of one process get a fixed part each ([`RateLimit::share`]): what one takes or leaves is neither felt nor
//!   seen by another. A reset does not start a new period, or a guest could reset its way around the limit.
mod text;

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

pub use text::ParseLimitError;

/// Longer periods are taken for this one: longer than any guest lives, and the clock does not overflow.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// A limit that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Nothing could ever be taken.
    #[error("0 {0} per period would never answer a request; leave the limit out for none")]
    Nothing(&'static str),
    /// The period would never end, or always.
    #[error("a period of 0 ms limits nothing; give at least 1 ms")]
    NoPeriod,
    /// Some guest would get nothing at all.
    #[error("{amount} {what} per period cannot be shared by {guests} guests; give at least {guests}")]
    TooFew {
        /// What there is to share.
        amount: u64,
        /// Of what.
        what: &'static str,
        /// Among how many.
        guests: u32,
    },
}

/// How much there is in a period, and how much more may be saved up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rate {
    amount: u64,
    burst: u64,
}

/// At most so many bytes, so many operations, in each period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    bytes: Option<Rate>,
    operations: Option<Rate>,
    period: Duration,
}

const BYTES: &str = "bytes";
const OPERATIONS: &str = "operations";

impl RateLimit {
    /// At most `bytes` in each `period`.
    pub fn new(bytes: u64, period: Duration) -> Result<RateLimit, LimitError> {
        RateLimit { bytes: Some(rate(bytes, BYTES)?), operations: None, period }.check()
    }

    /// At most so many `operations` in each `period`.
    pub fn operations(operations: u64, period: Duration) -> Result<RateLimit, LimitError> {
        RateLimit { bytes: None, operations: Some(rate(operations, OPERATIONS)?), period }.check()
    }

    fn check(self) -> Result<RateLimit, LimitError> {
        if self.period.is_zero() {
            return Err(LimitError::NoPeriod);
        }
        Ok(RateLimit { period: self.period.min(LONGEST), ..self })
    }

    /// Limits operations, too.
    pub fn and_operations(self, operations: u64) -> Result<RateLimit, LimitError> {
        Ok(RateLimit { operations: Some(rate(operations, OPERATIONS)?), ..self })
    }

    /// The same with other `bytes` (none: they are not limited) in another `period`; the rest is as it was. None: nothing
    /// is limited any more.
    pub fn with_bytes(self, bytes: Option<u64>, period: Duration) -> Result<Option<RateLimit>, LimitError> {
        let burst = self.bytes.map_or(0, |rate| rate.burst);
        let bytes = bytes.map(|bytes| rate(bytes, BYTES)).transpose()?.map(|rate| Rate { burst, ..rate });
        let limit = RateLimit { bytes, period, ..self }.check()?;
        Ok(Some(limit).filter(|limit| limit.bytes.is_some() || limit.operations.is_some()))
    }

    /// What idle periods leave is saved up, to this many bytes and operations above those of a period.
    pub fn with_burst(self, bytes: u64, operations: u64) -> RateLimit {
        RateLimit {
            bytes: self.bytes.map(|rate| Rate { burst: bytes, ..rate }),
            operations: self.operations.map(|rate| Rate { burst: operations, ..rate }),
            ..self
        }
    }

    /// The part of guest `index` (from 0) of `guests`. The parts add up to the whole: the first guests get one more
    /// where it cannot be divided evenly.
    ///
    /// # Errors
    /// If a guest would get nothing.
    pub fn share(self, index: u32, guests: u32) -> Result<RateLimit, LimitError> {
        let count = u64::from(guests.max(1));
        let part = |amount: u64| amount / count + u64::from(u64::from(index) < amount % count);
        let divide = |rate: Option<Rate>, what| match rate {
            Some(Rate { amount, .. }) if amount < count => Err(LimitError::TooFew { amount, what, guests }),
            rate => Ok(rate.map(|rate| Rate { amount: part(rate.amount), burst: part(rate.burst) })),
        };
        let (bytes, operations) = (divide(self.bytes, BYTES)?, divide(self.operations, OPERATIONS)?);
        Ok(RateLimit { bytes, operations, ..self })
    }

    /// Bytes per period, if they are limited.
    pub fn bytes(&self) -> Option<u64> {
        self.bytes.map(|rate| rate.amount)
    }

    /// The period.
    pub fn period(&self) -> Duration {
        self.period
    }
}

fn rate(amount: u64, what: &'static str) -> Result<Rate, LimitError> {
    if amount == 0 { Err(LimitError::Nothing(what)) } else { Ok(Rate { amount, burst: 0 }) }
}

/// What may still be taken of one of both; below zero: what is owed.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    rate: Rate,
    balance: i128,
}

impl Bucket {
    fn new(rate: Rate) -> Bucket {
        Bucket { rate, balance: rate.amount.into() }
    }

    fn most(&self) -> i128 {
        i128::from(self.rate.amount) + i128::from(self.rate.burst)
    }

    fn take(&mut self, amount: u64) {
        self.balance = self.balance.saturating_sub(amount.into());
    }

    /// So many periods are over.
    fn refill(&mut self, periods: u128) {
        let income = i128::try_from(periods).unwrap_or(i128::MAX).saturating_mul(self.rate.amount.into());
        self.balance = self.balance.saturating_add(income).min(self.most());
    }

    /// After the end of how many periods something may be taken again.
    fn wait(&self) -> u128 {
        let positive = self.balance > 0;
        if positive { 0 } else { self.balance.unsigned_abs() / u128::from(self.rate.amount) + 1 }
    }

    /// Under another rate what was taken stays taken.
    fn change(&mut self, rate: Rate) {
        let taken = i128::from(self.rate.amount) - self.balance;
        *self = Bucket { rate, balance: i128::from(rate.amount).saturating_sub(taken) };
        self.balance = self.balance.min(self.most());
    }

    /// From elsewhere: not more than there can be.
    fn restore(&mut self, balance: i128) {
        self.balance = balance.clamp(-i128::from(u64::MAX), self.most());
    }
}

/// What is left of a limit. One for each guest.
#[derive(Debug)]
pub struct Limiter {
    period: Duration,
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    /// When the period ends. None: what is taken next begins one.
    ends: Option<Instant>,
}

impl Limiter {
    /// With all of a period.
    pub fn new(limit: RateLimit) -> Limiter {
        let RateLimit { bytes, operations, period } = limit;
        Limiter { period, bytes: bytes.map(Bucket::new), operations: operations.map(Bucket::new), ends: None }
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.bytes.iter_mut().chain(self.operations.iter_mut())
    }

    /// Whether an operation may begin now, and how many bytes (not 0) it can have without owing any; or when to ask
    /// again.
    pub fn allowed(&mut self, now: Instant) -> Result<u64, Instant> {
        let period = self.period;
        if let Some(end) = self.ends.filter(|end| now >= *end) {
            let over = now.duration_since(end).as_nanos();
            self.buckets().for_each(|bucket| bucket.refill(1 + over / period.as_nanos()));
            let into = u64::try_from(over % period.as_nanos()).map_or(Duration::ZERO, Duration::from_nanos);
            // With nothing to save up or to pay back, the next period begins with what is taken next.
            let full = self.buckets().all(|bucket| bucket.balance == bucket.most());
            self.ends = (!full).then(|| now + (period - into));
        }
        match self.buckets().map(|bucket| bucket.wait()).max().unwrap_or(0) {
            0 => {
                let bytes = self.bytes.map(|bucket| u64::try_from(bucket.balance).unwrap_or(u64::MAX));
                Ok(bytes.unwrap_or(u64::MAX))
            }
            periods => {
                // A period runs if something was taken. If a state from elsewhere says otherwise, it begins now.
                let end = *self.ends.get_or_insert(now + period);
                let more = u32::try_from(periods - 1).ok().and_then(|more| period.checked_mul(more));
                Err(end + more.unwrap_or(LONGEST).min(LONGEST))
            }
        }
    }

    /// An operation of so many bytes took place.
    pub fn take(&mut self, bytes: u64, now: Instant) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
        self.ends = self.ends.or(Some(now + self.period));
    }

    /// Goes on under another limit: what was taken in this period stays taken, and its beginning where it was.
    pub fn change(&mut self, limit: RateLimit) {
        let change = |bucket: &mut Option<Bucket>, rate: Option<Rate>| match (bucket.as_mut(), rate) {
            (Some(bucket), Some(rate)) => bucket.change(rate),
            (_, rate) => *bucket = rate.map(Bucket::new),
        };
        change(&mut self.bytes, limit.bytes);
        change(&mut self.operations, limit.operations);
        let begin = self.ends.and_then(|end| end.checked_sub(self.period));
        self.ends = begin.map(|begin| begin + limit.period);
        self.period = limit.period;
    }

    /// What a device elsewhere has to know to go on in the middle of the period.
    pub fn save(&self, now: Instant) -> LimiterState {
        let rest = |end: Instant| u64::try_from(end.saturating_duration_since(now).as_millis());
        LimiterState {
            bytes: self.bytes.map(|bucket| bucket.balance),
            operations: self.operations.map(|bucket| bucket.balance),
            milliseconds: self.ends.map(|end| rest(end).unwrap_or(u64::MAX)),
        }
    }

    /// Goes on in the middle of a period, but never beyond what this device may. What only one of both has limited is
    /// this one's to decide.
    pub fn restore(&mut self, state: &LimiterState, now: Instant) {
        if let (Some(bucket), Some(balance)) = (&mut self.bytes, state.bytes) {
            bucket.restore(balance);
        }
        if let (Some(bucket), Some(balance)) = (&mut self.operations, state.operations) {
            bucket.restore(balance);
        }
        self.ends = state.milliseconds.map(|ms| now + Duration::from_millis(ms).min(self.period));
    }
}

/// A [`Limiter`] as it is saved, version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimiterState {
    /// What may be taken, or is owed if below zero; if it is limited.
    pub bytes: Option<i128>,
    /// The same for operations.
    pub operations: Option<i128>,
    /// Until the period ends; none: what is taken next begins one.
    pub milliseconds: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_millis(10);

    fn bytes(bytes: u64) -> Limiter {
        Limiter::new(RateLimit::new(bytes, PERIOD).unwrap())
    }

    #[test]
    fn what_a_period_has_is_handed_out_once() {
        let mut limiter = bytes(100);
        let start = Instant::now();
        assert_eq!(limiter.allowed(start), Ok(100));
        limiter.take(60, start);
        assert_eq!(limiter.allowed(start + PERIOD / 2), Ok(40));
        limiter.take(40, start + PERIOD / 2);
        let end = start + PERIOD;
        assert_eq!(limiter.allowed(start + PERIOD / 2), Err(end), "the period began with its first byte");
        assert_eq!(limiter.allowed(end), Ok(100));
        assert_eq!(limiter.allowed(start + 5 * PERIOD), Ok(100), "idle periods are not saved up");
    }

    #[test]
    fn operations_and_bytes_are_limited_each_for_itself() {
        let limit = RateLimit::new(100, PERIOD).unwrap().and_operations(2).unwrap();
        let mut limiter = Limiter::new(limit);
        let start = Instant::now();
        limiter.take(10, start);
        assert_eq!(limiter.allowed(start), Ok(90));
        limiter.take(10, start);
        assert_eq!(limiter.allowed(start), Err(start + PERIOD), "two operations are two");
        assert_eq!(limiter.allowed(start + PERIOD), Ok(100));
        let mut limiter = Limiter::new(RateLimit::operations(1, PERIOD).unwrap());
        assert_eq!(limiter.allowed(start), Ok(u64::MAX));
        limiter.take(1 << 40, start);
        assert_eq!(limiter.allowed(start), Err(start + PERIOD));
    }

    #[test]
    fn a_burst_is_saved_up_by_being_idle_and_taken_at_once() {
        let limit = RateLimit::new(10, PERIOD).unwrap().with_burst(25, 0);
        let mut limiter = Limiter::new(limit);
        let start = Instant::now();
        limiter.take(10, start);
        assert_eq!(limiter.allowed(start), Err(start + PERIOD));
        assert_eq!(limiter.allowed(start + 2 * PERIOD), Ok(20));
        assert_eq!(limiter.allowed(start + 100 * PERIOD), Ok(35));
        limiter.take(35, start + 100 * PERIOD);
        assert!(limiter.allowed(start + 100 * PERIOD).is_err());
        assert_eq!(limiter.allowed(start + 102 * PERIOD), Ok(20));
    }

    #[test]
    fn what_is_larger_than_a_period_is_paid_for_later() {
        let mut limiter = bytes(10);
        let start = Instant::now();
        limiter.take(35, start);
        assert_eq!(limiter.allowed(start), Err(start + 3 * PERIOD));
        assert!(limiter.allowed(start + 2 * PERIOD).is_err());
        assert_eq!(limiter.allowed(start + 3 * PERIOD), Ok(5));
        limiter.take(u64::MAX, start + 3 * PERIOD);
        limiter.take(u64::MAX, start + 3 * PERIOD);
        assert!(limiter.allowed(start + 4 * PERIOD).unwrap_err() > start + LONGEST);
    }

    #[test]
    fn a_changed_limit_forgets_nothing_that_was_taken() {
        let mut limiter = bytes(100);
        let start = Instant::now();
        limiter.take(60, start);
        limiter.change(RateLimit::new(50, PERIOD).unwrap());
        assert_eq!(limiter.allowed(start), Err(start + PERIOD), "more than that is gone already");
        limiter.change(RateLimit::new(80, 2 * PERIOD).unwrap());
        assert_eq!(limiter.allowed(start + PERIOD), Ok(20));
        assert_eq!(limiter.allowed(start + 2 * PERIOD), Ok(80));
    }

    #[test]
    fn a_saved_period_goes_on_and_a_hostile_one_is_cut_to_the_limit() {
        let mut limiter = bytes(100);
        let start = Instant::now();
        limiter.take(60, start);
        let saved = limiter.save(start + PERIOD / 2);
        let expected = LimiterState { bytes: Some(40), operations: None, milliseconds: Some(5) };
        assert_eq!(saved, expected);
        let mut other = bytes(100);
        other.restore(&saved, start);
        other.take(40, start);
        assert_eq!(other.allowed(start), Err(start + PERIOD / 2));
        let rich = LimiterState { bytes: Some(i128::MAX), operations: Some(7), milliseconds: Some(u64::MAX) };
        other.restore(&rich, start);
        assert_eq!(other.allowed(start), Ok(100));
        other.take(100, start);
        assert_eq!(other.allowed(start), Err(start + PERIOD));
        // Nothing left and no end, or debts beyond all measure: it harms its own guest only, and nothing overflows.
        other.restore(&LimiterState { bytes: Some(0), operations: None, milliseconds: None }, start);
        assert_eq!(other.allowed(start), Err(start + PERIOD));
        other.restore(&LimiterState { bytes: Some(i128::MIN), operations: None, milliseconds: None }, start);
        other.take(u64::MAX, start);
        assert!(other.allowed(start + LONGEST).is_err());
    }

    #[test]
    fn shares_add_up_and_none_is_empty() {
        let whole = RateLimit::new(10, PERIOD).unwrap();
        let shares: Vec<u64> = (0..4).filter_map(|i| whole.share(i, 4).unwrap().bytes()).collect();
        assert_eq!(shares, [3, 3, 2, 2]);
        let few = LimitError::TooFew { amount: 10, what: "bytes", guests: 11 };
        assert_eq!(whole.share(0, 11), Err(few));
        assert!(whole.and_operations(2).unwrap().share(0, 3).is_err());
        assert_eq!(RateLimit::new(0, PERIOD), Err(LimitError::Nothing("bytes")));
        assert_eq!(RateLimit::new(1, Duration::ZERO), Err(LimitError::NoPeriod));
    }

    #[test]
    fn bytes_are_changed_and_the_rest_stays() {
        let limit = RateLimit::new(10, PERIOD).unwrap().and_operations(2).unwrap().with_burst(5, 6);
        let other = RateLimit::new(20, 2 * PERIOD).unwrap().and_operations(2).unwrap().with_burst(5, 6);
        assert_eq!(limit.with_bytes(Some(20), 2 * PERIOD), Ok(Some(other)));
        let operations = RateLimit::operations(2, PERIOD).unwrap().with_burst(0, 6);
        assert_eq!(limit.with_bytes(None, PERIOD), Ok(Some(operations)));
        assert_eq!(RateLimit::new(10, PERIOD).unwrap().with_bytes(None, PERIOD), Ok(None));
        assert_eq!(limit.with_bytes(Some(0), PERIOD), Err(LimitError::Nothing("bytes")));
        assert_eq!(limit.with_bytes(Some(1), Duration::ZERO), Err(LimitError::NoPeriod));
    }

    #[test]
    fn a_period_beyond_the_clock_lasts() {
        let mut limiter = Limiter::new(RateLimit::new(1, Duration::MAX).unwrap());
        let now = Instant::now();
        limiter.take(1, now);
        assert!(limiter.allowed(now).is_err());
    }
}
