//! A guest program under KVM finds a PCI function, places its BARs, and uses it: by ports and in memory, with its pin and with
//! MSI-X, and with kicks that are no exits wherever the BAR is.
#![cfg(all(feature = "kvm", target_arch = "x86_64"))]

use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::interrupt::{Event, IrqLine, Messages, Trigger};
use vm_device::kvm::{IoAddress, IoEvent, IoMatch, KvmInterrupts};
use vm_device::pci::{
    BarKind, BusId, Card, ConfigMemory, ConfigPorts, FunctionBuilder, Identity, Interrupts, MsixLayout,
    PciDevice, Pin, RootComplex, RootOptions,
};

mod kvm_guest;

use kvm_guest::interrupts::{Watcher, handlers, set_up_apic, set_up_pic, spin, wait_for};
use kvm_guest::{Code, Exit, Machine};

/// Configuration space in memory.
const ECAM: u32 = 0xc000_0000;
/// The function: device 3 on bus 0.
const ADDRESS: u32 = 0x8000_1800;
/// Where the program puts BAR 0, first and later, and BAR 1.
const FIRST: u32 = 0xe000_0000;
const LATER: u32 = 0xe010_0000;
const PORTS: u16 = 0x1000;
/// In BAR 0: memory that keeps what is written, a request for an interrupt, the answer to one, and where the guest kicks.
const KEEP: u32 = 0x0;
const INTERRUPT: u32 = 0x10;
const ANSWER: u32 = 0x14;
const KICK: u32 = 0x20;
const TABLE: u32 = 0x800;
const PENDING: u32 = 0xc00;

struct Device {
    interrupts: Interrupts,
    vm: Arc<VmFd>,
    kick: Event,
    kicked: Mutex<Option<IoEvent>>,
    memory: Mutex<[u8; 4]>,
    moves: Mutex<Vec<(u8, Option<u64>)>>,
}

impl PciDevice for Device {
    fn bar_read(&self, _: u8, _: u64, data: &mut [u8]) {
        data.iter_mut().zip(*self.memory.lock().unwrap()).for_each(|(to, byte)| *to = byte);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        match (bar, u32::try_from(offset).unwrap()) {
            (0, INTERRUPT) if self.interrupts.uses_messages() => self.interrupts.message(1).unwrap().signal(),
            (0, INTERRUPT) => self.interrupts.set_intx(true),
            (0, ANSWER) => self.interrupts.set_intx(false),
            (0, KEEP) | (1, 0) => {
                self.memory.lock().unwrap().iter_mut().zip(data).for_each(|(to, byte)| *to = *byte);
            }
            _ => {}
        }
    }

    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        self.moves.lock().unwrap().push((bar, address));
        if bar == 0 {
            let mut kicked = self.kicked.lock().unwrap();
            *kicked = None;
            *kicked = address.map(|address| {
                let address = IoAddress::Mmio(address + u64::from(KICK));
                IoEvent::new(&self.vm, address, IoMatch::U16(1), &self.kick).unwrap()
            });
        }
    }
}

/// Writes a register of the function by ports, as firmware does.
fn config_write(code: &mut Code, register: u32, value: u32) {
    code.out32(0xcf8, ADDRESS | register).out32(0xcfc, value);
}

/// Reads one.
fn config_read(code: &mut Code, register: u32, to: u16) {
    code.out32(0xcf8, ADDRESS | register).in32(0xcfc, to);
}

fn program() -> Code {
    let mut code = Code::default();
    // Who is there, and how large is BAR 0?
    config_read(&mut code, 0x00, 0x510);
    config_write(&mut code, 0x10, u32::MAX);
    config_read(&mut code, 0x10, 0x514);
    // The BARs' places; I/O, memory, bus master. Read again, in memory.
    config_write(&mut code, 0x10, FIRST);
    config_write(&mut code, 0x14, PORTS.into());
    config_write(&mut code, 0x04, 7);
    code.copy(ECAM + 0x1_8000, 0x518);
    code.copy(ECAM + 0x1_8010, 0x51c);
    // Nobody is on device 4.
    code.copy(ECAM + 0x2_0000, 0x520);
    // Both BARs, and a kick.
    code.store(FIRST + KEEP, 0x1122_3344).copy(FIRST + KEEP, 0x524);
    code.out32(PORTS, 0x5566_7788).in32(PORTS, 0x528);
    code.store16(FIRST + KICK, 1);
    // The pin.
    set_up_pic(&mut code, true, "pin");
    code.store(FIRST + INTERRUPT, 1);
    wait_for(&mut code, "quiet", "interrupted", 1);
    // MSI-X: vector 1 is 0x42; enabled in the capability, which is at 0x40.
    set_up_apic(&mut code);
    for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x42), (12, 0)] {
        code.store(FIRST + TABLE + 16 + at, value);
    }
    config_write(&mut code, 0x40, 0x8000_0000);
    code.store(FIRST + INTERRUPT, 1);
    spin(&mut code, 0x504, 1, "message");
    code.copy(FIRST + PENDING, 0x52c);
    // BAR 0 goes somewhere else. A kick there, and one where it was.
    code.store(ECAM + 0x1_8010, LATER);
    code.store16(LATER + KICK, 1);
    code.store16(FIRST + KICK, 1);
    code.copy(LATER + KEEP, 0x530);
    code.store(LATER + INTERRUPT, 1);
    spin(&mut code, 0x504, 2, "again");
    code.done();
    code.label("pin")
        .op(&[0x50]) // push ax
        .op(&[0xff, 0x06, 0x00, 0x05]) // inc word [0x500]
        .store(FIRST + ANSWER, 1)
        .op(&[0xb0, 0x20, 0xe6, 0x20]) // mov al, 0x20; out 0x20, al
        .op(&[0x58, 0xcf]); // pop ax; iret
    handlers(&mut code);
    code
}

