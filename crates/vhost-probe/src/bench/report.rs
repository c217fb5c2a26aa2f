//! What was measured, as a table and as JSON.
//!
//! Medians of rounds with the smallest and largest beside them; a ratio is the median of the ratios of rounds that ran
//! beside each other. Latencies are of all rounds together.
use std::fmt::Write;

use serde::Serialize;
use virtio_testkit::RingLayout;
use virtio_testkit::load::{Histogram, LoadError, Placement, Round};

/// What was asked of everybody.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) kind: String,
    pub(crate) layout: RingLayout,
    pub(crate) placement: Placement,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) size: u32,
}

impl Case {
    pub(crate) fn title(&self) -> String {
        let Case { kind, layout, placement, queues, depth, size } = self;
        let (layout, placement) = (layout_name(*layout), placement_name(*placement));
        let queues = if *queues == 1 { String::new() } else { format!("{queues} queues, ") };
        format!("{kind}, {layout}, {placement}, {queues}depth {depth}, {size} bytes")
    }
}

fn layout_name(layout: RingLayout) -> &'static str {
    match layout {
        RingLayout::Split => "split",
        RingLayout::Packed => "packed",
    }
}

fn placement_name(placement: Placement) -> &'static str {
    match placement {
        Placement::Same => "same CPU",
        Placement::Cross => "two CPUs",
    }
}

/// How one contender did in a case.
pub(crate) enum Outcome {
    /// The rounds, and the resident memory at the end in KiB.
    Measured(Vec<Round>, u64),
    NotOffered(String),
    Failed(String),
}

impl Outcome {
    /// `ended`: the resident memory, in KiB.
    pub(crate) fn new(ended: Result<u64, LoadError>, rounds: Vec<Round>) -> Outcome {
        match ended {
            Ok(resident) => Outcome::Measured(rounds, resident),
            Err(error @ LoadError::NotOffered(_)) => Outcome::NotOffered(error.to_string()),
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }

    fn rounds(&self) -> &[Round] {
        match self {
            Outcome::Measured(rounds, _) => rounds,
            _ => &[],
        }
    }
}

/// Median, smallest and largest.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |at: usize| values.get(at).copied().unwrap_or(0.0);
        let (middle, even) = (values.len() / 2, values.len().is_multiple_of(2));
        let median = if even { (at(middle.saturating_sub(1)) + at(middle)) / 2.0 } else { at(middle) };
        Spread { median, least: at(0), most: at(values.len().saturating_sub(1)) }
    }

    /// Half the range, in percent of the median.
    fn percent(&self) -> f64 {
        if self.median > 0.0 { 50.0 * (self.most - self.least) / self.median } else { 0.0 }
    }
}

/// The figures of one contender.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) name: String,
    /// Why there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) measured: Option<Measured>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Measured {
    pub(crate) requests_per_second: Spread,
    pub(crate) megabytes_per_second: Spread,
    /// Time of a request beside that of the floor: 1.10 is ten percent more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) time_to_floor: Option<Spread>,
    pub(crate) backend_cpu_us_per_request: Spread,
    /// The driver's and the back-end's: what a request takes on one CPU if nobody else is on it.
    pub(crate) cpu_us_per_request: Spread,
    pub(crate) kicks_per_request: f64,
    pub(crate) interrupts_per_request: f64,
    /// Of the back-end at the end, without the guest's memory.
    pub(crate) resident_kib: u64,
    pub(crate) requests: u64,
    pub(crate) latency_us: Latency,
    /// Smallest latency of each bucket in nanoseconds, and how many requests were in it.
    histogram_ns: Vec<(u64, u64)>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    p90: f64,
    pub(crate) p99: f64,
    p999: f64,
    max: f64,
}

#[derive(Serialize)]
pub(crate) struct CaseFigures {
    pub(crate) case: String,
    load: String,
    layout: &'static str,
    placement: &'static str,
    queues: u16,
    depth: u16,
    size: u32,
    pub(crate) contenders: Vec<Figures>,
}

/// Everything.
#[derive(Serialize)]
pub(crate) struct Report {
    /// Of this format.
    version: u32,
    pub(crate) cases: Vec<CaseFigures>,
    #[serde(skip)]
    names: Vec<String>,
    /// The name of whom the others are compared with.
    #[serde(skip)]
    floor: &'static str,
    #[serde(skip)]
    all_stood: bool,
}

impl Report {
    pub(crate) fn new(names: Vec<String>, floor: &'static str) -> Report {
        Report { version: 1, cases: Vec::new(), names, floor, all_stood: true }
    }

