//! A guest program under KVM brings up our entropy device behind virtio-mmio registers and reads bytes: registers are real
//! exits, its notifications are none (ioeventfd), its interrupts come through irqfd with resample.
#![cfg(target_arch = "x86_64")]

use std::sync::Arc;
use std::time::Duration;

use virtio_rng::{Entropy, Rng};
use vm_device::bus::{MmioAddress, MmioRange};
use vm_device::device_manager::{IoManager, MmioManager};
use vm_device::interrupt::{Event, IrqLine, Trigger};
use vm_device::kvm::{IoAddress, IoEvent, IoMatch, KvmInterrupts};
use vm_memory::{Bytes, GuestAddress};
use vm_virtio::transport::Options;
use vm_virtio::transport::mmio::{MAGIC, Mmio};
use vm_virtio::{GuestRam, HostEvent, HostEvents, WaitFor};

#[path = "../../crates/vm-device/tests/kvm_guest/mod.rs"]
mod kvm_guest;

use kvm_guest::interrupts::{Watcher, set_up_pic, wait_for};
use kvm_guest::{Code, Exit, Machine};

struct Deaf;
impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

/// The registers, where no RAM is.
const BASE: u32 = 0xd000_0000;
const NOTIFY: u64 = BASE as u64 + 0x50;
/// The queue's areas, and two buffers.
const DESC: u32 = 0x4000;
const DRIVER: u32 = 0x4400;
const DEVICE: u32 = 0x4800;
const BUFFERS: [u32; 2] = [0x5000, 0x5100];
const LEN: u32 = 64;

/// Initialisation as in 3.1.1 and 4.2.3.2; then two requests, each waited for by its interrupt.
fn program() -> Code {
    let mut code = Code::default();
    set_up_pic(&mut code, true, "handler");
    let set = |code: &mut Code, at: u32, value: u32| {
        code.store(BASE + at, value);
    };
    for (at, to) in [(0x00, 0x510), (0x04, 0x514), (0x08, 0x518)] {
        code.copy(BASE + at, to);
    }
    for (at, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0)] {
        set(&mut code, at, value);
    }
    code.copy(BASE + 0x34, 0x51c);
    for (at, value) in [(0x38, 8), (0x80, DESC), (0x90, DRIVER), (0xa0, DEVICE), (0x44, 1), (0x70, 15)] {
        set(&mut code, at, value);
    }
    code.copy(BASE + 0x70, 0x520);
    // Two descriptors that the device writes.
    for (index, buffer) in (0..).zip(BUFFERS) {
        let at = DESC + 16 * index;
        code.store(at, buffer).store(at + 4, 0).store(at + 8, LEN).store(at + 12, 2);
    }
    // One request at a time: entry, index, notification.
    code.store16(DRIVER + 4, 0).store16(DRIVER + 2, 1);
    set(&mut code, 0x50, 0);
    wait_for(&mut code, "first", "one", 1);
    code.store16(DRIVER + 6, 1).store16(DRIVER + 2, 2);
    set(&mut code, 0x50, 0);
    wait_for(&mut code, "second", "two", 2);
    // And away.
    set(&mut code, 0x70, 0);
    code.copy(BASE + 0x70, 0x524)
        .copy(BASE + 0x60, 0x528)
        .done()
        // 4.2.3.4.1: looks, acknowledges what it saw, and counts. If it sees nothing, the end of an interrupt was heard so late that
        // the line was raised once more for the next one, which is over by now.
        .label("handler")
        .op(&[0x66, 0x50]) // push eax
        .op(&[0x67, 0x66, 0xa1]) // mov eax, [InterruptStatus]
        .op(&(BASE + 0x60).to_le_bytes())
        .op(&[0x66, 0x85, 0xc0]) // test eax, eax
        .jump(0x74, "nothing") // je nothing
        .op(&[0x67, 0x66, 0xa3]) // mov [0x52c], eax
        .op(&0x52c_u32.to_le_bytes())
        .op(&[0x67, 0x66, 0xa3]) // mov [InterruptACK], eax
        .op(&(BASE + 0x64).to_le_bytes())
        .op(&[0xff, 0x06, 0x00, 0x05]) // inc word [0x500]
        .label("nothing")
        .op(&[0xb0, 0x20, 0xe6, 0x20]) // mov al, 0x20; out 0x20, al: end of interrupt
        .op(&[0x66, 0x58, 0xcf]); // pop eax; iret
    code
}

