//! A lane's part of saving and restoring: its queues, and the way of its worker to the device and back.
use super::{LaneRunner, Meeting};
use crate::device::Worker;
use crate::engine::{Collected, SavedQueue, SnapshotError};
use std::sync::{Arc, Mutex, PoisonError};

impl<W: Worker> LaneRunner<W> {
    /// Whether no queue can change: there is none, none may pop and nothing is out, or the lane is at rest. Nor may an
    /// answer of the host be on its way.
    fn still(&mut self) -> bool {
        if !self.up.is_quiet() {
            return false;
        }
        let closed = !self.live || self.at_rest();
        closed && self.rings.iter().all(|ring| ring.stopping.is_none() && ring.moving.is_none())
            || self.queues.slots.iter().all(|(_, queue)| queue.is_none())
    }

    /// The lane hands in what it has to save, and its worker.
    pub(super) fn save(&mut self, meeting: &Arc<Meeting<W>>, collected: &Mutex<Collected>) {
        let obstacle = match (self.failed, self.check_in.is_none() && self.still()) {
            (true, _) => Some(SnapshotError::Failed),
            (false, false) => Some(SnapshotError::Running),
            (false, true) => None,
        };
        let mut queues = Vec::new();
        for at in 0..self.rings.len() {
            let (index, enabled) = (self.rings[at].index, self.rings[at].enabled);
            let elsewhere = self.rings[at].delegated.as_ref().map(|delegated| delegated.state.clone());
            if let Some(queue) = self.queue(at) {
                let state = elsewhere.unwrap_or_else(|| queue.state());
                queues.push(SavedQueue { index, enabled, config: *queue.config(), state });
            }
        }
        let mut table = collected.lock().unwrap_or_else(PoisonError::into_inner);
        table.queues.append(&mut queues);
        table.obstacle = table.obstacle.take().or(obstacle);
        drop(table);
        self.hand_in(meeting, false);
    }

    /// The lane hands in its worker; a lane that has queues, or has been live, refuses to be restored.
    pub(super) fn hand_in_for_restore(&mut self, meeting: &Arc<Meeting<W>>) {
        let refuses = self.live || self.failed || self.queues.slots.iter().any(|(_, queue)| queue.is_some());
        self.hand_in(meeting, refuses);
    }

    fn hand_in(&mut self, meeting: &Arc<Meeting<W>>, refuses: bool) {
        // A reset that other lanes may have heard of first has its worker, or is about to.
        match self.worker.take_if(|_| self.check_in.is_none()) {
            Some(worker) => {
                self.is_visiting = true;
                meeting.arrive(self.index, worker, refuses);
            }
            None => meeting.decline(),
        }
    }
}
