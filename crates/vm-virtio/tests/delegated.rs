//! Queues that are served elsewhere: what the lane hands over, what it waits for, how they come back. "Elsewhere" is the
//! test, which pops from a queue that it makes of what was handed over.

use reactor::Mail;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use virtio_testkit::{RingDriver, RingLayout, TestRam};
use vm_virtio::delegated::{Change, QueueParts, Waiting};
use vm_virtio::memory::SharedMemory;
use vm_virtio::{
    Call, DeviceError, DeviceState, DeviceType, DirtyLog, Engine, EngineOptions, EventFd, Features,
    GuestAddress, HostEvent, HostEvents, Interrupt, Kick, Lane, LaneRunner, Queue, QueueError, QueueSpec,
    QueueStart, QueueState, RingPos, Session, StartError, StateError, Status, Stop, StopError, Ticket,
    VirtioDevice, WaitFor, Worker,
};

/// What the worker was told, and what it still owes an answer to.
#[derive(Default)]
struct Elsewhere {
    parts: Option<QueueParts>,
    stops: Vec<Stop>,
    changes: Vec<Change>,
    waiting: Vec<Waiting>,
    activated: usize,
    flushed: usize,
    /// Whoever is told of something panics (true) or says that it failed.
    fails: Option<bool>,
}

impl Elsewhere {
    fn may_fail(elsewhere: &Mutex<Elsewhere>) -> Result<(), DeviceError> {
        let fails = elsewhere.lock().unwrap().fails;
        match fails {
            None => Ok(()),
            Some(false) => Err(DeviceError::new("told to fail")),
            Some(true) => panic!("told to panic"),
        }
    }
}

struct Distant(Arc<Mutex<Elsewhere>>, Arc<Mutex<Option<Mail<Order>>>>);

struct Agent(Arc<Mutex<Elsewhere>>);

enum Order {
    GiveBack(QueueState),
    Broken,
    NeedsReset,
}

impl VirtioDevice for Distant {
    type Worker = Agent;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::from_bits_retain(1 << 3)
    }
    fn ring_features(&self) -> Features {
        Features::VERSION_1 | Features::RING_PACKED | Features::SUSPEND
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "far", max_size: 64, lane: 0 }]
    }
    fn workers(&mut self, mail: &[Mail<Order>]) -> Result<Vec<Agent>, DeviceError> {
        *self.1.lock().unwrap() = mail.first().cloned();
        Ok(vec![Agent(self.0.clone())])
    }
    fn save(&self, _: &[Agent]) -> Result<DeviceState, StateError> {
        Ok(DeviceState::empty())
    }
    fn restore(&mut self, _: &mut [Agent], _: &DeviceState) -> Result<(), StateError> {
        Ok(())
    }
}

impl Worker for Agent {
    type Msg = Order;
    const DELEGATES: bool = true;
    fn activated(&mut self, _: &Session, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.0.lock().unwrap().activated += 1;
        Ok(())
    }
    fn queue_ready(&mut self, _: u16, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        panic!("nothing is served here");
    }
    fn queue_delegated(&mut self, _: u16, parts: QueueParts, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        Elsewhere::may_fail(&self.0)?;
        self.0.lock().unwrap().parts = Some(parts);
        Ok(())
    }
    fn delegation_changed(
        &mut self,
        change: Change,
        waiting: Waiting,
        _: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        Elsewhere::may_fail(&self.0)?;
        let mut elsewhere = self.0.lock().unwrap();
        elsewhere.changes.push(change);
        elsewhere.waiting.push(waiting);
        Ok(())
    }
    fn queue_stop(&mut self, _: u16, how: Stop, _: &mut Lane<'_>) {
        self.0.lock().unwrap().stops.push(how);
    }
    fn flush(&mut self, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.0.lock().unwrap().flushed += 1;
        Ok(())
    }
    fn message(&mut self, order: Order, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        match order {
            Order::GiveBack(state) => lane.queues.give_back(0, state),
            Order::Broken => lane.queues.broken(0),
            Order::NeedsReset => lane.up.needs_reset("nobody is there"),
        }
        Ok(())
    }
}

