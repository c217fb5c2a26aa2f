//! The conformance suite: what virtio and vhost-user demand of every device, as a table of [`Line`]s, each a rule with
//! its section and a function that finds out whether it is kept.
//!
//! The same line runs over any [`Host`]: a device in this process that is stepped without threads
//! ([`MemoryBench`]; behind a transport: [`RegisterBench`]), or anybody's back-end behind a vhost-user socket ([`SocketBench`]); and over each ring layout and
//! each set of ring features that matters to it ([`Setup`]). What a device has to say about itself is one valid request
//! and its answer: a [`Subject`].
//!
//! Invariants: whatever the other side does becomes an [`Outcome`], within a bounded time; lines share no state, each
//! begins with a fresh driver; each line has a back-end that fails it (this crate's `tests/mutants.rs`).
mod bench;
mod host;
mod lines;
mod memory;
mod registers;
mod report;
mod socket;
mod subject;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use vm_virtio::{Features, RingPos};

use crate::transport::Machine;
use crate::{RingLayout, TestRam, Violation};

pub use bench::Bench;
pub use host::Host;
pub use memory::MemoryBench;
pub use registers::RegisterBench;
pub use report::{Outcome, Report, Row};
pub use socket::{SocketBench, SocketOptions};
pub use subject::{Request, Subject};

/// Why a line did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The rule is broken, and how. That includes whoever does not answer, or goes away.
    Broken(String),
    /// There is nothing here that the rule speaks of.
    NotApplicable(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Broken(why) | Trouble::NotApplicable(why) => f.write_str(why),
        }
    }
}

impl From<Violation> for Trouble {
    fn from(violation: Violation) -> Self {
        Trouble::Broken(format!("{}; seen: {}", violation.rule, violation.seen))
    }
}

impl From<vhost_user::Error> for Trouble {
    fn from(error: vhost_user::Error) -> Self {
        match error {
            vhost_user::Error::Io(cause) => Trouble::Broken(format!("the socket failed: {cause}")),
            other => Trouble::Broken(other.to_string()),
        }
    }
}

/// `Broken` with these words.
fn broken<T>(why: impl Into<String>) -> Checked<T> {
    Err(Trouble::Broken(why.into()))
}

/// `NotApplicable` with these words.
fn not_applicable<T>(why: impl Into<String>) -> Checked<T> {
    Err(Trouble::NotApplicable(why.into()))
}

/// What a step of a line comes to.
pub type Checked<T = ()> = Result<T, Trouble>;

/// What a driver negotiates before a line begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// The layout of all rings.
    pub layout: RingLayout,
    /// What is taken of the features that may be left out: `INDIRECT_DESC`, `EVENT_IDX`, `IN_ORDER`, and what a line is
    /// about.
    pub optional: Features,
    /// Whether the device's own features are taken.
    pub own: bool,
    /// Entries of each ring.
    pub size: u16,
    /// Where the rings begin.
    pub start: RingPos,
    /// Over vhost-user: whether bit 30 is acknowledged, so that rings begin disabled.
    pub rings_disabled: bool,
}

impl Setup {
    /// The usual one of a layout, with these optional features.
    pub fn new(layout: RingLayout, optional: Features) -> Setup {
        let start = RingPos { index: 0, wrap: true };
        Setup { layout, optional, own: true, size: 16, start, rings_disabled: true }
    }

    /// Everything that the driver takes if it is offered.
    pub fn wanted(&self, offered: Features) -> Features {
        let packed = match self.layout {
            RingLayout::Split => Features::empty(),
            RingLayout::Packed => Features::RING_PACKED,
        };
        let own = if self.own { offered - Features::NOT_A_DEVICES } else { Features::empty() };
        offered & (own | packed | self.optional | Features::VERSION_1)
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.layout {
            RingLayout::Split => "split",
            RingLayout::Packed => "packed",
        })?;
        self.optional.names().try_for_each(|name| write!(f, " {name}"))
    }
}

/// Over how many setups a line runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// One: it has nothing to do with rings.
    One,
    /// One of each layout.
    Layouts,
    /// Each layout with each set of optional features.
    Subsets,
}

/// Where a line can be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Wherever there is a driver.
    Anywhere,
    /// Over vhost-user only.
    Wire,
}

