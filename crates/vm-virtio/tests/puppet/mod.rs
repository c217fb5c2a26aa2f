//! A device that does what a test tells it: for tests of transports.
#![allow(dead_code, reason = "each test uses a part of it")]
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use reactor::Mail;
use serde::{Deserialize, Serialize};
use vm_virtio::shared_memory::ShmRegion;
use vm_virtio::{
    Chain, ConfigSpace, ConfigWriter, DeviceError, DeviceState, DeviceType, Features, HostEvent, HostEvents,
    Lane, QueueSpec, StateError, Stop, VirtioDevice, Worker,
};

/// A feature of the device's own.
pub(crate) const OWN: Features = Features::from_bits_retain(1 << 5);
/// One that it takes with [`OWN`] only.
pub(crate) const PICKY: Features = Features::from_bits_retain(1 << 6);
/// One that does not fit into 64 bits.
pub(crate) const HIGH: Features = Features::from_bits_retain(1 << 100);

/// What it answers.
pub(crate) const ANSWER: [u8; 8] = [0x5a; 8];

/// What the workers do with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Answer at once.
    Echo,
    /// Answer at once how many requests there were so far; restored ones count.
    Count,
    /// Keep them until they are told to answer or asked to stop.
    Hold,
    /// Keep them whatever happens.
    Hang,
}

/// What a test tells a worker.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    Be(Mode),
    /// Changes the first byte of the configuration space.
    Configure(u8),
    Fail,
}

/// The device. Its configuration space: 6 bytes, of which a driver can change the last two.
pub(crate) struct Puppet {
    config: Arc<ConfigSpace>,
    mail: Sender<Vec<Mail<Order>>>,
    /// Of workers that were not told otherwise.
    mode: Mode,
}

/// A worker: one a queue.
pub(crate) struct Strings {
    mode: Mode,
    held: Vec<(u16, Chain)>,
    served: u64,
    config: Arc<ConfigSpace>,
}

#[derive(Serialize, Deserialize)]
struct Served(Vec<u64>);

impl Puppet {
    /// A device, and where its mailboxes come out.
    pub(crate) fn new() -> (Puppet, Receiver<Vec<Mail<Order>>>) {
        let (mail, mails) = channel();
        let config = Arc::new(ConfigSpace::new(vec![1, 2, 3, 4, 5, 6]));
        (Puppet { config, mail, mode: Mode::Echo }, mails)
    }

    /// One that counts requests.
    pub(crate) fn counting() -> Puppet {
        let (mut puppet, _) = Puppet::new();
        puppet.mode = Mode::Count;
        puppet
    }
}

impl VirtioDevice for Puppet {
    type Worker = Strings;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        OWN | PICKY | HIGH
    }
    fn check_features(&self, driver: Features) -> bool {
        !driver.contains(PICKY) || driver.contains(OWN)
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![
            QueueSpec { name: "left", max_size: 64, lane: 0 },
            QueueSpec { name: "right", max_size: 16, lane: 1 },
        ]
    }
    fn config(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }
    fn write_config(&mut self, offset: u32, data: &[u8], by: ConfigWriter) {
        for (at, byte) in (offset..).zip(data) {
            if by == ConfigWriter::Migration || at >= 4 {
                self.config.set(at, &[*byte]).unwrap();
            }
        }
    }
    fn shared_memory(&self) -> &[ShmRegion] {
        &[ShmRegion { id: 3, size: 0x9_0000_1000 }]
    }
    fn workers(&mut self, mail: &[Mail<Order>]) -> Result<Vec<Strings>, DeviceError> {
        let _ = self.mail.send(mail.to_vec());
        let worker = || Strings { mode: self.mode, held: Vec::new(), served: 0, config: self.config.clone() };
        Ok(vec![worker(), worker()])
    }
    fn save(&self, workers: &[Strings]) -> Result<DeviceState, StateError> {
        DeviceState::encode(1, &Served(workers.iter().map(|worker| worker.served).collect()))
    }
    fn restore(&mut self, workers: &mut [Strings], state: &DeviceState) -> Result<(), StateError> {
        let Served(served) = state.decode(1)?;
        if served.len() != workers.len() {
            return Err(StateError::refused("lanes"));
        }
        workers.iter_mut().zip(served).for_each(|(worker, served)| worker.served = served);
        Ok(())
    }
    fn reset(&mut self, workers: &mut [Strings]) {
        for worker in workers {
            worker.mode = self.mode;
            worker.held.clear();
        }
    }
}

impl Worker for Strings {
    type Msg = Order;
    fn queue_ready(&mut self, number: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            self.served += 1;
            match self.mode {
                Mode::Echo | Mode::Count => {
                    let count = self.served.to_le_bytes();
                    let answer = if self.mode == Mode::Count { count } else { ANSWER };
                    let written = queue.writer(&chain).write(&answer) as u32;
                    queue.add_used(chain, written);
                }
                Mode::Hold | Mode::Hang => self.held.push((number, chain)),
            }
        }
        Ok(())
    }
    fn queue_stop(&mut self, number: u16, how: Stop, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(number) else { return };
        if self.mode == Mode::Hang {
            return;
        }
        for (_, chain) in self.held.extract_if(.., |(of, _)| *of == number) {
            match how {
                Stop::Drain => queue.add_used(chain, 0),
                Stop::Discard => queue.discard(chain),
            }
        }
    }
    fn message(&mut self, order: Order, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        match order {
            Order::Be(mode) => {
                self.mode = mode;
                for (number, chain) in
                    std::mem::take(&mut self.held).into_iter().filter(|_| mode == Mode::Echo)
                {
                    if let Some(queue) = lane.queues.get(number) {
                        queue.add_used(chain, 0);
                    }
                }
            }
            Order::Configure(value) => {
                if self.config.set(0, &[value]).unwrap() {
                    lane.up.config_changed();
                }
            }
            Order::Fail => return Err(DeviceError::new("told to fail")),
        }
        Ok(())
    }
}

/// Keeps what it hears.
#[derive(Default)]
pub(crate) struct Ear(pub(crate) Mutex<Vec<HostEvent>>);

impl HostEvents for Ear {
    fn event(&self, event: HostEvent) {
        self.0.lock().unwrap().push(event);
    }
}
