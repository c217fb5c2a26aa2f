//! virtio over channel I/O. Channel programs are written byte by byte from the standard. Names: `ccw_*` with the section of
//! virtio 1.4, `channel_*` rules of channels, `linux_*` what its driver does.
mod puppet;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use puppet::{ANSWER, Ear, HIGH, Mode, OWN, Order, Orders, PICKY, Puppet, Strings};
use virtio_testkit::{RingDriver, RingLayout, TestRam};
use vm_virtio::transport::ccw::{
    Ccw, ChannelInterrupts, ENDED, Ending, INCORRECT_LENGTH, LONGEST, PROGRAM_CHECK, PROGRAM_CONTROLLED,
    Program, UNIT_CHECK, subchannel_id,
};
use vm_virtio::transport::{Kicks, Options};
use vm_virtio::{Features, GuestAddress, LaneRunner, Status, WaitFor};

const GOOD: (u8, u8) = (ENDED, 0);
const REJECTED: (u8, u8) = (ENDED | UNIT_CHECK, 0);
const WRONG_LENGTH: (u8, u8) = (ENDED, INCORRECT_LENGTH);
const CHECKED: (u8, u8) = (0, PROGRAM_CHECK);

const CD: u8 = 0x80;
const CC: u8 = 0x40;
const SLI: u8 = 0x20;
const SKIP: u8 = 0x10;
const PCI: u8 = 0x08;
const IDA: u8 = 0x04;

/// Where the driver has its things. Behind the end of memory there is nothing.
const CCWS: u64 = 0x1000;
const DATA: u64 = 0x2000;
const INDICATORS: u64 = 0x3000;
const CONFIG_INDICATORS: u64 = 0x3008;
const SUMMARY: u64 = 0x3010;
const END: u64 = 16 << 20;

/// Interrupts, in order: the subchannel's, or of an adapter with its subclass.
#[derive(Default)]
struct Heard(Mutex<Vec<Option<u8>>>);

impl ChannelInterrupts for Heard {
    fn subchannel(&self) {
        self.0.lock().unwrap().push(None);
    }
    fn adapter(&self, isc: u8) {
        self.0.lock().unwrap().push(Some(isc));
    }
}

struct Rig {
    ccw: Arc<Ccw<Puppet>>,
    lanes: Vec<LaneRunner<Strings>>,
    orders: Vec<Orders>,
    heard: Arc<Heard>,
    ram: TestRam,
    rings: Vec<RingDriver>,
}

/// Memory whose first pages are not given to anybody.
fn memory() -> TestRam {
    let ram = TestRam::new(&[(0, END)]);
    ram.alloc(0x4000 - 64, 4096);
    ram
}

impl Rig {
    /// Lanes on threads, so that programs are over when they are.
    fn new() -> Rig {
        Rig::on(memory(), Duration::from_secs(20), true)
    }

    fn on(ram: TestRam, patience: Duration, threads: bool) -> Rig {
        let heard = Arc::new(Heard::default());
        let mut options = Options::new(Arc::new(Ear::default()));
        options.patience = patience;
        options.kicks = if threads { Kicks::Files } else { Kicks::Calls };
        let (device, orders) = Puppet::new();
        let (ccw, mut lanes) = Ccw::new(device, options, heard.clone()).unwrap();
        let orders = orders.recv().unwrap();
        drop(ccw.memory(ram.ram(), WaitFor::NewRequests));
        if threads {
            for lane in lanes.drain(..) {
                drop(std::thread::spawn(move || lane.run()));
            }
        }
        Rig { ccw: Arc::new(ccw), lanes, orders, heard, ram, rings: Vec::new() }
    }

    fn write(&self, at: u64, data: &[u8]) {
        self.ram.write(GuestAddress(at), data);
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(GuestAddress(at), &mut bytes);
        bytes
    }

    fn start(&self, address: u64) -> Ending {
        let program =
            Program { address: address as u32, format1: true, wide_addresses: false, small_blocks: false };
        self.ccw.start(program).expect("an idle subchannel")
    }

    /// Writes a program of format 1: code, flags, count, address.
    fn program(&self, ccws: &[(u8, u8, u16, u64)]) -> Ending {
        for (index, (code, flags, count, address)) in ccws.iter().enumerate() {
            let [a, b] = count.to_be_bytes();
            let [c, d, e, f] = (*address as u32).to_be_bytes();
            self.write(CCWS + 8 * index as u64, &[*code, *flags, a, b, c, d, e, f]);
        }
        self.start(CCWS)
    }

    /// One command with data at [`DATA`].
    fn command(&self, code: u8, flags: u8, data: &[u8]) -> (u8, u8) {
        self.write(DATA, data);
        let ending = self.program(&[(code, flags, data.len() as u16, DATA)]);
        (ending.device, ending.subchannel)
    }

