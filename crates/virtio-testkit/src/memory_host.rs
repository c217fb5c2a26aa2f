//! A device in this process: engine, lanes and rings in one thread, driven step by step.
//!
//! Nothing happens unless a test calls [`MemoryHost::step`] or something made of it, so what a test sees does not
//! depend on timing. [`MemoryHost::settle`] runs the device until it rests and then checks what it owes: interrupts
//! (2.7.7.2, 2.8.10), nothing before DRIVER_OK (2.1.2), nothing written that is the driver's.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_virtio::{
    Call, ConfigSpace, Engine, EngineOptions, Features, HostEvent, HostEvents, Interrupt, Kick, LaneRunner,
    QueueStart, QueueState, RingPos, SavedQueue, Status, Stop, StopError, Ticket, VirtioDevice, WaitFor,
};

use crate::violation::expect;
use crate::{RingDriver, RingLayout, TestRam, Violation};

/// Turns without an end in sight: the device is busy with itself.
const RESTLESS: usize = 10_000;
/// How long an order to the engine may take.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Calls(AtomicU64);

impl Interrupt for Calls {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct Events(Mutex<Vec<HostEvent>>);

impl HostEvents for Events {
    fn event(&self, event: HostEvent) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }
}

/// How a [`MemoryHost`] is set up.
pub struct MemoryHostBuilder<D: VirtioDevice> {
    device: D,
    layout: RingLayout,
    without: Features,
    wanted: Features,
    queue_size: u16,
    start: RingPos,
    ram: Option<TestRam>,
    tune: Box<dyn FnOnce(&mut EngineOptions)>,
}

impl<D: VirtioDevice> MemoryHostBuilder<D> {
    /// The layout of all rings; split if not said otherwise.
    pub fn layout(mut self, layout: RingLayout) -> Self {
        self.layout = layout;
        self
    }

    /// Features that the driver does not take. Otherwise it takes the device's own, and [`RingLayout::features`].
    pub fn without(mut self, features: Features) -> Self {
        self.without = features;
        self
    }

    /// Features that the driver takes in addition, if they are offered, e.g. `IN_ORDER`.
    pub fn with(mut self, features: Features) -> Self {
        self.wanted = features;
        self
    }

    /// Entries of each ring, at most what the device allows. 64 if not said otherwise.
    pub fn queue_size(mut self, size: u16) -> Self {
        self.queue_size = size;
        self
    }

    /// Where the rings begin, see [`RingDriver::start_at`]; then [`MemoryHost::start_queue`] has to say the same.
    pub fn start_at(mut self, start: RingPos) -> Self {
        self.start = start;
        self
    }

    /// The guest's memory. Two regions of 8 MiB if not said otherwise.
    pub fn ram(mut self, ram: TestRam) -> Self {
        self.ram = Some(ram);
        self
    }

    /// Changes the engine's options.
    pub fn options(mut self, tune: impl FnOnce(&mut EngineOptions) + 'static) -> Self {
        self.tune = Box::new(tune);
        self
    }

    /// The device as a driver finds it: nothing negotiated, status 0.
    ///
    /// # Panics
    /// If the engine refuses the device.
    pub fn build(self) -> MemoryHost<D> {
        let events = Arc::new(Events::default());
        let mut options = EngineOptions::new(Arc::clone(&events) as Arc<dyn HostEvents>);
        // The driver's side of each of them is in the tests that use it.
        options.carried = Features::CARRIED - Features::NOTIF_CONFIG_DATA;
        (self.tune)(&mut options);
        let (engine, lanes) = Engine::new(self.device, options).expect("a device that the engine takes");
        let offered = engine.offered();
        let own = offered - Features::NOT_A_DEVICES;
        let features = offered & ((own | self.layout.features() | self.wanted) - self.without);
        let wants_packed = self.layout == RingLayout::Packed;
        assert_eq!(
            features.contains(Features::RING_PACKED),
            wants_packed,
            "the layout follows from the features"
        );
        let ram = self.ram.unwrap_or_else(|| TestRam::spread(2, 8 << 20));
        let ring = |max: u16| {
            RingDriver::start_at(&ram, self.layout, self.queue_size.min(max), features, self.start)
        };
        let rings: Vec<_> = engine.queues().iter().map(|spec| ring(spec.max_size)).collect();
        let calls = rings.iter().map(|_| Arc::new(Calls::default())).collect();
        let seen = vec![0; rings.len()];
        MemoryHost { engine, lanes, ram, rings, calls, seen, events, features }
    }

