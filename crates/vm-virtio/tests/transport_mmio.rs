//! virtio-mmio. Names: `mmio_*` with the section of virtio 1.4, `malformed_mmio_*` what a driver must not do, `policy_N_*`
//! rules of the failure policy in ARCHITECTURE.md.
mod puppet;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use puppet::{ANSWER, Ear, HIGH, Mode, OWN, Order, Orders, PICKY, Puppet, Strings};
use virtio_testkit::hostile::Breakage;
use virtio_testkit::transport::TestLine;
use virtio_testkit::{Buf, RingDriver, RingLayout, TestRam};
use vm_virtio::transport::mmio::{MAGIC, Mmio};
use vm_virtio::transport::{Kicks, Options, TransportError};
use vm_virtio::{Features, GuestAddress, LaneRunner, QueueConfig, Status, WaitFor};

const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const SHM_SEL: u64 = 0x0ac;
const SHM_LEN: u64 = 0x0b0;
const SHM_BASE: u64 = 0x0b8;
const QUEUE_RESET: u64 = 0x0c0;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

const ACK: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const SUSPEND: u32 = 16;
const NEEDS_RESET: u32 = 64;
const NEGOTIATED: u32 = ACK | DRIVER | FEATURES_OK;
const LIVE: u32 = NEGOTIATED | DRIVER_OK;

/// All registers that the standard has, and their directions.
const REGISTERS: [(u64, bool, bool); 31] = [
    (0x000, true, false),
    (0x004, true, false),
    (0x008, true, false),
    (0x00c, true, false),
    (0x010, true, false),
    (0x014, false, true),
    (0x020, false, true),
    (0x024, false, true),
    (0x030, false, true),
    (0x034, true, false),
    (0x038, false, true),
    (0x044, true, true),
    (0x050, false, true),
    (0x060, true, false),
    (0x064, false, true),
    (0x070, true, true),
    (0x080, false, true),
    (0x084, false, true),
    (0x090, false, true),
    (0x094, false, true),
    (0x0a0, false, true),
    (0x0a4, false, true),
    (0x0ac, false, true),
    (0x0b0, true, false),
    (0x0b4, true, false),
    (0x0b8, true, false),
    (0x0bc, true, false),
    (0x0c0, true, true),
    (0x0fc, true, false),
    (0x100, true, true),
    (0x104, true, true),
];

fn options(kicks: Kicks, patience: Duration) -> Options {
    let mut options = Options::new(Arc::new(Ear::default()));
    (options.kicks, options.patience) = (kicks, patience);
    options
}

struct Rig {
    mmio: Arc<Mmio<Puppet>>,
    lanes: Vec<LaneRunner<Strings>>,
    orders: Vec<Orders>,
    line: Arc<TestLine>,
    ram: TestRam,
    rings: Vec<RingDriver>,
    features: Features,
}

const LAYOUT: Features = Features::VERSION_1;

impl Rig {
    fn new() -> Rig {
        Rig::on(TestRam::spread(2, 8 << 20), Kicks::Calls, Duration::ZERO)
    }

    fn on(ram: TestRam, kicks: Kicks, patience: Duration) -> Rig {
        let line = Arc::new(TestLine::default());
        let (device, orders) = Puppet::new();
        let (mmio, lanes) = Mmio::new(device, options(kicks, patience), 0x1234, line.clone()).unwrap();
        drop(mmio.engine().memory(ram.ram(), WaitFor::NewRequests));
        let orders = orders.recv().unwrap();
        let (rings, features) = (Vec::new(), Features::empty());
        Rig { mmio: Arc::new(mmio), lanes, orders, line, ram, rings, features }
    }

