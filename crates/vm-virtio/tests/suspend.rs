//! Suspending, resetting a single queue, notifications with data: what only some hosts can carry.
//!
//! Names: `common_*` are lines of the common checklist with their sections of virtio 1.4, `policy_N_*` rules of the
//! failure policy in ARCHITECTURE.md.
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reactor::{Mail, Token};
use virtio_testkit::{Buf, MemoryHost, RingDriver, RingLayout};
use vm_virtio::engine::STOP_DEADLINE;
use vm_virtio::{
    Chain, ConfigSpace, ConfigWriter, DeviceError, DeviceType, Engine, EngineError, EngineOptions, Features,
    GuestAddress, GuestRam, HostEvent, HostEvents, Lane, QueueResetError, QueueSpec, Status, Stop,
    SuspendError, VirtioDevice, WaitFor, Worker,
};

const NEGOTIATED: Status = Status::from_bits_retain(1 | 2 | 8);
const LIVE: Status = Status::from_bits_retain(1 | 2 | 4 | 8);
const SUSPENDED: Status = Status::from_bits_retain(1 | 2 | 8 | 16);

/// What the worker does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Answers at once.
    Echo,
    /// Keeps them and gives them back when it is asked to stop or suspend.
    Hold,
    /// Keeps them over a suspension.
    Keep,
    /// Keeps them whatever happens.
    Hang,
    /// Keeps them and fails at the next message.
    Fail,
}

/// What a test sends to the worker.
enum Order {
    Be(Mode),
    /// Changes a byte of the configuration space.
    Configure(u8),
    /// Gives a held request back.
    Complete,
    /// Drops what it holds.
    Lose,
    /// Gives a held request out of its hands, as to another thread, and still counts it as kept.
    Lend(std::sync::mpsc::Sender<Chain>),
    /// Sets a timer when it is suspended next.
    Alarm(Arc<AtomicUsize>),
}

struct Device {
    config: Arc<ConfigSpace>,
    mail: std::sync::mpsc::Sender<Mail<Order>>,
}

struct Server {
    mode: Mode,
    held: Vec<(u16, Chain)>,
    lent: Vec<u16>,
    /// Counts timers, if one is to be set.
    alarm: Option<Arc<AtomicUsize>>,
    config: Arc<ConfigSpace>,
}

impl VirtioDevice for Device {
    type Worker = Server;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![
            QueueSpec { name: "left", max_size: 64, lane: 0 },
            QueueSpec { name: "right", max_size: 64, lane: 0 },
        ]
    }
    fn config(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }
    fn write_config(&mut self, offset: u32, data: &[u8], _: ConfigWriter) {
        self.config.set(offset, data).unwrap();
    }
    fn workers(&mut self, mail: &[Mail<Order>]) -> Result<Vec<Server>, DeviceError> {
        self.mail.send(mail[0].clone()).unwrap();
        let config = self.config.clone();
        Ok(vec![Server { mode: Mode::Echo, held: Vec::new(), lent: Vec::new(), alarm: None, config }])
    }
    fn reset(&mut self, workers: &mut [Server]) {
        workers[0].mode = Mode::Echo;
        workers[0].held.clear();
        workers[0].lent.clear();
    }
}