    /// The device after a complete initialisation (3.1.1): all queues run.
    ///
    /// # Panics
    /// If the device refuses what it offered.
    pub fn start(self) -> MemoryHost<D> {
        let mut host = self.build();
        host.initialise();
        host
    }
}

/// A device under its engine, with a [`RingDriver`] for each queue.
pub struct MemoryHost<D: VirtioDevice> {
    engine: Engine<D>,
    lanes: Vec<LaneRunner<D::Worker>>,
    ram: TestRam,
    rings: Vec<RingDriver>,
    calls: Vec<Arc<Calls>>,
    /// Interrupts that [`MemoryHost::settle`] knows of.
    seen: Vec<u64>,
    events: Arc<Events>,
    features: Features,
}

impl<D: VirtioDevice> MemoryHost<D> {
    /// Starts a description of how to run this device.
    pub fn builder(device: D) -> MemoryHostBuilder<D> {
        MemoryHostBuilder {
            device,
            layout: RingLayout::Split,
            without: Features::empty(),
            wanted: Features::empty(),
            queue_size: 64,
            start: RingPos::START,
            ram: None,
            tune: Box::new(|_| {}),
        }
    }

    /// The engine, for everything that has no short form here.
    pub fn engine(&self) -> &Engine<D> {
        &self.engine
    }

    /// Guest memory.
    pub fn ram(&self) -> &TestRam {
        &self.ram
    }

    /// The driver's side of a queue.
    pub fn ring(&mut self, queue: usize) -> &mut RingDriver {
        &mut self.rings[queue]
    }

    /// The configuration space.
    pub fn config(&self) -> &Arc<ConfigSpace> {
        self.engine.config()
    }

    /// What is negotiated.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Interrupts of a queue so far.
    pub fn interrupts(&self, queue: usize) -> u64 {
        self.calls[queue].0.load(Ordering::SeqCst)
    }

