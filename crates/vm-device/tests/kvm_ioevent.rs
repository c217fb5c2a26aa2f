//! Kicks of a guest program that do not leave the guest: ioeventfd.
#![cfg(all(feature = "kvm", target_arch = "x86_64"))]

use vm_device::device_manager::IoManager;
use vm_device::interrupt::Event;
use vm_device::kvm::{IoAddress, IoEvent, IoMatch};

mod kvm_guest;

use kvm_guest::{Code, Exit, Machine};

const PORT: IoAddress = IoAddress::Pio(0x320);
const MEMORY: IoAddress = IoAddress::Mmio(0xd_0050);

/// Writes that match and others.
fn program() -> Code {
    let mut code = Code::default();
    code.out8(0x320, 1)
        .out8(0x320, 2)
        .out8(0x321, 1)
        .op(&[0xba, 0x20, 0x03]) // mov dx, 0x320
        .op(&[0xb8, 0x01, 0x00]) // mov ax, 1
        .op(&[0xef]) // out dx, ax
        .op(&[0xb8, 0x00, 0xd0]) // mov ax, 0xd000
        .op(&[0x8e, 0xc0]) // mov es, ax
        .op(&[0x26, 0xc7, 0x06, 0x50, 0x00, 0x01, 0x00]) // mov word es:[0x50], 1
        .op(&[0x26, 0xc7, 0x06, 0x50, 0x00, 0x02, 0x00]) // mov word es:[0x50], 2
        .op(&[0x26, 0xc6, 0x06, 0x50, 0x00, 0x01]) // mov byte es:[0x50], 1
        .op(&[0x26, 0xc7, 0x06, 0x60, 0x00, 0x03, 0x00]) // mov word es:[0x60], 3
        .op(&[0x26, 0xc6, 0x06, 0x60, 0x00, 0x04]) // mov byte es:[0x60], 4
        .done();
    code
}

#[test]
fn a_kick_that_matches_is_no_exit_and_all_others_are() {
    let name = "a_kick_that_matches_is_no_exit_and_all_others_are";
    let Some(mut machine) = Machine::new(name) else { return };
    let manager = IoManager::new();
    let mut io = manager.vcpu();
    let kicks = [Event::new().unwrap(), Event::new().unwrap(), Event::new().unwrap()];
    let [port, memory, any] = &kicks;
    let events = [
        IoEvent::new(&machine.vm, PORT, IoMatch::U8(1), port).unwrap(),
        IoEvent::new(&machine.vm, MEMORY, IoMatch::U16(1), memory).unwrap(),
        IoEvent::new(&machine.vm, IoAddress::Mmio(0xd_0060), IoMatch::Any, any).unwrap(),
    ];
    assert_eq!(events[1].address(), MEMORY);

    machine.load16(&program());
    machine.run(&mut io);
    machine.tell(name, "three kicks without one");
    let others = [
        Exit::Out(0x320, vec![2]),
        Exit::Out(0x321, vec![1]),
        Exit::Out(0x320, vec![1, 0]),
        Exit::Write(0xd_0050, vec![2, 0]),
        Exit::Write(0xd_0050, vec![1]),
    ];
    assert_eq!(machine.exits, others);
    assert!(kicks.iter().all(Event::take), "{kicks:?}");

    // Nothing is left behind when they are taken away: all writes are exits.
    drop(events);
    machine.load16(&program());
    machine.run(&mut io);
    machine.tell(name, "after taking them away");
    assert_eq!(machine.exits.len(), 9);
    assert!(!kicks.iter().any(Event::take));
}

#[test]
fn two_kicks_at_one_address_differ_in_their_value() {
    let name = "two_kicks_at_one_address_differ_in_their_value";
    let Some(machine) = Machine::new(name) else { return };
    let vm = &machine.vm;
    let event = Event::new().unwrap();
    let new = |matched| IoEvent::new(vm, MEMORY, matched, &event);
    let one = new(IoMatch::U16(1)).unwrap();
    let two = new(IoMatch::U16(2)).unwrap();
    let exists = Some(rustix::io::Errno::EXIST.raw_os_error());
    assert_eq!(new(IoMatch::U16(1)).unwrap_err().raw_os_error(), exists);
    assert_eq!(new(IoMatch::Any).unwrap_err().raw_os_error(), exists);
    assert!(new(IoMatch::U32(1)).is_ok(), "and in their width");
    drop((one, two));
    // Those that failed took nothing away and left nothing behind.
    for matched in [IoMatch::U8(1), IoMatch::U16(1), IoMatch::U32(1), IoMatch::U64(1), IoMatch::Any] {
        drop(new(matched).unwrap());
    }
    let wrong = IoEvent::new(vm, IoAddress::Mmio(u64::MAX), IoMatch::U16(1), &event);
    assert!(wrong.is_err(), "wraps around");
}
