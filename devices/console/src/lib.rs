//! The virtio console device (type 3, virtio 1.4 section 5.3): up to 31 ports, each with two queues, and two queues for
//! control.
//!
//! | module | what for |
//! |---|---|
//! | [`control`] | the MULTIPORT messages, as pure code |
//! | [`spec`] | what a port is to be |
//! | `port.rs` | one port: bytes between its queues and the host |
//! | `backend/` | the host's side: terminals, sockets, files |
//! | `replay.rs` | output for who is not there yet |
//! | [`ConsoleWorker`] (`worker.rs`) | all of it on one lane |
//! | `controls.rs` | what can be seen and changed while it runs |
//! | `state.rs` | what is saved |
//!
//! Two rules shape it: nobody who is slow - a client, the guest, a port - holds up anybody else; and no chain is kept, so
//! that there is nothing to wait for when queues stop. Output without a client is kept, up to a bound, for the next one.
mod backend;
pub mod control;
mod controls;
mod port;
mod replay;
pub mod spec;
mod state;
mod worker;

use std::sync::Arc;

use reactor::Mail;
use vm_virtio::controls::{ControlRequest, Controls};
use vm_virtio::{
    ConfigSpace, ConfigWriter, DeviceError, DeviceState, DeviceType, Features, HostError, HostReply,
    QueueSpec, StateError, VirtioDevice,
};

pub use backend::OpenError;
pub use control::MAX_PORTS;
pub use spec::{PortSpec, SpecError, Target};
pub use worker::{ConsoleWorker, Order};

use port::Port;

/// Entries of each queue if nothing else is said.
pub const QUEUE_SIZE: u16 = 128;

