//! Interrupts for guest programs under KVM: lines through irqfd and resample, messages through routes.
#![cfg(all(feature = "kvm", target_arch = "x86_64"))]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vm_device::bus::{MmioAddress, MmioAddressOffset, MmioRange, PioAddress, PioAddressOffset, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::interrupt::{
    Event, IrqLine, IrqSource, Message, MessageAction, MessageChange, MessageController, Messages,
    MsiMessage, Trigger,
};
use vm_device::kvm::{Chip, KvmInterrupts, Route};
use vm_device::{DeviceMmio, DevicePio};
use vm_memory::{Bytes, GuestAddress};

mod kvm_guest;

use kvm_guest::interrupts::{Watcher, handlers, set_up_apic, set_up_pic, spin, wait_for};
use kvm_guest::{Code, Machine, RESULTS};

/// A write to its port asserts and at once deasserts, from another thread.
struct Pulse(Arc<IrqSource>);

impl DevicePio for Pulse {
    fn pio_read(&self, _: PioAddress, _: PioAddressOffset, _: &mut [u8]) {}

    fn pio_write(&self, _: PioAddress, _: PioAddressOffset, _: &[u8]) {
        let source = self.0.clone();
        thread::spawn(move || source.pulse());
    }
}

#[test]
fn an_edge_arrives_through_irqfd() {
    let name = "an_edge_arrives_through_irqfd";
    let Some(mut machine) = Machine::new(name) else { return };
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    let line = IrqLine::new(Trigger::Edge).unwrap();
    let connection = interrupts.connect_line(&line, 5).unwrap();
    assert!(interrupts.connect_line(&line, 5).is_err(), "it is connected");
    let mut manager = IoManager::new();
    let pulse = Arc::new(Pulse(Arc::new(line.source())));
    manager.register_pio(PioRange::new(PioAddress(0x300), 1).unwrap(), pulse).unwrap();

    let mut code = Code::default();
    set_up_pic(&mut code, false, "handler");
    code.out8(0x300, 0); // One interrupt, please.
    wait_for(&mut code, "first", "one", 1);
    code.out8(0x300, 0);
    wait_for(&mut code, "second", "two", 2);
    code.done()
        .label("handler")
        .op(&[0x50]) // push ax
        .op(&[0xff, 0x06, 0x00, 0x05]) // inc word [0x500]
        .op(&[0xb0, 0x20, 0xe6, 0x20]) // mov al, 0x20; out 0x20, al: end of interrupt
        .op(&[0x58, 0xcf]); // pop ax; iret
    machine.load16(&code);
    machine.run(&mut manager.vcpu());
    machine.tell(name, &format!("{} interrupts", machine.result16(0)));
    assert_eq!(machine.result16(0), 2);
    assert_eq!(machine.exits.len(), 2, "only the two requests");

    // Off the line: the next trigger stays where it is.
    drop(connection);
    line.source().pulse();
    assert!(line.trigger().take());
    let again = interrupts.connect_line(&line, 5);
    assert!(again.is_ok(), "{again:?}");
}

/// Its port reads as 1 while it wants something; a write of 0 is the answer to that, another one a request.
struct Levelled(IrqSource);

impl DevicePio for Levelled {
    fn pio_read(&self, _: PioAddress, _: PioAddressOffset, data: &mut [u8]) {
        data.fill(self.0.is_asserted().into());
    }

    fn pio_write(&self, _: PioAddress, _: PioAddressOffset, data: &[u8]) {
        self.0.set(data != [0]);
    }
}

