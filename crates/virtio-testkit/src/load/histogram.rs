//! Latencies in buckets that widen with their value: an error of 3 % at most, a fixed amount of memory.
use std::time::Duration;

/// Buckets in each power of two.
const FINE: u32 = 32;
const BUCKETS: usize = (FINE * (65 - FINE.ilog2())) as usize;

/// How often something took how long, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    longest: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: vec![0; BUCKETS], total: 0, longest: 0 }
    }
}

/// Values below `FINE` have a bucket each; above, the highest bits tell the power of two and the part of it.
fn bucket(value: u64) -> usize {
    let power = value.max(1).ilog2().saturating_sub(FINE.ilog2());
    (u64::from(power * FINE) + (value >> power)) as usize
}

/// The smallest value of a bucket.
fn start(bucket: usize) -> u64 {
    let (bucket, fine) = (bucket as u64, u64::from(FINE));
    let power = (bucket / fine).saturating_sub(1);
    (bucket - power * fine) << power
}

impl Histogram {
    /// Counts one.
    pub fn add(&mut self, took: Duration) {
        let value = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get_mut(bucket(value)) {
            *count += 1;
        }
        self.total += 1;
        self.longest = self.longest.max(value);
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
        self.longest = self.longest.max(other.longest);
    }

    /// How many were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The time that this part (0 to 1) of all did not exceed. Zero if nothing was counted.
    pub fn percentile(&self, part: f64) -> Duration {
        let rank = ((self.total as f64 * part).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(
                    start(at).midpoint(start(at + 1).max(start(at))).min(self.longest),
                );
            }
        }
        Duration::ZERO
    }

    /// The longest.
    pub fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest)
    }

    /// The buckets that are not empty: the smallest value of each, in nanoseconds, and how often it was met.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(at, count)| (start(at), *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_its_bucket_and_buckets_are_narrow() {
        for shift in 0..64 {
            for value in [1u64 << shift, (1 << shift) | 1, ((1u64 << shift) - 1) | (1 << shift), u64::MAX] {
                let at = bucket(value);
                assert!(at < BUCKETS, "{value}");
                assert!(start(at) <= value, "{value} in {at}");
                if at + 1 < BUCKETS {
                    assert!(value < start(at + 1), "{value} in {at}");
                    assert!(start(at + 1) - start(at) <= 1 + start(at) / u64::from(FINE));
                }
            }
        }
        assert!((0..BUCKETS).all(|at| bucket(start(at)) == at));
    }

    #[test]
    fn percentiles_are_those_of_the_sorted_values() {
        let mut all = Histogram::default();
        assert_eq!(all.percentile(0.5), Duration::ZERO);
        let mut odd = Histogram::default();
        for n in 1..=1000u64 {
            let part = if n % 2 == 0 { &mut all } else { &mut odd };
            part.add(Duration::from_micros(n));
        }
        all.merge(&odd);
        assert_eq!(all.total(), 1000);
        for (part, us) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0), (0.0, 1.0)] {
            let found = all.percentile(part).as_secs_f64() * 1e6;
            assert!((found / us - 1.0).abs() < 0.04, "{part}: {found}");
        }
        assert_eq!(all.longest(), Duration::from_micros(1000));
        assert_eq!(all.buckets().map(|(_, count)| count).sum::<u64>(), 1000);
    }
}
