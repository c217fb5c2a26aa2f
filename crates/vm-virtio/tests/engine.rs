//! The engine and the lane runtime, driven step by step with a device that does what the test tells it.
//!
//! Names: `common_*` are lines of the common checklist (virtio 1.4, sections 2 and 3), `policy_N_*` rules of the failure
//! policy in ARCHITECTURE.md.

use reactor::{Mail, SpinPolicy};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use virtio_testkit::{RingDriver, RingLayout, TestRam};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vm_virtio::memory::Poison;
use vm_virtio::{
    Chain, ConfigSpace, ConfigWriter, DeviceError, DeviceType, Engine, EngineError, EngineOptions,
    FeatureError, Features, GuestRam, HostEvent, HostEvents, Interrupt, Kick, Lane, LaneRunner, QueueError,
    QueueSpec, QueueStart, Session, StartError, Status, Stop, StopError, Ticket, VirtioDevice, WaitFor,
    Worker,
};

const OWN_FEATURE: Features = Features::from_bits_retain(1 << 5);
const PICKY_FEATURE: Features = Features::from_bits_retain(1 << 6);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Completes at once.
    Echo,
    /// Keeps chains until it is told otherwise, or asked to stop.
    Hold,
    /// Keeps chains and does not give them back when asked to stop.
    Hang,
    /// Loses chains.
    Lose,
    /// Returns an error.
    Fail,
    /// Panics.
    Panic,
    /// Leaves everything in the ring.
    Leave,
}

#[derive(Default)]
struct Journal(Mutex<Vec<String>>);

impl Journal {
    fn note(&self, entry: impl Into<String>) {
        self.0.lock().unwrap().push(entry.into());
    }
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

struct Puppet {
    journal: Arc<Journal>,
    config: Arc<ConfigSpace>,
    mail: Arc<Mutex<Vec<Mail<Mode>>>>,
    panics_in_reset: Arc<AtomicUsize>,
}

struct Strings {
    lane: u16,
    mode: Mode,
    held: Vec<Chain>,
    journal: Arc<Journal>,
}

impl VirtioDevice for Puppet {
    type Worker = Strings;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        OWN_FEATURE | PICKY_FEATURE
    }
    fn check_features(&self, driver: Features) -> bool {
        !driver.contains(PICKY_FEATURE) || driver.contains(OWN_FEATURE)
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
        self.journal.note(format!("config {offset} {data:?} {by:?}"));
    }
    fn workers(&mut self, mail: &[Mail<Mode>]) -> Result<Vec<Strings>, DeviceError> {
        *self.mail.lock().unwrap() = mail.to_vec();
        let journal = &self.journal;
        Ok((0..2)
            .map(|lane| Strings { lane, mode: Mode::Echo, held: vec![], journal: journal.clone() })
            .collect())
    }
    fn reset(&mut self, workers: &mut [Strings]) {
        self.journal.note(format!("reset {:?}", workers.iter().map(|w| w.lane).collect::<Vec<_>>()));
        if self.panics_in_reset.load(Ordering::SeqCst) > 0 {
            self.panics_in_reset.fetch_sub(1, Ordering::SeqCst);
            panic!("in reset");
        }
        for worker in workers {
            worker.mode = Mode::Echo;
            worker.held.clear();
        }
    }
}