    fn sense(&self) -> u8 {
        assert_eq!(self.command(0x04, 0, &[0xee; 32]), GOOD);
        let [first, rest @ ..]: [u8; 32] = self.read(DATA);
        assert_eq!(rest, [0; 31]);
        first
    }

    fn revision(&self, revision: u8) {
        assert_eq!(self.command(0x83, 0, &[0, revision, 0, 0]), GOOD);
    }

    fn status(&self) -> u8 {
        assert_eq!(self.command(0x72, 0, &[0xee]), GOOD);
        let [status] = self.read(DATA);
        status
    }

    fn write_status(&self, status: u8) -> (u8, u8) {
        self.command(0x31, 0, &[status])
    }

    fn choose(&self, features: Features) {
        for index in 0..4u8 {
            let [a, b, c, d] = ((features.bits() >> (32 * index)) as u32).to_le_bytes();
            assert_eq!(self.command(0x11, 0, &[a, b, c, d, index]), GOOD);
        }
    }

    fn negotiate(&self, features: Features) -> (u8, u8) {
        assert_eq!(self.command(0x33, 0, &[]), GOOD);
        assert_eq!(self.write_status(1), GOOD);
        assert_eq!(self.write_status(3), GOOD);
        self.choose(features);
        self.write_status(11)
    }

    fn set_queue(&self, queue: u16, size: u16, [desc, driver, device]: [u64; 3]) -> (u8, u8) {
        let mut data = desc.to_be_bytes().to_vec();
        data.extend([0xde, 0xad, 0xbe, 0xef]);
        data.extend(queue.to_be_bytes());
        data.extend(size.to_be_bytes());
        data.extend(driver.to_be_bytes());
        data.extend(device.to_be_bytes());
        self.command(0x13, 0, &data)
    }

    fn start_queue(&self, queue: usize) -> (u8, u8) {
        let config = self.rings[queue].queue_config();
        self.set_queue(queue as u16, config.size, [config.desc.0, config.driver.0, config.device.0])
    }

    fn make_rings(&mut self, layout: RingLayout, features: Features) {
        self.rings = (0..2).map(|_| RingDriver::new(&self.ram, layout, 16, features)).collect();
    }

    fn adapter(&self, summary: u64, area: u64, bit: u64, isc: u8) -> (u8, u8) {
        let mut data: Vec<u8> = [summary, area, bit].iter().flat_map(|field| field.to_be_bytes()).collect();
        data.push(isc);
        self.command(0x73, SLI, &data)
    }

    fn classic(&self) {
        self.write(INDICATORS, &[0; 8]);
        assert_eq!(self.command(0x43, 0, &INDICATORS.to_be_bytes()), GOOD);
        self.config_indicators();
    }

    fn config_indicators(&self) {
        self.write(CONFIG_INDICATORS, &[0; 8]);
        assert_eq!(self.command(0x53, 0, &CONFIG_INDICATORS.to_be_bytes()), GOOD);
    }

    /// Queues and everything, with classic indicators.
    fn go(&mut self, layout: RingLayout, extra: Features) {
        let packed = if layout == RingLayout::Packed { Features::RING_PACKED } else { Features::empty() };
        let features = Features::VERSION_1 | packed | extra;
        assert_eq!(self.negotiate(features), GOOD);
        self.make_rings(layout, features);
        assert_eq!((self.start_queue(0), self.start_queue(1)), (GOOD, GOOD));
        self.classic();
        assert_eq!(self.write_status(15), GOOD);
    }

    fn live() -> Rig {
        let mut rig = Rig::new();
        rig.revision(2);
        rig.go(RingLayout::Split, Features::empty());
        rig
    }

