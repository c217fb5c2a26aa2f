//! Pins through bridges, MSI, and MSI-X in a BAR.
use vm_device::bus::MmioAddress;
use vm_device::device_manager::MmioManager;
use vm_device::interrupt::MsiMessage;
use vm_device::pci::*;

use crate::machine::*;

const PLACE: Place = (0, 2, 0);

#[test]
fn pci_6_2_3_intx_status_and_disable() {
    let machine = Machine::new();
    let device = machine.add(BusId::Root, 4, 1);
    let place = (0, 4, 0);
    let interrupts = device.interrupts();
    let status = || machine.read16(place, 6) & 8 != 0;
    assert_eq!((machine.asserted(), status()), ([false; 4], false));
    interrupts.set_intx(true);
    assert_eq!((machine.asserted(), status()), ([true, false, false, false], true));
    machine.write16(place, 4, 0x0400);
    assert_eq!((machine.asserted(), status()), ([false; 4], true), "the status does not care");
    machine.write16(place, 4, 0);
    assert!(machine.asserted()[0]);
    interrupts.set_intx(false);
    assert_eq!((machine.asserted(), status()), ([false; 4], false));
}

#[test]
fn bridge_9_1_pins_are_shifted_by_device_numbers_and_share_lines() {
    let machine = Machine::new();
    let port = machine.port(5, None);
    let upstream = machine.port_on(BusId::Behind(port), 0, 0, PortKind::Upstream, None).unwrap();
    let behind = machine.add(BusId::Behind(upstream), 6, 1);
    let beside = machine.add(BusId::Root, 3, 2);
    // 6 + 0 + 5 = 11, so that INTA is INTD; at device 3 of the root bus as well.
    behind.interrupts().set_intx(true);
    assert_eq!(machine.asserted(), [false, false, false, true]);
    beside.interrupts().set_intx(true);
    behind.interrupts().set_intx(false);
    assert_eq!(machine.asserted(), [false, false, false, true]);
    let card = machine.root.remove(BusId::Root, 3).unwrap();
    assert_eq!(machine.asserted(), [false; 4], "what is not there asserts nothing");
    beside.interrupts().set_intx(true);
    assert_eq!(machine.asserted(), [false; 4]);
    machine.root.add(BusId::Root, 4, card).unwrap();
    assert_eq!(machine.asserted(), [true, false, false, false], "at its new place");
}

fn msix() -> (Machine, std::sync::Arc<Answer>) {
    let machine = Machine::new();
    let mut builder = FunctionBuilder::new("msix", identity(1));
    builder.bar(0, BarKind::Memory64 { prefetchable: true }, 0x4000).unwrap();
    builder.pin(Pin::A);
    let layout =
        MsixLayout { vectors: 3, table_bar: 0, table_offset: 0x2000, pending_bar: 0, pending_offset: 0x2800 };
    builder.msix(layout).unwrap();
    let (function, device) = build(builder, Some(machine.controller.messages(3)), 1);
    machine.root.add(BusId::Root, 2, Card::single(function)).unwrap();
    machine.write32(PLACE, 0x10, MEMORY as u32);
    machine.write16(PLACE, 4, 6);
    (machine, device)
}

fn program(machine: &Machine, vector: u64, words: [u32; 4]) {
    for (at, word) in (0..).zip(words) {
        let address = MEMORY + 0x2000 + vector * 16 + at * 4;
        machine.buses.mmio_write(MmioAddress(address), &word.to_le_bytes()).unwrap();
    }
}

fn pending(machine: &Machine) -> u64 {
    let mut data = [0; 8];
    machine.buses.mmio_read(MmioAddress(MEMORY + 0x2800), &mut data).unwrap();
    u64::from_le_bytes(data)
}

#[test]
fn pci_6_8_2_msix_by_its_table_in_a_bar() {
    let (machine, device) = msix();
    let cap = machine.capability(PLACE, 0x11);
    assert_eq!([0, 4, 8].map(|at| machine.read32(PLACE, cap + at)), [0x0002_0011, 0x2000, 0x2800]);
    let message = device.interrupts().message(1).unwrap();
    assert!(device.interrupts().message(3).is_none());
    program(&machine, 1, [0xfee0_1000, 0, 0x51, 0]);
    message.signal();
    machine.write16(PLACE, cap + 2, 0x8000);
    assert!(device.interrupts().uses_messages());
    assert_eq!(machine.controller.take(), [], "not of before");
    message.signal();
    let sent = MsiMessage { address: 0xfee0_1000, data: 0x51 };
    assert_eq!(machine.controller.take(), [sent]);
    // The vector's mask, all masks, and no bus master: pending.
    let mask = |which: usize, on: bool| match which {
        0 => program(&machine, 1, [0xfee0_1000, 0, 0x51, on.into()]),
        1 => machine.write16(PLACE, cap + 2, if on { 0xc000 } else { 0x8000 }),
        _ => machine.write16(PLACE, 4, if on { 2 } else { 6 }),
    };
    for which in 0..3 {
        mask(which, true);
        message.signal();
        assert_eq!((machine.controller.take(), pending(&machine)), (vec![], 2));
        mask(which, false);
        assert_eq!((machine.controller.take(), pending(&machine)), (vec![sent], 0));
    }
    assert!(device.interrupts().is_bus_master());
}

