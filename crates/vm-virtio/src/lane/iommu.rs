//! Queues behind an IOMMU: asking for translations, and letting go of what was taken away.
use super::ring::Release;
use super::{LaneRunner, RELEASE, WaitFor};
use crate::device::{HostEvent, Worker};
use crate::ticket::Completer;
use crate::{Queue, QueueError};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl<W: Worker> LaneRunner<W> {
    /// Asks for what queues wait for, once. An answer that does not allow the access is the driver's fault.
    pub(super) fn find_misses(&mut self) {
        for at in 0..self.rings.len() {
            let miss = self.queue(at).and_then(|queue| queue.miss());
            let Some(miss) = miss.filter(|_| !self.rings[at].faulted) else {
                self.rings[at].asked = None;
                continue;
            };
            let asked = self.rings[at].asked.replace(miss);
            let asked = asked.filter(|asked| (asked.iova, asked.write) == (miss.iova, miss.write));
            match asked {
                None => {
                    let queue = self.rings[at].index;
                    self.up.shared.events.event(HostEvent::Miss { queue, miss });
                }
                Some(asked) if miss.denied && !asked.denied => self.fault(at, QueueError::Denied(miss)),
                Some(_) => {}
            }
        }
    }

    /// Waits for the chains of a range, if the change of memory wants that.
    pub(super) fn release(&mut self, at: usize, wait: WaitFor, done: &Arc<Completer<()>>) {
        let WaitFor::Released { first, last, deadline } = wait else { return };
        if self.queue(at).is_some_and(|queue| queue.holds(first, last)) {
            self.rings[at].releasing.push(Release { first, last, deadline, _done: done.clone() });
        }
    }

    pub(super) fn progress_releases(&mut self) {
        let mut next: Option<Instant> = None;
        let mut waits = false;
        for at in 0..self.rings.len() {
            let mut releasing = std::mem::take(&mut self.rings[at].releasing);
            waits |= !releasing.is_empty();
            let Some(queue) = self.queue(at) else { continue };
            releasing.retain(|release| queue.holds(release.first, release.last));
            let earliest = releasing.iter().map(|release| release.deadline).min();
            if earliest.is_some_and(|deadline| Instant::now() >= deadline) {
                queue.forgive();
                releasing.clear();
                self.up.shared.failures.unreleased.fetch_add(1, Ordering::Relaxed);
            } else if let Some(deadline) = earliest {
                next = Some(next.map_or(deadline, |next| next.min(deadline)));
            }
            self.rings[at].releasing = releasing;
        }
        match next {
            Some(deadline) => self.reactor.set_timer(RELEASE, deadline),
            None if waits => self.reactor.cancel_timer(RELEASE),
            None => {}
        }
    }
}

/// Whether a change of memory that the queue cannot follow leaves it waiting.
pub(super) fn waits(queue: &Queue, error: &QueueError) -> bool {
    matches!(error, QueueError::Miss(_)) && queue.miss().is_some()
}