    fn ask(&mut self, queue: usize) {
        let buf = self.ram.writable(8);
        self.rings[queue].add(&[buf]);
        assert_eq!(self.ccw.notify(queue as u64), 0);
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Rig) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(Instant::now() < deadline, "{what}");
            for lane in &mut self.lanes {
                lane.turn(Some(Duration::ZERO));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn answer(&mut self, queue: usize) {
        self.until("no answer", |rig| rig.rings[queue].used().is_some());
    }

    /// Waits for the next interrupt.
    fn interrupt(&mut self) -> Option<u8> {
        let mut first = None;
        self.until("no interrupt", |rig| {
            let mut heard = rig.heard.0.lock().unwrap();
            if !heard.is_empty() {
                first = Some(heard.remove(0));
            }
            first.is_some()
        });
        first.unwrap()
    }

    fn silent(&self) -> bool {
        self.heard.0.lock().unwrap().is_empty()
    }

    fn heals(&mut self) {
        self.ccw.set_enabled(true);
        self.revision(2);
        for layout in RingLayout::ALL {
            self.go(layout, Features::empty());
            self.ask(0);
            self.answer(0);
        }
    }
}

#[test]
fn ccw_4_3_1_sense_id() {
    let rig = Rig::new();
    assert_eq!(rig.command(0xe4, 0, &[0xee; 256]), GOOD);
    let [a, b, c, d, rest @ ..]: [u8; 256] = rig.read(DATA);
    assert_eq!(([a, b, c, d], rest), ([0xff, 0x38, 0x32, 42], [0; 252]));
    // As much as is asked for.
    assert_eq!(rig.command(0xe4, SLI, &[0xee; 8]), GOOD);
    assert_eq!(rig.read(DATA), [0xff, 0x38, 0x32, 42, 0, 0, 0, 0]);
    assert_eq!(rig.command(0xe4, 0, &[0xee; 8]), WRONG_LENGTH);
}

#[test]
fn ccw_4_3_1_3_commands_that_are_not_supported_are_rejected() {
    let rig = Rig::live();
    let known =
        [0x11, 0x12, 0x13, 0x21, 0x22, 0x31, 0x32, 0x33, 0x43, 0x53, 0x72, 0x73, 0x83, 0x03, 0x04, 0xe4];
    for code in (0..=255u8).filter(|code| !known.contains(code) && code & 0x0f != 0 && code & 0x0f != 8) {
        assert_eq!(rig.command(code, SLI, &[0; 8]), REJECTED, "{code:#x}");
        assert_eq!(rig.sense(), 0x80);
        assert_eq!(rig.sense(), 0, "told once");
    }
    for code in (0..=255u8).filter(|code| code & 0x0f == 0 || code & 0x0f == 8) {
        assert_eq!(rig.command(code, 0, &[0; 8]), CHECKED, "{code:#x} is no command");
    }
    assert_eq!(rig.status(), 15);
}

#[test]
fn ccw_4_3_1_3_lengths() {
    let rig = Rig::new();
    rig.revision(2);
    for (code, right) in
        [(0x11, 5), (0x12, 5), (0x13, 32), (0x31, 1), (0x32, 4), (0x43, 8), (0x53, 8), (0x72, 1), (0x73, 25)]
    {
        // Everything of this may be said to a new device without harm.
        let good = if matches!(code, 0x13 | 0x31) { REJECTED } else { GOOD };
        let data = |len: usize| if code == 0x31 { vec![0xff; len] } else { vec![0; len] };
        rig.ccw.reset();
        rig.revision(2);
        assert_eq!(rig.command(code, 0, &data(right)), if code == 0x13 { GOOD } else { good }, "{code:#x}");
        assert_eq!(rig.command(code, 0, &data(right - 1)), WRONG_LENGTH, "{code:#x}");
        assert_eq!(rig.command(code, 0, &data(right + 1)), WRONG_LENGTH, "{code:#x}");
        assert_eq!(rig.command(code, SLI, &data(right - 1)), REJECTED, "{code:#x}");
        assert_eq!(
            rig.command(code, SLI, &data(right + 1)),
            if code == 0x13 { GOOD } else { good },
            "{code:#x}"
        );
    }
    // With residual count.
    let ending = rig.program(&[(0x72, SLI, 9, DATA)]);
    assert_eq!((ending.residual, ending.address), (8, CCWS as u32 + 8));
    // The first part of the configuration space, but no more than there is.
    assert_eq!(rig.command(0x22, 0, &[0xee; 4]), GOOD);
    assert_eq!(rig.read(DATA), [1, 2, 3, 4]);
    assert_eq!(rig.command(0x22, 0, &[0xee; 6]), GOOD);
    assert_eq!(rig.command(0x22, 0, &[0xee; 7]), WRONG_LENGTH);
    assert_eq!(rig.command(0x22, SLI, &[0xee; 7]), GOOD);
    assert_eq!(rig.read(DATA), [1, 2, 3, 4, 5, 6, 0xee]);
    assert_eq!(rig.command(0x21, 0, &[9; 7]), WRONG_LENGTH);
    assert_eq!(rig.command(0x21, SLI, &[9; 7]), GOOD);
    assert_eq!(rig.command(0x22, 0, &[0; 6]), GOOD);
    assert_eq!(rig.read(DATA), [1, 2, 3, 4, 9, 9], "of which the driver can change two bytes");
}

#[test]
fn ccw_4_3_2_1_1_revisions() {
    let rig = Rig::new();
    // 4.3.2.1.3: nothing of virtio before.
    for code in [0x11, 0x12, 0x13, 0x21, 0x22, 0x31, 0x32, 0x33, 0x43, 0x53, 0x72, 0x73] {
        assert_eq!(rig.command(code, SLI, &[0; 32]), REJECTED, "{code:#x}");
    }
    for revision in [0, 3, 0x102, 0xffff_u16] {
        let [a, b] = revision.to_be_bytes();
        assert_eq!(rig.command(0x83, 0, &[a, b, 0, 0]), REJECTED, "{revision}");
        assert_eq!(rig.sense(), 0x80);
    }
    assert_eq!(rig.command(0x83, SLI, &[0, 1, 0, 1, 7]), REJECTED, "data that it does not have");
    assert_eq!(rig.command(0x83, 0, &[0, 1, 0]), WRONG_LENGTH);
    rig.revision(1);
    assert_eq!(rig.command(0x72, 0, &[0]), REJECTED, "READ_STATUS is of revision 2");
    assert_eq!(rig.command(0x33, 0, &[]), GOOD);
    for revision in [1, 2] {
        assert_eq!(rig.command(0x83, 0, &[0, revision, 0, 0]), REJECTED, "once only");
    }
    rig.ccw.set_enabled(false);
    rig.ccw.set_enabled(true);
    assert_eq!(rig.command(0x33, 0, &[]), REJECTED);
    rig.revision(2);
    assert_eq!(rig.status(), 0);
}

#[test]
fn ccw_4_3_2_4_features() {
    let rig = Rig::new();
    rig.revision(2);
    let word = |index: u8| {
        assert_eq!(rig.command(0x12, 0, &[0xee, 0xee, 0xee, 0xee, index]), GOOD);
        let [a, b, c, d, same] = rig.read(DATA);
        assert_eq!(same, index);
        u128::from(u32::from_le_bytes([a, b, c, d]))
    };
    let all = (0..4).fold(0, |all, index| all | word(index) << (32 * index));
    let carried = Features::NOTIFICATION_DATA | Features::SUSPEND;
    // 4.3.4: neither RING_RESET nor ADMIN_VQ.
    assert_eq!(Features::from_bits_retain(all), OWN | PICKY | HIGH | Features::RING | carried);
    assert_eq!((word(4), word(255)), (0, 0));
    for refused in
        [Features::empty(), Features::VERSION_1 | PICKY, Features::VERSION_1 | Features::RING_RESET]
    {
        assert_eq!(rig.negotiate(refused), REJECTED, "{refused:?}");
        assert_eq!(rig.status(), 3);
    }
    assert_eq!(rig.negotiate(Features::VERSION_1 | OWN | HIGH), GOOD);
    assert_eq!(rig.ccw.engine().driver_features(), Features::VERSION_1 | OWN | HIGH);
    assert_eq!(rig.command(0x11, 0, &[0, 0, 0, 0, 0]), REJECTED, "they are fixed");
}

#[test]
fn ccw_4_3_2_3_2_a_status_that_is_not_accepted_changes_nothing() {
    let rig = Rig::new();
    rig.revision(2);
    assert_eq!(rig.write_status(1), GOOD);
    for refused in [5, 0x41, 2, 0x11, 0x15] {
        assert_eq!(rig.write_status(refused), REJECTED, "{refused:#x}");
        assert_eq!((rig.sense(), rig.status()), (0x80, 1));
    }
    assert_eq!(rig.write_status(3), GOOD);
    // Without VERSION_1: not even the bit beside it.
    assert_eq!(rig.write_status(0x8b), REJECTED);
    assert_eq!(rig.status(), 3);
    assert_eq!(rig.write_status(0x83), GOOD);
    assert_eq!(rig.status(), 0x83);
    assert_eq!(rig.write_status(0), GOOD, "as VDEV_RESET");
    assert_eq!(rig.status(), 0);
}

#[test]
fn ccw_4_3_2_2_queues() {
    let mut rig = Rig::new();
    rig.revision(2);
    let max = |index: u16| {
        let [a, b] = index.to_be_bytes();
        assert_eq!(rig.command(0x32, 0, &[a, b, 0xee, 0xee]), GOOD);
        let [c, d, high, low] = rig.read(DATA);
        assert_eq!([c, d], [a, b]);
        u16::from_be_bytes([high, low])
    };
    assert_eq!([0, 1, 2, 0xffff].map(max), [64, 16, 0, 0]);
    rig.make_rings(RingLayout::Split, Features::VERSION_1);
    assert_eq!(rig.start_queue(0), REJECTED, "before FEATURES_OK");
    assert_eq!(rig.negotiate(Features::VERSION_1), GOOD);
    let here = [0x10_0000, 0x11_0000, 0x12_0000];
    assert_eq!(rig.set_queue(2, 16, here), REJECTED, "no such queue");
    assert_eq!(rig.set_queue(0, 128, here), REJECTED, "too large");
    // 4.3.2.2.1: res0 is not zero in here.
    assert_eq!(rig.start_queue(1), GOOD);
    assert_eq!(rig.start_queue(1), REJECTED, "it runs");
    // What Linux does to let go of one.
    assert_eq!(rig.set_queue(1, 0, [0; 3]), GOOD);
    assert_eq!(rig.start_queue(1), GOOD);
    assert_eq!(rig.set_queue(0, 16, [END, END, END]), REJECTED);
    assert_eq!(rig.status() & 0x40, 0x40, "addresses that are no memory: the device needs a reset");
    rig.heals();
}

#[test]
fn ccw_4_3_2_6_the_two_kinds_of_indicators_exclude_each_other() {
    let rig = Rig::new();
    rig.revision(1);
    assert_eq!(rig.adapter(SUMMARY, INDICATORS, 5, 8), REJECTED, "no such subclass");
    assert_eq!(rig.adapter(SUMMARY, END, 5, 3), CHECKED, "no memory");
    assert_eq!(rig.adapter(SUMMARY, INDICATORS, u64::MAX, 3), CHECKED);
    assert_eq!(rig.adapter(SUMMARY, INDICATORS, 5, 3), GOOD);
    assert_eq!(rig.command(0x43, 0, &INDICATORS.to_be_bytes()), REJECTED);
    assert_eq!(rig.adapter(SUMMARY, INDICATORS, 7, 3), GOOD);
    assert_eq!(rig.adapter(SUMMARY, 0, 0, 3), GOOD, "Linux lets go like this");
    assert_eq!(rig.command(0x33, 0, &[]), GOOD);
    assert_eq!(rig.command(0x43, 0, &END.to_be_bytes()), CHECKED);
    assert_eq!(rig.command(0x43, 0, &INDICATORS.to_be_bytes()), GOOD);
    assert_eq!(rig.adapter(SUMMARY, INDICATORS, 5, 3), REJECTED);
    assert_eq!(rig.command(0x43, 0, &[0; 8]), GOOD);
}

#[test]
fn ccw_4_3_3_1_1_classic_interrupts() {
    let mut rig = Rig::live();
    for queue in [1, 0] {
        rig.ask(queue);
        assert_eq!(rig.interrupt(), None);
        assert_eq!(u64::from_be_bytes(rig.read(INDICATORS)), 1 << queue);
        rig.write(INDICATORS, &[0; 8]);
        rig.answer(queue);
    }
    rig.orders[0].tell(Order::Configure(9));
    assert_eq!(rig.interrupt(), None);
    assert_eq!(u64::from_be_bytes(rig.read(CONFIG_INDICATORS)), 1);
    assert_eq!(u64::from_be_bytes(rig.read(INDICATORS)), 0);
}

#[test]
fn ccw_4_3_3_1_2_adapter_interrupts() {
    let mut rig = Rig::new();
    rig.revision(2);
    let features = Features::VERSION_1;
    assert_eq!(rig.negotiate(features), GOOD);
    rig.make_rings(RingLayout::Split, features);
    assert_eq!((rig.start_queue(0), rig.start_queue(1)), (GOOD, GOOD));
    rig.write(INDICATORS, &[0; 8]);
    rig.write(SUMMARY, &[0]);
    // Bits 15 and 16, counted from the left.
    assert_eq!(rig.adapter(SUMMARY, INDICATORS, 15, 6), GOOD);
    rig.config_indicators();
    assert_eq!(rig.write_status(15), GOOD);
    rig.ask(0);
    assert_eq!(rig.interrupt(), Some(6));
    assert_eq!((rig.read(SUMMARY), rig.read(INDICATORS)), ([1], [0, 1, 0, 0]));
    // 4.3.3.1.2.1: the summary is still set.
    rig.ask(1);
    rig.answer(1);
    rig.until("no indicator", |rig| rig.read(INDICATORS) == [0, 1, 0x80, 0]);
    assert!(rig.silent());
    rig.write(SUMMARY, &[0]);
    rig.ask(1);
    assert_eq!(rig.interrupt(), Some(6));
    // Changes of the configuration come as ever.
    rig.orders[0].tell(Order::Configure(9));
    assert_eq!(rig.interrupt(), None);
    assert_eq!(u64::from_be_bytes(rig.read(CONFIG_INDICATORS)), 1);
}

#[test]
fn ccw_4_3_3_2_1_notifications() {
    let mut rig = Rig::live();
    assert_eq!(subchannel_id(0xdead_beef_0001_0005), 0x0001_0005);
    rig.ask(1);
    rig.answer(1);
    for wrong in [2, 0xffff, 0x1_0000, 0x1_0000_0000, u64::MAX] {
        assert!(rig.ccw.notify(wrong) < 0, "{wrong:#x}");
    }
    rig.go(RingLayout::Split, Features::NOTIFICATION_DATA);
    let buf = rig.ram.writable(8);
    rig.rings[1].add(&[buf]);
    assert_eq!(rig.ccw.notify(0x8001_0001), 0);
    rig.answer(1);
    assert_eq!(rig.ram.contents(&buf), ANSWER);
    assert_eq!(rig.ccw.notifiers().map(|notifier| notifier.value).collect::<Vec<_>>(), [Some(0), Some(1)]);
}

#[test]
fn ccw_4_3_3_3_1_a_reset_is_over_when_its_command_is() {
    let mut rig = Rig::live();
    for _ in 0..30 {
        rig.orders[0].tell(Order::Be(Mode::Hold));
        rig.ask(0);
        rig.ask(1);
        assert_eq!(rig.command(0x33, 0, &[]), GOOD);
        assert_eq!(rig.status(), 0);
        rig.heard.0.lock().unwrap().clear();
        rig.write(INDICATORS, &[0; 8]);
        rig.orders[0].tell(Order::Configure(7));
        rig.ask(1);
        assert_eq!((rig.read(INDICATORS), rig.silent()), ([0; 8], true));
        rig.go(RingLayout::Split, Features::empty());
    }
}

#[test]
fn policy_7_a_reset_that_hangs_does_not_end_well() {
    // Longer than anything takes but the reset that hangs (5 seconds).
    let mut rig = Rig::on(memory(), Duration::from_secs(4), true);
    rig.revision(2);
    rig.go(RingLayout::Split, Features::empty());
    rig.orders[0].tell(Order::Be(Mode::Hang));
    rig.ask(0);
    rig.until("not taken", |rig| rig.ccw.engine().stats(0).unwrap().out == 1);
    assert_eq!(rig.command(0x33, 0, &[]), REJECTED);
    assert_eq!(rig.sense(), 0x10);
    assert_ne!(rig.status(), 0);
    rig.until("never over", |rig| !rig.ccw.engine().is_resetting());
    assert_eq!(rig.command(0x33, 0, &[]), GOOD);
    assert_eq!(rig.status(), 0);
}

#[test]
fn channel_commands_are_chained() {
    let rig = Rig::new();
    rig.write(DATA, &[0, 2, 0, 0]);
    rig.write(DATA + 8, &[1]);
    rig.write(DATA + 16, &[3]);
    // Revision, no operation, ACKNOWLEDGE, past a CCW that is not there, DRIVER, READ_STATUS.
    let ending = rig.program(&[
        (0x83, CC, 4, DATA),
        (0x03, CC | SLI, 1, DATA),
        (0x31, CC, 1, DATA + 8),
        (0x08, 0, 0, CCWS + 40),
        (0x33, 0, 0, 0),
        (0x31, CC | PCI, 1, DATA + 16),
        (0x72, 0, 1, DATA + 24),
        (0x33, 0, 0, 0),
    ]);
    let expected =
        Ending { device: ENDED, subchannel: PROGRAM_CONTROLLED, residual: 0, address: CCWS as u32 + 56 };
    assert_eq!((ending, rig.read(DATA + 24)), (expected, [3]));
    // What fails ends the chain.
    let ending = rig.program(&[(0x99, CC, 1, DATA), (0x31, 0, 1, DATA + 8)]);
    assert_eq!((ending.device, ending.address), (ENDED | UNIT_CHECK, CCWS as u32 + 8));
    assert_eq!(rig.status(), 3);
}

#[test]
fn channel_data_is_chained_skipped_and_indirect() {
    let rig = Rig::new();
    rig.revision(2);
    // READ_FEAT in three pieces, of which the middle one is skipped.
    rig.write(DATA, &[0xee; 16]);
    rig.write(DATA + 10, &[1]);
    let pieces = [(0x12, CD, 2, DATA), (0, CD | SKIP, 2, DATA + 4), (0, 0, 1, DATA + 10)];
    let ending = rig.program(&pieces);
    assert_eq!((ending.device, ending.subchannel, ending.residual), (ENDED, 0, 0));
    let [a, b, c, d] = ((rig.ccw.engine().offered().bits() >> 32) as u32).to_le_bytes();
    assert_eq!(rig.read(DATA), [a, b, 0xee, 0xee, 0xee, 0xee]);
    let _ = (c, d);
    // SLI means nothing while data is chained.
    let ending = rig.program(&[(0x72, CD | SLI, 2, DATA), (0, SLI, 1, DATA)]);
    assert_eq!((ending.subchannel, ending.residual), (INCORRECT_LENGTH, 1));
    // Indirect addresses of 31 bits, over the end of a block.
    let list = DATA + 0x100;
    rig.write(list, &[0x5f_feu32, 0x6000].map(u32::to_be_bytes).concat());
    rig.write(0x5ffe, &[0xee; 6]);
    rig.write(0x6002, &[0]);
    let ending = rig.program(&[(0x12, IDA, 5, list)]);
    assert_eq!((ending.device, ending.subchannel), GOOD);
    let low = (rig.ccw.engine().offered().bits() as u32).to_le_bytes();
    assert_eq!(rig.read(0x5ffe), low);
    // Of 64 bits.
    let program = Program { address: CCWS as u32, format1: true, wide_addresses: true, small_blocks: false };
    rig.write(list, &[0x6ffeu64, 0x8000].map(u64::to_be_bytes).concat());
    rig.write(0x8002, &[0]);
    assert_eq!(rig.ccw.start(program).unwrap().subchannel, 0);
    assert_eq!([rig.read::<2>(0x6ffe), rig.read(0x8000)].concat(), low);
    // A second one that begins within its block, and a list that is not aligned.
    rig.write(list, &[0x6ffeu64, 0x8001].map(u64::to_be_bytes).concat());
    assert_eq!(rig.ccw.start(program).unwrap().subchannel, PROGRAM_CHECK);
    assert_eq!(rig.program(&[(0x12, IDA, 5, list + 2)]).subchannel, PROGRAM_CHECK);
}

#[test]
fn channel_format_0() {
    let rig = Rig::new();
    rig.revision(2);
    let program =
        Program { address: CCWS as u32, format1: false, wide_addresses: false, small_blocks: false };
    rig.write(CCWS, &[0x03, 0, 0x20, 0, CC, 0, 0, 1]);
    rig.write(CCWS + 8, &[0xf8, 0, 0x10, 0x18, 0xff, 0xff, 0xff, 0xff]);
    rig.write(CCWS + 24, &[0x72, 0, 0x20, 0, 0, 0, 0, 1]);
    rig.write(DATA, &[0xee]);
    let ending = rig.ccw.start(program).unwrap();
    assert_eq!((ending.device, ending.subchannel, rig.read(DATA)), (ENDED, 0, [0]));
    // A count of 0.
    rig.write(CCWS, &[0x03, 0, 0x20, 0, 0, 0, 0, 0]);
    assert_eq!(rig.ccw.start(program).unwrap().subchannel, PROGRAM_CHECK);
}

#[test]
fn channel_programs_that_are_wrong_are_checked() {
    let rig = Rig::new();
    for start in [CCWS + 4, END, 0xffff_fff8, 0x8000_0000] {
        assert_eq!(rig.start(start).subchannel, PROGRAM_CHECK, "{start:#x}");
    }
    let check = |what, ccws: &[(u8, u8, u16, u64)]| {
        let ending = rig.program(ccws);
        assert_eq!((ending.device, ending.subchannel), CHECKED, "{what}");
    };
    check("TIC first", &[(0x08, 0, 0, CCWS + 8), (0x03, 0, 0, 0)]);
    check("TIC to TIC", &[(0x03, CC, 0, 0), (0x08, 0, 0, CCWS + 16), (0x08, 0, 0, CCWS + 24)]);
    check("TIC with more", &[(0x03, CC, 0, 0), (0x08, CC, 0, CCWS + 16), (0x03, 0, 0, 0)]);
    check("TIC in the right half only", &[(0x03, CC, 0, 0), (0x18, 0, 0, CCWS + 16), (0x03, 0, 0, 0)]);
    check("suspension", &[(0x03, 0x02, 0, 0)]);
    check("MIDA", &[(0x03, 0x01, 0, 0)]);
    check("nothing chained", &[(0xe4, CD, 0, DATA), (0, 0, 8, DATA)]);
    check("no memory", &[(0xe4, SLI, 8, END)]);
    check("an address of 32 bits", &[(0xe4, SLI, 8, 0x8000_0000)]);
    // A circle.
    check("for ever", &[(0x03, CC, 0, 0), (0x08, 0, 0, CCWS)]);
    check("for ever, with data", &[(0xe4, CC | SLI, 8, DATA), (0x08, 0, 0, CCWS)]);
    check("data for ever", &[(0xe4, CD, 8, DATA), (0x08, 0, 0, CCWS)]);
    let many = vec![(0x03, CC, 0, 0); LONGEST];
    rig.program(&many);
    rig.revision(2);
    assert_eq!(rig.status(), 0);
}

/// The commands in the order of Linux' drivers/s390/virtio/virtio_ccw.c: online, a driver, offline.
#[test]
fn linux_the_sequence_of_its_driver() {
    let mut rig = Rig::new();
    // cio: who is there.
    assert_eq!(rig.command(0xe4, SLI, &[0xee; 8]), GOOD);
    // ccw_device_set_online, virtio_ccw_set_transport_rev.
    rig.ccw.set_enabled(true);
    assert_eq!(rig.command(0x83, 0, &[0, 2, 0, 0]), GOOD);
    // register_virtio_device: reset, ACKNOWLEDGE, DRIVER, with a look at the status each time.
    assert_eq!(rig.command(0x33, 0, &[]), GOOD);
    assert_eq!(rig.status(), 0);
    assert_eq!((rig.write_status(1), rig.status()), (GOOD, 1));
    assert_eq!((rig.write_status(3), rig.status()), (GOOD, 3));
    // Features: both words are read, both are written.
    for index in 0..2 {
        assert_eq!(rig.command(0x12, 0, &[0, 0, 0, 0, index]), GOOD);
    }
    let features = Features::VERSION_1 | Features::EVENT_IDX | Features::INDIRECT_DESC;
    for (index, word) in (0..2u8).zip([features.low64() as u32, (features.low64() >> 32) as u32]) {
        let [a, b, c, d] = word.to_le_bytes();
        assert_eq!(rig.command(0x11, 0, &[a, b, c, d, index]), GOOD);
    }
    assert_eq!((rig.write_status(11), rig.status()), (GOOD, 11));
    // The device's own driver reads configuration: as much as it needs of it.
    assert_eq!(rig.command(0x22, 0, &[0; 4]), GOOD);
    // find_vqs.
    rig.make_rings(RingLayout::Split, features);
    for queue in 0..2 {
        assert_eq!(rig.command(0x32, 0, &[0, queue as u8, 0, 0]), GOOD);
        assert_eq!(rig.start_queue(queue), GOOD);
    }
    rig.write(SUMMARY, &[0]);
    rig.write(INDICATORS, &[0; 8]);
    assert_eq!(rig.adapter(SUMMARY, INDICATORS, 0, 3), GOOD);
    rig.config_indicators();
    assert_eq!((rig.write_status(15), rig.status()), (GOOD, 15));
    // Requests, with the handler of adapter interrupts.
    for round in 0..100 {
        let queue = round % 2;
        rig.ask(queue);
        assert_eq!(rig.interrupt(), Some(3));
        rig.write(INDICATORS, &[0; 8]);
        rig.write(SUMMARY, &[0]);
        rig.answer(queue);
        rig.rings[queue].used();
    }
    // Offline: reset, indicators and queues are let go of, disabled.
    assert_eq!(rig.command(0x33, 0, &[]), GOOD);
    assert_eq!(rig.status(), 0);
    assert_eq!(rig.adapter(SUMMARY, 0, 0, 3), GOOD);
    for queue in 0..2 {
        assert_eq!(rig.set_queue(queue, 0, [0; 3]), GOOD);
    }
    rig.ccw.set_enabled(false);
    rig.heals();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any programs over any memory: they end, nothing panics, a reset heals.
    #[test]
    fn channel_any_program(
        starts in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>(), 0u32..0x40), 1..16),
        words in prop::collection::vec((
            prop::sample::select(vec![0x03u8, 0x04, 0x08, 0x11, 0x12, 0x13, 0x21, 0x22, 0x31, 0x32, 0x33, 0x43, 0x53,
                                      0x72, 0x73, 0x83, 0xe4, 0x01]),
            prop::sample::select(vec![0u8, CC, CD, SLI, CC | SLI, IDA, SKIP, CD | SLI | IDA, 0xff]),
            prop::sample::select(vec![0u16, 1, 4, 5, 8, 25, 32, 256, 0xffff]),
            prop::sample::select(vec![0u32, 0x1000, 0x1008, 0x2000, 0x2003, 0x3000, 0xff_fff8, 0x7fff_ffff, !0]),
        ), 32..64),
        data in prop::collection::vec(any::<u8>(), 64..256),
    ) {
        let mut rig = Rig::on(memory(), Duration::from_secs(20), true);
        rig.write(DATA, &data);
        for (index, (code, flags, count, address)) in words.iter().enumerate() {
            let [a, b] = count.to_be_bytes();
            let [c, d, e, f] = address.to_be_bytes();
            rig.write(CCWS + 8 * index as u64, &[*code, *flags, a, b, c, d, e, f]);
        }
        rig.revision(2);
        // Afterwards the program may have changed itself.
        for (format1, wide_addresses, small_blocks, at) in starts {
            let address = CCWS as u32 + 8 * at;
            let _ = rig.ccw.start(Program { address, format1, wide_addresses, small_blocks });
        }
        rig.heals();
    }
}

