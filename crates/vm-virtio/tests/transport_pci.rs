//! virtio over PCI, without a bus: the structures in the BAR and their capabilities. Names: `pci_*` with the section of
//! virtio 1.4, `malformed_pci_*` what a driver must not do.
mod puppet;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use puppet::{ANSWER, Ear, HIGH, Mode, OWN, Order, Orders, PICKY, Puppet, Strings};
use virtio_testkit::transport::{TestFunction, VECTORS};
use virtio_testkit::{RingDriver, RingLayout, TestRam};
use vm_virtio::shared_memory::ShmRegion;
use vm_virtio::transport::pci::{FunctionInterrupts, NO_VECTOR, Pci, PciCapability, VENDOR};
use vm_virtio::transport::{Kicks, Options};
use vm_virtio::{Features, GuestAddress, LaneRunner, QueueConfig, WaitFor};

const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const CONFIG_VECTOR: u64 = 16;
const NUM_QUEUES: u64 = 18;
const STATUS: u64 = 20;
const GENERATION: u64 = 21;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const NOTIFY_OFF: u64 = 30;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;
const NOTIF_CONFIG_DATA: u64 = 56;
const QUEUE_RESET: u64 = 58;
const ADMIN_INDEX: u64 = 60;
const ADMIN_NUM: u64 = 62;
const ISR: u64 = 0x40;
const NOTIFY: u64 = 0x1000;
const CONFIG: u64 = 0x2000;

const NEGOTIATED: u64 = 11;
const LIVE: u64 = 15;
const NEEDS_RESET: u64 = 64;

struct Rig {
    pci: Arc<Pci<Puppet>>,
    lanes: Vec<LaneRunner<Strings>>,
    orders: Vec<Orders>,
    function: Arc<TestFunction>,
    ram: TestRam,
    rings: Vec<RingDriver>,
    features: Features,
}

impl Rig {
    fn new() -> Rig {
        Rig::on(TestRam::new(&[(1 << 20, 8 << 20)]), Kicks::Calls, Duration::ZERO)
    }

    fn on(ram: TestRam, kicks: Kicks, patience: Duration) -> Rig {
        let mut options = Options::new(Arc::new(Ear::default()));
        (options.kicks, options.patience) = (kicks, patience);
        let (device, orders) = Puppet::new();
        let (pci, lanes) = Pci::new(device, options, VECTORS).unwrap();
        let function = Arc::new(TestFunction::default());
        pci.connect(function.clone());
        drop(pci.engine().memory(ram.ram(), WaitFor::NewRequests));
        let orders = orders.recv().unwrap();
        Rig {
            pci: Arc::new(pci),
            lanes,
            orders,
            function,
            ram,
            rings: Vec::new(),
            features: Features::empty(),
        }
    }