impl Worker for Server {
    type Msg = Order;
    fn queue_ready(&mut self, number: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            match self.mode {
                Mode::Echo => queue.add_used(chain, 0),
                _ => self.held.push((number, chain)),
            }
        }
        Ok(())
    }
    fn queue_stop(&mut self, number: u16, how: Stop, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(number) else { return };
        if matches!(self.mode, Mode::Hang | Mode::Fail) {
            return;
        }
        for (_, chain) in self.held.extract_if(.., |(of, _)| *of == number) {
            match how {
                Stop::Drain => queue.add_used(chain, 0),
                Stop::Discard => queue.discard(chain),
            }
        }
    }
    fn suspend(&mut self, lane: &mut Lane<'_>) {
        if self.mode == Mode::Hold {
            (0..2).for_each(|queue| self.queue_stop(queue, Stop::Drain, lane));
        }
        if self.alarm.is_some() {
            lane.reactor.set_timer(Token::new(0), std::time::Instant::now());
        }
    }
    fn keeps(&self, queue: u16) -> usize {
        let held = self.held.iter().map(|(of, _)| of).filter(|_| self.mode == Mode::Keep);
        held.chain(&self.lent).filter(|of| **of == queue).count()
    }
    fn timer(&mut self, _: Token, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        if let Some(alarm) = self.alarm.take() {
            alarm.fetch_add(1, Ordering::SeqCst);
        }
        let _ = self.config.set(0, &[77]);
        lane.up.config_changed();
        Ok(())
    }
    fn message(&mut self, order: Order, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        match order {
            Order::Be(mode) => self.mode = mode,
            _ if self.mode == Mode::Fail => return Err(DeviceError::new("told to fail")),
            Order::Configure(value) => {
                let _ = self.config.set(0, &[value]);
                lane.up.config_changed();
                lane.reactor.set_timer(Token::new(0), std::time::Instant::now());
            }
            Order::Lose => self.held.clear(),
            Order::Lend(to) => {
                if let Some((queue, chain)) = self.held.pop() {
                    self.lent.push(queue);
                    let _ = to.send(chain);
                }
            }
            Order::Alarm(count) => self.alarm = Some(count),
            Order::Complete => {
                if let Some((queue, chain)) = self.held.pop()
                    && let Some(queue) = lane.queues.get(queue)
                {
                    queue.add_used(chain, 0);
                }
            }
        }
        Ok(())
    }
}

struct Rig {
    host: MemoryHost<Device>,
    mail: Mail<Order>,
}

impl Rig {
    fn new(layout: RingLayout) -> Rig {
        Rig::with(layout, Features::CARRIED)
    }

    fn with(layout: RingLayout, features: Features) -> Rig {
        let (sender, receiver) = std::sync::mpsc::channel();
        let device = Device { config: Arc::new(ConfigSpace::new(vec![1, 2, 3, 4])), mail: sender };
        let host = MemoryHost::builder(device).layout(layout).with(features).start();
        Rig { host, mail: receiver.recv().unwrap() }
    }

    fn tell(&mut self, order: Order) {
        assert!(self.mail.send(order).is_ok());
        self.host.step();
    }

    fn request(&mut self, queue: usize) -> u16 {
        let buffer = self.host.ram().writable(8);
        let id = self.host.ring(queue).add(&[buffer]);
        self.host.kick_anyway(queue);
        self.host.step();
        id
    }

    fn status(&self) -> Status {
        self.host.engine().status()
    }

    fn suspend(&mut self) {
        self.host.set_status(LIVE | Status::SUSPEND);
    }

    fn resume(&mut self) {
        // 3.4.1: the driver adds DRIVER_OK to what it has read.
        let read = self.status();
        self.host.set_status(read | Status::DRIVER_OK);
    }

    #[track_caller]
    fn answered(&mut self, queue: usize, id: u16) {
        assert_eq!(self.host.ring(queue).used().map(|used| used.id), Some(id));
    }

    fn silent(&mut self) {
        assert_eq!(self.host.ring(0).used(), None);
        assert_eq!(self.host.ring(1).used(), None);
    }
}

fn both(test: impl Fn(RingLayout)) {
    RingLayout::ALL.into_iter().for_each(test);
}

#[test]
fn common_3_4_2_suspended_is_shown_when_requests_are_finished_and_notified() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.tell(Order::Be(Mode::Hang));
        let id = rig.request(0);
        let ticket = rig.host.engine().set_status(LIVE | Status::SUSPEND);
        rig.host.step();
        assert_eq!(rig.status(), LIVE, "not while a request is being processed");
        let late = rig.request(1);
        rig.silent();
        let before = rig.host.interrupts(0);
        rig.tell(Order::Complete);
        rig.host.finish(ticket);
        assert_eq!(rig.status(), SUSPENDED);
        assert!(rig.host.interrupts(0) > before, "the used notification came first");
        rig.answered(0, id);
        rig.silent();
        rig.resume();
        assert_eq!(rig.status(), LIVE);
        rig.tell(Order::Complete);
        rig.answered(1, late);
        rig.host.settle();
    });
}

