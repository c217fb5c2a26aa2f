//! What may be put where, and where bus numbers lead.
use vm_device::pci::*;

use crate::machine::*;

#[test]
fn pci_3_2_2_3_4_a_device_of_several_functions_says_so_and_has_function_0() {
    let machine = Machine::new();
    let pair = vec![(3, function(0x13).0), (0, function(0x10).0)];
    machine.root.add(BusId::Root, 5, Card::multifunction(pair).unwrap()).unwrap();
    machine.add(BusId::Root, 6, 0x20);
    assert_eq!(machine.read::<1>((0, 5, 0), 0x0e), [0x80]);
    assert_eq!(machine.read::<1>((0, 5, 3), 0x0e), [0x80]);
    assert_eq!(machine.read::<1>((0, 6, 0), 0x0e), [0]);
    assert_eq!((machine.read16((0, 5, 3), 2), machine.read16((0, 5, 1), 2)), (0x13, 0xffff));
    for (functions, wrong) in [(vec![1], 0), (vec![0, 8], 8), (vec![0, 2, 2], 2), (vec![], 0)] {
        let functions = functions.into_iter().map(|number| (number, function(1).0)).collect();
        assert_eq!(Card::multifunction(functions).unwrap_err(), PciError::FunctionNumber(wrong));
    }
}

#[test]
fn places_that_are_taken_or_that_there_are_not_are_refused() {
    let machine = Machine::new();
    let port = machine.port(1, Some(1));
    machine.add(BusId::Root, 2, 2);
    let add = |bus, device| machine.root.add(bus, device, card(9).0);
    assert_eq!(add(BusId::Root, 1), Err(PciError::Occupied));
    assert_eq!(add(BusId::Root, 2), Err(PciError::Occupied));
    assert_eq!(add(BusId::Root, 32), Err(PciError::DeviceNumber(32)));
    assert_eq!(add(BusId::Behind(port), 1), Err(PciError::DeviceNumber(1)), "a link has one device");
    let other = Machine::new();
    other.port(1, None);
    let elsewhere = other.port(2, None);
    assert_eq!(add(BusId::Behind(elsewhere), 0), Err(PciError::NoSuchPort));
    let port_at = |device, function, kind, slot| machine.port_on(BusId::Root, device, function, kind, slot);
    assert_eq!(port_at(2, 0, PortKind::Root, None), Err(PciError::Occupied));
    assert_eq!(port_at(3, 1, PortKind::Root, None), Err(PciError::FunctionNumber(1)));
    assert_eq!(port_at(1, 8, PortKind::Root, None), Err(PciError::FunctionNumber(8)));
    assert_eq!(port_at(4, 0, PortKind::Upstream, Some(1)), Err(PciError::SlotNumber));
    assert_eq!(port_at(4, 0, PortKind::Root, Some(0x2000)), Err(PciError::SlotNumber));
    assert!(port_at(1, 1, PortKind::Root, None).is_ok());
    assert_eq!(port_at(1, 1, PortKind::Root, None), Err(PciError::Occupied));
    assert_eq!(machine.read::<1>((0, 1, 0), 0x0e), [0x81], "two ports are one device");
    assert_eq!(machine.root.remove(BusId::Root, 9).unwrap_err(), PciError::Empty);
    assert_eq!(machine.root.remove(BusId::Behind(port), 0).unwrap_err(), PciError::NoSuchPort);
}

#[test]
fn pcie_7_5_3_2_the_type_of_a_function_is_that_of_its_place() {
    let machine = Machine::new();
    let root = machine.port(1, Some(1));
    let upstream = machine.port_on(BusId::Behind(root), 0, 0, PortKind::Upstream, None).unwrap();
    let downstream = machine.port_on(BusId::Behind(upstream), 3, 0, PortKind::Downstream, Some(2)).unwrap();
    machine.add(BusId::Behind(downstream), 0, 7);
    machine.add(BusId::Root, 2, 8);
    machine.bridge((0, 1, 0), (1, 3), (0xc000_0000, 0xc00f_ffff));
    machine.bridge((1, 0, 0), (2, 3), (0xc000_0000, 0xc00f_ffff));
    machine.bridge((2, 3, 0), (3, 3), (0xc000_0000, 0xc00f_ffff));
    let kind = |place| machine.read16(place, machine.capability(place, 0x10) + 2);
    assert_eq!(
        [(0, 1, 0), (1, 0, 0), (2, 3, 0), (3, 0, 0), (0, 2, 0)].map(kind),
        [0x0142, 0x0052, 0x0162, 0x0002, 0x0092]
    );
    let link = |place| machine.read32(place, machine.capability(place, 0x10) + 0x0c);
    assert_eq!(link((0, 2, 0)), 0, "no link on the root bus");
    assert_ne!(link((3, 0, 0)), 0);
    // Down through three bridges.
    machine.enable((3, 0, 0), 0xc000_0000);
    assert_eq!(machine.at(0xc000_0000), Some(7));
    machine.write16((1, 0, 0), 0x04, 0);
    assert_eq!(machine.at(0xc000_0000), None);
    println!("{}", machine.root);
    assert!(machine.root.to_string().contains("      00.0 device 7"));
}

