//! A PCI hierarchy and a guest that does as it likes with it, while the VMM plugs cards in and out. Checked: nothing panics or
//! hangs, read-only identities stay, a BAR that is on the bus is where its register says and answers as itself, what is saved can
//! be restored and is the same then, and after a reset every device works.
use std::sync::{Arc, Mutex};

use device_state::Section;
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::interrupt::{IrqLine, MessageChange, MessageController, Messages, Trigger};
use vm_device::pci::{
    BarKind, BusId, Capability, CapabilityAccess, Card, ConfigMemory, ConfigPorts, Function, FunctionBuilder,
    Identity, Interrupts, MsixLayout, PciDevice, PciEvent, Pin, PortId, PortKind, PortOptions, RootComplex,
    RootOptions,
};

use crate::bytes::Bytes;

const ECAM: u64 = 0x8000_0000;
const MEMORY: u64 = 0xc000_0000;

/// Takes every message.
struct Controller;

impl MessageController for Controller {
    fn apply(&self, _changes: &[MessageChange<'_>]) -> std::io::Result<()> {
        Ok(())
    }
}

/// Answers with its number, and uses its interrupts when it is written.
struct Subject {
    id: u8,
    interrupts: Interrupts,
}

impl PciDevice for Subject {
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(self.id);
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) {
        self.interrupts.set_intx(data.first().is_some_and(|byte| byte & 1 != 0));
        if let Some(message) = self.interrupts.message((offset & 7) as u16) {
            message.signal();
        }
    }

    fn capability_read(&self, access: CapabilityAccess<'_>, data: &mut [u8]) {
        assert!(usize::from(access.offset) < access.bytes.len() && data.len() <= 4);
    }

    fn capability_write(&self, access: CapabilityAccess<'_>, data: &[u8]) {
        assert!(usize::from(access.offset) < access.bytes.len() && data.len() <= 4);
    }
}

fn messages(count: u32) -> Option<Messages> {
    Some(Messages::new(Arc::new(Controller), 0, count).expect("eventfds"))
}

fn function(id: u8) -> Function {
    let identity = Identity { vendor: 0x1b36, device: id.into(), class: 0xff_0000, ..Identity::default() };
    let mut builder = FunctionBuilder::new(format!("device {id}"), identity);
    let memory = BarKind::Memory32 { prefetchable: false };
    builder.bar(0, memory, 0x1000).expect("a BAR");
    builder.bar(1, BarKind::Io, 0x20).expect("a BAR");
    builder.bar(2, BarKind::Memory64 { prefetchable: true }, 0x10_0000).expect("a BAR");
    builder.rom(vec![id; 100]).expect("a ROM");
    builder.pin(Pin::A);
    builder.express().expect("room");
    let window = Capability::new(Capability::VENDOR, [18; 18]).writable(4, 4, u32::MAX).watched();
    builder.capability(&window).expect("room");
    let count = if id.is_multiple_of(2) {
        let layout =
            MsixLayout { vectors: 2, table_bar: 2, table_offset: 0, pending_bar: 2, pending_offset: 0x1000 };
        builder.msix(layout).expect("room");
        2
    } else {
        builder.msi(4).expect("room");
        4
    };
    let made =
        builder.build(messages(count), |interrupts| Arc::new(Subject { id, interrupts: interrupts.clone() }));
    made.expect("as many messages as vectors")
}

struct Machine {
    buses: IoManager,
    root: RootComplex,
    /// Root port, and the port of a switch below another: both with slots.
    slots: [PortId; 2],
    /// Cards that are out.
    shelf: Arc<Mutex<Vec<Card>>>,
}