#[test]
fn a_level_that_two_devices_share_is_resampled() {
    let name = "a_level_that_two_devices_share_is_resampled";
    let Some(mut machine) = Machine::new(name) else { return };
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    let line = IrqLine::new(Trigger::Level).unwrap();
    let _connection = interrupts.connect_line(&line, 5).unwrap();
    let mut manager = IoManager::new();
    for port in [0x300, 0x301] {
        let device = Arc::new(Levelled(line.source()));
        manager.register_pio(PioRange::new(PioAddress(port), 1).unwrap(), device).unwrap();
    }

    let mut code = Code::default();
    set_up_pic(&mut code, true, "handler");
    // Both devices want something before the guest listens.
    code.out8(0x300, 1).out8(0x301, 1);
    wait_for(&mut code, "again", "over", 2);
    code.done()
        // Serves one device only, the first that wants something, and ends the interrupt.
        .label("handler")
        .op(&[0x60]) // pusha
        .op(&[0xff, 0x06, 0x00, 0x05]) // inc word [0x500]
        .op(&[0xba, 0x00, 0x03]) // mov dx, 0x300
        .op(&[0xec, 0x84, 0xc0]) // in al, dx; test al, al
        .jump(0x74, "other") // je other
        .op(&[0x30, 0xc0, 0xee]) // xor al, al; out dx, al
        .op(&[0xff, 0x06, 0x02, 0x05]) // inc word [0x502]
        .jump(0xeb, "end")
        .label("other")
        .op(&[0x42]) // inc dx
        .op(&[0xec, 0x84, 0xc0]) // in al, dx; test al, al
        .jump(0x74, "end") // je end
        .op(&[0x30, 0xc0, 0xee]) // xor al, al; out dx, al
        .op(&[0xff, 0x06, 0x04, 0x05]) // inc word [0x504]
        .label("end")
        .op(&[0xb0, 0x20, 0xe6, 0x20]) // mov al, 0x20; out 0x20, al
        .op(&[0x61, 0xcf]); // popa; iret
    machine.load16(&code);
    let watcher = Watcher::new(&line);
    machine.run(&mut manager.vcpu());
    let (ended, raised) = watcher.finish();
    machine.tell(
        name,
        &format!(
            "{} interrupts, {} and {} served, {ended} ends told, {raised} times raised again",
            machine.result16(0),
            machine.result16(2),
            machine.result16(4)
        ),
    );
    assert_eq!((machine.result16(0), machine.result16(2), machine.result16(4)), (2, 1, 1));
    assert_eq!((ended, raised), (2, 1));
    assert!(!line.is_asserted());
}

/// A function with two messages: MSI-X table at 0, pending bits at 0x800; a write to 0xc00 signals the vector that is written, one
/// to 0xd00 is Message Control of the capability (bit 15 enable, bit 14 mask all).
struct Function {
    messages: Messages,
    vectors: Vec<Message>,
}

impl Function {
    fn new(interrupts: &KvmInterrupts) -> Arc<Function> {
        let messages = Messages::new(Arc::new(interrupts.clone()), 24, 2).unwrap();
        Arc::new(Function { vectors: messages.vectors(), messages })
    }
}

impl DeviceMmio for Function {
    fn mmio_read(&self, _: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match offset {
            0..0x800 => self.messages.table_read(offset, data),
            _ => self.messages.pba_read(offset - 0x800, data),
        }
    }

    fn mmio_write(&self, _: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        match (offset, data) {
            (0..0x800, _) => self.messages.table_write(offset, data),
            (0xc00, [vector, ..]) => self.vectors[usize::from(*vector)].signal(),
            (0xd00, [_, control, ..]) => {
                self.messages.set_msix_control(control & 0x80 != 0, control & 0x40 != 0);
            }
            _ => {}
        }
    }
}

/// Where the function is.
const FUNCTION: u32 = 0xd000_0000;

/// As drivers write it.
fn program_vector(code: &mut Code, index: u32, data: u32, masked: u32) {
    for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, data), (12, masked)] {
        code.store(FUNCTION + index * 16 + at, value);
    }
}

#[test]
fn pci_6_8_2_messages_arrive_and_wait_behind_masks() {
    let name = "pci_6_8_2_messages_arrive_and_wait_behind_masks";
    let Some(machine) = Machine::new(name) else { return };
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    messages_arrive(name, machine, &interrupts);
    // What the function leaves: the lines' routes.
    assert_eq!(interrupts.routes(5), [Route::Pin(Chip::PicMaster, 5), Route::Pin(Chip::IoApic, 5)]);
}

