//! What is told of the process, its guests and their queues.
use serde::{Deserialize, Serialize};

use crate::logging::LogLevel;

/// Who a daemon is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of the protocol: [`PROTOCOL`](super::protocol::PROTOCOL).
    pub protocol: u32,
    /// Name of the program.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// How the process is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// How long it has been there, in milliseconds.
    pub uptime_ms: u64,
    /// When it began, in seconds since 1970.
    pub started_s: u64,
    /// Resident memory in bytes; none if the system does not say.
    pub resident_bytes: Option<u64>,
    /// How much is logged.
    pub log_level: LogLevel,
    /// Lines that were not logged because there were too many of their kind.
    pub log_lines_suppressed: u64,
}

/// Reply to [`Request::Status`](super::protocol::Request::Status).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Who answers.
    pub version: Version,
    /// How the process is.
    pub process: Process,
    /// How guests are.
    pub guests: Vec<GuestStatus>,
}

/// How one guest is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Its number.
    pub guest: u32,
    /// The socket for its front-end, if it was made by path.
    pub socket: Option<String>,
    /// Type of the device.
    pub device: String,
    /// Whether a front-end is there.
    pub connected: bool,
    /// Bits of the status field.
    pub status: Vec<String>,
    /// Whether the device needs a reset.
    pub needs_reset: bool,
    /// Why it needed one last.
    #[serde(default)]
    pub last_failure: Option<String>,
    /// Features that are offered.
    pub offered: Vec<String>,
    /// Features that the driver chose.
    pub negotiated: Vec<String>,
}

/// Reply to [`Request::Stats`](super::protocol::Request::Stats). Counters begin with the process and never go
/// backwards.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Who answers.
    pub version: Version,
    /// How the process is.
    pub process: Process,
    /// What happened to guests.
    pub guests: Vec<GuestStats>,
}

/// What happened to one guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Its number.
    pub guest: u32,
    /// Whether a front-end is there.
    pub connected: bool,
    /// Whether the device needs a reset.
    pub needs_reset: bool,
    /// Front-ends that connected.
    pub connects: u64,
    /// Messages of front-ends, refused ones included.
    pub messages: u64,
    /// Messages that were refused.
    pub messages_refused: u64,
    /// Connections that ended because of an error.
    pub connections_broken: u64,
    /// Front-ends that were turned away because there was one already.
    pub turned_away: u64,
    /// Failures, by who failed.
    pub failures: Failures,
    /// By queue.
    pub queues: Vec<QueueStats>,
}

/// Failures by the rules of the failure policy (ARCHITECTURE.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Failures {
    /// 1: rings whose rules the driver broke.
    pub ring: u64,
    /// 2: requests that made no sense.
    pub request: u64,
    /// 3: requests that the backend failed.
    pub backend: u64,
    /// 4: messages refused, connections broken, front-ends turned away.
    pub front_end: u64,
    /// 5: errors and panics of workers and devices.
    pub worker: u64,
    /// 6: queues whose memory was lost.
    #[serde(default)]
    pub memory: u64,
    /// 7: stops that ended with requests still out, and translations of an IOMMU that went while requests had them.
    pub stuck: u64,
}

impl Failures {
    /// Each with its name.
    pub fn by_name(&self) -> [(&'static str, u64); 7] {
        let Failures { ring, request, backend, front_end, worker, memory, stuck } = *self;
        [
            ("ring", ring),
            ("request", request),
            ("backend", backend),
            ("front-end", front_end),
            ("worker", worker),
            ("memory", memory),
            ("stuck", stuck),
        ]
    }
}

/// What happened on one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStats {
    /// Its number.
    pub queue: u16,
    /// Its name.
    pub name: String,
    /// Requests taken.
    pub requests: u64,
    /// Requests given back.
    pub completed: u64,
    /// Bytes that the device says it read from requests.
    pub bytes_read: u64,
    /// Bytes written into requests that were given back.
    pub bytes_written: u64,
    /// Notifications of the driver that arrived; several that come at once are one.
    pub kicks: u64,
    /// Notifications sent to the driver.
    pub interrupts: u64,
    /// Turns in which the queue was served.
    pub turns: u64,
    /// Requests that the device has now.
    pub out: u64,
    /// Most requests that the device has had within one turn.
    pub most_at_once: u64,
    /// By kind.
    pub errors: QueueErrors,
    /// Time of requests, sampled.
    pub latency: Latency,
}

/// What went wrong on a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueErrors {
    /// Times that the driver broke the rules of the ring.
    pub ring: u64,
    /// Requests that made no sense.
    pub refused: u64,
    /// Requests that the backend failed.
    pub failed: u64,
    /// Requests that the device lost, given back with length 0.
    pub swept: u64,
    /// Requests that were given up in a reset.
    pub discarded: u64,
    /// Completions that were longer than the request, cut.
    pub clamped: u64,
    /// Requests of another queue, refused.
    pub foreign: u64,
}

impl QueueErrors {
    /// Each with its name.
    pub fn by_name(&self) -> [(&'static str, u64); 7] {
        let QueueErrors { ring, refused, failed, swept, discarded, clamped, foreign } = *self;
        [
            ("ring", ring),
            ("refused", refused),
            ("failed", failed),
            ("swept", swept),
            ("discarded", discarded),
            ("clamped", clamped),
            ("foreign", foreign),
        ]
    }
}

/// Times of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Upper ends of the buckets in microseconds, exclusive; the last bucket has none.
    pub bounds_us: Vec<u64>,
    /// Requests in each bucket: one more than bounds.
    pub buckets: Vec<u64>,
    /// Sum of all times in nanoseconds.
    pub sum_ns: u64,
    /// The longest that was seen, in nanoseconds.
    pub max_ns: u64,
}

impl Latency {
    /// The upper end, in microseconds, of the bucket that the given part (0 to 1) of requests lies within: at most twice
    /// too long. None without requests, and for the bucket without an end.
    pub fn quantile_us(&self, part: f64) -> Option<u64> {
        let total: u64 = self.buckets.iter().sum();
        let wanted = (total as f64 * part).ceil().max(1.0);
        let mut so_far = 0;
        let at = self.buckets.iter().position(|count| {
            so_far += count;
            so_far as f64 >= wanted
        })?;
        self.bounds_us.get(at).copied()
    }

    /// What was added since an earlier report; the longest stays that of all time.
    pub fn since(&self, earlier: &Latency) -> Latency {
        let mut news = self.clone();
        for (now, before) in news.buckets.iter_mut().zip(&earlier.buckets) {
            *now = now.saturating_sub(*before);
        }
        news.sum_ns = news.sum_ns.saturating_sub(earlier.sum_ns);
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_ends_of_buckets() {
        let latency = Latency { bounds_us: vec![1, 2, 4], buckets: vec![10, 80, 9, 1], ..Latency::default() };
        assert_eq!(latency.quantile_us(0.0), Some(1));
        assert_eq!(latency.quantile_us(0.1), Some(1));
        assert_eq!(latency.quantile_us(0.5), Some(2));
        assert_eq!(latency.quantile_us(0.99), Some(4));
        assert_eq!(latency.quantile_us(1.0), None, "it has no end");
        assert_eq!(Latency::default().quantile_us(0.5), None);
    }
}