#[derive(Default)]
struct Bell(AtomicUsize);
impl Interrupt for Bell {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct Ear(Mutex<Vec<HostEvent>>);
impl HostEvents for Ear {
    fn event(&self, event: HostEvent) {
        self.0.lock().unwrap().push(event);
    }
}

struct Rig {
    engine: Engine<Distant>,
    lane: LaneRunner<Agent>,
    ram: TestRam,
    ring: RingDriver,
    bell: Arc<Bell>,
    ear: Arc<Ear>,
    elsewhere: Arc<Mutex<Elsewhere>>,
    mail: Arc<Mutex<Option<Mail<Order>>>>,
    features: Features,
}

impl Rig {
    /// FEATURES_OK, memory there, nothing started.
    fn new(layout: RingLayout) -> Rig {
        Rig::carrying(layout, Features::empty())
    }

    /// The same with a host that carries these features.
    fn carrying(layout: RingLayout, carried: Features) -> Rig {
        let (elsewhere, mail) = (Arc::<Mutex<Elsewhere>>::default(), Arc::default());
        let ear = Arc::new(Ear::default());
        let device = Distant(elsewhere.clone(), Arc::clone(&mail));
        let (engine, mut lanes) =
            Engine::new(device, EngineOptions { carried, ..EngineOptions::new(ear.clone()) }).unwrap();
        let ram = TestRam::new(&[(0, 0x10_0000)]);
        let features = engine.offered() & (layout.features() | Features::VERSION_1 | carried);
        let ring = RingDriver::new(&ram, layout, 16, features);
        let lane = lanes.pop().unwrap();
        let mut rig = Rig { engine, lane, ram, ring, bell: Arc::default(), ear, elsewhere, mail, features };
        let ticket = rig.engine.memory(rig.ram.ram(), WaitFor::NewRequests);
        rig.answered(ticket);
        rig.negotiate();
        rig
    }

    fn negotiate(&mut self) {
        self.engine.set_driver_features(self.features).unwrap();
        let ticket = self.engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        self.done(ticket);
    }

    /// Everything runs, with this kick and call.
    fn running(layout: RingLayout, kick: Kick, call: impl FnOnce(&Rig) -> Call) -> Rig {
        let mut rig = Rig::new(layout);
        let call = call(&rig);
        rig.start(kick, call).unwrap();
        let ticket = rig.engine.enable(0, true);
        rig.answered(ticket);
        let ticket = rig.engine.set_status(Status::DRIVER_OK);
        rig.done(ticket);
        rig
    }

    fn plain(layout: RingLayout) -> Rig {
        Rig::running(layout, Kick::Manual, |rig| Some(rig.bell.clone()))
    }

    fn start(&mut self, kick: Kick, call: Call) -> Result<(), StartError> {
        let config = self.ring.queue_config();
        let ticket = self.engine.start(0, QueueStart { config, state: None, inflight: None, kick, call });
        self.done(ticket)
    }

    fn step(&mut self) {
        self.lane.turn(Some(Duration::ZERO));
    }

    fn done<T>(&mut self, mut ticket: Ticket<T>) -> T {
        for _ in 0..100 {
            self.step();
            if let Some(value) = ticket.try_take() {
                return value;
            }
        }
        panic!("the ticket does not end");
    }

    /// The same for what waits for the worker's word.
    fn answered<T>(&mut self, mut ticket: Ticket<T>) -> T {
        for _ in 0..100 {
            self.step();
            self.elsewhere().waiting.clear();
            if let Some(value) = ticket.try_take() {
                return value;
            }
        }
        panic!("the ticket does not end");
    }

    fn waits<T>(&mut self, ticket: &mut Ticket<T>) {
        self.step();
        assert!(ticket.try_take().is_none(), "nobody has answered");
    }

    fn elsewhere(&self) -> std::sync::MutexGuard<'_, Elsewhere> {
        self.elsewhere.lock().unwrap()
    }

    fn order(&mut self, order: Order) {
        assert!(self.mail.lock().unwrap().as_ref().unwrap().send(order).is_ok());
        self.step();
    }

