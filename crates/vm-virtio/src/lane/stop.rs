//! How queues stop: draining, discarding, deadlines, and the check-in of the worker before a reset.
use super::command::Meeting;
use super::ring::{Asked, Kick, Stopping};
use super::{DEADLINE, LaneRunner, StopError};
use crate::device::{Stop, Worker};
use crate::engine::QueueResetError;
use crate::ticket::Completer;
use crate::{Queue, QueueState};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A worker is on its way to the device.
pub(super) struct CheckIn<W: Worker> {
    meeting: Arc<Meeting<W>>,
    stuck: bool,
}

impl<W: Worker> LaneRunner<W> {
    pub(super) fn begin_stop(
        &mut self,
        number: u16,
        how: Stop,
        deadline: Instant,
        done: Completer<Result<QueueState, StopError>>,
    ) {
        let started = self.find(number).filter(|at| self.queue(*at).is_some());
        match started {
            // A second stop while the first is under way has nothing of its own to wait for.
            Some(at) if self.rings[at].stopping.is_none() => {
                self.stop_ring(at, Stopping { how, deadline, asked: Asked::Host(done) });
            }
            _ => done.complete(Err(StopError::NotStarted(number))),
        }
    }

    /// 2.6.1: one queue goes, as if the device had been reset for it alone.
    pub(super) fn begin_reset_queue(
        &mut self,
        number: u16,
        deadline: Instant,
        done: Completer<Result<(), QueueResetError>>,
    ) {
        let Some(at) = self.find(number) else { return };
        self.rings[at].enabled = false;
        if self.rings[at].stopping.is_some() {
            done.complete(Err(QueueResetError::Stopping));
        } else if self.queue(at).is_some() {
            self.stop_ring(at, Stopping { how: Stop::Discard, deadline, asked: Asked::Driver(done) });
        } else {
            self.rings[at].forget_driver();
            done.complete(Ok(()));
        }
    }

    fn stop_ring(&mut self, at: usize, stopping: Stopping) {
        let how = stopping.how;
        let number = self.rings[at].index;
        if how == Stop::Drain && self.finishes(at) && self.queue(at).is_some_and(|queue| queue.resubmits()) {
            // What a killed predecessor had: finished like what was taken here, even if the front-end has disabled the ring
            // by now, as most do before they stop one. Who only keeps the ring's position would never see it again.
            self.queue(at).into_iter().for_each(Queue::finish_again);
            self.enter(|worker, lane| worker.queue_ready(number, lane));
        }
        self.rings[at].stopping = Some(stopping);
        self.regate(at);
        if let (Stop::Discard, Some(queue)) = (how, self.queue(at)) {
            queue.give_up();
            // Those of a restored queue that was never served.
            queue.drop_unclaimed();
        }
        self.unwatch_kick(at);
        if W::DELEGATES && !self.is_away(at) {
            return;
        }
        self.enter_quietly(|worker, lane| worker.queue_stop(number, how, lane));
    }

    /// The lane gives up all its queues and then its worker.
    pub(super) fn begin_check_in(&mut self, meeting: Arc<Meeting<W>>, deadline: Instant) {
        self.live = false;
        self.pause.reset();
        self.up.close(true);
        for at in 0..self.rings.len() {
            if self.queue(at).is_none() {
                continue;
            }
            match self.rings[at].stopping.as_mut() {
                // A drain that a reset overtakes: whoever waits for it gets what there is.
                Some(stopping) => stopping.deadline = stopping.deadline.min(deadline),
                None => self.stop_ring(at, Stopping { how: Stop::Discard, deadline, asked: Asked::Reset }),
            }
        }
        // With the queues given up: what waits for an answer goes back unused.
        self.end_upcalls();
        self.check_in = Some(CheckIn { meeting, stuck: false });
    }

    /// Ends the stops that can end: nothing is out any more, or time is up.
    pub(super) fn progress_stops(&mut self) {
        let mut next: Option<Instant> = None;
        let mut now = None;
        for at in 0..self.rings.len() {
            let Some(deadline) = self.rings[at].stopping.as_ref().map(|stopping| stopping.deadline) else {
                continue;
            };
            // What nobody has adopted yet is in the state for who does.
            let idle = !self.is_away(at)
                && self.queue(at).is_none_or(|queue| queue.outstanding() <= queue.unclaimed());
            // Nobody is left to complete the chains of a failed worker.
            let over = idle || self.failed || *now.get_or_insert_with(Instant::now) >= deadline;
            if over {
                self.end_stop(at, idle);
            } else {
                next = Some(next.map_or(deadline, |earliest| earliest.min(deadline)));
            }
        }
        match next {
            Some(deadline) => self.reactor.set_timer(DEADLINE, deadline),
            None if now.is_some() => self.reactor.cancel_timer(DEADLINE),
            None => {}
        }
        self.progress_check_in();
    }

    fn end_stop(&mut self, at: usize, idle: bool) {
        let Some(stopping) = self.rings[at].stopping.take() else { return };
        let number = self.rings[at].index;
        if self.is_away(at) {
            self.abandon(at);
        }
        let delegated = self.rings[at].delegated.take();
        // What comes back too late is not that of a queue that starts here next.
        self.queues.returned.retain(|(queue, _)| *queue != number);
        let state = match self.queues.slots[at].1.take() {
            Some(mut queue) => {
                if queue.publish() && stopping.how == Stop::Drain {
                    self.signal(at);
                }
                queue.signal_log();
                self.rings[at].tally.stopped(&queue);
                delegated.map_or_else(|| queue.into_state(), |delegated| delegated.state)
            }
            None => QueueState::default(),
        };
        debug_assert!(matches!(self.rings[at].kick, Kick::Manual), "unwatched when the stop began");
        self.rings[at].stopped();
        if !idle {
            // Failure policy 7.
            self.up.shared.failures.stuck.fetch_add(1, Ordering::Relaxed);
            self.up.shared.needs_reset(format!("queue {number} stopped with requests still out"));
            if let Some(check_in) = self.check_in.as_mut() {
                check_in.stuck |= !self.failed;
            }
        }
        match stopping.asked {
            Asked::Host(done) => done.complete(if idle { Ok(state) } else { Err(StopError::Stuck(state)) }),
            Asked::Driver(done) => {
                self.rings[at].forget_driver();
                done.complete(if idle { Ok(()) } else { Err(QueueResetError::Stuck) });
            }
            Asked::Reset => {}
        }
    }

    fn progress_check_in(&mut self) {
        if self.check_in.is_none() || self.queues.slots.iter().any(|(_, queue)| queue.is_some()) {
            return;
        }
        let (Some(check_in), Some(worker)) = (self.check_in.take(), self.worker.take()) else { return };
        for ring in &mut self.rings {
            // A reset disables every ring; the files of the front-end go with it.
            ring.forget_driver();
        }
        check_in.meeting.arrive(self.index, worker, check_in.stuck);
    }
}
