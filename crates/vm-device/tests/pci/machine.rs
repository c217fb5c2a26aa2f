//! A machine for these tests, with devices that answer with who they are.
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::interrupt::{
    Event, IrqLine, MessageAction, MessageChange, MessageController, Messages, MsiMessage, Trigger,
};
use vm_device::pci::*;

pub(crate) const ECAM: u64 = 0x8000_0000;
pub(crate) const MEMORY: u64 = 0xc000_0000;
pub(crate) const MEMORY_SIZE: u64 = 0x2000_0000;
pub(crate) const HIGH: u64 = 0x40_0000_0000;
/// Where there is RAM.
pub(crate) const RAM: u64 = 0x1000_0000;

/// Bus, device, function.
pub(crate) type Place = (u8, u8, u8);

/// An interrupt controller in this process.
#[derive(Default)]
pub(crate) struct Controller {
    connected: Mutex<BTreeMap<u32, (MsiMessage, Event)>>,
    next: AtomicU32,
}

impl MessageController for Controller {
    fn apply(&self, changes: &[MessageChange<'_>]) -> io::Result<()> {
        let mut connected = self.connected.lock().unwrap();
        for change in changes {
            match change.action {
                MessageAction::Deliver(message) => {
                    connected.insert(change.number, (message, change.event.try_clone()?));
                }
                MessageAction::Hold | MessageAction::Forget => drop(connected.remove(&change.number)),
            }
        }
        Ok(())
    }
}

impl Controller {
    /// Messages that have arrived.
    pub(crate) fn take(&self) -> Vec<MsiMessage> {
        let connected = self.connected.lock().unwrap();
        connected.values().filter(|(_, event)| event.take()).map(|(message, _)| *message).collect()
    }

    pub(crate) fn messages(self: &Arc<Self>, count: u32) -> Messages {
        Messages::new(self.clone(), self.next.fetch_add(count, Ordering::Relaxed), count).unwrap()
    }
}

pub(crate) struct Machine {
    pub(crate) buses: IoManager,
    pub(crate) root: RootComplex,
    pub(crate) lines: [IrqLine; 4],
    pub(crate) controller: Arc<Controller>,
    pub(crate) events: Arc<Mutex<Vec<PciEvent>>>,
}

impl Machine {
    pub(crate) fn new() -> Machine {
        Machine::with(0..=255)
    }

    pub(crate) fn with(numbers: std::ops::RangeInclusive<u8>) -> Machine {
        let lines = [0; 4].map(|_| IrqLine::new(Trigger::Level).unwrap());
        let events = Arc::new(Mutex::new(Vec::new()));
        let told = events.clone();
        let mut buses = IoManager::new();
        let mmio = |base, size| MmioRange::new(MmioAddress(base), size).unwrap();
        let root = RootComplex::new(
            buses.space(),
            RootOptions {
                buses: numbers,
                memory: vec![mmio(MEMORY, MEMORY_SIZE), mmio(HIGH, 1 << 36)],
                ports: vec![PioRange::new(PioAddress(0x1000), 0xf000).unwrap()],
                lines: lines.clone(),
                events: Box::new(move |event| told.lock().unwrap().push(event)),
            },
        );
        buses.register_pio(ConfigPorts::range(), Arc::new(ConfigPorts::new(root.clone()))).unwrap();
        let memory = ConfigMemory::new(root.clone());
        buses.register_mmio(memory.range(MmioAddress(ECAM)).unwrap(), Arc::new(memory)).unwrap();
        Machine { buses, root, lines, controller: Arc::default(), events }
    }

    fn ecam((bus, device, function): Place, offset: u16) -> MmioAddress {
        let function = u64::from(bus) << 20 | u64::from(device) << 15 | u64::from(function) << 12;
        MmioAddress(ECAM + function + u64::from(offset))
    }

    pub(crate) fn read<const N: usize>(&self, place: Place, offset: u16) -> [u8; N] {
        let mut data = [0xaa; N];
        self.buses.mmio_read(Machine::ecam(place, offset), &mut data).unwrap();
        data
    }

    pub(crate) fn read16(&self, place: Place, offset: u16) -> u16 {
        u16::from_le_bytes(self.read(place, offset))
    }

    pub(crate) fn read32(&self, place: Place, offset: u16) -> u32 {
        u32::from_le_bytes(self.read(place, offset))
    }

    pub(crate) fn write(&self, place: Place, offset: u16, data: &[u8]) {
        self.buses.mmio_write(Machine::ecam(place, offset), data).unwrap();
    }

    pub(crate) fn write16(&self, place: Place, offset: u16, value: u16) {
        self.write(place, offset, &value.to_le_bytes());
    }

    pub(crate) fn write32(&self, place: Place, offset: u16, value: u32) {
        self.write(place, offset, &value.to_le_bytes());
    }

    /// Who answers at this address in memory; nobody if no device has it.
    pub(crate) fn at(&self, address: u64) -> Option<u8> {
        let mut data = [0];
        self.buses.mmio_read(MmioAddress(address), &mut data).ok().map(|()| data[0])
    }

    /// Who answers at this port.
    pub(crate) fn at_port(&self, address: u16) -> Option<u8> {
        let mut data = [0];
        self.buses.pio_read(PioAddress(address), &mut data).ok().map(|()| data[0])
    }