#[test]
fn common_3_4_2_no_queue_is_touched_and_nobody_notified_while_suspended() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.suspend();
        assert_eq!(rig.status(), SUSPENDED);
        let interrupts = (rig.host.interrupts(0), rig.host.interrupts(1));
        rig.host.events();
        let ids = [rig.request(0), rig.request(1)];
        rig.tell(Order::Configure(9));
        rig.silent();
        assert_eq!((rig.host.interrupts(0), rig.host.interrupts(1)), interrupts);
        assert!(rig.host.events().is_empty());
        rig.resume();
        rig.host.step();
        rig.answered(0, ids[0]);
        rig.answered(1, ids[1]);
    });
}

#[test]
fn common_3_4_2_chains_that_only_wait_are_kept_over_a_suspension() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.tell(Order::Be(Mode::Keep));
        let id = rig.request(1);
        rig.suspend();
        assert_eq!(rig.status(), SUSPENDED);
        rig.tell(Order::Complete);
        rig.silent();
        rig.resume();
        rig.host.step();
        rig.answered(1, id);
    });
}

/// A chain that somebody else drops meanwhile goes back when the device is resumed.
#[test]
fn common_3_4_2_a_kept_chain_that_is_dropped_while_suspended_is_used_at_resume() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.tell(Order::Be(Mode::Keep));
        let id = rig.request(0);
        let (lend, lent) = std::sync::mpsc::channel();
        rig.tell(Order::Lend(lend));
        rig.suspend();
        assert_eq!(rig.status(), SUSPENDED);
        let interrupts = rig.host.interrupts(0);
        drop(lent.recv().unwrap());
        // An order is what wakes a lane at rest.
        rig.host.kick_anyway(0);
        rig.host.step();
        rig.silent();
        assert_eq!(rig.host.interrupts(0), interrupts);
        rig.resume();
        rig.host.step();
        rig.answered(0, id);
        assert!(rig.host.interrupts(0) > interrupts);
    });
}

#[test]
fn common_3_4_2_suspend_is_ignored_before_driver_ok_and_without_the_feature() {
    let (sender, _receiver) = std::sync::mpsc::channel();
    let device = Device { config: Arc::new(ConfigSpace::empty()), mail: sender };
    let mut host = MemoryHost::builder(device).with(Features::CARRIED).build();
    host.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::SUSPEND);
    assert_eq!(host.engine().status(), Status::ACKNOWLEDGE | Status::DRIVER);
    // Nor when the feature is negotiated and everything but DRIVER_OK is done (3.1).
    host.engine().set_driver_features(host.features()).unwrap();
    host.set_status(NEGOTIATED);
    host.set_status(NEGOTIATED | Status::SUSPEND);
    assert_eq!(host.engine().status(), NEGOTIATED);
    host.set_status(NEGOTIATED | Status::SUSPEND | Status::DRIVER_OK);
    assert_eq!(host.engine().status(), LIVE);
    host.reset();
    host.initialise();
    assert_eq!(host.engine().status(), LIVE);
    let mut rig = Rig::with(RingLayout::Split, Features::RING_RESET);
    rig.suspend();
    assert_eq!(rig.status(), LIVE);
    let id = rig.request(0);
    rig.answered(0, id);
}

#[test]
fn common_3_4_2_config_changes_are_seen_and_told_at_resume_and_drivers_writes_ignored() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.suspend();
    rig.host.events();
    let mut before = [0; 4];
    let generation = rig.host.config().read(0, &mut before);
    rig.host.engine().write_config(1, &[99], ConfigWriter::Driver).unwrap();
    // A change from outside, as a command of the host makes it.
    rig.host.config().set(2, &[42]).unwrap();
    let mut now = [0; 4];
    assert_eq!(rig.host.config().read(0, &mut now), generation);
    assert_eq!(now, before);
    assert!(rig.host.events().is_empty());
    rig.resume();
    assert!(matches!(rig.host.events()[..], [HostEvent::ConfigChanged]));
    assert_ne!(rig.host.config().read(0, &mut now), generation);
    assert_eq!(now, [1, 2, 42, 4], "the driver's write was ignored");
    rig.suspend();
    rig.resume();
    assert!(rig.host.events().is_empty(), "no change, no news");
}

