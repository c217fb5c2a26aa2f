//! Saving and restoring: what is restored goes on, what is not acceptable is refused and leaves a reset device.
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use device_state::{SavedState, Section, StateError, Tag};
use proptest::prelude::*;
use reactor::Mail;
use serde::{Deserialize, Serialize};
use virtio_testkit::{MemoryHost, RingLayout};
use vm_virtio::queue::{ChainId, HeldChain};
use vm_virtio::{
    Chain, ConfigSpace, ConfigWriter, DeviceError, DeviceState, DeviceType, Features, GuestAddress, Lane,
    QueueConfig, QueueSpec, QueueState, RingPos, SavedQueue, SnapshotError, Status, Stop, VirtioDevice,
    WaitFor, Worker,
};

/// What a test sends to a worker.
enum Order {
    /// Answers all held requests with this length.
    Answer(u32),
    Fail,
}

#[derive(Clone, Copy, PartialEq)]
enum Panics {
    Never,
    InSave,
    InRestore,
}

/// Two lanes with a queue each. Requests are held until they are told to be answered, over suspensions too.
struct Holder {
    config: Arc<ConfigSpace>,
    mail: Sender<Vec<Mail<Order>>>,
    panics: Panics,
}

struct HoldingWorker {
    queue: u16,
    held: Vec<Chain>,
    /// Of `held`, from the last suspension.
    ids: Vec<u16>,
    /// To be adopted.
    lost: Vec<u16>,
    served: u32,
}

#[derive(Serialize, Deserialize)]
struct LaneState {
    served: u32,
    held: Vec<u16>,
}

impl VirtioDevice for Holder {
    type Worker = HoldingWorker;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::from_bits_retain(0b11)
    }
    fn check_features(&self, driver: Features) -> bool {
        driver.bits() & 0b11 != 0b10
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        (0..2).map(|lane| QueueSpec { name: "q", max_size: 64, lane }).collect()
    }
    fn config(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }
    /// Only byte 0 can become another one.
    fn write_config(&mut self, offset: u32, data: &[u8], _: ConfigWriter) {
        if offset == 0 {
            self.config.set(0, &data[..data.len().min(1)]).unwrap();
        }
    }
    fn workers(&mut self, mail: &[Mail<Order>]) -> Result<Vec<HoldingWorker>, DeviceError> {
        let _ = self.mail.send(mail.to_vec());
        let worker = |queue| HoldingWorker { queue, held: vec![], ids: vec![], lost: vec![], served: 0 };
        Ok((0..2).map(worker).collect())
    }
    fn reset(&mut self, workers: &mut [HoldingWorker]) {
        for worker in workers {
            worker.held.clear();
            worker.lost.clear();
            worker.served = 0;
        }
    }
    fn save(&self, workers: &[HoldingWorker]) -> Result<DeviceState, StateError> {
        assert!(self.panics != Panics::InSave);
        let states: Vec<LaneState> =
            workers.iter().map(|w| LaneState { served: w.served, held: w.ids.clone() }).collect();
        DeviceState::encode(1, &states)
    }
    fn restore(&mut self, workers: &mut [HoldingWorker], state: &DeviceState) -> Result<(), StateError> {
        assert!(self.panics != Panics::InRestore);
        let states: Vec<LaneState> = state.decode(1)?;
        if states.len() != workers.len() {
            return Err(StateError::refused("another number of lanes"));
        }
        for (worker, state) in workers.iter_mut().zip(states) {
            worker.served = state.served;
            worker.lost = state.held;
        }
        Ok(())
    }
}

impl Worker for HoldingWorker {
    type Msg = Order;
    fn queue_ready(&mut self, number: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        self.held.extend(self.lost.drain(..).filter_map(|id| queue.adopt(ChainId(id))));
        self.held.extend(queue.iter());
        Ok(())
    }
    fn queue_stop(&mut self, number: u16, _: Stop, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(number) else { return };
        self.held.drain(..).for_each(|chain| queue.discard(chain));
    }
    fn suspend(&mut self, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(self.queue) else { return };
        self.ids = self.held.iter().filter_map(|chain| queue.id(chain)).map(|id| id.0).collect();
    }
    fn keeps(&self, _: u16) -> usize {
        self.held.len()
    }
    fn message(&mut self, order: Order, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        match order {
            Order::Fail => return Err(DeviceError::new("told to fail")),
            Order::Answer(len) => {
                let Some(queue) = lane.queues.get(self.queue) else { return Ok(()) };
                for chain in self.held.drain(..) {
                    self.served += 1;
                    queue.add_used(chain, len);
                }
            }
        }
        Ok(())
    }
}

