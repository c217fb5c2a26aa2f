//! Transports on the buses of `vm-device`: virtio-mmio behind an address and an interrupt line, virtio-pci as a function that
//! its guest finds, moves and interrupts itself with. Names: `pci_*`, `mmio_*` with the section of virtio 1.4.
mod puppet;
mod traffic;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use puppet::{ANSWER, Ear, Puppet};
use traffic::{Movable, Place, moves_under_traffic};
use virtio_testkit::transport::{PciDriver, RegisterAccess, TestFunction};
use virtio_testkit::{RingDriver, RingLayout, TestRam};
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::interrupt::{
    IrqLine, MessageAction, MessageChange, MessageController, Messages, MsiMessage, Trigger,
};
use vm_device::pci::{BusId, Card, ConfigPorts, RootComplex, RootOptions};
use vm_virtio::transport::Options;
use vm_virtio::transport::mmio::{MAGIC, Mmio};
use vm_virtio::transport::pci::function::{FunctionOptions, function};
use vm_virtio::transport::pci::{FunctionInterrupts, Pci, PciCapability};
use vm_virtio::{Features, WaitFor};

fn options() -> Options {
    let mut options = Options::new(Arc::new(Ear::default()));
    options.patience = Duration::from_secs(20);
    options
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn memory() -> TestRam {
    TestRam::new(&[(1 << 20, 8 << 20)])
}

struct Bus(IoManager);

impl Bus {
    fn load<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0xee; N];
        self.0.mmio_read(MmioAddress(at), &mut data).expect("somebody answers");
        data
    }

    fn store(&self, at: u64, data: &[u8]) {
        self.0.mmio_write(MmioAddress(at), data).expect("somebody answers");
    }

    /// Configuration space of device 3.
    fn config_write(&self, at: u32, data: &[u8]) {
        let address = 0x8000_1800 | at & !3;
        self.0.pio_write(PioAddress(0xcf8), &address.to_le_bytes()).unwrap();
        self.0.pio_write(PioAddress(0xcfc + (at & 3) as u16), data).unwrap();
    }

    fn config<const N: usize>(&self, at: u32) -> [u8; N] {
        let mut data = [0xee; N];
        let address = 0x8000_1800 | at & !3;
        self.0.pio_write(PioAddress(0xcf8), &address.to_le_bytes()).unwrap();
        self.0.pio_read(PioAddress(0xcfc + (at & 3) as u16), &mut data).unwrap();
        data
    }

    fn word(&self, at: u32) -> u32 {
        u32::from_le_bytes(self.config(at))
    }
}

#[test]
fn mmio_4_2_3_4_behind_an_address_and_a_level_line() {
    let base = 0xd000_0000;
    let line = IrqLine::new(Trigger::Level).unwrap();
    let (device, _mail) = Puppet::new();
    let (mmio, lanes) = Mmio::new(device, options(), 1, Arc::new(line.source())).unwrap();
    for lane in lanes {
        drop(std::thread::spawn(move || lane.run()));
    }
    let ram = memory();
    mmio.engine().memory(ram.ram(), WaitFor::NewRequests).wait();
    let mut buses = IoManager::new();
    let range = MmioRange::new(MmioAddress(base), mmio.size()).unwrap();
    let mmio = Arc::new(mmio);
    buses.register_mmio(range, mmio.clone()).unwrap();
    let bus = Bus(buses);
    let store = |at: u64, value: u32| bus.store(base + at, &value.to_le_bytes());
    let load = |at: u64| u32::from_le_bytes(bus.load(base + at));
    assert_eq!(load(0), MAGIC);
    [0, 1, 3].into_iter().for_each(|status| store(0x70, status));
    store(0x24, 1);
    store(0x20, 1);
    store(0x70, 11);
    let mut ring = RingDriver::new(&ram, RingLayout::Split, 16, Features::VERSION_1);
    let config = ring.queue_config();
    let registers =
        [(0x30, 0), (0x38, 16), (0x80, config.desc.0), (0x90, config.driver.0), (0xa0, config.device.0)];
    registers.into_iter().for_each(|(at, value)| store(at, value as u32));
    store(0x44, 1);
    store(0x70, 15);
    for _ in 0..10 {
        let buf = ram.writable(8);
        ring.add(&[buf]);
        store(0x50, 0);
        until("no interrupt", || line.trigger().take());
        assert_eq!(load(0x60), 1);
        // The guest ends the interrupt before it acknowledges: it comes again.
        line.resample().unwrap().signal();
        assert!(line.resampled() && line.trigger().take());
        store(0x64, 1);
        line.resample().unwrap().signal();
        assert!(!line.resampled() && !line.is_asserted());
        assert!(ring.used().is_some());
        assert_eq!(ram.contents(&buf), ANSWER);
    }
    assert_eq!(mmio.ignored().count(), 0);
}