impl Worker for Strings {
    type Msg = Mode;
    fn attached(&mut self, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.journal.note(format!("attached {}", self.lane));
        Ok(())
    }
    fn activated(&mut self, session: &Session, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.journal.note(format!("activated {} {:?}", self.lane, session.features.contains(OWN_FEATURE)));
        Ok(())
    }
    fn queue_ready(&mut self, number: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        if self.mode == Mode::Leave {
            return Ok(());
        }
        while let Some(chain) = queue.pop() {
            match self.mode {
                Mode::Echo => {
                    let written = queue.writer(&chain).write(&[0x5a; 8]) as u32;
                    queue.add_used(chain, written);
                }
                Mode::Hold | Mode::Hang => self.held.push(chain),
                Mode::Lose => drop(chain),
                Mode::Fail => return Err(DeviceError::new("told to fail")),
                Mode::Panic => panic!("told to panic"),
                Mode::Leave => unreachable!("left above"),
            }
        }
        Ok(())
    }
    fn queue_stop(&mut self, number: u16, how: Stop, lane: &mut Lane<'_>) {
        self.journal.note(format!("stop {number} {how:?}"));
        let Some(queue) = lane.queues.get(number) else { return };
        if self.mode == Mode::Hang {
            return;
        }
        for chain in self.held.drain(..) {
            match how {
                Stop::Drain => queue.add_used(chain, 0),
                Stop::Discard => queue.discard(chain),
            }
        }
    }
    fn message(&mut self, mode: Mode, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.mode = mode;
        if mode == Mode::Echo {
            for (_, queue) in lane.queues.iter() {
                self.held.drain(..).for_each(|chain| queue.add_used(chain, 0));
            }
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
impl Bell {
    fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

#[derive(Default)]
struct Ear(Mutex<Vec<HostEvent>>);
impl HostEvents for Ear {
    fn event(&self, event: HostEvent) {
        self.0.lock().unwrap().push(event);
    }
}
impl Ear {
    fn take(&self) -> Vec<HostEvent> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

struct Rig {
    engine: Engine<Puppet>,
    lanes: Vec<LaneRunner<Strings>>,
    ram: TestRam,
    rings: Vec<RingDriver>,
    bells: Vec<Arc<Bell>>,
    ear: Arc<Ear>,
    journal: Arc<Journal>,
    mail: Arc<Mutex<Vec<Mail<Mode>>>>,
    config: Arc<ConfigSpace>,
    panics_in_reset: Arc<AtomicUsize>,
    layout: RingLayout,
}

impl Rig {
    fn bare(layout: RingLayout, change: impl FnOnce(&mut EngineOptions)) -> Rig {
        let journal = Arc::new(Journal::default());
        let config = Arc::new(ConfigSpace::new(vec![1, 2, 3, 4]));
        let mail = Arc::new(Mutex::new(Vec::new()));
        let panics_in_reset = Arc::new(AtomicUsize::new(0));
        let ear = Arc::new(Ear::default());
        let mut options = EngineOptions::new(ear.clone());
        change(&mut options);
        let device = Puppet {
            journal: journal.clone(),
            config: config.clone(),
            mail: mail.clone(),
            panics_in_reset: panics_in_reset.clone(),
        };
        let (engine, lanes) = Engine::new(device, options).unwrap();
        let ram = TestRam::new(&[(0, 0x10_0000)]);
        let features = layout.features();
        let rings =
            vec![RingDriver::new(&ram, layout, 64, features), RingDriver::new(&ram, layout, 16, features)];
        let bells = vec![Arc::default(), Arc::default()];
        Rig { engine, lanes, ram, rings, bells, ear, journal, mail, config, panics_in_reset, layout }
    }

    /// Negotiated and running.
    fn new(layout: RingLayout) -> Rig {
        let mut rig = Rig::bare(layout, |_| {});
        rig.bring_up();
        rig
    }

    fn bring_up(&mut self) {
        self.negotiate();
        self.start(0);
        self.start(1);
        self.status(Status::DRIVER_OK);
        assert!(self.engine.status().contains(Status::DRIVER_OK));
        self.journal.take();
        self.ear.take();
        for bell in &self.bells {
            bell.take();
        }
    }

    fn negotiate(&mut self) {
        let memory = self.engine.memory(self.ram.ram(), WaitFor::NewRequests);
        self.done(memory);
        self.status(Status::ACKNOWLEDGE | Status::DRIVER);
        self.engine.set_driver_features(self.layout.features() | OWN_FEATURE).unwrap();
        self.status(Status::FEATURES_OK);
        assert!(self.engine.status().contains(Status::FEATURES_OK));
    }

    fn start(&mut self, queue: u16) {
        let at = usize::from(queue);
        let start = QueueStart {
            config: self.rings[at].queue_config(),
            state: None,
            inflight: None,
            kick: Kick::Manual,
            call: Some(self.bells[at].clone()),
        };
        let ticket = self.engine.start(queue, start);
        self.done(ticket).unwrap();
        let ticket = self.engine.enable(queue, true);
        self.done(ticket);
    }

    fn status(&mut self, status: Status) {
        let ticket = self.engine.set_status(status);
        self.done(ticket);
    }

    fn step(&mut self) {
        for lane in &mut self.lanes {
            lane.turn(Some(Duration::ZERO));
        }
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

    fn mode(&mut self, lane: usize, mode: Mode) {
        assert!(self.mail.lock().unwrap()[lane].send(mode).is_ok());
        self.step();
    }

    fn add(&mut self, queue: usize) -> u16 {
        let buf = self.ram.writable(8);
        self.rings[queue].add(&[buf])
    }

    fn kick(&mut self, queue: u16) {
        self.engine.kick(queue);
        self.step();
    }

    fn works(&mut self, queue: u16) {
        let id = self.add(usize::from(queue));
        self.kick(queue);
        let used = self.rings[usize::from(queue)].used().expect("an answer");
        assert_eq!((used.id, used.len), (id, 8));
    }
}

fn both(test: impl Fn(RingLayout)) {
    RingLayout::ALL.into_iter().for_each(test);
}

#[test]
fn common_2_1_2_no_buffer_is_consumed_and_nobody_notified_before_driver_ok() {
    both(|layout| {
        let mut rig = Rig::bare(layout, |_| {});
        rig.negotiate();
        rig.start(0);
        let id = rig.add(0);
        rig.kick(0);
        assert_eq!(rig.rings[0].used(), None);
        assert_eq!(rig.bells[0].take(), 0);
        // 3.1.1: what was in the ring before DRIVER_OK is served without another kick.
        rig.status(Status::DRIVER_OK);
        assert_eq!(rig.rings[0].used().map(|used| used.id), Some(id));
        assert!(rig.bells[0].take() > 0);
        assert_eq!(rig.journal.take(), ["attached 0", "attached 1", "activated 0 true", "activated 1 true"]);
    });
}

#[test]
fn common_2_1_2_driver_ok_needs_features_ok() {
    let mut rig = Rig::bare(RingLayout::Split, |_| {});
    rig.status(Status::ACKNOWLEDGE | Status::DRIVER | Status::DRIVER_OK);
    assert_eq!(rig.engine.status(), Status::ACKNOWLEDGE | Status::DRIVER);
}

#[test]
fn common_2_1_1_status_bits_are_not_cleared_but_by_reset() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.status(Status::ACKNOWLEDGE);
    assert!(rig.engine.status().contains(Status::DRIVER_OK | Status::FEATURES_OK));
    rig.status(Status::DEVICE_NEEDS_RESET);
    assert!(!rig.engine.status().contains(Status::DEVICE_NEEDS_RESET), "not the driver's to set");
    rig.status(Status::empty());
    assert_eq!(rig.engine.status(), Status::empty());
}

#[test]
fn common_2_2_2_features_that_were_not_offered_are_refused() {
    let rig =
        Rig::bare(RingLayout::Split, |options| options.without = Features::RING_PACKED | Features::VERSION_1);
    let offered = rig.engine.offered();
    assert!(!offered.contains(Features::RING_PACKED), "withheld");
    assert!(offered.contains(Features::VERSION_1), "6.2: must be offered, whatever is withheld");
    let wanted = Features::VERSION_1 | Features::RING_PACKED;
    let refused = Err(FeatureError::NotOffered(Features::RING_PACKED.bits()));
    assert_eq!(rig.engine.set_driver_features(wanted), refused);
}

#[test]
fn common_6_2_nothing_is_offered_that_no_issue_names() {
    let rig = Rig::bare(RingLayout::Split, |_| {});
    let ring = ["indirect_desc", "event_idx", "version_1", "ring_packed", "in_order"];
    assert_eq!(rig.engine.offered().names().collect::<Vec<_>>(), ring);
    let own = rig.engine.offered() - Features::RING;
    assert_eq!(own, OWN_FEATURE | PICKY_FEATURE);
}

#[test]
fn common_2_2_2_features_ok_stays_clear_if_the_set_is_refused() {
    let mut rig = Rig::bare(RingLayout::Split, |_| {});
    // 6.2: without VERSION_1 the device refuses to go on.
    rig.engine.set_driver_features(OWN_FEATURE).unwrap();
    rig.status(Status::FEATURES_OK);
    assert_eq!(rig.engine.status(), Status::empty());
    // The device has a rule of its own.
    rig.engine.set_driver_features(Features::VERSION_1 | PICKY_FEATURE).unwrap();
    rig.status(Status::FEATURES_OK);
    assert_eq!(rig.engine.status(), Status::empty());
    rig.engine.set_driver_features(Features::VERSION_1 | PICKY_FEATURE | OWN_FEATURE).unwrap();
    rig.status(Status::FEATURES_OK);
    assert_eq!(rig.engine.status(), Status::FEATURES_OK);
}

#[test]
fn common_2_2_2_features_are_fixed_from_features_ok_to_reset_and_then_accepted_again() {
    let mut rig = Rig::new(RingLayout::Split);
    let same = rig.engine.driver_features();
    assert_eq!(rig.engine.set_driver_features(same), Ok(()));
    assert_eq!(rig.engine.set_driver_features(Features::VERSION_1), Err(FeatureError::Fixed));
    rig.status(Status::empty());
    assert_eq!(rig.engine.driver_features(), Features::empty());
    rig.rings.iter_mut().for_each(RingDriver::restart);
    rig.bring_up();
    assert_eq!(rig.engine.driver_features(), same);
    rig.works(0);
}

#[test]
fn common_2_4_1_after_reset_nothing_is_consumed_or_notified() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.mode(0, Mode::Hold);
        rig.add(0);
        rig.kick(0);
        rig.status(Status::empty());
        assert_eq!(rig.engine.status(), Status::empty());
        assert_eq!(rig.journal.take(), ["stop 0 Discard", "stop 1 Discard", "reset [0, 1]"]);
        assert_eq!(Arc::strong_count(&rig.bells[0]), 1, "nobody has what interrupts the driver");
        rig.add(0);
        rig.kick(0);
        assert_eq!(rig.rings[0].used(), None, "nothing is marked used by a reset or after it");
        assert_eq!(rig.bells[0].take(), 0);
        rig.rings.iter_mut().for_each(RingDriver::restart);
        rig.bring_up();
        rig.works(0);
        rig.works(1);
    });
}

/// What the driver said of its queues is forgotten in a reset, also that they are enabled.
#[test]
fn common_2_4_1_a_queue_is_not_enabled_as_it_was_before_the_reset() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.status(Status::empty());
        rig.rings.iter_mut().for_each(RingDriver::restart);
        rig.negotiate();
        let (config, kick) = (rig.rings[0].queue_config(), Kick::Manual);
        let call: Option<Arc<dyn Interrupt>> = Some(rig.bells[0].clone());
        let started = rig.engine.start(0, QueueStart { config, state: None, inflight: None, kick, call });
        rig.done(started).unwrap();
        rig.status(Status::DRIVER_OK);
        let id = rig.add(0);
        rig.kick(0);
        assert_eq!(rig.rings[0].used(), None);
        let enabled = rig.engine.enable(0, true);
        rig.done(enabled);
        assert_eq!(rig.rings[0].used().map(|used| used.id), Some(id));
    });
}

