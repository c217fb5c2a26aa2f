//! Tells a person how far a long step is: a bar on a terminal, a plain line now and then elsewhere.
//!
//! In a log (no terminal, or `CI=true`) nothing is ever silent for longer than [`INTERVAL`]: the line says which step
//! runs, how far it is and for how long it has been running.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const INTERVAL: Duration = Duration::from_secs(20);

/// One step of the work, from [`Step::start`] to [`Step::done`].
pub(crate) struct Step {
    name: String,
    doing: String,
    detail: String,
    started: Instant,
    spoke: Instant,
    at: u64,
    total: u64,
    unit: Unit,
    bar: Option<ProgressBar>,
}

/// What is counted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Bytes,
    /// Things of which only an estimate of the total is known.
    About(&'static str),
}

/// Whether a person looks at a terminal, rather than somebody at a log later.
pub(crate) fn interactive() -> bool {
    std::io::stderr().is_terminal() && !in_ci()
}

/// Whether this is a run of continuous integration.
pub(crate) fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

/// A line for the person, above any bar.
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}

/// Minutes and seconds as a person writes them.
pub(crate) fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        _ => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

impl Step {
    /// Begins a step: `name` is what is being made, `doing` the activity.
    pub(crate) fn start(name: &str, doing: &str) -> Self {
        let now = Instant::now();
        let bar = interactive().then(ProgressBar::new_spinner);
        let mut step = Self {
            name: name.to_owned(),
            doing: String::new(),
            detail: String::new(),
            started: now,
            spoke: now,
            at: 0,
            total: 0,
            unit: Unit::Bytes,
            bar,
        };
        step.doing(doing);
        step
    }

    /// Goes over to another activity of the same step, whose length is not known (yet).
    pub(crate) fn doing(&mut self, doing: &str) {
        doing.clone_into(&mut self.doing);
        self.detail.clear();
        self.at = 0;
        self.total = 0;
        self.spoke = Instant::now();
        match &self.bar {
            Some(bar) => {
                if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}: {msg} [{elapsed}]") {
                    bar.set_style(style);
                }
                bar.set_prefix(self.name.clone());
                bar.set_message(self.doing.clone());
            }
            None => eprintln!("{}: {}", self.name, self.doing),
        }
    }

    /// Shows what exactly is worked on; a log only has it in its lines now and then.
    pub(crate) fn detail(&mut self, detail: &str) {
        detail.clone_into(&mut self.detail);
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{}: {detail}", self.doing));
        }
    }

    /// How much there is to do.
    pub(crate) fn total(&mut self, total: u64, unit: Unit) {
        self.total = total;
        self.unit = unit;
        if let Some(bar) = &self.bar {
            let template = match unit {
                Unit::Bytes => "{spinner} {prefix}: {msg} [{bar:30}] {bytes} of {total_bytes}, {eta} left",
                Unit::About(_) => "{spinner} {prefix}: {msg} [{bar:30}] {pos} of about {len} [{elapsed}]",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_length(total);
        }
    }

    /// How much is done.
    pub(crate) fn at(&mut self, at: u64) {
        self.at = at;
        if let Some(bar) = &self.bar {
            if at > self.total {
                bar.set_length(at);
            }
            bar.set_position(at);
        }
        self.tick();
    }

    /// How much is done so far.
    pub(crate) fn position(&self) -> u64 {
        self.at
    }

    /// Called often while waiting: keeps the bar moving, or the log alive.
    pub(crate) fn tick(&mut self) {
        if let Some(bar) = &self.bar {
            bar.tick();
        } else if self.spoke.elapsed() >= INTERVAL {
            self.spoke = Instant::now();
            let far = match (self.total, self.unit) {
                (0, _) if self.detail.is_empty() => String::new(),
                (0, _) => format!("{}, ", self.detail),
                (total, Unit::Bytes) => format!("{} of {} MiB, ", self.at >> 20, total >> 20),
                (total, Unit::About(what)) => format!("{} of about {total} {what}, ", self.at),
            };
            eprintln!("{}: {}: {far}{}", self.name, self.doing, clock(self.started.elapsed()));
        }
    }

    /// Since the step began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends the step with one line that stays.
    pub(crate) fn done(self, result: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{}: {result} ({})", self.name, clock(self.started.elapsed()));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