struct Rig {
    host: MemoryHost<Holder>,
    mail: Vec<Mail<Order>>,
}

fn holder(config: &[u8], panics: Panics) -> (Holder, std::sync::mpsc::Receiver<Vec<Mail<Order>>>) {
    let (sender, receiver) = channel();
    (Holder { config: Arc::new(ConfigSpace::new(config.to_vec())), mail: sender, panics }, receiver)
}

impl Rig {
    fn new(layout: RingLayout, features: Features) -> Rig {
        let (device, mail) = holder(&[1, 2, 3], Panics::Never);
        let host = MemoryHost::builder(device).layout(layout).with(features).queue_size(8).start();
        Rig { host, mail: mail.recv().unwrap() }
    }

    fn request(&mut self, queue: usize) -> u16 {
        let buffer = self.host.ram().writable(8);
        let id = self.host.ring(queue).add(&[buffer]);
        self.host.kick_anyway(queue);
        self.host.step();
        id
    }

    fn tell(&mut self, lane: usize, order: Order) {
        assert!(self.mail[lane].send(order).is_ok());
        self.host.step();
    }

    fn suspend(&mut self) {
        let order = self.host.engine().suspend();
        self.host.finish(order).unwrap();
    }

    fn save(&mut self) -> Result<Vec<u8>, SnapshotError> {
        let order = self.host.engine().save();
        self.host.finish(order)
    }

    fn restore(&mut self, state: &[u8]) -> Result<Vec<SavedQueue>, SnapshotError> {
        let order = self.host.engine().memory(self.host.ram().ram(), WaitFor::NewRequests);
        self.host.finish(order);
        let order = self.host.engine().restore(state);
        self.host.finish(order)
    }

    /// The same guest, another device.
    fn successor(self, config: &[u8], panics: Panics) -> Rig {
        let (device, mail) = holder(config, panics);
        let host = self.host.successor(device);
        Rig { host, mail: mail.recv().unwrap() }
    }

    /// A device of another guest that has done nothing yet.
    fn fresh(panics: Panics) -> Rig {
        let (device, mail) = holder(&[1, 2, 3], panics);
        let host = MemoryHost::builder(device).queue_size(8).build();
        Rig { host, mail: mail.recv().unwrap() }
    }
}

fn saved() -> Vec<u8> {
    let mut rig = Rig::new(RingLayout::Split, Features::empty());
    rig.request(0);
    rig.suspend();
    rig.save().unwrap()
}

const ENGINE: Tag = Tag(*b"engn");
const QUEUES: Tag = Tag(*b"ques");
const DEVICE: Tag = Tag(*b"devc");

#[test]
fn requests_under_way_are_finished_by_the_restored_device() {
    for layout in RingLayout::ALL {
        for features in [Features::empty(), Features::IN_ORDER, Features::SUSPEND] {
            let mut rig = Rig::new(layout, features);
            // Further round the ring than once.
            for _ in 0..11 {
                rig.request(0);
                rig.tell(0, Order::Answer(1));
                assert!(rig.host.ring(0).used().is_some());
            }
            let ids: Vec<u16> = (0..3).map(|_| rig.request(0)).collect();
            let other = rig.request(1);
            rig.host.config().set(0, &[9]).unwrap();
            rig.suspend();
            let late = {
                let buffer = rig.host.ram().writable(8);
                rig.host.ring(0).add(&[buffer])
            };
            let state = rig.save().unwrap();
            let features = rig.host.engine().driver_features();
            let generation = rig.host.config().generation();
            let mut rig = rig.successor(&[1, 2, 3], Panics::Never);
            let queues = rig.restore(&state).unwrap();
            assert_eq!(queues.len(), 2);
            assert_eq!(queues[0].state.held.len(), 3);
            assert_eq!(rig.host.engine().driver_features(), features);
            assert_eq!(rig.host.engine().status(), Status::from_bits_retain(15));
            assert_eq!(rig.host.config().generation(), generation);
            let mut config = [0; 3];
            rig.host.config().read(0, &mut config);
            assert_eq!(config, [9, 2, 3]);
            rig.host.start_restored(queues);
            rig.host.step();
            rig.tell(0, Order::Answer(5));
            rig.tell(1, Order::Answer(6));
            for id in ids.into_iter().chain([late]) {
                let used = rig.host.ring(0).used().expect("finished elsewhere");
                assert_eq!((used.id, used.len), (id, 5));
            }
            assert_eq!(rig.host.ring(1).used().map(|used| (used.id, used.len)), Some((other, 6)));
            rig.host.settle();
        }
    }
}