/// Who is told that a queue is broken finds NEEDS_RESET in the status.
#[derive(Default)]
struct Watcher(Mutex<std::sync::Weak<Engine<Puppet>>>, Mutex<Vec<Status>>);

impl HostEvents for Watcher {
    fn event(&self, event: HostEvent) {
        if let (HostEvent::QueueFault { .. }, Some(engine)) = (event, self.0.lock().unwrap().upgrade()) {
            self.1.lock().unwrap().push(engine.status());
        }
    }
}

#[test]
fn policy_1_whoever_hears_of_a_broken_ring_finds_needs_reset_in_the_status() {
    let watcher = Arc::new(Watcher::default());
    let mut rig = Rig::bare(RingLayout::Split, |options| options.events = watcher.clone());
    rig.bring_up();
    rig.rings[0].split().set_avail_idx(1000);
    let Rig { engine, mut lanes, .. } = rig;
    let engine = Arc::new(engine);
    *watcher.0.lock().unwrap() = Arc::downgrade(&engine);
    engine.kick(0);
    lanes[0].turn(Some(Duration::ZERO));
    let seen = watcher.1.lock().unwrap();
    assert!(matches!(seen[..], [status] if status.contains(Status::DEVICE_NEEDS_RESET)), "{seen:?}");
}