/// 3.4.2 and 2.1.2: what breaks while nobody may be notified is told when the driver resumes.
#[test]
fn common_3_4_2_an_error_of_a_suspended_device_is_told_at_resume() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.suspend();
        rig.host.events();
        let change = rig.host.engine().memory(GuestRam::empty(), WaitFor::NewRequests);
        rig.host.finish(change);
        let events = rig.host.events();
        assert!(events.iter().any(|event| matches!(event, HostEvent::NeedsReset { live: false, .. })));
        assert!(!events.iter().any(|event| matches!(
            event,
            HostEvent::ConfigChanged | HostEvent::NeedsReset { live: true, .. }
        )));
        assert_eq!(rig.status(), SUSPENDED | Status::DEVICE_NEEDS_RESET);
        rig.resume();
        assert!(matches!(rig.host.events()[..], [HostEvent::ConfigChanged]));
        assert_eq!(rig.status(), LIVE | Status::DEVICE_NEEDS_RESET);
    });
}

#[test]
fn common_2_5_2_a_change_by_the_device_is_notified_once_the_driver_is_ready() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let device = Device { config: Arc::new(ConfigSpace::new(vec![1, 2, 3, 4])), mail: sender };
    let host = MemoryHost::builder(device).build();
    let mut rig = Rig { host, mail: receiver.recv().unwrap() };
    let told = |rig: &mut Rig| {
        rig.tell(Order::Configure(9));
        // The worker's timer makes another change.
        assert!(rig.host.run_until(Duration::from_secs(30), |host| {
            let mut byte = [0];
            host.config().read(0, &mut byte);
            byte == [77]
        }));
        let changes = |event: &&HostEvent| matches!(event, HostEvent::ConfigChanged);
        rig.host.events().iter().filter(changes).count()
    };
    assert_eq!(told(&mut rig), 0, "2.1.2: not before DRIVER_OK");
    rig.host.initialise();
    assert_eq!(told(&mut rig), 2);
    rig.host.reset();
    assert_eq!(told(&mut rig), 0, "2.4.1: not after a reset");
}

#[test]
fn common_3_4_2_a_workers_timers_and_messages_wait_for_the_resume() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.tell(Order::Configure(5));
    assert!(rig.host.run_until(Duration::from_secs(30), |host| {
        let mut byte = [0];
        host.config().read(0, &mut byte);
        byte == [77]
    }));
    rig.suspend();
    rig.tell(Order::Configure(6));
    std::thread::sleep(Duration::from_millis(2));
    rig.host.step();
    let mut byte = [0];
    rig.host.config().read(0, &mut byte);
    assert_eq!(byte, [77]);
    rig.resume();
    rig.host.step();
    rig.host.config().read(0, &mut byte);
    assert_ne!(rig.host.config().generation(), 0);
    assert!(byte == [6] || byte == [77]);
    // A timer that is due at once, and only when the device comes to rest.
    let rung = Arc::new(AtomicUsize::new(0));
    rig.tell(Order::Alarm(rung.clone()));
    rig.suspend();
    assert_eq!(rig.status(), SUSPENDED);
    std::thread::sleep(Duration::from_millis(2));
    rig.host.kick_anyway(0);
    rig.host.step();
    assert_eq!(rung.load(Ordering::SeqCst), 0);
    rig.resume();
    assert!(rig.host.run_until(Duration::from_secs(30), |_| rung.load(Ordering::SeqCst) == 1));
}

#[test]
fn common_3_4_2_a_reset_of_a_suspended_device_works() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.tell(Order::Be(Mode::Keep));
        rig.request(0);
        rig.suspend();
        rig.host.reset();
        rig.host.initialise();
        let id = rig.request(0);
        rig.answered(0, id);
        assert_eq!(rig.status(), LIVE);
    });
}