#[test]
fn the_saved_device_may_go_on() {
    let mut rig = Rig::new(RingLayout::Packed, Features::empty());
    let id = rig.request(0);
    rig.suspend();
    let first = rig.save().unwrap();
    assert_eq!(rig.save().unwrap(), first, "saving changes nothing");
    let order = rig.host.engine().resume();
    rig.host.finish(order);
    rig.tell(0, Order::Answer(8));
    assert_eq!(rig.host.ring(0).used().map(|used| used.id), Some(id));
}

#[test]
fn a_device_that_its_driver_suspended_is_restored_suspended() {
    let mut rig = Rig::new(RingLayout::Split, Features::SUSPEND);
    let id = rig.request(0);
    let status = rig.host.engine().status();
    rig.host.set_status(status | Status::SUSPEND);
    rig.host.config().set(0, &[7]).unwrap();
    let state = rig.save().unwrap();
    let mut rig = rig.successor(&[1, 2, 3], Panics::Never);
    let queues = rig.restore(&state).unwrap();
    rig.host.start_restored(queues);
    let status = rig.host.engine().status();
    assert!(status.contains(Status::SUSPEND) && !status.contains(Status::DRIVER_OK));
    rig.tell(0, Order::Answer(2));
    assert_eq!(rig.host.ring(0).used(), None);
    rig.host.set_status(status | Status::DRIVER_OK);
    rig.host.step();
    rig.tell(0, Order::Answer(2));
    assert_eq!(rig.host.ring(0).used().map(|used| used.id), Some(id));
}

#[test]
fn chains_that_nobody_adopts_go_back_to_the_driver() {
    let mut rig = Rig::new(RingLayout::Split, Features::empty());
    let id = rig.request(0);
    rig.suspend();
    let mut state = SavedState::parse(&rig.save().unwrap()).unwrap();
    let forgetful = vec![LaneState { served: 0, held: vec![] }, LaneState { served: 0, held: vec![999] }];
    state.put(DEVICE, Section::encode(1, &forgetful).unwrap());
    let mut rig = rig.successor(&[1, 2, 3], Panics::Never);
    let queues = rig.restore(&state.to_bytes().unwrap()).unwrap();
    rig.host.start_restored(queues);
    rig.host.step();
    assert_eq!(rig.host.ring(0).used().map(|used| (used.id, used.len)), Some((id, 0)));
}

#[test]
fn a_restored_queue_that_was_never_served_can_be_stopped_and_reset() {
    let mut rig = Rig::new(RingLayout::Split, Features::SUSPEND);
    rig.request(0);
    let status = rig.host.engine().status();
    rig.host.set_status(status | Status::SUSPEND);
    let state = rig.save().unwrap();
    let mut rig = rig.successor(&[1, 2, 3], Panics::Never);
    let queues = rig.restore(&state).unwrap();
    let held = queues[0].state.clone();
    rig.host.start_restored(queues);
    // What nobody has adopted is not lost.
    assert_eq!(rig.host.stop_queue(0, Stop::Drain).unwrap(), held);
    rig.host.start_queue(0, Some(held));
    rig.host.reset();
    assert_eq!(rig.host.engine().status(), Status::empty());
}

#[test]
fn a_running_device_is_not_saved_and_a_used_one_not_restored() {
    let mut rig = Rig::new(RingLayout::Split, Features::empty());
    assert_eq!(rig.save(), Err(SnapshotError::Running));
    let id = rig.request(0);
    let state = saved();
    assert_eq!(rig.restore(&state), Err(SnapshotError::NotReset));
    rig.tell(0, Order::Answer(3));
    assert_eq!(rig.host.ring(0).used().map(|used| used.id), Some(id), "untouched");
    rig.tell(1, Order::Fail);
    rig.suspend();
    assert_eq!(rig.save(), Err(SnapshotError::Failed));
    assert!(rig.host.engine().status().contains(Status::DEVICE_NEEDS_RESET), "a save heals nothing");
}

