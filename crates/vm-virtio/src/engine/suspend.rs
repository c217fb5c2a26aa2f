//! Suspending a device: by its driver, with the status bit (virtio 1.4, 3.4), or by its host, for a snapshot or a
//! migration, which no driver sees.
//!
//! In both cases queues pop nothing from the order on, requests that were taken are finished, the driver is notified of
//! them, and only then the device counts as suspended. Chains that a worker keeps without working on them (a request
//! that waits for an event) stay where they are.
use super::{Control, Core, Engine, STOP_DEADLINE, lock, wait_too};
use crate::Status;
use crate::device::{HostEvent, VirtioDevice};
use crate::lane::{By, Command, Gathering};
use crate::ticket::{Ticket, ticket};
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

/// A device did not come to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuspendError {
    /// Requests did not end within [`STOP_DEADLINE`], or a lane has failed: the device needs a reset.
    #[error("requests are still out, the device needs a reset")]
    Stuck,
    /// The lanes are gone.
    #[error("the device is shutting down")]
    Gone,
}

impl<D: VirtioDevice> Engine<D> {
    /// Suspends the device for its host. The driver sees nothing of it: the status stays. Config writes of the driver
    /// still reach the device. Twice is once; a reset does not end it.
    ///
    /// A change of memory that waits for old chains ([`crate::WaitFor::OldChainsGone`]) waits for kept ones until the
    /// device is resumed.
    pub fn suspend(&self) -> Ticket<Result<(), SuspendError>> {
        let (done, ticket) = ticket(Err(SuspendError::Gone));
        let core = self.0.clone();
        self.send_suspend(By::Host, move |stuck| {
            if stuck {
                core.shared.needs_reset("suspended by the host with requests still out".to_owned());
            }
            done.complete(if stuck { Err(SuspendError::Stuck) } else { Ok(()) });
        });
        ticket
    }

    /// Ends [`Engine::suspend`]: everything that runs is looked at.
    pub fn resume(&self) -> Ticket<()> {
        self.send_resume(By::Host)
    }

    fn send_suspend(&self, by: By, then: impl FnOnce(bool) + Send + 'static) {
        let deadline = Instant::now() + STOP_DEADLINE;
        let done = Gathering::new(then);
        for lane in &self.0.lanes {
            lane.send(Command::Suspend { by, deadline, done: done.clone() });
        }
    }

    fn send_resume(&self, by: By) -> Ticket<()> {
        let (done, ticket) = ticket(());
        let done = Arc::new(done);
        for lane in &self.0.lanes {
            lane.send(Command::Resume { by, done: done.clone() });
        }
        ticket
    }

    /// The driver set SUSPEND on a live device (3.4.2).
    pub(super) fn suspend_for_driver(&self, mut control: MutexGuard<'_, Control>) -> Ticket<()> {
        let (done, ticket) = ticket(());
        if let Some((_, waiting)) = control.suspending.as_mut() {
            wait_too(waiting, done);
            return ticket;
        }
        control.suspensions += 1;
        let number = control.suspensions;
        control.suspending = Some((number, vec![done]));
        // The last lane takes the lock.
        drop(control);
        let core = self.0.clone();
        self.send_suspend(By::Driver, move |stuck| core.suspended_by_driver(number, stuck));
        ticket
    }

    /// The driver set DRIVER_OK on a suspended device. The status first: nothing may be notified before (3.4.2).
    pub(super) fn resume_for_driver(&self, control: MutexGuard<'_, Control>) -> Ticket<()> {
        self.0.shared.change_status(Status::DRIVER_OK, Status::SUSPEND);
        let changed = self.0.config.release();
        // Under the lock, so that a suspension that another vCPU asks for now comes behind it.
        let ticket = self.send_resume(By::Driver);
        drop(control);
        // What happened meanwhile is news now (3.4.2), also that the device needs a reset (2.1.2).
        if changed || self.0.shared.status().contains(Status::DEVICE_NEEDS_RESET) {
            self.0.shared.events.event(HostEvent::ConfigChanged);
        }
        ticket
    }
}

impl<D: VirtioDevice> Core<D> {
    fn suspended_by_driver(&self, number: u64, stuck: bool) {
        let mut control = lock(&self.control);
        // A reset may have overtaken it.
        let waiting = control.suspending.take_if(|(current, _)| *current == number);
        if waiting.is_none() {
            return;
        }
        if !stuck {
            self.config.hold();
            self.shared.change_status(Status::SUSPEND, Status::DRIVER_OK);
        }
        drop(control);
        if stuck {
            self.shared.needs_reset("the driver suspended it with requests still out".to_owned());
        }
        drop(waiting);
    }
}
