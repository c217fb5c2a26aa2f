//! What was measured, as a table and as JSON.
//!
//! Medians of rounds with the smallest and largest beside them; a ratio is the median of the ratios of rounds that ran
//! beside each other. Latencies are of all rounds together.
use std::fmt::Write;

use serde::Serialize;
use virtio_testkit::RingLayout;
use virtio_testkit::load::floor::Floor;
use virtio_testkit::load::{Histogram, LoadError, Placement, Round};

/// What was asked of everybody.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) layout: RingLayout,
    pub(crate) placement: Placement,
    pub(crate) depth: u16,
    pub(crate) size: u32,
}

impl Case {
    pub(crate) fn title(&self) -> String {
        let Case { layout, placement, depth, size } = self;
        format!("{}, {}, depth {depth}, {size} bytes", layout_name(*layout), placement_name(*placement))
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
    Measured(Vec<Round>),
    NotOffered(String),
    Failed(String),
}

impl Outcome {
    pub(crate) fn new(error: Option<LoadError>, rounds: Vec<Round>) -> Outcome {
        match error {
            None => Outcome::Measured(rounds),
            Some(error @ LoadError::NotOffered(_)) => Outcome::NotOffered(error.to_string()),
            Some(error) => Outcome::Failed(error.to_string()),
        }
    }

    fn rounds(&self) -> &[Round] {
        match self {
            Outcome::Measured(rounds) => rounds,
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
    /// Time of a request beside that of the floor with a system call: 1.10 is ten percent more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) time_to_floor: Option<Spread>,
    pub(crate) backend_cpu_us_per_request: Spread,
    pub(crate) kicks_per_request: f64,
    pub(crate) interrupts_per_request: f64,
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
    layout: &'static str,
    placement: &'static str,
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
    #[serde(skip)]
    all_stood: bool,
}

impl Report {
    pub(crate) fn new(names: Vec<String>) -> Report {
        Report { version: 1, cases: Vec::new(), names, all_stood: true }
    }

    pub(crate) fn add(&mut self, case: Case, outcomes: Vec<Outcome>) {
        self.all_stood &= !outcomes.iter().any(|outcome| matches!(outcome, Outcome::Failed(_)));
        let floor = self.names.iter().position(|name| name == Floor::Random.name());
        let floor = floor.and_then(|at| outcomes.get(at)).map_or(&[][..], Outcome::rounds);
        let contenders = self.names.iter().zip(&outcomes);
        let contenders =
            contenders.map(|(name, outcome)| Figures::of(name.clone(), outcome, floor)).collect();
        self.cases.push(CaseFigures {
            case: case.title(),
            layout: layout_name(case.layout),
            placement: placement_name(case.placement),
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
            Outcome::Measured(rounds) => {
                let measured = Some(Measured::of(rounds, floor));
                return Figures { name, error: None, measured };
            }
            Outcome::NotOffered(text) => text.clone(),
            Outcome::Failed(text) => format!("FAILED: {text}"),
        };
        Figures { name, error: Some(error), measured: None }
    }
}

impl Measured {
    fn of(rounds: &[Round], floor: &[Round]) -> Measured {
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
            kicks_per_request: each(rounds.iter().map(|round| round.kicks).sum()),
            interrupts_per_request: each(rounds.iter().map(|round| round.interrupts).sum()),
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
        "  {:width$} {:>9} {:>5} {:>8} {:>9} {:>7} {:>7} {:>8} {:>7} {:>7} {:>6} {:>6}",
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
        "kicks",
        "intrs"
    );
    for Figures { name, error, measured } in &figures.contenders {
        let Some(m) = measured else {
            let _ = writeln!(text, "  {name:width$} {}", error.as_deref().unwrap_or("no figures"));
            continue;
        };
        let ratio = m.time_to_floor.map_or("-".to_owned(), |ratio| format!("{:.3}", ratio.median));
        let _ = writeln!(
            text,
            "  {name:width$} {:>9.0} {:>5.1} {ratio:>8} {:>9.1} {:>7.1} {:>7.1} {:>8.1} {:>7.2} {:>7.1} {:>6.2} {:>6.2}",
            m.requests_per_second.median,
            m.requests_per_second.percent(),
            m.megabytes_per_second.median,
            m.latency_us.p50,
            m.latency_us.p99,
            m.latency_us.p999,
            m.backend_cpu_us_per_request.median,
            m.backend_cpu_us_per_request.percent(),
            m.kicks_per_request,
            m.interrupts_per_request,
        );
    }
    text
}