    /// One request, served by the test.
    fn serves(&mut self, queue: &mut Queue) {
        let id = self.ring.add(&[self.ram.writable(8)]);
        let chain = queue.pop().expect("a buffer");
        queue.add_used(chain, 8);
        queue.publish();
        let used = self.ring.used().expect("an answer");
        assert_eq!((used.id, used.len), (id, 8));
    }

    fn count(&self) -> usize {
        self.bell.0.swap(0, Ordering::SeqCst)
    }
}

fn file() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

fn write(fd: impl AsFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

fn read(fd: BorrowedFd<'_>) -> Option<u64> {
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count).ok().map(|_| u64::from_ne_bytes(count))
}

fn queue_of(parts: &QueueParts, features: Features) -> Queue {
    let mut queue = Queue::new(parts.config, &parts.ram, features, Some(parts.state.clone())).unwrap();
    queue.open();
    queue
}

fn state(index: u16) -> QueueState {
    let at = RingPos { index, wrap: true };
    QueueState { avail: at, used: at, held: Vec::new() }
}

#[test]
fn delegated_the_hosts_own_files_go_over_and_the_lane_sees_no_request() {
    for layout in RingLayout::ALL {
        let (kick, call) = (file(), file());
        let (far_kick, far_call) = (kick.try_clone().unwrap(), call.try_clone().unwrap());
        let call: Call = Some(Arc::new(EventFd::new(call).unwrap()));
        let mut rig = Rig::running(layout, Kick::Fd(kick), |_| call);
        let parts = rig.elsewhere().parts.take().expect("handed over");
        assert_eq!(parts.config, rig.ring.queue_config());
        assert_eq!(parts.state, QueueState::new());
        assert!(!parts.enabled && parts.log.is_none() && parts.logged.is_none());
        assert!(matches!(rig.elsewhere().changes.last(), Some(Change::Enabled { queue: 0, on: true })));
        let mut queue = queue_of(&parts, rig.features);
        for _ in 0..40 {
            rig.serves(&mut queue);
        }
        write(&far_kick);
        rig.step();
        assert_eq!(read(parts.kick.as_ref().unwrap().as_fd()), Some(1), "the driver's kick arrives there");
        write(parts.call.as_ref().unwrap());
        assert_eq!(read(far_call.as_fd()), Some(1), "an interrupt goes straight to the host's file");
        assert!(!rig.lane.turn(Some(Duration::ZERO)), "nothing of it reaches the lane");
    }
}

#[test]
fn delegated_kicks_and_interrupts_that_are_no_files_are_bridged() {
    let mut rig = Rig::plain(RingLayout::Split);
    let parts = rig.elsewhere().parts.take().unwrap();
    assert_eq!(rig.count(), 0);
    rig.engine.kick(0);
    rig.step();
    assert_eq!(read(parts.kick.as_ref().unwrap().as_fd()), Some(1));
    for _ in 0..3 {
        write(parts.call.as_ref().unwrap());
        rig.step();
        assert_eq!(rig.count(), 1);
    }
    // The new one is told once, since the old one may have gone unheard, and from then on it alone.
    let other = Arc::new(Bell::default());
    let ticket = rig.engine.set_call(0, Some(other.clone()));
    rig.answered(ticket);
    assert_eq!(other.0.swap(0, Ordering::SeqCst), 1);
    let Some(Change::Call { queue: 0, call: Some(call) }) = rig.elsewhere().changes.pop() else {
        panic!("the exchange is passed on")
    };
    write(&call);
    rig.step();
    assert_eq!((other.0.load(Ordering::SeqCst), rig.count()), (1, 0));
    let ticket = rig.engine.set_call(0, None);
    rig.answered(ticket);
    assert!(matches!(rig.elsewhere().changes.pop(), Some(Change::Call { queue: 0, call: None })));
}

#[test]
fn delegated_a_ring_without_kicks_says_so() {
    let rig = Rig::running(RingLayout::Split, Kick::Poll, |_| None);
    let parts = rig.elsewhere().parts.take().unwrap();
    assert!(parts.kick.is_none() && parts.call.is_none());
}