#[test]
fn bridge_bus_numbers_that_overlap_loop_or_are_reversed_lead_down_or_nowhere() {
    let machine = Machine::new();
    let first = machine.port(1, None);
    let second = machine.port(2, None);
    machine.add(BusId::Behind(first), 0, 1);
    let upstream = machine.port_on(BusId::Behind(second), 0, 0, PortKind::Upstream, None).unwrap();
    machine.add(BusId::Behind(upstream), 4, 2);
    let (low, high) = ((0, 1, 0), (0, 2, 0));
    let id = |place| machine.read16(place, 2);
    // Overlap: the first claims.
    machine.bridge(low, (1, 5), (0, 0));
    machine.bridge(high, (3, 4), (0, 0));
    assert_eq!((id((1, 0, 0)), id((3, 0, 0))), (1, 0xffff));
    // Both the same: again.
    machine.bridge(high, (1, 5), (0, 0));
    assert_eq!(id((1, 0, 0)), 1);
    // Reversed: claims nothing.
    machine.bridge(low, (5, 1), (0, 0));
    assert_eq!(id((1, 0, 0)), 0x000c, "the switch of the second");
    // A bridge that says that the root bus, or its own, is behind it.
    machine.bridge((1, 0, 0), (0, 255), (0, 0));
    assert_eq!(id((0, 1, 0)), 0x000c);
    machine.bridge((1, 0, 0), (1, 1), (0, 0));
    assert_eq!((id((1, 0, 0)), id((1, 4, 0))), (0x000c, 0xffff));
    machine.bridge((1, 0, 0), (2, 200), (0, 0));
    assert_eq!((id((2, 4, 0)), id((6, 4, 0))), (2, 0xffff));
    // Pairs of numbers of all kinds, at both levels.
    for numbers in (0..=u16::MAX).step_by(3) {
        let [secondary, subordinate] = numbers.to_le_bytes();
        machine.root.config_write(0, 2, 0, 0x18, &[0, secondary, subordinate, 0]);
        machine.root.config_write(secondary, 0, 0, 0x18, &[0, subordinate, secondary, 0]);
        let mut data = [0; 4];
        machine.root.config_read(subordinate, 4, 0, 0, &mut data);
    }
    machine.bridge(high, (1, 5), (0, 0));
    machine.bridge((1, 0, 0), (2, 2), (0, 0));
    assert_eq!(id((2, 4, 0)), 2);
}

#[test]
fn bridge_windows_are_closed_until_a_guest_opens_them() {
    let machine = Machine::new();
    machine.port(1, Some(7));
    // As QEMU 11.1's pcie-root-port reads, asked through its qtest.
    let registers = [0x1c, 0x20, 0x24, 0x28, 0x2c, 0x30].map(|at| machine.read32((0, 1, 0), at));
    assert_eq!(registers, [0x0000_00f0, 0x0000_fff0, 0x0001_fff1, 0, 0, 0]);
    let slot = machine.capability((0, 1, 0), 0x10) + 0x14;
    assert_eq!(machine.read32((0, 1, 0), slot), 7 << 19 | 0x7b);
    assert_eq!(machine.read32((0, 1, 0), slot + 4), 0x0000_07c0);
}

#[test]
fn a_root_bus_may_have_any_number() {
    let machine = Machine::with(0x40..=0x4f);
    let port = machine.port(1, None);
    machine.add(BusId::Behind(port), 0, 5);
    let read = |bus, device| {
        let mut data = [0; 4];
        machine.root.config_read(bus, device, 0, 0, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(read(0, 1), u32::MAX);
    assert_eq!(read(0x40, 1), 0x000c_1b36);
    machine.root.config_write(0x40, 1, 0, 0x18, &[0x40, 0x41, 0xff, 0]);
    assert_eq!((read(0x41, 0), read(0x50, 0)), (0x0005_1b36, u32::MAX));
    assert_eq!(machine.read32((0, 1, 0), 0), 0x000c_1b36, "memory begins with the root bus");
    assert_eq!(machine.read32((1, 0, 0), 0), 0x0005_1b36);
}

#[test]
fn builders_refuse_what_cannot_be() {
    let mut builder = FunctionBuilder::new("wrong", identity(1));
    builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
    builder.bar(1, BarKind::Io, 0x100).unwrap();
    let layout = MsixLayout { vectors: 4, table_bar: 0, table_offset: 0, pending_bar: 0, pending_offset: 64 };
    for bad in [
        MsixLayout { pending_offset: 56, ..layout },
        MsixLayout { table_offset: 4, ..layout },
        MsixLayout { table_bar: 1, ..layout },
        MsixLayout { table_bar: 2, ..layout },
        MsixLayout { table_bar: ROM_BAR, ..layout },
        MsixLayout { pending_offset: 0x1000, ..layout },
        MsixLayout { table_offset: !7, ..layout },
    ] {
        assert_eq!(builder.msix(bad), Err(PciError::MsixPlace), "{bad:?}");
    }
    for vectors in [0, 2049] {
        assert_eq!(builder.msix(MsixLayout { vectors, ..layout }), Err(PciError::VectorCount(vectors)));
    }
    for vectors in [0, 3, 64] {
        assert_eq!(builder.msi(vectors), Err(PciError::VectorCount(vectors)));
    }
    builder.msix(layout).unwrap();
    assert_eq!(builder.msix(layout), Err(PciError::Twice(0x11)));
    assert_eq!(builder.msi(1), Err(PciError::Twice(0x05)));
    builder.express().unwrap();
    assert_eq!(builder.express(), Err(PciError::Twice(0x10)));
    let no_room = builder.capability(&Capability::new(Capability::VENDOR, vec![0; 150]));
    assert_eq!(no_room, Err(PciError::NoRoom(9)));
    assert_eq!(builder.rom(vec![0; (1 << 24) + 1]).unwrap_err(), PciError::BarSize { bar: 6, size: 1 << 25 });
    builder.rom(vec![]).unwrap();
    assert_eq!(builder.rom(vec![]), Err(PciError::BarTaken(ROM_BAR)));
    assert_eq!(builder.vectors(), 4);
    let machine = Machine::new();
    let few = Some(machine.controller.messages(3));
    let error = builder.build(few, |_| unreachable!()).unwrap_err();
    assert_eq!(error, PciError::Vectors { wanted: 4, given: 3 });
}