impl Machine {
    fn new() -> Machine {
        let shelf = Arc::new(Mutex::new(Vec::new()));
        let back = shelf.clone();
        let mut buses = IoManager::new();
        let options = RootOptions {
            buses: 0..=255,
            memory: vec![MmioRange::new(MmioAddress(MEMORY), 0x1000_0000).expect("a range")],
            ports: vec![PioRange::new(PioAddress(0x1000), 0x1000).expect("a range")],
            lines: [0; 4].map(|_| IrqLine::new(Trigger::Level).expect("an eventfd")),
            events: Box::new(move |event| {
                if let PciEvent::Ejected { card, .. } = event {
                    back.lock().expect("no panic").push(card);
                }
            }),
        };
        let root = RootComplex::new(buses.space(), options);
        buses.register_pio(ConfigPorts::range(), Arc::new(ConfigPorts::new(root.clone()))).expect("free");
        let memory = ConfigMemory::new(root.clone());
        let range = memory.range(MmioAddress(ECAM)).expect("a range");
        buses.register_mmio(range, Arc::new(memory)).expect("free");
        let port = |bus, device, kind, slot| {
            let messages = messages(1).expect("one");
            let identity = Identity { vendor: 0x1b36, device: 0xc, ..Identity::default() };
            let options = PortOptions { kind, slot, identity, messages };
            root.add_port(bus, device, 0, options).expect("free")
        };
        let first = port(BusId::Root, 1, PortKind::Root, Some(1));
        let second = port(BusId::Root, 2, PortKind::Root, None);
        let upstream = port(BusId::Behind(second), 0, PortKind::Upstream, None);
        let third = port(BusId::Behind(upstream), 1, PortKind::Downstream, Some(2));
        root.add(BusId::Behind(first), 0, Card::single(function(1))).expect("free");
        let pair = vec![(0, function(2)), (1, function(3))];
        root.add(BusId::Root, 3, Card::multifunction(pair).expect("a card")).expect("free");
        root.add(BusId::Behind(third), 0, Card::single(function(4))).expect("free");
        Machine { buses, root, slots: [first, third], shelf }
    }

    fn config(&self, place: (u8, u8, u8), offset: u16, value: u32) {
        self.root.config_write(place.0, place.1, place.2, offset, &value.to_le_bytes());
    }

    /// What firmware does: numbers and windows for all bridges.
    fn firmware(&self) {
        for (place, numbers) in [
            ((0, 1, 0), 0x0001_0100_u32),
            ((0, 2, 0), 0x0004_0200),
            ((2, 0, 0), 0x0004_0302),
            ((3, 1, 0), 0x0004_0403),
        ] {
            self.config(place, 0x18, numbers);
            self.config(place, 0x20, 0xcff0_c000);
            self.config(place, 0x24, 0x0000_fff0);
            self.config(place, 0x1c, 0x0000_f010);
            self.config(place, 0x04, 7);
        }
    }

    fn at(&self, address: u64) -> Option<u8> {
        let mut data = [0];
        self.buses.mmio_read(MmioAddress(address), &mut data).ok().map(|()| data[0])
    }

    /// Every BAR that is on the bus is where its register says, and answers as itself.
    fn check(&self) {
        let text = self.root.to_string();
        for line in text.lines().filter(|line| line.contains("device ")) {
            let mut words = line.split_whitespace().skip_while(|word| *word != "device").skip(1);
            let id: u8 = words.next().and_then(|id| id.parse().ok()).expect("a device's number");
            while let (Some(bar), Some(place)) = (words.next(), words.next()) {
                let Some(hex) = place.strip_prefix("0x").and_then(|place| place.split('+').next()) else {
                    continue;
                };
                let address = u64::from_str_radix(hex, 16).expect("an address");
                match bar {
                    // Behind the image there are ones; at its beginning, and behind the table, the number.
                    "BAR0" | "ROM" => assert_eq!(self.at(address), Some(id), "{line}"),
                    "BAR2" => assert_eq!(self.at(address + 0x8000), Some(id), "{line}"),
                    _ => {
                        let mut data = [0];
                        let port = u16::try_from(address).expect("a port");
                        self.buses.pio_read(PioAddress(port), &mut data).expect("decoded");
                        assert_eq!(data, [id], "{line}");
                    }
                }
            }
        }
    }
}

/// A bus, device and function that mostly are there.
fn place(bytes: &mut Bytes<'_>) -> (u8, u8, u8) {
    match bytes.below(8) {
        0 => (0, 1, 0),
        1 => (0, 2, 0),
        2 => (0, 3, 0),
        3 => (0, 3, 1),
        4 => (2, 0, 0),
        5 => (3, 1, 0),
        6 => (bytes.u8() & 7, 0, 0),
        _ => (bytes.u8(), bytes.u8() & 31, bytes.u8() & 7),
    }
}