#[test]
fn pci_6_8_3_3_a_function_with_messages_is_silent_on_its_pin() {
    let (machine, device) = msix();
    let cap = machine.capability(PLACE, 0x11);
    device.interrupts().set_intx(true);
    assert!(machine.asserted()[2]);
    machine.write16(PLACE, cap + 2, 0x8000);
    assert_eq!(machine.asserted(), [false; 4]);
    machine.write16(PLACE, cap + 2, 0);
    assert!(machine.asserted()[2]);
}

#[test]
fn pci_6_8_2_table_and_pending_bits_do_not_reach_the_device() {
    let (machine, device) = msix();
    device.took();
    let mut data = [0; 8];
    machine.buses.mmio_write(MmioAddress(MEMORY + 0x2800), &[0xff; 8]).unwrap();
    machine.buses.mmio_write(MmioAddress(MEMORY + 0x2000 + 0x2c), &[0xff; 4]).unwrap();
    assert_eq!(pending(&machine), 0);
    // Half in the table.
    machine.buses.mmio_write(MmioAddress(MEMORY + 0x1ffc), &[0xff; 8]).unwrap();
    machine.buses.mmio_write(MmioAddress(MEMORY + 0x202c), &[0xff; 8]).unwrap();
    machine.buses.mmio_read(MmioAddress(MEMORY + 0x202c), &mut data).unwrap();
    assert_eq!(data, [0xff; 8]);
    machine.buses.mmio_read(MmioAddress(MEMORY + 0x2000), &mut data).unwrap();
    assert_eq!(data, [0; 8]);
    assert!(device.took().is_empty());
    machine.buses.mmio_write(MmioAddress(MEMORY + 0x2030), &[1]).unwrap();
    assert_eq!(device.took(), ["bar 0 0x2030 [01]"]);
}

#[test]
fn pci_6_8_1_msi_by_its_registers() {
    let machine = Machine::new();
    let mut builder = FunctionBuilder::new("msi", identity(1));
    builder.msi(4).unwrap();
    let (function, device) = build(builder, Some(machine.controller.messages(4)), 1);
    machine.root.add(BusId::Root, 2, Card::single(function)).unwrap();
    machine.write16(PLACE, 4, 4);
    let cap = machine.capability(PLACE, 5);
    assert_eq!(machine.read16(PLACE, cap + 2), 0x0184, "four vectors, 64 bits, masks");
    machine.write32(PLACE, cap + 4, 0xfee0_0003);
    machine.write32(PLACE, cap + 8, 0x1);
    machine.write16(PLACE, cap + 12, 0x4f);
    machine.write32(PLACE, cap + 16, u32::MAX);
    assert_eq!(machine.read32(PLACE, cap + 16), 0xf, "masks of four vectors");
    machine.write16(PLACE, cap + 2, 0x0011);
    let signal = |n| device.interrupts().message(n).unwrap().signal();
    signal(0);
    signal(3);
    assert_eq!(machine.read32(PLACE, cap + 20), 0b1001);
    machine.write32(PLACE, cap + 16, 0);
    let message = |data| MsiMessage { address: 0x1_fee0_0000, data };
    // The guest gave two vectors.
    assert_eq!(machine.controller.take(), [message(0x4e)]);
    signal(1);
    assert_eq!(machine.controller.take(), [message(0x4f)]);
    machine.write32(PLACE, cap + 20, 0);
    assert_eq!(machine.read32(PLACE, cap + 20), 0b1000);
}

#[test]
fn pcie_6_6_2_a_function_level_reset_is_of_the_function_alone() {
    let machine = Machine::new();
    let (first, a) = function(0xa);
    let (second, b) = function(0xb);
    machine.root.add(BusId::Root, 2, Card::multifunction(vec![(0, first), (1, second)]).unwrap()).unwrap();
    machine.enable((0, 2, 0), 0xc000_0000);
    machine.enable((0, 2, 1), 0xc000_1000);
    a.interrupts().set_intx(true);
    a.took();
    b.took();
    let control = machine.capability(PLACE, 0x10) + 8;
    machine.write16(PLACE, control, 0x0010);
    assert!(a.took().is_empty());
    machine.write(PLACE, control + 1, &[0x80]);
    assert_eq!(a.took(), ["reset", "bar 0 nowhere"]);
    assert!(b.took().is_empty());
    assert_eq!((machine.read16(PLACE, 4), machine.read32(PLACE, 0x10)), (0, 0));
    assert_eq!(machine.read16(PLACE, control), 0x2810, "and the bit reads as 0");
    assert_eq!((machine.at(0xc000_0000), machine.at(0xc000_1000)), (None, Some(0xb)));
    assert_eq!(machine.asserted(), [false; 4]);
}
