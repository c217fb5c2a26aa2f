//! The virtio socket device (type 19, virtio 1.4 section 5.10): AF_VSOCK sockets of a guest, connected to sockets of the
//! host and to other guests.
//!
//! | module | what for |
//! |---|---|
//! | [`packet`] | headers, operations, flags |
//! | `flow.rs` | one connection as a state machine without I/O: credit, shutdown, what is owed |
//! | `table.rs` | all connections of a guest: ids, turns, deadlines, promises of memory |
//! | `backlog.rs` | what a socket of the host has not taken yet |
//! | `worker.rs`, `from_guest.rs`, `to_guest.rs`, `host_side.rs` | serve the queues and sockets |
//! | `poller.rs`, `syscall.rs` | readiness of many sockets; payload between guest memory and sockets |
//! | `backend/` | Unix sockets, AF_VSOCK and siblings |
//! | `controls.rs` | what can be seen while it runs |
//!
//! Nothing of a connection survives a migration or the end of the process: what is saved is nothing, and a restored device, or
//! the successor of one that was killed, tells the guest that its connections are gone (5.10.6.7).
mod backend;
mod backlog;
mod controls;
mod flow;
mod from_guest;
mod host_side;
pub mod packet;
mod poller;
mod syscall;
mod table;
mod to_guest;
mod worker;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use reactor::Mail;
use vm_virtio::controls::{ControlRequest, Controls};
use vm_virtio::{
    ConfigSpace, DeviceError, DeviceState, DeviceType, Features, HostReply, QueueSpec, StateError,
    VirtioDevice,
};

pub use backend::sibling::{Exchange, Visitor};
pub use backend::{HostError, HostSide, ListenPort};
pub use table::MAX_CONNECTIONS;
pub use worker::VsockWorker;

use backend::Host;
use worker::Gauges;

/// `VIRTIO_VSOCK_F_STREAM` (5.10.3).
pub const STREAM: Features = Features::from_bits_retain(1 << 0);
/// `VIRTIO_VSOCK_F_SEQPACKET`.
pub const SEQPACKET: Features = Features::from_bits_retain(1 << 1);
/// `VIRTIO_VSOCK_F_NO_IMPLIED_STREAM`.
pub const NO_IMPLIED_STREAM: Features = Features::from_bits_retain(1 << 2);

/// The socket device (5.10.1).
pub const SOCKET: DeviceType = DeviceType(19);

/// Entries of a queue if nothing else is said.
pub const QUEUE_SIZE: u16 = 1024;
/// What a guest may send on a connection before the host's side has taken it, in bytes, if nothing else is said.
pub const BUFFER_SIZE: u32 = 256 << 10;

/// What one guest gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Its context ID: not a reserved one (5.10.4).
    pub guest_cid: u64,
    /// Where its connections go to and come from.
    pub host: HostSide,
    /// What it may send on a connection before the host's side has taken it, in bytes: 4096 to 16 MiB. With many
    /// connections it is less for each.
    pub buffer_size: u32,
    /// Largest size of a queue: a power of two, at most 32768.
    pub queue_size: u16,
    /// It reaches guests that share one of these.
    pub groups: Vec<String>,
    /// How long it waits for whom.
    pub timeouts: Timeouts,
}

/// How long a device waits for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a client's CONNECT line.
    pub greeting: Duration,
    /// For what the guest connects to. Linux guests give up after 2 s, if not told otherwise.
    pub connect: Duration,
    /// For a guest's answer to a client.
    pub answer: Duration,
    /// For a guest's RST that ends a connection (5.10.6.5). Linux gives its peers as long.
    pub close: Duration,
    /// For a client to take what is left of a connection that its guest has closed, from the last time it took some.
    pub drain: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            greeting: Duration::from_secs(10),
            connect: Duration::from_secs(2),
            answer: Duration::from_secs(10),
            close: Duration::from_secs(8),
            drain: Duration::from_secs(30),
        }
    }
}

impl Settings {
    /// A guest of that context ID with the usual sizes, in the group `default`.
    pub fn new(guest_cid: u64, host: HostSide) -> Settings {
        Settings {
            guest_cid,
            host,
            buffer_size: BUFFER_SIZE,
            queue_size: QUEUE_SIZE,
            groups: vec!["default".to_owned()],
            timeouts: Timeouts::default(),
        }
    }
}