    fn load(&self, offset: u64) -> u32 {
        let mut bytes = [0xee; 4];
        self.mmio.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn store(&self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    fn settle(&mut self) {
        while self.lanes.iter_mut().fold(false, |worked, lane| lane.turn(Some(Duration::ZERO)) | worked) {}
    }

    fn status(&mut self, status: u32) -> u32 {
        self.store(STATUS, status);
        self.settle();
        self.load(STATUS)
    }

    fn choose(&self, features: Features) {
        for word in 0..4 {
            self.store(DRIVER_FEATURES_SEL, word);
            self.store(DRIVER_FEATURES, (features.bits() >> (32 * word)) as u32);
        }
    }

    /// Up to FEATURES_OK.
    fn negotiate(&mut self, features: Features) -> u32 {
        self.status(0);
        self.status(ACK);
        self.status(ACK | DRIVER);
        self.choose(features);
        self.status(NEGOTIATED)
    }

    fn set_up(&self, queue: u32, config: QueueConfig) {
        self.store(QUEUE_SEL, queue);
        self.store(QUEUE_SIZE, u32::from(config.size));
        for (at, addr) in
            [(QUEUE_DESC, config.desc), (QUEUE_DRIVER, config.driver), (QUEUE_DEVICE, config.device)]
        {
            self.store(at, addr.0 as u32);
            self.store(at + 4, (addr.0 >> 32) as u32);
        }
    }

    fn ready(&mut self, queue: u32) -> u32 {
        let config = self.rings[queue as usize].queue_config();
        self.set_up(queue, config);
        self.store(QUEUE_READY, 1);
        self.settle();
        self.load(QUEUE_READY)
    }

    fn make_rings(&mut self, layout: RingLayout, features: Features) {
        self.rings = (0..2).map(|_| RingDriver::new(&self.ram, layout, 16, features)).collect();
        self.features = features;
    }

    /// A driver that is ready, with both queues.
    fn go(&mut self, layout: RingLayout, extra: Features) {
        let packed = if layout == RingLayout::Packed { Features::RING_PACKED } else { Features::empty() };
        let features = LAYOUT | packed | extra;
        assert_eq!(self.negotiate(features), NEGOTIATED);
        self.make_rings(layout, features);
        assert_eq!((self.ready(0), self.ready(1)), (1, 1));
        assert_eq!(self.status(LIVE), LIVE);
    }

    fn live() -> Rig {
        let mut rig = Rig::new();
        rig.go(RingLayout::Split, Features::empty());
        rig
    }

    /// A request, and a notification.
    fn ask(&mut self, queue: usize) -> Buf {
        let buf = self.ram.writable(8);
        self.rings[queue].add(&[buf]);
        self.store(QUEUE_NOTIFY, queue as u32);
        buf
    }

    /// One request from beginning to end.
    fn exchange(&mut self, queue: usize) {
        let buf = self.ask(queue);
        self.settle();
        let used = self.rings[queue].used().expect("an answer");
        assert_eq!((used.len, self.ram.contents(&buf)), (8, ANSWER.to_vec()));
        self.acknowledge(1);
    }

    fn acknowledge(&mut self, events: u32) {
        assert_eq!((self.load(INTERRUPT_STATUS), self.line.is_high()), (events, events != 0));
        self.store(INTERRUPT_ACK, events);
        assert_eq!((self.load(INTERRUPT_STATUS), self.line.is_high()), (0, false));
    }

    fn tell(&mut self, queue: usize, order: Order) {
        self.orders[queue].give(order);
        self.settle();
    }

    fn ignored(&self) -> u64 {
        self.mmio.ignored().count()
    }

    /// After whatever happened, a new driver finds a device that works.
    fn heals(&mut self) {
        assert_eq!(self.status(0), 0);
        for layout in RingLayout::ALL {
            self.go(layout, Features::empty());
            self.exchange(0);
            self.exchange(1);
            assert_eq!(self.status(0), 0);
        }
    }
}

#[test]
fn mmio_4_2_2_1_magic_version_and_ids() {
    let rig = Rig::new();
    assert_eq!([0, 4, 8, 12].map(|at| rig.load(at)), [MAGIC, 2, 42, 0x1234]);
    assert_eq!(MAGIC.to_le_bytes(), *b"virt");
    assert_eq!(rig.mmio.size(), 0x106);
}

#[test]
fn mmio_4_2_2_features_are_read_in_words_and_those_beyond_are_empty() {
    let rig = Rig::new();
    let word = |word| {
        rig.store(DEVICE_FEATURES_SEL, word);
        rig.load(DEVICE_FEATURES)
    };
    let all = (0..4).fold(0, |all, at| all | u128::from(word(at)) << (32 * at));
    let carried = Features::NOTIFICATION_DATA | Features::RING_RESET | Features::SUSPEND;
    assert_eq!(Features::from_bits_retain(all), OWN | PICKY | HIGH | Features::RING | carried);
    assert_eq!((word(4), word(u32::MAX)), (0, 0));
}

#[test]
fn mmio_4_2_5_admin_queues_and_what_belongs_to_pci_are_not_offered() {
    let rig = Rig::new();
    let foreign = Features::ADMIN_VQ | Features::SR_IOV | Features::NOTIF_CONFIG_DATA;
    assert!(!rig.mmio.engine().offered().intersects(foreign));
}

#[test]
fn mmio_2_2_2_features_ok_stays_clear_unless_the_features_are_acceptable() {
    let mut rig = Rig::new();
    for refused in [Features::empty(), LAYOUT | PICKY, LAYOUT | Features::from_bits_retain(1 << 7)] {
        assert_eq!(rig.negotiate(refused), ACK | DRIVER, "{refused:?}");
        assert_eq!(rig.status(LIVE), ACK | DRIVER, "and DRIVER_OK as well");
    }
    rig.status(0);
    rig.status(ACK | DRIVER);
    rig.choose(LAYOUT);
    rig.store(DRIVER_FEATURES_SEL, 4);
    rig.store(DRIVER_FEATURES, 1);
    assert_eq!(rig.status(NEGOTIATED), ACK | DRIVER, "a bit beyond those that there are");
    assert_eq!(rig.negotiate(LAYOUT | PICKY | OWN | HIGH), NEGOTIATED);
    assert_eq!(rig.mmio.engine().driver_features(), LAYOUT | PICKY | OWN | HIGH);
    // Fixed from here on.
    let before = rig.ignored();
    rig.choose(LAYOUT);
    assert_eq!(rig.ignored(), before + 4);
    assert_eq!(rig.mmio.engine().driver_features(), LAYOUT | PICKY | OWN | HIGH);
}

#[test]
fn mmio_4_2_2_1_each_event_is_there_until_it_is_acknowledged() {
    let mut rig = Rig::live();
    assert_eq!((rig.load(INTERRUPT_STATUS), rig.line.is_high()), (0, false));
    rig.ask(0);
    rig.settle();
    assert_eq!(rig.load(INTERRUPT_STATUS), 1);
    rig.tell(0, Order::Configure(9));
    assert_eq!((rig.load(INTERRUPT_STATUS), rig.line.is_high()), (3, true));
    rig.store(INTERRUPT_ACK, 1);
    assert_eq!((rig.load(INTERRUPT_STATUS), rig.line.is_high()), (2, true));
    rig.store(INTERRUPT_ACK, !2);
    assert_eq!(rig.load(INTERRUPT_STATUS), 2, "bits that say nothing change nothing");
    rig.acknowledge(2);
}

/// Linux acknowledges first and looks at the queues then; later events are new ones.
#[test]
fn mmio_4_2_2_1_what_happens_after_the_acknowledgement_is_an_event_of_its_own() {
    let mut rig = Rig::live();
    for _ in 0..3 {
        rig.ask(1);
        rig.settle();
        rig.acknowledge(1);
    }
    assert_eq!(rig.line.raised(), 3);
    assert_eq!(rig.rings[1].drain().len(), 3);
}

#[test]
fn mmio_4_2_2_1_a_reset_clears_events_and_ready_bits() {
    let mut rig = Rig::live();
    rig.ask(0);
    rig.settle();
    assert!(rig.line.is_high());
    assert_eq!(rig.status(0), 0);
    assert_eq!((rig.load(INTERRUPT_STATUS), rig.line.is_high()), (0, false));
    for queue in 0..2 {
        rig.store(QUEUE_SEL, queue);
        assert_eq!((rig.load(QUEUE_READY), rig.load(QUEUE_RESET)), (0, 0));
    }
    assert_eq!(rig.mmio.engine().driver_features(), Features::empty());
    rig.heals();
}

#[test]
fn mmio_2_4_1_the_status_reads_0_only_when_the_reset_is_done() {
    let mut rig = Rig::live();
    rig.ask(0);
    rig.settle();
    rig.store(STATUS, 0);
    assert_ne!(rig.load(STATUS), 0, "the lanes have not heard of it");
    rig.store(STATUS, ACK);
    rig.settle();
    assert_eq!(rig.load(STATUS), 0, "and nothing is taken from a driver that did not wait");
    // A device that was never used, too.
    rig.store(STATUS, 0);
    assert_ne!(rig.load(STATUS), 0);
    rig.settle();
    assert_eq!(rig.load(STATUS), 0);
}

#[test]
fn mmio_4_2_2_1_the_generation_changes_with_the_configuration() {
    let mut rig = Rig::live();
    let before = rig.load(CONFIG_GENERATION);
    assert_eq!(rig.load(CONFIG), 0x0403_0201);
    assert_eq!(rig.load(CONFIG_GENERATION), before);
    rig.tell(1, Order::Configure(7));
    assert_ne!(rig.load(CONFIG_GENERATION), before);
    assert_eq!(rig.load(CONFIG), 0x0403_0207);
    rig.acknowledge(2);
    let before = rig.load(CONFIG_GENERATION);
    rig.mmio.write(CONFIG + 4, &[9]);
    assert_ne!(rig.load(CONFIG_GENERATION), before, "also when the driver changes it");
}

#[test]
fn mmio_2_1_2_no_configuration_interrupt_before_driver_ok() {
    let mut rig = Rig::new();
    rig.negotiate(LAYOUT);
    rig.tell(0, Order::Configure(9));
    assert_eq!((rig.load(INTERRUPT_STATUS), rig.line.is_high()), (0, false));
    rig.tell(0, Order::Fail);
    assert_eq!((rig.load(STATUS) & NEEDS_RESET, rig.load(INTERRUPT_STATUS)), (NEEDS_RESET, 0));
}

#[test]
fn mmio_4_2_2_1_a_queue_that_is_not_ready_is_not_touched() {
    let mut rig = Rig::new();
    rig.negotiate(LAYOUT);
    rig.make_rings(RingLayout::Split, LAYOUT);
    rig.status(LIVE);
    rig.ask(0);
    rig.settle();
    assert_eq!(rig.rings[0].used(), None);
    assert_eq!(rig.ready(0), 1);
    assert!(rig.rings[0].used().is_some(), "what was there before is found without a kick");

    rig.tell(0, Order::Be(Mode::Hold));
    rig.ask(0);
    rig.settle();
    rig.store(QUEUE_READY, 0);
    assert_eq!(rig.load(QUEUE_READY), 1, "until nothing touches it any more");
    rig.settle();
    assert_eq!(rig.load(QUEUE_READY), 0);
    rig.ask(0);
    rig.settle();
    assert_eq!(rig.rings[0].used(), None);
    rig.rings[0].check_untouched().unwrap();
    // Begins at the beginning.
    rig.tell(0, Order::Be(Mode::Echo));
    rig.rings[0].restart();
    rig.store(INTERRUPT_ACK, 1);
    assert_eq!(rig.ready(0), 1);
    rig.exchange(0);
}

#[test]
fn mmio_4_2_2_1_queue_reset() {
    for layout in RingLayout::ALL {
        let mut rig = Rig::new();
        rig.go(layout, Features::RING_RESET);
        rig.exchange(0);
        rig.tell(0, Order::Be(Mode::Hold));
        rig.ask(0);
        rig.settle();
        rig.store(QUEUE_SEL, 0);
        assert_eq!(rig.load(QUEUE_RESET), 0);
        rig.store(QUEUE_RESET, 1);
        assert_eq!((rig.load(QUEUE_RESET), rig.load(QUEUE_READY)), (1, 1), "while it lasts");
        rig.store(QUEUE_READY, 1);
        assert_eq!(rig.load(QUEUE_RESET), 1, "a driver that does not wait changes nothing");
        rig.settle();
        assert_eq!((rig.load(QUEUE_RESET), rig.load(QUEUE_READY)), (0, 0));
        rig.exchange(1);
        // Elsewhere and of another size.
        rig.tell(0, Order::Be(Mode::Echo));
        rig.rings[0] = RingDriver::new(&rig.ram, layout, 8, rig.features);
        assert_eq!(rig.ready(0), 1);
        assert_eq!(rig.load(QUEUE_RESET), 0, "0 after it was enabled");
        rig.exchange(0);
        // In the middle of a reset of the device.
        rig.store(QUEUE_RESET, 1);
        rig.store(STATUS, 0);
        assert_eq!((rig.load(QUEUE_RESET), rig.load(QUEUE_READY)), (0, 0));
        rig.settle();
        rig.heals();
    }
}

#[test]
fn mmio_2_6_1_queue_reset_needs_the_feature() {
    let mut rig = Rig::live();
    let before = rig.ignored();
    rig.store(QUEUE_RESET, 1);
    assert_eq!((rig.load(QUEUE_RESET), rig.load(QUEUE_READY)), (0, 1));
    assert_eq!(rig.ignored(), before + 1);
    rig.exchange(1);
}

#[test]
fn mmio_4_2_2_shared_memory_is_all_ones_where_there_is_none() {
    let rig = Rig::new();
    let region = |id| {
        rig.store(SHM_SEL, id);
        [SHM_LEN, SHM_LEN + 4, SHM_BASE, SHM_BASE + 4].map(|at| rig.load(at))
    };
    assert_eq!(region(0), [u32::MAX; 4]);
    assert_eq!(region(3), [u32::MAX; 4], "nobody has said where");
    rig.mmio.place_shared_memory(3, Some(GuestAddress(0x12_3456_7000)));
    rig.mmio.place_shared_memory(4, Some(GuestAddress(0x1000)));
    assert_eq!(region(3), [0x1000, 9, 0x3456_7000, 0x12]);
    assert_eq!(region(0x103), [u32::MAX; 4], "an id of 32 bits is none of 8");
    assert_eq!(region(4), [u32::MAX; 4], "the device has none of that id");
    rig.mmio.place_shared_memory(3, None);
    assert_eq!(region(3), [u32::MAX; 4]);
}

#[test]
fn mmio_4_2_3_3_notifications_with_data() {
    let mut rig = Rig::new();
    rig.go(RingLayout::Split, Features::NOTIFICATION_DATA);
    let buf = rig.ram.writable(8);
    rig.rings[1].add(&[buf]);
    let before = rig.ignored();
    rig.store(QUEUE_NOTIFY, 7);
    rig.settle();
    assert_eq!(rig.rings[1].used(), None);
    rig.store(QUEUE_NOTIFY, 0x8001_0001);
    rig.settle();
    assert!(rig.rings[1].used().is_some());
    assert_eq!(rig.ignored(), before + 1, "one for a queue that there is none of");
}

#[test]
fn mmio_4_2_3_3_kicks_come_by_file_or_as_writes() {
    let mut rig = Rig::on(TestRam::spread(2, 8 << 20), Kicks::Files, Duration::ZERO);
    rig.go(RingLayout::Split, Features::empty());
    let files: Vec<(u16, u64, u8, Option<u32>, OwnedFd)> = rig
        .mmio
        .notifiers()
        .map(|n| (n.queue, n.offset, n.width, n.value, n.fd.try_clone_to_owned().unwrap()))
        .collect();
    let shapes: Vec<_> =
        files.iter().map(|(queue, at, width, value, _)| (*queue, *at, *width, *value)).collect();
    assert_eq!(shapes, [(0, QUEUE_NOTIFY, 4, Some(0)), (1, QUEUE_NOTIFY, 4, Some(1))]);
    rig.exchange(1);
    // What an ioeventfd does.
    let buf = rig.ram.writable(8);
    rig.rings[1].add(&[buf]);
    rustix::io::write(&files[1].4, &1u64.to_ne_bytes()).unwrap();
    rig.settle();
    assert!(rig.rings[1].used().is_some());
    assert_eq!(Rig::new().mmio.notifiers().count(), 0);
}

#[test]
fn mmio_3_4_a_driver_suspends_and_resumes() {
    let mut rig = Rig::new();
    rig.go(RingLayout::Split, Features::SUSPEND | Features::RING_RESET);
    rig.tell(0, Order::Be(Mode::Hold));
    rig.ask(0);
    rig.settle();
    assert_eq!(rig.status(LIVE | SUSPEND), NEGOTIATED | SUSPEND);
    assert!(rig.rings[0].used().is_some(), "requests are finished first");
    rig.acknowledge(1);
    rig.tell(1, Order::Configure(9));
    rig.mmio.write(CONFIG + 4, &[9]);
    rig.ask(1);
    rig.settle();
    assert_eq!((rig.load(CONFIG), rig.load(INTERRUPT_STATUS)), (0x0403_0201, 0));
    // No queue is reset meanwhile, however long one waits.
    rig.store(QUEUE_SEL, 0);
    let before = rig.ignored();
    rig.store(QUEUE_RESET, 1);
    assert_eq!((rig.load(QUEUE_RESET), rig.ignored()), (0, before + 1));
    rig.settle();
    assert_eq!((rig.load(QUEUE_RESET), rig.load(QUEUE_READY)), (0, 1));
    assert_eq!(rig.status(LIVE), LIVE);
    rig.acknowledge(rig.load(INTERRUPT_STATUS));
    assert!(rig.rings[1].used().is_some());
    assert_eq!(rig.load(CONFIG) & 0xff, 9);
}

#[test]
fn mmio_3_4_2_no_queue_is_set_up_while_the_driver_has_suspended_the_device() {
    let mut rig = Rig::new();
    let features = LAYOUT | Features::SUSPEND;
    assert_eq!(rig.negotiate(features), NEGOTIATED);
    rig.make_rings(RingLayout::Split, features);
    assert_eq!(rig.ready(1), 1);
    let config = rig.rings[0].queue_config();
    rig.set_up(0, QueueConfig { size: 8, ..config });
    assert_eq!(rig.status(LIVE), LIVE);
    assert_eq!(rig.status(LIVE | SUSPEND), NEGOTIATED | SUSPEND);
    // Neither enabled...
    let before = rig.ignored();
    rig.store(QUEUE_READY, 1);
    rig.settle();
    assert_eq!((rig.load(QUEUE_READY), rig.ignored()), (0, before + 1));
    // ... nor changed: size and three addresses of two words.
    let elsewhere = GuestAddress(0x7fff_ffff_f000);
    rig.set_up(0, QueueConfig { size: 4, desc: elsewhere, driver: elsewhere, device: elsewhere });
    assert_eq!(rig.ignored(), before + 1 + 7);
    assert_eq!(rig.status(LIVE), LIVE);
    // What was set before is what counts afterwards.
    rig.store(QUEUE_READY, 1);
    rig.settle();
    assert_eq!((rig.load(QUEUE_READY), rig.load(STATUS)), (1, LIVE));
    rig.exchange(1);
}

#[test]
fn policy_1_a_broken_ring_needs_a_reset_and_the_driver_is_told() {
    let mut rig = Rig::on(virtio_testkit::hostile::memory(), Kicks::Calls, Duration::ZERO);
    rig.go(RingLayout::Split, Features::empty());
    let ram = rig.ram.clone();
    Breakage::HeadOutOfRange.apply(&mut rig.rings[0], &ram);
    rig.store(QUEUE_NOTIFY, 0);
    rig.settle();
    assert_eq!(rig.load(STATUS), LIVE | NEEDS_RESET);
    rig.acknowledge(2);
    rig.exchange(1);
    rig.heals();
}

#[test]
fn malformed_mmio_wrong_widths_and_directions_change_nothing() {
    let mut rig = Rig::live();
    let offered = rig.mmio.engine().offered();
    for offset in 0..0x100 {
        for width in [0, 1, 2, 3, 4, 5, 8, 16] {
            let register = REGISTERS.iter().find(|(at, ..)| *at == offset).filter(|_| width == 4);
            let (readable, writable) = register.map_or((false, false), |(_, r, w)| (*r, *w));
            let mut data = vec![0xee; width];
            let before = rig.ignored();
            if !readable {
                rig.mmio.read(offset, &mut data);
                assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {width}");
                assert_eq!(rig.ignored(), before + 1, "{offset:#x} {width}");
            }
            let before = rig.ignored();
            if !writable {
                rig.mmio.write(offset, &vec![0xff; width]);
                assert_eq!(rig.ignored(), before + 1, "{offset:#x} {width}");
            }
        }
    }
    assert_eq!((rig.load(STATUS), rig.mmio.engine().offered()), (LIVE, offered));
    rig.exchange(0);
    rig.exchange(1);
}

#[test]
fn malformed_mmio_configuration_accesses() {
    let rig = Rig::live();
    let read = |offset, width| {
        let mut data = vec![0xee; width];
        rig.mmio.read(offset, &mut data);
        data
    };
    assert_eq!((read(CONFIG, 1), read(CONFIG + 4, 2)), (vec![1], vec![5, 6]));
    assert_eq!(read(CONFIG + 4, 4), [5, 6, 0, 0], "zeros behind the end");
    assert_eq!(read(CONFIG + 6, 4), [0; 4]);
    assert_eq!(read(u64::MAX, 4), [0; 4]);
    assert_eq!(read(CONFIG + (1 << 32), 1), [0], "no wrap");
    assert_eq!(read(CONFIG, 8), [0; 8]);
    assert_eq!(read(CONFIG, 3), [0; 3]);
    let before = rig.ignored();
    for (offset, data) in [(4, &[9u8; 4][..]), (6, &[9]), (u64::MAX - CONFIG, &[9]), (4, &[]), (2, &[9; 3])] {
        rig.mmio.write(CONFIG + offset, data);
    }
    assert_eq!(rig.ignored(), before + 5);
    assert_eq!((read(CONFIG, 4), read(CONFIG + 4, 2)), (vec![1, 2, 3, 4], vec![5, 6]));
    rig.mmio.write(CONFIG + 4, &[7, 8]);
    assert_eq!(read(CONFIG + 4, 2), [7, 8]);
}

#[test]
fn malformed_mmio_queues_before_features_ok() {
    // Without memory at 0, where a queue is whose addresses were never written.
    let mut rig = Rig::on(TestRam::new(&[(1 << 20, 8 << 20)]), Kicks::Calls, Duration::ZERO);
    for status in [0, ACK, ACK | DRIVER] {
        rig.status(status);
        rig.make_rings(RingLayout::Split, LAYOUT);
        assert_eq!(rig.ready(0), 0, "{status}");
    }
    rig.choose(LAYOUT);
    assert_eq!(rig.status(NEGOTIATED), NEGOTIATED);
    // What was written before is not there now.
    rig.store(QUEUE_READY, 1);
    rig.settle();
    assert_eq!((rig.load(QUEUE_READY), rig.load(STATUS) & NEEDS_RESET), (0, NEEDS_RESET));
    rig.heals();
}

#[test]
fn malformed_mmio_sizes_and_addresses() {
    for (size, broken) in [(0, true), (3, true), (65, false), (0x1_0010, false), (u32::MAX, false)] {
        let mut rig = Rig::new();
        rig.negotiate(LAYOUT);
        rig.make_rings(RingLayout::Split, LAYOUT);
        rig.set_up(0, rig.rings[0].queue_config());
        rig.store(QUEUE_SIZE, size);
        rig.store(QUEUE_READY, 1);
        rig.settle();
        assert_eq!(rig.load(QUEUE_READY), 0, "{size}");
        assert_eq!(rig.load(STATUS) & NEEDS_RESET != 0, broken, "{size}");
        rig.heals();
    }
    let end = GuestAddress(u64::MAX - 4095);
    for which in 0..3 {
        for addr in [end, GuestAddress(u64::MAX), GuestAddress(0x7fff_ffff_f000), GuestAddress(1)] {
            let mut rig = Rig::new();
            rig.negotiate(LAYOUT);
            rig.make_rings(RingLayout::Split, LAYOUT);
            let mut config = rig.rings[0].queue_config();
            *[&mut config.desc, &mut config.driver, &mut config.device][which] = addr;
            rig.set_up(0, config);
            rig.store(QUEUE_READY, 1);
            rig.settle();
            assert_eq!((rig.load(QUEUE_READY), rig.load(STATUS) & NEEDS_RESET), (0, NEEDS_RESET));
            assert_eq!(rig.status(LIVE | NEEDS_RESET) & DRIVER_OK, DRIVER_OK);
            rig.heals();
        }
    }
}

#[test]
fn malformed_mmio_a_queue_that_is_ready_is_not_changed() {
    let mut rig = Rig::live();
    let before = rig.ignored();
    rig.set_up(
        0,
        QueueConfig { size: 1, desc: GuestAddress(1), driver: GuestAddress(1), device: GuestAddress(1) },
    );
    rig.store(QUEUE_READY, 1);
    rig.store(QUEUE_READY, 2);
    assert_eq!(rig.ignored(), before + 9);
    assert_eq!(rig.load(QUEUE_READY), 1);
    rig.exchange(0);
}

#[test]
fn malformed_mmio_two_queues_in_the_same_place() {
    let mut rig = Rig::new();
    rig.negotiate(LAYOUT);
    rig.make_rings(RingLayout::Split, LAYOUT);
    let config = rig.rings[0].queue_config();
    for queue in 0..2 {
        rig.set_up(queue, config);
        rig.store(QUEUE_READY, 1);
    }
    rig.status(LIVE);
    rig.ask(0);
    rig.store(QUEUE_NOTIFY, 1);
    rig.settle();
    rig.ram.check_guards().unwrap();
    rig.heals();
}

#[test]
fn malformed_mmio_queues_that_do_not_exist() {
    let mut rig = Rig::live();
    for queue in [2, 0xffff, 0x1_0000, u32::MAX] {
        rig.store(QUEUE_SEL, queue);
        let before = rig.ignored();
        assert_eq!([QUEUE_SIZE_MAX, QUEUE_READY, QUEUE_RESET].map(|at| rig.load(at)), [0; 3]);
        rig.store(QUEUE_SIZE, 4);
        rig.store(QUEUE_READY, 1);
        rig.store(QUEUE_READY, 0);
        rig.store(QUEUE_RESET, 1);
        rig.store(QUEUE_NOTIFY, queue);
        assert_eq!(rig.ignored(), before + 5, "{queue}");
    }
    rig.exchange(0);
}

#[test]
fn policy_8_a_guest_that_never_acknowledges_is_served_all_the_same() {
    let mut rig = Rig::live();
    for _ in 0..1000 {
        rig.ask(0);
        rig.settle();
        assert!(rig.rings[0].used().is_some());
    }
    rig.acknowledge(1);
}

/// Lanes on threads of their own, until the engine is gone.
fn run(lanes: Vec<LaneRunner<Strings>>) -> Vec<std::thread::JoinHandle<()>> {
    lanes.into_iter().map(|lane| std::thread::spawn(move || lane.run())).collect()
}

fn threaded(patience: Duration) -> Rig {
    let mut rig = Rig::on(TestRam::spread(2, 8 << 20), Kicks::Files, patience);
    drop(run(std::mem::take(&mut rig.lanes)));
    rig
}

fn answer(rig: &mut Rig, queue: usize) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while rig.rings[queue].used().is_none() {
        assert!(Instant::now() < deadline, "no answer");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Waits until the worker has a request.
fn taken(rig: &Rig, queue: u16) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while rig.mmio.engine().stats(queue).unwrap().out == 0 {
        assert!(Instant::now() < deadline, "not taken");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Linux' driver writes 0 and goes on at once.
#[test]
fn mmio_4_2_2_1_a_reset_is_over_when_the_write_is() {
    let mut rig = threaded(Duration::from_secs(20));
    for _ in 0..50 {
        rig.go(RingLayout::Split, Features::empty());
        rig.ask(0);
        answer(&mut rig, 0);
        rig.ask(1);
        rig.store(STATUS, 0);
        assert_eq!((rig.load(STATUS), rig.load(INTERRUPT_STATUS)), (0, 0));
        rig.store(STATUS, ACK);
        assert_eq!(rig.load(STATUS), ACK);
    }
}

#[test]
fn mmio_4_2_2_2_a_queue_is_stopped_when_the_write_is_over() {
    let mut rig = threaded(Duration::from_secs(20));
    rig.go(RingLayout::Split, Features::empty());
    rig.orders[0].tell(Order::Be(Mode::Hold));
    rig.ask(0);
    taken(&rig, 0);
    rig.store(QUEUE_SEL, 0);
    rig.store(QUEUE_READY, 0);
    assert_eq!(rig.load(QUEUE_READY), 0);
}

#[test]
fn policy_7_a_reset_that_hangs_holds_no_cpu_and_is_not_over() {
    // Longer than anything takes but the reset that hangs (5 seconds).
    let mut rig = threaded(Duration::from_secs(4));
    rig.go(RingLayout::Split, Features::empty());
    rig.orders[0].tell(Order::Be(Mode::Hang));
    rig.ask(0);
    taken(&rig, 0);
    let deadline = Instant::now() + Duration::from_secs(20);
    rig.store(STATUS, 0);
    assert_ne!(rig.load(STATUS), 0);
    // Everybody else goes on meanwhile.
    assert_eq!((rig.load(0), rig.load(INTERRUPT_STATUS)), (MAGIC, 0));
    while rig.load(STATUS) != NEEDS_RESET || rig.mmio.engine().is_resetting() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    rig.store(STATUS, 0);
    while rig.load(STATUS) != 0 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.go(RingLayout::Split, Features::empty());
    rig.ask(0);
    answer(&mut rig, 0);
}

/// Four CPUs at once: one resets, one sets up, one notifies, one looks at everything.
#[test]
fn policy_8_cpus_that_get_in_each_others_way() {
    let mut rig = threaded(Duration::from_secs(20));
    rig.go(RingLayout::Split, Features::RING_RESET);
    rig.orders[0].tell(Order::Be(Mode::Hold));
    let (mmio, config) = (rig.mmio.clone(), rig.rings[0].queue_config());
    std::thread::scope(|scope| {
        let store = |offset: u64, value: u32| mmio.write(offset, &value.to_le_bytes());
        scope.spawn(move || {
            (0..200).for_each(|_| store(STATUS, 0));
        });
        let store = |offset: u64, value: u32| mmio.write(offset, &value.to_le_bytes());
        scope.spawn(move || {
            for round in 0..200 {
                store(STATUS, ACK);
                store(STATUS, ACK | DRIVER);
                store(DRIVER_FEATURES_SEL, 1);
                store(DRIVER_FEATURES, (LAYOUT | Features::RING_RESET).low64().wrapping_shr(32) as u32);
                store(STATUS, NEGOTIATED);
                store(QUEUE_SEL, round % 3);
                store(QUEUE_SIZE, u32::from(config.size));
                store(QUEUE_DESC, config.desc.0 as u32);
                store(QUEUE_DRIVER, config.driver.0 as u32);
                store(QUEUE_DEVICE, config.device.0 as u32);
                store(QUEUE_READY, 1);
                store(STATUS, LIVE);
                store(if round % 2 == 0 { QUEUE_RESET } else { QUEUE_READY }, 1 - round % 2);
            }
        });
        let store = |offset: u64, value: u32| mmio.write(offset, &value.to_le_bytes());
        scope.spawn(move || (0..2000).for_each(|round| store(QUEUE_NOTIFY, round % 3)));
        scope.spawn(|| {
            for round in 0..2000 {
                mmio.read(round % 0x110, &mut [0; 4]);
            }
        });
    });
    assert_eq!(rig.status(0), 0);
    rig.go(RingLayout::Split, Features::empty());
    rig.ask(0);
    answer(&mut rig, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any accesses in any order: nothing panics, nothing outside of what was given is touched, a reset heals.
    #[test]
    fn malformed_mmio_any_accesses(
        accesses in prop::collection::vec(
            (any::<bool>(), 0u64..0x110, prop::sample::select(vec![1usize, 2, 4, 4, 4, 8]),
             prop::sample::select(vec![0u32, 1, 2, 3, 4, 8, 11, 15, 16, 31, 64, 255, 0x1000, 0x10000, u32::MAX])),
            0..200),
        aligned in any::<bool>(),
    ) {
        let mut rig = Rig::on(virtio_testkit::hostile::memory(), Kicks::Calls, Duration::ZERO);
        for (write, offset, width, value) in accesses {
            let (offset, width) = if aligned { (offset & !3, 4) } else { (offset, width) };
            let bytes = [value.to_le_bytes(), value.to_le_bytes()].concat();
            if write {
                rig.mmio.write(offset, &bytes[..width]);
            } else {
                rig.mmio.read(offset, &mut bytes.clone()[..width]);
            }
            rig.settle();
        }
        rig.ram.check_forbidden().unwrap();
        rig.heals();
    }
}

/// Saves a device that works, with a request in the ring and an event that is not acknowledged.
fn saved() -> (Rig, Vec<u8>) {
    let mut rig = threaded(Duration::from_secs(20));
    rig.go(RingLayout::Packed, Features::NOTIFICATION_DATA);
    rig.ask(0);
    answer(&mut rig, 0);
    rig.store(QUEUE_SEL, 1);
    rig.mmio.engine().suspend().wait().unwrap();
    rig.ask(1);
    let bytes = rig.mmio.save().unwrap();
    (rig, bytes)
}

fn successor(rig: &Rig) -> Rig {
    let mut next = Rig::on(rig.ram.clone(), Kicks::Files, Duration::from_secs(20));
    drop(run(std::mem::take(&mut next.lanes)));
    next
}

#[test]
fn snapshot_a_device_goes_on_behind_other_registers() {
    let (mut rig, bytes) = saved();
    let mut next = successor(&rig);
    next.mmio.restore(&bytes).unwrap();
    assert_eq!((next.load(STATUS), next.load(QUEUE_READY)), (LIVE, 1), "the selected queue, too");
    assert_eq!((next.load(INTERRUPT_STATUS) & 1, next.line.is_high()), (1, true));
    next.rings = std::mem::take(&mut rig.rings);
    answer(&mut next, 1);
    next.store(INTERRUPT_ACK, 3);
    next.ask(0);
    // The feature is remembered: without it this names no queue.
    next.store(QUEUE_NOTIFY, 0x8000_0000);
    answer(&mut next, 0);
    next.store(STATUS, 0);
    assert_eq!((next.load(STATUS), next.load(INTERRUPT_STATUS)), (0, 0));
}

#[test]
fn snapshot_whatever_is_not_a_state_is_refused_and_leaves_a_reset_device() {
    let (rig, bytes) = saved();
    let next = successor(&rig);
    for len in 0..bytes.len() {
        assert!(next.mmio.restore(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert!(next.mmio.restore(&damaged).is_err(), "byte {at}");
    }
    assert_eq!((next.load(STATUS), next.load(INTERRUPT_STATUS)), (0, 0));
    // Memory is not there: the queues cannot start.
    let empty = successor(&rig);
    empty.mmio.engine().memory(vm_virtio::GuestRam::empty(), WaitFor::NewRequests).wait();
    assert!(matches!(empty.mmio.restore(&bytes), Err(TransportError::Queue(_))));
    assert_eq!(empty.load(STATUS), 0);
    // A device that is in use.
    next.mmio.restore(&bytes).unwrap();
    assert!(matches!(next.mmio.restore(&bytes), Err(TransportError::Device(_))));
    assert_eq!(next.load(STATUS), LIVE, "which is not disturbed");
    assert_eq!(rig.mmio.engine().status(), Status::from_bits_retain(LIVE as u8));
}