#[test]
fn two_resets_at_once_are_one() {
    let mut rig = Rig::new(RingLayout::Split);
    let first = rig.engine.reset();
    let second = rig.engine.reset();
    rig.done(first);
    rig.done(second);
    assert_eq!(rig.journal.take().iter().filter(|entry| entry.starts_with("reset")).count(), 1);
}

#[test]
fn a_disabled_queue_pops_nothing_but_takes_completions() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.mode(0, Mode::Hold);
        let held = rig.add(0);
        rig.kick(0);
        let off = rig.engine.enable(0, false);
        rig.done(off);
        let waiting = rig.add(0);
        rig.kick(0);
        rig.mode(0, Mode::Echo);
        assert_eq!(rig.rings[0].used().map(|used| used.id), Some(held), "completes while disabled");
        assert_eq!(rig.rings[0].used(), None);
        let on = rig.engine.enable(0, true);
        rig.done(on);
        assert_eq!(
            rig.rings[0].used().map(|used| used.id),
            Some(waiting),
            "scanned when enabled, without a kick"
        );
    });
}

#[test]
fn a_drain_waits_for_what_is_out_and_tells_where_it_stopped() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.works(0);
        rig.mode(0, Mode::Hold);
        let held = rig.add(0);
        rig.kick(0);
        let stop = rig.engine.stop(0, Stop::Drain, None);
        let state = rig.done(stop).unwrap();
        assert_eq!(rig.rings[0].used().map(|used| used.id), Some(held));
        assert_eq!((state.avail.index, state.used.index), (2, 2));
        // And it continues there.
        rig.mode(0, Mode::Echo);
        let start = QueueStart {
            config: rig.rings[0].queue_config(),
            state: Some(state),
            inflight: None,
            kick: Kick::Manual,
            call: Some(rig.bells[0].clone()),
        };
        let ticket = rig.engine.start(0, start);
        rig.done(ticket).unwrap();
        rig.works(0);
    });
}

