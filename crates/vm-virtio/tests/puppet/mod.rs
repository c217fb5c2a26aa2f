//! A device that does what a test tells it: for tests of transports.
#![allow(dead_code, reason = "each test uses a part of it")]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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

/// Where a test tells a worker what to do.
pub(crate) struct Orders {
    mail: Mail<Order>,
    given: usize,
    obeyed: Arc<AtomicUsize>,
}

impl Orders {
    /// For a lane that the test steps: the next step obeys.
    pub(crate) fn give(&mut self, order: Order) {
        self.mail.send(order).unwrap();
        self.given += 1;
    }

    /// For a lane on a thread: waits until the worker has obeyed. Requests come on another way than orders, and a turn that is
    /// under way serves those that it meets before it reads its mail: what is asked next would be served the old way.
    pub(crate) fn tell(&mut self, order: Order) {
        self.give(order);
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.obeyed.load(Ordering::Acquire) < self.given {
            assert!(Instant::now() < deadline, "{order:?} is not obeyed");
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// The device. Its configuration space: 6 bytes, of which a driver can change the last two.
pub(crate) struct Puppet {
    config: Arc<ConfigSpace>,
    orders: Sender<Vec<Orders>>,
    /// Of workers that were not told otherwise.
    mode: Mode,
}

/// A worker: one a queue.
pub(crate) struct Strings {
    mode: Mode,
    held: Vec<(u16, Chain)>,
    served: u64,
    config: Arc<ConfigSpace>,
    obeyed: Arc<AtomicUsize>,
}

#[derive(Serialize, Deserialize)]
struct Served(Vec<u64>);

impl Puppet {
    /// A device, and where it gets its orders: one a worker.
    pub(crate) fn new() -> (Puppet, Receiver<Vec<Orders>>) {
        let (orders, all) = channel();
        let config = Arc::new(ConfigSpace::new(vec![1, 2, 3, 4, 5, 6]));
        (Puppet { config, orders, mode: Mode::Echo }, all)
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
        let order = |mail: &Mail<Order>| Orders { mail: mail.clone(), given: 0, obeyed: Arc::default() };
        let orders: Vec<_> = mail.iter().map(order).collect();
        let worker = |orders: &Orders| Strings {
            mode: self.mode,
            held: Vec::new(),
            served: 0,
            config: self.config.clone(),
            obeyed: orders.obeyed.clone(),
        };
        let workers = orders.iter().map(worker).collect();
        let _ = self.orders.send(orders);
        Ok(workers)
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
        self.obeyed.fetch_add(1, Ordering::Release);
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