/// `VIRTIO_CONSOLE_F_SIZE` (5.3.3).
pub const SIZE: u64 = 1 << 0;
/// `VIRTIO_CONSOLE_F_MULTIPORT` (5.3.3).
pub const MULTIPORT: u64 = 1 << 1;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE` (5.3.3).
pub const EMERG_WRITE: u64 = 1 << 2;

/// Offset of `max_nr_ports` in the configuration space (5.3.4).
const MAX_NR_PORTS: u32 = 4;
/// Offset of `emerg_wr`.
const EMERG_WR: u32 = 8;

/// The queues of a port (5.3.2).
pub(crate) struct Queues {
    pub(crate) receive: u16,
    pub(crate) transmit: u16,
}

pub(crate) fn queues_of(port: u32) -> Queues {
    // The control queues are where a port 0.5 would have its own. Ports are few.
    let port = u16::try_from(port).unwrap_or(u16::MAX / 4);
    let receive = if port == 0 { 0 } else { 2 * port + 2 };
    Queues { receive, transmit: receive + 1 }
}

/// A console device that cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConsoleError {
    /// More ports than there can be, or none.
    #[error("{0} ports; a device has 1 to {MAX_PORTS}")]
    Ports(usize),
    /// Two ports of one name.
    #[error("two ports have the name {0:?}; a guest could not tell them apart")]
    SameName(String),
    /// The size is none of a queue.
    #[error("a queue of {0} entries; it has to be a power of two from 2 to 32768")]
    QueueSize(u16),
    /// The host's side of a port.
    #[error("port {0}: {1}")]
    Open(u32, #[source] OpenError),
}

/// The console device of one guest.
pub struct Console {
    worker: Option<ConsoleWorker>,
    operator: controls::Operator,
    config: Arc<ConfigSpace>,
    max_ports: u32,
    queue_size: u16,
}

impl Console {
    /// A device with these ports, numbered from 0, and room for up to `max_ports` in all; queues of up to `queue_size`
    /// entries. Opens the host's sides, and blocks SIGWINCH in this thread if one of them is a terminal: call it before
    /// threads are started.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn new(specs: &[PortSpec], max_ports: u32, queue_size: u16) -> Result<Console, ConsoleError> {
        let count = u32::try_from(specs.len()).unwrap_or(u32::MAX);
        let max_ports = max_ports.max(count);
        if count == 0 || max_ports > MAX_PORTS {
            return Err(ConsoleError::Ports(
                specs.len().max(usize::try_from(max_ports).unwrap_or(usize::MAX)),
            ));
        }
        if !queue_size.is_power_of_two() || !(2..=1 << 15).contains(&queue_size) {
            return Err(ConsoleError::QueueSize(queue_size));
        }
        for (at, spec) in specs.iter().enumerate() {
            if !spec.name.is_empty() && specs.iter().take(at).any(|other| other.name == spec.name) {
                return Err(ConsoleError::SameName(spec.name.clone()));
            }
        }
        let mut ports = Vec::new();
        for (id, spec) in (0..).zip(specs) {
            ports.push(Some(Port::open(id, spec).map_err(|error| ConsoleError::Open(id, error))?));
        }
        ports.resize_with(usize::try_from(max_ports).unwrap_or(0), || None);
        let size = ports.iter().flatten().next().map(|port| port.seen.size()).unwrap_or_default();
        let mut config = [size.cols.to_le_bytes(), size.rows.to_le_bytes()].concat();
        config.extend(max_ports.to_le_bytes());
        // emerg_wr is for writing only.
        config.extend([0; 4]);
        let config = Arc::new(ConfigSpace::new(config));
        let operator = controls::Operator::new(&ports);
        let worker = Some(ConsoleWorker::new(ports, config.clone()));
        Ok(Console { worker, operator, config, max_ports, queue_size })
    }

    /// The host's side of each port, for people: the path of a terminal, the address of a socket.
    pub fn places(&self) -> impl Iterator<Item = (u32, String)> {
        self.operator.places()
    }
}

impl VirtioDevice for Console {
    type Worker = ConsoleWorker;

    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }

    fn features(&self) -> Features {
        Features::from(SIZE | MULTIPORT | EMERG_WRITE)
    }

    fn queues(&self, features: Features) -> Vec<QueueSpec> {
        let spec = |name| QueueSpec { name, max_size: self.queue_size, lane: 0 };
        let mut queues = vec![spec("receiveq"), spec("transmitq")];
        if features.contains(Features::from(MULTIPORT)) {
            queues.extend([spec("control receiveq"), spec("control transmitq")]);
            queues.extend((1..self.max_ports).flat_map(|_| [spec("receiveq"), spec("transmitq")]));
        }
        queues
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    /// The driver can write `emerg_wr`, at any time (5.3.5.1). Front-ends that do not say which bytes changed send all of
    /// them: then a 0 is no character.
    fn write_config(&mut self, offset: u32, data: &[u8], by: ConfigWriter) {
        if by == ConfigWriter::Migration {
            // The number of ports is this device's own: the engine refuses the state of one with another.
            let head = data.get(..usize::try_from(MAX_NR_PORTS.saturating_sub(offset)).unwrap_or(0));
            let _ = self.config.set(offset, head.unwrap_or(data));
            return;
        }
        let Some(at) = EMERG_WR.checked_sub(offset).and_then(|at| usize::try_from(at).ok()) else { return };
        if let Some(byte) = data.get(at)
            && (*byte != 0 || at == 0)
        {
            self.operator.emergency(*byte);
        }
    }

    fn controls(&self) -> Controls {
        controls::list(self.max_ports)
    }

    fn control(&mut self, request: ControlRequest) -> Result<HostReply, HostError> {
        self.operator.carry_out(request)
    }

    fn workers(&mut self, mail: &[Mail<Order>]) -> Result<Vec<ConsoleWorker>, DeviceError> {
        self.operator.attach(mail.first().cloned());
        let worker = self.worker.take().ok_or_else(|| DeviceError::new("the worker was made before"))?;
        Ok(vec![worker])
    }

    fn save(&self, workers: &[ConsoleWorker]) -> Result<DeviceState, StateError> {
        let worker = workers.first().ok_or(StateError::Unsupported)?;
        DeviceState::encode(state::VERSION, &worker.save())
    }

    fn restore(&mut self, workers: &mut [ConsoleWorker], state: &DeviceState) -> Result<(), StateError> {
        let worker = workers.first_mut().ok_or(StateError::Unsupported)?;
        worker.restore(state.decode(state::VERSION)?)
    }

    fn reset(&mut self, workers: &mut [ConsoleWorker]) {
        workers.iter_mut().for_each(ConsoleWorker::reset);
    }
}