#[test]
fn policy_7_a_backend_that_hangs_ends_as_stuck_and_the_device_needs_reset() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.mode(0, Mode::Hang);
    rig.add(0);
    rig.kick(0);
    let stop = rig.engine.stop(0, Stop::Drain, Some(Instant::now()));
    assert!(matches!(rig.done(stop), Err(StopError::Stuck(_))));
    assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(rig.engine.failures().stuck.load(Ordering::Relaxed), 1);
    assert!(matches!(rig.ear.take()[..], [HostEvent::NeedsReset { .. }]));
    rig.works(1);
}

#[test]
fn policy_1_a_broken_ring_stops_alone_and_works_after_reset() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.rings[0].split().set_avail_idx(1000);
    rig.kick(0);
    assert!(matches!(
        rig.ear.take()[..],
        [HostEvent::QueueFault { queue: 0, .. }, HostEvent::NeedsReset { .. }]
    ));
    assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(rig.engine.failures().queue_faults.load(Ordering::Relaxed), 1);
    rig.kick(0);
    assert!(rig.ear.take().is_empty(), "told once");
    rig.works(1);
    rig.status(Status::empty());
    rig.rings.iter_mut().for_each(RingDriver::restart);
    rig.bring_up();
    rig.works(0);
}

#[test]
fn policy_5_a_failing_worker_stops_its_lane_alone_and_works_after_reset() {
    for mode in [Mode::Fail, Mode::Panic] {
        let mut rig = Rig::new(RingLayout::Split);
        rig.mode(0, mode);
        rig.add(0);
        rig.kick(0);
        assert!(matches!(rig.ear.take()[..], [HostEvent::NeedsReset { .. }]));
        assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
        rig.kick(0);
        assert_eq!(rig.engine.failures().worker_failures.load(Ordering::Relaxed), 1, "not called again");
        rig.works(1);
        rig.status(Status::empty());
        assert_eq!(rig.engine.status(), Status::empty());
        rig.rings.iter_mut().for_each(RingDriver::restart);
        rig.bring_up();
        rig.works(0);
    }
}

#[test]
fn policy_5_a_panic_in_reset_leaves_needs_reset_and_another_reset_helps() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.panics_in_reset.store(1, Ordering::SeqCst);
    rig.status(Status::empty());
    assert_eq!(rig.engine.status(), Status::DEVICE_NEEDS_RESET);
    rig.status(Status::empty());
    assert_eq!(rig.engine.status(), Status::empty());
}

#[test]
fn policy_2_a_chain_that_the_device_loses_goes_back_to_the_driver() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.mode(0, Mode::Lose);
        let lost = rig.add(0);
        rig.kick(0);
        rig.kick(0);
        let used = rig.rings[0].used().expect("swept back");
        assert_eq!((used.id, used.len), (lost, 0));
    });
}

#[test]
fn policy_8_one_queue_cannot_hold_its_lane_a_turn_has_a_budget() {
    let mut rig = Rig::bare(RingLayout::Split, |options| options.budget = 3);
    rig.bring_up();
    for _ in 0..10 {
        rig.add(0);
    }
    rig.engine.kick(0);
    // A turn with a time-out (not zero) is exactly one.
    rig.lanes[0].turn(Some(Duration::from_millis(1)));
    assert_eq!(rig.rings[0].drain().len(), 3);
    rig.step();
    assert_eq!(rig.rings[0].drain().len(), 7, "the rest follows without another kick");
}

#[test]
fn a_worker_that_leaves_buffers_is_not_called_over_and_over() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.mode(0, Mode::Leave);
        rig.add(0);
        rig.engine.kick(0);
        // Ends: the step would go on for ever if the left buffer made the queue ready again.
        rig.step();
        assert_eq!(rig.rings[0].used(), None);
    });
}

#[test]
fn kicks_are_not_asked_for_while_serving_but_always_before_sleep() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        for _ in 0..200 {
            let id = rig.add(0);
            assert!(rig.rings[0].kick_wanted());
            rig.kick(0);
            assert_eq!(rig.rings[0].used().map(|used| used.id), Some(id));
        }
    });
}

#[test]
fn one_interrupt_covers_a_batch() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        for _ in 0..32 {
            rig.add(0);
        }
        rig.bells[0].take();
        rig.kick(0);
        assert_eq!(rig.bells[0].take(), 1);
        assert_eq!(rig.rings[0].drain().len(), 32);
    });
}

