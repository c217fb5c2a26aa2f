//! Answers to what the worker asked of the host, and the end of its patience.
use super::{LaneRunner, UPCALL};
use crate::device::Worker;
use crate::upcall::{MAX_UPCALLS, UpcallError};
use std::sync::atomic::Ordering;
use std::time::Instant;

impl<W: Worker> LaneRunner<W> {
    /// Passes on the answers that came and gives up what took too long. Nothing of it reaches a worker that is away, at
    /// rest or failed.
    pub(super) fn hear_upcalls(&mut self) -> bool {
        if self.up.is_quiet() || self.worker.is_none() || self.failed || self.at_rest() {
            return false;
        }
        let mut worked = false;
        // Bounded: a worker may ask again at once, and a host answer at once. Each answer is a wake-up of its own.
        for _ in 0..MAX_UPCALLS {
            let Ok((id, result)) = self.answers.try_recv() else { break };
            // Not what was given up before.
            if self.up.answered(id) {
                self.enter(|worker, lane| worker.upcall_done(id, result, lane));
                worked = true;
            }
        }
        let overdue = self.up.deadline().filter(|deadline| Instant::now() >= *deadline);
        while let Some(id) = overdue.and_then(|_| self.up.overdue(Instant::now())) {
            self.up.shared.failures.unanswered.fetch_add(1, Ordering::Relaxed);
            self.enter(|worker, lane| worker.upcall_done(id, Err(UpcallError::TimedOut), lane));
            worked = true;
        }
        worked
    }

    /// Wakes the lane in time for the first question that is to be given up.
    pub(super) fn watch_upcalls(&mut self) {
        if self.up.is_quiet() && self.patience.is_none() {
            return;
        }
        let deadline = self.up.deadline();
        if deadline == self.patience {
            return;
        }
        self.patience = deadline;
        match deadline {
            Some(deadline) => self.reactor.set_timer(UPCALL, deadline),
            None => self.reactor.cancel_timer(UPCALL),
        }
    }

    /// The reset answers everything.
    pub(super) fn end_upcalls(&mut self) {
        for id in self.up.give_up() {
            self.enter(|worker, lane| worker.upcall_done(id, Err(UpcallError::Reset), lane));
        }
        // Of answers that overtook it nobody knows the question.
        while self.answers.try_recv().is_ok() {}
    }
}