    /// Events since the last call.
    pub fn events(&self) -> Vec<HostEvent> {
        std::mem::take(&mut self.events.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The initialisation of 3.1.1, with the rings as they are: buffers may already be in them.
    ///
    /// # Panics
    /// If the device refuses what it offered.
    pub fn initialise(&mut self) {
        self.initialise_at(vec![None; self.rings.len()]);
    }

    /// Another device in place of this one, whose process was killed: the driver notices nothing, and its rings go on where
    /// they are.
    ///
    /// # Panics
    /// If the engine refuses the device, or it has other queues or features.
    pub fn take_over(mut self, device: D) -> MemoryHost<D> {
        let states = (0..self.rings.len()).map(|queue| self.stop_queue(queue, Stop::Drain).ok()).collect();
        let mut successor = self.successor(device);
        successor.initialise_at(states);
        successor.settle();
        successor
    }

    fn initialise_at(&mut self, states: Vec<Option<QueueState>>) {
        self.set_status(Status::ACKNOWLEDGE);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        self.engine.set_driver_features(self.features).expect("features that were offered");
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        assert!(
            self.engine.status().contains(Status::FEATURES_OK),
            "the device takes every valid subset (2.2.2)"
        );
        let order = self.engine.memory(self.ram.ram(), WaitFor::NewRequests);
        self.finish(order);
        for (queue, state) in states.into_iter().enumerate() {
            self.start_queue(queue, state);
            let order = self.engine.enable(queue as u16, true);
            self.finish(order);
        }
        self.settle();
        self.set_status(self.engine.status() | Status::DRIVER_OK);
        assert!(self.engine.status().contains(Status::DRIVER_OK));
    }

    /// Starts a stopped queue, where `state` says.
    ///
    /// # Panics
    /// If the engine refuses.
    pub fn start_queue(&mut self, queue: usize, state: Option<QueueState>) {
        let config = self.rings[queue].queue_config();
        let call: Call = Some(Arc::clone(&self.calls[queue]) as Arc<dyn Interrupt>);
        let order = self
            .engine
            .start(queue as u16, QueueStart { config, state, inflight: None, kick: Kick::Manual, call });
        self.finish(order).expect("a queue that starts");
    }

    /// Another device on the memory, rings and interrupts of this one, which is gone: nothing is negotiated yet. For
    /// devices that are restored elsewhere.
    ///
    /// # Panics
    /// If the engine refuses the device, or it has other queues.
    pub fn successor(self, device: D) -> MemoryHost<D> {
        let MemoryHost { engine, lanes, ram, rings, calls, seen, events, features } = self;
        drop((engine, lanes));
        let mut options = EngineOptions::new(Arc::clone(&events) as Arc<dyn HostEvents>);
        options.carried = Features::CARRIED - Features::NOTIF_CONFIG_DATA;
        let (engine, lanes) = Engine::new(device, options).expect("a device that the engine takes");
        assert_eq!(engine.queues().len(), rings.len(), "the same type of device");
        MemoryHost { engine, lanes, ram, rings, calls, seen, events, features }
    }

    /// Starts the queues of a restored device where they were.
    ///
    /// # Panics
    /// If the engine refuses.
    pub fn start_restored(&mut self, queues: Vec<SavedQueue>) {
        for SavedQueue { index, enabled, config, state } in queues {
            assert_eq!(config, self.rings[usize::from(index)].queue_config());
            self.start_queue(usize::from(index), Some(state));
            let order = self.engine.enable(index, enabled);
            self.finish(order);
        }
    }

    /// Stops a queue.
    pub fn stop_queue(&mut self, queue: usize, how: Stop) -> Result<QueueState, StopError> {
        let order = self.engine.stop(queue as u16, how, None);
        self.finish(order)
    }

    /// Writes the status field and waits until that is done.
    pub fn set_status(&mut self, status: Status) {
        let order = self.engine.set_status(status);
        self.finish(order);
    }

    /// Resets the device through its status field and takes the buffers back: the rings are fresh.
    ///
    /// # Panics
    /// If the status does not read 0 afterwards (2.4.1).
    pub fn reset(&mut self) {
        self.set_status(Status::empty());
        assert_eq!(self.engine.status(), Status::empty(), "status reads 0 once a reset is done (2.4.1)");
        self.settle();
        self.rings.iter_mut().for_each(RingDriver::restart);
    }

    /// Notifies the device of new buffers, if it wants that (2.7.10, 2.8.10). Returns whether it did.
    pub fn kick(&mut self, queue: usize) -> bool {
        let wanted = self.rings[queue].kick_wanted();
        if wanted {
            self.engine.kick(queue as u16);
        }
        wanted
    }

    /// Notifies the device, wanted or not.
    pub fn kick_anyway(&mut self, queue: usize) {
        self.engine.kick(queue as u16);
    }

    /// One turn of every lane, without waiting. Returns whether anything was done.
    pub fn step(&mut self) -> bool {
        let mut worked = false;
        for lane in &mut self.lanes {
            worked |= lane.turn(Some(Duration::ZERO));
        }
        worked
    }

    /// Runs the device until it has nothing to do, and checks what it owes.
    ///
    /// # Panics
    /// With the [`Violation`] if it owes something, or if it does not come to rest.
    #[track_caller]
    pub fn settle(&mut self) {
        expect(self.try_settle());
    }

    /// As [`MemoryHost::settle`], for tests that expect a violation.
    pub fn try_settle(&mut self) -> Result<(), Violation> {
        let mut turns = 0;
        while self.step() {
            turns += 1;
            assert!(turns < RESTLESS, "the device does not come to rest");
        }
        let live = self.engine.status().contains(Status::DRIVER_OK);
        for queue in 0..self.rings.len() {
            let now = self.interrupts(queue);
            let interrupted = std::mem::replace(&mut self.seen[queue], now) != now;
            let before = self.rings[queue].in_flight();
            let owed = self.rings[queue].try_interrupt_owed()?;
            let used = before != self.rings[queue].in_flight();
            let broken = if !live && (interrupted || used) {
                "no buffer is used and no notification sent before DRIVER_OK and after a reset (2.1.2, 2.4.1)"
            } else if owed && !interrupted {
                "a used buffer that passes the driver's event is notified (2.7.7.2, 2.8.10)"
            } else {
                self.rings[queue].check_untouched()?;
                continue;
            };
            return Err(Violation::new(broken, format!("queue {queue}, {now} interrupts so far")));
        }
        Ok(())
    }

    /// Runs the device, waiting for its files and timers, until `done` says so. False if `timeout` passed before.
    ///
    /// # Panics
    /// As [`MemoryHost::settle`].
    #[track_caller]
    pub fn run_until(&mut self, timeout: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            self.settle();
            if done(self) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Runs the lanes until an order to the engine is carried out.
    ///
    /// # Panics
    /// If that takes longer than 20 seconds: orders have deadlines of their own.
    #[track_caller]
    pub fn finish<T>(&mut self, mut order: Ticket<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(answer) = order.try_take() {
                return answer;
            }
            assert!(Instant::now() < deadline, "an order to the engine is not carried out");
            if !self.step() {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}
