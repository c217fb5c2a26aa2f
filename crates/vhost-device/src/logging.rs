//! Log lines on standard error, limited per place in the code that writes them.
//!
//! Guests and front-ends decide how often most warnings happen. Each call site may write a burst of lines and then one
//! every five seconds; what is suppressed is counted, and the count is written with the next line of that call site that
//! passes, or at the end. Lines of different call sites do not compete.
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::callsite::Identifier;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::reload;

/// Lines that a call site may write at once.
const BURST: u32 = 10;
/// How long it takes to earn one more line.
const REFILL: Duration = Duration::from_secs(5);

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What keeps a device from working.
    Error,
    /// Also what a guest or front-end does wrong.
    Warn,
    /// Also front-ends that come and go.
    #[default]
    Info,
    /// Also each message of a front-end.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    fn max(self) -> Option<tracing::Level> {
        match self {
            LogLevel::Off => None,
            LogLevel::Error => Some(tracing::Level::ERROR),
            LogLevel::Warn => Some(tracing::Level::WARN),
            LogLevel::Info => Some(tracing::Level::INFO),
            LogLevel::Debug => Some(tracing::Level::DEBUG),
            LogLevel::Trace => Some(tracing::Level::TRACE),
        }
    }
}

/// What one call site has left.
#[derive(Debug)]
struct Allowance {
    lines: u32,
    refilled: Instant,
    suppressed: u64,
    place: &'static Metadata<'static>,
}

/// The allowances of all call sites. Their number is bounded by the program's text.
#[derive(Debug, Default)]
pub(crate) struct Limits {
    sites: Mutex<HashMap<Identifier, Allowance>>,
    /// Lines that were suppressed so far.
    suppressed: AtomicU64,
}

impl Limits {
    /// Whether an event of this call site may be written now: `Some(n)` if so, with how many were not before it.
    fn admit(&self, place: &'static Metadata<'static>, now: Instant) -> Option<u64> {
        // Debugging asks for everything.
        if *place.level() > tracing::Level::INFO {
            return Some(0);
        }
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        let site = sites.entry(place.callsite()).or_insert_with(|| Allowance {
            lines: BURST,
            refilled: now,
            suppressed: 0,
            place,
        });
        let earned = now.saturating_duration_since(site.refilled).as_millis() / REFILL.as_millis();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        if earned > 0 {
            site.lines = site.lines.saturating_add(earned).min(BURST);
            site.refilled = now;
        }
        match site.lines.checked_sub(1) {
            Some(left) => {
                site.lines = left;
                Some(std::mem::take(&mut site.suppressed))
            }
            None => {
                site.suppressed += 1;
                self.suppressed.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }

    /// What was suppressed and not reported yet, for the end of the process.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        let silenced = sites.values_mut().filter(|site| site.suppressed > 0);
        silenced
            .map(|site| {
                let count = std::mem::take(&mut site.suppressed);
                let place = site.place;
                format!(
                    "{count} more messages like the one of {}:{} were suppressed",
                    place.file().unwrap_or(place.target()),
                    place.line().unwrap_or(0)
                )
            })
            .collect()
    }
}

/// Formats an event as tracing-subscriber does, if the limits let it.
struct Limited {
    limits: Arc<Limits>,
    format: Format,
}

impl<S, N> FormatEvent<S, N> for Limited
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        // An empty buffer is written as nothing at all.
        let Some(suppressed) = self.limits.admit(event.metadata(), Instant::now()) else { return Ok(()) };
        if suppressed > 0 {
            writeln!(writer, "({suppressed} messages like the next one were suppressed)")?;
        }
        self.format.format_event(context, writer, event)
    }
}

/// Changes the level of a subscriber.
type Filter = reload::Handle<LevelFilter, Registry>;

/// A subscriber that writes to `writer`.
fn subscriber<W>(level: LogLevel, limits: Arc<Limits>, writer: W) -> (impl Subscriber + Send + Sync, Filter)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(LevelFilter::from(level.max()));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(false)
        .event_format(Limited { limits, format: Format::default().with_ansi(false).with_target(false) });
    (Registry::default().with(filter).with(lines), handle)
}