/// One rule and how to find out whether it is kept.
pub struct Line {
    /// Its name.
    pub id: &'static str,
    /// The section of virtio 1.4 (numbers), of the vhost-user document (words), or the number in the failure policy.
    pub section: &'static str,
    /// The rule.
    pub text: &'static str,
    /// Where it can be seen.
    pub place: Place,
    /// Over how many setups it runs.
    pub span: Span,
    /// Layouts that it is about; none: both.
    pub layout: Option<RingLayout>,
    /// Features that it needs and that are not taken otherwise.
    pub with: Features,
    /// Optional ring features that must be left out.
    pub without: Features,
    run: Run,
}

enum Run {
    Plain(fn(&mut Bench<'_>) -> Checked),
    Fault(crate::hostile::Breakage),
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.id, self.section)
    }
}

impl Line {
    /// Every line.
    pub fn all() -> Vec<Line> {
        lines::all()
    }

    fn setups(&self, offered: Features) -> Vec<Setup> {
        let mut setups: Vec<Setup> = Vec::new();
        let (indirect, event, order) = (Features::INDIRECT_DESC, Features::EVENT_IDX, Features::IN_ORDER);
        let none = Features::empty();
        // What nobody takes who does not need it.
        let special = self.with - (indirect | event | order);
        for layout in RingLayout::ALL {
            if layout == RingLayout::Packed && !offered.contains(Features::RING_PACKED)
                || self.layout.is_some_and(|only| only != layout)
            {
                continue;
            }
            for optional in [indirect | event, event, indirect, none, indirect | event | order, order] {
                let setup = Setup::new(layout, (optional | special) & offered);
                let fits = setup.optional.contains(self.with) && !setup.optional.intersects(self.without);
                let more = match self.span {
                    Span::One => setups.is_empty(),
                    Span::Layouts => !setups.iter().any(|other| other.layout == layout),
                    Span::Subsets => !setups.contains(&setup),
                };
                if fits && more {
                    setups.push(setup);
                }
            }
        }
        setups
    }

    /// Runs the line over every setup that the host offers and that matters to it, up to the first that fails.
    pub fn run(&self, host: &mut dyn Host, subject: Option<&Subject>, patience: Duration) -> Outcome {
        // What a back-end does must not end whoever looks at it, not even through a mistake in here.
        let run = AssertUnwindSafe(|| self.run_unguarded(host, subject, patience));
        catch_unwind(run).unwrap_or_else(|cause| {
            let text = cause.downcast_ref::<String>().map(String::as_str);
            let text = text.or(cause.downcast_ref::<&str>().copied()).unwrap_or("no reason");
            Outcome::Fail(format!("the check itself failed over it: {text}"))
        })
    }

    fn run_unguarded(&self, host: &mut dyn Host, subject: Option<&Subject>, patience: Duration) -> Outcome {
        if self.place == Place::Wire && !host.is_wire() {
            return Outcome::NotApplicable("about messages of vhost-user".to_owned());
        }
        let offered = match host.offered() {
            Ok(offered) => offered,
            Err(trouble) => return trouble.into(),
        };
        let setups = self.setups(offered);
        let mut outcome = Outcome::NotApplicable(format!("{} not offered", self.lacking(offered)));
        for setup in setups {
            let mut bench = Bench::new(host, subject, setup, patience);
            let result = match self.run {
                Run::Plain(run) => run(&mut bench),
                Run::Fault(breakage) => lines::fault(&mut bench, breakage),
            };
            match result {
                Ok(()) => outcome = Outcome::Pass,
                Err(Trouble::NotApplicable(why)) if outcome != Outcome::Pass => {
                    outcome = Outcome::NotApplicable(why);
                }
                Err(Trouble::NotApplicable(_)) => {}
                Err(Trouble::Broken(why)) if self.span == Span::One => return Outcome::Fail(why),
                Err(Trouble::Broken(why)) => return Outcome::Fail(format!("{setup}: {why}")),
            }
        }
        outcome
    }

    fn lacking(&self, offered: Features) -> String {
        let packed = match self.layout {
            Some(RingLayout::Packed) => Features::RING_PACKED,
            _ => Features::empty(),
        };
        let missing: Vec<_> = ((self.with | packed) - offered).names().collect();
        missing.join(", ")
    }
}

