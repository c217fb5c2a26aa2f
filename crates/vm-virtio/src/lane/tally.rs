//! What happened on each queue since the device was made, for whoever operates it.
//!
//! The lane that serves a queue is the only writer of its [`QueueTotals`], which lie on cache lines of their own: plain
//! stores at the end of a turn in which something happened, nothing per request. Totals go on when a queue is stopped
//! and started again, and never go backwards.
//!
//! Latency is sampled, because a look at the clock costs as much as two requests. One turn in [`EVERY`] looks: a sample
//! is the time from the beginning of such a turn until as many requests have ended as had been popped by its end. It
//! stands for all requests that ended since the sample before. Where requests end in another order than they came, the
//! mean is right all the same (which request a time is counted for does not change the sum), and the distribution is an
//! approximation.
use crate::Queue;
use crate::queue::QueueCounters;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One turn in so many looks at the clock.
const EVERY: u32 = 8;

/// Buckets of the latency histogram: the first is for less than a microsecond, each next one reaches twice as far, the
/// last one has no end.
pub const LATENCY_BUCKETS: usize = 24;

/// Totals of one queue, as its lane writes them.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct QueueTotals {
    requests: [AtomicU64; QueueCounters::COUNT],
    kicks: AtomicU64,
    interrupts: AtomicU64,
    turns: AtomicU64,
    faults: AtomicU64,
    out: AtomicU64,
    most_at_once: AtomicU64,
    latency_sum: AtomicU64,
    latency_max: AtomicU64,
    latency: [AtomicU64; LATENCY_BUCKETS],
}

/// Totals of one queue since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// What the queue itself counts.
    pub requests: QueueCounters,
    /// Notifications of the driver that arrived; several that come at once are one.
    pub kicks: u64,
    /// Notifications sent to the driver.
    pub interrupts: u64,
    /// Turns of the lane in which the queue was served.
    pub turns: u64,
    /// Times that the driver broke the rules of the ring.
    pub faults: u64,
    /// Requests that the device has now.
    pub out: u64,
    /// Most requests that the device has had within one turn.
    pub most_at_once: u64,
    /// Time of requests from pop to completion.
    pub latency: Latency,
}

/// Times of requests, sampled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Requests by their time: bucket `i` is for less than 2^i microseconds and at least half of that, the last one for
    /// all that is longer.
    pub buckets: [u64; LATENCY_BUCKETS],
    /// Sum of the times, in nanoseconds.
    pub sum: u64,
    /// The longest that was seen, in nanoseconds.
    pub max: u64,
}

impl Latency {
    /// How many requests the samples stand for.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Where bucket `i` ends, exclusively; none for the last one.
    pub fn bound(bucket: usize) -> Option<Duration> {
        (bucket + 1 < LATENCY_BUCKETS).then(|| Duration::from_micros(1 << bucket))
    }

    fn bucket(nanos: u64) -> usize {
        let micros = nanos / 1000;
        ((u64::BITS - micros.leading_zeros()) as usize).min(LATENCY_BUCKETS - 1)
    }
}

/// The one writer's addition: no locked instruction.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// The one writer's new value, unless it would go backwards: a device may put back what it popped in an earlier turn.
fn raise(counter: &AtomicU64, value: u64) {
    if value > counter.load(Ordering::Relaxed) {
        counter.store(value, Ordering::Relaxed);
    }
}

impl QueueTotals {
    pub(crate) fn stats(&self) -> QueueStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut latency =
            Latency { sum: get(&self.latency_sum), max: get(&self.latency_max), ..Latency::default() };
        for (bucket, count) in latency.buckets.iter_mut().zip(&self.latency) {
            *bucket = get(count);
        }
        QueueStats {
            requests: QueueCounters::from_array(self.requests.each_ref().map(get)),
            kicks: get(&self.kicks),
            interrupts: get(&self.interrupts),
            turns: get(&self.turns),
            faults: get(&self.faults),
            out: get(&self.out),
            most_at_once: get(&self.most_at_once),
            latency,
        }
    }

    fn count(&self, before: &QueueCounters, now: &QueueCounters) {
        for ((total, before), now) in self.requests.iter().zip(before.to_array()).zip(now.to_array()) {
            raise(total, before + now);
        }
    }

    fn sample(&self, time: Duration, stands_for: u64) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.latency.get(Latency::bucket(nanos)) {
            add(bucket, stands_for);
        }
        add(&self.latency_sum, nanos.saturating_mul(stands_for));
        raise(&self.latency_max, nanos);
    }
}

