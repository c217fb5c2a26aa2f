//! The driver's side of transports (virtio 1.4, section 4), written from the standard, and a machine around a device to
//! try it on.
//!
//! A [`Machine`] has no threads: lanes run when it is told to, so that what a test sees does not depend on timing.
mod ccw;
mod mmio;
mod pci;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

pub use vm_virtio::transport::Kicks;
use vm_virtio::transport::{Line, Options};
use vm_virtio::{
    Features, HostEvent, HostEvents, LaneRunner, QueueConfig, Status, VirtioDevice, WaitFor, Worker,
};

pub use ccw::{CcwDriver, ISC, Subchannel, TestChannel};
pub use mmio::{MmioDriver, RegisterAccess};
pub use pci::{PciDriver, TestFunction, VECTORS};

use crate::TestRam;

/// What an interrupt said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Heard {
    /// Queues that may have used buffers, a bit each. A transport with one interrupt for all names all.
    pub queues: u64,
    /// The configuration changed, or the device needs a reset.
    pub config: bool,
}

/// What a driver does to its device, whatever the registers look like.
pub trait TransportDriver {
    /// Every feature that is offered.
    fn offered(&mut self) -> Features;
    /// Chooses features.
    fn choose(&mut self, features: Features);
    /// The status field.
    fn status(&mut self) -> Status;
    /// Writes the status field; empty resets the device.
    fn write_status(&mut self, status: Status);
    /// The largest size of a queue, 0 if there is none of that number.
    fn queue_max(&mut self, queue: u16) -> u16;
    /// Sets up and enables a queue. Whether it is enabled then.
    fn start_queue(&mut self, queue: u16, config: &QueueConfig) -> bool;
    /// Resets a queue by itself (2.6.1), where the transport can.
    fn reset_queue(&mut self, queue: u16) {
        let _ = queue;
    }
    /// Whether the reset of a queue is still under way.
    fn is_queue_resetting(&mut self, queue: u16) -> bool {
        let _ = queue;
        true
    }
    /// Notifies the device.
    fn notify(&mut self, queue: u16);
    /// Configuration bytes, read as the standard demands for fields of any width.
    fn config(&mut self, offset: u32, len: u32) -> Vec<u8>;
    /// Handles the interrupt, if there is one.
    fn interrupt(&mut self) -> Heard;
    /// Features that belong to this transport only.
    fn own_features(&self) -> Features {
        Features::empty()
    }
}

/// An interrupt line with somebody who looks at it.
#[derive(Debug, Default)]
pub struct TestLine {
    high: AtomicBool,
    raised: AtomicU64,
}

impl TestLine {
    /// Whether it is high.
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }

    /// How often it was raised, also while it was high.
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::SeqCst)
    }
}

impl Line for TestLine {
    fn set(&self, high: bool) {
        self.high.store(high, Ordering::SeqCst);
        self.raised.fetch_add(u64::from(high), Ordering::SeqCst);
    }
}

/// Who does not care for events.
#[derive(Debug)]
pub struct Deaf;

impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

/// A device behind a transport, and its driver.
pub struct Machine {
    /// The driver.
    pub driver: Box<dyn TransportDriver>,
    step: Box<dyn FnMut() -> bool>,
}

/// Steps of a machine that never rests.
const RESTLESS: usize = 10_000;

impl Machine {
    /// A machine of these parts. `step` is one turn of its lanes and says whether anything was done.
    pub fn new(driver: Box<dyn TransportDriver>, step: Box<dyn FnMut() -> bool>) -> Machine {
        Machine { driver, step }
    }

    /// Options of a transport whose lanes are stepped: no access waits.
    pub fn options() -> Options {
        let mut options = Options::new(Arc::new(Deaf));
        options.patience = Duration::ZERO;
        options
    }

    /// A device behind virtio-mmio registers.
    ///
    /// # Panics
    /// If the engine refuses the device.
    pub fn mmio<D: VirtioDevice>(device: D, ram: &TestRam, kicks: Kicks) -> Machine {
        let line = Arc::new(TestLine::default());
        let mut options = Machine::options();
        options.kicks = kicks;
        let (mmio, lanes) = vm_virtio::transport::mmio::Mmio::new(device, options, 0x4b42, line.clone())
            .expect("a device that the engine takes");
        drop(mmio.engine().memory(ram.ram(), WaitFor::NewRequests));
        let driver = MmioDriver::new(Arc::new(mmio), move || line.is_high());
        Machine::new(Box::new(driver), stepper(lanes))
    }

    /// A device behind a subchannel. `adapter`: its driver takes adapter interrupts rather than classic ones.
    ///
    /// # Panics
    /// If the engine refuses the device.
    pub fn ccw<D: VirtioDevice>(device: D, ram: &TestRam, adapter: bool) -> Machine {
        let channel = Arc::new(TestChannel::default());
        let (ccw, lanes) = vm_virtio::transport::ccw::Ccw::new(device, Machine::options(), channel.clone())
            .expect("a device that the engine takes");
        drop(ccw.memory(ram.ram(), WaitFor::NewRequests));
        let driver = CcwDriver::new(Arc::new(ccw), channel, ram, adapter);
        Machine::new(Box::new(driver), stepper(lanes))
    }

    /// A device behind the structures of PCI. `messages`: its driver uses MSI-X rather than the pin.
    ///
    /// # Panics
    /// If the engine refuses the device.
    pub fn pci<D: VirtioDevice>(device: D, ram: &TestRam, messages: bool) -> Machine {
        let function = Arc::new(TestFunction::default());
        let (pci, lanes) = vm_virtio::transport::pci::Pci::new(device, Machine::options(), VECTORS)
            .expect("a device that the engine takes");
        pci.connect(function.clone());
        drop(pci.engine().memory(ram.ram(), WaitFor::NewRequests));
        let capabilities: Vec<_> =
            pci.capabilities(4).iter().map(|capability| [&[9, 0], &capability.body[..]].concat()).collect();
        let driver = PciDriver::new(Arc::new(pci), function, &capabilities, messages);
        Machine::new(Box::new(driver), stepper(lanes))
    }

    /// One turn of the lanes. Whether anything was done.
    pub fn step(&mut self) -> bool {
        (self.step)()
    }

    /// Runs the lanes until they have nothing to do. False: they do not come to rest.
    pub fn settle(&mut self) -> bool {
        (0..RESTLESS).any(|_| !self.step())
    }
}

/// What steps these lanes.
pub fn stepper<W: Worker>(mut lanes: Vec<LaneRunner<W>>) -> Box<dyn FnMut() -> bool> {
    Box::new(move || {
        // Not `any`: each has its turn.
        lanes.iter_mut().fold(false, |worked, lane| lane.turn(Some(Duration::ZERO)) | worked)
    })
}