#[test]
fn a_reset_in_between_calls_a_save_off() {
    let mut rig = Rig::new(RingLayout::Split, Features::empty());
    rig.suspend();
    let save = rig.host.engine().save();
    let reset = rig.host.engine().reset();
    let again = rig.host.engine().save();
    assert!(rig.host.finish(save).is_ok());
    rig.host.finish(reset);
    assert!(matches!(rig.host.finish(again), Ok(_) | Err(SnapshotError::Running)));
    assert_eq!(rig.host.engine().status(), Status::empty());
}

#[test]
fn policy_5_a_panic_while_saving_or_restoring_is_the_devices_failure() {
    let state = saved();
    let mut rig = Rig::fresh(Panics::InRestore);
    assert_eq!(rig.restore(&state), Err(SnapshotError::Panicked));
    assert!(rig.host.engine().status().contains(Status::DEVICE_NEEDS_RESET));
    rig.host.reset();
    rig.host.initialise();
    let mut rig = Rig::fresh(Panics::InSave);
    assert!(!rig.host.engine().can_save());
    assert_eq!(rig.save(), Err(SnapshotError::Panicked));
    rig.host.reset();
    rig.host.initialise();
}

/// Version 1 of the engine's part.
#[derive(Clone, Serialize, Deserialize)]
struct Engine {
    features: u128,
    status: u8,
    config: Vec<u8>,
    generation: u32,
}

fn with_engine(change: impl FnOnce(&mut Engine)) -> Vec<u8> {
    let mut state = SavedState::parse(&saved()).unwrap();
    let mut engine: Engine = state.take(ENGINE).unwrap().decode(1).unwrap();
    change(&mut engine);
    state.put(ENGINE, Section::encode(1, &engine).unwrap());
    state.to_bytes().unwrap()
}

#[test]
fn policy_8_what_no_device_can_have_is_refused_and_leaves_it_as_new() {
    let refused = |state: &[u8]| {
        let mut rig = Rig::fresh(Panics::Never);
        let error = rig.restore(state).expect_err("refused");
        assert_eq!(rig.host.engine().status(), Status::empty());
        assert_eq!(rig.host.engine().driver_features(), Features::empty());
        rig.host.initialise();
        let id = rig.request(0);
        rig.tell(0, Order::Answer(4));
        assert_eq!(rig.host.ring(0).used().map(|used| used.id), Some(id));
        error
    };
    let good = with_engine(|_| ());
    assert!(Rig::fresh(Panics::Never).restore(&good).is_ok());
    assert_eq!(refused(b"nonsense"), SnapshotError::State(StateError::Magic));
    assert_eq!(refused(&good[..50]), SnapshotError::State(StateError::Truncated));
    let feature = refused(&with_engine(|engine| engine.features |= 1 << 60));
    assert_eq!(feature, SnapshotError::Features(1 << 60));
    let status = |status| refused(&with_engine(|engine| engine.status = status));
    // DRIVER_OK without FEATURES_OK, queues without FEATURES_OK, SUSPEND that was not negotiated, an unknown bit.
    for impossible in [4, 0, 1 | 2 | 8 | 16, 15 | 32, 15 | 16] {
        assert_eq!(status(impossible), SnapshotError::Status(impossible));
    }
    // 2.2.2: a set that the device itself does not accept.
    let picky = refused(&with_engine(|engine| engine.features = (engine.features & !0b11) | 0b10));
    assert!(matches!(picky, SnapshotError::Features(_)));
    assert_eq!(refused(&with_engine(|engine| engine.config[2] = 4)), SnapshotError::Config(2));
    assert_eq!(refused(&with_engine(|engine| engine.config.truncate(1))), SnapshotError::Config(1));
    let mut other = SavedState::new(2);
    other.put(ENGINE, Section::empty());
    assert_eq!(refused(&other.to_bytes().unwrap()), SnapshotError::DeviceType(DeviceType::BLOCK));
    let mut lacking = SavedState::parse(&good).unwrap();
    lacking.take(QUEUES).unwrap();
    assert_eq!(
        refused(&lacking.to_bytes().unwrap()),
        SnapshotError::State(StateError::MissingSection(QUEUES))
    );
    let lanes = refused(&{
        let mut state = SavedState::parse(&good).unwrap();
        state.put(DEVICE, Section::encode(1, &Vec::<LaneState>::new()).unwrap());
        state.to_bytes().unwrap()
    });
    assert!(matches!(lanes, SnapshotError::State(StateError::Refused(_))));
}