#[test]
fn delegated_a_stop_ends_when_the_ring_comes_back_and_tells_where_it_was() {
    for how in [Stop::Drain, Stop::Discard] {
        let mut rig = Rig::plain(RingLayout::Split);
        let mut ticket = rig.engine.stop(0, how, None);
        rig.waits(&mut ticket);
        assert_eq!(rig.elsewhere().stops, [how]);
        rig.order(Order::GiveBack(state(7)));
        assert_eq!(ticket.try_take().unwrap().unwrap(), state(7));
        assert_eq!(rig.engine.status() & Status::DEVICE_NEEDS_RESET, Status::empty());
        // It can be started again.
        rig.start(Kick::Manual, None).unwrap();
        assert!(rig.elsewhere().parts.take().unwrap().enabled, "kept over a stop");
    }
}

#[test]
fn delegated_an_interrupt_on_its_way_over_the_bridge_is_not_lost_in_a_stop() {
    let mut rig = Rig::plain(RingLayout::Split);
    let parts = rig.elsewhere().parts.take().unwrap();
    let ticket = rig.engine.stop(0, Stop::Drain, None);
    rig.step();
    write(parts.call.as_ref().unwrap());
    assert!(rig.mail.lock().unwrap().as_ref().unwrap().send(Order::GiveBack(state(1))).is_ok());
    rig.done(ticket).unwrap();
    assert!(rig.count() >= 1);
}

#[test]
fn policy_7_a_ring_that_does_not_come_back_is_stuck_and_whoever_has_it_is_told_to_end() {
    let mut rig = Rig::plain(RingLayout::Split);
    let ticket = rig.engine.stop(0, Stop::Drain, Some(Instant::now()));
    assert!(matches!(rig.done(ticket), Err(StopError::Stuck(_))));
    assert_eq!(rig.elsewhere().stops, [Stop::Drain, Stop::Discard]);
    assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(rig.engine.failures().stuck.load(Ordering::Relaxed), 1);
    // Too late: nobody waits for it.
    rig.order(Order::GiveBack(state(3)));
    let ticket = rig.engine.set_status(Status::empty());
    rig.done(ticket);
    assert_eq!(rig.engine.status(), Status::empty());
}

#[test]
fn delegated_a_reset_waits_for_the_ring() {
    let mut rig = Rig::plain(RingLayout::Packed);
    let mut ticket = rig.engine.set_status(Status::empty());
    rig.waits(&mut ticket);
    assert_eq!(rig.elsewhere().stops, [Stop::Discard]);
    rig.order(Order::GiveBack(QueueState::new()));
    rig.done(ticket);
    assert_eq!(rig.engine.status(), Status::empty());
    rig.negotiate();
    rig.start(Kick::Manual, None).unwrap();
    assert!(!rig.elsewhere().parts.take().unwrap().enabled, "a reset disables every ring");
}

#[test]
fn delegated_a_suspended_device_has_its_rings_back_saves_them_and_hands_them_over_again() {
    let mut rig = Rig::plain(RingLayout::Split);
    rig.elsewhere().parts = None;
    let mut ticket = rig.engine.suspend();
    rig.waits(&mut ticket);
    assert_eq!(rig.elsewhere().stops, [Stop::Drain]);
    rig.order(Order::GiveBack(state(9)));
    assert_eq!(rig.done(ticket), Ok(()));
    let ticket = rig.engine.save();
    let saved = rig.done(ticket).expect("a state");
    rig.elsewhere().flushed = 0;
    let ticket = rig.engine.resume();
    rig.done(ticket);
    assert_eq!(rig.elsewhere().parts.take().expect("handed over again").state, state(9));
    assert!(rig.elsewhere().flushed > 0, "a lane at rest flushes what an order brought");

    let mut other = Rig::new(RingLayout::Split);
    let ticket = other.engine.set_status(Status::empty());
    other.done(ticket);
    let ticket = other.engine.restore(&saved);
    let queues = other.done(ticket).expect("a state that is taken");
    assert_eq!((queues.len(), queues[0].enabled, queues[0].state.clone()), (1, true, state(9)));
    assert_eq!(other.elsewhere().activated, 1);
}