/// A device that cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// 5.10.4.
    #[error("context ID {0} is reserved (0, 1, 2, 4294967295 and above); use another, e.g. 3")]
    ReservedCid(u64),
    /// Not a size.
    #[error("a buffer of {0} bytes is not between 4096 and 16777216; use a size in that range")]
    BufferSize(u32),
    /// Not a size.
    #[error("a queue of {0} entries is not a power of two between 1 and 32768; use one that is")]
    QueueSize(u16),
    /// The host's side.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Descriptors, mostly.
    #[error("cannot make the device: {0}")]
    System(#[from] io::Error),
}

impl Settings {
    /// Checks what can be checked without creating anything.
    pub fn check(&self) -> Result<(), SetupError> {
        if !packet::is_guest_cid(self.guest_cid) {
            return Err(SetupError::ReservedCid(self.guest_cid));
        }
        if !(4096..=16 << 20).contains(&self.buffer_size) {
            return Err(SetupError::BufferSize(self.buffer_size));
        }
        if !self.queue_size.is_power_of_two() {
            return Err(SetupError::QueueSize(self.queue_size));
        }
        Ok(())
    }
}

/// The socket device of one guest.
pub struct Vsock {
    cid: u32,
    queue_size: u16,
    groups: Vec<String>,
    exchange: Exchange,
    /// It is known to the others under its context ID.
    joined: bool,
    config: Arc<ConfigSpace>,
    gauges: Arc<Gauges>,
    worker: Option<VsockWorker>,
}

impl Vsock {
    /// A device with these settings, whose siblings are those of the same exchange. Listens from here on.
    ///
    /// # Errors
    /// Settings that make no sense; sockets that cannot be had.
    pub fn new(settings: Settings, exchange: &Exchange) -> Result<Vsock, SetupError> {
        settings.check()?;
        let cid =
            u32::try_from(settings.guest_cid).map_err(|_| SetupError::ReservedCid(settings.guest_cid))?;
        let host = Host::open(settings.host.clone(), settings.buffer_size)?;
        let gauges = Arc::new(Gauges::default());
        let worker = VsockWorker::new(cid, &settings, host, exchange.clone(), Arc::clone(&gauges));
        Ok(Vsock {
            cid,
            queue_size: settings.queue_size,
            groups: settings.groups,
            exchange: exchange.clone(),
            joined: false,
            config: Arc::new(ConfigSpace::new(settings.guest_cid.to_le_bytes().to_vec())),
            gauges,
            worker: Some(worker),
        })
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        if self.joined {
            self.exchange.leave(self.cid);
        }
    }
}

impl VirtioDevice for Vsock {
    type Worker = VsockWorker;

    fn device_type(&self) -> DeviceType {
        SOCKET
    }

    fn features(&self) -> Features {
        VsockWorker::features()
    }

    fn queues(&self, _features: Features) -> Vec<QueueSpec> {
        ["rx", "tx", "event"].map(|name| QueueSpec { name, max_size: self.queue_size, lane: 0 }).to_vec()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn controls(&self) -> Controls {
        controls::list()
    }

    fn control(&mut self, request: ControlRequest) -> Result<HostReply, vm_virtio::HostError> {
        controls::carry_out(request, self.cid, &self.gauges)
    }

    fn workers(&mut self, mail: &[Mail<Visitor>]) -> Result<Vec<VsockWorker>, DeviceError> {
        let worker = self.worker.take().ok_or_else(|| DeviceError::new("the worker was made before"))?;
        let mail = mail.first().ok_or_else(|| DeviceError::new("a lane without a mailbox"))?;
        if !self.exchange.join(self.cid, &self.groups, mail.clone()) {
            return Err(DeviceError::new(format!("context ID {} is another guest's", self.cid)));
        }
        self.joined = true;
        Ok(vec![worker])
    }

    fn save(&self, _workers: &[VsockWorker]) -> Result<DeviceState, StateError> {
        Ok(DeviceState::empty())
    }

    fn restore(&mut self, workers: &mut [VsockWorker], state: &DeviceState) -> Result<(), StateError> {
        state.decode_empty()?;
        workers.iter_mut().for_each(VsockWorker::announce_reset);
        Ok(())
    }

    fn reset(&mut self, workers: &mut [VsockWorker]) {
        workers.iter_mut().for_each(VsockWorker::reset);
    }
}
