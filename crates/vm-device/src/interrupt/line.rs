//! Interrupt lines.
//!
//! The controller's end is two files: `trigger` raises the line; for level-triggered lines the controller lowers it again when the
//! guest ends the interrupt, and tells so by `resample` (KVM: `KVM_IRQFD_FLAG_RESAMPLE`). Then
//! [`IrqLine::resampled`] raises it again if a device still wants something.
//!
//! Invariant: while a source is asserted, there is a trigger that the controller has not ended yet, or a resample that
//! `resampled` has not seen yet, or a thread that is on its way to write one of them. So no interrupt is lost. What may
//! happen is one too many, as on real wires: when a device deasserts while its interrupt is on the way.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};

use super::Event;

/// How a line tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// By becoming active: each time that a source is asserted is one interrupt.
    Edge,
    /// By being active: the guest is interrupted as long as a source is asserted.
    Level,
}

#[derive(Debug)]
struct Wire {
    /// How many sources are asserted. May be wrong for a moment, even below zero, while one source is set by two threads at
    /// once.
    asserted: AtomicIsize,
    trigger: Event,
    /// Of a level-triggered line.
    resample: Option<Event>,
}

/// An interrupt line. A clone is the same line.
#[derive(Clone, Debug)]
pub struct IrqLine(Arc<Wire>);

impl IrqLine {
    /// A line with nothing on it yet.
    ///
    /// # Errors
    /// No more files.
    pub fn new(trigger: Trigger) -> io::Result<Self> {
        let resample = match trigger {
            Trigger::Edge => None,
            Trigger::Level => Some(Event::new()?),
        };
        Ok(Self(Arc::new(Wire { asserted: AtomicIsize::new(0), trigger: Event::new()?, resample })))
    }

    /// One more device's end of it, deasserted.
    pub fn source(&self) -> IrqSource {
        IrqSource { wire: self.0.clone(), asserted: AtomicBool::new(false) }
    }

    /// Edge or level.
    pub fn trigger_mode(&self) -> Trigger {
        if self.0.resample.is_some() { Trigger::Level } else { Trigger::Edge }
    }

    /// Whether a source is asserted.
    pub fn is_asserted(&self) -> bool {
        self.0.asserted.load(Ordering::SeqCst) > 0
    }

    /// What raises the line at the controller.
    pub fn trigger(&self) -> &Event {
        &self.0.trigger
    }

    /// What the controller signals when the guest has ended a level-triggered interrupt. Somebody has to watch it and call
    /// [`resampled`](Self::resampled).
    pub fn resample(&self) -> Option<&Event> {
        self.0.resample.as_ref()
    }

    /// The guest has ended the interrupt: raises the line again if a source is still asserted, and says so. Takes what is in
    /// the resample file. Nothing happens on an edge-triggered line.
    pub fn resampled(&self) -> bool {
        let Some(resample) = &self.0.resample else { return false };
        resample.take();
        let again = self.is_asserted();
        if again {
            self.0.trigger.signal();
        }
        again
    }
}

/// One device's end of an interrupt line. Deasserted when it is dropped: a device that is gone wants nothing.
#[derive(Debug)]
pub struct IrqSource {
    wire: Arc<Wire>,
    asserted: AtomicBool,
}

impl IrqSource {
    /// Sets what the device wants: `true` interrupts the guest; see [`Trigger`] for how often. Never blocks.
    pub fn set(&self, asserted: bool) {
        if self.asserted.swap(asserted, Ordering::SeqCst) == asserted {
            return;
        }
        if !asserted {
            self.wire.asserted.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        // Level: if another source is counted, its thread raises the line, has raised it, or the resample sees this one.
        // Edge: two sources are two interrupts.
        if self.wire.asserted.fetch_add(1, Ordering::SeqCst) <= 0 || self.wire.resample.is_none() {
            self.wire.trigger.signal();
        }
    }

    /// `set(true)`.
    pub fn assert(&self) {
        self.set(true);
    }

    /// `set(false)`.
    pub fn deassert(&self) {
        self.set(false);
    }

    /// One interrupt of an edge-triggered line, also while this source is asserted, which does not change. On a
    /// level-triggered one it is one, too, but one that a guest may find to be nobody's. Never blocks.
    ///
    /// Any number of threads may do this at once. It does not go through what is [asserted](Self::is_asserted): the guest
    /// can have answered one pulse, and another thread begun the next one for that, before the first thread has deasserted,
    /// and then the second would be no edge.
    pub fn pulse(&self) {
        self.wire.trigger.signal();
    }

    /// Whether this source is asserted.
    pub fn is_asserted(&self) -> bool {
        self.asserted.load(Ordering::SeqCst)
    }

    /// For those who write the file by themselves, such as vhost: each write is an edge.
    pub fn trigger_fd(&self) -> BorrowedFd<'_> {
        self.wire.trigger.as_fd()
    }
}