/// 3.4.2: it resumes, or needs a reset.
#[test]
fn common_3_4_2_a_device_that_fails_to_resume_needs_a_reset() {
    let live = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    for panics in [false, true] {
        let mut rig = Rig::carrying(RingLayout::Split, Features::SUSPEND);
        rig.start(Kick::Manual, None).unwrap();
        let ticket = rig.engine.set_status(live);
        rig.done(ticket);
        let mut suspended = rig.engine.set_status(live | Status::SUSPEND);
        rig.waits(&mut suspended);
        rig.order(Order::GiveBack(state(0)));
        rig.done(suspended);
        assert_eq!(rig.engine.status(), (live - Status::DRIVER_OK) | Status::SUSPEND);
        rig.elsewhere().fails = Some(panics);
        let resumed = rig.engine.set_status(live | Status::SUSPEND);
        rig.done(resumed);
        assert_eq!(rig.engine.status(), live | Status::DEVICE_NEEDS_RESET);
        let told = |event: &HostEvent| matches!(event, HostEvent::NeedsReset { live: true, .. });
        assert!(rig.ear.0.lock().unwrap().iter().any(told));
    }
}

#[test]
fn policy_5_whoever_fails_to_follow_a_change_keeps_nobody_waiting() {
    for panics in [false, true] {
        let mut rig = Rig::plain(RingLayout::Split);
        rig.elsewhere().fails = Some(panics);
        let off = rig.engine.enable(0, false);
        rig.done(off);
        assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
        assert_eq!(rig.engine.failures().worker_failures.load(Ordering::Relaxed), 1);
        let memory = rig.engine.memory(rig.ram.ram(), WaitFor::NewRequests);
        rig.done(memory);
    }
}

#[test]
fn delegated_a_stop_while_suspended_needs_nobody() {
    let mut rig = Rig::plain(RingLayout::Split);
    let ticket = rig.engine.suspend();
    rig.step();
    rig.order(Order::GiveBack(state(4)));
    assert_eq!(rig.done(ticket), Ok(()));
    let ticket = rig.engine.stop(0, Stop::Drain, None);
    assert_eq!(rig.done(ticket).unwrap(), state(4));
    assert_eq!(rig.elsewhere().stops, [Stop::Drain], "it was here already");
}

