//! A device whose one lane is stepped by hand, and its guest's memory: what targets that are a driver themselves have in common.
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vm_virtio::{
    Engine, EngineOptions, Features, GuestRam, HostEvent, HostEvents, Kick, LaneRunner, QueueConfig,
    QueueStart, Status, Ticket, VirtioDevice, WaitFor,
};

/// Turns that an order may take.
const TURNS: usize = 1000;
/// Entries of each ring.
pub(crate) const SIZE: u16 = 16;

struct Deaf;

impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

pub(crate) struct Stepped<D: VirtioDevice> {
    pub(crate) engine: Engine<D>,
    lane: LaneRunner<D::Worker>,
    memory: GuestMemoryMmap,
}

impl<D: VirtioDevice> Stepped<D> {
    /// With so many bytes of memory.
    pub(crate) fn new(device: D, memory: u64) -> Stepped<D> {
        let (engine, mut lanes) = Engine::new(device, EngineOptions::new(Arc::new(Deaf))).expect("an engine");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), memory as usize)]).expect("memory");
        let lane = lanes.pop().expect("a lane");
        assert!(lanes.is_empty(), "one lane");
        Stepped { engine, lane, memory }
    }

    pub(crate) fn turn(&mut self) {
        self.lane.turn(Some(Duration::ZERO));
    }

    /// Carries an order out.
    fn done<T>(&mut self, mut ticket: Ticket<T>) -> T {
        for _ in 0..TURNS {
            if let Some(value) = ticket.try_take() {
                return value;
            }
            self.turn();
        }
        panic!("an order without an end");
    }

    /// Adds these bits to the status.
    fn status(&mut self, bits: Status) {
        let ticket = self.engine.set_status(self.engine.status() | bits);
        self.done(ticket);
    }

    /// Everything before the rings: the driver takes what is offered but for these features; rings are split.
    pub(crate) fn negotiate(&mut self, without: Features) {
        self.status(Status::ACKNOWLEDGE | Status::DRIVER);
        let rings = Features::RING_PACKED | Features::EVENT_IDX | Features::IN_ORDER;
        let features = self.engine.offered() - (rings | without);
        self.engine.set_driver_features(features).expect("what was offered");
        self.status(Status::FEATURES_OK);
        let ticket = self.engine.memory(GuestRam::new(&self.memory), WaitFor::NewRequests);
        self.done(ticket);
    }

    /// A ring with its descriptors, its driver's and its device's part there.
    pub(crate) fn start(&mut self, queue: u16, [desc, driver, device]: [u64; 3]) {
        let [desc, driver, device] = [desc, driver, device].map(GuestAddress);
        let config = QueueConfig { size: SIZE, desc, driver, device };
        let start = QueueStart { config, state: None, inflight: None, kick: Kick::Manual, call: None };
        let ticket = self.engine.start(queue, start);
        self.done(ticket).expect("a queue");
        let ticket = self.engine.enable(queue, true);
        self.done(ticket);
    }

    /// The driver is ready.
    pub(crate) fn ready(&mut self) {
        self.status(Status::DRIVER_OK);
    }

    pub(crate) fn reset(&mut self) {
        let ticket = self.engine.set_status(Status::empty());
        self.done(ticket);
        assert_eq!(self.engine.status(), Status::empty());
    }

    pub(crate) fn write(&self, at: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(at)).expect("memory");
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).expect("memory");
        data
    }

    /// A number of two bytes.
    pub(crate) fn number(&self, at: u64) -> u16 {
        let bytes = self.read(at, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }
}