/// How long tests wait for what has to come; long, because test machines are slow.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Runs every line.
pub fn check(host: &mut dyn Host, subject: Option<&Subject>, patience: Duration) -> Report {
    let mut rows = Vec::new();
    for line in Line::all() {
        let outcome = line.run(host, subject, patience);
        rows.push(Row { line, outcome });
    }
    Report { rows }
}

/// Runs every line over registers: all pass or do not apply, and `not_here` are those that cannot apply, with the reason.
///
/// # Panics
/// If one fails, or if one of `not_here` applies.
pub fn check_registers(
    machine: impl FnMut(&TestRam) -> Machine,
    subject: &Subject,
    not_here: &[(&str, &str)],
) {
    let report = check(&mut RegisterBench::new(machine), Some(subject), PATIENCE);
    report.assert_passed();
    let outcome = |id: &str| report.rows.iter().find(|row| row.line.id == id).map(|row| &row.outcome);
    for (line, why) in not_here {
        assert_eq!(outcome(line), Some(&Outcome::NotApplicable((*why).to_owned())), "{line}");
    }
    if !not_here.contains(&NOT_ON_CHANNELS) {
        assert_eq!(outcome(NOT_ON_CHANNELS.0), Some(&Outcome::Pass));
    }
}

/// Wherever there are registers.
pub const NOT_BY_REGISTERS: (&str, &str) =
    ("begins-where-told", "a transport starts rings at their beginning");
/// 4.3.4: reserved for future use.
pub const NOT_ON_CHANNELS: (&str, &str) = ("queue-reset", "ring_reset not offered");

/// The conformance suite for a device, as tests: in memory, over each transport, with kicks and interrupts of both kinds, and
/// with `daemon` over its socket as well.
///
/// ```text
/// virtio_testkit::conformance!(
///     Subject::ENTROPY,                                  // a valid request and its answer
///     device = || Rng::new(...),                         // makes one
///     daemon = || { let d = Daemon::start(...); (d, path) },   // starts one: something to keep, and its socket
/// );
/// ```
#[macro_export]
macro_rules! conformance {
    ($subject:expr, device = $device:expr $(, daemon = $daemon:expr)? $(,)?) => {
        #[test]
        fn conformance_in_memory() {
            let mut host = $crate::conformance::MemoryBench::new($device);
            $crate::conformance::check(&mut host, Some(&$subject), $crate::conformance::PATIENCE)
                .assert_passed();
        }

        #[test]
        fn conformance_over_mmio() {
            use $crate::conformance::{NOT_BY_REGISTERS, check_registers};
            for kicks in [$crate::transport::Kicks::Files, $crate::transport::Kicks::Calls] {
                let machine = |ram: &_| $crate::transport::Machine::mmio(($device)(), ram, kicks);
                check_registers(machine, &$subject, &[NOT_BY_REGISTERS]);
            }
        }

        #[test]
        fn conformance_over_pci() {
            use $crate::conformance::{NOT_BY_REGISTERS, check_registers};
            for messages in [false, true] {
                let machine = |ram: &_| $crate::transport::Machine::pci(($device)(), ram, messages);
                check_registers(machine, &$subject, &[NOT_BY_REGISTERS]);
            }
        }

        #[test]
        fn conformance_over_ccw() {
            use $crate::conformance::{NOT_BY_REGISTERS, NOT_ON_CHANNELS, check_registers};
            for adapter in [false, true] {
                let machine = |ram: &_| $crate::transport::Machine::ccw(($device)(), ram, adapter);
                check_registers(machine, &$subject, &[NOT_BY_REGISTERS, NOT_ON_CHANNELS]);
            }
        }

        $(
            #[test]
            fn conformance_over_vhost_user() {
                let (_daemon, socket) = ($daemon)();
                let mut options = $crate::conformance::SocketOptions::new(socket);
                options.patience = $crate::conformance::PATIENCE;
                let mut host = $crate::conformance::SocketBench::new(options);
                $crate::conformance::check(&mut host, Some(&$subject), $crate::conformance::PATIENCE)
                    .assert_passed();
            }
        )?
    };
}