#[test]
fn common_3_4_2_a_reset_overtakes_a_suspension() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.tell(Order::Be(Mode::Hang));
    rig.request(0);
    let suspend = rig.host.engine().set_status(LIVE | Status::SUSPEND);
    rig.host.step();
    let again = rig.host.engine().set_status(LIVE | Status::SUSPEND);
    let reset = rig.host.engine().reset();
    rig.host.step();
    rig.tell(Order::Lose);
    rig.host.finish(reset);
    rig.host.finish(suspend);
    rig.host.finish(again);
    assert_eq!(rig.status(), Status::empty());
    rig.host.ring(0).restart();
    rig.host.ring(1).restart();
    rig.host.initialise();
    let id = rig.request(0);
    rig.answered(0, id);
}

#[test]
fn policy_7_a_suspension_whose_backend_hangs_ends_as_needs_reset() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.tell(Order::Be(Mode::Fail));
    rig.request(0);
    // A failed worker gives nothing back, so nobody waits for the deadline.
    rig.tell(Order::Complete);
    rig.suspend();
    assert!(rig.status().contains(Status::DEVICE_NEEDS_RESET | Status::DRIVER_OK));
    assert!(!rig.status().contains(Status::SUSPEND));
    let ticket = rig.host.engine().suspend();
    assert_eq!(rig.host.finish(ticket), Err(SuspendError::Stuck));
    let ticket = rig.host.engine().resume();
    rig.host.finish(ticket);
    rig.host.reset();
    rig.host.initialise();
    let id = rig.request(0);
    rig.answered(0, id);
    assert!(STOP_DEADLINE > Duration::ZERO);
}

/// Whoever does not give back what he has, and says nothing, is waited for until the deadline and no longer.
#[test]
fn policy_7_a_worker_that_says_nothing_holds_up_a_suspension_and_a_queues_reset_until_the_deadline() {
    let (mut suspended, mut reset) = (Rig::new(RingLayout::Split), Rig::new(RingLayout::Packed));
    for rig in [&mut suspended, &mut reset] {
        rig.tell(Order::Be(Mode::Hang));
        rig.request(0);
        rig.host.events();
    }
    // Both wait at the same time.
    let asked = std::time::Instant::now();
    let suspension = suspended.host.engine().set_status(LIVE | Status::SUSPEND);
    let queue_reset = reset.host.engine().reset_queue(0);
    reset.host.step();
    suspended.host.finish(suspension);
    assert!(asked.elapsed() >= STOP_DEADLINE, "not given up before");
    assert_eq!(suspended.status(), LIVE | Status::DEVICE_NEEDS_RESET);
    assert_eq!(reset.host.finish(queue_reset), Err(QueueResetError::Stuck));
    assert_eq!(reset.status(), LIVE | Status::DEVICE_NEEDS_RESET);
    for rig in [&mut suspended, &mut reset] {
        assert!(matches!(rig.host.events()[..], [HostEvent::NeedsReset { live: true, .. }]));
        rig.tell(Order::Lose);
        rig.host.reset();
        rig.host.initialise();
        let id = rig.request(0);
        rig.answered(0, id);
    }
}

#[derive(Default)]
struct Nobody;
impl std::task::Wake for Nobody {
    fn wake(self: Arc<Self>) {}
}

/// A driver writes the same status again and again while a device comes to rest, or is reset: those who waited for it and
/// have gone are forgotten.
#[test]
fn policy_8_a_status_that_is_written_again_and_again_fills_no_memory() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.tell(Order::Be(Mode::Hang));
    rig.request(0);
    let nobody = Arc::new(Nobody);
    let waker = std::task::Waker::from(nobody.clone());
    for status in [LIVE | Status::SUSPEND, Status::empty()] {
        for _ in 0..100 {
            let mut ticket = rig.host.engine().set_status(status);
            // What is remembered of the one who waits is gone with him.
            let mut context = std::task::Context::from_waker(&waker);
            assert!(std::pin::Pin::new(&mut ticket).poll(&mut context).is_pending());
            drop(ticket);
            assert!(Arc::strong_count(&nobody) <= 4);
        }
    }
    let last = rig.host.engine().set_status(Status::empty());
    rig.tell(Order::Lose);
    rig.host.finish(last);
    assert_eq!(rig.status(), Status::empty());
}