    pub(crate) fn add(&mut self, case: Case, outcomes: Vec<Outcome>) {
        self.all_stood &= !outcomes.iter().any(|outcome| matches!(outcome, Outcome::Failed(_)));
        let floor = self.names.iter().position(|name| name == self.floor);
        let floor = floor.and_then(|at| outcomes.get(at)).map_or(&[][..], Outcome::rounds);
        let contenders = self.names.iter().zip(&outcomes);
        let contenders =
            contenders.map(|(name, outcome)| Figures::of(name.clone(), outcome, floor)).collect();
        self.cases.push(CaseFigures {
            case: case.title(),
            load: case.kind,
            layout: layout_name(case.layout),
            placement: placement_name(case.placement),
            queues: case.queues,
            depth: case.depth,
            size: case.size,
            contenders,
        });
    }

    /// Whether nobody failed.
    pub(crate) fn all_stood(&self) -> bool {
        self.all_stood
    }

    pub(crate) fn json(&self) -> String {
        // Only maps with keys that are no strings can fail.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The case that was added last.
    pub(crate) fn last_table(&self) -> String {
        self.cases.last().map(table).unwrap_or_default()
    }
}

impl Figures {
    fn of(name: String, outcome: &Outcome, floor: &[Round]) -> Figures {
        let error = match outcome {
            Outcome::Measured(rounds, resident_kib) => {
                let measured = Some(Measured::of(rounds, floor, *resident_kib));
                return Figures { name, error: None, measured };
            }
            Outcome::NotOffered(text) => text.clone(),
            Outcome::Failed(text) => format!("FAILED: {text}"),
        };
        Figures { name, error: Some(error), measured: None }
    }
}

impl Measured {
    fn of(rounds: &[Round], floor: &[Round], resident_kib: u64) -> Measured {
        let mut latency = Histogram::default();
        rounds.iter().for_each(|round| latency.merge(&round.latency));
        let us = |part: f64| latency.percentile(part).as_secs_f64() * 1e6;
        let requests: u64 = rounds.iter().map(|round| round.requests).sum();
        let each = |sum: u64| sum as f64 / (requests as f64).max(1.0);
        let pairs = rounds.iter().zip(floor);
        Measured {
            requests_per_second: Spread::of(rounds.iter().map(Round::rate)),
            megabytes_per_second: Spread::of(
                rounds.iter().map(|r| r.bytes as f64 / 1e6 / r.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)),
            ),
            time_to_floor: (!floor.is_empty()).then(|| Spread::of(pairs.map(|(r, f)| f.rate() / r.rate()))),
            backend_cpu_us_per_request: Spread::of(rounds.iter().map(Round::backend_us)),
            cpu_us_per_request: Spread::of(rounds.iter().map(Round::both_us)),
            kicks_per_request: each(rounds.iter().map(|round| round.kicks).sum()),
            interrupts_per_request: each(rounds.iter().map(|round| round.interrupts).sum()),
            resident_kib,
            requests,
            latency_us: Latency {
                p50: us(0.5),
                p90: us(0.9),
                p99: us(0.99),
                p999: us(0.999),
                max: latency.longest().as_secs_f64() * 1e6,
            },
            histogram_ns: latency.buckets().collect(),
        }
    }
}

fn table(figures: &CaseFigures) -> String {
    let mut text = format!("\n{}\n", figures.case);
    let width = figures.contenders.iter().map(|c| c.name.len()).max().unwrap_or(0).max(10);
    let _ = writeln!(
        text,
        "  {:width$} {:>9} {:>5} {:>8} {:>9} {:>7} {:>7} {:>8} {:>7} {:>7} {:>7} {:>6} {:>6} {:>6}",
        "",
        "req/s",
        "+-%",
        "x floor",
        "MB/s",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "BE us",
        "BE +-%",
        "CPU us",
        "kicks",
        "intrs",
        "MiB"
    );
    for Figures { name, error, measured } in &figures.contenders {
        let Some(m) = measured else {
            let _ = writeln!(text, "  {name:width$} {}", error.as_deref().unwrap_or("no figures"));
            continue;
        };
        let ratio = m.time_to_floor.map_or("-".to_owned(), |ratio| format!("{:.3}", ratio.median));
        let _ = writeln!(
            text,
            "  {name:width$} {:>9.0} {:>5.1} {ratio:>8} {:>9.1} {:>7.1} {:>7.1} {:>8.1} {:>7.2} {:>7.1} {:>7.2} {:>6.2} {:>6.2} {:>6.1}",
            m.requests_per_second.median,
            m.requests_per_second.percent(),
            m.megabytes_per_second.median,
            m.latency_us.p50,
            m.latency_us.p99,
            m.latency_us.p999,
            m.backend_cpu_us_per_request.median,
            m.backend_cpu_us_per_request.percent(),
            m.cpu_us_per_request.median,
            m.kicks_per_request,
            m.interrupts_per_request,
            m.resident_kib as f64 / 1024.0,
        );
    }
    text
}