#[test]
fn messages_need_no_more_of_the_kernel_than_the_local_apic() {
    let name = "messages_need_no_more_of_the_kernel_than_the_local_apic";
    let Some(machine) = Machine::split(name) else { return };
    let interrupts = KvmInterrupts::split(machine.vm.clone());
    messages_arrive(name, machine, &interrupts);
    assert_eq!(interrupts.routes(5), []);
}

fn messages_arrive(name: &str, mut machine: Machine, interrupts: &KvmInterrupts) {
    let function = Function::new(interrupts);
    let mut manager = IoManager::new();
    let range = MmioRange::new(MmioAddress(FUNCTION.into()), 0x1000).unwrap();
    manager.register_mmio(range, function.clone()).unwrap();

    let mut code = Code::default();
    set_up_apic(&mut code);
    code.store(FUNCTION + 0xd00, 0xc000); // enabled, all masked
    program_vector(&mut code, 0, 0x41, 0);
    program_vector(&mut code, 1, 0x42, 1);
    code.store(FUNCTION + 0xc00, 0);
    code.copy(FUNCTION + 0x800, 0x510); // the first is pending
    code.store(FUNCTION + 0xd00, 0x8000); // no longer all
    spin(&mut code, 0x500, 1, "arrived");
    code.store(FUNCTION + 0xc00, 0);
    spin(&mut code, 0x500, 2, "arrived again");
    code.store(FUNCTION + 0xc00, 1);
    code.copy(FUNCTION + 0x800, 0x514); // the second is pending
    code.copy(0x504, 0x518); // and has not arrived
    code.store(FUNCTION + 16 + 12, 0); // unmask it
    spin(&mut code, 0x504, 1, "second arrived");
    code.copy(FUNCTION + 0x800, 0x51c); // nothing is pending
    program_vector(&mut code, 0, 0x41, 1);
    program_vector(&mut code, 0, 0x42, 1); // the first vector to the second handler
    code.store(FUNCTION + 12, 0);
    code.store(FUNCTION + 0xc00, 0);
    spin(&mut code, 0x504, 2, "changed");
    code.done();
    handlers(&mut code);
    machine.load16(&code);
    machine.run(&mut manager.vcpu());

    let results: Vec<u32> = [0, 4, 0x10, 0x14, 0x18, 0x1c].map(|at| machine.result32(at)).to_vec();
    machine.tell(name, &format!("counts and pending bits: {results:?}"));
    assert_eq!(results, [2, 2, 1, 2, 0, 0]);
    assert_eq!(function.messages.failures(), 0);
    let message = MsiMessage { address: 0xfee0_0000, data: 0x42 };
    assert_eq!(interrupts.routes(24), [Route::Message(message)]);

    // The function goes, and its routes with it.
    manager.deregister_mmio(MmioAddress(FUNCTION.into()));
    drop(function);
    assert_eq!(interrupts.routes(24), []);
}

/// Says that the program has ended, in whichever way.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A device's thread signals, and waits for each interrupt to be counted by the guest, which does nothing but mask and unmask.
#[test]
fn no_message_is_lost_while_the_guest_masks_and_unmasks() {
    const COUNT: u32 = 500;
    let name = "no_message_is_lost_while_the_guest_masks_and_unmasks";
    let Some(mut machine) = Machine::new(name) else { return };
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    let function = Function::new(&interrupts);
    let mut manager = IoManager::new();
    let range = MmioRange::new(MmioAddress(FUNCTION.into()), 0x1000).unwrap();
    manager.register_mmio(range, function.clone()).unwrap();

    let mut code = Code::default();
    set_up_apic(&mut code);
    program_vector(&mut code, 0, 0x41, 0);
    code.store(FUNCTION + 0xd00, 0x8000);
    code.label("again");
    code.store(FUNCTION + 12, 1); // mask
    code.store(FUNCTION + 12, 0); // unmask
    code.compare(0x500, COUNT).jump(0x75, "again"); // jne again
    code.done();
    handlers(&mut code);
    machine.load16(&code);

    let over = AtomicBool::new(false);
    let ram = machine.ram.clone();
    let counted = || ram.read_obj::<u32>(GuestAddress(RESULTS)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let vector = &function.vectors[0];
            while !vector.is_enabled() && !over.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            for n in 0..COUNT {
                vector.signal();
                while counted() == n && !over.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            }
        });
        // Also when the program fails: a scope waits for its threads.
        let _over = Over(&over);
        machine.run(&mut manager.vcpu());
    });
    machine.tell(name, &format!("{} interrupts", machine.result32(0)));
    assert_eq!(machine.result32(0), COUNT);
    assert_eq!(function.messages.failures(), 0);
}