#[test]
fn starts_that_make_no_sense_are_refused() {
    let mut rig = Rig::new(RingLayout::Split);
    let start = |rig: &Rig, ring: usize| QueueStart {
        config: rig.rings[ring].queue_config(),
        state: None,
        inflight: None,
        kick: Kick::Manual,
        call: None,
    };
    let again = rig.engine.start(0, start(&rig, 0));
    assert!(matches!(rig.done(again), Err(StartError::Started(0))));
    let none = rig.engine.start(7, start(&rig, 0));
    assert!(matches!(rig.done(none), Err(StartError::NoSuchQueue(7))));
    let large = rig.engine.start(1, start(&rig, 0));
    assert!(matches!(rig.done(large), Err(StartError::TooLarge { queue: 1, size: 64, max: 16 })));
    let stop = rig.engine.stop(7, Stop::Drain, None);
    assert!(matches!(rig.done(stop), Err(StopError::NotStarted(7))));
    let file = tempfile();
    let stop = rig.engine.stop(0, Stop::Drain, None);
    rig.done(stop).unwrap();
    let unwatchable = QueueStart { kick: Kick::Fd(file), ..start(&rig, 0) };
    let ticket = rig.engine.start(0, unwatchable);
    assert!(matches!(rig.done(ticket), Err(StartError::Kick(_))), "a regular file is no kick");
    assert!(
        !rig.engine.status().contains(Status::DEVICE_NEEDS_RESET),
        "nothing of that was the driver's doing"
    );
    let mut astray = start(&rig, 0);
    astray.config.desc = vm_virtio::GuestAddress(0x9000_0000);
    let ticket = rig.engine.start(0, astray);
    assert!(matches!(rig.done(ticket), Err(StartError::Queue(_))));
    assert!(rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
}

fn tempfile() -> std::os::fd::OwnedFd {
    std::fs::File::open("/proc/self/exe").unwrap().into()
}

#[test]
fn memory_that_changes_waits_for_old_chains_if_asked() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.mode(0, Mode::Hold);
        let held = rig.add(0);
        rig.kick(0);
        let mut change = rig.engine.memory(rig.ram.ram(), WaitFor::OldChainsGone);
        rig.step();
        assert!(change.try_take().is_none(), "a chain of the old memory is out");
        let waiting = rig.add(0);
        rig.kick(0);
        rig.mode(0, Mode::Echo);
        assert!(change.try_take().is_some());
        rig.step();
        let used: Vec<_> = rig.rings[0].drain().iter().map(|used| used.id).collect();
        assert_eq!(used, [held, waiting]);
    });
}

#[test]
fn memory_without_the_ring_faults_the_queue() {
    let mut rig = Rig::new(RingLayout::Split);
    let elsewhere = TestRam::new(&[(0x4000_0000, 0x1000)]);
    let change = rig.engine.memory(elsewhere.ram(), WaitFor::NewRequests);
    rig.done(change);
    assert!(rig.ear.take().iter().any(|event| matches!(event, HostEvent::QueueFault { queue: 0, .. })));
}

#[test]
fn common_2_5_config_writes_reach_the_device_only_within_the_space() {
    let rig = Rig::bare(RingLayout::Split, |_| {});
    assert_eq!(rig.config.len(), 4);
    rig.engine.write_config(2, &[7, 8], ConfigWriter::Driver).unwrap();
    assert!(rig.engine.write_config(3, &[7, 8], ConfigWriter::Driver).is_err());
    assert!(rig.engine.write_config(u32::MAX, &[7], ConfigWriter::Migration).is_err());
    assert_eq!(rig.journal.take(), ["config 2 [7, 8] Driver"]);
}

#[test]
fn spinning_lanes_serve_without_kicks_and_still_sleep() {
    let spin = SpinPolicy { limit: Duration::from_millis(20) };
    let mut rig = Rig::bare(RingLayout::Split, |options| options.spin = spin);
    rig.bring_up();
    rig.works(0);
    // No kick: the lane finds it while it polls, or (had the poll been too short) would have been kicked.
    let id = rig.add(0);
    if rig.rings[0].kick_wanted() {
        rig.engine.kick(0);
    }
    rig.lanes[0].turn(Some(Duration::from_millis(100)));
    assert_eq!(rig.rings[0].used().map(|used| used.id), Some(id));
    assert!(!rig.lanes[0].turn(Some(Duration::from_millis(1))), "nothing to do: it sleeps");
}

#[test]
fn a_ring_without_kick_file_is_polled() {
    let mut rig = Rig::bare(RingLayout::Split, |_| {});
    rig.negotiate();
    let start = QueueStart {
        config: rig.rings[0].queue_config(),
        state: None,
        inflight: None,
        kick: Kick::Poll,
        call: None,
    };
    let ticket = rig.engine.start(0, start);
    rig.done(ticket).unwrap();
    let ticket = rig.engine.enable(0, true);
    rig.done(ticket);
    rig.status(Status::DRIVER_OK);
    let id = rig.add(0);
    rig.lanes[0].turn(None);
    assert_eq!(rig.rings[0].used().map(|used| used.id), Some(id));
}

