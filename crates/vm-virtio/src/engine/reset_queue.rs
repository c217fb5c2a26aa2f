//! Resetting one queue (virtio 1.4, 2.6.1).
use super::{Engine, STOP_DEADLINE, ticket};
use crate::device::VirtioDevice;
use crate::lane::Command;
use crate::{Features, Ticket};
use std::time::Instant;

/// A queue was not reset.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QueueResetError {
    /// The device has no queue of that number.
    #[error("the device has no queue {0}")]
    NoSuchQueue(u16),
    /// `RING_RESET` was not negotiated.
    #[error("the driver did not negotiate RING_RESET")]
    NotNegotiated,
    /// Its backend held on to requests beyond the deadline: the device needs a reset.
    #[error("requests of the queue are still out, the device needs a reset")]
    Stuck,
    /// The queue is being stopped already, or the device reset.
    #[error("the queue is being stopped already")]
    Stopping,
    /// The lane is gone.
    #[error("the device is shutting down")]
    Gone,
}

impl<D: VirtioDevice> Engine<D> {
    /// Resets a queue by itself: what was taken is given up, nothing is marked used or notified any more, and when the
    /// ticket ends the queue is as if it had never been set up: stopped, disabled, without an interrupt. It may be
    /// started again, of another size and elsewhere, while the other queues go on. One that is not started is just
    /// disabled.
    pub fn reset_queue(&self, queue: u16) -> Ticket<Result<(), QueueResetError>> {
        let Some(lane) = self.lane(queue) else {
            return Ticket::ready(Err(QueueResetError::NoSuchQueue(queue)));
        };
        if !self.driver_features().contains(Features::RING_RESET) {
            return Ticket::ready(Err(QueueResetError::NotNegotiated));
        }
        let (done, ticket) = ticket(Err(QueueResetError::Gone));
        lane.send(Command::ResetQueue { queue, deadline: Instant::now() + STOP_DEADLINE, done });
        ticket
    }
}