    fn load(&self, offset: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.pci.read(offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    fn store(&self, offset: u64, width: usize, value: u64) {
        self.pci.write(offset, &value.to_le_bytes()[..width]);
    }

    fn select(&self, queue: u64) {
        self.store(QUEUE_SELECT, 2, queue);
    }

    fn settle(&mut self) {
        while self.lanes.iter_mut().fold(false, |worked, lane| lane.turn(Some(Duration::ZERO)) | worked) {}
    }

    fn status(&mut self, status: u64) -> u64 {
        self.store(STATUS, 1, status);
        self.settle();
        self.load(STATUS, 1)
    }

    fn choose(&self, features: Features) {
        for word in 0..4 {
            self.store(DRIVER_FEATURE_SELECT, 4, word);
            self.store(DRIVER_FEATURE, 4, (features.bits() >> (32 * word)) as u64 & 0xffff_ffff);
        }
    }

    fn negotiate(&mut self, features: Features) -> u64 {
        self.status(0);
        self.status(1);
        self.status(3);
        self.choose(features);
        self.status(NEGOTIATED)
    }

    fn set_up(&self, queue: u64, config: QueueConfig) {
        self.select(queue);
        self.store(QUEUE_SIZE, 2, config.size.into());
        self.store(QUEUE_DESC, 8, config.desc.0);
        for (at, addr) in [(QUEUE_DRIVER, config.driver.0), (QUEUE_DEVICE, config.device.0)] {
            self.store(at + 4, 4, addr >> 32);
            self.store(at, 4, addr & 0xffff_ffff);
        }
    }

    fn enable(&mut self, queue: u64) -> u64 {
        self.set_up(queue, self.rings[queue as usize].queue_config());
        self.store(QUEUE_ENABLE, 2, 1);
        self.settle();
        self.load(QUEUE_ENABLE, 2)
    }

    fn go(&mut self, layout: RingLayout, extra: Features) {
        let packed = if layout == RingLayout::Packed { Features::RING_PACKED } else { Features::empty() };
        let features = Features::VERSION_1 | packed | extra;
        assert_eq!(self.negotiate(features), NEGOTIATED);
        self.rings = (0..2).map(|_| RingDriver::new(&self.ram, layout, 16, features)).collect();
        self.features = features;
        assert_eq!((self.enable(0), self.enable(1)), (1, 1));
        assert_eq!(self.status(LIVE), LIVE);
    }

    fn live() -> Rig {
        let mut rig = Rig::new();
        rig.go(RingLayout::Split, Features::empty());
        rig
    }

    fn ask(&mut self, queue: usize) {
        let buf = self.ram.writable(8);
        self.rings[queue].add(&[buf]);
        self.store(NOTIFY + 4 * queue as u64, 2, queue as u64);
        self.settle();
    }

    fn exchange(&mut self, queue: usize) {
        let buf = self.ram.writable(8);
        self.rings[queue].add(&[buf]);
        self.store(NOTIFY + 4 * queue as u64, 2, queue as u64);
        self.settle();
        let used = self.rings[queue].used().expect("an answer");
        assert_eq!((used.len, self.ram.contents(&buf)), (8, ANSWER.to_vec()));
    }

    fn tell(&mut self, queue: usize, order: Order) {
        self.orders[queue].give(order);
        self.settle();
    }

    fn ignored(&self) -> u64 {
        self.pci.ignored().count()
    }

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
fn pci_4_1_2_1_the_device_id() {
    assert_eq!(Rig::new().pci.device_id(), Some(0x1040 + 42));
}

#[test]
fn pci_4_1_4_2_capabilities() {
    let rig = Rig::new();
    let all = rig.pci.capabilities(4);
    let fields: Vec<_> = all
        .iter()
        .map(|capability| {
            let body = &capability.body;
            let word = |at: usize| u32::from_le_bytes(body[at - 2..at + 2].try_into().unwrap());
            // cap_len counts the two bytes before the body, and everything behind.
            assert_eq!(usize::from(body[0]), body.len() + 2);
            (body[1], body[2], word(8), word(12), body.len() + 2)
        })
        .collect();
    let expected = [
        (1, 4, 0, 64, 16),
        (2, 4, 0x1000, 8, 20),
        (3, 4, 0x40, 1, 16),
        (4, 4, 0x2000, 6, 16),
        (5, 0, 0, 0, 20),
    ];
    assert_eq!(fields, expected);
    // 4.1.4.4.1: a multiplier of 4.
    assert_eq!(all[1].body[14..], [4, 0, 0, 0]);
    assert_eq!(all.iter().map(|c| c.is_window).collect::<Vec<_>>(), [false, false, false, false, true]);
    assert!(rig.pci.bar_size().is_power_of_two() && rig.pci.bar_size() >= 0x2006);
}

#[test]
fn pci_4_1_4_7_1_and_4_1_4_8_1_shared_memory_and_vendor_capabilities() {
    let region = ShmRegion { id: 3, size: 0x9_0000_1000 };
    let body = PciCapability::shared_memory(region, 2, 0x1_0000_0000).body;
    assert_eq!(body[..4], [24, 8, 2, 3]);
    assert_eq!(body[6..], [0, 0, 0, 0, 0, 0x10, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0]);
    assert_eq!(PciCapability::vendor(VENDOR, &[]), None);
    assert_eq!(PciCapability::vendor(0x1b36, &[0; 200]), None);
    let body = PciCapability::vendor(0x1b36, &[7, 8, 9]).unwrap().body;
    assert_eq!(body, [12, 9, 0x36, 0x1b, 7, 8, 9, 0, 0, 0]);
}

#[test]
fn pci_4_1_4_3_1_features() {
    let mut rig = Rig::new();
    let word = |word| {
        rig.store(DEVICE_FEATURE_SELECT, 4, word);
        assert_eq!(rig.load(DEVICE_FEATURE_SELECT, 4), word);
        u128::from(rig.load(DEVICE_FEATURE, 4))
    };
    let all = (0..4).fold(0, |all, at| all | word(at) << (32 * at));
    let carried =
        Features::NOTIFICATION_DATA | Features::NOTIF_CONFIG_DATA | Features::RING_RESET | Features::SUSPEND;
    assert_eq!(Features::from_bits_retain(all), OWN | PICKY | HIGH | Features::RING | carried);
    assert_eq!((word(4), word(0xffff_ffff)), (0, 0));
    assert_eq!(rig.negotiate(Features::VERSION_1 | PICKY), 3);
    assert_eq!(rig.negotiate(Features::VERSION_1 | OWN | HIGH), NEGOTIATED);
    // What was chosen reads back.
    for (at, bits) in [(0, 1 << 5), (1, 1), (2, 0), (3, 1 << 4), (4, 0)] {
        rig.store(DRIVER_FEATURE_SELECT, 4, at);
        assert_eq!(rig.load(DRIVER_FEATURE, 4), bits);
    }
}

#[test]
fn pci_4_1_4_3_1_reset() {
    let mut rig = Rig::live();
    rig.store(CONFIG_VECTOR, 2, 1);
    rig.store(QUEUE_VECTOR, 2, 2);
    rig.store(STATUS, 1, 0);
    assert_ne!(rig.load(STATUS, 1), 0, "until it is done");
    rig.settle();
    assert_eq!(rig.load(STATUS, 1), 0);
    assert_eq!((rig.load(QUEUE_ENABLE, 2), rig.load(QUEUE_RESET, 2), rig.load(ISR, 1)), (0, 0, 0));
    // 4.1.5.1.2.1: all unmapped.
    let none = u64::from(NO_VECTOR);
    assert_eq!((rig.load(CONFIG_VECTOR, 2), rig.load(QUEUE_VECTOR, 2)), (none, none));
    assert_eq!(rig.load(QUEUE_SIZE, 2), 16, "as large as it can be");
    rig.heals();
}

#[test]
fn pci_4_1_4_3_1_sizes() {
    let mut rig = Rig::new();
    rig.negotiate(Features::VERSION_1);
    assert_eq!(rig.load(NUM_QUEUES, 2), 2);
    for (queue, max) in [(0, 64), (1, 16), (2, 0), (0xffff, 0)] {
        rig.select(queue);
        assert_eq!((rig.load(QUEUE_SELECT, 2), rig.load(QUEUE_SIZE, 2)), (queue, max));
    }
    rig.select(0);
    for (size, read) in [(32, 32), (33, 32), (0, 32), (128, 32), (1, 1)] {
        rig.store(QUEUE_SIZE, 2, size);
        assert_eq!(rig.load(QUEUE_SIZE, 2), read, "{size}");
    }
    rig.negotiate(Features::VERSION_1 | Features::RING_PACKED);
    rig.store(QUEUE_SIZE, 2, 33);
    assert_eq!(rig.load(QUEUE_SIZE, 2), 33);
}

#[test]
fn pci_4_1_3_2_halves_are_independent() {
    let mut rig = Rig::new();
    rig.negotiate(Features::VERSION_1);
    rig.select(0);
    for at in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE] {
        rig.store(at + 4, 4, 0x1234_5678);
        assert_eq!(rig.load(at, 8), 0x1234_5678_0000_0000);
        rig.store(at, 4, 0x9abc_def0);
        assert_eq!((rig.load(at, 4), rig.load(at + 4, 4)), (0x9abc_def0, 0x1234_5678));
        rig.store(at, 8, 0x1000);
        assert_eq!(rig.load(at, 8), 0x1000);
    }
}

#[test]
fn pci_4_1_4_3_1_queue_reset() {
    for layout in RingLayout::ALL {
        let mut rig = Rig::new();
        rig.go(layout, Features::RING_RESET);
        rig.tell(0, Order::Be(Mode::Hold));
        rig.ask(0);
        rig.select(0);
        assert_eq!(rig.load(QUEUE_RESET, 2), 0);
        rig.store(QUEUE_RESET, 2, 1);
        assert_eq!((rig.load(QUEUE_RESET, 2), rig.load(QUEUE_ENABLE, 2)), (1, 1));
        rig.settle();
        assert_eq!((rig.load(QUEUE_RESET, 2), rig.load(QUEUE_ENABLE, 2)), (0, 0));
        rig.exchange(1);
        rig.tell(0, Order::Be(Mode::Echo));
        rig.rings[0] = RingDriver::new(&rig.ram, layout, 8, rig.features);
        assert_eq!(rig.enable(0), 1);
        assert_eq!(rig.load(QUEUE_RESET, 2), 0);
        rig.exchange(0);
    }
}

#[test]
fn pci_4_1_4_3_1_no_administration_queues() {
    let rig = Rig::new();
    assert_eq!((rig.load(ADMIN_INDEX, 2), rig.load(ADMIN_NUM, 2)), (0, 0));
    assert!(!rig.pci.engine().offered().intersects(Features::ADMIN_VQ | Features::SR_IOV));
}

#[test]
fn pci_4_1_4_3_1_the_generation_changes_when_what_is_read_has() {
    let mut rig = Rig::live();
    assert_eq!(rig.load(CONFIG, 4), 0x0403_0201);
    let before = rig.load(GENERATION, 1);
    // As often as it takes for 8 bits to come round.
    for n in 0..256 {
        rig.tell(0, Order::Configure(n as u8));
    }
    assert_eq!(rig.load(CONFIG, 1), 255);
    assert_ne!(rig.load(GENERATION, 1), before);
    let before = rig.load(GENERATION, 1);
    assert_eq!(rig.load(CONFIG + 4, 2), 0x0605);
    assert_eq!(rig.load(GENERATION, 1), before);
    rig.store(CONFIG + 4, 1, 9);
    assert_eq!(rig.load(CONFIG + 4, 1), 9);
}

#[test]
fn pci_4_1_4_4_1_notifications() {
    let mut rig = Rig::on(TestRam::new(&[(1 << 20, 8 << 20)]), Kicks::Files, Duration::ZERO);
    for extra in [
        Features::empty(),
        Features::NOTIFICATION_DATA,
        Features::NOTIF_CONFIG_DATA,
        Features::NOTIFICATION_DATA | Features::NOTIF_CONFIG_DATA,
    ] {
        rig.go(RingLayout::Split, extra);
        for queue in 0..2 {
            rig.select(queue);
            assert_eq!(rig.load(NOTIFY_OFF, 2), queue);
            assert_eq!(
                rig.load(NOTIF_CONFIG_DATA, 2),
                if extra.contains(Features::NOTIF_CONFIG_DATA) { queue } else { 0 }
            );
            let buf = rig.ram.writable(8);
            rig.rings[queue as usize].add(&[buf]);
            // 4.1.5.2: 16 bits, with data 32.
            let (width, value) = match extra.contains(Features::NOTIFICATION_DATA) {
                true => (4, 0x8001_0000 | queue),
                false => (2, queue),
            };
            rig.store(NOTIFY + 4 * queue, width, value);
            rig.settle();
            assert!(rig.rings[queue as usize].used().is_some());
        }
    }
    rig.select(2);
    assert_eq!((rig.load(NOTIFY_OFF, 2), rig.load(NOTIF_CONFIG_DATA, 2)), (0, 0));
    // What an ioeventfd does, at whatever address the BAR is.
    let files: Vec<(u64, OwnedFd)> =
        rig.pci.notifiers().map(|n| (n.offset, n.fd.try_clone_to_owned().unwrap())).collect();
    assert_eq!(files.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [NOTIFY, NOTIFY + 4]);
    let buf = rig.ram.writable(8);
    rig.rings[1].add(&[buf]);
    rustix::io::write(&files[1].1, &1u64.to_ne_bytes()).unwrap();
    rig.settle();
    assert!(rig.rings[1].used().is_some());
}

#[test]
fn pci_4_1_4_5_1_isr_and_pin() {
    let mut rig = Rig::live();
    assert_eq!((rig.load(ISR, 1), rig.function.intx()), (0, false));
    rig.ask(0);
    assert!(rig.function.intx());
    rig.tell(0, Order::Configure(9));
    assert_eq!(rig.load(ISR, 1), 3);
    assert_eq!((rig.load(ISR, 1), rig.function.intx()), (0, false), "reading acknowledges");
    rig.ask(1);
    assert_eq!(rig.load(ISR, 1), 1);
    // With MSI-X: the configuration bit only.
    rig.function.enable_messages(true);
    rig.ask(1);
    rig.tell(0, Order::Configure(8));
    assert!(!rig.function.intx());
    assert_eq!(rig.load(ISR, 1), 2);
}

#[test]
fn pci_4_1_5_1_2_1_vectors() {
    let mut rig = Rig::live();
    rig.function.enable_messages(true);
    let none = u64::from(NO_VECTOR);
    for (wanted, mapped) in [(0, 0), (7, 7), (8, none), (7, 7), (0x7ff, none), (3, 3), (none, none)] {
        rig.store(CONFIG_VECTOR, 2, wanted);
        assert_eq!(rig.load(CONFIG_VECTOR, 2), mapped);
        rig.select(1);
        rig.store(QUEUE_VECTOR, 2, wanted);
        assert_eq!(rig.load(QUEUE_VECTOR, 2), mapped);
    }
    // 4.1.5.3.1, 4.1.5.4.1: unmapped events interrupt nobody.
    rig.ask(1);
    rig.tell(0, Order::Configure(9));
    assert_eq!((0..8).map(|vector| rig.function.take(vector)).sum::<u64>(), 0);
    // Any event to any vector, also to the same.
    rig.store(QUEUE_VECTOR, 2, 5);
    rig.store(CONFIG_VECTOR, 2, 5);
    rig.ask(1);
    assert_eq!(rig.function.take(5), 1);
    rig.tell(0, Order::Configure(8));
    assert_eq!(rig.function.take(5), 1);
    rig.select(2);
    let before = rig.ignored();
    rig.store(QUEUE_VECTOR, 2, 1);
    assert_eq!((rig.load(QUEUE_VECTOR, 2), rig.ignored()), (none, before + 1));
}

#[test]
fn pci_4_1_4_9_1_the_window() {
    let mut rig = Rig::live();
    let capability = |bar: u8, offset: u32, length: u32, data: [u8; 4]| {
        let mut bytes = vec![9, 0, 20, 5, bar, 0, 0, 0];
        bytes.extend(offset.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(data);
        bytes
    };
    assert_eq!(rig.pci.window_read(4, &capability(4, STATUS as u32, 1, [0; 4])), [LIVE as u8, 0, 0, 0]);
    rig.pci.window_write(4, &capability(4, QUEUE_SELECT as u32, 2, [1, 0, 0xee, 0xee]));
    assert_eq!(rig.load(QUEUE_SELECT, 2), 1);
    assert_eq!(rig.pci.window_read(4, &capability(4, CONFIG as u32, 4, [0; 4])), [1, 2, 3, 4]);
    let buf = rig.ram.writable(8);
    rig.rings[1].add(&[buf]);
    rig.pci.window_write(4, &capability(4, NOTIFY as u32 + 4, 2, [1, 0, 0, 0]));
    rig.settle();
    assert!(rig.rings[1].used().is_some());
    let before = rig.ignored();
    for (bar, offset, length) in
        [(3, 20, 1), (4, 20, 3), (4, 20, 0), (4, 22, 4), (4, 0xffff_fffc, 4), (4, 20, 0x101)]
    {
        assert_eq!(rig.pci.window_read(4, &capability(bar, offset, length, [0; 4])), [0; 4]);
        rig.pci.window_write(4, &capability(bar, offset, length, [0; 4]));
    }
    rig.pci.window_write(4, &[]);
    assert_eq!((rig.ignored(), rig.load(STATUS, 1)), (before + 13, LIVE));
}

#[test]
fn malformed_pci_widths() {
    let mut rig = Rig::live();
    let fields: &[(u64, usize)] = &[
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 4),
        (16, 2),
        (18, 2),
        (20, 1),
        (21, 1),
        (22, 2),
        (24, 2),
        (26, 2),
        (28, 2),
        (30, 2),
        (32, 8),
        (32, 4),
        (36, 4),
        (40, 8),
        (40, 4),
        (44, 4),
        (48, 8),
        (48, 4),
        (52, 4),
        (56, 2),
        (58, 2),
        (60, 2),
        (62, 2),
    ];
    for offset in 0..0x1100 {
        for width in [0, 1, 2, 3, 4, 5, 8, 16] {
            let known = fields.contains(&(offset, width)) || (offset == ISR && width > 0) || offset >= NOTIFY;
            let mut data = vec![0xee; width];
            let before = rig.ignored();
            rig.pci.read(offset, &mut data);
            if !known {
                assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {width}");
                assert_eq!(rig.ignored(), before + 1, "{offset:#x} {width}");
            }
            let notifies = matches!(offset, NOTIFY | 0x1004) && matches!(width, 2 | 4);
            if !fields.contains(&(offset, width)) && !notifies {
                let before = rig.ignored();
                rig.pci.write(offset, &vec![0xff; width]);
                assert_eq!(rig.ignored(), before + 1, "{offset:#x} {width}");
            }
        }
    }
    assert_eq!(rig.load(STATUS, 1), LIVE);
    rig.exchange(0);
}

#[test]
fn malformed_pci_queues() {
    let mut rig = Rig::live();
    rig.select(0);
    let before = rig.ignored();
    rig.store(QUEUE_ENABLE, 2, 0);
    rig.store(QUEUE_ENABLE, 2, 1);
    rig.store(QUEUE_SIZE, 2, 8);
    rig.store(QUEUE_DESC, 8, 1);
    assert_eq!((rig.load(QUEUE_ENABLE, 2), rig.ignored()), (1, before + 4));
    rig.exchange(0);
    for addr in [1, u64::MAX, 1 << 40] {
        rig.negotiate(Features::VERSION_1);
        let here = GuestAddress(addr);
        rig.set_up(0, QueueConfig { size: 16, desc: here, driver: here, device: here });
        rig.store(QUEUE_ENABLE, 2, 1);
        rig.settle();
        assert_eq!((rig.load(QUEUE_ENABLE, 2), rig.load(STATUS, 1) & NEEDS_RESET), (0, NEEDS_RESET));
    }
    rig.heals();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any accesses in any order: nothing panics, nothing outside of what was given is touched, a reset heals.
    #[test]
    fn malformed_pci_any_accesses(
        accesses in prop::collection::vec(
            (any::<bool>(), prop::sample::select(vec![0u64, 4, 8, 12, 16, 18, 20, 20, 20, 21, 22, 24, 26, 28, 30, 32, 36, 40,
                48, 56, 58, 60, 62, 63, 64, 65, 0x1000, 0x1004, 0x1008, 0x2000, 0x2004, u64::MAX]),
             prop::sample::select(vec![1usize, 2, 2, 4, 4, 8]),
             prop::sample::select(vec![0u64, 1, 2, 3, 4, 8, 11, 15, 16, 31, 64, 255, 0x1000, 0x10000, u64::MAX])),
            0..200),
    ) {
        let mut rig = Rig::on(virtio_testkit::hostile::memory(), Kicks::Calls, Duration::ZERO);
        for (write, offset, width, value) in accesses {
            if write { rig.store(offset, width, value) } else { rig.load(offset, width); }
            rig.settle();
        }
        rig.ram.check_forbidden().unwrap();
        rig.heals();
    }
}

fn threaded(ram: TestRam) -> Rig {
    let mut rig = Rig::on(ram, Kicks::Files, Duration::from_secs(20));
    for lane in rig.lanes.drain(..) {
        drop(std::thread::spawn(move || lane.run()));
    }
    rig
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn snapshot_a_device_goes_on_behind_another_function() {
    let mut rig = threaded(TestRam::new(&[(1 << 20, 8 << 20)]));
    rig.go(RingLayout::Packed, Features::empty());
    rig.function.enable_messages(true);
    rig.select(1);
    rig.store(QUEUE_VECTOR, 2, 5);
    rig.orders[0].tell(Order::Configure(9));
    until("no change", || rig.pci.engine().config().generation() != 0);
    rig.pci.engine().suspend().wait().unwrap();
    let buf = rig.ram.writable(8);
    rig.rings[1].add(&[buf]);
    let bytes = rig.pci.save().unwrap();
    let mut next = threaded(rig.ram.clone());
    next.function.enable_messages(true);
    for len in 0..bytes.len() {
        assert!(next.pci.restore(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
    next.pci.restore(&bytes).unwrap();
    assert_eq!((next.load(STATUS, 1), next.load(QUEUE_VECTOR, 2), next.load(ISR, 1)), (LIVE, 5, 2));
    assert_eq!(next.load(QUEUE_DESC, 8), rig.rings[1].queue_config().desc.0);
    next.rings = std::mem::take(&mut rig.rings);
    until("no answer", || next.rings[1].used().is_some());
    until("no message", || next.function.take(5) > 0);
    assert!(next.pci.restore(&bytes).is_err(), "it is in use");
    assert_eq!(next.load(STATUS, 1), LIVE);
}

/// A function whose vectors have files behind them, as those of a hypervisor do; and how many messages it sent.
struct Filed(File, AtomicU64);

impl FunctionInterrupts for Filed {
    fn uses_messages(&self) -> bool {
        true
    }
    fn message(&self, _: u16) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
    fn message_fd(&self, _: u16) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
    fn set_intx(&self, _: bool) {}
}

/// A lane has to hear of the other file. A driver that writes the vector again and again waits for that, so that no more
/// of it is under way than the guest has CPUs.
#[test]
fn policy_8_vectors_are_not_exchanged_faster_than_lanes_follow() {
    let mut options = Options::new(Arc::new(Ear::default()));
    options.patience = Duration::from_secs(20);
    let (device, orders) = Puppet::new();
    let (pci, lanes) = Pci::new(device, options, VECTORS).unwrap();
    let function = Arc::new(Filed(File::open("/dev/null").unwrap(), AtomicU64::new(0)));
    pci.connect(function.clone());
    for lane in lanes {
        drop(std::thread::spawn(move || lane.run()));
    }
    let ram = TestRam::new(&[(1 << 20, 8 << 20)]);
    pci.engine().memory(ram.ram(), WaitFor::NewRequests).wait();
    let mut rig = Rig {
        pci: Arc::new(pci),
        lanes: Vec::new(),
        orders: orders.recv().unwrap(),
        function: Arc::default(),
        ram,
        rings: Vec::new(),
        features: Features::empty(),
    };
    rig.go(RingLayout::Split, Features::empty());
    rig.select(1);
    for _ in 0..100 {
        function.1.store(0, Ordering::SeqCst);
        rig.store(QUEUE_VECTOR, 2, 3);
        // An interrupt that may have gone to the old file is sent again: the lane's last word.
        assert_eq!(function.1.load(Ordering::SeqCst), 1, "the write is over before the lane has heard of it");
    }
}