#[test]
fn lanes_on_threads_end_with_their_engine() {
    let rig = Rig::new(RingLayout::Split);
    let threads: Vec<_> = rig.lanes.into_iter().map(|lane| std::thread::spawn(move || lane.run())).collect();
    rig.engine.reset().wait();
    assert_eq!(rig.engine.status(), Status::empty());
    drop(rig.engine);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn an_engine_whose_lanes_are_gone_answers_all_the_same() {
    let rig = Rig::new(RingLayout::Split);
    drop(rig.lanes);
    assert!(matches!(rig.engine.stop(0, Stop::Drain, None).wait(), Err(StopError::Gone)));
    rig.engine.enable(0, true).wait();
    rig.engine.reset().wait();
}

#[test]
fn a_device_that_contradicts_itself_is_refused() {
    struct Wrong(Vec<QueueSpec>, Features);
    impl VirtioDevice for Wrong {
        type Worker = Strings;
        fn device_type(&self) -> DeviceType {
            DeviceType(42)
        }
        fn features(&self) -> Features {
            self.1
        }
        fn queues(&self, _: Features) -> Vec<QueueSpec> {
            self.0.clone()
        }
        fn workers(&mut self, _: &[Mail<Mode>]) -> Result<Vec<Strings>, DeviceError> {
            Err(DeviceError::new("no"))
        }
    }
    let queue = |max_size, lane| QueueSpec { name: "q", max_size, lane };
    let refused = |queues, features| {
        let options = EngineOptions::new(Arc::new(Ear::default()));
        matches!(Engine::new(Wrong(queues, features), options), Err(EngineError::Description(_)))
    };
    assert!(refused(vec![queue(3, 0)], Features::empty()));
    assert!(refused(vec![queue(0, 0)], Features::empty()));
    assert!(refused(vec![queue(8, 1)], Features::empty()));
    assert!(refused(vec![queue(8, 0)], Features::RING_PACKED));
    let options = EngineOptions::new(Arc::new(Ear::default()));
    let unlucky = Engine::new(Wrong(vec![queue(8, 0)], Features::empty()), options);
    assert!(matches!(unlucky, Err(EngineError::Device(_))));
}

#[test]
fn common_2_1_2_an_interrupt_that_is_exchanged_before_driver_ok_is_silent_until_then() {
    both(|layout| {
        let mut rig = Rig::bare(layout, |_| {});
        rig.negotiate();
        rig.start(0);
        let bell = Arc::new(Bell::default());
        let exchanged = rig.engine.set_call(0, Some(bell.clone()));
        rig.done(exchanged);
        rig.add(0);
        rig.kick(0);
        assert_eq!(bell.take(), 0);
        rig.status(Status::DRIVER_OK);
        assert!(bell.take() > 0);
    });
}

/// No feature of rings or negotiation needs another one: each can be withheld, or not be carried, and the others are
/// offered all the same. What needs what among a device's own is the device's business.
#[test]
fn common_2_2_2_no_feature_is_offered_without_what_it_needs() {
    let every = Features::RING | Features::CARRIED;
    for name in every.names().filter(|name| *name != "version_1") {
        let one = Features::by_name(name).unwrap();
        let rig = Rig::bare(RingLayout::Split, |options| {
            (options.carried, options.without) = (Features::CARRIED, one);
        });
        assert_eq!(rig.engine.offered() - OWN_FEATURE - PICKY_FEATURE, every - one, "{name}");
    }
}

#[test]
fn policy_6_rings_in_memory_that_was_lost_stop_and_others_go_on_after_a_reset() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        rig.works(0);
        // The file behind one of the regions is truncated: whoever mapped it says so.
        let poison = Arc::new(Poison::new());
        let lost = Arc::new(
            GuestRegionMmap::<()>::from_range(vm_memory::GuestAddress(1 << 32), 4096, None).unwrap(),
        );
        let kept = rig.ram.memory().iter().map(|region| (Arc::new(copy_of(region)), None));
        let regions: Vec<_> = kept.chain([(lost, Some(poison.clone()))]).collect();
        let change = rig.engine.memory(GuestRam::from_files(regions).unwrap(), WaitFor::NewRequests);
        rig.done(change);
        rig.works(0);
        rig.ear.take();
        poison.set();
        rig.add(0);
        rig.kick(0);
        rig.step();
        let broken = rig.ear.take();
        assert!(
            broken.iter().any(|event| matches!(
                event,
                HostEvent::QueueFault { queue: 0, error: QueueError::Poisoned }
            ))
        );
        assert!(broken.iter().any(|event| matches!(event, HostEvent::NeedsReset { live: true, .. })));
        let failures = rig.engine.failures();
        assert_eq!(failures.memory.load(Ordering::Relaxed), 2, "both queues are in it");
        assert_eq!(
            failures.queue_faults.load(Ordering::Relaxed),
            0,
            "and nothing of it is the driver's doing"
        );
        rig.rings[0].drain();
        rig.add(0);
        rig.kick(0);
        assert_eq!(rig.rings[0].used(), None);
        // Other memory, another driver.
        rig.status(Status::empty());
        rig.rings.iter_mut().for_each(RingDriver::restart);
        rig.bring_up();
        rig.works(0);
    });
}