#[test]
fn the_hosts_suspension_is_none_of_the_drivers() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.tell(Order::Be(Mode::Hold));
        let held = rig.request(0);
        let ticket = rig.host.engine().suspend();
        assert_eq!(rig.host.finish(ticket), Ok(()));
        rig.answered(0, held);
        assert_eq!(rig.status(), LIVE);
        let waits = rig.request(0);
        rig.silent();
        // Both suspend: both have to resume.
        rig.suspend();
        assert_eq!(rig.status(), SUSPENDED);
        rig.resume();
        assert_eq!(rig.status(), LIVE);
        rig.host.step();
        rig.silent();
        let ticket = rig.host.engine().resume();
        rig.host.finish(ticket);
        rig.tell(Order::Complete);
        rig.answered(0, waits);
    });
}

#[test]
fn an_interrupt_exchanged_while_suspended_rings_at_resume() {
    let mut rig = Rig::new(RingLayout::Split);
    #[derive(Default)]
    struct Bell(std::sync::atomic::AtomicU32);
    impl vm_virtio::Interrupt for Bell {
        fn signal(&self) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    }
    let bell = Arc::new(Bell::default());
    let rings = || bell.0.load(std::sync::atomic::Ordering::SeqCst);
    rig.suspend();
    let ticket = rig.host.engine().set_call(0, Some(bell.clone()));
    rig.host.finish(ticket);
    assert_eq!(rings(), 0);
    rig.resume();
    assert_eq!(rings(), 1);
}

#[test]
fn common_2_6_1_1_1_a_reset_queue_executes_and_notifies_nothing_and_starts_afresh() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        let first = rig.request(1);
        rig.answered(1, first);
        rig.tell(Order::Be(Mode::Hold));
        rig.request(1);
        let other = rig.request(0);
        let before = rig.host.interrupts(1);
        let ticket = rig.host.engine().reset_queue(1);
        assert_eq!(rig.host.finish(ticket), Ok(()));
        rig.request(1);
        rig.silent();
        assert_eq!(rig.host.interrupts(1), before);
        assert!(!rig.status().contains(Status::DEVICE_NEEDS_RESET));
        // The other queue knows nothing of it.
        rig.tell(Order::Complete);
        rig.answered(0, other);
        rig.tell(Order::Be(Mode::Echo));
        // 2.6.1.2: as at its first initialisation, index 0 again.
        rig.host.ring(1).restart();
        rig.host.start_queue(1, None);
        let id = rig.request(1);
        assert_eq!(rig.host.ring(1).used(), None, "it is disabled until the driver enables it");
        let ticket = rig.host.engine().enable(1, true);
        rig.host.finish(ticket);
        rig.host.step();
        rig.answered(1, id);
    });
}

#[test]
fn common_2_6_1_a_queue_that_does_not_run_can_be_reset_and_nobody_else_asks() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.host.stop_queue(1, Stop::Drain).unwrap();
    let ticket = rig.host.engine().reset_queue(1);
    assert_eq!(rig.host.finish(ticket), Ok(()));
    let ticket = rig.host.engine().reset_queue(2);
    assert_eq!(rig.host.finish(ticket), Err(QueueResetError::NoSuchQueue(2)));
    let mut rig = Rig::with(RingLayout::Split, Features::empty());
    let ticket = rig.host.engine().reset_queue(0);
    assert_eq!(rig.host.finish(ticket), Err(QueueResetError::NotNegotiated));
}

