//! Counters as Prometheus text (exposition format 0.0.4). A pure function of reports, so that a client can put those of
//! several daemons into one text: a metric is described once.
use std::fmt::{self, Write};

use super::report::{GuestStats, QueueStats, Stats};

/// A report, and the labels that tell it from others.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// Names (letters, digits, `_`) and values.
    pub labels: Vec<(&'static str, String)>,
    /// The report.
    pub stats: &'a Stats,
}

/// One text of all reports.
pub fn render(sources: &[Source<'_>]) -> String {
    let mut text = Text { out: String::new(), sources };
    text.process();
    text.guests();
    text.queues();
    text.latency();
    text.out
}

struct Text<'a> {
    out: String,
    sources: &'a [Source<'a>],
}

type Labels<'a> = Vec<(&'static str, &'a dyn fmt::Display)>;

/// A metric of guests or queues: name, type, help, and its value.
type Metric<T> = (&'static str, &'static str, &'static str, fn(&T) -> u64);

const GUEST: &[Metric<GuestStats>] = &[
    ("guest_connected", "gauge", "Whether a front-end is connected", |guest| guest.connected.into()),
    ("guest_needs_reset", "gauge", "Whether the device needs a reset", |guest| guest.needs_reset.into()),
    ("guest_connects_total", "counter", "Front-ends that connected", |guest| guest.connects),
    ("guest_messages_total", "counter", "Messages of front-ends", |guest| guest.messages),
    ("guest_messages_refused_total", "counter", "Messages that were refused", |guest| guest.messages_refused),
];

const QUEUE: &[Metric<QueueStats>] = &[
    ("queue_requests_total", "counter", "Requests taken from the queue", |queue| queue.requests),
    ("queue_completed_total", "counter", "Requests given back to the driver", |queue| queue.completed),
    ("queue_read_bytes_total", "counter", "Bytes read from requests", |queue| queue.bytes_read),
    ("queue_written_bytes_total", "counter", "Bytes written for the driver", |queue| queue.bytes_written),
    ("queue_kicks_total", "counter", "Notifications of the driver", |queue| queue.kicks),
    ("queue_interrupts_total", "counter", "Notifications sent to the driver", |queue| queue.interrupts),
    ("queue_turns_total", "counter", "Turns in which the queue was served", |queue| queue.turns),
    ("queue_out", "gauge", "Requests that the device has now", |queue| queue.out),
    ("queue_most_at_once", "gauge", "Most requests that the device has had in one turn", |queue| {
        queue.most_at_once
    }),
];

impl Text<'_> {
    fn describe(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = write!(self.out, "# HELP {name} {help}.\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &Labels<'_>, value: impl fmt::Display) {
        self.out.push_str(name);
        for (i, (label, value)) in labels.iter().enumerate() {
            self.out.push(if i == 0 { '{' } else { ',' });
            let _ = write!(self.out, "{label}=\"{}\"", Escaped(&value.to_string()));
        }
        if !labels.is_empty() {
            self.out.push('}');
        }
        let _ = writeln!(self.out, " {value}");
    }

    fn process(&mut self) {
        let sources = self.sources;
        self.describe("backplane_build_info", "gauge", "Program and version");
        for source in sources {
            let version = &source.stats.version;
            let mut labels = own(source);
            labels.push(("version", &version.version));
            self.sample("backplane_build_info", &labels, 1);
        }
        self.describe("process_start_time_seconds", "gauge", "When the process began, since 1970");
        for source in sources {
            self.sample("process_start_time_seconds", &own(source), source.stats.process.started_s);
        }
        self.describe("process_resident_memory_bytes", "gauge", "Resident memory");
        for source in sources {
            if let Some(bytes) = source.stats.process.resident_bytes {
                self.sample("process_resident_memory_bytes", &own(source), bytes);
            }
        }
        let name = "backplane_log_lines_suppressed_total";
        self.describe(name, "counter", "Log lines that were too many of their kind");
        for source in sources {
            self.sample(name, &own(source), source.stats.process.log_lines_suppressed);
        }
    }

    fn guests(&mut self) {
        let sources = self.sources;
        for (name, kind, help, value) in GUEST {
            let name = format!("backplane_{name}");
            self.describe(&name, kind, help);
            for (source, guest) in guests(sources) {
                self.sample(&name, &of_guest(source, guest), value(guest));
            }
        }
        let name = "backplane_failures_total";
        self.describe(name, "counter", "Failures, by who failed");
        for (source, guest) in guests(sources) {
            for (who, count) in guest.failures.by_name() {
                let mut labels = of_guest(source, guest);
                labels.push(("who", &who));
                self.sample(name, &labels, count);
            }
        }
    }

    fn queues(&mut self) {
        let sources = self.sources;
        for (name, kind, help, value) in QUEUE {
            let name = format!("backplane_{name}");
            self.describe(&name, kind, help);
            for (source, guest, queue) in queues(sources) {
                self.sample(&name, &of_queue(source, guest, queue), value(queue));
            }
        }
        let name = "backplane_queue_errors_total";
        self.describe(name, "counter", "What went wrong on the queue, by kind");
        for (source, guest, queue) in queues(sources) {
            for (kind, count) in queue.errors.by_name() {
                let mut labels = of_queue(source, guest, queue);
                labels.push(("kind", &kind));
                self.sample(name, &labels, count);
            }
        }
    }

    fn latency(&mut self) {
        let sources = self.sources;
        let name = "backplane_queue_request_seconds";
        self.describe(name, "histogram", "Time of requests from pop to completion, sampled");
        for (source, guest, queue) in queues(sources) {
            let latency = &queue.latency;
            let mut so_far = 0;
            for (at, count) in latency.buckets.iter().enumerate() {
                so_far += count;
                let end = latency.bounds_us.get(at).map(|us| (*us as f64 / 1e6).to_string());
                let end = end.unwrap_or_else(|| "+Inf".into());
                let mut labels = of_queue(source, guest, queue);
                labels.push(("le", &end));
                self.sample(&format!("{name}_bucket"), &labels, so_far);
            }
            let labels = of_queue(source, guest, queue);
            self.sample(&format!("{name}_sum"), &labels, latency.sum_ns as f64 / 1e9);
            self.sample(&format!("{name}_count"), &labels, so_far);
        }
    }
}

fn guests<'a>(sources: &'a [Source<'a>]) -> impl Iterator<Item = (&'a Source<'a>, &'a GuestStats)> {
    sources.iter().flat_map(|source| source.stats.guests.iter().map(move |guest| (source, guest)))
}

fn queues<'a>(
    sources: &'a [Source<'a>],
) -> impl Iterator<Item = (&'a Source<'a>, &'a GuestStats, &'a QueueStats)> {
    guests(sources).flat_map(|(source, guest)| guest.queues.iter().map(move |queue| (source, guest, queue)))
}