#[test]
fn snapshot_a_device_goes_on_behind_another_subchannel() {
    let mut rig = Rig::live();
    rig.ask(0);
    rig.answer(0);
    rig.ccw.engine().suspend().wait().unwrap();
    rig.ask(1);
    let bytes = rig.ccw.save().unwrap();
    let mut next = Rig::on(rig.ram.clone(), Duration::from_secs(20), true);
    for len in 0..bytes.len() {
        assert!(next.ccw.restore(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
    next.ccw.restore(&bytes).unwrap();
    assert_eq!(next.status(), 15, "the revision, too");
    next.rings = std::mem::take(&mut rig.rings);
    next.answer(1);
    assert_eq!(next.interrupt(), None);
    assert_eq!(next.command(0x73, SLI, &[0; 25]), REJECTED, "it has classic indicators");
    assert!(next.ccw.restore(&bytes).is_err());
    assert_eq!(next.ccw.engine().status(), Status::from_bits_retain(15));
    // Without the memory that the indicators are in.
    let small = TestRam::new(&[(4 << 20, 4 << 20)]);
    let other = Rig::on(small, Duration::from_secs(20), true);
    assert!(other.ccw.restore(&bytes).is_err());
    assert!(other.ccw.engine().status().is_empty());
    next.heals();
}