    /// The offset of a capability, found as a guest finds it.
    pub(crate) fn capability(&self, place: Place, id: u8) -> u16 {
        let [mut at] = self.read::<1>(place, 0x34);
        while at != 0 {
            let [found, next] = self.read(place, at.into());
            if found == id {
                return at.into();
            }
            at = next;
        }
        panic!("no capability {id:#x}");
    }

    /// A port with a slot of this number.
    pub(crate) fn port(&self, device: u8, slot: Option<u16>) -> PortId {
        self.port_on(BusId::Root, device, 0, PortKind::Root, slot).unwrap()
    }

    pub(crate) fn port_on(
        &self,
        bus: BusId,
        device: u8,
        function: u8,
        kind: PortKind,
        slot: Option<u16>,
    ) -> Result<PortId, PciError> {
        let identity = Identity { vendor: 0x1b36, device: 0x000c, ..Identity::default() };
        let options = PortOptions { kind, slot, identity, messages: self.controller.messages(1) };
        self.root.add_port(bus, device, function, options)
    }

    /// A device with 4 KiB of memory in BAR 0.
    pub(crate) fn add(&self, bus: BusId, device: u8, id: u8) -> Arc<Answer> {
        let (card, answer) = card(id);
        self.root.add(bus, device, card).unwrap();
        answer
    }

    /// Numbers a bridge's buses, and opens its windows.
    pub(crate) fn bridge(&self, place: Place, (secondary, subordinate): (u8, u8), memory: (u32, u32)) {
        self.write(place, 0x18, &[place.0, secondary, subordinate]);
        // Only three bytes at once would do, which no processor does: one by one.
        for (at, number) in (0x18..).zip([place.0, secondary, subordinate]) {
            self.write(place, at, &[number]);
        }
        self.write16(place, 0x20, (memory.0 >> 16) as u16);
        self.write16(place, 0x22, (memory.1 >> 16) as u16);
        // The prefetchable window closed.
        self.write32(place, 0x24, 0x0000_fff0);
        self.write16(place, 0x04, 0x0007);
    }

    /// Puts BAR 0 of a function somewhere and enables it.
    pub(crate) fn enable(&self, place: Place, address: u32) {
        self.write32(place, 0x10, address);
        self.write16(place, 0x04, 0x0006);
    }

    pub(crate) fn took(&self) -> Vec<PciEvent> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// Whether a line is asserted.
    pub(crate) fn asserted(&self) -> [bool; 4] {
        self.lines.each_ref().map(IrqLine::is_asserted)
    }
}

/// A device that answers with its number, and notes what it is told.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) id: u8,
    pub(crate) log: Mutex<Vec<String>>,
    pub(crate) interrupts: Mutex<Option<Interrupts>>,
    pub(crate) accesses: AtomicU64,
    /// Called while the guest writes a BAR.
    pub(crate) on_write: Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl Answer {
    pub(crate) fn took(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    pub(crate) fn interrupts(&self) -> Interrupts {
        self.interrupts.lock().unwrap().clone().unwrap()
    }

    fn note(&self, what: String) {
        self.log.lock().unwrap().push(what);
    }
}

impl PciDevice for Answer {
    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        data.fill(self.id);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.note(format!("bar {bar} {offset:#x} {data:02x?}"));
        if let Some(call) = &*self.on_write.lock().unwrap() {
            call();
        }
    }

    fn capability_read(&self, access: CapabilityAccess<'_>, data: &mut [u8]) {
        self.note(format!("read {:#x}+{} {:02x?}", access.at, access.offset, access.bytes));
        data.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
    }

    fn capability_write(&self, access: CapabilityAccess<'_>, data: &[u8]) {
        self.note(format!("write {:#x}+{} {:02x?} {data:02x?}", access.at, access.offset, access.bytes));
    }

    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        self.note(match address {
            Some(address) => format!("bar {bar} at {address:#x}"),
            None => format!("bar {bar} nowhere"),
        });
    }

    fn reset(&self) {
        self.note("reset".into());
    }
}

pub(crate) fn identity(id: u8) -> Identity {
    Identity { vendor: 0x1b36, device: id.into(), revision: 1, class: 0xff_0000, ..Identity::default() }
}

/// Builds with this device.
pub(crate) fn build(builder: FunctionBuilder, messages: Option<Messages>, id: u8) -> (Function, Arc<Answer>) {
    let answer = Arc::new(Answer { id, ..Answer::default() });
    let device = answer.clone();
    let function = builder.build(messages, |interrupts| {
        *device.interrupts.lock().unwrap() = Some(interrupts.clone());
        device
    });
    (function.unwrap(), answer)
}

/// A PCI Express function with 4 KiB of memory in BAR 0, and a pin.
pub(crate) fn function(id: u8) -> (Function, Arc<Answer>) {
    let mut builder = FunctionBuilder::new(format!("device {id}"), identity(id));
    builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
    builder.pin(Pin::A);
    builder.express().unwrap();
    build(builder, None, id)
}

pub(crate) fn card(id: u8) -> (Card, Arc<Answer>) {
    let (function, answer) = function(id);
    (Card::single(function), answer)
}

/// Whether a device is gone for good once the test gives its own reference back.
pub(crate) fn is_gone(answer: Arc<Answer>) -> bool {
    // It holds its interrupts, which do not hold it.
    let weak: Weak<Answer> = Arc::downgrade(&answer);
    drop(answer);
    weak.upgrade().is_none()
}