/// If this fails, devices that were saved before cannot be restored any more: a new version is due.
#[test]
fn the_bytes_of_engine_and_queues_are_what_they_have_always_been() {
    let mut state = SavedState::parse(&saved()).unwrap();
    let engine = state.take(ENGINE).unwrap();
    assert_eq!(engine.version(), 1);
    assert_eq!(engine.bytes(), GOLDEN_ENGINE);
    state.put(ENGINE, engine);
    // Where the rings are is the test kit's: these bytes are what they once were.
    let queues = state.take(QUEUES).unwrap();
    assert_eq!(queues.version(), 1);
    state.put(QUEUES, Section::from_bytes(1, GOLDEN_QUEUES.to_vec()));
    let restored = Rig::fresh(Panics::Never).restore(&state.to_bytes().unwrap()).unwrap();
    let pos = |index| RingPos { index, wrap: true };
    let held = HeldChain {
        id: ChainId(6),
        descs: 1,
        readable: vec![],
        writable: vec![(GuestAddress(704), 8)],
        completed: None,
    };
    let config = |desc, driver, device| QueueConfig {
        size: 8,
        desc: GuestAddress(desc),
        driver: GuestAddress(driver),
        device: GuestAddress(device),
    };
    let first = SavedQueue {
        index: 0,
        enabled: true,
        config: config(0x110, 0x0100_0002, 0x204),
        state: QueueState { avail: pos(1), used: pos(0), held: vec![held] },
    };
    let second = SavedQueue {
        index: 1,
        enabled: true,
        config: config(0x0100_0010, 0x282, 0x0100_0204),
        state: QueueState { avail: RingPos { index: 0, wrap: true }, used: pos(0), held: vec![] },
    };
    assert_eq!(restored, [first, second]);
}
const GOLDEN_ENGINE: [u8; 11] = [131, 128, 128, 128, 19, 15, 3, 1, 2, 3, 0];
#[rustfmt::skip]
const GOLDEN_QUEUES: [u8; 43] = [
    2,
    0, 1, 8, 144, 2, 130, 128, 128, 8, 132, 4, 1, 1, 0, 1,
    1, 6, 1, 0, 1, 192, 5, 8, 0,
    1, 1, 8, 144, 128, 128, 8, 130, 5, 132, 132, 128, 8, 0, 1, 0, 1,
    0,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Whatever stands in a well-formed state: an error, or a device that a reset brings back.
    #[test]
    fn policy_8_hostile_states_never_panic(
        flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6),
        section in 0..3usize,
    ) {
        let mut state = SavedState::parse(&saved()).unwrap();
        let tag = [ENGINE, QUEUES, DEVICE][section];
        let part = state.take(tag).unwrap();
        let mut bytes = part.bytes().to_vec();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        state.put(tag, Section::from_bytes(part.version(), bytes));
        let mut rig = Rig::fresh(Panics::Never);
        if let Ok(queues) = rig.restore(&state.to_bytes().unwrap()) {
            for queue in queues {
                let start = vm_virtio::QueueStart {
                    config: queue.config,
                    state: Some(queue.state),
                    inflight: None,
                    kick: vm_virtio::Kick::Manual,
                    call: None,
                };
                let order = rig.host.engine().start(queue.index, start);
                let _ = rig.host.finish(order);
                let order = rig.host.engine().enable(queue.index, true);
                rig.host.finish(order);
            }
            while rig.host.step() {}
            rig.tell(0, Order::Answer(u32::MAX));
            rig.tell(1, Order::Answer(u32::MAX));
        }
        let order = rig.host.engine().reset();
        rig.host.finish(order);
        prop_assert_eq!(rig.host.engine().status(), Status::empty());
    }
}