impl Drop for IrqSource {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn each_edge_is_one_signal() {
        let line = IrqLine::new(Trigger::Edge).unwrap();
        assert_eq!((line.trigger_mode(), line.resample().is_none()), (Trigger::Edge, true));
        let (a, b) = (line.source(), line.source());
        a.assert();
        assert!(line.trigger().take());
        a.assert();
        assert!(!line.trigger().take(), "no edge");
        b.assert();
        assert!(line.trigger().take(), "another device's");
        a.deassert();
        assert!(!line.trigger().take());
        a.pulse();
        assert!(line.trigger().take());
        assert!(!a.is_asserted() && b.is_asserted());
        assert!(!line.resampled(), "nothing to end");
    }

    #[test]
    fn a_pulse_is_an_interrupt_wherever_another_threads_pulse_is() {
        for mode in [Trigger::Edge, Trigger::Level] {
            let line = IrqLine::new(mode).unwrap();
            let source = line.source();
            // Half of a pulse, as a thread leaves it that loses its processor there; the guest has its interrupt already.
            source.assert();
            assert!(line.trigger().take());
            source.pulse();
            assert!(line.trigger().take(), "{mode:?}: the other one");
            assert!(source.is_asserted(), "{mode:?}: what the device wants is not the pulse's business");
        }
    }

    #[test]
    fn a_level_is_raised_again_until_all_who_share_it_are_content() {
        let line = IrqLine::new(Trigger::Level).unwrap();
        let (a, b) = (line.source(), line.source());
        a.assert();
        assert!(line.trigger().take());
        b.assert();
        assert!(!line.trigger().take(), "it is up already");
        a.deassert();
        line.resample().unwrap().signal();
        assert!(line.resampled() && line.trigger().take(), "b is still there");
        assert!(!line.resample().unwrap().is_signalled(), "taken");
        b.deassert();
        assert!(!line.resampled() && !line.trigger().take());
        a.assert();
        assert!(line.trigger().take());
        drop(a);
        assert!(!line.is_asserted() && !line.resampled());
        drop(b);
        assert!(!line.is_asserted(), "not below zero");
    }

    /// A controller and a guest in one thread: takes triggers, lets whoever is asserted have its interrupt, ends it. Two
    /// devices interrupt as fast as they can, each waits for each of its interrupts; on a busy machine fewer times.
    #[test]
    fn no_interrupt_of_a_shared_line_is_lost() {
        const EACH: u32 = 20_000;
        let soon = || Instant::now() + Duration::from_secs(30);
        let enough = Instant::now() + Duration::from_secs(5);
        let line = IrqLine::new(Trigger::Level).unwrap();
        let sources = [line.source(), line.source()];
        let handled = [AtomicU32::new(0), AtomicU32::new(0)];
        thread::scope(|scope| {
            let devices = [0, 1].map(|me| {
                let (source, handled) = (&sources[me], &handled[me]);
                scope.spawn(move || {
                    for n in (0..EACH).take_while(|_| Instant::now() < enough) {
                        source.assert();
                        let deadline = soon();
                        while handled.load(Ordering::SeqCst) == n {
                            assert!(Instant::now() < deadline, "interrupt {n} is lost");
                            thread::yield_now();
                        }
                    }
                })
            });
            while !devices.iter().all(|device| device.is_finished()) {
                if !line.trigger().take() {
                    thread::yield_now();
                    continue;
                }
                for (source, handled) in sources.iter().zip(&handled) {
                    if source.is_asserted() {
                        source.deassert();
                        handled.fetch_add(1, Ordering::SeqCst);
                    }
                }
                line.resampled();
            }
        });
        assert!(!line.is_asserted());
    }

    #[test]
    fn one_source_set_by_two_threads_ends_as_the_last_said() {
        let line = IrqLine::new(Trigger::Level).unwrap();
        let source = line.source();
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..20_000).for_each(|n| source.set(n % 3 == 0)));
            }
        });
        source.deassert();
        assert!(!line.is_asserted());
        source.assert();
        assert!(line.is_asserted());
    }
}