#[test]
fn policy_8_routes_that_kvm_refuses_change_nothing() {
    let name = "policy_8_routes_that_kvm_refuses_change_nothing";
    let Some(machine) = Machine::new(name) else { return };
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    let message = |data| Route::Message(MsiMessage { address: 0xfee0_0000, data });
    interrupts.set_routes(&[(24, &[message(0x41)]), (25, &[message(0x42)])]).unwrap();
    // KVM has 4096 numbers on x86, and an I/O APIC of 24 pins.
    for (bad, route) in
        [(4096, message(1)), (26, Route::Pin(Chip::IoApic, 24)), (26, Route::Pin(Chip::PicSlave, 8))]
    {
        let changes: [(u32, &[Route]); 4] =
            [(24, &[message(0x43)]), (25, &[]), (24, &[message(0x44)]), (bad, &[route])];
        assert!(interrupts.set_routes(&changes).is_err(), "{bad} {route:?}");
        assert_eq!(interrupts.routes(24), [message(0x41)]);
        assert_eq!(interrupts.routes(25), [message(0x42)]);
        assert_eq!(interrupts.routes(bad), []);
    }
    // A function of which one vector cannot be: the other works.
    let controller = Arc::new(interrupts.clone());
    let messages = Messages::new(controller, 4095, 2).unwrap();
    messages.set_msix_control(true, false);
    for vector in 0..2 {
        messages.table_write(vector * 16 + 8, &0x41_u32.to_le_bytes());
        messages.table_write(vector * 16, &0xfee0_0000_u64.to_le_bytes());
        messages.table_write(vector * 16 + 12, &[0; 4]);
    }
    assert_eq!(messages.failures(), 1);
    assert_eq!(interrupts.routes(4095), [message(0x41)]);
    messages.vectors().iter().for_each(Message::signal);
    let mut pending = [0];
    messages.pba_read(0, &mut pending);
    assert_eq!(pending, [0b10], "the one that has no route keeps what it has to say");
    drop(messages);
    assert_eq!(interrupts.routes(4095), []);
    // A line is connected once.
    let line = IrqLine::new(Trigger::Edge).unwrap();
    let _connection = interrupts.connect_line(&line, 7).unwrap();
    assert!(interrupts.connect_line(&line, 9).is_err());
}

#[test]
fn changes_of_which_one_fails_leave_no_route_and_no_file_behind() {
    let name = "changes_of_which_one_fails_leave_no_route_and_no_file_behind";
    let Some(machine) = Machine::new(name) else { return };
    let interrupts = KvmInterrupts::new(machine.vm.clone());
    let events = [(); 3].map(|()| Event::new().unwrap());
    let [busy, held, free] = &events;
    let deliver = |data| MessageAction::Deliver(MsiMessage { address: 0xfee0_0000, data });
    let change = |number, event, action| MessageChange { number, event, action };
    interrupts.apply(&[change(30, busy, deliver(1)), change(31, held, deliver(2))]).unwrap();
    // KVM takes an eventfd for one number only.
    let refused = interrupts.apply(&[
        change(31, held, MessageAction::Forget),
        change(32, free, deliver(3)),
        change(33, busy, deliver(4)),
    ]);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(rustix::io::Errno::BUSY.raw_os_error()));
    let routes = [30, 31, 32, 33].map(|number| interrupts.routes(number).len());
    assert_eq!(routes, [1, 1, 0, 0]);
    // The one in the middle is not attached any more, and the first one is again.
    interrupts.apply(&[change(34, free, deliver(5))]).unwrap();
    assert!(interrupts.apply(&[change(35, held, deliver(6))]).is_err());
    interrupts.apply(&[change(31, held, MessageAction::Forget)]).unwrap();
    interrupts.apply(&[change(35, held, deliver(6))]).unwrap();
}