#[test]
fn a_guest_program_finds_places_and_uses_a_pci_function() {
    let name = "a_guest_program_finds_places_and_uses_a_pci_function";
    let Some(mut machine) = Machine::new(name) else { return };
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    let lines = [(); 4].map(|()| IrqLine::new(Trigger::Level).unwrap());
    // INTA of device 3 is the root's fourth wire (PCI-to-PCI Bridge 1.2, 9.1).
    let _connection = interrupts.connect_line(&lines[3], 5).unwrap();
    let watcher = Watcher::new(&lines[3]);
    let mut manager = IoManager::new();
    let root = RootComplex::new(
        manager.space(),
        RootOptions {
            buses: 0..=0,
            memory: vec![MmioRange::new(MmioAddress(FIRST.into()), 0x1000_0000).unwrap()],
            ports: vec![PioRange::new(PioAddress(PORTS), 0xe000).unwrap()],
            lines,
            events: Box::new(|_| {}),
        },
    );
    manager.register_pio(ConfigPorts::range(), Arc::new(ConfigPorts::new(root.clone()))).unwrap();
    let memory = ConfigMemory::new(root.clone());
    manager.register_mmio(memory.range(MmioAddress(ECAM.into())).unwrap(), Arc::new(memory)).unwrap();

    let identity = Identity { vendor: 0x1b36, device: 0x0005, class: 0x00_ff00, ..Identity::default() };
    let mut builder = FunctionBuilder::new("test device", identity);
    builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
    builder.bar(1, BarKind::Io, 16).unwrap();
    builder.pin(Pin::A);
    let layout =
        MsixLayout { vectors: 2, table_bar: 0, table_offset: TABLE, pending_bar: 0, pending_offset: PENDING };
    builder.msix(layout).unwrap();
    let messages = Messages::new(Arc::new(interrupts.clone()), 24, 2).unwrap();
    let mut device = None;
    let function = builder
        .build(Some(messages), |interrupts| {
            let new = Arc::new(Device {
                interrupts: interrupts.clone(),
                vm: machine.vm.clone(),
                kick: Event::new().unwrap(),
                kicked: Mutex::default(),
                memory: Mutex::default(),
                moves: Mutex::default(),
            });
            device = Some(new.clone());
            new
        })
        .unwrap();
    root.add(BusId::Root, 3, Card::single(function)).unwrap();
    let device = device.unwrap();

    machine.load16(&program());
    machine.run(&mut manager.vcpu());
    let results: Vec<u32> = (0..9).map(|n| machine.result32(0x10 + n * 4)).collect();
    let (pins, messages) = (machine.result16(0), machine.result32(4));
    let moves = device.moves.lock().unwrap().clone();
    machine.tell(name, &format!("{results:x?}, {pins} by the pin, {messages} messages, moves {moves:x?}"));
    assert_eq!(
        results,
        [
            0x0005_1b36,
            0xffff_f000,
            0x0005_1b36,
            FIRST,
            u32::MAX,
            0x1122_3344,
            0x5566_7788,
            0, // Nothing is pending.
            0x5566_7788,
        ]
    );
    assert_eq!((pins, messages), (1, 2));
    assert_eq!(watcher.finish(), (1, 0));
    assert_eq!(device.interrupts.failures(), 0);

    // The kick at each place came without an exit; where the BAR is no longer, nobody is.
    assert!(device.kick.take());
    let kicks: Vec<&Exit> = machine
        .exits
        .iter()
        .filter(|exit| matches!(exit, Exit::Write(at, _) if *at & 0xfff == u64::from(KICK)))
        .collect();
    assert_eq!(kicks, [&Exit::Write(u64::from(FIRST + KICK), vec![1, 0])]);
    let (first, later) = ((0, Some(FIRST.into())), (0, Some(LATER.into())));
    assert!(moves.contains(&first) && moves.last() == Some(&later), "{moves:x?}");
}