#[test]
fn delegated_orders_end_when_whoever_serves_the_ring_follows_them() {
    let mut rig = Rig::plain(RingLayout::Split);
    let log = || Some(Arc::new(DirtyLog::new(Arc::new(SharedMemory::private(8)), None)));
    let (memory, logged, device) = (rig.ram.ram(), log(), Some(GuestAddress(0x4000)));
    type Give<'a> = &'a dyn Fn(&Engine<Distant>) -> Ticket<()>;
    let orders: [(Give<'_>, &str); 4] = [
        (&|engine| engine.memory(memory.clone(), WaitFor::NewRequests), "Memory"),
        (&|engine| engine.log(logged.clone()), "Log"),
        (&|engine| engine.log_ring(0, device), "LogRing"),
        (&|engine| engine.enable(0, false), "Enabled"),
    ];
    for (order, name) in orders {
        let mut ticket = order(&rig.engine);
        rig.waits(&mut ticket);
        let mut elsewhere = rig.elsewhere();
        let change = elsewhere.changes.pop().unwrap();
        assert!(format!("{change:?}").starts_with(name), "{change:?}");
        elsewhere.waiting.clear();
        drop(elsewhere);
        rig.done(ticket);
    }
    // Whoever gets the ring later gets all of it.
    let ticket = rig.engine.suspend();
    rig.step();
    rig.order(Order::GiveBack(state(0)));
    rig.done(ticket).unwrap();
    let ticket = rig.engine.resume();
    rig.done(ticket);
    let parts = rig.elsewhere().parts.take().unwrap();
    assert!(!parts.enabled && parts.log.is_some());
    assert_eq!(parts.logged, device);
    assert!(parts.ram.same_as(&memory));
}

#[test]
fn policy_1_a_ring_that_was_broken_elsewhere_is_faulted_and_stopped() {
    let mut rig = Rig::plain(RingLayout::Split);
    rig.order(Order::Broken);
    assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(rig.elsewhere().stops, [Stop::Discard]);
    let faults = |rig: &Rig| {
        let events = rig.ear.0.lock().unwrap();
        events.iter().filter(|event| matches!(event, HostEvent::QueueFault { queue: 0, .. })).count()
    };
    assert_eq!(faults(&rig), 1);
    rig.order(Order::GiveBack(state(2)));
    rig.order(Order::Broken);
    assert_eq!(faults(&rig), 1, "once");
    let ticket = rig.engine.set_status(Status::empty());
    rig.done(ticket);
    assert_eq!(rig.engine.status(), Status::empty());
}

#[test]
fn policy_1_memory_without_the_ring_takes_the_ring_back() {
    let mut rig = Rig::plain(RingLayout::Split);
    let other = TestRam::new(&[(0x4000_0000, 0x1000)]);
    let ticket = rig.engine.memory(other.ram(), WaitFor::NewRequests);
    rig.answered(ticket);
    assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(rig.elsewhere().stops, [Stop::Discard]);
}

#[test]
fn delegated_a_worker_can_say_that_the_device_needs_a_reset() {
    let mut rig = Rig::plain(RingLayout::Split);
    rig.order(Order::NeedsReset);
    assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    let events = rig.ear.0.lock().unwrap();
    assert!(events.iter().any(|event| matches!(event, HostEvent::NeedsReset { .. })));
}

#[test]
fn delegated_only_ring_features_that_the_device_can_pass_on_are_offered() {
    let rig = Rig::new(RingLayout::Split);
    let ring = rig.engine.offered() & Features::NOT_A_DEVICES;
    assert_eq!(ring, Features::VERSION_1 | Features::RING_PACKED);
}

#[test]
fn delegated_bad_rings_and_chains_that_are_out_are_refused() {
    let mut rig = Rig::new(RingLayout::Split);
    let config = rig.ring.queue_config();
    let held = vm_virtio::queue::HeldChain {
        id: vm_virtio::queue::ChainId(0),
        descs: 1,
        readable: vec![],
        writable: vec![],
        completed: None,
    };
    let mut out = state(1);
    out.used.index = 0;
    out.held.push(held);
    let start = |config, state| QueueStart { config, state, inflight: None, kick: Kick::Manual, call: None };
    let ticket = rig.engine.start(0, start(config, Some(out)));
    assert!(matches!(rig.done(ticket), Err(StartError::Queue(QueueError::State(_)))));
    let mut elsewhere = config;
    elsewhere.device = GuestAddress(0x4000_0000);
    let ticket = rig.engine.start(0, start(elsewhere, None));
    assert!(matches!(rig.done(ticket), Err(StartError::Queue(QueueError::AreaUnmapped { .. }))));
    assert!(rig.elsewhere().parts.is_none());
}

#[test]
fn shared_memory_of_a_file_and_the_regions_of_guest_memory_can_be_given_away() {
    let area = SharedMemory::memfd(0x2000).unwrap();
    let log = DirtyLog::new(Arc::new(area), None);
    log.mark(0x3000, 1);
    let (file, offset) = log.area().file().expect("a file");
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, offset).unwrap();
    assert_eq!(bytes, [8, 0]);
    assert!(SharedMemory::private(8).file().is_none());

    let ram = TestRam::spread(2, 0x10000);
    ram.write(GuestAddress(0x2_0004), b"there");
    let snapshot = ram.ram();
    let [low, high] = snapshot.files() else { panic!("two regions") };
    assert_eq!((low.addr.0, low.len, high.addr.0, high.len), (0, 0x10000, 0x2_0000, 0x10000));
    let mut there = [0; 5];
    high.file.read_exact_at(&mut there, high.offset + 4).unwrap();
    assert_eq!(&there, b"there");
    assert_eq!(ram.ram().files(), snapshot.files());
}
