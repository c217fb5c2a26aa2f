//! The virtio entropy device (type 4, virtio 1.4 section 5.4): one queue, `requestq`, whose buffers the device fills
//! with random bytes. No features, no configuration, nothing to keep over a reset.
//!
//! | module | what for |
//! |---|---|
//! | [`Entropy`] (`backend/`) | where bytes come from: the kernel, a file or device, a seeded generator |
//! | `controls.rs` | what can be seen and changed while it runs |
//! | [`RngWorker`] (`worker.rs`) | serves the queue |
//! | `state.rs` | what is saved |
//!
//! Two rules shape the worker: a request is answered with at least one byte or not yet (5.4.6.2), and nothing ever
//! sleeps. So a request that cannot be served now - the source has nothing, the period's bytes are spent - stays in
//! the ring, where a stop or reset finds nothing to wait for, until a timer or the source's file says to look again.
mod backend;
mod controls;
mod state;
mod worker;

use std::io;

use reactor::Mail;
use vm_virtio::controls::{ControlRequest, Controls};
use vm_virtio::{
    DeviceError, DeviceState, DeviceType, Features, HostError, HostReply, QueueSpec, StateError, VirtioDevice,
};

pub use backend::{Entropy, OpenError};
pub use vm_virtio::limit::{LimitError, RateLimit};
pub use worker::{MAX_REQUEST, RngWorker, SetLimit};

/// Entries of the request queue, at most.
pub const QUEUE_SIZE: u16 = 1024;

/// The entropy device of one guest.
pub struct Rng {
    worker: Option<RngWorker>,
    controls: controls::Operator,
}

impl Rng {
    /// A device that serves guest number `guest` from `entropy`. `limit` holds for this guest alone: what several
    /// share is divided by [`RateLimit::share`] before.
    ///
    /// # Errors
    /// Without descriptors left.
    pub fn new(entropy: &Entropy, guest: u32, limit: Option<RateLimit>) -> io::Result<Rng> {
        let worker = Some(RngWorker::new(entropy.source(guest)?, limit));
        Ok(Rng { worker, controls: controls::Operator::new(entropy.name(), limit) })
    }
}

impl VirtioDevice for Rng {
    type Worker = RngWorker;

    fn device_type(&self) -> DeviceType {
        DeviceType::ENTROPY
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queues(&self, _features: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "requestq", max_size: QUEUE_SIZE, lane: 0 }]
    }

    fn controls(&self) -> Controls {
        controls::list()
    }

    fn control(&mut self, request: ControlRequest) -> Result<HostReply, HostError> {
        self.controls.carry_out(request)
    }

    fn workers(&mut self, mail: &[Mail<SetLimit>]) -> Result<Vec<RngWorker>, DeviceError> {
        self.controls.attach(mail.first().cloned());
        let worker = self.worker.take().ok_or_else(|| DeviceError::new("the worker was made before"))?;
        Ok(vec![worker])
    }

    fn save(&self, workers: &[RngWorker]) -> Result<DeviceState, StateError> {
        let worker = workers.first().ok_or(StateError::Unsupported)?;
        DeviceState::encode(state::VERSION, &worker.save())
    }

    fn restore(&mut self, workers: &mut [RngWorker], state: &DeviceState) -> Result<(), StateError> {
        let worker = workers.first_mut().ok_or(StateError::Unsupported)?;
        worker.restore(state.decode(state::VERSION)?)
    }

    fn reset(&mut self, workers: &mut [RngWorker]) {
        workers.iter_mut().for_each(RngWorker::reset);
    }
}