fn own<'a>(source: &'a Source<'a>) -> Labels<'a> {
    let mut labels: Labels<'a> = vec![("daemon", &source.stats.version.name)];
    labels.extend(source.labels.iter().map(|(name, value)| (*name, value as &dyn fmt::Display)));
    labels
}

fn of_guest<'a>(source: &'a Source<'a>, guest: &'a GuestStats) -> Labels<'a> {
    let mut labels = own(source);
    labels.push(("guest", &guest.guest));
    labels
}

fn of_queue<'a>(source: &'a Source<'a>, guest: &'a GuestStats, queue: &'a QueueStats) -> Labels<'a> {
    let mut labels = of_guest(source, guest);
    labels.push(("queue", &queue.queue));
    labels.push(("name", &queue.name));
    labels
}

/// A label's value between its quotes.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_of_several_daemons_is_described_once_and_labels_are_escaped() {
        let mut stats = Stats { guests: vec![GuestStats::default()], ..Stats::default() };
        stats.version.name = "a\"b\\c\nd".into();
        let sources = [
            Source { labels: vec![("socket", "/x".into())], stats: &stats },
            Source { labels: vec![("socket", "/y".into())], stats: &stats },
        ];
        let text = render(&sources);
        assert_eq!(text.matches("# TYPE backplane_guest_connects_total counter\n").count(), 1);
        for path in ["/x", "/y"] {
            let sample = format!(
                "backplane_guest_connects_total{{daemon=\"a\\\"b\\\\c\\nd\",socket=\"{path}\",guest=\"0\"}} 0\n"
            );
            assert!(text.contains(&sample), "{text}");
        }
    }
}