/// The lane's side: what it needs to keep [`QueueTotals`] up to date.
#[derive(Default)]
pub(super) struct Tally {
    totals: Arc<QueueTotals>,
    /// What the queues of this number counted that are stopped.
    before: QueueCounters,
    /// What the present one had counted when it was looked at last.
    seen: QueueCounters,
    turn: u32,
    /// The turn under way looks at the clock.
    began: Option<Instant>,
    /// A sample under way: over when so many requests of the present queue have ended.
    sample: Option<(u64, Instant)>,
    /// Requests that ended since the last sample.
    unsampled: u64,
}

impl Tally {
    pub(super) fn new(totals: Arc<QueueTotals>) -> Tally {
        Tally { totals, ..Tally::default() }
    }

    pub(super) fn kicked(&self) {
        add(&self.totals.kicks, 1);
    }

    pub(super) fn interrupted(&self) {
        add(&self.totals.interrupts, 1);
    }

    pub(super) fn faulted(&self) {
        add(&self.totals.faults, 1);
    }

    /// The queue is about to be served.
    pub(super) fn begin(&mut self) {
        add(&self.totals.turns, 1);
        if self.turn.is_multiple_of(EVERY) && self.sample.is_none() {
            self.began = Some(Instant::now());
        }
        self.turn = self.turn.wrapping_add(1);
    }

    /// The end of a turn.
    pub(super) fn count(&mut self, queue: &Queue) {
        let began = self.began.take();
        let now = queue.counters();
        let new = now.popped.saturating_sub(self.seen.popped);
        if began.is_some() && new == 0 {
            // It looked in vain: the next one looks.
            self.turn = 0;
        }
        if now == self.seen {
            return;
        }
        let was = std::mem::replace(&mut self.seen, now);
        self.totals.count(&self.before, &now);
        let out = queue.out();
        // What was there at the end of the last turn, and what came in this one.
        raise(&self.totals.most_at_once, self.totals.out.load(Ordering::Relaxed) + new);
        self.totals.out.store(out, Ordering::Relaxed);

        self.unsampled += now.ended().saturating_sub(was.ended());
        if let (None, Some(began), 1..) = (self.sample, began, new) {
            self.sample = Some((now.ended() + out, began));
        }
        if let Some((_, began)) = self.sample.take_if(|(target, _)| now.ended() >= *target) {
            self.totals.sample(began.elapsed(), std::mem::take(&mut self.unsampled));
        }
    }

    /// The queue is stopped: what it counted stays, the next one begins at 0.
    pub(super) fn stopped(&mut self, queue: &Queue) {
        self.count(queue);
        let seen = std::mem::take(&mut self.seen).to_array();
        let mut total = self.before.to_array();
        total.iter_mut().zip(seen).for_each(|(total, seen)| *total += seen);
        self.before = QueueCounters::from_array(total);
        self.sample = None;
        self.unsampled = 0;
        self.totals.out.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_has_its_bucket() {
        for (nanos, bucket) in [(0, 0), (999, 0), (1000, 1), (1999, 1), (2000, 2), (4000, 3), (u64::MAX, 23)]
        {
            assert_eq!(Latency::bucket(nanos), bucket, "{nanos}");
            let time = Duration::from_nanos(nanos);
            assert!(Latency::bound(bucket).is_none_or(|bound| time < bound), "{nanos}");
            assert!(bucket == 0 || Latency::bound(bucket - 1).is_some_and(|bound| time >= bound), "{nanos}");
        }
    }

    #[test]
    fn samples_stand_for_all_requests_and_the_longest_is_kept() {
        let totals = QueueTotals::default();
        totals.sample(Duration::from_micros(3), 7);
        totals.sample(Duration::from_millis(5), 1);
        let latency = totals.stats().latency;
        assert_eq!((latency.count(), latency.sum, latency.max), (8, 5_021_000, 5_000_000));
        assert_eq!(latency.buckets[2], 7);
    }

    #[test]
    fn totals_do_not_share_cache_lines() {
        assert_eq!((align_of::<QueueTotals>(), size_of::<QueueTotals>() % 128), (128, 0));
    }
}