/// A value that a guest could mean: small, an address in the window, or anything.
fn value(bytes: &mut Bytes<'_>) -> u32 {
    match bytes.below(5) {
        0 => bytes.u8().into(),
        1 => u32::MAX,
        2 => MEMORY as u32 | u32::from(bytes.u16()) << 12 | u32::from(bytes.u8() & 1),
        3 => 0x1000 | u32::from(bytes.u8()) << 5,
        _ => bytes.u32(),
    }
}

/// A guest writes and reads configuration space and BARs; the VMM plugs, resets, saves and restores.
pub fn pci(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let machine = Machine::new();
    machine.firmware();
    while !bytes.is_empty() {
        let slot = machine.slots[bytes.below(2)];
        match bytes.below(16) {
            0..=5 => {
                let (bus, device, function) = place(&mut bytes);
                let (offset, value) = (u16::from(bytes.u8()) & !3, value(&mut bytes));
                machine.root.config_write(bus, device, function, offset, &value.to_le_bytes());
            }
            6 => {
                // Any width and place, through memory.
                let (bus, device, function) = place(&mut bytes);
                let function = u64::from(bus) << 20 | u64::from(device) << 15 | u64::from(function) << 12;
                let at = MmioAddress(ECAM + function + u64::from(bytes.u16() & 0xfff));
                let len = 1 << bytes.below(4);
                let data = bytes.u64().to_le_bytes();
                let _ = machine.buses.mmio_write(at, &data[..len]);
                let _ = machine.buses.mmio_read(at, &mut [0; 8][..len]);
            }
            7 => {
                let (port, value) = (0xcf8 + u16::from(bytes.u8() & 7), bytes.u32().to_le_bytes());
                let _ = machine.buses.pio_write(PioAddress(port), &value[..1 << bytes.below(3)]);
                let _ = machine.buses.pio_read(PioAddress(port), &mut [0; 4][..1 << bytes.below(3)]);
            }
            8 => {
                let address = MmioAddress(MEMORY + (u64::from(bytes.u32()) & 0x0fff_ffff));
                let len = usize::from(bytes.u8() & 15);
                let _ = machine.buses.mmio_write(address, &[bytes.u8(); 16][..len]);
                let _ = machine.buses.mmio_read(address, &mut [0; 16][..len]);
            }
            9 => machine.firmware(),
            10 => {
                let card = machine.shelf.lock().expect("no panic").pop();
                if let Some(card) = card {
                    // One that does not fit is gone: there are two slots.
                    let _ = machine.root.plug(slot, card);
                }
            }
            11 => {
                if let Ok(vm_device::pci::Unplug::Done(card)) = machine.root.unplug(slot) {
                    machine.shelf.lock().expect("no panic").push(card);
                }
            }
            12 => {
                if let Ok(card) = machine.root.pull(slot) {
                    machine.shelf.lock().expect("no panic").push(card);
                }
            }
            13 => drop(machine.root.cancel_unplug(slot)),
            14 => {
                let state = machine.root.save().expect("a state");
                if bytes.bool() {
                    machine.root.restore(&state).expect("its own state");
                    assert_eq!(machine.root.save().expect("a state"), state);
                } else {
                    let mut damaged = state.bytes().to_vec();
                    let at = usize::from(bytes.u16()) % damaged.len();
                    damaged[at] ^= bytes.u8();
                    let _ = machine.root.restore(&Section::from_bytes(1, damaged));
                }
            }
            _ => machine.root.reset(),
        }
        machine.check();
    }
    machine.root.reset();
    machine.firmware();
    for (function, id) in [((0, 3, 0), 2), ((0, 3, 1), 3)] {
        machine.config(function, 0x10, MEMORY as u32 + u32::from(id) * 0x1000);
        machine.config(function, 0x04, 2);
        assert_eq!(machine.at(MEMORY + u64::from(id) * 0x1000), Some(id));
    }
}
