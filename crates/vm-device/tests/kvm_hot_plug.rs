//! A guest program under KVM sees a device of a `DeviceManager` come, interrupt and go, while it looks for it all the time.
#![cfg(all(feature = "kvm", target_arch = "x86_64"))]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vm_device::device_manager::{Device, DeviceManager, IoResource, IoType, IrqResource};
use vm_device::interrupt::{IrqLine, IrqSource, Trigger};
use vm_device::kvm::{KvmInterrupts, LineConnection};
use vm_device::resources::{INSTANCE_ID_BASE, SystemAllocator, X86_64_IRQ_BASE, X86_64_IRQ_END};
use vm_memory::{Bytes, GuestAddress};

mod kvm_guest;

use kvm_guest::interrupts::{set_up_pic, wait_for};
use kvm_guest::{Code, Machine, RESULTS};

/// Reads as a value; a write interrupts, on the line that the manager gave.
struct Bell {
    value: u8,
    interrupts: KvmInterrupts,
    line: IrqLine,
    source: IrqSource,
    connection: Mutex<Option<(u32, LineConnection)>>,
    read: AtomicU32,
    rung: AtomicU32,
}

impl Bell {
    fn new(value: u8, interrupts: &KvmInterrupts) -> Arc<Bell> {
        let line = IrqLine::new(Trigger::Edge).unwrap();
        Arc::new(Bell {
            value,
            interrupts: interrupts.clone(),
            source: line.source(),
            line,
            connection: Mutex::default(),
            read: AtomicU32::new(0),
            rung: AtomicU32::new(0),
        })
    }
}

impl Device for Bell {
    fn name(&self) -> String {
        "bell".to_string()
    }

    fn read(&self, _: GuestAddress, data: &mut [u8], _: IoType) {
        self.read.fetch_add(1, Ordering::SeqCst);
        data.fill(self.value);
    }

    fn write(&self, _: GuestAddress, _: &[u8], _: IoType) {
        self.source.pulse();
        self.rung.fetch_add(1, Ordering::SeqCst);
    }

    fn set_resources(&self, _: &[IoResource], irq: Option<IrqResource>) {
        let number = irq.and_then(|irq| irq.0).unwrap();
        let connection = self.interrupts.connect_line(&self.line, number).unwrap();
        *self.connection.lock().unwrap() = Some((number, connection));
    }
}

/// Reads port 0x300 until it says `value`.
fn poll_for(code: &mut Code, value: u8, name: &'static str) {
    code.op(&[0xba, 0x00, 0x03]) // mov dx, 0x300
        .label(name)
        .op(&[0xec, 0x3c, value]) // in al, dx; cmp al, value
        .jump(0x75, name); // jne
}

#[test]
fn a_device_comes_interrupts_and_goes_while_the_guest_looks() {
    let name = "a_device_comes_interrupts_and_goes_while_the_guest_looks";
    let Some(mut machine) = Machine::new(name) else { return };
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    let allocator = SystemAllocator::new(
        None,
        None,
        GuestAddress(0xd000_0000),
        0x1000_0000,
        X86_64_IRQ_BASE,
        X86_64_IRQ_END,
        INSTANCE_ID_BASE,
    )
    .unwrap();
    let mut manager = DeviceManager::new(&allocator);

    let mut code = Code::default();
    set_up_pic(&mut code, false, "handler");
    // Twice: nobody, somebody, an interrupt.
    for (value, count, names) in [
        (0x51, 1, ["empty", "plugged", "wait", "rung"]),
        (0x52, 2, ["empty 2", "plugged 2", "wait 2", "rung 2"]),
    ] {
        let [empty, plugged, wait, rung] = names;
        poll_for(&mut code, 0xff, empty);
        poll_for(&mut code, value, plugged);
        code.out8(0x300, 0);
        wait_for(&mut code, wait, rung, count);
    }
    poll_for(&mut code, 0xff, "over");
    code.done()
        .label("handler")
        .op(&[0x50]) // push ax
        .op(&[0xff, 0x06, 0x00, 0x05]) // inc word [0x500]
        .op(&[0xb0, 0x20, 0xe6, 0x20]) // mov al, 0x20; out 0x20, al
        .op(&[0x58, 0xcf]); // pop ax; iret
    machine.load16(&code);

    let ram = machine.ram.clone();
    let mut io = manager.vcpu();
    thread::scope(|scope| {
        let vmm = scope.spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(30);
            let wait = |what: &str, done: &dyn Fn() -> bool| {
                while !done() {
                    assert!(Instant::now() < deadline, "{what}");
                    thread::yield_now();
                }
            };
            let mut reads = 0;
            for (value, count) in [(0x51, 1_u16), (0x52, 2)] {
                let before = manager.counts().unclaimed;
                wait("the guest looks where nobody is", &|| manager.counts().unclaimed > before);
                let bell = Bell::new(value, &interrupts);
                let mut resources = [IoResource::new(Some(GuestAddress(0x300)), 1, IoType::Pio)];
                let id = manager
                    .register_device(bell.clone(), None, &mut resources, Some(IrqResource(None)))
                    .unwrap();
                assert_eq!(bell.connection.lock().unwrap().as_ref().unwrap().0, X86_64_IRQ_BASE);
                wait("the interrupt", &|| ram.read_obj::<u16>(GuestAddress(RESULTS)).unwrap() == count);
                let after = manager.counts().unclaimed;
                // The guest may be inside of it at this moment, and is not afterwards.
                let removal = manager.unregister_device(id).unwrap();
                assert!(removal.is_over());
                let now = (bell.read.load(Ordering::SeqCst), bell.rung.load(Ordering::SeqCst));
                wait("the guest looks again", &|| manager.counts().unclaimed > after);
                assert_eq!((bell.read.load(Ordering::SeqCst), bell.rung.load(Ordering::SeqCst)), now);
                assert_eq!(now.1, 1);
                reads += now.0;
            }
            assert!(manager.is_empty());
            reads
        });
        machine.run(&mut io);
        let reads = vmm.join().unwrap();
        let seen = machine.result16(0);
        machine.tell(name, &format!("two devices in turn, {seen} interrupts, {reads} reads of a device"));
        assert_eq!(seen, 2);
        assert!(reads >= 2);
    });
}