/// The same memory, for whoever wants to know of its loss.
fn copy_of(region: &GuestRegionMmap) -> GuestRegionMmap {
    GuestRegionMmap::new(
        vm_memory::MmapRegion::from_file(region.file_offset().unwrap().clone(), region.size()).unwrap(),
        region.start_addr(),
    )
    .unwrap()
}

#[test]
fn policy_7_a_change_of_memory_waits_for_chains_of_a_range_until_its_deadline() {
    both(|layout| {
        for late in [false, true] {
            let mut rig = Rig::new(layout);
            rig.mode(0, Mode::Hang);
            let held = rig.add(0);
            rig.kick(0);
            // A minute is more than this test has: a change that ended by it would be seen not to end.
            let deadline = Instant::now() + if late { Duration::ZERO } else { Duration::from_secs(60) };
            let wait = WaitFor::Released { first: 0, last: u64::MAX, deadline };
            let mut change = rig.engine.memory(rig.ram.ram(), wait);
            rig.step();
            assert_eq!(change.try_take().is_some(), late);
            assert_eq!(rig.engine.failures().unreleased.load(Ordering::Relaxed), u64::from(late));
            rig.mode(0, Mode::Echo);
            assert_eq!(change.try_take().is_some(), !late);
            let used: Vec<_> = rig.rings[0].drain().iter().map(|used| used.id).collect();
            assert_eq!(used, [held]);
            assert!(!rig.engine.status().contains(Status::DEVICE_NEEDS_RESET));
            rig.works(0);
        }
    });
}

#[test]
fn policy_8_kicks_that_are_calls_fill_no_memory() {
    both(|layout| {
        let mut rig = Rig::new(layout);
        let heard = |rig: &Rig| rig.engine.stats(0).unwrap().kicks;
        for round in 1..4 {
            let before = heard(&rig);
            // The lane has no turn meanwhile: as if it hung.
            for _ in 0..1000 {
                rig.engine.kick(0);
            }
            let id = rig.add(0);
            rig.engine.kick(0);
            rig.step();
            assert_eq!(rig.rings[0].used().map(|used| used.id), Some(id), "the last of them counts, too");
            assert_eq!(heard(&rig) - before, 1, "round {round}");
        }
        // Also while it is not served: the first kick after it is enabled is heard.
        let off = rig.engine.enable(0, false);
        rig.done(off);
        rig.kick(0);
        let on = rig.engine.enable(0, true);
        rig.done(on);
        rig.works(0);
        rig.works(1);
    });
}

/// Gives the lane that obeys it the next order of the same kind.
struct Endless {
    engine: std::sync::Weak<Engine<Puppet>>,
    me: std::sync::Weak<Endless>,
}

impl Interrupt for Endless {
    fn signal(&self) {
        if let (Some(engine), Some(me)) = (self.engine.upgrade(), self.me.upgrade()) {
            drop(engine.signal(0, me));
        }
    }
}

#[test]
fn policy_8_orders_without_end_keep_no_queue_waiting() {
    let (done, over) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let Rig { engine, mut lanes, ram, mut rings, .. } = Rig::new(RingLayout::Split);
        let engine = Arc::new(engine);
        let endless = Arc::new_cyclic(|me| Endless { engine: Arc::downgrade(&engine), me: me.clone() });
        drop(engine.signal(0, endless.clone()));
        for _ in 0..3 {
            let id = rings[0].add(&[ram.writable(8)]);
            engine.kick(0);
            // Two: in the first one the kick may come behind as many orders as a turn carries out.
            lanes[0].turn(Some(Duration::from_millis(1)));
            lanes[0].turn(Some(Duration::from_millis(1)));
            assert_eq!(rings[0].used().map(|used| used.id), Some(id));
        }
        drop(endless);
        done.send(()).unwrap();
    });
    assert!(over.recv_timeout(Duration::from_secs(30)).is_ok(), "a turn does not end, or serves nothing");
}