/// The log of this process.
pub(crate) struct Logging {
    limits: Arc<Limits>,
    filter: Filter,
    level: std::cell::Cell<LogLevel>,
    /// Lines go through our subscriber.
    ours: bool,
}

impl Logging {
    /// What was suppressed and not reported yet, for the end of the process.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        self.limits.leftovers()
    }

    /// How many lines were suppressed so far.
    pub(crate) fn suppressed(&self) -> u64 {
        self.limits.suppressed.load(Ordering::Relaxed)
    }

    /// How much is logged.
    pub(crate) fn level(&self) -> LogLevel {
        self.level.get()
    }

    /// Logs more or less from now on.
    pub(crate) fn set_level(&self, level: LogLevel) -> Result<(), &'static str> {
        if !self.ours {
            return Err("this program has a log of its own, whose level cannot be changed here");
        }
        self.filter
            .modify(|filter| *filter = LevelFilter::from(level.max()))
            .map_err(|_| "the log's level cannot be changed any more")?;
        self.level.set(level);
        Ok(())
    }
}

/// Sends log lines of this process to standard error. A subscriber that is there already stays.
pub(crate) fn init(level: LogLevel) -> Logging {
    let limits = Arc::new(Limits::default());
    let (subscriber, filter) = subscriber(level, limits.clone(), std::io::stderr);
    let ours = tracing::subscriber::set_global_default(subscriber).is_ok();
    Logging { limits, filter, level: level.into(), ours }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Buffer {
        fn lines(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    #[test]
    fn a_flood_from_one_place_is_cut_and_counted_and_other_places_still_speak() {
        let buffer = Buffer::default();
        let limits = Arc::new(Limits::default());
        let writer = buffer.clone();
        let (subscriber, _) = subscriber(LogLevel::Info, limits.clone(), move || writer.clone());
        tracing::subscriber::with_default(subscriber, || {
            for i in 0..1000 {
                tracing::warn!(i, "the guest did it again");
            }
            tracing::warn!("something else");
        });
        let lines = buffer.lines();
        assert_eq!(lines.len(), BURST as usize + 1, "{lines:#?}");
        assert!(lines.last().unwrap().contains("something else"));
        let left = limits.leftovers();
        assert_eq!(left.len(), 1);
        assert!(left[0].starts_with("990 more messages"), "{left:?}");
        assert!(limits.leftovers().is_empty());
    }

    #[test]
    fn the_next_line_that_passes_says_how_many_did_not() {
        fn place() -> &'static Metadata<'static> {
            use tracing::callsite::Callsite;
            static SITE: tracing::callsite::DefaultCallsite = tracing::callsite::DefaultCallsite::new({
                static META: Metadata<'static> = tracing::metadata! {
                    name: "test", target: "test", level: tracing::Level::WARN,
                    fields: tracing::fieldset!("message"), callsite: &SITE, kind: tracing::metadata::Kind::EVENT,
                };
                &META
            });
            SITE.metadata()
        }
        let limits = Limits::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limits.admit(place(), start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(limits.admit(place(), start + REFILL / 2), None);
        }
        assert_eq!(limits.admit(place(), start + REFILL), Some(7));
        assert_eq!(limits.admit(place(), start + REFILL), None);
    }

    #[test]
    fn levels_below_the_wanted_one_are_silent_until_another_is_wanted() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let (subscriber, filter) = subscriber(LogLevel::Off, Arc::default(), move || writer.clone());
        let log = Logging { limits: Arc::default(), filter, level: LogLevel::Off.into(), ours: true };
        let speak = |text: &str| tracing::debug!("{text}");
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!("no");
            speak("no");
            log.set_level(LogLevel::Debug).unwrap();
            speak("yes");
            log.set_level(LogLevel::Warn).unwrap();
            speak("no");
        });
        let lines = buffer.lines();
        assert!(lines.len() == 1 && lines[0].contains("yes"), "{lines:?}");
        assert_eq!(log.level(), LogLevel::Warn);
    }
}