#[test]
fn common_2_6_1_a_faulted_queue_can_be_reset() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.host.ring(0).add(&[Buf::writable(GuestAddress(1 << 40), 64)]);
        rig.host.kick_anyway(0);
        rig.host.step();
        let events = rig.host.events();
        assert!(events.iter().any(|event| matches!(event, HostEvent::QueueFault { queue: 0, .. })));
        let ticket = rig.host.engine().reset_queue(0);
        assert_eq!(rig.host.finish(ticket), Ok(()));
        rig.host.ring(0).restart();
        rig.host.start_queue(0, None);
        let ticket = rig.host.engine().enable(0, true);
        rig.host.finish(ticket);
        let id = rig.request(0);
        rig.answered(0, id);
        // What is wrong with the device as a whole is not for one queue to mend.
        assert_eq!(rig.status(), LIVE | Status::DEVICE_NEEDS_RESET);
    });
}

/// The device observes what the driver has changed: size and addresses.
#[test]
fn common_2_6_1_2_1_a_queue_is_enabled_again_elsewhere_and_of_another_size() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        let before = rig.host.ring(1).queue_config();
        for size in [8, 64, 2] {
            let id = rig.request(1);
            rig.answered(1, id);
            let ticket = rig.host.engine().reset_queue(1);
            assert_eq!(rig.host.finish(ticket), Ok(()));
            let (ram, features) = (rig.host.ram().clone(), rig.host.features());
            *rig.host.ring(1) = RingDriver::new(&ram, layout, size, features);
            assert_ne!(rig.host.ring(1).queue_config().desc, before.desc);
            rig.host.start_queue(1, None);
            let ticket = rig.host.engine().enable(1, true);
            rig.host.finish(ticket);
            // Twice around the ring.
            for _ in 0..2 * size {
                let id = rig.request(1);
                rig.answered(1, id);
            }
            rig.host.settle();
        }
    });
}

#[test]
fn common_2_6_1_a_suspended_device_can_reset_a_queue() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.tell(Order::Be(Mode::Keep));
    rig.request(0);
    rig.suspend();
    let ticket = rig.host.engine().reset_queue(0);
    assert_eq!(rig.host.finish(ticket), Ok(()));
    assert_eq!(rig.status(), SUSPENDED);
    rig.silent();
}

#[test]
fn policy_7_a_queue_reset_whose_backend_hangs_is_stuck() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.tell(Order::Be(Mode::Fail));
    rig.request(0);
    rig.tell(Order::Complete);
    let ticket = rig.host.engine().reset_queue(0);
    assert_eq!(rig.host.finish(ticket), Err(QueueResetError::Stuck));
    assert!(rig.status().contains(Status::DEVICE_NEEDS_RESET));
}

#[test]
fn common_2_9_a_notification_with_data_kicks_its_queue() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        for queue in [0, 1] {
            let buffer = rig.host.ram().writable(8);
            let id = rig.host.ring(queue).add(&[buffer]);
            // Any position: it is a hint.
            rig.host.engine().notify(0x8123_0000 | queue as u32);
            rig.host.step();
            rig.answered(queue, id);
        }
        rig.host.engine().notify(u32::MAX);
        rig.host.settle();
    });
}

struct Deaf;
impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

#[test]
fn common_2_2_2_what_the_host_cannot_carry_is_not_offered() {
    let make = |carried: Features, without: Features| {
        let (sender, _receiver) = std::sync::mpsc::channel();
        let device = Device { config: Arc::new(ConfigSpace::empty()), mail: sender };
        let options = EngineOptions { carried, without, ..EngineOptions::new(Arc::new(Deaf)) };
        // The receiver lives until the workers are made.
        Engine::new(device, options).map(|(engine, _)| engine.offered())
    };
    assert_eq!(make(Features::empty(), Features::empty()).unwrap() & Features::CARRIED, Features::empty());
    assert_eq!(make(Features::SUSPEND, Features::empty()).unwrap() & Features::CARRIED, Features::SUSPEND);
    assert_eq!(
        make(Features::CARRIED, Features::RING_RESET).unwrap() & Features::RING_RESET,
        Features::empty()
    );
    for nobody in [Features::ADMIN_VQ, Features::SR_IOV] {
        assert!(matches!(make(nobody, Features::empty()), Err(EngineError::Description(_))));
    }
}