#[test]
fn a_guest_program_reads_entropy_from_virtio_mmio() {
    let name = "a_guest_program_reads_entropy_from_virtio_mmio";
    let Some(mut machine) = Machine::new(name) else { return };
    let line = IrqLine::new(Trigger::Level).unwrap();
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    let _connection = interrupts.connect_line(&line, 5).unwrap();
    let mut options = Options::new(Arc::new(Deaf));
    options.patience = Duration::from_secs(20);
    let device = Rng::new(&Entropy::insecure_seeded(9), 0, None).unwrap();
    let (mmio, lanes) = Mmio::new(device, options, 0, Arc::new(line.source())).unwrap();
    for lane in lanes {
        drop(std::thread::spawn(move || lane.run()));
    }
    mmio.engine().memory(GuestRam::new(&machine.ram), WaitFor::NewRequests).wait();
    let events: Vec<IoEvent> = mmio
        .notifiers()
        .map(|notifier| {
            let event = Event::from_fd(notifier.fd.try_clone_to_owned().unwrap()).unwrap();
            let (at, value) = (u64::from(BASE) + notifier.offset, notifier.value.unwrap());
            assert_eq!(notifier.width, 4);
            IoEvent::new(&machine.vm, IoAddress::Mmio(at), IoMatch::U32(value), &event).unwrap()
        })
        .collect();
    let mmio = Arc::new(mmio);
    let mut manager = IoManager::new();
    let range = MmioRange::new(MmioAddress(BASE.into()), mmio.size()).unwrap();
    manager.register_mmio(range, mmio.clone()).unwrap();

    machine.load16(&program());
    let watcher = Watcher::new(&line);
    machine.run(&mut manager.vcpu());
    let (ended, _) = watcher.finish();
    let words: Vec<u32> = (0..7).map(|n| machine.result32(0x10 + 4 * n)).collect();
    let kicks = machine.exits.iter().filter(|exit| matches!(exit, Exit::Write(NOTIFY, _))).count();
    machine.tell(
        name,
        &format!("{} interrupts, {ended} ends told, {kicks} notifications by exit", machine.result16(0)),
    );
    // Magic, version, type, largest size, status; after the reset status and events; the last event was a used buffer.
    assert_eq!(words, [MAGIC, 2, 4, 1024, 15, 0, 0]);
    assert_eq!((machine.result32(0x2c), machine.result16(0)), (1, 2));
    // As many as there were: those that nobody has looked at meanwhile are one.
    assert!(ended > 0, "ends of interrupts are told");
    assert_eq!(kicks, 0, "the kernel takes notifications");
    let mut used = [0; 20];
    machine.ram.read_slice(&mut used, GuestAddress(DEVICE.into())).unwrap();
    assert_eq!(used, [0, 0, 2, 0, 0, 0, 0, 0, 64, 0, 0, 0, 1, 0, 0, 0, 64, 0, 0, 0]);
    let buffers = BUFFERS.map(|at| {
        let mut bytes = [0; LEN as usize];
        machine.ram.read_slice(&mut bytes, GuestAddress(at.into())).unwrap();
        bytes
    });
    assert!(
        buffers[0] != buffers[1] && buffers.iter().all(|bytes| bytes.iter().any(|byte| *byte != bytes[0]))
    );
    assert_eq!(mmio.ignored().count(), 0);
    assert!(!line.is_asserted());
    drop(events);
}