/// Keeps what vectors deliver.
#[derive(Default)]
struct Controller(Mutex<Vec<(u32, MsiMessage)>>);

impl MessageController for Controller {
    fn apply(&self, changes: &[MessageChange<'_>]) -> io::Result<()> {
        let mut routes = self.0.lock().unwrap();
        for change in changes {
            routes.retain(|(number, _)| *number != change.number);
            if let MessageAction::Deliver(message) = change.action {
                routes.push((change.number, message));
            }
        }
        Ok(())
    }
}

/// Where BARs went.
type Moves = Arc<Mutex<Vec<(u8, Option<u64>)>>>;

struct Guest {
    bus: Bus,
    root: RootComplex,
    line: IrqLine,
    controller: Arc<Controller>,
    events: Vec<vm_device::interrupt::Message>,
    pci: Arc<Pci<Puppet>>,
    ram: TestRam,
    moves: Moves,
}

const VECTORS: u16 = 4;

impl Guest {
    fn new() -> Guest {
        Guest::on(memory(), Puppet::new().0)
    }

    fn on(ram: TestRam, device: Puppet) -> Guest {
        let line = || IrqLine::new(Trigger::Level).unwrap();
        let lines = [line(), line(), line(), line()];
        let mut buses = IoManager::new();
        let root = RootComplex::new(
            buses.space(),
            RootOptions {
                buses: 0..=255,
                memory: vec![
                    MmioRange::new(MmioAddress(0xe000_0000), 0x1000_0000).unwrap(),
                    MmioRange::new(MmioAddress(0x10_0000_0000), 0x20_0000_0000).unwrap(),
                ],
                ports: vec![PioRange::new(PioAddress(0x1000), 0xe000).unwrap()],
                lines: lines.clone(),
                events: Box::new(|_| ()),
            },
        );
        buses.register_pio(ConfigPorts::range(), Arc::new(ConfigPorts::new(root.clone()))).unwrap();
        let controller = Arc::new(Controller::default());
        let messages = Messages::new(controller.clone(), 0, VECTORS.into()).unwrap();
        let events = messages.vectors();
        let (pci, lanes) = Pci::new(device, options(), VECTORS).unwrap();
        for lane in lanes {
            drop(std::thread::spawn(move || lane.run()));
        }
        pci.engine().memory(ram.ram(), WaitFor::NewRequests).wait();
        let pci = Arc::new(pci);
        let moves = Moves::default();
        let told = moves.clone();
        let options = FunctionOptions {
            name: "puppet".to_owned(),
            class: 0x00_ff00,
            messages: Some(messages),
            capabilities: vec![PciCapability::vendor(0x1b36, b"hello").unwrap()],
            moved: Box::new(move |bar, address| told.lock().unwrap().push((bar, address))),
        };
        root.add(BusId::Root, 0, Card::host_bridge(0x8086, 0x29c0)).unwrap();
        root.add(BusId::Root, 3, Card::single(function(pci.clone(), options).unwrap())).unwrap();
        // INTA of device 3.
        let line = lines[3].clone();
        Guest { bus: Bus(buses), root, line, controller, events, pci, ram, moves }
    }

    /// Offsets of the capabilities, by identifier.
    fn capabilities(&self) -> Vec<(u32, u8)> {
        let mut found = Vec::new();
        let [mut at] = self.bus.config::<1>(0x34);
        while at != 0 {
            let [id, next] = self.bus.config(at.into());
            found.push((at.into(), id));
            at = next;
        }
        found
    }

    /// Where a structure begins, with its BAR.
    fn structure(&self, kind: u8) -> Option<(u8, u64)> {
        let (at, _) = self
            .capabilities()
            .into_iter()
            .find(|(at, id)| *id == 9 && self.bus.config::<4>(*at)[3] == kind)?;
        Some((self.bus.config::<1>(at + 4)[0], self.bus.word(at + 8).into()))
    }

    fn place(&self, bar: u32, address: u64) {
        self.bus.config_write(0x10 + 4 * bar, &(address as u32).to_le_bytes());
        if bar != 0 {
            self.bus.config_write(0x14 + 4 * bar, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// The guest writes its MSI-X table, which is at `table`, and enables it.
    fn enable_messages(&self, table: u64) {
        let (msix, _) = self.capabilities().into_iter().find(|(_, id)| *id == 0x11).unwrap();
        for vector in 0..u64::from(VECTORS) {
            let entry = table + 16 * vector;
            self.bus.store(entry, &0xfee0_0000_u32.to_le_bytes());
            self.bus.store(entry + 4, &[0; 4]);
            self.bus.store(entry + 8, &(0x40 + vector as u32).to_le_bytes());
            self.bus.store(entry + 12, &[0; 4]);
        }
        self.bus.config_write(msix + 2, &0x8000_u16.to_le_bytes());
    }

    fn go(&self, base: u64) -> RingDriver {
        let (bus, store) = (&self.bus, |at: u64, data: &[u8]| self.bus.store(base + at, data));
        store(20, &[0]);
        while bus.load(base + 20) != [0] {}
        store(20, &[1]);
        store(20, &[3]);
        store(8, &[1, 0, 0, 0]);
        store(12, &[1, 0, 0, 0]);
        store(20, &[11]);
        assert_eq!(bus.load(base + 20), [11]);
        let ring = RingDriver::new(&self.ram, RingLayout::Split, 16, Features::VERSION_1);
        let config = ring.queue_config();
        store(22, &[0, 0]);
        store(24, &16u16.to_le_bytes());
        store(26, &2u16.to_le_bytes());
        for (at, area) in [(32, config.desc.0), (40, config.driver.0), (48, config.device.0)] {
            store(at, &(area as u32).to_le_bytes());
            store(at + 4, &((area >> 32) as u32).to_le_bytes());
        }
        store(28, &[1, 0]);
        store(20, &[15]);
        ring
    }
}

#[test]
fn pci_4_1_a_guest_finds_moves_and_uses_it() {
    let guest = Guest::new();
    let bus = &guest.bus;
    // 4.1.2.1: identity.
    assert_eq!((bus.word(0), bus.word(8), bus.word(0x2c)), (0x106a_1af4, 0x00ff_0001, 0x106a_1af4));
    let kinds: Vec<u8> = guest
        .capabilities()
        .into_iter()
        .filter(|(_, id)| *id == 9)
        .map(|(at, _)| bus.config::<4>(at)[3])
        .collect();
    assert_eq!(kinds, [1, 2, 3, 4, 5, 8, 9]);
    assert_eq!(
        (guest.structure(1), guest.structure(3), guest.structure(2)),
        (Some((4, 0)), Some((4, 0x40)), Some((4, 0x1000)))
    );
    // 4.1.4.7.1: the region of the puppet is within its BAR, whose size a guest finds by writing ones.
    guest.place(2, u64::MAX);
    assert_eq!((bus.word(0x18), bus.word(0x1c)), (0x0000_000c, 0xffff_fff0));
    guest.place(2, 0x20_0000_0000);

    // The pin.
    let (first, second) = (0xe800_0000, 0x18_0000_0000);
    guest.place(0, 0xe000_0000);
    guest.place(4, first);
    bus.config_write(4, &[6, 0]);
    let mut ring = guest.go(first);
    let mut ask = |base: u64| {
        let buf = guest.ram.writable(8);
        ring.add(&[buf]);
        bus.store(base + 0x1000, &[0, 0]);
        until("no answer", || ring.used().is_some());
        assert_eq!(guest.ram.contents(&buf), ANSWER);
    };
    ask(first);
    until("no interrupt", || guest.line.is_asserted());
    // The interrupt bit of the status register, 4.1.4.5.1.
    assert_eq!(bus.config::<1>(6)[0] & 8, 8);
    assert_eq!(bus.load(first + 0x40), [1]);
    assert!(!guest.line.is_asserted());
    assert_eq!(bus.config::<1>(6)[0] & 8, 0);

    // The BAR moves while the device runs.
    guest.place(4, second);
    assert!(bus.0.mmio_read(MmioAddress(first), &mut [0]).is_err(), "nobody is there any more");
    assert_eq!(bus.load(second + 20), [15]);
    ask(second);
    assert!(guest.moves.lock().unwrap().contains(&(4, Some(second))));
    // It comes behind the answer.
    until("no interrupt", || guest.line.is_asserted());
    assert_eq!(bus.load(second + 0x40), [1]);

    // MSI-X: queue 0 has vector 2.
    guest.enable_messages(0xe000_0000);
    let message = MsiMessage { address: 0xfee0_0000, data: 0x42 };
    assert!(guest.controller.0.lock().unwrap().contains(&(2, message)));
    let took = |vector: usize| guest.events[vector].event().unwrap().take();
    ask(second);
    until("no message", || took(2));
    assert!(!guest.line.is_asserted() && !took(0) && !took(1) && !took(3));
    assert_eq!(bus.load(second + 0x40), [0]);

    // 4.1.4.9: the window in configuration space.
    let (window, _) =
        guest.capabilities().into_iter().find(|(at, id)| *id == 9 && bus.config::<4>(*at)[3] == 5).unwrap();
    bus.config_write(window + 4, &[4]);
    bus.config_write(window + 8, &20_u32.to_le_bytes());
    bus.config_write(window + 12, &1_u32.to_le_bytes());
    assert_eq!(bus.config::<1>(window + 16), [15]);
    bus.config_write(window + 8, &22_u32.to_le_bytes());
    bus.config_write(window + 12, &2_u32.to_le_bytes());
    bus.config_write(window + 16, &1_u32.to_le_bytes());
    assert_eq!(bus.load(second + 22), [1, 0]);
    assert_eq!(guest.pci.ignored().count(), 0);

    // And once more from the beginning.
    ring = guest.go(second);
    let buf = guest.ram.writable(8);
    ring.add(&[buf]);
    bus.store(second + 0x1000, &[0, 0]);
    until("no answer", || ring.used().is_some());
    until("no message", || took(2));
}

/// Where the guest has put the structures.
const BAR: u64 = 0xe800_0000;

/// A guest, and what its interrupts arrive at, which stays the same wherever the guest is.
struct Moving {
    guest: Guest,
    arrived: Arc<TestFunction>,
}

impl RegisterAccess for Moving {
    fn load(&self, offset: u64, data: &mut [u8]) {
        self.guest.bus.0.mmio_read(MmioAddress(BAR + offset), data).expect("the BAR is there");
    }

    fn store(&self, offset: u64, data: &[u8]) {
        self.guest.bus.store(BAR + offset, data);
    }
}

impl Movable for Moving {
    type State = (device_state::Section, Vec<u8>);

    fn suspend(&self) {
        self.guest.pci.engine().suspend().wait().unwrap();
    }

    fn save(&self) -> Self::State {
        (self.guest.root.save().unwrap(), self.guest.pci.save().unwrap())
    }

    fn restore(&self, (root, device): &Self::State) {
        self.guest.root.restore(root).unwrap();
        for len in (0..device.len()).step_by(7) {
            assert!(self.guest.pci.restore(&device[..len]).is_err(), "{len} bytes");
        }
        self.guest.pci.restore(device).unwrap();
    }

    fn deliver(&self) {
        for (vector, message) in (0..).zip(&self.guest.events) {
            if message.event().unwrap().take() {
                self.arrived.message(vector);
            }
        }
        self.arrived.set_intx(self.guest.line.is_asserted());
    }
}

/// The transport and its function's configuration space, BARs and MSI-X table, as one.
#[test]
fn snapshot_pci_function_under_traffic() {
    for (layout, messages) in
        [(RingLayout::Split, true), (RingLayout::Packed, true), (RingLayout::Split, false)]
    {
        let ram = memory();
        let arrived = Arc::new(TestFunction::default());
        let machine =
            || Moving { guest: Guest::on(ram.clone(), Puppet::counting()), arrived: arrived.clone() };
        let first = machine();
        first.guest.place(0, 0xe000_0000);
        first.guest.place(4, BAR);
        first.guest.bus.config_write(4, &[6, 0]);
        if messages {
            first.guest.enable_messages(0xe000_0000);
        }
        let capabilities: Vec<Vec<u8>> = first
            .guest
            .capabilities()
            .into_iter()
            .filter(|(_, id)| *id == 9)
            .map(|(at, _)| {
                (0..u32::from(first.guest.bus.config::<4>(at)[2]))
                    .map(|byte| first.guest.bus.config::<1>(at + byte)[0])
                    .collect()
            })
            .collect();
        let place = Place::new(first);
        let mut driver = PciDriver::new(place.clone(), arrived.clone(), &capabilities, messages);
        moves_under_traffic(&ram, layout, &place, &mut driver, |_| machine());
        let last = place.now();
        assert_eq!(last.guest.pci.ignored().count(), 0);
        let message = MsiMessage { address: 0xfee0_0000, data: 0x42 };
        assert_eq!(last.guest.controller.0.lock().unwrap().contains(&(2, message)), messages);
        // It is told where its BARs are, too.
        assert!(last.guest.moves.lock().unwrap().contains(&(4, Some(BAR))));
    }
}
